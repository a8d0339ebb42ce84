"""Steam: games that people bought, and for how many hours they played them; without times.

A game that was bought and not played counts as 0 hours, so a like is a game that was played for some hours, and what
is not liked was bought all the same.
"""

from __future__ import annotations

import ast
import gzip
from typing import TYPE_CHECKING

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables
from peftrec.errors import DataError

if TYPE_CHECKING:
    import polars as pl

SHELVES = "australian_users_items.json"


def read_200k(found: Found) -> Tables:
    """`steam-200k.csv`: purchases and plays, game by title; rows of one person and title are added up."""
    import polars as pl

    (path,) = found["steam-200k.csv"]
    columns = ("user_id", "title", "behavior", "value")
    rows = files.read_table(path, columns, header=False, quoted=True)
    told = pl.col("value").cast(pl.Float64, strict=False)
    if wrong := rows.filter(told.is_null()).height:
        raise DataError(f"{path}: {wrong} rows whose fourth value is no number; expected {', '.join(columns)}")
    hours = pl.when(pl.col("behavior") == "play").then(told).otherwise(0.0)
    events = rows.with_columns(rating=hours).group_by("user_id", item_id="title", maintain_order=True)
    return _tables(events.agg(pl.col("rating").sum(), title=pl.col("title").first()))


def read_australian(found: Found) -> Tables:
    """`australian_users_items.json`: each line is a person as a Python dict, with the games on the shelf."""
    import polars as pl

    (path,) = found[SHELVES]
    rows = []
    with (
        gzip.open(path, "rt", encoding="utf-8") if path.suffix == files.PACKED else path.open(encoding="utf-8") as file
    ):
        for number, line in enumerate(file, 1):
            try:
                person = ast.literal_eval(line)
                user, games = person["user_id"], person["items"]
                rows += [(user, one["item_id"], one["item_name"], one["playtime_forever"] / 60) for one in games]
            except (ValueError, SyntaxError, KeyError, TypeError) as error:
                expected = "a Python dict with user_id and items, as published"
                raise DataError(f"{path}: line {number} cannot be read ({error}); expected {expected}") from error
    schema = {"user_id": pl.String, "item_id": pl.String, "title": pl.String, "rating": pl.Float64}
    return _tables(pl.DataFrame(rows, schema=schema, orient="row"))


def _tables(events: pl.DataFrame) -> Tables:
    items = events.select("item_id", "title").unique("item_id", keep="first", maintain_order=True)
    return Tables(events.select("user_id", "item_id", "rating"), items)


STEAM_200K = Dataset(
    name="steam-200k",
    description="Steam video games: what people bought, and for how many hours they played it",
    read=read_200k,
    files=("steam-200k.csv",),
    like_at=2,
    rating_range=None,
    rating="hours played",
    timed=False,
    homepage="https://www.kaggle.com/datasets/tamber/steam-video-games",
    license="see its page; the data were collected from Steam's public profiles",
    citation="Tamber. 2017. Steam Video Games. Kaggle.",
    language="en",
)

STEAM_AUSTRALIA = Dataset(
    name="steam-australia",
    description="Steam, Australian users: the games of 88,310 people, and for how many hours they played them",
    read=read_australian,
    files=(SHELVES,),
    like_at=2,
    rating_range=None,
    rating="hours played",
    timed=False,
    homepage="https://cseweb.ucsd.edu/~jmcauley/datasets.html",
    license="for research; its page names none",
    citation="Apurva Pathak, Kshitiz Gupta and Julian McAuley. 2017. Generating and Personalizing Bundle "
    "Recommendations on Steam. SIGIR 2017.",
    language="en",
)
