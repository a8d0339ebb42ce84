"""The data sets that peftrec knows by name, one small file each: a dict is all the registry there is."""

from __future__ import annotations

from peftrec.datasets.dataset import Dataset, Graph, Tables
from peftrec.datasets.ml_100k import ML_100K

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in (ML_100K,)}

__all__ = ["DATASETS", "Dataset", "Graph", "Tables"]
