"""Two programs that are asked in turn: a line of JSON in, a line out, so that imports and loading are never timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Worker:
    """A script that runs `serve`, in an interpreter of its own.

    Args:
        python: the interpreter.
        script: the program.
        log: where all that it prints goes.
        environment: variables beside our own.
    """

    def __init__(self, python: Path, script: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = script.stem, log
        with log.open("w") as printed:
            self.process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                env={**os.environ, **environment},
            )

    def ask(self, do: str, **told: Any) -> Any:
        """What the worker's function `do` returns."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps({"do": do, **told}), file=self.process.stdin, flush=True)
            reply = json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        except BrokenPipeError:
            reply = {"error": "it ended"}
        if "error" in reply:
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            reason = reply["error"] if reply["error"] != "it ended" else f"it ended: {last}"
            raise SystemExit(f"{self.name}: {do} failed: {reason}")
        return reply["found"]

    def close(self) -> None:
        """End the worker."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer what stands on standard input until it ends; whatever else is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        told = json.loads(line)
        try:
            reply = {"found": functions[told.pop("do")](**told)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)
