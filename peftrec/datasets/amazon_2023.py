"""Amazon Reviews 2023: reviews with 1 to 5 stars by category of goods, times in milliseconds.

Hou, Li, He, Yan, Chen and McAuley, Bridging Language and Items for Retrieval and Recommendation, 2024,
https://arxiv.org/abs/2403.03952
"""

from __future__ import annotations

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables

REVIEWS, GOODS = "*.jsonl", "meta_*.jsonl"


def read(found: Found) -> Tables:
    """The reviews of one or more categories and their goods; variants of an article (colour, size) are one item."""
    import polars as pl

    text = pl.String()
    told = {"user_id": text, "parent_asin": text, "rating": text, "timestamp": pl.Int64()}
    of_goods = {"parent_asin": text, "title": text, "main_category": text, "store": text, "price": text}
    events = [
        files.read_lines(path, told, ("user_id", "parent_asin", "rating", "timestamp")) for path in found[REVIEWS]
    ]
    goods = [
        files.read_lines(path, {**of_goods, "categories": pl.List(text)}, ("parent_asin", "title"))
        for path in found[GOODS]
    ]
    return Tables(
        pl.concat(events).with_columns(pl.col("timestamp") // 1000).rename({"parent_asin": "item_id"}),
        pl.concat(goods).select(
            "title",
            "store",
            item_id="parent_asin",
            category="main_category",
            categories=pl.col("categories").list.join(", "),
            price=pl.col("price").cast(pl.Float64, strict=False),  # some say "from 14.99", some a dash
        ),
    )


AMAZON_2023 = Dataset(
    name="amazon-reviews-2023",
    description="Amazon Reviews 2023: reviews (1 to 5 stars) of the categories in the folder, 1996-2023",
    read=read,
    files=(REVIEWS, GOODS),
    parts=True,
    like_at=4,
    rating_range=(1, 5),
    homepage="https://amazon-reviews-2023.github.io/",
    license="for research; its page names none",
    citation="Yupeng Hou, Jiacheng Li, Zhankui He, An Yan, Xiusi Chen and Julian McAuley. 2024. Bridging Language and "
    "Items for Retrieval and Recommendation. https://arxiv.org/abs/2403.03952",
    language="en",
)
