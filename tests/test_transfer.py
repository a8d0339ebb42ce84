"""From a source to a target: cells that are measured once, one report, and no test label in anything learned from."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import build_log, random_log
from saved import save_adapter
from test_pretraining import script

from peftrec import align, config, earlier, few_shot, interactions, split
from peftrec.encode import Encoder
from peftrec.errors import ConfigError
from peftrec.transfer_report import ALL, COUNTED, WAYS, report

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "recipes/configs").glob("transfer_*.yaml"))
GIVEN = ["--target.data.interactions", "ratings.csv", "--target.data.items", "movies.csv"]


@pytest.fixture(scope="module")
def transfer() -> Any:
    return script("transfer")


def run(transfer: Any, monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["transfer.py", *map(str, words)])
    transfer.main()


@pytest.fixture
def plan(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """Twenty people, sixteen films of two genres; the source's run is an adapter that is there as soon as it is run."""
    random = np.random.default_rng(5)
    user, film = np.repeat(np.arange(20), 12), np.concatenate([random.permutation(16)[:12] for _ in range(20)])
    table = {"user_id": user, "item_id": film, "label": random.integers(0, 2, 240), "timestamp": np.arange(240) // 2}
    pl.DataFrame(table).write_parquet(tmp_path / "clicks.parquet")
    films = {"item_id": range(16), "title": [f"Film {k}" for k in range(16)], "genre": ["Drama", "Comedy"] * 8}
    pl.DataFrame(films).write_csv(tmp_path / "films.csv")
    recipe = {
        "data": {
            "interactions": str(tmp_path / "clicks.parquet"),
            "items": str(tmp_path / "films.csv"),
            "split": {"valid": 0.1, "test": 0.4},
        },
        "prompt": {"max_tokens": 256, "overlap": 32},
        "model": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "adapter": {"r": 4},
        "train": {"evals": 1},
        "eval": {"bootstrap": 20},
        "output_dir": "unused",
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    values = {
        "source": {"changes": {"data": {"items_where": {"genre": ["Drama"]}}}},
        "target": {"recipe": "base.yaml", "changes": {"data": {"items_where": {"genre": ["Comedy"]}}}},
        "samples": {"16": 1, "32": 1},
        "seeds": [1, 2],
        "ways": {"target_only": 1e-2, "adapted": 1e-2},
        "test": {"rows": 40, "of_one": 4},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "plan.yaml"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_shipped_plan_is_valid(path: Path, transfer: Any) -> None:
    options = transfer.argparse.Namespace(samples=None, seeds=None, ways=None, output_dir=None)
    found = transfer.read_plan(path, options)
    assert list(found.samples) == ([] if found.aligned else ["16", "64", "256", "1024"])
    rest = GIVEN if found.source.adapter else []
    words = {}
    for side in ["target"] + ([] if found.source.adapter else ["source"]):
        words[side] = transfer.side_words(found, side, path, rest)
        recipe = config.load_recipe(words[side][1], words[side][2:])
        assert (recipe.score.prior, recipe.prompt.max_tokens) == ("none", 256)
    for kind in found.aligned:
        more = transfer.aligned_words(found, kind, words)
        assert config.load_recipe(more[1], more[2:]).align.kind == kind


def test_cells_are_measured_once_and_told_in_one_report(
    plan: Path,
    transfer: Any,
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[list[str]] = []

    def run_source(name: str, words: list[str]) -> None:
        started.append([name, *words])
        if not (tmp_path / "out/source").exists():
            save_adapter(tiny_llama_folder, tmp_path / "out/source/adapter", config.Adapter(r=4), prior=None)

    monkeypatch.setattr(transfer, "run", run_source)
    run(transfer, monkeypatch, "--config", plan, "--samples", "16", "--source.train.max_steps", "7")
    source = config.load_recipe(tmp_path / "base.yaml", started[0][3:-1])
    assert (source.data.items_where, source.train.max_steps) == ({"genre": ["Drama"]}, 7)
    assert source.output_dir == str(tmp_path / "out/source")
    names = {"counted-16", "target_only-16", "adapted-16"}
    cells = {path.stem for path in (tmp_path / "out/cells").iterdir()}
    expected = {f"{name}-{seed}" for name in names for seed in (1, 2)}
    assert cells == expected | {f"counted-{ALL}-0", "zero_shot-0-0", "transfer-0-0"}
    lines = (tmp_path / "out/transfer.md").read_text().splitlines()
    assert "0 titles are in both" in lines[0]
    assert "People are the same" not in lines[0], "two files of one's own say nothing of that"
    assert sum(line.startswith("| 16 | ") for line in lines) == 2 + len(COUNTED) + 4
    assert "| 16 | transfer + adaptation | 2 (sd" in "".join(lines)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<table>") == 2
    assert "data:image/png;base64," in page
    assert "http" not in page
    scores = pl.read_parquet(tmp_path / "out/scores.parquet")
    assert scores.columns[:3] == ["user_id", "item_id", "label"]
    assert set(scores["item_id"]) <= set(range(1, 16, 2))
    assert scores["target_only K=16 draw=0"].to_list() != scores["adapted K=16 draw=0"].to_list()
    assert not (tmp_path / "out/checkpoints").exists()

    asked: list[int] = []
    learned = few_shot.learned
    monkeypatch.setattr(
        few_shot,
        "learned",
        lambda log, *rest, **more: (asked.append(int((log.split == 0).sum())), learned(log, *rest, **more))[1],
    )
    run(transfer, monkeypatch, "--config", plan, "--samples", "16")
    assert asked == []
    more = ["--samples", "32", "--seeds", "2", "--target.train.weight_decay", "0.1"]
    run(transfer, monkeypatch, "--config", plan, *more)
    assert asked == [32] * 2, "what learned nothing is not measured again"


def test_the_source_beside_the_target_without_its_answers(
    plan: Path, transfer: Any, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training of the source but for `align`, whose other domain are the target's training events."""
    values = yaml.safe_load(plan.read_text())
    base = str(tmp_path / "base.yaml")
    values |= {"aligned": {"coral": 2.0, "cpc": 0.5}, "samples": {}, "ways": {}}
    plan.write_text(yaml.safe_dump(values))
    started: dict[str, list[str]] = {}

    def run_source(name: str, words: list[str]) -> None:
        folder = Path(words[-2])
        started[folder.name] = words[:-1]
        if not folder.exists():
            save_adapter(
                tiny_llama_folder, folder / "adapter", config.Adapter(r=4), prior=None, strength=0.1 * len(started)
            )

    monkeypatch.setattr(transfer, "run", run_source)
    run(transfer, monkeypatch, "--config", plan)
    assert list(started) == ["source", "coral", "cpc"]
    source, coral, cpc = (config.load_recipe(base, words[2:]) for words in started.values())
    assert (coral.align.kind, coral.align.weight, cpc.align.weight) == ("coral", 2.0, 0.5)
    assert dataclasses.replace(coral, align=source.align, output_dir=source.output_dir) == source
    target = config.load_recipe(base, ["--data.items_where", "{genre: [Comedy]}"])
    assert align.data_of(coral) == target.data
    lines = (tmp_path / "out/transfer.md").read_text()
    for line in (
        "| 0 | transfer, aligned by CORAL | 1 |",
        "| 0 | transfer, aligned by CORAL minus transfer: the source",
    ):
        assert line in lines
    assert len({path.read_text() for path in (tmp_path / "out/cells").glob("c*-0-0.json")}) == 2

    run(transfer, monkeypatch, "--config", plan, "--ways", "cpc")
    assert "CORAL" not in (tmp_path / "out/transfer.md").read_text()
    with pytest.raises(ConfigError, match=r"aligned: source and target differ in data\.split, seed"):
        run(transfer, monkeypatch, "--config", plan, "--target.data.split.test", "0.2")
    with pytest.raises(ConfigError, match="align; name its kinds and weights under aligned"):
        run(transfer, monkeypatch, "--config", plan, "--target.align.kind", "mmd", "--target.align.target.name", "x")


def test_source_and_target_may_keep_some_of_their_people(plan: Path, transfer: Any) -> None:
    plan.write_text(yaml.safe_dump(yaml.safe_load(plan.read_text()) | {"aligned": {"mmd": 2.0}}))
    options = transfer.argparse.Namespace(samples=None, seeds=None, ways=None, output_dir=None)
    found = transfer.read_plan(plan, options)
    some = ["--source.data.sample_users", "9", "--target.data.sample_users", "9"]

    def words(rest: list[str]) -> dict[str, list[str]]:
        return {side: transfer.side_words(found, side, plan, rest) for side in ("source", "target")}

    aligned = transfer.aligned_words(found, "mmd", words(some))
    target = words(some)["target"]
    assert align.data_of(config.load_recipe(aligned[1], aligned[2:])) == config.load_recipe(target[1], target[2:]).data
    with pytest.raises(ConfigError, match="which users are kept"):
        transfer.aligned_words(found, "mmd", words(some[:2]))


def test_text_is_said_word_for_word(transfer: Any) -> None:
    values = {"data.name": "ml-100k", "data.items_where": {"genre": ["A b"]}, "train.evals": 2}
    assert transfer.as_words(values) == [
        *("--data.name", "ml-100k", "--data.items_where", '{"genre": ["A b"]}', "--train.evals", "2")
    ]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"aligned": {"corel": 1}}, [], "'corel'; expected one of coral, mmd, adversarial, cpc"),
        ({"aligned": {"mmd": 1}, "source": {"adapter": "x"}}, [], "aligned: needs a source that is trained here"),
        ({"aligned": {"mmd": 1}}, ["--ways", "cpc"], "ways: cpc; expected some of adapted, target_only, mmd"),
        ({"seed": 1}, [], "seed: unknown key; did you mean seeds?"),
        ({"ways": {"adpted": 1}}, [], "'adpted'; expected one of target_only, adapted"),
        ({}, ["--ways", "stacked"], "ways: stacked; expected some of adapted, target_only"),
        ({}, ["--samples", "17"], "samples: 17; expected some of 16, 32, whole numbers from 1"),
        ({"target": {}}, [], "target.recipe: missing; expected the file of a recipe"),
        ({}, ["--train.max_steps", "3"], "command line: --train.max_steps; expected --target.KEY, --source.KEY"),
        ({}, ["--target.train.max_stps", "3"], "train.max_stps: unknown key; did you mean max_steps?"),
        ({}, ["--target.score.prior", "bias"], "task click with score.prior bias; expected clicks without a prior"),
    ],
)
def test_mistakes(
    change: dict[str, Any],
    words: list[str],
    message: str,
    plan: Path,
    transfer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan.write_text(yaml.safe_dump({**yaml.safe_load(plan.read_text()), **change}))
    with pytest.raises(ConfigError) as caught:
        run(transfer, monkeypatch, "--config", plan, *words)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_learned_from_knows_no_test_label(tokenizer: Any) -> None:
    """With all test answers turned round, the training rows are the same to the last token."""
    log = random_log(7, users=12, events=40, moments=40)
    turned = dataclasses.replace(log, label=np.where(log.split == split.TEST, 1 - log.label, log.label).astype(np.int8))
    seen = []
    for one in (log, turned):
        rows = Encoder(
            split.few(one, 64, seed=2), config.Prompt(max_tokens=256, overlap=32), tokenizer, "isolate"
        ).train(None)
        seen.append([{key: array.tolist() for key, array in rows[i].items()} for i in range(len(rows))])
    assert seen[0] == seen[1]
    assert sum(label >= 0 for row in seen[0] for label in row["labels"]) == 64


def test_domains_of_one_data_set_share_no_event(plan: Path) -> None:
    def events(genre: str) -> set[tuple[int, int]]:
        recipe = config.load_recipe(plan.parent / "base.yaml", ["--data.items_where", json.dumps({"genre": [genre]})])
        data = interactions.load(recipe.data, 13)
        ids = data.items["item_id"].to_numpy()[data.events["item"].to_numpy()]
        return set(zip(data.user_ids.to_numpy()[data.events["user"].to_numpy()].tolist(), ids.tolist(), strict=True))

    drama, comedy = events("Drama"), events("Comedy")
    assert not drama & comedy
    assert len(drama) + len(comedy) == 240
    assert {user for user, _ in drama} == {user for user, _ in comedy}


def test_training_starts_where_the_source_ended(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly nothing, adapted is the source's adapter and target only the base model."""
    log = build_log([0] * 8 + [1] * 8, [*range(8)] * 2, [0, 1] * 8, split=[0, 0, 0, 0, 0, 1, 2, 2] * 2)
    recipe = config.Recipe(
        data=config.Data(name="ml-100k"),
        output_dir="x",
        prompt=config.Prompt(max_tokens=256, overlap=32),
        model=config.Model(name=str(tiny_llama_folder), dtype="float32"),
        adapter=config.Adapter(r=4),
        train=config.Train(max_steps=1, learning_rate=1e-12),
    )
    asked = dataclasses.replace(recipe, adapter=config.Adapter(method="none"))
    source = earlier.read(str(save_adapter(tiny_llama_folder, tmp_path / "source", recipe.adapter, prior=None)))
    rows = np.flatnonzero(log.split == split.TEST)

    def scores(how: config.Recipe, start: earlier.Earlier | None, stacked: bool = False) -> np.ndarray:
        return few_shot.learned(log, rows, how, folder=tmp_path / "steps", start=start, stacked=stacked)

    base, moved = scores(asked, None), scores(asked, source)
    assert np.abs(base - moved).max() > 0.01
    np.testing.assert_allclose(scores(recipe, None), base, atol=1e-4)
    np.testing.assert_allclose(scores(recipe, source), moved, atol=1e-4)
    np.testing.assert_allclose(scores(recipe, source, stacked=True), moved, atol=1e-4)


def test_a_report_by_hand() -> None:
    label, user, item = np.array([0, 1] * 6), np.repeat(np.arange(4), 3), np.arange(12) % 5
    right, wrong = (2.0 * label - 1).tolist(), (1 - 2.0 * label).tolist()
    found = {
        ("target_only", 4): [wrong, wrong],
        ("adapted", 4): [right, right],
        ("zero_shot", 0): [right],
        ("bias", ALL): [right],
    }
    told = report(found, label, user, item, "Facts.", resamples=50)
    assert [row[:2] for row in told.figures[1:]] == [
        ["0", WAYS["zero_shot"]],
        ["4", WAYS["target_only"]],
        ["4", WAYS["adapted"]],
        ["all", WAYS["bias"]],
    ]
    assert told.intervals["adapted", 4]["auc"].point == 1
    assert told.gaps[("adapted", 4), ("target_only", 4)]["auc"].point == 1
    assert told.differences[1:] == [
        ["4", "transfer + adaptation minus target only", "+1.000 [+1.000, +1.000]", "+1.000 [+1.000, +1.000]"]
    ]
    assert told.figures[3][2:4] == ["2 (sd 0.000)", "1.000 [1.000, 1.000]"]
    assert told.markdown().startswith("Facts.\n\n| K | way |")
