"""Model cards: what is said was measured, what is not known is not said, and nothing in the data can break a card."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given
from hypothesis import strategies as st

from peftrec import card, card_limits, card_sections, card_text, config, record
from peftrec.artifact import Artifact, Base, Probe, Source
from peftrec.card_facts import Facts, File, is_local, public_recipe, read_author, read_facts
from peftrec.cli import main
from peftrec.config import Author
from peftrec.errors import ConfigError, DataError
from peftrec.record import RunRecord
from peftrec.report import compare_record

CARDS = Path(__file__).parents[1] / "model_cards"
SMOLLM2, MINILM = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
SHIPPED = {
    "ml-100k-click-lora-demo": SMOLLM2,
    "ml-100k-click-lora": SMOLLM2,
    "ml-100k-click-encoder": MINILM,
    "ml-100k-rating-5fold": SMOLLM2,
}
NASTY = "<b>|`x`</b>\n| a | b |\n```\n<!-- peftrec:data:end -->\n## No [x](y) *z* $1$ www.a.b http://c.d e@f.g"

RECIPE: dict[str, Any] = {
    "task": "click",
    "data": {"interactions": "/home/ann/data/my.csv", "items": "/home/ann/data/films.csv", "like_at": 4},
    "model": {"name": "/home/ann/models/tiny"},
    "eval": {"bootstrap": 100, "slices": ["cold_item", "popularity"], "baselines": ["bias", "item_mean"]},
    "output_dir": "/home/ann/runs/mine",
}


def about(**changes: Any) -> Artifact:
    prompt = dataclasses.replace(samples.PROMPT, bos="<s>", example="<s>Rated:\nHeat: yes\nBabe:")
    whole = dataclasses.replace(
        samples.ABOUT,
        prompt=prompt,
        base_model=Base(name="tiny", hub_id="tiny", fingerprint="f" * 64, parameters=1000, dtype="float32"),
        data=Source(name="my.csv", sha256="a" * 64),
        probes=[Probe([("Heat", 1), ("Fargo", 0)], "Babe", 0.0), Probe([], "Heat", -1.5)],
    )
    return dataclasses.replace(whole, **changes)


def measured(**changes: Any) -> RunRecord:
    """Ten test rows: the bias is better than the adapter for certain, the item mean perhaps."""
    whole = RunRecord(
        task="click",
        metrics={"test/auc": 0.75, "test/uauc": None, "test/auc|cold_item": 0.5, "test/auc|popular": 0.875},
        intervals={
            "adapter": {
                "test/auc": [0.7, 0.8],
                "test/uauc": [None, None],
                "test/auc|cold_item": [0.25, 0.75],
                "test/auc|popular": [0.8, 0.9],
            },
            "bias": {"test/auc": [0.8, 0.9]},
            "item_mean": {"test/auc": [0.6, 0.8]},
        },
        differences={
            "bias": {"test/auc": {"difference": -0.1, "low": -0.2, "high": -0.05}},
            "item_mean": {"test/auc": {"difference": 0.05, "low": -0.05, "high": 0.125}},
        },
        baselines={"bias": {"test/auc": 0.85}, "item_mean": {"test/auc": 0.7}},
        slices={
            "all": {"rows": 10, "users": 3, "positives": 4},
            "cold_item": {"rows": 2, "users": 1, "positives": 1},
            "popular": {"rows": 8, "users": 3, "positives": 3},
        },
        data={},
        prompt={},
        model={"hub_id": "/home/ann/models/tiny"},
        adapter={"method": "lora"},
        train={},
        eval={},
        seed=13,
        versions={"python": "3.11.7", "platform": "Linux-6.1-ann-laptop", "torch": None},
        hardware={},
        created="2026-11-22T13:17:02+00:00",
    )
    return dataclasses.replace(whole, **changes)


def facts(*, recipe: dict[str, Any] = RECIPE, **changes: Any) -> Facts:
    text = config.dump_recipe(config.parse_recipe(recipe, "test"))
    return dataclasses.replace(Facts(name="mine", record=measured(), artifact=about(), recipe=text), **changes)


def shipped(name: str) -> Facts:
    """The committed facts of a card; its adapter's files are only listed."""
    files = json.loads((CARDS / name / "files.json").read_text(encoding="utf-8"))
    return dataclasses.replace(read_facts(CARDS / name), files=tuple(File(**one) for one in files))


def region(page: str, name: str) -> str:
    (found,) = [text for one, text in card_text.regions(page, "page") if one == name]
    return found


def head(page: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(page.split("---\n")[1])
    return found


def tables(page: str) -> list[list[str]]:
    """The Markdown tables outside of blocks of code, as their lines."""
    page = re.sub(r"^(`{3,}).*?^\1$", "", page, flags=re.M | re.S)
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.M)]


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)


# --- the shipped cards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_cards_render_identically(name: str) -> None:
    page, path = card.render(shipped(name)), CARDS / name / "README.md"
    if os.environ.get("CARDS") == "write":
        path.write_text(page, encoding="utf-8")
    assert page == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_facts_belong_together(name: str) -> None:
    """The listed hash of peftrec.json is that of the file beside the card, and each figure is there."""
    found = shipped(name)
    (listed,) = [one for one in found.files if one.name == "peftrec.json"]
    assert listed in read_facts(CARDS / name).files
    assert {f"figures/{one}" for one in found.figures} == set(re.findall(r"\]\((figures/.*?)\)", card.render(found)))
    assert len(found.figures) >= 4


@pytest.mark.parametrize("name", SHIPPED)
def test_the_hub_client_reads_the_metadata_back(name: str) -> None:
    found = shipped(name)
    page = card.render(found, Author(license="apache-2.0"))
    read = ModelCard(page)
    assert isinstance(read.data, ModelCardData)
    assert read.data.to_dict() == head(page)
    assert read.data.library_name == "peft"
    assert read.data.base_model == SHIPPED[name]
    assert read.data["base_model_relation"] == "adapter"
    assert (read.data.license, read.data.language, read.data.datasets) == ("apache-2.0", "en", ["ml-100k"])
    does = "text-generation" if SHIPPED[name] == SMOLLM2 else "text-classification"
    assert (read.data.pipeline_tag, read.data.model_name) == (does, name)
    assert read.data.tags == ["peftrec", "recommendation", f"{found.record.task}-prediction", "lora"]
    results = {}
    for one in read.data.eval_results or []:
        part = re.search(r"\(([^()]+)\)$", one.metric_name or "")
        results[f"{one.dataset_split}/{one.metric_type}" + (f"|{part[1]}" if part else "")] = one.metric_value
    assert results == {key: value for key, value in found.record.metrics.items() if value is not None}
    assert len(results) > 20
    assert read.data.metrics == [key.partition("/")[2] for key in found.record.metrics if "|" not in key]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_figures_in_the_page_are_those_of_the_run(name: str) -> None:
    found = shipped(name)
    recipe = config.parse_recipe(yaml.safe_load(found.recipe), "test")
    page = card.render(found)
    expected, *warnings = compare_record(found.record, recipe).markdown().split("\n\nWarning: ")
    shown = region(page, "results")
    assert "\u00a0" in shown
    assert expected.strip() in shown.replace("\u00a0", " ")
    assert all(f"\n* {warning.strip()}" in page for warning in warnings)  # among the limits
    assert found.recipe.strip() in region(page, "training")
    for one in found.files:
        assert f", {one.bytes:,} bytes: `{one.sha256}`\n" in region(page, "files")


@pytest.mark.parametrize("name", SHIPPED)
def test_no_path_of_a_machine_is_in_a_card(name: str) -> None:
    page = card.render(shipped(name))
    assert not re.search(r"(?<![\w/:.])[~/](home|root|tmp|work|usr|var|Users|mnt)/", page)
    assert "user_id" not in page
    assert "More information needed" not in page


# --- what is said, by hand --------------------------------------------------------------------------------------------


def test_the_headline_names_the_best_baseline() -> None:
    expected = "AUC on 10 test rows: 0.750 [0.700, 0.800]; the best baseline, user+item bias, has 0.850 [0.800, 0.900]."
    assert expected in region(card.render(facts()), "summary")


def test_what_the_run_shows_of_its_limits() -> None:
    said = region(card.render(facts()), "limits")
    assert "* By AUC the adapter is worse than user+item bias (-0.100 [-0.200, -0.050])." in said
    assert "* By AUC the adapter cannot be told apart from item mean (+0.050 [-0.050, +0.125])." in said
    assert (
        "* It serves the slice cold_item worst: AUC 0.500 [0.250, 0.750] on 2 rows of 1 users, against 0.750 on all."
        in said
    )
    assert "* 2 of the 10 test rows (20.0%) are of items never trained on." in said
    assert "* It is one run, with seed 13: how far figures move" in said
    assert "uauc" not in said


def test_groups_of_users() -> None:
    """The worst of each column; a group is not taken for a slice of items."""
    own = {"test/auc": [0.7, 0.8], "test/auc|g=a": [0.5, 0.6], "test/auc|g=b": [0.7, 0.9], "test/auc|h=a|": [0, 1]}
    found = measured(
        metrics={"test/auc": 0.75, "test/auc|g=a": 0.55, "test/auc|g=b": 0.8, "test/auc|h=a|": 0.5},
        intervals={**measured().intervals, "adapter": own},
        slices={
            name: {"rows": rows, "users": 6, "positives": 3}
            for name, rows in {"all": 17, "g=a": 8, "g=b": 9, "h=a|": 8}.items()
        },
    )
    said = region(card.render(facts(record=found)), "limits")
    assert (
        "* By g it serves the group a worst: AUC 0.550 [0.500, 0.600] on 8 rows of 6 users, against "
        "0.800 [0.700, 0.900] for b.\n" in said
    )
    assert "By h" not in said
    assert "the slice" not in said
    unclear = dataclasses.replace(found, intervals={**found.intervals, "adapter": {**own, "test/auc|g=a": [0.5, 0.7]}})
    assert "for b; the intervals overlap." in region(card.render(facts(record=unclear)), "limits")
    errors = dataclasses.replace(
        found,
        task="rating",
        metrics={"test/rmse": 1.0, "test/rmse|g=a": 1.25, "test/rmse|g=b": 0.75},
        intervals={"adapter": {"test/rmse": [1, 1], "test/rmse|g=a": [1.1, 1.3], "test/rmse|g=b": [0.7, 0.8]}},
        baselines={},
        differences={},
        slices={name: {"rows": 8, "users": 6, "mean_rating": 3} for name in ("all", "g=a", "g=b")},
    )
    rated = config.parse_recipe({**RECIPE, "task": "rating", "data": {"name": "ml-100k"}}, "r")
    (line,) = card_limits.groups_served(compare_record(errors, rated))
    assert line.startswith("By g it serves the group a worst: RMSE 1.250 [1.100, 1.300]")
    assert line.endswith("against 0.750 [0.700, 0.800] for b.")


@pytest.mark.parametrize(
    ("low", "high", "judged"),
    [
        (0.05, 0.25, ": it favours what is popular (+15.0 points [+5.0, +25.0])."),
        (-0.05, 0.25, ": it neither favours nor avoids for certain what is popular (+15.0 points [-5.0, +25.0])."),
        (-0.25, -0.05, ": it avoids what is popular (+15.0 points [-25.0, -5.0])."),
        (None, None, "50% of the training events."),
    ],
)
def test_what_gets_the_best_places(low: float | None, high: float | None, judged: str) -> None:
    mine = {"items": 30, "head": 0.55, "lift": 0.15, "low": low, "high": high}
    found = {
        **{"users": 5, "places": 50, "items": 1000, "candidates": 80, "head": 100},
        **{"head_in_log": 0.5, "head_in_candidates": 0.4},
        "scorers": dict.fromkeys(("adapter", "adapter_no_prior", "bias", "global_mean"), mine),
    }
    said = region(card.render(facts(record=measured(exposure=found))), "limits")
    assert (
        "* Of the ten best-scored test rows of each of 5 users, 55% are of the 100 most popular items (a tenth), which "
        "are 40% of these users' test rows and 50% of the training events" in said
    )
    assert f"{judged} The others: user+item bias 55%.\n" in said
    assert (
        "* These 50 places go to 30 different items, of the 80 in these test rows and the 1,000 in the catalogue "
        "(3.0%).\n" in said
    )


@pytest.mark.parametrize(("tail", "said"), [(2, True), (3, False), (4, False)])
def test_what_is_popular_is_liked_more(tail: int, said: bool) -> None:
    sizes = {"popular": {"rows": 8, "users": 3, "positives": 6}, "tail": {"rows": 4, "users": 2, "positives": tail}}
    page = card.render(facts(record=measured(slices={"all": measured().slices["all"], **sizes})))
    sentence = "* In the test 75% of the rows on popular items are likes, of those on the tail 50%: what is popular"
    assert (sentence in region(page, "limits")) is said
    assert ("In the test" in region(page, "limits")) is said


def test_lower_is_better_for_errors() -> None:
    own = {"test/rmse": [0.85, 0.95], "test/rmse|tail": [0.9, 1.1], "test/rmse|popular": [0.7, 0.9]}
    rated = measured(
        task="rating",
        metrics={"test/rmse": 0.9, "test/rmse|tail": 1.0, "test/rmse|popular": 0.8},
        intervals={"adapter": own, "bias": {"test/rmse": [0.8, 0.9]}, "mf": {"test/rmse": [0.95, 1.0]}},
        baselines={"bias": {"test/rmse": 0.85}, "mf": {"test/rmse": 0.97}},
        differences={
            "bias": {"test/rmse": {"difference": 0.05, "low": 0.01, "high": 0.1}},
            "mf": {"test/rmse": {"difference": -0.07, "low": -0.1, "high": -0.01}},
        },
        slices={name: {"rows": 5, "users": 2, "mean_rating": 3.0} for name in ("all", "tail", "popular")},
    )
    found = compare_record(rated, config.parse_recipe({**RECIPE, "task": "rating", "data": {"name": "ml-100k"}}, "r"))
    assert list(card_limits.verdicts(found)) == [
        "By RMSE the adapter is worse than user+item bias (+0.050 [+0.010, +0.100])."
    ]
    assert "the slice tail worst: RMSE 1.000 [0.900, 1.100]" in card_limits.worst_slice(found)
    assert "the best baseline, user+item bias, has 0.850" in card_sections.headline(found)


def test_the_example_is_a_real_question() -> None:
    page = card.render(facts())
    assert "```text\nHeat: yes\nFargo: no\nBabe: ?\n```" in region(page, "summary")
    assert "+0.000 (log-odds), a chance of 50% that" in region(page, "summary")
    assert "| nothing | Heat | -1.500 |" in region(page, "data")
    assert "<s>Rated:\nHeat: yes\nFargo: no\nBabe:\n```" in region(page, "prompt")
    assert "| ' yes' | 6 | liked |" in region(page, "prompt")


@pytest.mark.parametrize(("score", "chance"), [(-800.0, "0%"), (800.0, "100%"), (np.log(3), "75%")])
def test_chances(score: float, chance: str) -> None:
    assert f"a chance of {chance} that" in card_sections.meaning(about(), score)


def test_effort() -> None:
    assert card_sections.effort(measured()) == "Seed 13. Measured on 2026-11-22 (UTC)."
    known = measured(
        train={
            **{"seconds": 60.0, "events": 1200, "tokens": 6000, "steps": 7},
            **{"events_per_second": 20.0, "tokens_per_second": 100.0},
        },
        eval={"rows": 50, "seconds": 2.0},
        adapter={"trainable_parameters": 20, "bytes": 1234},
        model={"parameters": 1000, "quantization": "nf4"},
        hardware={"cpu": "Z80", "cores": 1, "memory_gb": 0.5, "accelerators": ["H100", "H100"]},
    )
    assert card_sections.effort(known) == (
        "1,200 events and 6,000 tokens in 60 seconds and 7 steps (20.0 events, 100 tokens a second). Scoring 50 rows "
        "with their histories took 2 seconds, 40 milliseconds a row. Hardware: H100, H100, 1 core of Z80, 0.5 GB of "
        "memory. Trained parameters: 20 (2.00% of the base model's), 1,234 bytes. The base model was quantized while "
        "it trained: nf4. Seed 13. Measured on 2026-11-22 (UTC)."
    )


def test_the_training_log_marks_what_was_kept() -> None:
    log = [
        {"step": 5, "loss": 0.75, "epoch": 0.25},
        {"step": 10, "eval_loss": 0.625, "eval_auc": 0.5, "epoch": 0.5},
        {"step": 15, "loss": 0.5, "epoch": 0.75},
        {"step": 20, "eval_loss": 0.5, "eval_auc": None, "epoch": 1.0},
    ]
    lines = card_sections.training_log({"log": log, "best_step": 10}).splitlines()
    assert lines[0] == "| step | epoch | training loss | validation loss | validation AUC |"
    assert lines[2:] == [
        "| **10** | **0.50** | **0.750** | **0.625** | **0.500** |",
        "| 20 | 1.00 | 0.500 | 0.500 | - |",
    ]
    alone = card_sections.training_log({"log": [log[0], log[2]], "best_step": None}).splitlines()
    assert alone[2:] == ["| 5 | 0.25 | 0.750 |", "| 15 | 0.75 | 0.500 |"]


def test_splits_have_days_only_where_there_are_times() -> None:
    sizes = {"rows": 4, "users": 2, "items": 3, "positives": 1}
    dated = measured(data={"splits": {"train": {**sizes, "first": 86400 * 10957, "last": 86400 * 10958}}})
    assert card_sections.splits(dated).splitlines()[2] == "| train | 4 | 2 | 3 | 25.0% | 2000-01-01 | 2000-01-02 |"
    numbered = measured(data={"splits": {"train": {**sizes, "first": 0, "last": 3}}})
    assert card_sections.splits(numbered).splitlines()[2] == "| train | 4 | 2 | 3 | 25.0% |"


def test_the_author_speaks() -> None:
    author = Author(
        license="mit", contact="ann@example.org", intended_use="Films.", citation="Ann. 2026.", language="fr"
    )
    page = card.render(facts(), author, repo_id="ann/films")
    assert "* Licence of the adapter: mit." in region(page, "summary")
    assert "* Contact: ann@example.org" in region(page, "summary")
    assert region(page, "intended_use").strip() == "## Intended use\n\nFilms."
    assert "Ann. 2026." in region(page, "citation")
    assert (head(page)["license"], head(page)["language"]) == ("mit", "fr")
    assert "\n# films\n" in page
    assert all('"ann/films"' in snippet for snippet in snippets(page))


# --- what is not known ------------------------------------------------------------------------------------------------


def test_what_is_not_known_is_not_said() -> None:
    """Own files, a local base model, no author, no training facts: no key, no section and no word of these."""
    bare = facts(
        artifact=about(probes=[]), record=measured(metrics={}, intervals={"adapter": {}}, baselines={}, differences={})
    )
    page = card.render(bare)
    assert set(head(page)) == {"library_name", "pipeline_tag", "tags"}
    for name in ("intended_use", "files", "results"):
        assert region(page, name).strip() == "", name
    assert not re.search(r"^## .*\n+(## |<!--|\Z)", page, flags=re.M), "a heading without a text"
    assert not re.search(r"\b(None|nan|null|Undefined|needed)\b", page)
    assert "licence" not in page.lower()


def test_a_local_base_model_is_no_hub_id() -> None:
    page = card.render(facts())
    assert "base_model" not in head(page)
    assert "Base model: a local folder, tiny," in page
    assert head(card.render(facts(), Author(base_model="ns/tiny")))["base_model"] == "ns/tiny"
    folder = facts(recipe={**RECIPE, "model": {"name": "bases/tiny"}}, record=measured(model={"hub_id": "tiny"}))
    assert "base_model" not in head(card.render(folder))
    hub = facts(recipe={**RECIPE, "model": {"name": "tiny"}}, record=measured(model={"hub_id": "tiny"}))
    assert (head(card.render(hub))["base_model"], head(card.render(hub))["base_model_relation"]) == ("tiny", "adapter")


def test_paths_are_cut_to_their_last_part() -> None:
    warned = measured(warnings=["/home/ann/data/my.csv: no timestamps: rows are taken to be in order of time"])
    page = card.render(facts(record=warned))
    assert "/home/ann" not in page
    assert "ann-laptop" not in page
    for line in ("interactions: my.csv", "items: films.csv", "name: tiny", "output_dir: mine"):
        assert re.search(rf"^ *{line}$", region(page, "training"), flags=re.M), line
    assert "* my.csv: no timestamps: rows are taken to be in order of time." in region(page, "limits")


def test_the_recipe_is_word_for_word_otherwise() -> None:
    data = "data: {name: mind, folder: /home/ann/MIND}"
    earlier = "start: {adapter: /home/ann/old}\ntrain: {teachers: [/home/ann/one, ns/two]}"
    text = f"# mine\ntask: click\n{data}\n{earlier}\noutput_dir: '/tmp/it''s here'  # there\nseed: 013\n"
    expected = text.replace("'/tmp/it''s here'", "it's here").replace("/home/ann/", "")
    assert public_recipe(dataclasses.replace(facts(), recipe=text)) == expected


@pytest.mark.parametrize("path", ["/a/b", "~/b", "../b", "./b", r"C:\a\b", r"\\host\b", "C:/a/b"])
def test_paths_that_say_something_of_the_machine(path: str) -> None:
    assert is_local(path)


@pytest.mark.parametrize("name", ["ml-100k", "ns/name", "runs/mine", "ns/name:train", "my.csv"])
def test_names_that_say_nothing_of_the_machine(name: str) -> None:
    assert not is_local(name)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "ml-100k"}, ["ml-100k"]),
        ({"interactions": "ns/films", "like_at": 4}, ["ns/films"]),
        ({"interactions": "ns/films:train", "like_at": 4}, ["ns/films"]),
        ({"interactions": "data/films.csv", "like_at": 4}, None),
        ({"interactions": "films.parquet", "like_at": 4}, None),
        ({"interactions": "/data/films", "like_at": 4}, None),
    ],
)
def test_only_data_sets_of_the_hub_are_named_in_the_head(data: dict[str, Any], expected: list[str] | None) -> None:
    assert head(card.render(facts(recipe={**RECIPE, "data": data}))).get("datasets") == expected


def test_all_weights_are_no_adapter() -> None:
    whole = facts(
        recipe={**RECIPE, "model": {"name": "tiny"}, "adapter": {"method": "full"}},
        record=measured(model={"hub_id": "tiny"}, adapter={"method": "full"}),
    )
    page = card.render(whole)
    assert (head(page)["library_name"], head(page)["base_model_relation"]) == ("peftrec", "finetune")
    assert "PeftModel" not in page
    assert [kind_of(one) for one in snippets(page)] == ["peftrec", "recommendation pipeline"]


# --- an author's YAML -------------------------------------------------------------------------------------------------


def finished(folder: Path, card: dict[str, str] | None = None) -> Path:
    """The folder of a run, whose recipe has this section `card`."""
    from peftrec import artifact

    run = folder / "mine"
    (run / "adapter").mkdir(parents=True)
    (run / "figures").mkdir()
    for name in ("loss", "roc", "private"):
        (run / "figures" / f"{name}.png").write_bytes(name.encode())
    recipe = facts(recipe={**RECIPE, "card": card or {}}).recipe
    (run / "config.yaml").write_text(recipe, encoding="utf-8")
    record.write_record(run, measured())
    artifact.write(run / "adapter", about(), None)
    return run


def test_the_authors_file(tmp_path: Path) -> None:
    """Words in RUN/card.yaml stand before those of the recipe, and those of a call before both."""
    run = finished(tmp_path, {"license": "mit", "contact": "ann", "language": "fr"})
    found = read_facts(run)
    assert read_author(run, found) == Author(license="mit", contact="ann", language="fr")
    path = run / "card.yaml"
    path.write_text("license: apache-2.0\ncitation: 2026\n", encoding="utf-8")
    expected = Author(license="apache-2.0", contact="ann", language="fr", citation="2026")
    assert read_author(run, found) == expected
    page = card.card_of(run, Author(contact="bob", intended_use="Films."))
    assert page == card.render(found, dataclasses.replace(expected, contact="bob", intended_use="Films."))
    path.write_text("license: Apache 2.0\nlanguage: English\ncontakt: me\nbase_model: a/b/c\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_author(run, found)
    assert [line.removeprefix(f"{path}: ") for line in caught.value.problems] == [
        "contakt: unknown key; did you mean contact?",
        "license: 'Apache 2.0'; expected a licence as the Hub writes it, such as apache-2.0",
        "language: 'English'; expected an ISO 639 code, such as en",
        "base_model: 'a/b/c'; expected a Hub id, such as namespace/name",
    ]


def test_writing_a_card(tmp_path: Path) -> None:
    """The adapter's folder can be published as it is: the pictures that the card shows are in it, and no others."""
    run = finished(tmp_path)
    (run / "adapter/figures").mkdir()
    (run / "adapter/figures/calibration.png").write_bytes(b"of an earlier run")
    path = card.write(run, Author(license="mit"), repo_id="ann/films")
    assert path == run / "adapter/README.md"
    page = path.read_text(encoding="utf-8")
    assert page == card.render(read_facts(run), Author(license="mit"), repo_id="ann/films")
    assert re.findall(r"\]\((figures/.*?)\)", page) == ["figures/loss.png", "figures/roc.png"]
    assert sorted(one.name for one in (run / "adapter/figures").iterdir()) == ["loss.png", "roc.png"]
    assert (run / "adapter/figures/roc.png").read_bytes() == b"roc"
    path.write_text("# Something else\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"README.md: no line"):
        card.write(run)
    assert path.read_text(encoding="utf-8") == "# Something else\n"


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path)
    assert main(["card", str(run), "--repo-id", "ann/films", "--license", "mit", "--intended-use", "Films."]) == 0
    path = run / "adapter/README.md"
    assert capsys.readouterr().out == f"{path}\n"
    assert head(path.read_text())["license"] == "mit"
    assert "'ann/films'" in path.read_text().replace('"', "'")
    assert main(["card", str(run), "--contact", "ann"]) == 0
    page = path.read_text()
    for words in ("Licence of the adapter: mit", "Contact: ann", "\n## Intended use\n\nFilms.\n"):
        assert words in page
    assert main(["card", str(run), "--license", "My Own"]) == 2
    assert main(["card", str(run), "--repo-id", "a b"]) == 2
    assert main(["card", str(tmp_path)]) == 2
    assert path.read_text() == page
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0].startswith("command line: license: 'My Own'; expected a licence")
    assert told[1] == "--repo-id: 'a b'; expected a Hub id, namespace/name"
    assert "config.yaml: cannot be read; expected the output_dir of a finished run" in told[2]


# --- regions ----------------------------------------------------------------------------------------------------------


def test_an_authors_edits_survive() -> None:
    first = card.render(facts())
    edited = first.replace("\n# mine\n", "\n# Films for people\n\nHello.\n").replace(
        "<!-- peftrec:use:begin -->", "## A word of mine\n\n| a |\n\n<!-- peftrec:use:begin -->"
    )
    edited = edited.replace("library_name: peft\n", "library_name: peft\nthumbnail: films.png\n")
    edited = edited.replace("0.750 [0.700, 0.800]", "0.999")
    again = card.render(facts(), existing=edited)
    assert again != edited
    assert again.replace("thumbnail: films.png\n", "") == edited.replace("0.999", "0.750 [0.700, 0.800]").replace(
        "thumbnail: films.png\n", ""
    )
    assert head(again)["thumbnail"] == "films.png"
    assert card.render(facts(), existing=again) == again


def test_a_fact_that_is_gone_leaves_the_head() -> None:
    first = card.render(facts(), Author(license="mit"))
    assert "license" in head(first)
    assert "license" not in head(card.render(facts(), existing=first))


def test_a_region_that_was_taken_out_stays_out() -> None:
    first = card.render(facts())
    without = re.sub(r"<!-- peftrec:prompt:begin -->.*<!-- peftrec:prompt:end -->\n", "", first, flags=re.S)
    assert without != first
    assert card.render(facts(), existing=without) == without
    # One of an earlier template goes, with what it said.
    older = first + "<!-- peftrec:energy:begin -->\n1 kWh\n<!-- peftrec:energy:end -->\n"
    assert card.render(facts(), existing=older) == first
    # One that says nothing is there all the same, so that it can speak later.
    assert "## Intended use\n\nFilms." in card.render(facts(), Author(intended_use="Films."), existing=first)


def test_windows_line_ends_are_read() -> None:
    first = card.render(facts())
    assert card.render(facts(), existing=first.replace("\n", "\r\n")) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda page: re.sub(r"<!-- peftrec.*\n", "", page), r"README.md: no line <!-- peftrec:summary:begin -->"),
        (
            lambda page: page.replace("<!-- peftrec:data:end -->\n", ""),
            r"line \d+: <!-- peftrec:prompt:begin -->; expected",
        ),
        (
            lambda page: page.replace("<!-- peftrec:data:begin -->\n", ""),
            r"peftrec:data:end -->; expected the beginning",
        ),
        (lambda page: page.replace("<!-- peftrec:citation:end -->\n", ""), r"no <!-- peftrec:citation:end -->"),
        (lambda page: page + page.partition("# mine\n")[2], r"peftrec:summary:begin --> for the second time"),
        (lambda page: page.replace("---\n", "---\n: [\n", 1), r"its head is not YAML"),
        (lambda page: "---\n- a\n---\n" + page.split("---\n", 2)[2], r"its head is not a mapping"),
    ],
)
def test_a_broken_card_is_refused(change: Any, message: str) -> None:
    broken = change(card.render(facts()))
    with pytest.raises(DataError, match=message) as caught:
        card.render(facts(), existing=broken)
    assert "\n" not in str(caught.value)


def test_card_of_keeps_what_is_in_the_folder(tmp_path: Path) -> None:
    run = finished(tmp_path)
    page = card.card_of(run)
    assert re.search(r"^\* peftrec.json, [\d,]+ bytes: `[0-9a-f]{64}`$", region(page, "files"), flags=re.M)
    assert "The 2 sample questions in `peftrec.json` were answered" in region(page, "files")
    path = run / "adapter" / "README.md"
    path.write_text(page.replace("# mine", "# Mine"), encoding="utf-8")
    assert "\n# Mine\n" in card.card_of(run)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"README.md: cannot be read .* expected a card in UTF-8"):
        card.card_of(run)


# --- hostile text -----------------------------------------------------------------------------------------------------


def hostile(text: str, task: str = "click") -> Facts:
    prompt = dataclasses.replace(about().prompt, header=text, example=text, user=None)
    base = dataclasses.replace(about().base_model, name=text, note=text, license=text)
    named = about(
        prompt=prompt,
        base_model=base,
        data=Source(name=text, sha256="a" * 64),
        probes=[Probe([(text, 1), (text, 0)], text, 0.5)] * 2,
    )
    return facts(
        name=text,
        artifact=named,
        files=(File(text, 1, "a" * 64),),
        record=measured(warnings=[text], hardware={"cpu": text}),
    )


def test_hostile_titles_break_nothing() -> None:
    plain, page = card.render(hostile("x")), card.render(hostile(NASTY))
    names = [name for name, _ in card_text.regions(plain, "page")]
    assert [name for name, _ in card_text.regions(page, "page")] == names
    assert [len(block) for block in tables(page)] == [len(block) for block in tables(plain)]
    for block in tables(page):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1, block
    prose = re.sub(r"^(`{3,}).*?^\1$", "", page, flags=re.M | re.S)
    assert prose.count("\n## ") == re.sub(r"^(`{3,}).*?^\1$", "", plain, flags=re.M | re.S).count("\n## ")
    body = "".join(re.sub(r"`[^`]*`", "", prose.split("---\n", 2)[2]))
    assert "<b>" not in body
    assert "](y)" not in body.replace("\\](y)", "")
    assert ModelCard(page).data.model_name
    for snippet in snippets(page):
        compile(snippet, "card", "exec")
    assert card.render(hostile(NASTY), existing=page) == page


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_stays_where_it_is_put(text: str) -> None:
    shown = card_text.inline(text)
    assert len(f"{shown}.".splitlines()) == 1
    assert not re.search(r"[<>]|(?<!\\)(\\\\)*[|`*\[\]]", shown)
    assert eval(card_text.literal([text])) == [text]
    assert "<!--" not in card_text.literal(text)
    block = card_text.fenced(text, "text").splitlines()
    fence = block[-1]
    assert block[0] == f"{fence}text"
    assert not any(line.startswith(fence) for line in block[1:-1])


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 200))
def test_pieces_are_the_whole(text: str, words: int) -> None:
    text += "some words " * words
    found = card_text.pieces(text)
    assert "".join(found) == text
    for one in found:
        assert len(one) <= 72 or " " not in one[:-1].lstrip(" ")


def test_text_by_hand() -> None:
    assert card_text.unbroken("0.1 [-0.5, 0.7] [a, b]") == "0.1 [-0.5,\u00a00.7] [a, b]"
    assert card_text.pieces("a b\nc") == ["a b\n", "c"]
    assert card_text.pieces("x" * 70 + " y z") == ["x" * 70 + " ", "y z"]
    assert card_text.pieces("") == [""]
    assert card_text.inline("a|b\n<c> & `d`") == r"a\|b &lt;c&gt; &amp; \`d\`"
    assert card_text.code("a`b") == "``a`b``"
    assert card_text.code("`") == "`` ` ``"
    assert card_text.fenced("```\nx\n", "text") == "````text\n```\nx\n````"
    assert card_text.literal("<!-- it's") == '"<!\\x2d- it\'s"'


# --- snippets ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of adapter, whose card has snippets of its own."""

    base: str = "llama"
    task: Any = "click"
    head: Any = "tokens"
    adapter: dict[str, Any] = dataclasses.field(default_factory=lambda: {"r": 4})

    @property
    def outputs(self) -> int:
        return 1 if self.head == "linear" else 2 if self.task == "click" else 3


CASES = {
    "tokens": Case(),
    "ratings": Case(task="rating"),
    "causal classifier": Case(head="classifier"),
    "linear": Case(task="rating", head="linear"),
    "encoder": Case("bert", head="classifier"),
    "encoder, ratings": Case("bert", "rating", "classifier"),
    "encoder, linear": Case("bert", "click", "linear"),
    "seq2seq": Case("t5", "rating"),
    "prefix": Case(adapter={"method": "prefix", "num_virtual_tokens": 4}),
    "bottleneck": Case(adapter={"method": "bottleneck"}),
    "all weights": Case(adapter={"method": "full"}),
}


@pytest.fixture(scope="module")
def tiny_t5_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5: an encoder-decoder model."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny-t5")
    shape = T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=1, decoder_start_token_id=1
    )
    model = T5ForConditionalGeneration(shape).float()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved(folder: Path, base: Path, case: Case) -> Facts:
    """A random adapter in `folder`, on the base model that lies in it as `tiny`, and its facts."""
    import torch

    from peftrec import adapters, artifact, backbone, encode, scorer
    from peftrec.prompts import WholeText
    from peftrec.recommender import Recommender
    from peftrec.target import Target

    (folder / "tiny").symlink_to(base)
    clicks, line = case.task == "click", case.head == "linear"
    scale = (0.0, 1.0) if clicks else (1.0, 2.0, 3.0)
    offset = (0.0, 0.0) if clicks else (0.0, 0.5, 0.25)
    offset = (0.0 if clicks else 2.25,) if line else offset
    target = Target(case.task, case.head, "squared_error" if line and not clicks else "cross_entropy", scale, offset)
    recipe = {
        "task": case.task,
        "data": {"interactions": "my.csv", "like_at": 2} if clicks else {"interactions": "my.csv"},
        "prompt": {"layout": "timeline" if case.base == "llama" else "pointwise", "max_tokens": 512},
        "model": {"name": str(base), "dtype": "float32"},
        "adapter": case.adapter,
        "score": {"head": case.head},
        "output_dir": "x",
    }
    parsed = config.parse_recipe(recipe, "test")
    loaded = backbone.load(parsed.model, target)
    answers = [" no", " yes"] if clicks else ["1", "2", "3"]
    codec = encode.new_codec(loaded.tokenizer, "They rated:\n", answers, loaded.kind)
    model = scorer.with_head(loaded.model, target.head, codec.answers)
    model = adapters.attach(model, parsed.adapter, base_name="tiny", seed=1)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:  # what is trained starts at zero somewhere: then nothing would be tested
            parameter.data.normal_(std=0.1)
    adapters.save(model, folder)
    loaded.tokenizer.save_pretrained(folder)
    probe = Probe([("Heat (1995)", 1), ("Toy Story (1995)", 0)], "What's Up, Doc? (1972)", 0.0)
    described = artifact.describe(
        parsed,
        codec,
        loaded.base,
        target,
        data_name="my.csv",
        data_sha256="0",
        like_at=None,
        max_item_tokens=32,
        example=(probe.history, probe.candidate),
        template=codec.completed(None) if isinstance(codec, WholeText) else None,
    )
    named = dataclasses.replace(described.base_model, name="tiny", hub_id="tiny")
    described = dataclasses.replace(described, base_model=named)
    artifact.write(folder, described, None)
    asked = Recommender.from_pretrained(folder, base_model=base, dtype="float32")
    told = [(text, answers[label]) for text, label in probe.history]
    (score,) = asked.score(told, [probe.candidate])
    described = dataclasses.replace(described, probes=[dataclasses.replace(probe, score=float(score))])
    artifact.write(folder, described, None)
    return facts(
        recipe=recipe, artifact=described, record=measured(task=case.task, model={"hub_id": str(base)}, **EMPTY)
    )


EMPTY: dict[str, Any] = {
    "metrics": {},
    "intervals": {"adapter": {}},
    "baselines": {},
    "differences": {},
    "slices": {"all": {"rows": 0, "users": 0, "positives": 0, "mean_rating": None}},
}


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], tuple[Path, Facts, list[str]]]:
    """A case's folder, facts, and the snippets of its card."""
    known: dict[str, tuple[Path, Facts, list[str]]] = {}

    def make(name: str) -> tuple[Path, Facts, list[str]]:
        if name not in known:
            folder = tmp_path_factory.mktemp("adapter")
            found = saved(folder, request.getfixturevalue(f"tiny_{CASES[name].base}_folder"), CASES[name])
            known[name] = folder, found, snippets(card.render(found))
        return known[name]

    return make


# Each snippet in its folder, word for word; nothing in between may know of peftrec.
ALONE = """
import contextlib, io, json, os, sys, traceback
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
printed = []
for folder, snippet in json.load(sys.stdin):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(snippet, folder, "exec"), {})
    printed.append(out.getvalue())
assert not any(name.split(".")[0] == "peftrec" for name in sys.modules)
print(json.dumps(printed))
"""


def kind_of(snippet: str) -> str:
    if "import peftrec\n" in snippet:
        return "recommendation pipeline"
    if "import peftrec" in snippet or "from peftrec" in snippet:
        return "peftrec, and PEFT" if "peftrec.bottleneck" in snippet else "peftrec"
    return "text-classification" if "text-classification" in snippet else "PEFT"


def printed_by(snippet: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(snippet, "card", "exec"), {})
    return out.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_what_snippets_a_card_has(name: str, made: Any) -> None:
    case = CASES[name]
    expected = ["peftrec", "recommendation pipeline", "PEFT"]
    if case.head != "tokens":
        expected.append("text-classification")
    if name == "bottleneck":
        expected[-1] = "peftrec, and PEFT"
    if name == "all weights":
        expected.pop()
    _, found, written = made(name)
    assert [kind_of(one) for one in written] == expected
    (probe,) = found.artifact.probes
    assert abs(probe.score) > 0.01
    if case.task == "rating":  # at an end of the scale every score would be right
        assert 1.01 < probe.score < 2.99
    for one in written[2:]:
        assert f"# recorded: {probe.score:.4f}" in one


@pytest.mark.parametrize("name", CASES)
def test_the_recommenders_snippet(name: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found, written = made(name)
    scores, best = printed_by(written[0], folder, monkeypatch).splitlines()
    (probe,) = found.artifact.probes
    assert float(scores.strip("[]")) == pytest.approx(probe.score, abs=1e-4)
    shown = float(best.removeprefix(f"{probe.candidate} "))
    assert shown == pytest.approx(chance(found, probe.score), abs=1e-4)


def chance(found: Facts, score: float) -> float:
    return score if found.artifact.task == "rating" else 1 / (1 + math.exp(-score))


@pytest.mark.parametrize("name", CASES)
def test_the_pipelines_snippet(name: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found, written = made(name)
    (probe,) = found.artifact.probes
    (best,) = printed_by(written[1], folder, monkeypatch).splitlines()
    shown = float(best.removeprefix(f"{probe.candidate} "))
    assert shown == pytest.approx(chance(found, probe.score), abs=1e-4)


def test_the_other_snippets_in_a_process_without_peftrec(made: Any) -> None:
    """Also the text classifier of transformers; all within 1e-4 of the score in the card."""
    asked, expected = [], []
    for name in CASES:
        folder, found, written = made(name)
        plain = [one for one in written if kind_of(one) in ("PEFT", "text-classification")]
        asked += [(str(folder), one) for one in plain]
        expected += [found.artifact.probes[0].score] * len(plain)
    assert len(asked) == 14
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], input=json.dumps(asked), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose([float(one) for one in json.loads(done.stdout)], expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's, about a name of transformers
def test_the_snippet_of_a_method_of_ours(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found, written = made("bottleneck")
    printed = printed_by(written[2], folder, monkeypatch)
    assert float(printed) == pytest.approx(found.artifact.probes[0].score, abs=1e-4)


def test_rendering_loads_no_torch_and_reads_no_network() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from pathlib import Path\n"
        "from peftrec.card import render\n"
        "from peftrec.card_facts import read_facts\n"
        f"render(read_facts(Path({str(CARDS / next(iter(SHIPPED)))!r})))\n"
        "print(*sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CARDS.parent)
    assert done.stdout.split() == []
