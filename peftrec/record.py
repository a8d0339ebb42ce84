"""What a run leaves behind besides its adapter: run.json and predictions.parquet.

Everything in them was measured or read, nothing typed by hand: tables, figures and the model card are made from these
two files, and anyone can compute every metric again from the predictions alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from peftrec.errors import DataError, PeftrecError
from peftrec.interactions import Interactions
from peftrec.metrics import slices
from peftrec.sources import Task
from peftrec.split import SPLITS

if TYPE_CHECKING:
    from peftrec.split import Log

FORMAT = 2
RUN, PREDICTIONS = "run.json", "predictions.parquet"
ADAPTER, NO_PRIOR = "adapter", "adapter_no_prior"
BASE_MODEL, BASE_MODEL_NO_PRIOR = "base_model", "base_model_no_prior"
"""Names of the model's own scorers; the others are baselines."""
TRUTH: dict[Task, str] = {"click": "label", "rating": "rating"}
"""Column of the answers in predictions.parquet."""

_BASELINE, _SLICE = "baseline/", "slice/"
_PACKAGES = ("peftrec", "torch", "transformers", "peft", "accelerate", "polars", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, as run.json holds it. Figures that are not defined are null.

    Attributes:
        task: what was predicted: click or rating.
        metrics: of the adapter, flat: `test/auc`, `test/auc|cold_item`.
        intervals: scorer -> metric -> [low, high], 95 %.
        differences: other scorer -> metric -> adapter minus it: {difference, low, high}, 95 %, paired.
        baselines: other scorer -> metric -> figure.
        slices: `all` and each slice -> {rows, users, positives} that were scored; of ratings `mean_rating` in place of
            `positives`.
        data: see `data_facts`.
        prompt: the recipe's section and what the text of an event came to.
        model: base model, as `peftrec.backbone.BaseModel` says it.
        adapter: {method, config, trainable_parameters, bytes}.
        train: see `train_facts`.
        eval: {history, ties, rows, seconds} and the rest of the recipe's section.
        warnings: of the data and of the comparison, one line each.
        versions: see `versions`.
        hardware: see `hardware`.
        seed: the recipe's.
        exposure: see `exposure.exposure`; of an older version empty.
        created: when the record was made, UTC, ISO 8601.
        format: of this file.
    """

    task: Task
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Mapping[str, Sequence[float | None]]]
    differences: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    baselines: Mapping[str, Mapping[str, float | None]]
    slices: Mapping[str, Mapping[str, float | None]]
    data: Mapping[str, Any]
    prompt: Mapping[str, Any]
    model: Mapping[str, Any]
    adapter: Mapping[str, Any]
    train: Mapping[str, Any]
    eval: Mapping[str, Any]
    seed: int
    warnings: Sequence[str] = ()
    exposure: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=lambda: versions())
    hardware: Mapping[str, Any] = field(default_factory=lambda: hardware())
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    format: int = FORMAT


def write_record(run: str | Path, record: RunRecord) -> Path:
    """Write `run`/run.json, whole or not at all.

    Raises:
        PeftrecError: the file cannot be written.
    """
    fields = {one.name: getattr(record, one.name) for one in dataclasses.fields(record)}
    content = _plain({"format": fields.pop("format"), **fields})
    path = Path(run) / RUN
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_record(run: str | Path) -> RunRecord:
    """Read `run`/run.json; keys that this version does not know are left out.

    Raises:
        DataError: there is none, or it is not a run record of this format.
    """
    path = Path(run) / RUN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(_not_a_run(path, error)) from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); expected what a peftrec run wrote; run it again") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found not in (1, FORMAT):
        raise DataError(f"{path}: format {found!r}; this version reads format {FORMAT}; read it with a newer peftrec")
    if found == 1:  # it knew one task only
        content["task"] = "click"
    content.setdefault("exposure", {})
    names = [one.name for one in dataclasses.fields(RunRecord)]
    missing = [name for name in names if name not in content]
    if missing:
        raise DataError(f"{path}: no key {', '.join(missing)}; expected what a peftrec run wrote; run it again")
    return RunRecord(**{name: content[name] for name in names})


def data_facts(interactions: Interactions, log: Log, task: Task) -> dict[str, Any]:
    """Name, hash and warnings of the data, and for each split its rows, users, items, answers and times.

    Answers of clicks are `positives`; those of ratings `mean_rating` and `ratings`, how often each was given, beside
    the `scale` of all. `first` and `last` are timestamps in seconds (row numbers where the source has no times).
    """
    per_split = {}
    for code, name in enumerate(SPLITS):
        rows = log.rows(code)
        time, item = log.timestamp[rows], log.item[rows]
        per_split[name] = {
            "rows": len(rows),
            "users": len(np.unique(log.user[rows])),
            "items": len(np.unique(item[item >= 0])),
            **_answers(log, rows, task),
            "first": int(time.min()) if len(time) else None,
            "last": int(time.max()) if len(time) else None,
        }
    return {
        "name": interactions.name,
        "sha256": interactions.sha256,
        "rows": len(log),
        "users": len(np.unique(log.user)),
        "items": len(np.unique(log.item[log.item >= 0])),
        **({"scale": list(log.scale)} if task == "rating" else {}),
        "splits": per_split,
        "warnings": list(interactions.warnings),
    }


def _answers(log: Log, rows: npt.NDArray[np.int64], task: Task) -> dict[str, Any]:
    if task == "click":
        return {"positives": int(log.label[rows].sum(dtype=np.int64))}
    assert log.rating is not None
    ratings = log.rating[rows].astype(np.float64)
    counts = np.bincount(log.label[rows], minlength=len(log.scale))
    return {
        "mean_rating": float(ratings.mean()) if len(rows) else None,
        "ratings": {f"{rating:g}": int(count) for rating, count in zip(log.scale, counts, strict=True)},
    }


def train_facts(
    *,
    seconds: float,
    events: int,
    tokens: int,
    steps: int,
    best_step: int | None,
    log: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """What training was: the fields of `peftrec.train.Fitted`, with rates and Trainer's log.

    Args:
        seconds: of training alone.
        events: learned from, repetitions counted.
        tokens: read while learning.
        steps: of the optimizer.
        best_step: whose weights were kept.
        log: Trainer's log history.
    """
    return {
        "seconds": seconds,
        "events": events,
        "tokens": tokens,
        "events_per_second": events / seconds if seconds else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "steps": steps,
        "best_step": best_step,
        "log": [dict(line) for line in log],
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that decide its figures; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware(accelerators: Sequence[str] = ()) -> dict[str, Any]:
    """Processor, cores that this process may use, memory (GB, 10^9 bytes) and names of the accelerators used."""
    try:
        memory: float | None = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):  # not on every system
        memory = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_name(), "cores": cores, "memory_gb": memory, "accelerators": list(accelerators)}


def predictions(
    log: Log,
    rows: npt.ArrayLike,
    *,
    task: Task,
    score: npt.ArrayLike,
    answer: npt.ArrayLike | None = None,
    score_no_prior: npt.ArrayLike | None = None,
    prior: npt.ArrayLike | None = None,
    base_score: npt.ArrayLike | None = None,
    baselines: Mapping[str, npt.ArrayLike] | None = None,
    groups: Mapping[str, npt.NDArray[np.bool_]] | None = None,
) -> pl.DataFrame:
    """The table of predictions.parquet: all that is needed to measure again.

    A score is the log-odds of label 1, or the predicted rating.

    Args:
        log: all events.
        rows: which of them were scored, indices (m,).
        task: what was predicted.
        score: of the model, with its prior if it has one (m,).
        answer: the most probable rating (m,), where the model says one.
        score_no_prior: of the model alone (m,), where there is a prior.
        prior: the prior's own score (m,), where there is one.
        base_score: of the untrained base model (m,), if it was measured.
        baselines: name -> scores (m,).
        groups: name -> members among the log's users (number of users,); see `user_groups.user_groups`.

    Returns:
        `user_id`, `item_id` (null for prompt records), `timestamp`, `label` (clicks only), `rating` where there is one,
        `split`, `score`, then `answer`, `prior`, `score_no_prior` and `base_score` as far as they were given, a column
        `baseline/NAME` for each baseline and `slice/NAME` for each slice and group.
    """
    rows = np.asarray(rows, dtype=np.int64)
    item = log.item[rows]
    columns: dict[str, Any] = {
        "user_id": log.user_ids.gather(log.user[rows]),
        "item_id": (
            log.items["item_id"].gather(item)
            if len(item) and (item >= 0).all()
            else pl.Series([None] * len(rows), dtype=pl.String)
        ),
        "timestamp": log.timestamp[rows],
    }
    if task == "click":
        columns["label"] = log.label[rows]
    if log.rating is not None:
        columns["rating"] = log.rating[rows]
    columns |= {"split": pl.Series(SPLITS).gather(log.split[rows]), "score": np.asarray(score, dtype=np.float64)}
    optional = {"answer": answer, "prior": prior, "score_no_prior": score_no_prior, "base_score": base_score}
    columns |= {name: np.asarray(given) for name, given in optional.items() if given is not None}
    columns |= {_BASELINE + name: np.asarray(given) for name, given in (baselines or {}).items()}
    columns |= {_SLICE + name: member[rows] for name, member in slices(log).items()}
    columns |= {_SLICE + name: member[log.user[rows]] for name, member in (groups or {}).items()}
    return pl.DataFrame(columns)


def scorers(table: pl.DataFrame, *, trained: bool = True) -> dict[str, npt.NDArray[np.float64]]:
    """Scorer -> score of each row of a predictions table: the model first, the baselines last.

    Args:
        table: see `predictions`.
        trained: whether the model had an adapter (`adapter.method` is not none).
    """
    found = {ADAPTER if trained else BASE_MODEL: table["score"]}
    own = table["score_no_prior"] if "score_no_prior" in table.columns else _prior_taken_off(table)
    if own is not None:
        found[NO_PRIOR if trained else BASE_MODEL_NO_PRIOR] = own
    if "base_score" in table.columns:
        found[BASE_MODEL] = table["base_score"]
    found |= dict(_columns(table, _BASELINE))
    return {name: column.to_numpy().astype(np.float64) for name, column in found.items()}


def answers(table: pl.DataFrame, *, trained: bool = True) -> dict[str, npt.NDArray[np.float64]]:
    """Scorer -> most probable rating of each row, for those that say one; arguments as `scorers`."""
    if "answer" not in table.columns:
        return {}
    return {ADAPTER if trained else BASE_MODEL: table["answer"].to_numpy().astype(np.float64)}


def _prior_taken_off(table: pl.DataFrame) -> pl.Series | None:
    """The model's own score in a run of format 1, which kept the sum and the prior (0 without one)."""
    if "prior" not in table.columns or not (table["prior"] != 0).any():
        return None
    # The model scored in float32; rounding to it undoes the addition exactly, ties included.
    return (table["score"] - table["prior"]).cast(pl.Float32)


def members(table: pl.DataFrame) -> dict[str, npt.NDArray[np.bool_]]:
    """Slice -> which rows of a predictions table belong to it."""
    return {name: column.to_numpy() for name, column in _columns(table, _SLICE)}


def write_predictions(run: str | Path, table: pl.DataFrame) -> Path:
    """Write `run`/predictions.parquet, whole or not at all.

    Raises:
        PeftrecError: the file cannot be written.
    """
    path = Path(run) / PREDICTIONS
    with atomic(path) as scratch:
        table.write_parquet(scratch)
    return path


def read_predictions(run: str | Path) -> pl.DataFrame:
    """Read `run`/predictions.parquet.

    Raises:
        DataError: there is none, or columns are missing.
    """
    path = Path(run) / PREDICTIONS
    try:
        table = pl.read_parquet(path)
    except OSError as error:
        raise DataError(_not_a_run(path, error)) from None
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not a Parquet file ({reason}); expected what a peftrec run wrote") from None
    missing = [name for name in ("user_id", "split", "score") if name not in table.columns]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)} (found {', '.join(table.columns)}); run it again")
    return table


@contextmanager
def atomic(path: Path, scratch_in: Path | None = None) -> Iterator[Path]:
    """A scratch file that becomes `path` when the block ends well, and is gone when it does not.

    Args:
        path: the file.
        scratch_in: a folder of the same filesystem; None is that of `path`.

    Raises:
        PeftrecError: the file cannot be written (disk full, folder missing or not writable).
    """
    scratch: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=scratch_in or path.parent, prefix=f".{path.name}-", suffix=path.suffix)
        os.close(handle)
        scratch = Path(name)
        yield scratch
        # mkstemp lets nobody else read the file; a run folder is as open as the person's other files.
        scratch.chmod(0o666 & ~_umask())
        os.replace(scratch, path)  # noqa: PTH105 -- the reader knows this name as the atomic one
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise PeftrecError(
            f"{path}: cannot be written ({reason}); nothing was left behind; free space or choose another output_dir"
        ) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _columns(table: pl.DataFrame, prefix: str) -> Iterator[tuple[str, pl.Series]]:
    return ((name.removeprefix(prefix), table[name]) for name in table.columns if name.startswith(prefix))


def _not_a_run(path: Path, error: OSError) -> str:
    reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    return f"{path}: {reason}; expected the output_dir of a finished peftrec run; check the path"


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), None) or platform.processor() or None


def _plain(value: Any) -> Any:
    """JSON's own types; what is not a finite number becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)
