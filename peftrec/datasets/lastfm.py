"""Last.fm: how often people played an artist, as published for HetRec 2011 and by Oscar Celma (360K); without times."""

from __future__ import annotations

from peftrec.datasets import files
from peftrec.datasets.dataset import Dataset, Found, Tables

PLAYS_360K = "usersha1-artmbid-artname-plays.tsv"


def read_hetrec(found: Found) -> Tables:
    """`user_artists.dat` and `artists.dat`, of which the names are shown."""
    (plays,), (artists,) = found["user_artists.dat"], found["artists.dat"]
    names = {"userID": "user_id", "artistID": "item_id", "weight": "rating"}
    events = files.read_table(plays, tuple(names), separator="\t").rename(names)
    items = files.read_table(artists, ("id", "name"), separator="\t").rename({"id": "item_id", "name": "title"})
    return Tables(events, items)


def read_360k(found: Found) -> Tables:
    """The one file of plays; an artist without an id of MusicBrainz goes by the name."""
    import polars as pl

    (path,) = found[PLAYS_360K]
    rows = files.read_table(path, ("user_id", "mbid", "title", "rating"), separator="\t", header=False)
    title = pl.col("title").str.strip_chars()
    mbid = pl.col("mbid").str.strip_chars()
    named = rows.with_columns(title, item_id=pl.when(mbid.fill_null("") != "").then(mbid).otherwise(title))
    named, warnings = files.counted(
        named, pl.col("item_id").fill_null("") != "", "lastfm-360k", "rows without an artist"
    )
    items = named.select("item_id", "title").unique("item_id", keep="first", maintain_order=True)
    return Tables(named.select("user_id", "item_id", "rating"), items, warnings)


LASTFM_2K = Dataset(
    name="lastfm-2k",
    description="Last.fm of HetRec 2011: how often 1,892 people played 17,632 artists",
    read=read_hetrec,
    files=("user_artists.dat", "artists.dat"),
    like_at=100,
    rating_range=None,
    rating="plays",
    timed=False,
    homepage="https://grouplens.org/datasets/hetrec-2011/",
    license="non-commercial use, as Last.fm permits",
    citation="Ivan Cantador, Peter Brusilovsky and Tsvi Kuflik. 2011. 2nd Workshop on Information Heterogeneity and "
    "Fusion in Recommender Systems (HetRec 2011). RecSys 2011.",
    language="en",
)

LASTFM_360K = Dataset(
    name="lastfm-360k",
    description="Last.fm 360K: how often 360,000 people played the artists that they played most",
    read=read_360k,
    files=(PLAYS_360K,),
    like_at=100,
    rating_range=None,
    rating="plays",
    timed=False,
    homepage="http://ocelma.net/MusicRecommendationDataset/lastfm-360K.html",
    license="non-commercial use, as Last.fm permits",
    citation="Oscar Celma. 2010. Music Recommendation and Discovery in the Long Tail. Springer.",
    language="en",
)
