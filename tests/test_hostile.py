"""Folders and repositories that nobody should trust: each is refused in one line, and nothing of it is run or kept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import ABOUT, CARD, REPO, contents_of, safetensors, write_adapter
from hub_server import HubServer
from safetensors.numpy import load_file, save_file
from test_recommender import save_adapter

from peftrec.contents import check_folder
from peftrec.errors import HubError, ModelError
from peftrec.hub import pull, push
from peftrec.recommender import Recommender


def edit(name: str, content: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def values(name: str, **new: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **new}))

    return change


def link(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(to)


def tensors(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


CANARY = Path(tempfile.gettempdir()) / "peftrec-canary"
PICKLE = b"cos\nsystem\n(S'touch %s'\ntR." % bytes(CANARY)
"""Unpickling it leaves a file."""
SPAN = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(30))

# Refused at both doors: in a folder that is pushed, and in a repository that is pulled.
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights": (edit("adapter_model.bin", PICKLE), r"adapter_model\.bin: .*can run code"),
    "pickled training arguments": (edit("training_args.bin", b"PK"), r"training_args\.bin: .*can run code"),
    "checkpoint": (edit("optimizer.pt", b"PK"), r"optimizer\.pt: .*can run code"),
    "array with objects": (edit("scores.npy", b"\x93NUMPY"), r"scores\.npy: .*can run code"),
    "code": (edit("modeling_films.py", "import os"), r"modeling_films\.py: (code|not a file of an adapter)"),
    "code in a folder": (edit("figures/draw.py", "import os"), r"figures/draw\.py: (code|not a file of an adapter)"),
    "library": (edit("kernel.so", b"\x7fELF"), r"kernel\.so: (code|not a file of an adapter)"),
    "pickle called safetensors": (edit("adapter_model.safetensors", b"\x80\x04" * 50), r"not a whole safetensors file"),
    "cut weights": (edit("adapter_model.safetensors", safetensors()[:-9]), r"16,375 bytes of tensors, 16,384 announ"),
    "no weights": (edit("adapter_model.safetensors", b""), r"not a whole safetensors file"),
    "a pointer to weights": (edit("adapter_model.safetensors", "version https://git-lfs.g"), r"not a whole safetens"),
    "weights that are no numbers": (
        edit("adapter_model.safetensors", tensors({"a": SPAN}, struct.pack("<f", math.nan))),
        r"adapter_model\.safetensors: a weight that is no finite number",
    ),
    "endless weights in 16 bits": (
        edit("adapter_model.safetensors", tensors({"a": {**SPAN, "dtype": "BF16", "shape": [2]}}, b"\0\0\x80\x7f")),
        r"adapter_model\.safetensors: a weight that is no finite number",
    ),
    "shape of another size": (
        edit("adapter_model.safetensors", tensors({"a": {**SPAN, "shape": [10**9]}}, bytes(4))),
        r"4 bytes for F32 of shape \[1000000000\]",
    ),
    "shape that turns round": (
        edit("adapter_model.safetensors", tensors({"a": {**SPAN, "shape": [-1, -1]}}, bytes(4))),
        r"4 bytes for F32 of shape \[-1, -1\]",
    ),
    "unknown type of weights": (
        edit("adapter_model.safetensors", tensors({"a": {**SPAN, "dtype": "PICKLE"}}, bytes(4))),
        r"4 bytes for PICKLE",
    ),
    "huge header": (edit("adapter_model.safetensors", b"\xff" * 64), r"a header of 18,446,744,073,709,551,615 bytes"),
    "tensors over each other": (
        edit("adapter_model.safetensors", tensors({"a": SPAN, "b": SPAN}, bytes(4))),
        r"do not lie side by side",
    ),
    "something behind the tensors": (
        edit("adapter_model.safetensors", tensors({"a": SPAN}, bytes(4) + b"PK\x03\x04")),
        r"8 bytes of tensors, 4 announced",
    ),
    "header that is a list": (edit("adapter_model.safetensors", tensors([SPAN])), r"its header is not one"),
    "remote code in the tokenizer": (
        edit("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil--x", null]}}'),
        r"tokenizer_config\.json: auto_map: .*names code to run",
    ),
    "remote code further down": (
        edit("tokenizer_config.json", '{"a": [{"auto_map": {"AutoTokenizer": ["evil--x", null]}}]}'),
        r"tokenizer_config\.json: auto_map: .*names code to run",
    ),
    "a key twice": (edit("config.json", '{"auto_map": "evil--x", "auto_map": null}'), r"a key that is there twice"),
    "no number": (edit("adapter_config.json", '{"r": NaN}'), r"adapter_config\.json: not JSON \(NaN is no number\)"),
    "a rank that fills the memory": (values("adapter_config.json", r=10**9), r"r: 1000000000; expected at most 8,192"),
    "ranks that fill the memory": (values("adapter_config.json", rank_pattern={"q": 10**9}), r"rank_pattern: .*8,192"),
    "tokens that fill the memory": (
        values("adapter_config.json", num_virtual_tokens=1e12),
        r"num_virtual_tokens: 1000",
    ),
    "a pattern that never ends": (values("adapter_config.json", target_modules="(x+x+)+y"), r"may take for ever"),
    "a list of such": (values("adapter_config.json", target_modules=[".*.*.*.*.*.*y"]), r"may take for ever"),
    "a key that is such": (values("adapter_config.json", rank_pattern={"(.|x)*y": 4}), r"may take for ever"),
    "a pattern without repeats": (
        values("adapter_config.json", target_modules=r"(?:.|\w|[^.])" * 30 + "Y"),
        r"may take for ever",
    ),
    "a pattern of questions": (values("adapter_config.json", exclude_modules=".?" * 40 + "X"), r"may take for ever"),
    "many patterns": (
        values("adapter_config.json", modules_to_save=[f".*.*X{number}" for number in range(50)]),
        r"may take for ever",
    ),
    "a long pattern": (values("adapter_config.json", exclude_modules="x?" * 600), r"may take for ever"),
    "remote code in a config": (edit("config.json", '{"trust_remote_code": true}'), r"trust_remote_code: true names"),
    "megatron": (values("adapter_config.json", megatron_config={"a": 1}), r"megatron_config: .*names code to run"),
    "import by PEFT": (
        values("adapter_config.json", auto_mapping={"base_model_class": "system", "parent_library": "os"}),
        r"auto_mapping: 'os' would be imported",
    ),
    "base model is a path": (values("adapter_config.json", base_model_name_or_path="../../x"), r"expected a Hub id"),
    "base model is a URL": (values("adapter_config.json", base_model_name_or_path="http://x/y"), r"expected a Hub id"),
    "oversized peftrec.json": (edit("peftrec.json", b" " * 1_000_001), r"peftrec\.json: 1,000,001 bytes; expected at"),
    "oversized JSON": (edit("special_tokens_map.json", b" " * 10_000_001), r"10,000,001 bytes; expected at most"),
    "oversized card": (edit("README.md", b"#" * 2_000_001), r"README\.md: 2,000,001 bytes"),
    "deep JSON": (edit("special_tokens_map.json", "[" * 200_000), r"special_tokens_map\.json: not JSON"),
    "no JSON": (edit("adapter_config.json", "{'r': 8}"), r"adapter_config\.json: not JSON"),
    "JSON list": (edit("adapter_config.json", "[]"), r"adapter_config\.json: .*expected a JSON object"),
    "not UTF-8": (edit("README.md", b"\xff\xfe"), r"README\.md: byte 0 is not UTF-8"),
    "template that reads attributes": (
        values("peftrec.json", prompt={**dataclasses.asdict(ABOUT.prompt), "item": "{title.__class__}"}),
        r"prompt\.item",
    ),
    "prior that is not there": (lambda folder: (folder / "prior.json").unlink(), r"prior\.json: no such file"),
    "prior that is none": (
        edit("prior.json", '{"mean": 0, "items": {}, "user_shrinkage": -1}'),
        r"prior: a number out",
    ),
    "card of another base": (
        edit("README.md", "---\nbase_model: evil/base\n---\n"),
        r"README\.md: metadata: base_model: 'evil/base'; expected ns/tiny, as peftrec\.json has it",
    ),
    "letters that look like others": (edit("p\u0435ftrec.json", "{}"), r"letters beyond ASCII"),
    "prior from elsewhere": (
        values("peftrec.json", prior="../secret.json"),
        r"peftrec\.json: prior: '\.\./secret\.json'",
    ),
    "format of the future": (values("peftrec.json", format=99), r"peftrec\.json: format 99"),
    "YAML that makes objects": (
        edit("README.md", "---\nlicense: !!python/object/apply:os.system [ls]\n---\n"),
        r"README\.md: metadata: the tag tag:yaml\.org,2002:python/object/apply:os\.system",
    ),
    "YAML with a tag": (edit("README.md", "---\nlicense: !x mit\n---\n"), r"metadata: the tag !x"),
    "YAML that grows": (edit("README.md", f"---\n{BOMB}---\n"), r"metadata: more than 100,000 values"),
    "YAML in itself": (edit("README.md", "---\na: &a [*a]\n---\n"), r"metadata: more than 100,000 values"),
    "YAML that is none": (edit("README.md", "---\na: [1\n---\n"), r"metadata: .*expected plain YAML"),
    "picture that is none": (edit("figures/roc.png", b"<svg onload=x>"), r"figures/roc\.png: not a PNG picture"),
    "vocabulary that is an archive": (edit("tokenizer.model", b"PK\x03\x04"), r"tokenizer\.model: a pickle or an arch"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused(adapter: Path, name: str) -> None:
    assert check_folder(adapter) == []
    change, message = HOSTILE[name]
    change(adapter)
    with pytest.raises(HubError, match=message) as refused:
        push(adapter, "file:/nowhere", reload_check=lambda _: pytest.fail("looked at before it was checked"))
    assert all("\n" not in problem for problem in refused.value.problems)


PATHS = (
    "../outside.json",
    "figures/../../outside.json",
    "/etc/outside.json",
    "~/outside.json",
    "C:/outside.json",
    "..\\outside.json",
    "figures\\..\\..\\outside.json",
    "outside.json\n",
    "a/./outside.json",
    "a//outside.json",
    ".git/config.json",
    ".GIT/hooks.json",
    "outside\u202egnp.json",
    "peftrec.json.",
    "x" * 250 + ".json",
)
"""Names that would be written somewhere else."""
NAMES = {
    **dict.fromkeys(PATHS, "a path that could leave the folder"),
    "Peftrec.json": r"peftrec\.json: differs from Peftrec\.json by case only",
    "n\u043etes.md": "letters beyond ASCII",
}
"""A further file of a repository, and what is said of it."""


def left_of(repo_id: str, cache: Path) -> list[Path]:
    return [path for path in cache.glob(f"models--{repo_id.replace('/', '--')}/**/*") if path.is_file()]


def test_every_hostile_repository_is_refused(server: HubServer, tmp_path: Path) -> None:
    """Each in one line a reason, nothing is run, and nothing stays behind: neither in the cache nor in the folder."""
    CANARY.unlink(missing_ok=True)
    good = contents_of(write_adapter(tmp_path / "good"))
    server.put("other/good", good)
    assert left_of("other/good", tmp_path / "cache") == []
    pull("other/good")
    assert left_of("other/good", tmp_path / "cache")
    repositories: dict[str, tuple[dict[str, bytes], str]] = {}
    for number, (change, message) in enumerate(HOSTILE.values()):
        folder = write_adapter(tmp_path / str(number))
        change(folder)
        there = (path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in there}
        repositories[f"evil/content-{number}"] = files, message
    for number, (name, message) in enumerate(NAMES.items()):
        repositories[f"evil/name-{number}"] = {**good, name: b"{}"}, message
    many = {f"{number}.txt": b"" for number in range(10_001)}
    repositories["evil/many"] = {**good, **many}, "more than 10,000 files"
    repositories["evil/nothing"] = {"README.md": b"# x"}, r"peftrec\.json: missing"
    assert len(repositories) > 60
    for repo_id, (files, message) in repositories.items():
        server.put(repo_id, files)
        server.log.clear()
        with pytest.raises(HubError, match=message) as refused:
            pull(repo_id, local_dir=tmp_path / "out" / "films")
        assert all(line.startswith(f"{repo_id}: ") and "\n" not in line for line in refused.value.problems)
        if "can run code" in message or "expected at most 1," in message:  # not a byte of it is asked for
            assert not [line for line in server.log if "/resolve/" in line], repo_id
        assert left_of(repo_id, tmp_path / "cache") == [], repo_id
        assert not (tmp_path / "out").exists()
    assert not CANARY.exists()
    assert not list(tmp_path.rglob("*outside*"))
    assert pull("other/good").is_dir()


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def without(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name != KEY}


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (without, {}, r"1 keys missing or unexpected, e\.g\. .*lora_A"),
        (
            lambda all: {**all, "model.embed_tokens.weight": all[KEY]},
            {},
            r"1 keys missing or unexpected, e\.g\. model\.emb",
        ),
        (lambda all: {**all, KEY: all[KEY][:2].copy()}, {}, r"does not fit"),
        (dict, {"r": 8}, r"does not fit"),
        (dict, {"peft_type": "EVIL"}, r"adapter_config\.json: cannot be read"),
        (dict, {"target_modules": ["nothing"]}, r"does not fit"),
        (dict, {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}, r"missing or unexpected|not fit"),
    ],
)
def test_what_is_found_when_it_is_loaded(
    server: HubServer, tiny_llama_folder: Path, tmp_path: Path, weights: Any, config: dict[str, Any], message: str
) -> None:
    """Missing or extra keys, other shapes: errors in one line, never scores of half an adapter."""
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file(weights(load_file(path)), path)
    values("adapter_config.json", **config)(folder)
    server.put(REPO, contents_of(folder))
    with pytest.raises(ModelError, match=message) as refused:
        Recommender.from_pretrained(pull(REPO), base_model=tiny_llama_folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link("notes.md", "/etc/passwd"), r"^notes\.md: a link that leaves the folder"),
        (link("notes.md", "nowhere.md"), r"^notes\.md: a link that leaves the folder, or to no file"),
        (link("extra", "/etc"), r"^extra: a link that leaves the folder"),
        (lambda folder: os.mkfifo(folder / "pipe.json"), r"^pipe\.json: neither a file nor a folder"),
        (edit("deep/notes.md", "x"), r"^deep/notes\.md: not a file of an adapter"),
        (edit("README.md", CARD + "from /home/ann/runs/x"), r"^README\.md: a local path, '/home/ann/runs/x'"),
        (edit("README.md", CARD + "`C:\\Users\\ann`"), r"^README\.md: a local path"),
        (edit("README.md", CARD + "write to ann.b@uni.edu."), r"^README\.md: an e-mail address, 'ann\.b@uni\.edu'"),
        (values("adapter_config.json", note="/mnt/models/x"), r"^adapter_config\.json: a local path"),
        (values("adapter_config.json", note="hf_" + "aB3" * 12), r"^adapter_config\.json: .*token \(hf_aB3…\)"),
        (edit("tokenizer.json", '{"a": "ghp_' + "x9" * 18 + '"}'), r"^tokenizer\.json: .*access token \(ghp_x9…\)"),
        (edit("README.md", "-----BEGIN RSA PRIVATE KEY-----"), r"^README\.md: .*access token"),
        (edit("README.md", f"{CARD} {Path.cwd()}"), r"^README\.md: a path of this machine"),
        (edit("README.md", "secret-words-of-mine"), r"^README\.md: the access token in HF_TOKEN"),
    ],
)
def test_what_is_not_published(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-words-of-mine")
    change(adapter)
    problems = check_folder(adapter)
    assert any(re.search(message, line) for line in problems), problems
    assert all("\n" not in line and "aB3aB3aB3" not in line for line in problems)


def test_what_may_be_published(adapter: Path) -> None:
    card = CARD + "ann@uni.edu, git@hf.co:x, me@example.org, https://x.org/home/ann, a/b, 4/5, @decorator, /ratings\n"
    (adapter / "README.md").write_text(card)
    assert check_folder(adapter) == ["README.md: an e-mail address, 'ann@uni.edu'; remove it, or allow it"]
    assert check_folder(adapter, allow=["ann@uni.edu"]) == []
    (adapter / "vocab.txt").symlink_to("tokenizer.json")
    assert check_folder(adapter, allow=["ann@uni.edu"]) == []


def test_words_for_the_model_are_no_pattern(adapter: Path) -> None:
    values("adapter_config.json", prompt_tuning_init_text="Liked (yes)? " + "* " * 40)(adapter)
    assert check_folder(adapter) == []


def test_every_problem_is_told_at_once(adapter: Path) -> None:
    for change in (edit("a.bin", b""), edit("b.py", ""), edit("README.md", b"\xff")):
        change(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    names = [line.partition(": ")[0] for line in check_folder(adapter)]
    assert sorted(names) == sorted(["a.bin", "b.py", "README.md", str(adapter)])
    assert check_folder(adapter / "nowhere")[0].endswith("no such folder; expected RUN/adapter of a finished run")
