"""The `peftrec` command. Training is a recipe of its own: accelerate launch recipes/finetune.py --config CONFIG."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peftrec import cli_features, cli_publish, cli_recommend
from peftrec.errors import PeftrecError

INTERRUPTED, REFUSED = 130, 2  # exit codes: as a shell gives for Ctrl-C; what the caller can mend


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; an error that the caller can mend is a line on stderr and 2."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if rest and not given.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given.overrides = rest
    try:
        with _plain_warnings():
            given.verb(given)
        sys.stdout.flush()
    except PeftrecError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python would flush to the closed pipe once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peftrec", description=__doc__)
    parser.set_defaults(takes_overrides=False)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    cli_recommend.add_verbs(verbs)
    cli_features.add_verbs(verbs)
    cli_publish.add_verbs(verbs)
    return parser


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as a line on stderr, without the place in the code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="peftrec")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield
