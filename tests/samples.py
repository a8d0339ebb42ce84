"""Small tables and records that several tests share; tests never change them."""

from __future__ import annotations

import polars as pl

from peftrec.artifact import Artifact, Base, Probe, PromptFormat, Source
from peftrec.baselines import Prior

FILMS = pl.DataFrame(
    {
        "item_id": [10, 11, 12, 13, 14],
        "title": ["Heat", "Toy Story", "Sabrina", "Sabrina", "187"],
        "year": [1995, 1995, 1954, 1995, 1997],
    }
)
PRIOR = Prior(0.4, {"10": 0.9, "11": -0.7, "12": 0.1}, 3.0)
PROMPT = PromptFormat(
    layout="timeline",
    header="Rated:\n",
    item="{title}",
    answers=[" no", " yes"],
    answer_ids=[5, 6],
    max_tokens=64,
    max_item_tokens=8,
)
ABOUT = Artifact(
    prompt=PROMPT,
    base_model=Base(name="tiny", hub_id="ns/tiny", fingerprint="f" * 64, parameters=10, dtype="float32"),
    data=Source(name="ml-100k", sha256="a" * 64),
    peftrec_version="0.1.0",
    like_at=4.0,
    probes=[Probe([("Heat", 1)], "Babe", 0.25)],
)
