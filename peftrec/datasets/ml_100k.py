"""MovieLens 100K: 100,000 ratings from 1 to 5 by 943 people of 1,682 films, September 1997 to April 1998.

Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015, https://doi.org/10.1145/2827872
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftrec import assets
from peftrec.datasets.dataset import Dataset, Graph, Tables

if TYPE_CHECKING:
    import polars as pl

# Articles that the catalogue moved behind a comma, "Postino, Il". The list is closed: every title of the 1,682 that
# has one of these words there was looked at, so that "Paris, Texas" and "Kiss Me, Guido" stay as they are.
ARTICLES = "The|A|An|Il|La|Le|Les|Das|Der|Die|Det|O"


def natural_title(title: pl.Expr) -> pl.Expr:
    """Put articles back in front: `Godfather, The` -> `The Godfather`, also within brackets and for `Enfer, L'`."""
    return (
        title.str.replace(r"^([^(]+), L'($| \()", "L'$1$2")
        .str.replace(rf"^([^(]+), ({ARTICLES})($| \()", "$2 $1$3")
        .str.replace(r"\(([^()]+), L'\)", "(L'$1)")
        .str.replace(rf"\(([^()]+), ({ARTICLES})\)", "($2 $1)")
    )


def load() -> Tables:
    """The tables, fetched when they are not in the cache.

    Returns:
        interactions (user_id, item_id, rating, timestamp) and items (item_id, title, year, genres). `genres` are joined
        with `, `; one film is called unknown and has no year.
    """
    import polars as pl  # here, so that listing the data sets is quick

    ratings = assets.wheel_file(assets.ML_100K)
    in_title = r" \((\d{4})\)$"
    films = _read(ratings.with_suffix(".item"))
    items = films.select(
        "item_id",
        title=natural_title(pl.col("movie_title").str.replace("^unkonwn$", "unknown").str.replace(in_title, "")),
        year=pl.coalesce(  # one film has its year within its title
            pl.col("release_year").cast(pl.Int64, strict=False),
            pl.col("movie_title").str.extract(in_title).cast(pl.Int64),
        ),
        genres=pl.col("class").str.replace_all(" ", ", "),
    )
    return Tables(
        interactions=_read(ratings),
        items=items,
    )


def load_users() -> pl.DataFrame:
    """What is told of the people, fetched when it is not in the cache: user_id, age, gender (man, woman), occupation.

    The zip code is left out: with age and occupation it can single out a person, and nothing here needs it.
    """
    import polars as pl

    people = _read(assets.wheel_file(assets.ML_100K_USERS)).drop("zip_code")
    return people.with_columns(pl.col("gender").replace_strict({"M": "man", "F": "woman"}))


def load_graph() -> Graph:
    """The films in Freebase, fetched when they are not in the cache: 91,631 triples, and the entities of 1,598 films.

    Zhao et al., KB4Rec: A Data Set for Linking Knowledge Bases with Recommender Systems, Data Intelligence 1(2), 2019
    """
    triples = assets.wheel_file(assets.ML_100K_GRAPH)
    return Graph(
        triples=_read(triples).select(head="head_id", relation="relation_id", tail="tail_id"),
        links=_read(triples.with_suffix(".link")).select("item_id", entity="entity_id"),
    )


def _read(path: Path) -> pl.DataFrame:
    import polars as pl

    frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema_length=None)
    return frame.rename({name: name.split(":")[0] for name in frame.columns})  # the header reads name:type


ML_100K = Dataset(
    name="ml-100k",
    description="MovieLens 100K: 100,000 ratings (1 to 5) by 943 people of 1,682 films, 1997-1998",
    read=lambda found: load(),
    read_users=lambda found: load_users(),
    load_graph=load_graph,
    like_at=4,
    rating_range=(1, 5),
    homepage="https://grouplens.org/datasets/movielens/100k/",
    license="research use only, no endorsement by the University of Minnesota or GroupLens implied; "
    "commercial use needs their permission",
    citation="F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872",
    language="en",
)
