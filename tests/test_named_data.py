"""Data sets in the form in which they are published, written here on a small scale with the real files' oddities."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from peftrec import interactions, sources
from peftrec.config import Data, Split, parse_recipe
from peftrec.datasets import DATASETS
from peftrec.datasets.files import matching
from peftrec.errors import ConfigError, DataError

Files = Mapping[str, bytes]


def lines(*rows: Any) -> bytes:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


ML_1M: Files = {
    "ratings.dat": lines("1::2::5::978300760", "1::10::3::978302109", "2::2::1::978300275"),
    "movies.dat": "2::Misérables, Les (1995)::Drama|Musical\n10::Two: the film (1997)::Comedy\n".encode("latin-1"),
    "users.dat": lines("1::F::1::10::48067", "2::M::56::16::70072"),
}
ML_10M: Files = {
    "ratings.dat": lines("1::122::4.5::838985046", "2::122::0.5::838983525", "3::122::5::838983526"),
    "movies.dat": "122::Amélie (Fabuleux destin d'Amélie Poulain, Le) (2001)::Comedy|Romance\n".encode(),
}
ML_CSV: Files = {
    "ratings.csv": lines("userId,movieId,rating,timestamp", "1,31,2.5,1260759144", "2,144606,4.0,835355493"),
    "movies.csv": lines(
        "movieId,title,genres",
        '31,"American President, The (1995)",Comedy|Drama',
        '144606,"Confessions of a ""Mind"" (Series)",(no genres listed)',
    ),
}
GOODBOOKS: Files = {
    "ratings.csv": lines("user_id,book_id,rating", "2,1,5", "1,2,3"),
    "books.csv": lines(
        "book_id,goodreads_book_id,isbn,authors,original_publication_year,original_title,title,language_code",
        '1,2767052,439023483,Suzanne Collins,2008.0,The Hunger Games,"The Hunger Games (The Hunger Games, #1)",eng',
        "2,3,,Homer,-720.0,,The Odyssey,",
    ),
}
BOOK_CROSSING: Files = {
    "BX-Book-Ratings.csv": (
        b'"User-ID";"ISBN";"Book-Rating"\r\n"276725";"034545104X";"0"\r\n"276726";"0155061224";"5"\r\n'
        b'"276729";"052165615x";"9"\r\n"276729";"052165615x";"9"\r\n'
    ),
    "BX-Books.csv": (
        '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S"\r\n'
        '"0155061224";"Rites; of \\"Passage\\"";"Judith Rae";"0";"Brooks/Cole &amp; Co";"http://x"\r\n'
        '"052165615X";"Señor &amp; Son";"Philip";"1999";"Cambridge";"http://x"\r\n'
    ).encode("latin-1"),
    "BX-Users.csv": (
        '"User-ID";"Location";"Age"\r\n"276726";"málaga, n/a, spain";NULL\r\n"276729";"rijeka, n/a, croatia";"16"\r\n'
    ).encode("latin-1"),
}
REVIEW = {
    "title": "Five stars",
    "text": "a, b",
    "images": [],
    "asin": "B1-red",
    "helpful_vote": 0,
    "verified_purchase": True,
}
AMAZON: Files = {
    "All_Beauty.jsonl": lines(
        {"rating": 5.0, **REVIEW, "parent_asin": "B1", "user_id": "AG", "timestamp": 1588687728923},
        {"rating": 1.0, **REVIEW, "parent_asin": "B2", "user_id": "AG", "timestamp": 1588687728999},
        {"rating": 1.0, **REVIEW, "parent_asin": "B2", "user_id": "AG", "timestamp": 1588687728999},
    ),
    "meta_All_Beauty.jsonl": lines(
        {"main_category": "All Beauty", "title": "Soap", "average_rating": 4.8, "price": 12.5, "store": "Howard",
         "categories": ["Beauty", "Skin"], "details": {"Size": "1"}, "parent_asin": "B1", "bought_together": None},
        {"main_category": None, "title": "Comb", "price": "from 14.99", "details": {}, "parent_asin": "B2"},
    ),
    "Digital_Music.jsonl.gz": gzip.compress(
        lines({"rating": 3.0, **REVIEW, "parent_asin": "B3", "user_id": "AH", "timestamp": 2000})
    ),
    "meta_Digital_Music.jsonl.gz": gzip.compress(lines({"title": "Song", "parent_asin": "B3", "price": 1})),
}  # fmt: skip
YELP: Files = {
    "yelp_academic_dataset_review.json": lines(
        {"review_id": "r", "user_id": "u_1", "business_id": "-b", "stars": 4.0, "useful": 0, "text": "été",
         "date": "2018-07-07 22:09:11"},
        {"review_id": "s", "user_id": "u_1", "business_id": "-b", "stars": 1, "text": "again", "date": "2018-07-08"},
    ),
    "yelp_academic_dataset_business.json": lines(
        {"business_id": "-b", "name": "Café", "city": "Tampa", "state": "FL", "stars": 4.5,
         "attributes": {"WiFi": "u'free'"}, "categories": None, "hours": None},
    ),
}  # fmt: skip
MIND: Files = {
    "MINDsmall_train/behaviors.tsv": lines(
        "1\tU13\t11/11/2019 9:05:58 AM\tN5 N6\tN1-1 N2-0", "2\tU14\t11/11/2019 12:00:00 PM\t\tN2-1"
    ),
    "MINDsmall_train/news.tsv": lines(
        'N1\tsports\tgolf\tHe said: "no\tAn abstract\thttps://x\t[]\t[]',
        "N2\tnews\tworld\tElections\t\thttps://x\t[]\t[]"
    ),
    "MINDsmall_dev/behaviors.tsv": lines(
        "1\tU13\t11/15/2019 12:30:00 AM\tN1\tN2-0 N3", "2\tU13\t11/15/2019 1:00:00 AM\tN1\t"
    ),
    "MINDsmall_dev/news.tsv": lines("N2\tnews\tworld\tElections\t\thttps://x\t[]\t[]"),
}  # fmt: skip
LASTFM_2K: Files = {
    "user_artists.dat": lines("userID\tartistID\tweight", "2\t51\t13883", "2\t52\t99"),
    "artists.dat": lines(
        "id\tname\turl\tpictureURL", '51\tBjörk "live\thttp://x\thttp://y', "52\tMorcheeba\thttp://x\t"
    ),
}
LASTFM_360K: Files = {
    "usersha1-artmbid-artname-plays.tsv": lines(
        "00000c\t3bd7-4309\tbetty blowtorch\t2137",
        "00000c\t\t 田中 \t99",
        "00001d\t3bd7-4309\tBetty\t100",
        "00001d\t\t\t7",
    )
}
STEAM_200K: Files = {
    "steam-200k.csv": lines(
        "151603712,The Elder Scrolls V Skyrim,purchase,1.0,0",
        "151603712,The Elder Scrolls V Skyrim,play,1.5,0",
        "151603712,The Elder Scrolls V Skyrim,play,273.0,0",
        '59945701,"Warhammer 40,000",purchase,1.0,0',
    )
}
STEAM_AUSTRALIA: Files = {
    "australian_users_items.json": lines(
        "{'user_id': 'js41637', 'items_count': 2, 'items': [{'item_id': '10', 'item_name': \"Sid Meier's\", "
        "'playtime_forever': 150, 'playtime_2weeks': 0}, {'item_id': '20', 'item_name': u'Pong', "
        "'playtime_forever': 0}]}",
        "{'user_id': 'empty', 'items_count': 0, 'items': []}",
    )
}

# Data set -> its files, the events (user, item, answer, time) as they are used, and items with what is told of them.
SETS: dict[str, tuple[Files, list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {
    "ml-1m": (
        ML_1M,
        [(1, 2, 5, 978300760), (1, 10, 3, 978302109), (2, 2, 1, 978300275)],
        [(2, "Les Misérables", 1995, "Drama, Musical"), (10, "Two: the film", 1997, "Comedy")],
    ),
    "ml-10m": (
        ML_10M,
        [(1, 122, 4.5, 838985046), (2, 122, 0.5, 838983525), (3, 122, 5, 838983526)],
        [(122, "Amélie (Le Fabuleux destin d'Amélie Poulain)", 2001, "Comedy, Romance")],
    ),
    "ml-latest": (
        ML_CSV,
        [(1, 31, 2.5, 1260759144), (2, 144606, 4, 835355493)],
        [(31, "The American President", 1995, "Comedy, Drama"), (144606, 'Confessions of a "Mind" (Series)', None, "")],
    ),
    "goodbooks-10k": (
        GOODBOOKS,
        [(2, 1, 5, 0), (1, 2, 3, 1)],
        [
            (1, "The Hunger Games (The Hunger Games, #1)", "Suzanne Collins", 2008, "eng"),
            (2, "The Odyssey", "Homer", -720, None),
        ],
    ),
    "book-crossing": (
        BOOK_CROSSING,
        [(276726, "0155061224", 5, None), (276729, "052165615X", 9, None)],
        [
            ("0155061224", 'Rites; of "Passage"', "Judith Rae", None, "Brooks/Cole & Co"),
            ("052165615X", "Señor & Son", "Philip", 1999, "Cambridge"),
        ],
    ),
    "amazon-reviews-2023": (
        AMAZON,
        [("AG", "B1", 5, 1588687728), ("AG", "B2", 1, 1588687728), ("AH", "B3", 3, 2)],
        [
            ("B1", "Soap", "Howard", "All Beauty", "Beauty, Skin", 12.5),
            ("B2", "Comb", None, None, None, None),
            ("B3", "Song", None, None, None, 1.0),
        ],
    ),
    "yelp": (
        YELP,
        [("u_1", "-b", 4, 1531001351), ("u_1", "-b", 1, 1531008000)],
        [("-b", "Café", "Tampa", "FL", None)],
    ),
    "mind": (
        MIND,
        [
            ("U13", "N2", 0, 1573777800),
            ("U13", "N1", 1, 1573463158),
            ("U13", "N2", 0, 1573463158),
            ("U14", "N2", 1, 1573473600),
        ],
        [("N2", "news", "world", "Elections", None), ("N1", "sports", "golf", 'He said: "no', "An abstract")],
    ),
    "lastfm-2k": (LASTFM_2K, [(2, 51, 13883, None), (2, 52, 99, None)], [(51, 'Björk "live'), (52, "Morcheeba")]),
    "lastfm-360k": (
        LASTFM_360K,
        [("00000c", "3bd7-4309", 2137, None), ("00000c", "田中", 99, None), ("00001d", "3bd7-4309", 100, None)],
        [("3bd7-4309", "betty blowtorch"), ("田中", "田中")],
    ),
    "steam-200k": (
        STEAM_200K,
        [(151603712, "The Elder Scrolls V Skyrim", 274.5, None), (59945701, "Warhammer 40,000", 0, None)],
        [("The Elder Scrolls V Skyrim", "The Elder Scrolls V Skyrim"), ("Warhammer 40,000", "Warhammer 40,000")],
    ),
    "steam-australia": (
        STEAM_AUSTRALIA,
        [("js41637", 10, 2.5, None), ("js41637", 20, 0, None)],
        [(10, "Sid Meier's"), (20, "Pong")],
    ),
}  # fmt: skip
WARNINGS = {
    "book-crossing": ["rows without a rating (0) dropped", "duplicate rows"],
    "amazon-reviews-2023": ["duplicate rows"],
    "mind": ["mind: 1 events that do not say yes or no dropped"],
    "lastfm-360k": ["lastfm-360k: 1 rows without an artist dropped"],
}


def write(folder: Path, files: Files) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def section(name: str, folder: str | None, **more: Any) -> Data:
    kind = "temporal" if DATASETS[name].timed else "kfold"
    return Data(name=name, folder=folder, split=Split(kind=kind), **more)


@pytest.mark.parametrize("name", SETS)
def test_published_files_become_these_tables(name: str, tmp_path: Path) -> None:
    files, events, items = SETS[name]
    one_answer = {"yelp": 2, "ml-10m": 3, "lastfm-2k": 5000}.get(name)
    loaded = interactions.load(section(name, write(tmp_path, files), like_at=one_answer), 13)
    told = loaded.events.with_columns(
        user=loaded.user_ids.gather(loaded.events["user"]),
        item=loaded.items["item_id"].gather(loaded.events["item"]),
    )
    answer = "rating" if "rating" in told.columns else "label"
    if not DATASETS[name].timed:
        told = told.with_columns(timestamp=None)
    assert [tuple(row) for row in told.select("user", "item", answer, "timestamp").rows()] == events
    ordered = ["item_id", *(column for column in loaded.items.columns if column != "item_id")]
    assert loaded.items.select(ordered).rows() == items
    expected = WARNINGS.get(name, [])
    said = [line for line in loaded.warnings if "no timestamps" not in line]
    assert len(said) == len(expected), said
    assert all(words in line for words, line in zip(expected, said, strict=True))


def test_every_data_set_that_is_not_fetched_is_tested() -> None:
    same_form = {"ml-20m", "ml-25m", "ml-32m", "ml-latest-small"}
    assert {name for name, one in DATASETS.items() if not one.fetched} == set(SETS) | same_form
    assert len({(DATASETS[name].read, DATASETS[name].files) for name in (*same_form, "ml-latest")}) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lastfm-2k", [1, 0]),  # 13,883 plays and 99, of which 100 are a like
        ("steam-200k", [1, 0]),  # 274.5 hours, and bought without playing
        ("steam-australia", [1, 0]),  # 150 minutes are 2.5 hours
        ("book-crossing", [0, 1]),  # 5 and 9 of 10
    ],
)
def test_what_counts_as_liked(name: str, expected: list[int], tmp_path: Path) -> None:
    loaded = interactions.load(section(name, write(tmp_path, SETS[name][0])), 13)
    assert loaded.events["label"].to_list() == expected


def test_what_is_told_of_users(tmp_path: Path) -> None:
    columns = dict.fromkeys(("age", "gender"), "eval.user_groups")
    people = interactions.load(section("ml-1m", write(tmp_path / "ml", ML_1M)), 13, with_users=columns).users
    assert people.rows() == [(1, "woman", "under 18", "K-12 student"), (2, "man", "56+", "self-employed")]
    where = write(tmp_path / "bx", BOOK_CROSSING)
    readers = interactions.load(section("book-crossing", where), 13, with_users={"age": "eval.user_groups"}).users
    assert readers.rows() == [(276726, None, "spain"), (276729, 16, "croatia")]


def test_ratings_are_ratings(tmp_path: Path) -> None:
    loaded = interactions.load(section("ml-10m", write(tmp_path, ML_10M)), 13, "rating")
    assert loaded.scale == (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)


@pytest.mark.parametrize(
    ("data", "task", "said"),
    [
        (Data(name="mind"), "click", "data.folder: missing; mind cannot be fetched; expected the folder with "
         "behaviors.tsv and news.tsv, as published at https://msnews.github.io/: download and unpack them, and set "
         "data.folder"),
        (Data(name="ml-1m", folder="{}"), "click", "no movies.dat and no users.dat; expected the folder with"),
        (Data(name="ml-1m", folder="{}/nothing"), "click", "no ratings.dat and no movies.dat and no users.dat;"),
        (Data(name="ml-100k", folder="{}"), "click", "; ml-100k is fetched and needs none; remove it"),
        (Data(name="lastfm-2k", folder="{}"), "click", "data.split.kind: temporal; lastfm-2k tells no times;"),
        (Data(name="lastfm-2k", folder="{}", split=Split(kind="kfold")), "rating", "lastfm-2k holds plays, no"),
        (Data(name="mind", folder="{}", like_at=2), "click", "data.like_at: 2; mind has labels, no ratings; remove it"),
    ],
)  # fmt: skip
def test_mistakes_show_before_anything_is_read(data: Data, task: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").touch()
    placed = Data(
        **{key: value.format(tmp_path) if key == "folder" and value else value for key, value in vars(data).items()}
    )
    with pytest.raises(DataError) as caught:
        sources.check(placed, task=task)
    assert any(said in line for line in str(caught.value).splitlines()), str(caught.value)
    with pytest.raises(DataError):
        interactions.load(placed, 13, task)


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("goodbooks-10k", "ratings.csv", b"user,book,rating\n1,2,3\n", "ratings.csv: no column user_id, book_id (found "
         "user, book, rating); expected user_id, book_id, rating, as published"),
        ("book-crossing", "BX-Books.csv", b"ISBN,Title\n1,2\n", "no column ISBN, Book-Title"),
        ("yelp", "yelp_academic_dataset_review.json", b'{"user_id": "u"}\n{"user_id"\n', "review.json: cannot be read"),
        ("yelp", "yelp_academic_dataset_review.json", b'{"user_id": "u"}\n', "no line has business_id, stars, date"),
        ("ml-1m", "ratings.dat", b"1::2::3::4\n1,2,3,4\n", "ratings.dat: 1 lines without 4 values"),
        ("mind", "MINDsmall_train/news.tsv", b"N1\tsports\n", "news.tsv: 2 columns; expected 5"),
        ("mind", "MINDsmall_dev/behaviors.tsv", b"1\tU1\tyesterday\t\tN1-1\n", "1 of 4 rows have no timestamp"),
        ("steam-200k", "steam-200k.csv", b"1,Pong,play,long,0\n", "1 rows whose fourth value is no number"),
        ("book-crossing", "BX-Books.csv", b'"ISBN";"' + b"x" * 200_000 + b'"\n', "BX-Books.csv: cannot be read (field"),
        ("steam-australia", "australian_users_items.json", b"{'user_id': os.getcwd()}\n", "line 1 cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_published(name: str, file: str, content: bytes, said: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {**SETS[name][0], file: content})
    with pytest.raises(DataError) as caught:
        interactions.load(section(name, folder), 13)
    assert said in str(caught.value)


def test_files_are_found_where_they_were_unpacked(tmp_path: Path) -> None:
    write(tmp_path, {"a/x.csv": b"", "b/x.csv": b"", "c.jsonl": b"", "c.jsonl.gz": b"", "meta_c.jsonl": b""})
    found = matching(tmp_path, ("x.csv", "*.jsonl", "meta_*.jsonl", "y"))
    assert {name: [str(path.relative_to(tmp_path)) for path in paths] for name, paths in found.items()} == {
        "x.csv": ["a/x.csv", "b/x.csv"], "*.jsonl": ["c.jsonl"], "meta_*.jsonl": ["meta_c.jsonl"], "y": [],
    }  # fmt: skip
    write(
        tmp_path,
        {**{f"one/{name}": b for name, b in ML_CSV.items()}, **{f"two/{name}": b for name, b in ML_CSV.items()}},
    )
    with pytest.raises(DataError, match=r"2 files ratings.csv; expected one; name its own folder"):
        DATASETS["ml-latest"].load(str(tmp_path))


def test_a_folder_without_a_name_does_nothing() -> None:
    with pytest.raises(ConfigError, match=r"data.folder: does nothing under data.interactions"):
        parse_recipe({"data": {"interactions": "a.csv", "folder": "b"}, "output_dir": "c"}, "recipe")


def test_a_wrong_value_is_named_by_its_row(tmp_path: Path) -> None:
    files = dict(GOODBOOKS) | {"ratings.csv": b"user_id,book_id,rating\n1,1,5\n1,2,many\n"}
    with pytest.raises(DataError, match=r"goodbooks-10k: rating in row 2 is 'many'"):
        interactions.load(section("goodbooks-10k", write(tmp_path, files)), 13)


def test_the_page_names_every_data_set_with_its_files_and_columns(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {name: row for row in rows for name in re.findall(r"`(.+?)`", row[0])}
    assert set(told) == set(DATASETS)
    for name, (files, _, _) in SETS.items():
        _, _, shown, columns = told[name]
        assert set(DATASETS[name].files) == {word for group in re.findall(r"`(.+?)`", shown) for word in group.split()}
        items = DATASETS[name].load(write(tmp_path / name, files)).items
        assert set(re.findall(r"`(.+?)`", columns)[0].split()) == set(items.columns) - {"item_id"}, name
