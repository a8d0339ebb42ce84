"""`python -m peftrec.reload FOLDER`: load an adapter as a stranger would, and answer its sample questions.

The scores are the last line that is printed, a JSON list. `hub.check_reload` runs this in a process of its own, which
knows nothing of the one that trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from peftrec import artifact, values
from peftrec.errors import as_one_line
from peftrec.recommender import Recommender


def scores(folder: str | Path, base_model: str | Path | None = None) -> list[float]:
    """What the adapter in `folder` answers to its own probes, in float32 and without its prior.

    Args:
        folder: RUN/adapter.
        base_model: as in `Recommender.from_pretrained`.

    Raises:
        PeftrecError: the adapter or its base model cannot be loaded.
    """
    about = artifact.read(folder)
    # The probes hold texts as the model reads them: no items table has to be there, or to be fetched.
    names = dict.fromkeys(["item_id", *values.placeholders(about.prompt.item)])
    empty = pl.DataFrame(schema=dict.fromkeys(names, pl.String))
    recommender = Recommender.from_pretrained(folder, items=empty, base_model=base_model, dtype="float32", prior=False)
    return [float(score) for score in recommender.probe_scores()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser(prog="python -m peftrec.reload", description="Answer an adapter's probes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base-model", help="base model to use instead of the one that the adapter names")
    asked = parser.parse_args(arguments)
    with as_one_line():
        print(json.dumps(scores(asked.folder, asked.base_model)))


if __name__ == "__main__":
    main()
