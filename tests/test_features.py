"""Similarities, profiles, a recommender without training, and the shortlist before exact scores."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved import FILMS, save_adapter, save_run
from test_docs import ROOT, YOUR_DATA, blocks
from test_plug_in import FENCE

from peftrec import assets, bootstrap, cli, graph, vector_files
from peftrec.embeddings import Embedder
from peftrec.errors import ConfigError, DataError, ModelError
from peftrec.features import FeatureRecommender
from peftrec.profiles import Liked, ProfileText, mean_vector, weights
from peftrec.recommender import Recommender
from peftrec.shortlist import Shortlist, choose
from peftrec.similarity import MEASURES, Index, normalized
from peftrec.vector_files import VectorTable

HOME = assets.cache_folder()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("PEFTREC_HOME", str(tmp_path_factory.mktemp("cache")))


# --- similarity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("dot", [3, 0, -3, 0]),
        ("cosine", [0.6, 0, -0.6, 0]),
        ("euclidean", [-np.sqrt(20), -np.sqrt(18), -np.sqrt(32), -5]),
        ("pearson", [-1, -1, 1, 0]),
    ],
)
def test_similarities_by_hand(measure: Any, expected: list[float]) -> None:
    items = [[1, 0], [4, -3], [-1, 0], [0, 0]] if measure in ("dot", "cosine") else [[5, 0], [6, 1], [-1, 0], [0, 0]]
    found = Index(np.asarray(items), measure).similarity([[3, 4]])
    np.testing.assert_allclose(found, [expected], atol=1e-5)


def test_pearson_is_the_correlation() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(3, 7)), rng.normal(size=(5, 7))
    np.testing.assert_allclose(Index(other, "pearson").similarity(one), np.corrcoef(one, other)[:3, 3:], atol=1e-5)


@given(st.integers(0, 10**6), st.sampled_from(MEASURES), st.integers(1, 9))
def test_the_nearest_are_the_first_of_a_stable_sort(seed: int, measure: Any, n: int) -> None:
    rng = np.random.default_rng(seed)
    items = rng.integers(-1, 2, size=(8, 2))  # many ties
    index = Index(items, measure)
    queries = rng.integers(-1, 2, size=(2, 2))
    out = [rng.choice(8, size=2, replace=False).tolist(), []]
    for scores, rows, found in zip(index.similarity(queries), out, index.nearest(queries, n, exclude=out), strict=True):
        order = [row for row in np.argsort(-scores, kind="stable").tolist() if row not in rows][:n]
        assert found.rows.tolist() == order
        np.testing.assert_array_equal(found.scores, scores[order])
        least = float(np.median(scores))
        above = index.nearest(queries[:1], 8, threshold=least)[0]
        assert (above.scores >= least).all()


def test_queries_in_groups_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    index, queries = Index(rng.normal(size=(6, 3))), rng.normal(size=(5, 3))
    whole = [one.rows.tolist() for one in index.nearest(queries, 3)]
    monkeypatch.setattr("peftrec.similarity._CELLS", 13)
    assert [one.rows.tolist() for one in index.nearest(queries, 3)] == whole


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Index([[1.0]], "cosin"), "similarity: 'cosin'; expected one of cosine, dot"),  # type: ignore[arg-type]
        (lambda: Index([1.0]), "expected a matrix"),
        (lambda: Index([[np.nan], [1]]), "vectors: 1 of 2 hold values that are not finite"),
        (lambda: Index([[1.0]]).similarity([[1.0, 2.0]]), "queries: of shape .1, 2.; the items have 1 dimensions"),
        (lambda: Index([[1.0]]).nearest([[1.0]], 0), "n: 0; expected a whole number from 1"),
    ],
)
def test_what_cannot_be_compared(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    nan = float("nan")
    assert weights([1, 0, 1], None, 4).tolist() == [1, 0, 1]
    assert weights([1, 0, 1, 1], [4, 3.5, 4.5, nan], 4).tolist() == [1, 0, 1.5, 1]
    assert weights([1, 1, 0, 1], None, 4, half_life=1).tolist() == [0.125, 0.25, 0, 1]
    assert weights([1, 1], [5, 5], None).tolist() == [1, 1]
    with pytest.raises(DataError, match="half_life: -1; expected a number of events above 0"):
        weights([1], None, 4, half_life=-1)


def test_mean_vectors_by_hand() -> None:
    two = np.asarray([[1, 0], [0, 2]], dtype=np.float32)
    assert mean_vector(two, np.asarray([3.0, 1.0])).tolist() == [0.75, 0.5]
    assert mean_vector(two, np.zeros(2)).tolist() == [0, 0]


def test_profile_texts_by_hand() -> None:
    items = pl.DataFrame(
        {"item_id": [0, 1, 2], "genres": ["War|Drama", "Drama, Comedy", None], "tags": [["a"], ["b"], []]}
    )
    write = ProfileText("{job}, likes {genres} [{tags}]: {liked}", items, most_items=2, most_values=1)
    assert write.of_users == ["job"]
    events = [Liked("Old", 0, 1.0), Liked("Best", 1, 2.0), Liked("New", 2, 1.0), Liked("Elsewhere", None, 0.5)]
    assert write(events, {"job": "cook"}) == "cook, likes Drama [b]: Best; New"
    assert write([], {"job": "cook"}) == "cook, likes []:"
    assert write([], {"age": 3}) == ""
    twice = [Liked("Old", 0, 1.0), Liked("New", 2, 1.5), Liked("Old", 0, 1.0)]
    assert ProfileText("{liked}", None)(twice) == "Old; New"
    for template in ("nothing", "{liked!r}", "{"):
        with pytest.raises(ConfigError, match="profile: "):
            ProfileText(template, items)


# --- without training -------------------------------------------------------------------------------------------------

VECTORS = np.asarray([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, 0]], dtype=np.float32)


def titles(found: list[Any]) -> list[str]:
    return [one.title for one in found]


def test_ranks_by_hand() -> None:
    r = Recommender.from_features(None, FILMS, item="{title} {year}", vectors=VECTORS, centre=False)
    assert titles(r.rank(["Heat:yes"], k=2)) == ["Toy Story 1995", "Sabrina 1995"]
    assert titles(r.rank(["Heat:yes"], k=1, exclude_seen=False)) == ["Heat 1995"]
    assert titles(r.rank(["Heat:yes", "Sabrina (1954):no"], k=9, threshold=0.0)) == ["Toy Story 1995", "Sabrina 1995"]
    assert titles(r.rank(["Heat:yes"], ["187", 12, 11], k=2)) == ["Toy Story 1995", "Sabrina 1954"]
    assert titles(r.rank([(10, 4), (12, 5)], k=1)) == ["Sabrina 1995"]  # a 5 counts twice a 4
    later = Recommender.from_features(None, FILMS, vectors=VECTORS, centre=False, half_life=0.5)
    assert titles(later.rank([(12, 5), (10, 4)], k=1)) == ["Toy Story"]
    np.testing.assert_allclose(r.score([(10, "yes")], [10, 12, 14]), [1, 0, -1], atol=1e-6)
    (best,) = r.rank(["Heat:yes"], k=1)
    assert (best.item["title"], best.item_id, best.probability) == ("Toy Story", 11, None)
    assert [(event.item.item_id, event.label) for event in r.events(["Heat:yes", (11, 2), (12, 4)])] == [
        (10, 1),
        (11, 0),
        (12, 1),
    ]


def test_centring_takes_what_all_share() -> None:
    shifted = VECTORS + np.asarray([5, 5], dtype=np.float32)
    one, other = (Recommender.from_features(None, FILMS, vectors=v, similarity="euclidean") for v in (VECTORS, shifted))
    np.testing.assert_allclose(one.score([(10, 1)], [11, 12, 14]), other.score([(10, 1)], [11, 12, 14]), atol=1e-3)
    plain = Recommender.from_features(None, FILMS, vectors=shifted, centre=False)
    assert plain.score([(10, 1)], [14])[0] > 0 > one.score([(10, 1)], [14])[0]


def test_new_people_and_new_items_need_no_more_than_text(tiny_bert_folder: Path) -> None:
    embedder = Embedder.from_pretrained(tiny_bert_folder)
    r = Recommender.from_features(embedder, FILMS, item="{title} {year}")
    table = FILMS["title"] + " " + FILMS["year"].cast(pl.String)
    raw = embedder.embed([*table, "Brand New", "heat and noise"])
    placed = raw - raw[:5].mean(axis=0)
    placed /= np.linalg.norm(placed, axis=1, keepdims=True)
    np.testing.assert_allclose(
        r.score([], ["Brand New", 10], user="heat and noise"), placed[[5, 0]] @ placed[6], atol=1e-5
    )
    both = (placed[0] + placed[6]) / np.linalg.norm(placed[0] + placed[6])
    np.testing.assert_allclose(r.score([(10, "yes")], [12], user="heat and noise"), [both @ placed[2]], atol=1e-5)
    assert titles(r.rank([], ["Brand New"], user="heat and noise")) == ["Brand New"]
    own = {"item_id": 10, "title": "Another Heat", "year": 2001}
    assert abs(r.score([(11, 1)], [own])[0] - r.score([(11, 1)], [10])[0]) > 1e-4
    text = Recommender.from_features(embedder, FILMS, item="{title} {year}", profile="text", user="{job}: {liked}")
    assert text.profile_text([(10, 4), (11, 5), (12, 1)], {"job": "cook"}) == "cook: Toy Story 1995; Heat 1995"
    person = embedder.embed(["cook: Heat 1995"])[0] - raw[:5].mean(axis=0)
    np.testing.assert_allclose(
        text.score([(10, 1)], [12], user={"job": "cook"}), [person @ placed[2] / np.linalg.norm(person)], atol=1e-5
    )


def test_vectors_may_come_from_a_file(tmp_path: Path, tiny_bert_folder: Path) -> None:
    file = tmp_path / "v.parquet"
    order = [3, 0, 4, 1, 2]
    vector_files.write(file, VectorTable(FILMS["item_id"][order], VECTORS[order]))
    FILMS.write_csv(tmp_path / "films.csv")
    r = Recommender.from_features(None, tmp_path / "films.csv", vectors=file, centre=False)
    assert titles(r.rank(["Heat:yes"], k=1)) == ["Toy Story"]
    with pytest.raises(DataError, match="'Brand New': not in the items table, and there is no model to read it"):
        r.score(["Heat:yes"], ["Brand New"])
    with pytest.raises(DataError, match=r"vectors: of 2 dimensions; .* makes 32"):
        Recommender.from_features(tiny_bert_folder, FILMS, vectors=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": None}, "neither a model nor vectors"),
        ({"vectors": VECTORS[:3]}, "vectors: 3 for 5 items"),
        ({"vectors": VECTORS, "profile": "text"}, "profile: 'text' needs a model"),
        ({"vectors": VECTORS, "profile": "best"}, "profile: 'best'; expected one of mean, text"),
        ({"vectors": VECTORS, "half_life": 0}, "half_life: 0; expected"),
        ({"vectors": VECTORS, "similarity": "l1"}, "similarity: 'l1'; expected one of"),
    ],
)
def test_features_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Recommender.from_features(None, FILMS, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.rank([]), "history: 0 events, none of them liked, and nothing is said of the person"),
        (lambda r: r.score([(10, 1)], [10]), "1 events, none of them liked"),
        (lambda r: r.rank(["Heat:yes"], k=0), "k: 0; expected a whole number from 1"),
        (lambda r: r.rank(["Heat:yes"], "Heat"), "candidates: 'Heat'; expected a list"),
        (lambda r: r.score(["Heat:yes"], [99]), r"candidates\[0\]: no item id 99"),
        (lambda r: r.score(["Heat"], [10]), "has no answer behind a colon"),
    ],
)
def test_questions_that_cannot_be_answered(call: Callable[[FeatureRecommender], Any], message: str) -> None:
    recommender = Recommender.from_features(None, FILMS, vectors=VECTORS, like_at=4)
    if "1 events" in message:
        call = lambda r: r.score([(10, 3)], [10])  # noqa: E731
    with pytest.raises(DataError, match=message):
        call(recommender)


# --- the shortlist ----------------------------------------------------------------------------------------------------


def linear(seed: int, n: int = 300, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, and scores that are linear in them."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, size)).astype(np.float32)
    return vectors, vectors @ rng.normal(size=size)


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_what_is_chosen_has_its_own_scores(rounds: int) -> None:
    vectors, scores = linear(1)
    calls: list[int] = []

    def score(rows: np.ndarray) -> np.ndarray:
        calls.extend(rows.tolist())
        return scores[rows]

    rows, found = choose(score, vectors, None, Shortlist(60, rounds))
    assert len(calls) == len(set(calls)) == 60
    assert sorted(calls) == sorted(rows.tolist())
    np.testing.assert_array_equal(found, scores[rows])
    best = set(np.argsort(-scores)[:10].tolist())
    there = len(best & set(rows.tolist()))
    assert there == 10 if rounds else there < 6  # a line is learned at once; of drawn ones a fifth is expected
    everything, _ = choose(lambda rows: scores[rows], vectors, None, Shortlist(1000, rounds))
    assert sorted(everything.tolist()) == list(range(300))


def test_the_prior_comes_first() -> None:
    vectors, scores = linear(2)
    prior = -np.arange(300.0) * 100
    rows, _ = choose(lambda rows: scores[rows] + prior[rows], vectors, prior, Shortlist(20))
    assert sorted(rows.tolist()) == list(range(20))


@pytest.fixture(scope="module")
def adapter(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_shortlist_ranks_by_exact_scores(adapter: Path, tiny_llama_folder: Path, prior: bool, layer: int) -> None:
    films = pl.DataFrame({"item_id": range(40), "title": [f"Film {n}" for n in range(40)], "year": [1990] * 40})
    r = Recommender.from_pretrained(adapter, base_model=tiny_llama_folder, items=films, prior=prior)
    history = [("Film 3 (1990)", 1), ("Film 5 (1990)", 0)]
    best = r.rank(history, k=5, shortlist=Shortlist(12, rounds=2, layer=layer))
    assert len(best) == 5
    assert not {3, 5} & {one.item_id for one in best}
    np.testing.assert_allclose([one.score for one in best], r.score(history, [one.item_id for one in best]), atol=1e-4)
    assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)
    assert titles(r.rank(history, k=5, shortlist=38)) == titles(r.rank(history, k=5))  # all that are left
    new = [f"Other {n}" for n in range(6)]
    assert len(r.rank(history, new, k=2, shortlist=3)) == 2  # not in the table


@pytest.mark.parametrize(
    ("shortlist", "message"),
    [
        (3, "shortlist: 3 candidates for the 5 best; expected at least as many"),
        (0, "shortlist: n 0; expected a whole number from 1"),
        (Shortlist(10, rounds=-1), "shortlist: rounds -1; expected a whole number from 0"),
    ],
)
def test_shortlists_that_cannot_be(adapter: Path, tiny_llama_folder: Path, shortlist: Any, message: str) -> None:
    films = pl.DataFrame({"item_id": range(40), "title": [f"Film {n}" for n in range(40)], "year": [1990] * 40})
    r = Recommender.from_pretrained(adapter, base_model=tiny_llama_folder, items=films)
    with pytest.raises(DataError, match=message):
        r.rank([], k=5, shortlist=shortlist)
    with pytest.raises(ModelError, match=r"layer: 7; .* has 2 layers"):
        r.rank([], k=5, shortlist=Shortlist(10, layer=7))


def test_the_command_takes_a_shortlist(
    adapter: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FILMS.write_csv(tmp_path / "films.csv")
    words = ["recommend", str(adapter), "--base-model", str(tiny_llama_folder), "--items", str(tmp_path / "films.csv")]
    assert cli.main([*words, "--history", "Heat (1995):yes", "--k", "2", "--shortlist", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4  # the history, a heading and two films
    assert cli.main([*words, "--k", "2", "--shortlist", "1"]) == 2
    assert "shortlist: 1 candidates for the 2 best" in capsys.readouterr().err


# --- the graph --------------------------------------------------------------------------------------------------------


def test_items_are_near_that_share_neighbours() -> None:
    triples = pl.DataFrame(
        [
            ("a", "actor", "x"),
            ("b", "actor", "x"),
            ("c", "actor", "y"),
            ("y", "acts in", "c"),
            ("y", "acts in", "d"),
            ("c", "only", "z"),
            ("a", "genre", "g"),
            ("b", "genre", "g"),
        ],
        schema=["head", "relation", "tail"],
        orient="row",
    )
    links = pl.DataFrame({"item_id": [4, 3, 2, 1], "entity": ["d", "c", "b", "a"]})
    found = graph.item_vectors(pl.Series([1, 2, 3, 4, 5]), triples, links, size=2)
    pairs = np.kron(np.eye(2), np.ones((2, 2)))  # a with b and c with d; the fifth is not in the graph
    np.testing.assert_allclose(found @ found.T, np.pad(pairs, (0, 1)), atol=1e-5)
    with pytest.raises(DataError, match="no two items share a neighbour"):
        graph.item_vectors(pl.Series([8, 9]), triples, links)
    with pytest.raises(DataError, match="links: no column 'entity'"):
        graph.item_vectors(pl.Series([1]), triples, links.select("item_id"))


def test_fused_vectors() -> None:
    rng = np.random.default_rng(3)
    one = normalized(rng.normal(size=(40, 3)))
    one = normalized(one - one.mean(axis=0))
    turned = one @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    centred = normalized(one - one.mean(axis=0))
    # Two views of the same space, one of them turned: both ways give back its similarities.
    for how in graph.FUSIONS:
        fused = graph.fuse(one, turned, how)
        np.testing.assert_allclose(fused @ fused.T, centred @ centred.T, atol=1e-4)
    assert graph.fuse(one, rng.normal(size=(40, 2)), "average").shape == (40, 2)
    nothing = np.zeros((40, 2))
    half = graph.fuse(one, nothing)
    np.testing.assert_allclose(half, np.pad(centred, ((0, 0), (0, 2))), atol=1e-6)
    with pytest.raises(DataError, match="of 40 and 39 items"):
        graph.fuse(one, one[:39])
    with pytest.raises(DataError, match="fusion: 'sum'; expected one of concat, average"):
        graph.fuse(one, one, "sum")  # type: ignore[arg-type]


def test_intervals_of_means() -> None:
    same = bootstrap.of_means({"a": [0.5] * 9, "b": [0.2] * 9})
    assert same.intervals["a"]["mean"] == bootstrap.Interval(0.5, 0.5, 0.5)
    difference = same.differences["b"]["mean"]
    np.testing.assert_allclose([difference.point, difference.low, difference.high], 0.3)
    values = np.random.default_rng(5).normal(size=400)
    told = bootstrap.of_means({"a": values, "b": values + 1}, n=2000)
    wide = told.intervals["a"]["mean"]
    assert wide.point == values.mean()
    np.testing.assert_allclose(wide.high - wide.low, 2 * 1.96 * values.std() / 20, rtol=0.1)
    paired = told.differences["b"]["mean"]  # the same people are drawn for both
    np.testing.assert_allclose([paired.low, paired.high], -1)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_does_what_it_says(
    tiny_bert_folder: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fetched = HOME / "assets"
    fetched.mkdir(parents=True, exist_ok=True)
    (assets.cache_folder() / "assets").symlink_to(fetched)
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(YOUR_DATA, "python")[0], "page", "exec"), {})
    save_run(tiny_llama_folder, Path("runs/my-data"), item="{title}")
    page = ROOT / "docs" / "features.md"
    names: dict[str, Any] = {}
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        code = text.replace("all-minilm-l6-v2", str(tiny_bert_folder))
        if language == "python":
            exec(compile(code, "page", "exec"), names)
            assert capsys.readouterr().out
            continue
        for line in code.replace("\\\n", " ").splitlines():
            command, *words = shlex.split(line)
            if command == "accelerate":  # here by one process, without the launcher
                words = ["embed", *words[words.index("recipes/embed.py") + 1 :]]
            assert cli.main(words) == 0, capsys.readouterr().err
    assert vector_files.read("people.safetensors").vectors.shape == (120, 32)
