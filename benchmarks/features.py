"""What vectors of texts are worth: recall without training, gain inside a click model, shortlists before exact scores.

    python benchmarks/features.py recall|clicks|exact|curve|times [--adapter RUN] [--work FOLDER] [--write]

All of it on ml-100k; `times` also on made-up catalogues. `recall` compares recommenders without training, `clicks`
fits gradient boosting on counts with and without vectors, `exact` scores all films for a few people (20 seconds each;
it goes on where it was stopped), from which `curve` tells what shortlists find. `--write` puts the table into
docs/features.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pages import put
from scale import hardware

from peftrec import backbone, baselines, bootstrap, config, graph, interactions, split
from peftrec.datasets import DATASETS
from peftrec.embeddings import Embedder, Reading
from peftrec.features import FeatureRecommender
from peftrec.prompts import item_texts
from peftrec.recommender import Recommender
from peftrec.shortlist import Shortlist, choose
from peftrec.similarity import Index, Vectors, normalized
from peftrec.vector_files import VectorTable

PAGE = Path(__file__).parent.parent / "docs/features.md"
ITEM = "{title} ({year}), {genres}"
MINILM, SMOLLM = "all-minilm-l6-v2", "smollm2-135m-instruct"
LAYERS = (0, 12, 20, -1)
K, SEED = 10, 13
SIZES = (20, 50, 100, 200, 400, 800)
CATALOGUES = (1_682, 9_125, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"recall": recall, "clicks": clicks, "exact": exact, "curve": curve, "times": times}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--adapter", default="runs/ml-100k-click-lora-demo", help="for exact, curve and times")
    parser.add_argument("--work", type=Path, default=Path("runs/features"), help="for the exact scores")
    parser.add_argument("--users", type=int, default=24, help="of exact")
    parser.add_argument("--minutes", type=float, default=15, help="of exact, at most")
    parser.add_argument("--write", action="store_true", help="put the table into docs/features.md")
    given = parser.parse_args()
    backbone.quiet()
    warnings.simplefilter("ignore")
    given.work.mkdir(parents=True, exist_ok=True)
    found = parts[given.part](given)
    if found is not None:
        print(found)
        if given.write:
            put(given.part, found, PAGE)


# --- without training -------------------------------------------------------------------------------------------------


def recall(given: argparse.Namespace) -> str:
    log = read_log()
    last = np.concatenate([np.arange(n) >= int(0.8 * n) for n in np.bincount(log.user)])
    recommenders = without_training(log.items)
    splits = {"one moment for all": log.split == split.TEST, "each person's last fifth": last}
    columns = {}
    for name, held in splits.items():
        print(f"{name}: {held.sum():,} rows held out", flush=True)
        folder = given.work / name
        folder.mkdir(exist_ok=True)
        found, users, likes = recalls(log, held, recommenders, folder)
        rates = bootstrap.of_means(found).intervals
        columns[f"{name}: {users} people, {likes:,} likes"] = {one: rate["mean"] for one, rate in rates.items()}
    lines = [
        "| recommender | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in next(iter(columns.values())):
        cells = []
        for rates in columns.values():
            one, chance = rates[name], rates["random"].point
            cells.append(f"{one.point:.4f} [{one.low:.4f}, {one.high:.4f}], {one.point / chance:.1f}x")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"recall@{K}: share of a person's held-out likes among the {K} best of all films that the person had not rated "
        "before, then the mean over people who have a like before and after; [low, high]: 95% interval over 1,000 "
        f"resamples of the people; x: times random. Items read `{ITEM}`; people are means of what they liked, 5 stars "
        "counting twice 4, unless it says otherwise. One moment for all: the test rows of the temporal split (the last "
        "tenth); each person's last fifth: in order of time, where popularity knows other people's future.",
    ]
    return "\n".join(lines)


def without_training(items: pl.DataFrame) -> dict[str, FeatureRecommender]:
    """The recommenders that are compared, by what the table calls them."""
    mini = Embedder.from_pretrained(MINILM)
    smol = Embedder.from_pretrained(SMOLLM, dtype="bfloat16")
    texts = item_texts(items, ITEM)
    text = mini.embed(texts)
    load_graph = DATASETS["ml-100k"].load_graph
    assert load_graph is not None
    known = load_graph()
    films = graph.item_vectors(items["item_id"], known.triples, known.links)

    def of(vectors: Vectors, embedder: Embedder | None = None, **options: Any) -> FeatureRecommender:
        table = VectorTable(items["item_id"], vectors)
        return FeatureRecommender.load(embedder, items, vectors=table, item=ITEM, like_at=4, **options)

    return {
        "MiniLM": of(text),
        "MiniLM, not centred": of(text, centre=False),
        "MiniLM, half-life 20 events": of(text, half_life=20),
        "MiniLM, people as one text": of(text, mini, profile="text", user="{genres}: {liked}"),
        "MiniLM, Euclidean distance": of(text, similarity="euclidean"),
        "MiniLM, Pearson correlation": of(text, similarity="pearson"),
        **{
            f"SmolLM2, layer {30 if layer == -1 else layer} of 30": of(smol.reads(Reading(layer=layer)).embed(texts))
            for layer in LAYERS
        },
        "graph": of(films),
        "MiniLM and graph, concatenated": of(graph.fuse(text, films)),
        "MiniLM and graph, averaged": of(graph.fuse(text, films, "average")),
    }


def recalls(
    log: split.Log, held: np.ndarray, recommenders: dict[str, FeatureRecommender], folder: Path
) -> tuple[dict[str, list[float]], int, int]:
    """Recommender -> recall of each person; and the numbers of people and of their held-out likes.

    What was measured is kept in `folder`: a run that was stopped goes on.
    """
    ids = log.items["item_id"].to_list()
    seen = np.bincount(log.item[~held], minlength=len(ids))
    assert log.rating is not None
    asked = []  # of each person: what was met before, its rows, and what was liked later
    for rows in np.split(np.arange(len(log)), np.cumsum(np.bincount(log.user))[:-1]):
        before, after = rows[~held[rows]], rows[held[rows]]
        wanted = {ids[item] for item in log.item[after][log.label[after] == 1]}
        if wanted and (log.label[before] == 1).any():
            past = list(zip([ids[i] for i in log.item[before]], log.rating[before].tolist(), strict=True))
            asked.append((past, log.item[before], wanted))

    def popular(items: np.ndarray) -> set[Any]:
        count = seen.astype(float)
        count[items] = -1
        return {ids[i] for i in np.argsort(-count, kind="stable")[:K]}

    found = {
        "random": [K / (len(ids) - len(past)) for past, *_ in asked],
        "popularity": [len(wanted & popular(items)) / len(wanted) for _, items, wanted in asked],
    }
    for name, one in recommenders.items():
        kept = folder / f"recall {name}.npy"
        if not kept.exists():
            best = [{film.item_id for film in one.rank(past, k=K)} for past, *_ in asked]
            np.save(kept, [len(of & wanted) / len(wanted) for of, (*_, wanted) in zip(best, asked, strict=True)])
        found[name] = np.load(kept).tolist()
        print(f"{name}: {np.mean(found[name]):.4f}", flush=True)
    return found, len(asked), sum(len(wanted) for *_, wanted in asked)


# --- in a click model -------------------------------------------------------------------------------------------------


def clicks(given: argparse.Namespace) -> str:
    from sklearn.ensemble import HistGradientBoostingClassifier

    log = read_log()
    known = baselines.predict(log, "streaming").scores
    counts = np.column_stack([known[name] for name in ("global_mean", "item_mean", "bias", "popularity")])
    text = placed(Embedder.from_pretrained(MINILM).embed(item_texts(log.items, ITEM)))
    load_graph = DATASETS["ml-100k"].load_graph
    assert load_graph is not None
    triples = load_graph()
    films = placed(graph.item_vectors(log.items["item_id"], triples.triples, triples.links))
    near, near_graph = nearness(log, text), nearness(log, films)
    parts = np.linalg.svd(text, full_matrices=False)
    main_parts = (parts.U * parts.S)[:, :8][log.item]
    tables = {
        "counts": counts,
        "counts, text similarity": np.column_stack((counts, near)),
        "counts, text similarity, 8 components of the item's vector": np.column_stack((counts, near, main_parts)),
        "counts, graph similarity": np.column_stack((counts, near_graph)),
        "counts, text and graph similarity": np.column_stack((counts, near, near_graph)),
    }
    train, test = log.split == split.TRAIN, log.split == split.TEST
    scores = {"user+item bias": known["bias"][test], "text similarity alone": near[test, 0] - near[test, 1]}
    for name, table in tables.items():
        models = [
            HistGradientBoostingClassifier(
                max_iter=200,
                learning_rate=0.05,
                max_leaf_nodes=15,
                min_samples_leaf=100,
                early_stopping=True,
                random_state=seed,
            ).fit(table[train], log.label[train])
            for seed in range(3)
        ]
        scores[name] = np.mean([model.decision_function(table[test]) for model in models], axis=0)
        print(name, flush=True)
    order = ["counts", *(name for name in scores if name != "counts")]
    told = bootstrap.bootstrap(
        log.label[test], {name: scores[name] for name in order}, log.user[test], ranking_only=["text similarity alone"]
    )
    lines = [
        "| features | AUC | uauc | AUC less that of counts | uauc less that of counts |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in scores:
        cells = [interval(told.intervals[name][key]) for key in ("auc", "uauc")]
        less = told.differences.get(name)
        cells += ["-", "-"] if less is None else [flipped(less[key]) for key in ("auc", "uauc")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{test.sum():,} test rows of {len(np.unique(log.user[test]))} people, streaming history, trained on "
        f"{train.sum():,} rows; gradient boosting of scikit-learn (mean of 3 seeds). Counts are the baselines' scores: "
        "global mean, item mean, user+item bias, popularity. Similarity: of the item to the mean of what the person "
        "liked earlier, to that of what the person did not like, and how many there were of each.",
    ]
    return "\n".join(lines)


def nearness(log: split.Log, vectors: Vectors) -> np.ndarray:
    """Similarity of each row's item to its user's strictly earlier likes and dislikes, and their numbers, (n, 4)."""
    found = np.zeros((len(log), 4))
    for rows in np.split(np.arange(len(log)), np.cumsum(np.bincount(log.user))[:-1]):
        own, time_ = vectors[log.item[rows]], log.timestamp[rows]
        before = np.searchsorted(time_, time_, side="left")
        for column, label in enumerate((1, 0)):
            such = (log.label[rows] == label)[:, None]
            sums = np.concatenate((np.zeros((1, own.shape[1])), np.cumsum(own * such, axis=0)))
            number = np.append(0, np.cumsum(such))[before]
            found[rows, column] = np.einsum("nd,nd->n", normalized(sums[before]), own)
            found[rows, column + 2] = number
    return found


# --- the shortlist ----------------------------------------------------------------------------------------------------


def exact(given: argparse.Namespace) -> None:
    """The adapter's scores of all films for some people with likes in the test rows, and the prior's part of them."""
    file = given.work / "exact.npz"
    done = dict(np.load(file)) if file.exists() else {}
    log, begin = read_log(), time.monotonic()
    recommender = Recommender.from_pretrained(given.adapter)
    asked = recommender.adapters["default"]
    ids = log.items["item_id"].to_list()
    for user in asked_users(log, given.users):
        if f"s{user}" in done or time.monotonic() - begin > 60 * given.minutes:
            continue
        past = [(ids[log.item[row]], int(log.label[row])) for row in known_rows(log, user)]
        question = asked.question(past, ids)
        done[f"s{user}"], done[f"p{user}"] = asked.score([question])[0], asked.prior_scores(question)
        np.savez(file, **done)
        print(user, len(past), f"{time.monotonic() - begin:.0f} s", flush=True)


def curve(given: argparse.Namespace) -> str:
    log = read_log()
    kept = dict(np.load(given.work / "exact.npz"))
    users = [user for user in asked_users(log, given.users) if f"s{user}" in kept]
    about = Recommender.from_pretrained(given.adapter).artifact
    texts = item_texts(log.items, about.prompt.item)
    reader = Embedder.from_pretrained(SMOLLM, dtype="bfloat16")
    vectors = {layer: placed(reader.reads(Reading(layer=layer)).embed(texts)) for layer in (0, 12)}
    found: dict[tuple[str, str], list[list[float]]] = {}
    for user in users:
        rows = known_rows(log, user)
        left = np.setdiff1d(np.arange(log.items.height), log.item[rows])
        liked = log.item[rows][log.label[rows] == 1]
        for what, prior in (("with the prior", kept[f"p{user}"][left]), ("without prior", None)):
            scores = kept[f"s{user}"][left] - (0 if prior is not None else kept[f"p{user}"][left])
            best = set(np.argsort(-scores, kind="stable")[:K].tolist())
            ways: dict[str, Callable[[int], Sequence[int]]] = {
                f"learned in 4 rounds, layer {layer}": chosen(scores, of[left], prior, 4)
                for layer, of in vectors.items()
            }
            ways["prior alone" if prior is not None else "drawn"] = chosen(scores, vectors[0][left], prior, 0)
            if len(liked):
                ways["similarity to likes, layer 12"] = similar(vectors[12][left], vectors[12][liked])
            for name, way in ways.items():
                shares = [len(best & set(way(size))) / K for size in SIZES]
                found.setdefault((what, name), []).append(shares)
    means = {key: np.mean(shares, axis=0) for key, shares in found.items()}
    draw(means)
    lines = [
        "| scores | candidates chosen by | " + " | ".join(f"{size}" for size in SIZES) + " |",
        "|---|---|" + "---:|" * len(SIZES),
    ]
    for (what, name), mean in sorted(means.items(), key=lambda one: (one[0][0], -one[1].sum())):
        lines.append(f"| {what} | {name} | " + " | ".join(f"{one:.2f}" for one in mean) + " |")
    lines += [
        "",
        f"Share of the exact top {K} of 1,682 films (less those that the person had rated) that is found where so many "
        f"candidates are scored; mean over {len(users)} people of ml-100k; adapter: {Path(given.adapter).name}.",
    ]
    return "\n".join(lines)


def chosen(
    scores: np.ndarray, vectors: Vectors, prior: np.ndarray | None, rounds: int
) -> Callable[[int], Sequence[int]]:
    return lambda size: choose(lambda rows: scores[rows], vectors, prior, Shortlist(size, rounds))[0].tolist()


def similar(vectors: Vectors, liked: Vectors) -> Callable[[int], Sequence[int]]:
    return lambda size: Index(vectors).nearest(liked.mean(axis=0)[None], size)[0].rows.tolist()


def draw(means: dict[tuple[str, str], np.ndarray]) -> None:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, what in zip(panels, ("with the prior", "without prior"), strict=True):
        for (where, name), mean in means.items():
            if where == what:
                panel.plot(SIZES, mean, marker="o", label=name)
        panel.set(xscale="log", title=what, xlabel="candidates scored, of 1,682", ylim=(0, 1.02))
        panel.set_xticks(SIZES, [str(size) for size in SIZES])
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel(f"share of the exact top {K}")
    figure.savefig(PAGE.with_name("features-shortlist.png"), dpi=110)
    plt.close(figure)


def times(given: argparse.Namespace) -> str:
    log = read_log()
    user = asked_users(log, 1)[0]
    titles = [log.items["title"][int(log.item[row])] for row in known_rows(log, user)]
    past = list(zip(titles, log.label[known_rows(log, user)].tolist(), strict=True))
    lines = [
        f"| items | nearest {K} of 384 dimensions | shortlist of 200, first time | again | exact |",
        "|---:|---:|---:|---:|---:|",
    ]
    rate = 0.0
    for size in CATALOGUES:
        items = made_up(log.items, size)
        near = Index(np.random.default_rng(SEED).normal(size=(size, 384)))
        query = np.ones((1, 384))
        search = statistics.median(seconds(lambda near=near, query=query: near.nearest(query, K)) for _ in range(9))
        recommender = Recommender.from_pretrained(given.adapter, items=items)
        rank = lambda recommender=recommender, **options: recommender.rank(past, k=K, **options)  # noqa: E731
        first = seconds(lambda rank=rank: rank(shortlist=200))
        again = statistics.median(seconds(lambda rank=rank: rank(shortlist=200)) for _ in range(3))
        if size == CATALOGUES[0]:
            whole = seconds(rank)
            rate = whole / size
            told = f"{whole:.0f} s"
        else:
            told = f"about {rate * size / 60:.0f} min"
        lines.append(f"| {size:,} | {1000 * search:.1f} ms | {first:.1f} s | {again:.1f} s | {told} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        f"One person with {len(past)} events; adapter: {Path(given.adapter).name} with its prior. 1,682: the films of "
        "ml-100k; the larger tables have titles made up of the words of theirs. First time: with the vectors of all "
        "titles (layer 0). Exact: measured for the first table, else by its rate. "
        f"{torch.get_num_threads()} threads, {hardware()}, beside other work.",
    ]
    return "\n".join(lines)


def made_up(items: pl.DataFrame, size: int) -> pl.DataFrame:
    """A catalogue of that size: the films, and titles of which each half is another film's."""
    words = [title.split() for title in items["title"].to_list()]
    rng = np.random.default_rng(SEED)
    titles = dict.fromkeys(items["title"].to_list())
    while len(titles) < size:
        one, other = (words[i] for i in rng.integers(len(words), size=2).tolist())
        titles[" ".join([*one[: (len(one) + 1) // 2], *other[len(other) // 2 :]])] = None
    chosen_ = list(titles)[:size]
    years = rng.choice(items["year"].drop_nulls().to_numpy(), size=len(chosen_))
    return pl.DataFrame({"item_id": np.arange(1, len(chosen_) + 1), "title": chosen_, "year": years})


# --- what the parts share ---------------------------------------------------------------------------------------------


def read_log() -> split.Log:
    recipe = config.parse_recipe({"task": "click", "data": {"name": "ml-100k"}, "output_dir": "unused"}, "features")
    return split.split(interactions.load(recipe.data, recipe.seed), recipe.data.split, recipe.seed)


def asked_users(log: split.Log, most: int) -> list[int]:
    """People with five events before the test rows and a like among them, in a drawn order."""
    held = log.split == split.TEST
    before = np.bincount(log.user[~held], minlength=len(log.user_ids))
    likes = np.bincount(log.user[held & (log.label == 1)], minlength=len(log.user_ids))
    users = np.flatnonzero((before >= 5) & (likes > 0))
    drawn: list[int] = np.random.default_rng(SEED).permutation(users)[:most].tolist()
    return drawn


def known_rows(log: split.Log, user: int) -> list[int]:
    rows: list[int] = np.flatnonzero((log.user == user) & (log.split != split.TEST)).tolist()
    return rows


def placed(vectors: Vectors) -> Vectors:
    return normalized(vectors - vectors.mean(axis=0))


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interval(one: bootstrap.Interval) -> str:
    return f"{one.point:.3f} [{one.low:.3f}, {one.high:.3f}]"


def flipped(one: bootstrap.Interval) -> str:
    """The difference the other way round."""
    return f"{-one.point:+.3f} [{-one.high:+.3f}, {-one.low:+.3f}]"


if __name__ == "__main__":
    main()
