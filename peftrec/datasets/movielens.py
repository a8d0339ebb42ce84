"""MovieLens as GroupLens publishes it: 1M and 10M with `::` between values, 20M, 25M, 32M and latest as CSV.

Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015, https://doi.org/10.1145/2827872
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables
from peftrec.datasets.ml_100k import ML_100K, natural_title

if TYPE_CHECKING:
    import polars as pl

RATINGS = ("user_id", "item_id", "rating", "timestamp")
# README of ml-1m, "USERS FILE DESCRIPTION": codes stand for these.
AGES = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+"}
OCCUPATIONS = (
    *("other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service"),
    *("doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer"),
    *("retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman"),
    *("unemployed", "writer"),
)


def read_csv(found: Found) -> Tables:
    """`ratings.csv` and `movies.csv`."""
    theirs = ("userId", "movieId", "rating", "timestamp")
    (ratings,), (movies,) = found["ratings.csv"], found["movies.csv"]
    events = files.read_table(ratings, theirs).rename(dict(zip(theirs, RATINGS, strict=True)))
    films = files.read_table(movies, ("movieId", "title", "genres"), quoted=True).rename({"movieId": "item_id"})
    return Tables(events, _films(films))


def read_dat(found: Found, encoding: str) -> Tables:
    """`ratings.dat` and `movies.dat`; 1M is in Latin-1, 10M in UTF-8."""
    (ratings,), (movies,) = found["ratings.dat"], found["movies.dat"]
    films = files.read_parts(movies, ("item_id", "title", "genres"), encoding=encoding)
    return Tables(files.read_parts(ratings, RATINGS), _films(films))


def read_users(found: Found) -> pl.DataFrame:
    """`users.dat` of 1M: age as a range, gender (man, woman) and occupation; the zip code is left out."""
    import polars as pl

    (users,) = found["users.dat"]
    people = files.read_parts(users, ("user_id", "gender", "age", "occupation", "zip_code")).drop("zip_code")
    jobs = {str(code): job for code, job in enumerate(OCCUPATIONS)}
    return people.with_columns(
        pl.col("gender").replace({"M": "man", "F": "woman"}),
        pl.col("age").replace(AGES),
        pl.col("occupation").replace(jobs),
    )


def _films(films: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    in_title = r"\s*\((\d{4})(?:[-–]\d{0,4})?\)\s*$"
    return films.select(
        "item_id",
        title=natural_title(pl.col("title").str.replace(in_title, "")),
        year=pl.col("title").str.extract(in_title).cast(pl.Int64),
        genres=pl.col("genres").replace({"(no genres listed)": ""}).str.replace_all("|", ", ", literal=True),
    )


def _movielens(name: str, size: str, page: str) -> Dataset:
    return Dataset(
        name=name,
        description=f"MovieLens {size}",
        read=read_csv,
        files=("ratings.csv", "movies.csv"),
        like_at=4,
        rating_range=(0.5, 5),
        homepage=f"https://grouplens.org/datasets/movielens/{page}/",
        license=ML_100K.license,
        citation=ML_100K.citation,
        language="en",
    )


ML_1M = Dataset(
    name="ml-1m",
    description="MovieLens 1M: a million ratings (1 to 5) by 6,040 people of 3,900 films",
    read=lambda found: read_dat(found, "latin1"),
    read_users=read_users,
    files=("ratings.dat", "movies.dat", "users.dat"),
    like_at=4,
    rating_range=(1, 5),
    homepage="https://grouplens.org/datasets/movielens/1m/",
    license=ML_100K.license,
    citation=ML_100K.citation,
    language="en",
)

ML_10M = Dataset(
    name="ml-10m",
    description="MovieLens 10M: ten million ratings (0.5 to 5) of 10,000 films",
    read=lambda found: read_dat(found, "utf8"),
    files=("ratings.dat", "movies.dat"),
    like_at=4,
    rating_range=(0.5, 5),
    homepage="https://grouplens.org/datasets/movielens/10m/",
    license=ML_100K.license,
    citation=ML_100K.citation,
    language="en",
)

ML_CSV = (
    _movielens("ml-20m", "20M: twenty million ratings (0.5 to 5)", "20m"),
    _movielens("ml-25m", "25M: twenty-five million ratings (0.5 to 5)", "25m"),
    _movielens("ml-32m", "32M: thirty-two million ratings (0.5 to 5)", "32m"),
    _movielens("ml-latest", "latest: ratings (0.5 to 5) up to its date, which says which release it is", "latest"),
    _movielens("ml-latest-small", "latest-small: a hundred thousand ratings (0.5 to 5), of several releases", "latest"),
)
