"""What an adapter must pass before it is published: it loads back with the same scores, and its card is valid."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard

from peftrec import artifact
from peftrec.errors import HubError
from peftrec.file_checks import CARD, WEIGHTS
from peftrec.hub_client import one_line

TOLERANCE = 1e-4
"""How far a reloaded score may be from the recorded one: float32 on another number of threads."""

LAUNCHED = re.compile(r"ACCELERATE_USE_(FSDP|DEEPSPEED)$|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$")
"""What a launcher tells the processes of one run."""

TOLD = re.compile(
    r"Reload check: \d+ probes in a fresh process, at most (\d\.\de[-+]\d\d) off((?:\s+[0-9a-f]{64} \S+)+)"
)
"""How a commit tells of a check, and of which files by their sha256."""


def check_reload(
    folder: str | Path, *, base_model: str | Path | None = None, tolerance: float = TOLERANCE, timeout: float = 3600
) -> float:
    """Load the adapter in a fresh process and compare its answers with those that peftrec.json records.

    Args:
        folder: RUN/adapter.
        base_model: as in `Recommender.from_pretrained`.
        tolerance: how far a score may be off.
        timeout: seconds until the process is given up.

    Returns:
        The largest difference.

    Raises:
        HubError: the adapter does not load, answers otherwise, or records no answers.
    """
    folder = Path(folder)
    expected = artifact.read(folder).recorded
    if not expected:
        raise HubError(
            f"{folder / artifact.FILE}: no probes, which are questions with the adapter's own answers; expected some "
            "to check it by; a run records them when it ends: start it again with recipes/finetune.py --config "
            f"{folder.parent / 'config.yaml'} --overwrite"
        )
    command = [sys.executable, "-W", "ignore", "-m", "peftrec.reload", str(folder)]
    command += ["--base-model", str(base_model)] if base_model is not None else []
    # At the end of a shared run this would take itself for one of its processes.
    alone = {name: value for name, value in os.environ.items() if not LAUNCHED.match(name)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, env=alone
        )
    except subprocess.TimeoutExpired:
        raise HubError(f"{folder}: not loaded within {timeout:g} s in a fresh process; try it alone") from None
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no message"]
    if done.returncode:
        raise HubError(f"{folder}: does not load in a fresh process: {one_line(lines[-1])}")
    found = json.loads(lines[-1])
    worst = max(abs(float(one) - other) for one, other in zip(found, expected, strict=True))
    if not worst <= tolerance:  # also where a score is not a number
        raise HubError(
            f"{folder}: reloaded, the scores are up to {worst:.2g} off those in {artifact.FILE}; expected at most "
            f"{tolerance:g}; the files are of different runs, or the base model is another: save the adapter again"
        )
    return worst


def describe_check(off: float, probes: int, hashes: Mapping[str, str]) -> str:
    """What a commit says of its reload check.

    Args:
        off: the largest difference.
        probes: how many answers were compared.
        hashes: path -> sha256 of all files; those of the weights and of peftrec.json are told.
    """
    lines = [f"Reload check: {probes} probes in a fresh process, at most {off:.1e} off"]
    lines += [f"{hashes[path]} {path}" for path in (*WEIGHTS, artifact.FILE) if path in hashes]
    return "\n".join(lines)


def read_check(text: str, hashes: Mapping[str, str]) -> float | None:
    """The largest difference that a commit tells of; None where it tells of no check, or of one of other files.

    Args:
        text: the commit's description.
        hashes: path -> sha256 of the weights and of peftrec.json as they are now.
    """
    for found in TOLD.finditer(text):
        words = found[2].split()
        if dict(zip(words[1::2], words[::2], strict=True)) == hashes:
            return float(found[1])
    return None


def check_card(folder: str | Path) -> None:
    """Check the metadata of README.md as far as that goes without the Hub; no card is fine.

    Raises:
        HubError: the Hub would not take it.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        return
    try:
        ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(f"{path}: metadata: {one_line(error)}; render the card again, or mend it") from None
