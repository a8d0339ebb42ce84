"""Another domain beside the training data: no answer of it is read, and a step stays what it was however it is cut."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from conftest import build_log, random_log
from safetensors.torch import load_file
from test_recipes import check_folder, finetune
from test_resume import METHODS
from test_train import Scripted, changed, equal, losses, mean_loss, train_data, valid_data
from transformers import OPTConfig, OPTForCausalLM

from peftrec import adapters, align, backbone, config, scorer
from peftrec import train as training
from peftrec.align import Alignment
from peftrec.augment import Augment
from peftrec.encode import Encoder
from peftrec.errors import DataError
from peftrec.split import TRAIN, Log
from peftrec.target import Target
from peftrec.timeline import NO_LABEL, WindowDataset, collate

KINDS = ("coral", "mmd", "adversarial", "cpc")


def recipe_of(**changes: Any) -> config.Recipe:
    return config.Recipe(data=config.Data(name="ml-100k"), output_dir="x", **changes)


@pytest.fixture(scope="module")
def log() -> Log:
    return random_log(11, users=6, events=10)


@pytest.fixture(scope="module")
def other(log: Log) -> Log:
    """Another domain: other people, of whom most met the first films only."""
    made = random_log(5, users=7, events=9)
    made = dataclasses.replace(made, item=(made.item % 5).astype(np.int32))
    return align.with_lent_answers(made.keep(made.split == TRAIN), log, seed=3)


@pytest.fixture(scope="module")
def rows(other: Log, codec: Any, questions: Any) -> WindowDataset:
    return train_data(other, codec, questions, 200)


@pytest.fixture
def fit(
    load_tiny: Callable[..., Any], tiny_llama_folder: Path, log: Log, codec: Any, questions: Any, rows: WindowDataset
) -> Callable[..., tuple[Any, training.Fitted]]:
    def run(
        folder: Path,
        how: config.Align | None,
        train: config.Train,
        to_metrics: Any = None,
        *,
        resume: bool = False,
        adapter: config.Adapter | None = None,
        batch: tuple[int, int] = (1, 1),
    ) -> tuple[Any, training.Fitted]:
        base = load_tiny(tiny_llama_folder)
        model = adapters.attach(base, adapter or config.Adapter(r=4), base_name="tiny", seed=3, steps=6)
        train = dataclasses.replace(train, per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1])
        fitted = training.fit(
            model,
            train_data(log, codec, questions),
            valid_data(log, codec, questions),
            Target(),
            to_metrics or mean_loss(log),
            train=train,
            folder=folder,
            seed=3,
            resume=resume,
            alignment=None if how is None else Alignment(how, rows, 3),
        )
        return model, fitted

    return run


# --- the other domain's events ----------------------------------------------------------------------------------------


def test_lent_answers_by_hand() -> None:
    source = build_log([0, 0, 0, 1, 1], [1, 2, 3, 1, 2], [1, 1, 0, 0, 1], split=[0, 0, 1, 0, 0])
    log = build_log([0, 0, 0, 1, 1], [5, 6, 7, 5, 6], [0] * 5)
    found = align.with_lent_answers(log, source, seed=1)
    lent = [found.label[:3].tolist(), found.label[3:].tolist()]
    # One person lends 1, 1 (what is not learned from is not lent), the other 0, 1; they come over again.
    assert lent in ([[1, 1, 1], [0, 1]], [[0, 1, 0], [1, 1]])
    assert found.item.tolist() == log.item.tolist()


@pytest.fixture
def tables(tmp_path: Path) -> config.Recipe:
    """Films of two genres with answers; books without any."""
    random = np.random.default_rng(5)
    user, film = np.repeat(np.arange(20), 12), np.concatenate([random.permutation(16)[:12] for _ in range(20)])
    events = {"user_id": user, "item_id": film, "timestamp": np.arange(240) // 2}
    pl.DataFrame({**events, "label": random.integers(0, 2, 240)}).write_parquet(tmp_path / "films.parquet")
    titles = [f"Film {number}" for number in range(16)]
    pl.DataFrame({"item_id": range(16), "title": titles, "genre": ["Drama", "Comedy"] * 8}).write_csv(
        tmp_path / "films.csv"
    )
    books = {"reader": user, "item_id": film, "timestamp": np.arange(240), "title": [f"Book {n}" for n in film]}
    pl.DataFrame(books).write_parquet(tmp_path / "books.parquet")
    return config.Recipe(
        data=config.Data(
            interactions=str(tmp_path / "films.parquet"),
            items=str(tmp_path / "films.csv"),
            items_where={"genre": ["Drama"]},
            train_events=16,
        ),
        align=config.Align(kind="coral", target=config.OtherDomain(items_where={"genre": ["Comedy"]})),
        output_dir="x",
    )


def test_own_answers_make_no_difference(tables: config.Recipe, log: Log, tokenizer: Any, tmp_path: Path) -> None:
    """From the tables to the tokens: all answers turned round, and all alike, give the same rows."""
    films = tmp_path / "films.parquet"

    def tokens() -> list[list[int]]:
        rows = Alignment.of(tables, align.unanswered(tables, log), tokenizer).rows
        return [rows[index]["input_ids"].tolist() for index in range(len(rows))]

    table = pl.read_parquet(films)
    found = tokens()
    for label in (1 - pl.col("label"), pl.lit(0), pl.lit(None, pl.Int64)):
        table.with_columns(label=label).write_parquet(films)
        assert tokens() == found
    shown = Encoder(align.unanswered(tables, random_log(4)).log, tables.prompt, tokenizer, tables.eval.ties).train(None)
    assert [shown[index]["input_ids"].tolist() for index in range(len(shown))] != found, "answers are in the rows"


def test_another_domain_of_the_same_data(tables: config.Recipe, log: Log) -> None:
    align.check(tables, ["title"])
    found = align.unanswered(tables, log).log
    assert set(found.items["genre"]) == {"Comedy"}
    assert 0.7 * 120 < len(found) < 0.9 * 120, "training events alone, and all of them"
    assert (found.split == TRAIN).all()
    assert set(found.label.tolist()) == {0, 1}


def test_another_table_needs_no_answers(tables: config.Recipe, log: Log, tmp_path: Path) -> None:
    target = config.OtherDomain(interactions=str(tmp_path / "books.parquet"), columns={"user_id": "reader"})
    recipe = dataclasses.replace(tables, align=dataclasses.replace(tables.align, target=target))
    align.check(recipe, ["title"])
    found = align.unanswered(recipe, log).log
    assert found.items["title"].str.starts_with("Book").all()
    assert len(found) == 192


def test_as_many_people_are_kept_as_of_the_source(tables: config.Recipe, log: Log, tmp_path: Path) -> None:
    target = config.OtherDomain(interactions=str(tmp_path / "books.parquet"), columns={"user_id": "reader"})
    data = dataclasses.replace(tables.data, sample_users=5)
    recipe = dataclasses.replace(tables, data=data, align=dataclasses.replace(tables.align, target=target))
    assert len(align.unanswered(recipe, log).log.user_ids) == 5


def test_training_events_are_enough(tables: config.Recipe, log: Log, tmp_path: Path) -> None:
    """A split that leaves nothing to test, since nobody was there more than once; a row too many is told of."""
    table = pl.read_parquet(tmp_path / "films.parquet").with_columns(timestamp=7)
    row = table.filter(pl.col("item_id") % 2 == 1)[:1]
    pl.concat([table, row]).write_parquet(tmp_path / "films.parquet")
    how = config.Split(kind="leave_last_out")
    found = align.unanswered(dataclasses.replace(tables, data=dataclasses.replace(tables.data, split=how)), log)
    assert len(found.log) == table.filter(pl.col("item_id") % 2 == 1).height
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith(f"align.target: {tmp_path / 'films.parquet'}: 1 duplicate row")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"items_where": {"genre": ["Comdy"]}}, "align.target.items_where.genre: no item is 'Comdy'; found Comedy"),
        ({"interactions": "books.parquet"}, r"no column 'user_id' .*, or set align.target.columns.user_id=<column>"),
        ({"name": "ml-100m"}, "align.target.name: no data set 'ml-100m'"),
    ],
)
def test_errors_name_the_other_domain(
    target: dict[str, Any],
    message: str,
    tables: config.Recipe,
    log: Log,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = dataclasses.replace(tables, align=config.Align(kind="mmd", target=config.OtherDomain(**target)))
    with pytest.raises(DataError, match=message) as caught:
        align.unanswered(recipe, log)
    assert str(caught.value).startswith("align.target")


# --- beside the training rows -----------------------------------------------------------------------------------------


def test_rows_vary_as_those_they_stand_beside(tables: config.Recipe, log: Log, tokenizer: Any) -> None:
    """Otherwise their form alone would tell the domains apart."""
    recipe = dataclasses.replace(
        tables,
        train=config.Train(history_dropout=0.5),
        prompt=config.Prompt(max_tokens=200, overlap=0, paraphrases=["What they said:"]),
    )
    other = align.unanswered(recipe, log)
    source = Encoder(other.log, recipe.prompt, tokenizer, recipe.eval.ties).train(None, Augment.of(recipe))
    pairs = Alignment.of(recipe, other, tokenizer).beside(source)
    shown = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        ours, theirs = (
            [one[index]["input_ids"].tolist() for index in range(len(one))] for one in (source, pairs.target)
        )
        assert theirs == ours
        shown.append(theirs)
    assert shown[0] != shown[1]


def test_each_row_has_one_beside_it_drawn_by_epoch(log: Log, codec: Any, questions: Any, rows: WindowDataset) -> None:
    source = train_data(log, codec, questions)
    pairs = Alignment(config.Align(kind="coral"), rows, 3).beside(source)
    assert len(pairs) == len(source)

    def drawn(epoch: int) -> list[list[int]]:
        pairs.set_epoch(epoch)
        return [pairs[index][1]["input_ids"].tolist() for index in range(len(pairs))]

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert source.windows.epoch == 1, "its forms are drawn, too"  # type: ignore[union-attr]
    assert len({str(one) for one in first}) == min(len(source), len(rows))
    batch = align.Pairs.collate([pairs[0], pairs[1]])
    assert batch["reads"].shape == batch["labels"].shape
    assert (batch["labels"][2:] == NO_LABEL).all(), "no answer of the other domain is learned"
    assert torch.equal(batch["reads"][:2], batch["labels"][:2] >= 0)
    assert batch["reads"][2:].any()
    assert not align.Pairs.collate([pairs.blank()])["reads"].any()


@pytest.mark.parametrize("adapter", [{"r": 4}, {"method": "prompt", "num_virtual_tokens": 3}], ids=str)
def test_states_are_those_that_the_head_reads(
    adapter: dict[str, Any], load_tiny: Callable[..., Any], tiny_llama_folder: Path, rows: WindowDataset
) -> None:
    model = adapters.attach(load_tiny(tiny_llama_folder), config.Adapter(**adapter), base_name="tiny", seed=3)
    batch = collate([rows[0], rows[1]])
    batch["reads"] = batch["labels"] >= 0
    with align.watched(model) as hidden, torch.no_grad():
        outputs = scorer.read_outputs(model, batch, torch.float32)
    states = align.at_reads(hidden[0], batch["reads"])
    assert states.shape == (int(batch["reads"].sum()), 32)
    torch.testing.assert_close(model.get_output_embeddings()(states), outputs)
    whole = torch.arange(24.0).reshape(2, 4, 3)  # one virtual token in front of three
    reads = torch.tensor([[True, False, False], [False, True, True]])
    assert align.at_reads(whole, reads).tolist() == [whole[0, 1].tolist(), whole[1, 2].tolist(), whole[1, 3].tolist()]


def test_states_as_wide_as_the_head_reads_them(rows: WindowDataset) -> None:
    """OPT-350m leads the states of its last layer back to the width of its embeddings."""
    settings = OPTConfig(
        vocab_size=50, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = OPTForCausalLM(settings)
    how = Alignment(config.Align(kind="adversarial"), rows, 3)
    with how.attached(model), align.watched(model) as hidden:
        model(input_ids=torch.tensor([[5, 6, 7]]))
        assert model.alignment(hidden[0]).shape == (1, 3, 1)


def test_it_is_taken_away_whatever_happens(rows: WindowDataset) -> None:
    model = OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=24, ffn_dim=16, num_hidden_layers=1))
    with pytest.raises(KeyboardInterrupt), Alignment(config.Align(kind="cpc"), rows, 3).attached(model):
        raise KeyboardInterrupt
    assert not hasattr(model, align.PART)


def test_what_comes_next_is_asked_among_the_other_items_of_a_row(
    load_tiny: Callable[..., Any], tiny_llama_folder: Path, codec: Any, questions: Any
) -> None:
    """Two people in one row; before anything is learned, all candidates are alike."""
    other = build_log([0, 0, 0, 1, 1], [1, 2, 3, 1, 2], [0, 1, 0, 1, 1], item=[0, 1, 2, 3, 1])
    rows = train_data(other, codec, questions, 500)
    assert len(rows) == 1
    how = Alignment(config.Align(kind="cpc", ramp=0.0, weight=2.0), rows, 3)
    model = adapters.attach(load_tiny(tiny_llama_folder), config.Adapter(r=4), base_name="tiny", seed=3)
    how.attach(model)
    batch = align.Pairs.collate([(rows.blank(), rows[0])])
    states = torch.randn(5, 32)
    # Asked at items 0, 1 and 3. After 0 comes 1, against 2 and 3 (the other 1 is no wrong answer); after 1 comes 2,
    # against 0 and 3; after 3 comes 1, against 0 and 2.
    assert float(how.loss(model, batch, states, 0.0).detach()) == pytest.approx(2 * math.log(3), rel=1e-6)
    with torch.no_grad():
        model.alignment.weight.copy_(torch.eye(32))
    places = batch["row"][batch["reads"]].tolist()
    code = other.item[places]
    embedded = model.get_input_embeddings().weight
    spans = [questions.flat[questions.start[c] : questions.start[c + 1]] for c in code.tolist()]
    vectors = torch.stack([embedded[torch.as_tensor(np.asarray(ids))].mean(dim=0) for ids in spans])
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(dim=0), dim=1)
    scores = torch.nn.functional.normalize(states, dim=1) @ vectors.T
    by_hand = []
    user = other.user[places]
    for here in range(4):
        if user[here] == user[here + 1]:
            wrong = [j for j in range(5) if code[j] not in (code[here], code[here + 1])]
            by_hand.append(torch.logsumexp(scores[here, [here + 1, *wrong]], 0) - scores[here, here + 1])
    assert len(by_hand) == 3
    expected = 2 * float(torch.stack(by_hand).mean().detach())
    assert float(how.loss(model, batch, states, 0.0).detach()) == pytest.approx(expected, rel=1e-5)
    twice = align.Pairs.collate([(rows.blank(), rows[0])] * 2)  # another row's items are no candidates
    found = how.loss(model, twice, states.repeat(2, 1), 0.0)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_it(kind: str, fit: Callable[..., Any], tmp_path: Path) -> None:
    """It changes the run, and leaves a plain adapter of the same shape behind; killed and resumed it goes on."""
    train = changed(max_steps=6, evals=3)
    how = config.Align(kind=kind, weight=3.0, ramp=0.0)  # type: ignore[arg-type]
    plain, without = fit(tmp_path / "plain", None, train)
    model, expected = fit(tmp_path / "whole", how, train)
    assert losses(expected) != losses(without)
    lines = [line for line in expected.log if "loss" in line]
    assert all(line["loss"] > line["align_loss"] > 0 for line in lines)
    assert lines[0]["loss"] - lines[0]["align_loss"] == pytest.approx(losses(without)[0][1], rel=1e-4), "the first step"
    for one, folder in ((plain, "plain"), (model, "whole")):
        adapters.save(one, tmp_path / folder / "adapter")
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "plain"))
    assert ours.keys() == theirs.keys()
    assert not equal(ours, theirs)
    assert not hasattr(model, align.PART)

    passes = 0

    def dies(rows: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise KeyboardInterrupt
        return {"loss": 1.0 / passes}

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", how, train, dies)
    _, found = fit(tmp_path / "killed", how, train, resume=True)
    assert losses(found) == losses(expected)


def test_resumed_within_a_later_epoch(
    fit: Callable[..., Any], tmp_path: Path, log: Log, codec: Any, questions: Any
) -> None:
    """It goes on with the pairs of that epoch."""
    count = len(train_data(log, codec, questions))
    train = changed(max_steps=2 * count, evals=2 * count)
    how = config.Align(kind="mmd", weight=3.0, ramp=0.0)
    falling = [1 / (1 + step) for step in range(2 * count)]
    _, expected = fit(tmp_path / "whole", how, train, Scripted(*falling))
    middle = count + 1
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "killed", how, train, Scripted(*falling[:middle], ZeroDivisionError()))
    _, found = fit(tmp_path / "killed", how, train, Scripted(*falling[middle:]), resume=True)
    assert losses(found) == losses(expected)


def test_each_pass_weighs_its_share_of_a_steps_events(fit: Callable[..., Any], tmp_path: Path) -> None:
    """Three passes of unlike rows: the sum of what each adds is the mean over their events."""
    train = changed(max_steps=1, evals=0)
    _, plain = fit(tmp_path / "plain", None, train, batch=(1, 3))
    _, fitted = fit(tmp_path / "mmd", config.Align(kind="mmd", ramp=0.0), train, batch=(1, 3))
    line = fitted.log[0]
    assert line["align_loss"] > 0.01
    assert line["loss"] - line["align_loss"] == pytest.approx(losses(plain)[0][1], rel=1e-4)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_the_log_tells_both_parts_of_the_loss(epsilon: float, fit: Callable[..., Any], tmp_path: Path) -> None:
    """Over steps of unlike numbers of events, and of FGM's two passes the first."""
    train = changed(max_steps=3, evals=0, logging_steps=3, learning_rate=0.0)
    _, plain = fit(tmp_path / "plain", None, train, batch=(1, 3))
    moved = dataclasses.replace(train, fgm_epsilon=epsilon)
    _, fitted = fit(tmp_path / "mmd", config.Align(kind="mmd", ramp=0.0), moved, batch=(1, 3))
    (line,) = (line for line in fitted.log if "loss" in line)
    assert line["align_loss"] > 0.01
    assert line["loss"] - line["align_loss"] == pytest.approx(losses(plain)[0][1], rel=1e-5)


def test_the_weight_grows_from_nothing(fit: Callable[..., Any], tmp_path: Path) -> None:
    train = changed(max_steps=4, evals=0, lr_scheduler_type="constant")
    _, fitted = fit(tmp_path, config.Align(kind="mmd", weight=1.0, ramp=1.0), train)
    added = [line["align_loss"] for line in fitted.log if "loss" in line]
    assert added[0] == 0
    assert min(added[1:]) > 0


def test_what_tells_apart_learns_from_the_first_step(
    fit: Callable[..., Any], load_tiny: Callable[..., Any], tiny_llama_folder: Path, rows: WindowDataset, tmp_path: Path
) -> None:
    """While its adversary's strength is 0, the adapter is that of a run without it."""
    plain, _ = fit(tmp_path / "plain", None, changed(max_steps=1, evals=0, max_grad_norm=0.0))
    model, fitted = fit(
        tmp_path / "both", config.Align(kind="adversarial"), changed(max_steps=1, evals=0, max_grad_norm=0.0)
    )
    assert fitted.log[0]["align_loss"] == pytest.approx(math.log(2), rel=0.5)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name, rtol=1e-4, atol=1e-6)
    fresh = load_tiny(tiny_llama_folder)
    with Alignment(config.Align(kind="adversarial"), rows, 3).attached(fresh):
        begun = {f"{align.PART}.{name}": one.clone() for name, one in fresh.alignment.state_dict().items()}
    kept = load_file(tmp_path / "both" / "checkpoint-1" / adapters.CHECKPOINT)
    assert len(begun) == 4
    for name, weight in begun.items():
        (after,) = (one for key, one in kept.items() if key.endswith(name))
        assert (after - weight).abs().max() > 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_give_the_same(kind: str, fit: Callable[..., Any], tmp_path: Path) -> None:
    how = config.Align(kind=kind, ramp=0.0)  # type: ignore[arg-type]
    found = []
    for checkpointing in (False, True):
        train = changed(max_steps=3, evals=0, gradient_checkpointing=checkpointing)
        found.append(losses(fit(tmp_path / str(checkpointing), how, train, batch=(2, 2))[1]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_method(method: str, fit: Callable[..., Any], tmp_path: Path) -> None:
    """Its gradient reaches what is trained: nothing but the weight differs between the two runs."""
    train = changed(max_steps=4, evals=1, max_grad_norm=0.0)
    found = []
    for weight in (1.0, 1e-30):
        how = config.Align(kind="cpc", ramp=0.0, weight=weight)
        model, fitted = fit(tmp_path / str(weight), how, train, adapter=METHODS[method])
        assert len(losses(fitted)) == 4
        assert all(math.isfinite(value) for _, value in losses(fitted))
        found.append(adapters.training_state(model))
    assert found[0].keys() == found[1].keys()
    assert not equal(*found)
    adapters.save(model, tmp_path / "adapter")
    assert not any(align.PART in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_head(
    kind: str,
    tiny_llama_folder: Path,
    tmp_path: Path,
    log: Log,
    codec: Any,
    questions: Any,
    rows: WindowDataset,
) -> None:
    target = Target(head="linear", offset=(0.0,))
    base = backbone.load(config.Model(name=str(tiny_llama_folder), dtype="float32"), target).model
    model = adapters.attach(base, config.Adapter(r=4), base_name="tiny", seed=3)
    fitted = training.fit(
        model,
        train_data(log, codec, questions),
        valid_data(log, codec, questions),
        target,
        lambda *_: {"loss": 1.0},
        train=changed(max_steps=3, evals=1),
        folder=tmp_path,
        seed=3,
        alignment=Alignment(config.Align(kind=kind, ramp=0.0), rows, 3),  # type: ignore[arg-type]
    )
    assert all(line["align_loss"] > 0 for line in fitted.log if "loss" in line)


def test_a_run_from_its_recipe_to_its_card(tables: config.Recipe, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """recipes/finetune.py by a file, with another table that has no answers; validate tells of it."""
    table = pl.read_parquet(tmp_path / "books.parquet")
    pl.concat([table, table[:1]]).write_parquet(tmp_path / "books.parquet")
    books = {"interactions": str(tmp_path / "books.parquet"), "columns": {"user_id": "reader"}}
    recipe = config.recipe_to_dict(
        dataclasses.replace(tables, data=dataclasses.replace(tables.data, train_events=None))
    )
    recipe |= {
        "prompt": {"max_tokens": 128, "overlap": 16},
        "model": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "adapter": {"r": 4},
        "train": {"max_steps": 2, "evals": 1, "logging_steps": 1},
        "eval": {"bootstrap": 5},
        "align": {"kind": "adversarial", "ramp": 0.5, "target": books},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = finetune("--config", tmp_path / "recipe.yaml")
    assert "align: adversarial, beside 192 events without answers in" in done.stdout
    found = check_folder(tmp_path / "run")
    other = {"kind": "adversarial", "weight": 1.0, "ramp": 0.5, "data": "books.parquet", "items_where": {}}
    facts = found.adapter["aligned_with"]
    assert len(facts.pop("sha256")) == 64
    assert facts == {**other, "events": 192}
    warning = f"align.target: {tmp_path / 'books.parquet'}: 1 duplicate row"
    assert f"warning: {warning}" in done.stdout
    assert any(one.startswith(warning) for one in found.warnings)
    page = (tmp_path / "run/adapter/README.md").read_text()
    assert (
        "A second loss (adversarial, weight 1) was to bring another domain nearer, books.parquet: of its 192 training"
        in page
    )
    assert [line["align_loss"] > 0 for line in found.train["log"] if "loss" in line] == [True, True]
    assert not any(align.PART in name for name in load_file(tmp_path / "run/adapter/adapter_model.safetensors"))
    told = subprocess.run(
        [sys.executable, "-m", "peftrec", "validate", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "align    adversarial, weight 1, to " in told.stdout
