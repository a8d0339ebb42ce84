from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from saved import save_adapter

from peftrec import baselines, boosting, cli, config, opponents, retrieval, retrieval_run
from peftrec.errors import ConfigError, DataError
from peftrec.retrieval import Questions
from peftrec.split import Log

FILMS = 30


def make_log(user, item, time, label, split, items: int = FILMS) -> Log:
    """A log from columns that are sorted by user and time."""
    return Log(
        user=np.array(user, dtype=np.int32),
        item=np.array(item, dtype=np.int32),
        timestamp=np.array(time, dtype=np.int64),
        label=np.array(label, dtype=np.int8),
        rating=None,
        split=np.array(split, dtype=np.int8),
        user_ids=pl.Series(range(max(user) + 1)),
        items=pl.DataFrame({"item_id": [f"i{code}" for code in range(items)], "genres": ["a", "b"] * (items // 2)}),
    )


def some_log(seed: int = 0, users: int = 12, events: int = 12) -> Log:
    """Each user meets so many different films, some at one time; splits by time."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, 20, (users, events)), axis=1).ravel()
    item = np.concatenate([rng.permutation(FILMS)[:events] for _ in range(users)])
    split = np.select([time >= 16, time >= 12], [2, 1], 0)
    return make_log(np.repeat(np.arange(users), events), item, time, rng.integers(0, 2, users * events), split)


def one_question(scores: list[float], liked: int) -> tuple[np.ndarray, Questions]:
    n = len(scores)
    questions = Questions(np.array([0]), np.array([0, n]), np.arange(n), np.arange(n) == liked)
    return np.array(scores), questions


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_places_by_hand() -> None:
    score, questions = one_question([5.0, 4.0, 3.0, 2.0], liked=2)
    assert {name: value.tolist() for name, value in retrieval.place_figures(score, questions).items()} == {
        "hr@10": [1],
        "ndcg@10": [pytest.approx(1 / 2)],  # 1 / log2(1 + 3)
        "mrr": [pytest.approx(1 / 3)],
    }
    score, questions = one_question([1.0] * 20, liked=4)  # an order drawn by lot
    found = retrieval.place_figures(score, questions)
    assert found["hr@10"][0] == pytest.approx(1 / 2)
    assert found["mrr"][0] == pytest.approx(sum(1 / place for place in range(1, 21)) / 20)


def test_a_tie_is_worth_the_mean_over_its_orders() -> None:
    score, questions = one_question([3.0] * 7 + [2.0] * 5 + [1.0], liked=9)
    alike = [float(index) for index in range(5)]
    orders = [
        retrieval.place_figures(np.array([9.0] * 7 + list(order) + [-1.0]), questions)
        for order in itertools.permutations(alike)
    ]
    for name, value in retrieval.place_figures(score, questions).items():
        assert value[0] == pytest.approx(np.mean([found[name][0] for found in orders]))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:lenskit")
def test_figures_are_those_of_lenskit() -> None:
    data, metrics = pytest.importorskip("lenskit.data"), pytest.importorskip("lenskit.metrics")
    log2 = pytest.importorskip("lenskit.metrics.ranking").LogRankWeight(offset=1)
    theirs = {"hr@10": metrics.Hit(n=10), "ndcg@10": metrics.NDCG(n=10, weight=log2), "mrr": metrics.RecipRank()}
    rng, places = np.random.default_rng(0), set()
    for _ in range(40):
        score, questions = one_question(rng.permutation(25).astype(float).tolist(), liked=int(rng.integers(25)))
        ranked = data.ItemList(item_ids=np.argsort(-score), ordered=True)
        wanted = data.ItemList(item_ids=np.flatnonzero(questions.liked))
        for name, value in retrieval.place_figures(score, questions).items():
            assert value[0] == pytest.approx(theirs[name].measure_list(ranked, wanted))
        places.add(value[0] >= 0.1)
    assert places == {True, False}


def test_what_gets_into_the_ten_by_hand() -> None:
    # Two training users met film 0, one of them film 1; each knows but those. Twelve candidates, ten places.
    log = make_log([0, 0, 0, 1, 1], [0, 1, 2, 0, 3], [1, 2, 9, 1, 9], [1, 1, 1, 0, 1], [0, 0, 2, 0, 2])
    item = np.array([2, *range(10, 21), 3, *range(10, 21)])
    questions = Questions(np.array([2, 4]), np.array([0, 12, 24]), item, np.isin(np.arange(24), [0, 12]))
    score = np.tile(-np.arange(12.0), 2)
    found = retrieval.measure(log, questions, {"a": score, "b": -score}, "streaming", resamples=20, seed=1)
    ours, other = found.found.intervals["a"], found.found.intervals["b"]
    assert (found.users, found.candidates, found.offered) == (2, 12, 13)
    assert found.covered == {"a": 11, "b": 10}  # 2 and 3 and nine more; ten of the rest
    assert (ours["mrr"].point, other["mrr"].point) == (1, pytest.approx(1 / 12))
    assert (ours["hr@10"].point, other["hr@10"].point) == (1, 0)
    assert ours["novelty"].point == pytest.approx(math.log2(3 / 1))  # nobody met them
    assert ours["popularity"].point == 0
    assert found.found.differences["b"]["hr@10"].point == 1
    # Film 0 for one of the ten: 2 training events, met by both. Known are films 0 and 1 (mean 1.5), and 0 (2).
    swapped = replace(questions, item=np.where(item == 10, 0, item))
    found = retrieval.measure(log, swapped, {"a": score}, "streaming", resamples=0)
    own = found.found.intervals["a"]
    assert own["popularity"].point == pytest.approx((2 / 10 + 2 / 10) / (1.5 + 2))
    assert own["novelty"].point == pytest.approx((9 * math.log2(3) + math.log2(3 / 3)) / 10)


def test_a_score_that_is_no_number_is_refused() -> None:
    log = some_log()
    questions = retrieval.draw(log, 3, 5, "streaming", 1)
    with pytest.raises(DataError, match=r"^ranking: a has scores"):
        retrieval.measure(log, questions, {"a": np.full(len(questions.item), np.nan)}, "streaming")


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["streaming", "frozen"])
def test_a_question_is_the_latest_like_among_what_was_never_met(history: baselines.History) -> None:
    log = some_log(3)
    questions = retrieval.draw(log, 100, 6, history, 13)
    assert len(questions) > 4
    for number, row in enumerate(questions.row.tolist()):
        own = np.flatnonzero(log.user == log.user[row])
        can = own[(log.split[own] == 2) & (log.label[own] == 1)]
        assert row in can
        assert log.timestamp[row] == log.timestamp[can].max()
        candidates = questions.item[questions.start[number] : questions.start[number + 1]]
        assert len(set(candidates)) == 7
        assert set(candidates) & set(log.item[own]) == {log.item[row]}
        known = retrieval.known_rows(log, row, history)
        assert len(known)
        assert known.tolist() == [
            one
            for one in own
            if (log.split[one] == 0 if history == "frozen" else log.timestamp[one] < log.timestamp[row])
        ]
    assert questions.item[questions.liked].tolist() == log.item[questions.row].tolist()
    assert len({int(np.flatnonzero(part)[0]) for part in np.split(questions.liked, questions.start[1:-1])}) > 2


def test_whom_else_is_asked_and_among_how_many_changes_nothing() -> None:
    log = some_log(3)
    few, many, whole = (retrieval.draw(log, n, among, "streaming", 13) for n, among in ((2, 6), (100, 6), (100, None)))
    assert set(few.row) < set(many.row)
    assert many.row.tolist() == whole.row.tolist()
    for number, row in enumerate(many.row.tolist()):
        some = many.item[many.start[number] : many.start[number + 1]]
        everything = whole.item[whole.start[number] : whole.start[number + 1]]
        assert [item for item in everything if item in set(some)] == some.tolist()
        assert len(everything) == FILMS - 12 + 1
        if row in few.row:
            at = few.row.tolist().index(row)
            assert few.item[few.start[at] : few.start[at + 1]].tolist() == some.tolist()


def test_nobody_to_ask_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = some_log()
    with pytest.raises(DataError, match=r"^ranking: nobody has a liked test event"):
        retrieval.draw(replace(log, label=np.where(log.split == 2, 0, log.label)), 5, 5, "streaming", 1)
    monkeypatch.setattr(retrieval, "MOST_PAIRS", 10)
    with pytest.raises(DataError, match="ask for fewer users"):
        retrieval.draw(log, 5, None, "streaming", 1)


# --- what a scorer knows ----------------------------------------------------------------------------------------------


def recipe_of(names: list[str], history: baselines.History = "streaming", **keys: Any) -> config.Recipe:
    how = config.Eval(baselines=names, history=history, **keys)  # type: ignore[arg-type]
    return config.Recipe(data=config.Data(name="ml-100k"), eval=how, output_dir="x")


@pytest.mark.parametrize("history", ["streaming", "frozen"])
def test_a_candidates_score_is_that_of_the_saved_prior(history: baselines.History) -> None:
    log = some_log(3)
    questions = retrieval.draw(log, 100, 6, history, 13)
    # Candidates do not see each other even where events of one second do.
    scores = retrieval_run.baseline_scores(log, questions, recipe_of(["bias", "popularity"], history, ties="order"))
    trained = np.bincount(log.item[log.split == 0], minlength=FILMS)
    assert scores["popularity"].tolist() == trained[questions.item].tolist()
    rows, _ = retrieval.as_rows(log, questions)
    known = baselines.predict(rows, history, items="frozen")
    prior = baselines.fit_prior(log, known.shrinkage)
    for number, row in enumerate(questions.row.tolist()):
        part = slice(questions.start[number], questions.start[number + 1])
        past = retrieval.known_rows(log, row, history)
        ids = [f"i{code}" for code in log.item[past]]
        expected = prior.scores(ids, log.label[past], [f"i{code}" for code in questions.item[part]])
        assert scores["bias"][part] == pytest.approx(expected)


def test_no_scorer_knows_the_other_candidates_or_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("surprise")
    monkeypatch.setattr(boosting, "_MOST_TREES", 20)
    monkeypatch.setattr(boosting, "_LEAVES_GRID", (4,))
    log = some_log(3)
    names = ["item_mean", "bias", "mf", "svd", "gbdt", "popularity"]
    few, whole = (retrieval.draw(log, 100, among, "streaming", 13) for among in (6, None))
    some, everything = (retrieval_run.baseline_scores(log, asked, recipe_of(names)) for asked in (few, whole))
    assert set(some) == {*names, "global_mean"}
    place = {pair: at for at, pair in enumerate(zip(whole.question.tolist(), whole.item.tolist(), strict=True))}
    same = [place[pair] for pair in zip(few.question.tolist(), few.item.tolist(), strict=True)]
    for name in names:
        assert some[name] == pytest.approx(everything[name][same]), name
    later = replace(log, label=np.where(np.isin(np.arange(len(log)), few.row), 0, log.label))
    unasked = retrieval_run.baseline_scores(later, few, recipe_of(names))
    for name in names:
        assert some[name] == pytest.approx(unasked[name]), name


def test_the_adapter_is_asked_with_what_is_known() -> None:
    log = some_log(3)
    questions = retrieval.draw(log, 2, 4, "streaming", 13)
    asked = []

    def score(history: list[Any], candidates: list[str], user: Any) -> np.ndarray:
        asked.append((history, candidates, user))
        return np.arange(len(candidates), dtype=float)

    recommender: Any = SimpleNamespace(score=score)
    found = retrieval_run.adapter_scores(recommender, log, questions, recipe_of([]))
    assert found.tolist() == [0, 1, 2, 3, 4] * 2
    past = retrieval.known_rows(log, int(questions.row[0]), "streaming")
    assert asked[0] == (
        [(f"i{log.item[one]}", float(log.label[one])) for one in past],
        [f"i{code}" for code in questions.item[:5]],
        None,
    )


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: recipe, tables beside it, and a random adapter."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    log = some_log(3)
    ids = [f"i{code}" for code in log.item]
    rows = pl.DataFrame({"user_id": log.user, "item_id": ids, "timestamp": log.timestamp, "label": log.label})
    rows.write_csv(folder / "events.csv")
    pl.DataFrame(
        {"item_id": [f"i{code}" for code in range(FILMS)], "title": [f"Film {c}" for c in range(FILMS)]}
    ).write_csv(folder / "films.csv")
    (folder / "config.yaml").write_text(
        f"data: {{interactions: {folder}/events.csv, items: {folder}/films.csv, split: {{valid: 0.2, test: 0.2}}}}\n"
        f"model: {{name: {tiny_llama_folder}}}\neval: {{baselines: [bias], bootstrap: 20}}\noutput_dir: x\n"
    )
    save_adapter(tiny_llama_folder, folder / "adapter", item="{title}", prior=None)
    return folder


def test_a_run_ranks(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_run, "AMONG", 5)
    assert cli.main(["evaluate", str(run), "--ranking", "4", "--baselines", "bias", "popularity"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    sampled, _, whole = out.partition("among 18 items")
    assert "4 users, each with one liked test item among 5 sampled items" in sampled
    assert "\nadapter " in sampled
    assert "adapter minus the other" in sampled
    assert "\nadapter " not in whole
    assert "popularity minus" not in sampled
    assert retrieval_run.rank_run(run, 4, adapter=False).markdown().count("| user+item bias |") == 2
    both = retrieval_run.rank_run(run, 1, adapter_on_all=True, resamples=0).facts()
    assert set(both["all"]["scorers"]) == {"adapter", "bias", "global_mean"}
    assert both["99"]["candidates"] == 6


def test_refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--ranking", "0"], "--ranking: 0;"),
        (["--ranking", "2", "--no-adapter", "--adapter-on-all"], "--adapter-on-all:"),
        (["--ranking", "2", "--split", "valid"], "--split: valid;"),
        (["--no-adapter"], "--no-adapter: does nothing without --ranking"),
        (["--ranking", "2", "--baselines", "bais"], f"{run}/config.yaml: eval.baselines"),
    ):
        assert cli.main(["evaluate", str(run), *words]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.startswith(said)
        assert len(found.err.splitlines()) == 1


def test_ready_made_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {records: x.json}\nprompt: {layout: pointwise}\noutput_dir: x\n")
    with pytest.raises(DataError, match="ready-made prompts"):
        retrieval_run.rank_run(tmp_path, 3)


def test_a_folder_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        retrieval_run.rank_run(tmp_path, 3)


def test_opponents_know_items_as_they_are_told() -> None:
    log = some_log(3)
    streaming, frozen = (opponents.measure(log, recipe_of(["popularity"]), items).scores for items in (None, "frozen"))
    assert (streaming["popularity"] >= frozen["popularity"]).all()
    assert (streaming["popularity"] > frozen["popularity"]).any()
