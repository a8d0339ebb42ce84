"""Groups of users: how they are formed, measured and named."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec.user_groups import LEAST_USERS, is_group, user_groups


def people(**columns: list[object]) -> pl.DataFrame:
    return pl.DataFrame({"user_id": range(len(next(iter(columns.values())))), **columns}, strict=False)


def members(found: dict[str, object]) -> dict[str, list[int]]:
    return {name: [at for at, one in enumerate(who) if one] for name, who in found.items()}  # type: ignore[arg-type,var-annotated]


def test_values_by_hand() -> None:
    """Three painters are too few for a group, and nothing is said of who gave no job."""
    table = people(job=["cook"] * 5 + ["painter"] * 3 + [None] + ["tailor"] * 6)
    assert members(user_groups(table, ["job"])) == {
        "job=cook": [0, 1, 2, 3, 4],
        "job=tailor": [9, 10, 11, 12, 13, 14],
    }


@pytest.mark.parametrize("text", [False, True])
def test_numbers_by_hand(text: bool) -> None:
    """Twenty ages from 20 to 39 and one unknown: four quarters, also where a table holds numbers as text."""
    ages: list[object] = [*range(20, 40), None]
    found = members(
        user_groups(people(age=[None if one is None else str(one) for one in ages] if text else ages), ["age"])
    )
    assert found == {
        "age=20 to 24": [0, 1, 2, 3, 4],
        "age=25 to 29": [5, 6, 7, 8, 9],
        "age=30 to 34": [10, 11, 12, 13, 14],
        "age=35 to 39": [15, 16, 17, 18, 19],
    }


def test_few_numbers_are_values() -> None:
    table = people(stars=[1, 2] * 6, vip=[True] * 6 + [False] * 6)
    assert set(user_groups(table, ["stars", "vip"])) == {"stars=1", "stars=2", "vip=true", "vip=false"}


def test_equal_numbers_stay_together() -> None:
    table = people(age=[18] * 30 + [1, 2, 3, 4, 5, 6, 7])
    assert members(user_groups(table, ["age"])) == {"age=1 to 18": list(range(37))}


def test_names_are_plain() -> None:
    table = people(job=["<b>|`x`_\n" + "y" * 99] * 5 + ["a|b"] * 3 + ["a_b"] * 3 + ["??"] * 5)
    found = members(user_groups(table, ["job"]))
    assert set(found) == {"job=-b---x-- " + "y" * 31, "job=a-b", "job=--"}
    assert found["job=a-b"] == [5, 6, 7, 8, 9, 10]


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5), st.sampled_from(["a", "b"])), min_size=1, max_size=60))
def test_nobody_is_in_two_groups_of_a_column(values: list[object]) -> None:
    table = people(one=[None if value is None else str(value) for value in values])
    found = user_groups(table, ["one"])
    counted = [sum(bool(who[at]) for who in found.values()) for at in range(len(values))]
    assert max(counted) <= 1
    assert all(who.sum() >= LEAST_USERS for who in found.values())
    assert all(count == 0 for count, value in zip(counted, values, strict=True) if value is None)


def test_names_of_groups() -> None:
    assert is_group("age=18 to 24", ["gender", "age"])
    assert not is_group("age=18 to 24", ["gender"])
    assert not is_group("cold_item", ["cold_item"])
