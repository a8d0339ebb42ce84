"""A run that is killed at any moment and resumed ends in the same adapter, bit for bit.

This file is also the program that lives and dies: `python tests/test_killed.py BASE FOLDER TRIES`. It imports
everything once and forks a child for each life, so that a life takes a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_distributed import do

TRIES = 20
# Each of the 8 steps validates and saves, so that a good part of the time goes into writing checkpoints.
JOB: dict[str, Any] = {"name": "run", "dropout": 0.2, "train": {"evals": 8}}
MOMENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}


class Reaper:
    """Counts what this process does to the file system below `folder`, and kills it at the `last` time."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder, self.last, self.count = str(folder), last, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        below = self.folder in f"{arguments[0]}" or event == "os.remove"  # that may name a file below an open folder
        reads = event == "open" and isinstance(arguments[1], str) and "r" in arguments[1]
        if event not in MOMENTS or not below or reads:
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def life(
    base: Path, folder: Path, *, resume: bool = False, kill_after: float | None = None, at: int | None = None
) -> bool:
    """One child that trains in `folder`, killed after so many seconds or at a moment; whether it came to its end."""
    child = os.fork()
    if child == 0:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            reaper = Reaper(folder, at)
            do(base, folder, {**JOB, "resume": resume})
            (folder / "moments").write_text(str(reaper.count))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), folder.with_suffix(".log").read_text()
    return status == 0


def main(base: Path, folder: Path, tries: int) -> None:
    """Live `tries` times, half of them killed after a random time and half at a random write, each then resumed."""
    from peftrec import backbone, config

    backbone.quiet()
    backbone.load(config.Model(name=str(base), dtype="float32"))  # what it imports, the children need not

    def fresh(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    begin = time.monotonic()
    assert life(base, fresh("whole"))
    seconds = time.monotonic() - begin
    moments = int((folder / "whole/moments").read_text())
    random = np.random.default_rng(17)
    found = []
    for number in range(tries):
        run = fresh(str(number))
        how = {"kill_after": random.uniform(0, seconds)} if number % 2 else {"at": int(random.integers(1, moments))}
        ended = life(base, run, **how)
        left = sorted(path.name for path in run.glob("run/checkpoint-*"))
        whole = [name for name in left if (run / "run" / name / "trainer_state.json").is_file()]
        assert life(base, run, resume=True)
        found.append({**how, "ended": ended, "left": left, "whole": whole})
    (folder / "found.json").write_text(json.dumps({"seconds": seconds, "moments": moments, "tries": found}))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(tiny_llama_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tiny_llama_folder), str(tmp_path), str(TRIES)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    weights = "run.adapter/adapter_model.safetensors"
    expected = (tmp_path / "whole" / weights).read_bytes()
    for number in range(TRIES):
        assert (tmp_path / str(number) / weights).read_bytes() == expected, number
    tries = json.loads((tmp_path / "found.json").read_text())["tries"]
    # The moments were what they were meant to be: before the first checkpoint, between two, and within one.
    assert sum(not one["ended"] for one in tries) >= 0.7 * TRIES, tries
    assert any(not one["left"] for one in tries), tries
    assert any(one["left"] and one["left"] == one["whole"] for one in tries), tries
    assert any(one["left"] != one["whole"] for one in tries), tries


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
