"""The exceptions that peftrec raises on purpose, all under one root.

    PeftrecError
    ├── ConfigError      the recipe: unknown keys, wrong types, values that cannot work together
    ├── DataError        the user's tables: missing columns, values out of range, nothing left to learn from
    ├── AssetError       things fetched: not found, download failed, wrong hash
    ├── ModelError       the base model, its tokenizer or an adapter: cannot be loaded or does not fit
    └── HubError         a folder that may not be published or trusted, or a Hub that does not do what was asked

Each message is one line that reads *where: what was found; what was expected; what to do*. The command line prints
it without a traceback and exits with 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class PeftrecError(Exception):
    """Root of every error that is the caller's to mend."""


class ConfigError(PeftrecError):
    """A recipe that cannot be run. `problems` holds one line for each mistake; the message joins them."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(PeftrecError):
    """A table that cannot be used as it is."""


class AssetError(PeftrecError):
    """A file that could not be found, fetched or trusted."""


class ModelError(PeftrecError):
    """A base model, tokenizer or adapter that cannot be used as asked."""


class HubError(PeftrecError):
    """What cannot be pushed or pulled. `problems` holds one line for each reason; the message joins them."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@contextmanager
def as_one_line() -> Iterator[None]:
    """Turn a PeftrecError into its line on stderr and exit status 2; programs wrap their main function in it."""
    try:
        yield
    except PeftrecError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
