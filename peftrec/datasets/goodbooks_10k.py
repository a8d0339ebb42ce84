"""Goodbooks-10k: six million ratings from 1 to 5 of the ten thousand most rated books, in order of time."""

from __future__ import annotations

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables


def read(found: Found) -> Tables:
    """`ratings.csv`, whose rows stand in order of time without saying it, and `books.csv`."""
    import polars as pl

    (ratings,), (books,) = found["ratings.csv"], found["books.csv"]
    events = files.read_table(ratings, ("user_id", "book_id", "rating")).rename({"book_id": "item_id"})
    columns = ("book_id", "title", "authors", "original_publication_year", "language_code")
    items = files.read_table(books, columns, quoted=True).select(
        "title",
        "authors",
        item_id="book_id",
        year=pl.col("original_publication_year").cast(pl.Float64, strict=False).cast(pl.Int64),
        language="language_code",
    )
    order = pl.int_range(pl.len(), dtype=pl.Int64).alias("timestamp")  # the place of a row is all that is told
    return Tables(events.with_columns(order), items)


GOODBOOKS_10K = Dataset(
    name="goodbooks-10k",
    description="Goodbooks-10k: six million ratings (1 to 5) of 10,000 books by 53,424 people, in order of time",
    read=read,
    files=("ratings.csv", "books.csv"),
    like_at=4,
    rating_range=(1, 5),
    homepage="https://github.com/zygmuntz/goodbooks-10k",
    license="CC BY-SA 4.0",
    citation="Zygmunt Zajac. 2017. Goodbooks-10k: a new dataset for book recommendations. FastML.",
    language="en",
)
