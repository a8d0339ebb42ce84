"""Exports: what plain transformers and PEFT make of the written folder is what the adapter scores."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from samples import FILMS
from saved import QUESTIONS, save_adapter, save_run, tiny_bert

from peftrec import artifact, config, export
from peftrec.cli import main
from peftrec.errors import ModelError
from peftrec.recommender import Recommender

PLAIN = """
import json, sys
import torch, transformers
folder, about = sys.argv[1], json.load(open(sys.argv[1] + "/peftrec.json"))
prompt, head = about["prompt"], about["target"]["head"]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
kind = "ForCausalLM" if head == "tokens" else "ForSequenceClassification"
model = getattr(transformers, "AutoModel" + kind).from_pretrained(folder, dtype=torch.float32).eval()
for text in json.load(sys.stdin):
    if prompt["kind"] == "encoder":
        ids = tokenizer(*text.split("\\t"), return_tensors="pt")
    else:
        ids = tokenizer(prompt["bos"] + text, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**ids).logits[0]
    if head == "tokens":
        logits = logits[-1, prompt["answer_ids"]]
    print(json.dumps(logits.tolist()))
assert not {"peft", "peftrec"} & {name.split(".")[0] for name in sys.modules}
"""
METHODS = {
    "lora": config.Adapter(r=4),
    "rslora": config.Adapter(r=4, variant="rslora"),
    "dora": config.Adapter(r=4, variant="dora"),
    "pissa": config.Adapter(r=4, variant="pissa"),
    "adalora": config.Adapter(method="adalora"),
    "ia3": config.Adapter(method="ia3"),
    "ln_tuning": config.Adapter(method="ln_tuning"),
    "full": config.Adapter(method="full"),
}


def own_scores(folder: Path, base: Path) -> list[float]:
    recommender = Recommender.from_pretrained(folder, base_model=base, items=FILMS, prior=False)
    return [recommender.score(history, [candidate])[0] for history, candidate in QUESTIONS]


def plain_scores(folder: Path) -> list[float]:
    """By transformers alone, in a process that knows neither peftrec nor PEFT."""
    about = artifact.read(folder)
    texts = [about.prompt.text(history, candidate) for history, candidate in QUESTIONS]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder)], input=json.dumps(texts), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outputs = np.asarray([json.loads(line) for line in done.stdout.splitlines()])
    return (outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_merging_keeps_the_scores(tiny_llama_folder: Path, tmp_path: Path, method: str) -> None:
    strength = 0.02 if method == "full" else 0.3
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter", METHODS[method], strength=strength)
    done = export.merged(folder, tmp_path / "merged", base_model=tiny_llama_folder)
    assert done.difference <= 1e-4
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors"))
    expected = own_scores(folder, tiny_llama_folder)
    assert np.std(expected) > 0.01, "scores that are all equal prove nothing"
    if method == "lora":
        np.testing.assert_allclose(plain_scores(done.folder), expected, atol=1e-4)
        assert len({path.stat().st_mode for path in done.folder.iterdir()}) == 1  # a server of another user reads all
    # Once with nothing else loaded is enough: the others here.
    about = artifact.read(done.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.folder)
    found = []
    for history, candidate in QUESTIONS:
        text = (about.prompt.bos or "") + about.prompt.text(history, candidate)
        with torch.inference_mode():
            logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
        no, yes = logits[about.prompt.answer_ids].tolist()
        found.append(yes - no)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert {"peftrec.json", "prior.json", "config.json", "tokenizer.json"} <= {p.name for p in done.folder.iterdir()}
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize("head", ["classifier", "linear"])
def test_a_trained_head_stays(tiny_llama_folder: Path, tmp_path: Path, head: str) -> None:
    base = tiny_bert(tmp_path / "bert") if head == "classifier" else tiny_llama_folder
    prompt: dict[str, Any] = {"max_tokens": 120} if head == "classifier" else {}
    folder = save_adapter(base, tmp_path / "adapter", head=head, **prompt)
    done = export.merged(folder, tmp_path / "merged", base_model=base)
    expected = own_scores(folder, base)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(plain_scores(done.folder), expected, atol=1e-4)
    labels = json.loads((done.folder / "config.json").read_text())["id2label"]
    assert (labels == {"0": "no", "1": "yes"}) == (head == "classifier")


def test_16_bits_halve_the_file(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    whole = export.merged(folder, tmp_path / "whole", base_model=tiny_llama_folder)
    half = export.merged(folder, tmp_path / "half", base_model=tiny_llama_folder, dtype="bfloat16")
    assert 0.45 < half.bytes / whole.bytes < 0.6
    assert {tensor.dtype for tensor in load_file(half.folder / "model.safetensors").values()} == {torch.bfloat16}
    np.testing.assert_allclose(plain_scores(half.folder), own_scores(folder, tiny_llama_folder), atol=0.3)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("bottleneck", r"asked to merge; a bottleneck is not linear"),
        ("prefix", r"PREFIX_TUNING; its virtual tokens are no part of any weight; use the adapter as it is"),
        ("prompt", r"PROMPT_TUNING; its virtual tokens"),
    ],
)
def test_what_cannot_be_merged(tiny_llama_folder: Path, tmp_path: Path, method: Any, message: str) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter", config.Adapter(method=method))
    with pytest.raises(ModelError, match=message):
        export.merged(folder, tmp_path / "merged", base_model=tiny_llama_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(ModelError, match=rf"{method.upper()}.*; vLLM takes LoRA only"):
        export.for_vllm(folder, tmp_path / "vllm")


def test_a_merge_that_changes_scores_is_refused(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    real = export._merge

    def wrong(model: Any, adapter: Path) -> Any:
        merged = real(model, adapter)
        merged.model.norm.weight.data *= 1.01
        return merged

    monkeypatch.setattr(export, "_merge", wrong)
    with pytest.raises(ModelError, match="merged, it scores its sample questions differently by up to"):
        export.merged(folder, tmp_path / "merged", base_model=tiny_llama_folder)
    assert not (tmp_path / "merged").exists()


def test_a_quantized_base_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    packed = shutil.copytree(tiny_llama_folder, tmp_path / "packed")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder, quantization_config=four_bits)
    model.save_pretrained(packed)
    with pytest.raises(ModelError, match="base model: packed is quantized, and merging would round"):
        export.merged(folder, tmp_path / "merged", base_model=packed)


def test_nothing_is_overwritten(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_run(tiny_llama_folder, tmp_path / "run")
    with pytest.raises(ModelError, match="adapter: there already; expected a folder that is new or empty"):
        export.for_vllm(folder, folder)
    (tmp_path / "empty").mkdir()
    assert export.for_vllm(tmp_path / "run", tmp_path / "empty").folder == tmp_path / "empty"
    with pytest.raises(ModelError, match=r"no peftrec\.json in it"):
        export.for_vllm(tmp_path, tmp_path / "other")
    with pytest.raises(ModelError, match="dtype: 'int8'; expected one of"):
        export.merged(folder, tmp_path / "other", dtype="int8")  # type: ignore[arg-type]


# --- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rank", "least"), [("lora", 4, 8), ("rslora", 4, 8), ("pissa", 8, 8)])
def test_vllm_gets_plain_lora(tiny_llama_folder: Path, tmp_path: Path, method: str, rank: int, least: int) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter", METHODS[method])
    done = export.for_vllm(folder, tmp_path / "vllm")
    assert (done.base_model, done.max_lora_rank) == (tiny_llama_folder.name, least)
    names = {path.name for path in done.folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "peftrec.json", "prior.json"}
    found = json.loads((done.folder / "adapter_config.json").read_text())
    assert (found["r"], found["modules_to_save"], found["bias"]) == (rank, None, "none")
    # As vLLM computes a layer: base + B A x, times alpha / r, or alpha / sqrt(r).
    scale = found["lora_alpha"] / (np.sqrt(rank) if found["use_rslora"] else rank)
    lora = load_file(done.folder / "adapter_model.safetensors")
    assert {name.rsplit(".", 3)[-3] for name in lora} == {name.rpartition(".")[2] for name in found["target_modules"]}
    base = load_file(tiny_llama_folder / "model.safetensors")
    merged = load_file(
        export.merged(folder, tmp_path / "merged", base_model=tiny_llama_folder).folder / "model.safetensors"
    )
    for name in sorted(lora):
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            update = scale * lora[name.replace("lora_A", "lora_B")] @ lora[name]
            torch.testing.assert_close(base[layer] + update, merged[layer], atol=1e-5, rtol=1e-5)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(found | changes))

    return change


def add_tensor(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    save_file(state | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 320)}, folder / WEIGHTS)


def drop_tensor(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop(sorted(state)[0])
    save_file(state, folder / WEIGHTS)


WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(use_dora=True), "use_dora is True; vLLM takes plain LoRA"),
        (change_config(modules_to_save=["score"]), r"modules_to_save is \['score'\]; vLLM"),
        (change_config(rank_pattern={"q_proj": 2}), "rank_pattern is"),
        (change_config(bias="all"), "bias is 'all'"),
        (change_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (change_config(r=1024), "r is 1024"),
        (change_config(r=3), r"lora_A.weight has the shape \(4, "),
        (add_tensor, r"embed_tokens.lora_embedding_A has the shape \(4, 320\)"),
        (drop_tensor, "lacks one of its two matrices"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "adapter_model.safetensors cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("["), "adapter_config.json: cannot be read"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json, for all weights were"),
    ],
)
def test_what_vllm_does_not_take(
    tiny_llama_folder: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        export.for_vllm(folder, tmp_path / "vllm")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "vllm").exists()


def test_a_head_is_nothing_for_vllm(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter", head="classifier")
    with pytest.raises(ModelError, match="modules_to_save is"):
        export.for_vllm(folder, tmp_path / "vllm")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tiny_llama_folder, tmp_path / "run")
    run = str(tmp_path / "run")
    assert main(["export", run, str(tmp_path / "merged"), "--format", "merged"]) == 0
    assert "in float32 its scores differ from the adapter's by at most" in capsys.readouterr().out
    assert main(["export", run, str(tmp_path / "vllm"), "--format", "vllm"]) == 0
    told = capsys.readouterr().out
    assert "vLLM was not run" in told
    assert "--enable-lora --max-lora-rank 8 \\\n" in told
    assert main(["export", run, str(tmp_path / "more"), "--format", "vllm", "--dtype", "float16"]) == 2
    assert capsys.readouterr().err.startswith("--dtype: means nothing to --format vllm")
    assert not (tmp_path / "more").exists()


def test_the_sample_questions_may_be_missing(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    about = json.loads((folder / "peftrec.json").read_text())
    (folder / "peftrec.json").write_text(json.dumps(about | {"probes": []}))
    assert export.merged(folder, tmp_path / "merged", base_model=tiny_llama_folder).difference <= 1e-4
