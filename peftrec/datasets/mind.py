"""MIND, the Microsoft News Dataset: which of the news on a page a person clicked, October and November 2019.

Wu et al., MIND: A Large-scale Dataset for News Recommendation, ACL 2020
"""

from __future__ import annotations

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables

NAME = "mind"


def read(found: Found) -> Tables:
    """`behaviors.tsv` and `news.tsv` of one part or of several (train, dev).

    Every piece of news on a page is one event at the time of the page, 1 if it was clicked and 0 if it was seen and not
    clicked. The column of clicks from before the first page has no times and is left out; so are pages that do not say
    what was clicked, as in the test part.
    """
    import polars as pl

    columns = ("impression", "user_id", "time", "history", "shown")
    pages = [
        files.read_table(path, columns, separator="\t", header=False).select("user_id", "time", "shown")
        for path in found["behaviors.tsv"]
    ]
    shown = pl.concat(pages).with_columns(
        pl.col("shown").fill_null("").str.split(" "),
        timestamp=pl.col("time").str.to_datetime("%m/%d/%Y %I:%M:%S %p", time_unit="us", strict=False).dt.epoch("s"),
    )
    parts = pl.col("shown").str.extract_groups(r"^(?<item_id>\S+)-(?<label>[01])$")
    events = shown.explode("shown").filter(pl.col("shown") != "").with_columns(parts.alias("parts"))
    events = events.select("user_id", "timestamp", pl.col("parts").struct.unnest())
    events, warnings = files.counted(events, pl.col("label").is_not_null(), NAME, "events that do not say yes or no")
    told = ("item_id", "category", "subcategory", "title", "abstract")
    news = [files.read_table(path, told, separator="\t", header=False) for path in found["news.tsv"]]
    return Tables(events, pl.concat(news).unique("item_id", keep="first", maintain_order=True), warnings)


MIND = Dataset(
    name=NAME,
    description="MIND: clicks on news and what was seen beside them and not clicked, six weeks of 2019",
    read=read,
    files=("behaviors.tsv", "news.tsv"),
    parts=True,
    like_at=None,
    rating_range=None,
    homepage="https://msnews.github.io/",
    license="Microsoft Research License Terms: research, not commercial",
    citation="Fangzhao Wu et al. 2020. MIND: A Large-scale Dataset for News Recommendation. ACL 2020.",
    language="en",
)
