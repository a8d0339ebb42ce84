"""Ids of people in what is published: found where they are told, and no alarm about other numbers and words."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hub_helpers import CARD, write_adapter
from hypothesis import given
from hypothesis import strategies as st

from peftrec import hub
from peftrec.contents import check_folder
from peftrec.errors import HubError
from peftrec.leaks import MOST_TOLD, Watch, in_texts, in_values, is_telling

USERS = frozenset({"196", "22", "u_1042", "A3SGXH7AUHU8GW", "76561198001234567", "action", "charlotte"})
WATCH = Watch(users=USERS)


def names(*texts: str, watch: Watch = WATCH) -> list[str]:
    return [line.split("'")[1] for line in in_texts("README.md", texts, watch)]


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("u_1042", True),
        ("A3SGXH7AUHU8GW", True),
        ("ann-b.", True),
        ("7656119800", True),
        ("134515008", False),  # as many as a model has parameters
        ("196", False),
        ("u1042", False),
        ("charlotte", False),
    ],
)
def test_what_tells_by_itself(name: str, telling: bool) -> None:
    assert is_telling(name) == telling


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Asked by u_1042.", ["u_1042"]),
        ("(A3SGXH7AUHU8GW, B00)", ["A3SGXH7AUHU8GW"]),
        ("profiles/76561198001234567: yes", ["76561198001234567"]),
        ("owner=u_1042", ["u_1042"]),
        ("196 films, AUC 0.196, 22 of 196 users, seed 22", []),
        ("for each user 22 events, for user 196 more", []),  # numbers of events as well as ids
        ("user_id: 196", ["196"]),
        ("the uid `22` and the user ID 196, then userid=charlotte", ["22", "196", "charlotte"]),
        ("User #196 liked it", ["196"]),
        ("an action film with charlotte", []),
        ("| user_id | film |\n|---|---|\n| 196 | Heat |\n| 7 | Babe |\n", ["196"]),
        ("| film | user |\n|---|---|\n| Heat | `22` |\n\n| users | 196 |\n| 196 | 22 |\n", ["22"]),
        ("| rows | users |\n|---|---|\n| 196 | 22 |\n", []),
        ("A3SGXH7AUHU8GW2 xu_1042 u_10421", []),
    ],
)
def test_texts(text: str, found: list[str]) -> None:
    assert names(text) == found


def test_values() -> None:
    value = {
        "prior": {"196": 0.5, "22": 196},
        "rows": [{"user_id": 196, "rating": 22}, {"User": "charlotte"}],
        "userIds": ["22", 5],
        "users": 196,
        "seed": 22,
    }
    assert sorted(line.split("'")[1] for line in in_values("x.json", value, WATCH)) == ["196", "22", "charlotte"]


def test_what_is_allowed_and_how_much_is_told() -> None:
    assert names("u_1042, A3SGXH7AUHU8GW", watch=Watch(("u_",), USERS)) == ["A3SGXH7AUHU8GW"]
    many = Watch(users=frozenset(f"user-{number}" for number in range(100)))
    lines = in_texts("README.md", [" ".join(sorted(many.users))], many)
    assert len(lines) == MOST_TOLD + 1
    assert lines[-1] == "README.md: the ids of 95 more users of the data; remove them"


@given(
    st.integers(0, 10**9 - 1), st.sampled_from(["{} users", "seed {}", "{} bytes", "0.{}", "| {} |", "step {}, loss"])
)
def test_numbers_are_no_ids(number: int, text: str) -> None:
    """Whatever the ids are: a number that counts something raises no alarm."""
    assert names(text.format(number), watch=Watch(users=frozenset({str(number)}))) == []


def test_the_run_beside_the_adapter_knows_its_people(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "run" / "adapter")
    pl.DataFrame({"user_id": ["u_1042", "196"], "split": "test", "score": 0.5}).write_parquet(
        tmp_path / "run" / "predictions.parquet"
    )
    (adapter / "README.md").write_text(CARD + "196 films of u_1042\n")
    told = "README.md: the id of a user of the data, 'u_1042'; remove it, or allow it"
    for folder in (adapter, tmp_path / "run"):
        with pytest.raises(HubError) as refused:
            hub.push(folder, f"file:{tmp_path / 'out'}", reload_check=lambda _: None)
        assert refused.value.problems == (told,)
    assert check_folder(adapter) == []
    assert hub.push(adapter, f"file:{tmp_path / 'out'}", reload_check=lambda _: None, allow=["u_1042"]).changed
