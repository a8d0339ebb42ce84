"""The named data sets as they really are: fetched once into the real cache."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from peftrec import config, interactions
from peftrec.datasets import DATASETS
from peftrec.datasets.ml_100k import natural_title
from peftrec.split import TEST, TRAIN, VALID, split


@pytest.fixture(scope="module")
def ml_100k() -> interactions.Interactions:
    return interactions.load(config.Data(name="ml-100k"), 13)


@pytest.mark.parametrize(
    ("catalogue", "natural"),
    [
        ("Godfather, The", "The Godfather"),
        ("Beautiful Thing, A", "A Beautiful Thing"),
        ("Enfer, L'", "L'Enfer"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard sur le toit)"),
        ("Star Maker, The (Uomo delle stelle, L')", "The Star Maker (L'Uomo delle stelle)"),
        ("Double vie de Véronique, La (Double Life of Veronique, The)",
         "La Double vie de Véronique (The Double Life of Veronique)"),
        ("Hate (Haine, La)", "Hate (La Haine)"),
        ("Old Lady Who Walked in the Sea, The (Vieille qui marchait dans la mer, La)",
         "The Old Lady Who Walked in the Sea (La Vieille qui marchait dans la mer)"),
        ("I, Worst of All (Yo, la peor de todas)", "I, Worst of All (Yo, la peor de todas)"),
        ("Paris, Texas", "Paris, Texas"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("To Wong Foo, Thanks for Everything! Julie Newmar", "To Wong Foo, Thanks for Everything! Julie Newmar"),
    ],
)  # fmt: skip
def test_articles_go_back_in_front(catalogue: str, natural: str) -> None:
    assert pl.select(natural_title(pl.lit(catalogue))).item() == natural


def test_ml_100k_is_whole(ml_100k: interactions.Interactions) -> None:
    assert ml_100k.events.height == 100_000
    assert len(ml_100k.user_ids) == 943
    assert ml_100k.items.height == 1682
    assert ml_100k.warnings == ()
    assert np.bincount(ml_100k.events["rating"].cast(pl.Int64).to_numpy()).tolist() == [
        0,
        6110,
        11370,
        27145,
        34174,
        21201,
    ]
    assert ml_100k.events["label"].sum() == 34174 + 21201
    assert ml_100k.sha256 == "a7dd644af936da58e70533c14f0b8f8d8d9628641fe824351ae24851bd056ae1"


def test_ml_100k_films_read_well(ml_100k: interactions.Interactions) -> None:
    films = ml_100k.items
    assert films.columns == ["item_id", "title", "year", "genres"]
    assert films.row(0) == (1, "Toy Story", 1995, "Animation, Children's, Comedy")
    assert films.filter(pl.col("year").is_null())["title"].to_list() == ["unknown"]
    assert films.filter(item_id=1412)["title"].item() == "Land Before Time III: The Time of the Great Giving"
    assert not films["title"].str.contains(r", (The|A|An)( \(|$)").any()
    assert not films["title"].str.contains(r"^\s|\s$").any()


def test_ml_100k_temporal_split(ml_100k: interactions.Interactions) -> None:
    log = split(ml_100k, config.Split(), 13)
    assert np.bincount(log.split).tolist() == [79_999, 10_001, 10_000]
    assert log.timestamp[log.split == TRAIN].max() < log.timestamp[log.split == VALID].min()
    assert log.timestamp[log.split == VALID].max() < log.timestamp[log.split == TEST].min()


def test_ml_100k_leave_last_out(ml_100k: interactions.Interactions) -> None:
    log = split(ml_100k, config.Split(kind="leave_last_out"), 13)
    assert len(np.unique(log.user[log.split == TEST])) == 943


def test_listing_the_data_sets_reads_none_of_them() -> None:
    code = (
        "import sys; from peftrec.datasets import DATASETS\n"
        "for name, dataset in DATASETS.items(): print(name, dataset.description)\n"
        "assert 'polars' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ml-100k MovieLens 100K")
    assert list(DATASETS) == [dataset.name for dataset in DATASETS.values()]
