"""The LSTM click model. This file is also what two processes run, to be compared with one."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from test_classical import make_log, two_tastes

from peftrec import lstm_clicks, metrics, opponents
from peftrec.config import parse_recipe
from peftrec.errors import ConfigError
from peftrec.lstm_clicks import Settings, predict
from peftrec.people import Person, held_people, training_people
from peftrec.split import Log

SHORT = Settings(width=4, hidden=6, epochs=2, batch=16, longest=8)


@pytest.fixture(scope="module")
def log() -> Log:
    return two_tastes(clicks=True)


def main() -> None:
    found = predict(two_tastes(clicks=True), "streaming", settings=SHORT)
    rank, world, path = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
    told = {"world": world, **found.counts, "scores": found.scores.tolist(), "settings": found.settings}
    path.with_suffix(f".{rank}").write_text(json.dumps(told))


def with_ties(log: Log) -> Log:
    """The same log with two or three events of a person at one time."""
    return replace(log, timestamp=log.timestamp // 100)


def test_what_a_row_knows_by_hand(log: Log) -> None:
    small = replace(
        log,
        user=np.zeros(5, np.int32),
        item=np.arange(5, dtype=np.int32),
        timestamp=np.array([1, 1, 2, 3, 3]),
        label=np.array([0, 1, 1, 0, 1], dtype=np.int8),
        split=np.array([0, 0, 0, 2, 2], dtype=np.int8),
    )
    held = small.split == 2

    def known(people: object) -> tuple[list[int], list[int], list[int]]:
        (one,) = people  # type: ignore[misc]
        return one.events.tolist(), one.rows.tolist(), one.known.tolist()

    assert known(held_people(small, held, "streaming", "isolate")) == ([0, 1, 2, 3, 4], [3, 4], [3, 3])
    assert known(held_people(small, held, "streaming", "order")) == ([0, 1, 2, 3, 4], [3, 4], [3, 4])
    assert known(held_people(small, held, "frozen", "isolate")) == ([0, 1, 2], [3, 4], [3, 3])
    assert known(training_people(small, "isolate")) == ([0, 1, 2], [0, 1, 2], [0, 0, 2])
    assert known(training_people(small, "order")) == ([0, 1, 2], [0, 1, 2], [0, 1, 2])


def test_a_long_sequence_is_cut_into_pieces_with_an_empty_state_each() -> None:
    events = np.arange(10, 15)
    pieces = lstm_clicks._cut(Person(events, events, np.array([0, 0, 2, 2, 4])), 3)
    assert [(one.events.tolist(), one.known.tolist()) for one in pieces] == [
        ([10, 11, 12], [0, 0, 2]),
        ([13, 14], [0, 1]),
    ]


def test_the_chance_is_read_from_the_state_before_the_moment(log: Log) -> None:
    codes = lstm_clicks._Codes(log)
    torch.manual_seed(1)
    network = lstm_clicks._network(codes, SHORT)
    person = next(iter(held_people(with_ties(log), log.split == 2, "streaming", "isolate")))
    another = Person(
        person.events[:1], person.rows[:1], np.zeros(1, dtype=np.int64)
    )  # what it is padded to does not matter
    batch = lstm_clicks._batch([person, another], codes, "cpu")
    found = lstm_clicks._log_odds(network, batch)
    user = network["user"](torch.tensor([codes.user[person.rows[0]]]))
    for place, (row, known) in enumerate(zip(person.rows.tolist(), person.known.tolist(), strict=True)):
        state = torch.zeros(1, SHORT.hidden)
        if known:
            events = person.events[:known]
            items = network["item"](torch.from_numpy(codes.item[events]))
            answers = torch.from_numpy(2 * codes.label[events] - 1).float()[:, None]
            state = network["lstm"](torch.cat((user.expand(known, -1), items, answers), dim=1))[0][-1:]
        asked = network["item"](torch.tensor([codes.item[row]]))
        expected = network["head"](torch.cat((user, asked, state), dim=1))
        assert torch.allclose(found[0, place], expected[0, 0], atol=1e-6)
    assert batch["row"][1].tolist() == [person.rows[0]] + [-1] * (len(person.rows) - 1)


@pytest.mark.parametrize(("history", "ties"), [("streaming", "isolate"), ("streaming", "order"), ("frozen", "isolate")])
def test_no_row_knows_an_answer_of_its_own_time_or_later(log: Log, history: str, ties: str) -> None:
    log = with_ties(log)
    row = int(np.flatnonzero(log.split == 2)[40])
    flipped = log.label.copy()
    flipped[row] = 1 - flipped[row]
    before, after = (predict(one, history, ties, SHORT).scores for one in (log, replace(log, label=flipped)))
    moved = np.flatnonzero(~np.isclose(before, after, rtol=0, atol=1e-9) & (log.split > 0))
    may = (log.user == log.user[row]) & (log.timestamp > log.timestamp[row])
    if ties == "order":
        may |= (log.user == log.user[row]) & (np.arange(len(log)) > row)
    assert set(moved) <= (set(np.flatnonzero(may)) if history == "streaming" else set())
    assert history == "frozen" or len(moved)


def moods() -> Log:
    """Half of 60 people like all of their 20 films, half none; the last 20 people are not trained on."""
    user, item = np.repeat(np.arange(60), 20), np.tile(np.arange(20), 60)
    split = np.where(user < 40, 0, np.where(user < 50, 1, 2))
    return make_log(user, item, np.tile(np.arange(20), 60), user % 2, split, scale=(0.0, 1.0))


def test_it_learns_what_a_history_says_of_people_it_never_met_and_stops() -> None:
    log, settings = moods(), replace(SHORT, epochs=30, patience=3, longest=20, learning_rate=2e-2)
    streaming, frozen = (predict(log, history, settings=settings) for history in ("streaming", "frozen"))
    later = (log.split == 2) & (log.timestamp > 0)
    assert metrics.click_metrics(log.label[later], streaming.scores[later], log.user[later])["auc"] > 0.95
    assert metrics.click_metrics(log.label[later], frozen.scores[later], log.user[later])["auc"] == 0.5
    assert 1 <= streaming.settings["best_epoch"] <= 30
    assert streaming.settings["valid_log_loss"] < 0.5 < frozen.settings["valid_log_loss"]
    assert np.isnan(streaming.scores[log.split == 0]).all()
    assert np.isfinite(streaming.scores[log.split != 0]).all()
    assert streaming.counts == {"scored": 400, "events": 800}


def test_the_seed_fixes_everything(log: Log) -> None:
    state = torch.get_rng_state()
    first, again, other = (predict(log, "streaming", settings=SHORT, seed=seed).scores for seed in (1, 1, 2))
    assert np.array_equal(first, again, equal_nan=True)
    assert not np.allclose(first[log.split == 2], other[log.split == 2])
    assert torch.equal(state, torch.get_rng_state())  # nobody else's draws are moved


def test_ids_without_a_training_event_are_one(log: Log) -> None:
    cold = (log.user == 3) | (log.item == 7)
    held = replace(log, split=np.where(cold, 2, log.split).astype(np.int8))
    codes = lstm_clicks._Codes(held)
    assert set(codes.user[held.user == 3]) == set(codes.item[held.item == 7]) == {lstm_clicks.UNKNOWN}
    assert (codes.user[held.split == 0] > 0).all()
    assert (codes.item[held.split == 0] > 0).all()
    assert np.isfinite(predict(held, "streaming", settings=SHORT).scores[cold]).all()


def test_no_validation_rows_and_no_training_rows(log: Log) -> None:
    unseen = replace(log, split=np.where(log.split == 1, 2, log.split).astype(np.int8))
    found = predict(unseen, "streaming", settings=SHORT)
    assert found.settings["best_epoch"] == SHORT.epochs
    assert found.settings["valid_log_loss"] is None
    none = replace(log, split=np.full_like(log.split, 2))
    assert np.isfinite(predict(none, "streaming", settings=SHORT).scores).all()


def test_it_stands_among_the_others(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm_clicks, "Settings", lambda: SHORT)
    recipe = parse_recipe({"data": {"name": "ml-100k"}, "eval": {"baselines": ["mf", "lstm"]}, "output_dir": "x"}, "r")
    found = opponents.measure(log, recipe)
    assert list(found.scores) == ["mf", "lstm", "global_mean"]
    assert found.settings["lstm"]["best_epoch"] >= 1
    with pytest.raises(
        ConfigError, match=r"eval\.baselines: lstm; it predicts clicks; set task: click, or leave it out"
    ):
        parse_recipe({**recipe_of("rating"), "eval": {"baselines": ["lstm"]}}, "r")


def recipe_of(task: str) -> dict[str, object]:
    return {"task": task, "data": {"name": "ml-100k"}, "output_dir": "x"}


def test_the_recipe_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = moods()
    events = pl.DataFrame({"user_id": log.user, "item_id": log.item, "timestamp": log.timestamp, "label": log.label})
    events.with_columns(title=pl.format("Film {}", "item_id")).write_csv(tmp_path / "events.csv")
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{interactions: {tmp_path}/events.csv, split: {{kind: cold_user, valid: 0.2, test: 0.2}}}}\n"
        "eval: {baselines: [bias], bootstrap: 20}\noutput_dir: unused\n"
    )
    monkeypatch.setattr(lstm_clicks, "Settings", lambda: SHORT)
    recipe = str(Path(__file__).parents[1] / "recipes" / "lstm.py")
    monkeypatch.setattr(sys, "argv", [recipe, "--config", str(tmp_path / "recipe.yaml")])
    runpy.run_path(recipe, run_name="__main__")
    told = capsys.readouterr().out
    assert "test: 240 rows of 12 users, " in told
    assert {"LSTM", "user+item bias", "matrix factorisation", "global mean"} <= set(
        re.findall(r"^(\S.*?)  ", told, re.M)
    )
    assert "LSTM minus the other" in told
    assert "cold_user" in told
    assert re.search(r"LSTM: [12] epochs kept, log loss of the validation rows 0\.\d{4}\n$", told)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--task", "rating"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(recipe, run_name="__main__")
    assert "task is rating; the LSTM predicts clicks" in capsys.readouterr().err


def test_two_processes_find_what_one_finds(log: Log, tmp_path: Path) -> None:
    alone = predict(log, "streaming", settings=SHORT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[1]))),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "found.json")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for one in running:
        _, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
    for rank in range(2):
        told = json.loads((tmp_path / "found.json").with_suffix(f".{rank}").read_text())
        assert told["world"] == 2
        assert {name: told[name] for name in alone.counts} == alone.counts
        assert np.allclose(told["scores"], alone.scores, rtol=0, atol=1e-4, equal_nan=True)


if __name__ == "__main__":
    main()
