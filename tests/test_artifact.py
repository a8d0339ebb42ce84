"""peftrec.json: what is written is read back, and what a stranger may have written is checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import ABOUT, PROMPT

from peftrec import artifact, config
from peftrec.artifact import Scoring
from peftrec.baselines import Prior
from peftrec.errors import ModelError
from peftrec.target import Target

PRIOR = Prior(0.5, {"1": 0.25}, 3.0)


def test_written_is_read(tmp_path: Path) -> None:
    artifact.write(tmp_path, ABOUT, PRIOR)
    found = artifact.read(tmp_path)
    assert found == dataclasses.replace(ABOUT, prior="prior.json")
    assert artifact.read_prior(tmp_path, found) == PRIOR
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peftrec.json", "prior.json"]
    values = json.loads((tmp_path / "peftrec.json").read_text())
    assert values["format"] == 1
    assert values["probes"] == [{"history": [["Heat", 1]], "candidate": "Babe", "score": 0.25}]


def test_without_prior(tmp_path: Path) -> None:
    artifact.write(tmp_path, ABOUT, None)
    found = artifact.read(tmp_path)
    assert found.prior is None
    assert artifact.read_prior(tmp_path, found) is None


def test_text_of_a_prompt() -> None:
    history = [("Heat", 1), ("Babe", 0)]
    assert PROMPT.text(history, "Fargo") == "Rated:\nHeat: yes\nBabe: no\nFargo:"
    own = dataclasses.replace(PROMPT, template="Past:\n{history}And {item}? Answer:")
    assert own.text(history[:1], "Fargo") == "Past:\nHeat: yes\nAnd Fargo? Answer:"


def test_described_run_names_no_path_of_this_machine(codec: Any, tmp_path: Path) -> None:
    table, base = tmp_path / "events.csv", tmp_path / "my-model"
    table.touch()
    base.mkdir()
    recipe = config.parse_recipe(
        {"data": {"interactions": str(table), "like_at": 3}, "model": {"name": str(base)}, "output_dir": "runs/x"}, "r"
    )
    facts = dataclasses.replace(ABOUT.base_model, name=str(base), hub_id=str(base))
    about = artifact.describe(
        recipe,
        codec,
        facts,
        Target("rating", scale=(1.0, 2.0), offset=(0.0, 0.5), slope=2.0, centre=1.5),
        data_name=str(table),
        data_sha256="0",
        like_at=3,
        max_item_tokens=128,
        example=([("Heat", 1)], "Babe"),
    )
    artifact.write(tmp_path, about, None)
    assert str(tmp_path) not in (tmp_path / "peftrec.json").read_text()
    assert (about.data.name, about.base_model.hub_id, about.like_at) == ("events.csv", "my-model", 3)
    assert about.target == Scoring("tokens", "cross_entropy", [1.0, 2.0], [0.0, 0.5], 2.0, 1.5)
    assert about.prompt.example == f"<s>{codec.header_text}Heat: yes\nBabe:"


def changed(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("format", to=2), r"format 2; this version reads format 1; upgrade peftrec"),
        (changed("task", to="ratings"), r"task: .*expected one of click, rating"),
        (
            changed("target", "scale", to=[1.0, 0.0]),
            r"2 answers with 2 tokens, 2 ratings and 2 offsets; expected 2, 2 ascending",
        ),
        (changed("target", "offset", to=[0.0]), r"1 offsets; expected 2"),
        (changed("target", "slope", to=float("inf")), r"not JSON .*no number"),
        (changed("prompt", "item", to="{title.__class__}"), r"prompt.item: .*expected a template with plain"),
        (changed("prompt", "template", to="{0.x}"), r"prompt.template: .*expected a template"),
        (changed("prompt", "answer_ids", to=[5]), r"2 answers with 1 tokens.*; expected 2, 2 ascending"),
        (changed("prompt", "answer_ids", to=[5, 5]), r"prompt.answer_ids: .*expected different values"),
        (changed("prompt", "kind", to="encoder"), r"2 answers with 2 tokens.*; expected 0, 2 ascending"),
        (changed("prompt", "kind", to="seq2seq"), r"prompt.template: missing; seq2seq needs one"),
        (changed("prompt", "max_tokens", to=10**9), r"prompt.max_tokens: .*up to 1,000,000"),
        (changed("prior", to="../secret.json"), r"prior: .*expected prior.json"),
        (changed("base_model", to="tiny"), r"base_model: .*expected a mapping.*and 5 more"),
        (changed("probes", to=[{"history": []}]), r"probes: not a list of objects"),
        (changed("probes", to=[{"history": [["a", 7]], "candidate": "b", "score": 0}]), r"probes: not a list"),
        (changed("run_this", to="os.system"), r"run_this: unknown key"),
    ],
)
def test_what_a_stranger_may_write(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    artifact.write(tmp_path, ABOUT, None)
    path = tmp_path / "peftrec.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message) as caught:
        artifact.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "expected a JSON object"), ('{"seed": NaN}', "NaN")],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "peftrec.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        artifact.read(tmp_path)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact.write(tmp_path, ABOUT, PRIOR)
    monkeypatch.setitem(artifact.MOST_BYTES, "prior.json", 10)
    with pytest.raises(ModelError, match=r"prior.json: \d+ bytes; expected at most 10"):
        artifact.read_prior(tmp_path, artifact.read(tmp_path))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder; expected a folder with an adapter"):
        artifact.read(tmp_path / "nowhere")
    artifact.write(tmp_path, ABOUT, PRIOR)
    (tmp_path / "prior.json").unlink()
    with pytest.raises(ModelError, match=r"prior.json: no such file, though peftrec.json names it"):
        artifact.read_prior(tmp_path, artifact.read(tmp_path))
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    artifact.write(run / "adapter", ABOUT, None)
    with pytest.raises(ModelError, match=r"no peftrec.json in it.*use .*run/adapter"):
        artifact.read(run)
