"""The data sets that peftrec knows by name, one small file for each publisher: a dict is all the registry there is."""

from __future__ import annotations

from peftrec.datasets.amazon_2023 import AMAZON_2023
from peftrec.datasets.book_crossing import BOOK_CROSSING
from peftrec.datasets.dataset import Dataset, Graph, Tables
from peftrec.datasets.goodbooks_10k import GOODBOOKS_10K
from peftrec.datasets.lastfm import LASTFM_2K, LASTFM_360K
from peftrec.datasets.mind import MIND
from peftrec.datasets.ml_100k import ML_100K
from peftrec.datasets.movielens import ML_1M, ML_10M, ML_CSV
from peftrec.datasets.steam import STEAM_200K, STEAM_AUSTRALIA
from peftrec.datasets.yelp import YELP

_ALL = (
    *(ML_100K, ML_1M, ML_10M, *ML_CSV),
    *(AMAZON_2023, BOOK_CROSSING, GOODBOOKS_10K, LASTFM_2K, LASTFM_360K, MIND, STEAM_200K, STEAM_AUSTRALIA, YELP),
)
DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}

__all__ = ["DATASETS", "Dataset", "Graph", "Tables"]
