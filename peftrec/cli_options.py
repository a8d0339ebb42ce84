"""What several verbs of the command have in common: options, and how their values are read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from peftrec.errors import ConfigError

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def add_adapter(verb: argparse.ArgumentParser) -> None:
    """ADAPTER and --revision: which adapter is meant."""
    verb.add_argument("adapter", metavar="ADAPTER", help="a run's folder, NAMESPACE/NAME on the Hub, or file:FOLDER")
    verb.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: main)")


def add_items(verb: argparse.ArgumentParser, meaning: str, tables: str = "the items table") -> None:
    """--items and --columns: a table of the user's own, and what its columns are called."""
    verb.add_argument("--items", metavar="FILE", help=meaning)
    verb.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=f"names in {tables}: item_id=movieId"
    )


def add_scorer(verb: argparse.ArgumentParser) -> None:
    """--base-model and --no-prior: what the adapter is scored with."""
    verb.add_argument("--base-model", metavar="MODEL", help="folder or Hub id to use as base model instead")
    verb.add_argument("--no-prior", action="store_true", help="leave the saved prior and calibration out of the scores")


def add_json(verb: argparse.ArgumentParser, kind: str = "object") -> None:
    """--json: the answer for programs."""
    verb.add_argument("--json", action="store_true", help=f"print one JSON {kind}")


def columns(given: argparse.Namespace) -> dict[str, str]:
    """Our column name -> theirs, of --columns.

    Raises:
        ConfigError: one of them has no equals sign.
    """
    return dict(_pair(text) for text in given.columns)


def columns_of_items(given: argparse.Namespace) -> dict[str, str]:
    """`columns`, where they can only be those of --items.

    Raises:
        ConfigError: one of them has no equals sign, or there is no --items.
    """
    found = columns(given)
    if found and not given.items:
        raise ConfigError("--columns: no --items; expected the table that has these columns; add --items FILE")
    return found


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise ConfigError(f"--columns: {text!r}; expected OURS=THEIRS, such as item_id=movieId")
    return ours, theirs
