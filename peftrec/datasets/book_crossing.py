"""Book-Crossing: a million ratings from 1 to 10, and readings without a rating, of 270,000 books, 2004, without times.

Ziegler, McNee, Konstan and Lausen, Improving Recommendation Lists Through Topic Diversification, WWW 2005,
https://doi.org/10.1145/1060745.1060754
"""

from __future__ import annotations

from html import unescape
from typing import TYPE_CHECKING

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables

if TYPE_CHECKING:
    import polars as pl

NAME = "book-crossing"


def read(found: Found) -> Tables:
    """`BX-Book-Ratings.csv` without the rows whose rating is 0, which say that a book was read, and `BX-Books.csv`."""
    import polars as pl

    (ratings,), (books,) = found["BX-Book-Ratings.csv"], found["BX-Books.csv"]
    isbn = pl.col("ISBN").str.strip_chars().str.to_uppercase().alias("item_id")  # some end in a small x
    events = files.read_escaped(ratings, ("User-ID", "ISBN", "Book-Rating"))
    events, warnings = files.counted(events, pl.col("Book-Rating") != "0", NAME, "rows without a rating (0)")
    shown = files.read_escaped(books, ("ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher"))
    year = pl.col("Year-Of-Publication").cast(pl.Int64, strict=False)

    def plain(name: str) -> pl.Expr:
        return pl.col(name).map_elements(unescape, return_dtype=pl.String)  # `&amp;` and the like

    return Tables(
        events.select(isbn, user_id="User-ID", rating="Book-Rating"),
        shown.select(
            isbn,
            title=plain("Book-Title"),
            author=plain("Book-Author"),
            year=pl.when(year > 0).then(year),
            publisher=plain("Publisher"),
        ),
        warnings,
    )


def read_users(found: Found) -> pl.DataFrame:
    """`BX-Users.csv`: age, where it is told, and country; the town is left out, which can single out a person."""
    import polars as pl

    (users,) = found["BX-Users.csv"]
    country = pl.col("Location").str.split(",").list.last().str.strip_chars()
    return files.read_escaped(users, ("User-ID", "Location", "Age")).select(
        user_id="User-ID", age=pl.col("Age").cast(pl.Int64, strict=False), country=country
    )


BOOK_CROSSING = Dataset(
    name=NAME,
    description="Book-Crossing: ratings (1 to 10) of books, 2004; readings without a rating are left out",
    read=read,
    read_users=read_users,
    files=("BX-Book-Ratings.csv", "BX-Books.csv", "BX-Users.csv"),
    like_at=8,
    rating_range=(1, 10),
    homepage="http://www2.informatik.uni-freiburg.de/~cziegler/BX/",
    license="free for research; acknowledge its use",
    citation="Cai-Nicolas Ziegler, Sean M. McNee, Joseph A. Konstan and Georg Lausen. 2005. Improving Recommendation "
    "Lists Through Topic Diversification. WWW '05. https://doi.org/10.1145/1060745.1060754",
    language="en",
    timed=False,
)
