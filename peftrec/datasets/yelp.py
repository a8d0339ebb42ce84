"""Yelp's open data set: reviews with 1 to 5 stars of restaurants, shops and services."""

from __future__ import annotations

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables

REVIEWS, PLACES = "yelp_academic_dataset_review.json", "yelp_academic_dataset_business.json"


def read(found: Found) -> Tables:
    """Both files hold one JSON object a line; several reviews of one place by one person are several events."""
    import polars as pl

    text = pl.String()
    told = {"user_id": text, "business_id": text, "stars": text, "date": text}
    of_places = {"business_id": text, "name": text, "city": text, "state": text, "categories": text}
    (reviews,), (places,) = found[REVIEWS], found[PLACES]
    events = files.read_lines(reviews, told, tuple(told))
    items = files.read_lines(places, of_places, ("business_id", "name"))
    return Tables(
        events.rename({"business_id": "item_id", "stars": "rating", "date": "timestamp"}),
        items.rename({"business_id": "item_id", "name": "title"}),
    )


YELP = Dataset(
    name="yelp",
    description="Yelp Open Dataset: reviews (1 to 5 stars) of restaurants, shops and services",
    read=read,
    files=(REVIEWS, PLACES),
    like_at=4,
    rating_range=(1, 5),
    homepage="https://business.yelp.com/data/resources/open-dataset/",
    license="Yelp's terms of use for the data set: personal, educational and academic purposes",
    citation="Yelp Open Dataset. https://business.yelp.com/data/resources/open-dataset/",
    language="en",
)
