"""A table of pairs of any size -> Parquet parts with scores, by any number of processes, continued where it was killed.

    OUTPUT/manifest.json            what is scored with what, and whether all of it is there
    OUTPUT/parts/part-00000.parquet the input's first rows with their scores, in their order; then the next ones

The input is streamed. A part appears whole or not at all, and is scored by one process from start to end, so that its
scores do not depend on how often the run was killed, nor, for one number of threads, on how many processes share it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from peftrec import artifact, backbone, file_checks, loading, processes, tables
from peftrec.errors import DataError, PeftrecError
from peftrec.folders import sha256
from peftrec.pairs import Known, score_pairs
from peftrec.recommender import Recommender
from peftrec.record import atomic

FORMAT = 1
MANIFEST, PARTS, LOCK = "manifest.json", "parts", ".lock"
SCRATCH = (".part-", f".{MANIFEST}-")
PART_ROWS, CHECKED_ROWS = 4096, 1 << 18
STREAMED = (*tables.CSV_SUFFIXES, ".parquet", ".pq", ".jsonl", ".ndjson")

GRACE = 10  # seconds

Plan = TypeVar("Plan")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to score with what; paths as the command line has them.

    Attributes:
        adapter: see `Recommender.from_pretrained`.
        input: pairs, a Parquet, CSV or JSONL file; `user_id`, `item_id`, maybe `timestamp`, and what else is kept.
        output: folder of the scores, new or that of the same job.
        history: the log, see `histories.Histories.read`; None is nobody's history.
        items: the items table; None is that of the adapter's named data set.
        columns: our name -> name in these tables.
        base_model: see `Recommender.from_pretrained`.
        prior: whether the saved prior is added.
        part_rows: rows of a part; a history is read once for all pairs of its user in a part.
        revision: of the adapter on the Hub; None is main.
    """

    adapter: str
    input: str
    output: str
    history: str | None = None
    items: str | None = None
    columns: Mapping[str, str] | None = None
    base_model: str | None = None
    prior: bool = True
    part_rows: int = PART_ROWS
    revision: str | None = None

    def found(self) -> Job:
        """The same with the adapter's folder; see `loading.find` for what it raises."""
        return replace(self, adapter=str(loading.find(self.adapter, self.revision)), revision=None)

    def known(self) -> Known:
        """The tables beside the pairs; see `Known.read` for what it raises."""
        return Known.read(self.adapter, history=self.history, items=self.items, columns=self.columns)


@dataclass(frozen=True)
class Progress:
    """What one process did.

    Attributes:
        rows: of the whole input.
        parts: of the whole output.
        scored: rows that this process scored.
        seconds: that it took for them, loading left out.
        complete: whether all parts are there.
    """

    rows: int
    parts: int
    scored: int
    seconds: float
    complete: bool


def score_table(job: Job, say: Callable[[str], object] = print) -> Progress:
    """Score the pairs that have no scores yet; each process that `accelerate launch` started does a share.

    Args:
        job: what to do.
        say: called with each line that people may want to read, by the main process.

    Raises:
        ConfigError, DataError, HubError, ModelError: what the job names cannot be used.
        PeftrecError: the output holds other things, or another job's scores; or it cannot be written.
        SystemExit: in the other processes, where the main one raises.
    """
    state = processes.group()
    backbone.quiet()
    if processes.launched():
        backbone.use_all_cores(processes.on_this_machine())
    folder = Path(job.output)
    lock = FileLock(folder / LOCK, timeout=0)
    read: list[Known] = []  # by the main process while it looks

    def look() -> tuple[Job, int, list[int]]:
        found = job.found()  # once, since a branch of the Hub may move on
        _check(found)
        read.append(found.known())
        return found, *_begin(found, folder, lock, read[0], say)

    try:
        found, rows, missing = _of_main(state, look)
        job = found if Path(found.adapter).is_dir() else job.found()  # on another machine the Hub's cache is another
        mine = missing[state.process_index :: state.num_processes]
        known = read[0] if read else job.known() if mine else None
        scored, begin = 0, time.monotonic()
        if known is not None and mine:
            recommender = Recommender.from_pretrained(
                job.adapter, items=known.items, base_model=job.base_model, prior=job.prior
            )
            begin = time.monotonic()
            with tqdm(
                total=_rows(mine, rows, job.part_rows), desc="score", unit=" pairs", disable=_hidden(state)
            ) as bar:
                for index, frame in tables.pieces(job.input, job.part_rows, mine):
                    where = _rows_of(job, index, len(frame))
                    scores = score_pairs(recommender, frame, known.histories, columns=known.names(frame.columns, where))
                    _write(folder, index, pl.concat((frame, scores), how="horizontal"))
                    scored += len(frame)
                    bar.update(len(frame))
        seconds = time.monotonic() - begin
        parts = -(-rows // job.part_rows)
        complete = _there(folder).issuperset(range(parts))
        if complete and scored:
            # Whoever comes last finds all of them; nobody waits for the others, whose shares may take hours longer.
            _write_manifest(folder, {**_read_manifest(folder), "complete": True})
        return Progress(rows, parts, scored, seconds, complete)
    finally:
        lock.release()


def _of_main(state: Any, make: Callable[[], Plan]) -> Plan:
    """What the main process makes, in every process; its error is raised there alone, and ends the others."""
    found: list[Any] = [None]
    if state.is_main_process:
        try:
            found = [make()]
        except PeftrecError as error:
            found = [error]
    if state.num_processes > 1:
        broadcast_object_list(found, from_process=0)
    if isinstance(found[0], PeftrecError):
        if state.is_main_process:
            raise found[0]
        time.sleep(GRACE)  # a launcher ends all processes as soon as one has ended: the main one has to speak first
        raise SystemExit(2)
    plan: Plan = found[0]
    return plan


def _hidden(state: Any) -> bool | None:
    """Whether the progress bar is hidden; None is where nobody watches a terminal."""
    return None if state.is_main_process else True


# --- the input --------------------------------------------------------------------------------------------------------


def _check(job: Job) -> None:
    path = Path(job.input)
    if path.is_file() and not path.name.lower().endswith(STREAMED):
        raise DataError(
            f"{job.input}: cannot be read piece by piece; expected one of {', '.join(STREAMED)}: write the table as one"
        )
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{job.input}: {found}; expected a table of pairs, {', '.join(STREAMED)}")
    if job.part_rows < 1:
        raise DataError(f"part_rows: {job.part_rows}; expected a whole number from 1")


def _count(job: Job, known: Known) -> tuple[int, int]:
    """Rows of the input, and how many of them have no history; every row is looked at.

    Raises:
        DataError: something cannot be scored.
    """
    names = known.names(tables.column_names(tables.scan(job.input), job.input), job.input)
    rows = cold = 0
    for _, frame in tables.pieces(job.input, CHECKED_ROWS, columns=list(names.values())):
        where = job.input if not rows else f"{job.input}, from row {rows + 1:,} on"
        asked = known.asked(frame, where)
        cold += int((asked.first == asked.last).sum())
        rows += len(frame)
    if rows == 0:
        raise DataError(f"{job.input}: no rows; expected at least one pair below the header")
    return rows, cold


def _rows(parts: Sequence[int], rows: int, part_rows: int) -> int:
    return sum(min(part_rows, rows - part * part_rows) for part in parts)


def _rows_of(job: Job, index: int, height: int) -> str:
    first = index * job.part_rows
    return f"{job.input}, rows {first + 1:,} to {first + height:,}"


# --- the output -------------------------------------------------------------------------------------------------------


def _begin(job: Job, folder: Path, lock: FileLock, known: Known, say: Callable[[str], object]) -> tuple[int, list[int]]:
    """Rows of the input and the parts that are missing, once the output is this job's; a refusal writes nothing."""
    if mistake := processes.alone_by_mistake():
        say(f"warning: {mistake}")
    facts = _facts(job)
    found = _inspect(folder, facts)
    rows = int(found["rows"]) if found else _first_look(job, known, say)
    _open(folder, lock)
    there = _there(folder)
    missing = [part for part in range(-(-rows // job.part_rows)) if part not in there]
    found = _inspect(folder, facts)  # asked again, since from now on nobody else may write there
    if found is None or found["complete"] != (not missing):
        _write_manifest(folder, {"format": FORMAT, **facts, "rows": rows, "complete": not missing})
    if there:
        say(f"{folder}: {len(there):,} parts are there, {len(missing):,} are to do")
    return rows, missing


def _first_look(job: Job, known: Known, say: Callable[[str], object]) -> int:
    """Check the whole input and say what was found; its number of rows."""
    for warning in known.histories.warnings:
        say(f"warning: {warning}")
    rows, cold = _count(job, known)
    names = known.names(tables.column_names(tables.scan(job.input), job.input), job.input)
    how = "known before each pair's time" if "timestamp" in names else "whole, since the pairs have no time"
    say(f"pairs: {rows:,} in {job.input}, {cold:,} of them without history")
    say(f"histories: {len(known.histories):,} events of {len(known.histories.users):,} users, {how}")
    if job.history is None:
        say("warning: no history (--history LOG): every person is asked about as one of whom nothing is known")
    elif cold == rows:
        say(f"warning: no pair's user has events in {job.history} before its time; look whether the ids are the same")
    if known.about.prompt.user is not None:
        say("warning: the adapter's prompt shows what is known of a person, which is left empty here")
    return rows


def _inspect(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of this job's output, None where there is none yet.

    Raises:
        DataError: the folder is no folder, holds other things, or another job's scores.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: not a folder; expected a new one or that of the same job; choose another --output")
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in inside if name not in (MANIFEST, PARTS, LOCK) and not name.startswith(SCRATCH)]
    parts = list((folder / PARTS).iterdir()) if (folder / PARTS).is_dir() else []
    others += [f"{PARTS}/{path.name}" for path in parts if MANIFEST not in inside or _number(path) is None]
    if others:
        raise DataError(
            f"{folder}: holds other things than scores ({others[0]}); expected a new folder or that of the same job; "
            "choose another --output"
        )
    if MANIFEST not in inside:
        return None
    found = _read_manifest(folder)
    if other := [name for name, value in facts.items() if found.get(name) != value]:
        raise DataError(
            f"{folder / MANIFEST}: scores of another job, whose {' and '.join(other)} differed; expected the same to "
            "continue; choose another --output, or remove the folder"
        )
    return found


def _open(folder: Path, lock: FileLock) -> None:
    """Make the folder, let nobody else write there, and clear what a killed run left half-written."""
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        lock.acquire()
        for path in folder.iterdir():
            if path.name.startswith(SCRATCH):
                path.unlink(missing_ok=True)
    except Timeout:
        raise DataError(
            f"{folder}: another process is scoring into it; wait for it, or choose another --output"
        ) from None
    except OSError as error:
        raise PeftrecError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another --output"
        ) from error


def _facts(job: Job) -> dict[str, Any]:
    """What makes this job the same as another one: contents and settings, wherever the files lie."""
    adapter = Path(job.adapter)
    names = (*file_checks.WEIGHTS, file_checks.CONFIG, artifact.FILE, artifact.PRIOR_FILE)
    return {
        "adapter": {name: sha256(adapter / name) for name in names if (adapter / name).is_file()},
        "input": _hash(job.input),
        "history": _hash(job.history),
        "items": _hash(job.items),
        "columns": dict(sorted((job.columns or {}).items())),
        "base_model": job.base_model,
        "prior": job.prior,
        "part_rows": job.part_rows,
    }


def _hash(file: str | None) -> str | None:
    return None if file is None else sha256(Path(file)) if Path(file).is_file() else file


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({tables.first_line(error)}); remove the folder and begin again"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not {"rows", "complete"} <= found.keys():
        raise DataError(
            f"{path}: not a manifest of format {FORMAT}; expected what peftrec score wrote; choose another --output"
        )
    return found


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    with atomic(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(folder: Path, index: int, frame: pl.DataFrame) -> None:
    # What is half-written lies outside of `parts`, so that others may read that folder at any time.
    with atomic(folder / PARTS / f"part-{index:05}.parquet", scratch_in=folder) as scratch:
        frame.write_parquet(scratch)


def _there(folder: Path) -> set[int]:
    return {number for path in (folder / PARTS).iterdir() if (number := _number(path)) is not None}


def _number(path: Path) -> int | None:
    found = re.fullmatch(r"part-(\d{5,})\.parquet", path.name)
    return int(found[1]) if found else None
