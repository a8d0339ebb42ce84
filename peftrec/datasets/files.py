"""Reading the files in which data sets are published: a folder that somebody downloaded -> frames, all columns text.

What a file must hold is said by the caller, and a file that does not is named. Numbers and times are parsed later, for
all sources alike, where a wrong value is named by its row.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftrec.errors import DataError

if TYPE_CHECKING:
    import polars as pl

PACKED = ".gz"


def matching(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each name or pattern in `folder` or, where it has none of them, in the folders right below it.

    Args:
        folder: What somebody unpacked.
        names: As published; `*` stands for anything. A file belongs to the longest name that it matches, and one
            that is there plain and gzipped counts once.
    """
    found: dict[str, list[Path]] = {}
    taken: set[Path] = set()
    for name in sorted(names, key=len, reverse=True):
        for where in ("", "*/"):
            paths = {
                path.with_name(path.name.removesuffix(PACKED)): path for path in folder.glob(where + name + PACKED)
            }
            paths |= {path: path for path in folder.glob(where + name)}
            if found.setdefault(name, [paths[key] for key in sorted(paths) if paths[key] not in taken]):
                break
            del found[name]
        taken.update(found.setdefault(name, []))
    return {name: found[name] for name in names}


def read_table(
    path: Path,
    columns: Sequence[str],
    *,
    separator: str = ",",
    header: bool = True,
    quoted: bool = False,
) -> pl.DataFrame:
    """Some columns of a separated file in UTF-8; bytes that are not are replaced.

    Args:
        path: The file.
        columns: Which to read, or, without a header, the name of each.
        separator: One character.
        header: Whether the first line names the columns.
        quoted: Whether quotation marks enclose values; otherwise they are part of them.

    Raises:
        DataError: A column is missing, or the file is not of this form.
    """
    import polars as pl

    try:
        frame = pl.read_csv(
            path,
            separator=separator,
            has_header=header,
            quote_char='"' if quoted else None,
            infer_schema=False,
            encoding="utf8-lossy",
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from error
    if not header:
        if frame.width < len(columns):
            raise DataError(f"{path}: {frame.width} columns; expected {len(columns)}: {', '.join(columns)}")
        return frame.select(frame.columns[: len(columns)]).rename(dict(zip(frame.columns, columns, strict=False)))
    _check_columns(path, frame.columns, columns)
    return frame.select(columns)


def read_escaped(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    r"""Some columns of a file in Latin-1 with `;` between quoted values, in which `\` protects a quotation mark.

    Raises:
        DataError: A column is missing, or the file is not of this form.
    """
    import polars as pl

    with path.open(encoding="latin-1", newline="") as file:
        rows = csv.reader(file, delimiter=";", escapechar="\\", doublequote=False)
        try:
            found = next(rows, [])
            _check_columns(path, found, columns)
            places = [found.index(name) for name in columns]
            values = [[row[place] for place in places] for row in rows if len(row) > max(places)]
        except csv.Error as error:
            raise _unreadable(path, error) from error
    return pl.DataFrame(values, schema=dict.fromkeys(columns, pl.String), orient="row")


def read_parts(path: Path, columns: Sequence[str], *, between: str = "::", encoding: str = "utf8") -> pl.DataFrame:
    """A file without header whose values stand between separators of several characters; the last may hold more.

    Raises:
        DataError: A line has fewer values.
    """
    import polars as pl

    try:
        lines = pl.read_csv(
            path, separator="\t", has_header=False, quote_char=None, encoding=encoding, new_columns=["line"]
        )
    except (pl.exceptions.PolarsError, OSError, UnicodeError) as error:
        raise _unreadable(path, error) from error
    frame = lines.select(pl.col("line").cast(pl.String).str.splitn(between, len(columns))).unnest("line")
    frame = frame.rename(dict(zip(frame.columns, columns, strict=True)))
    if short := frame[columns[-1]].is_null().sum():
        raise DataError(f"{path}: {short} lines without {len(columns)} values; expected {between.join(columns)}")
    return frame


def read_lines(path: Path, schema: Mapping[str, Any], needed: Sequence[str]) -> pl.DataFrame:
    """Some fields of a file with one JSON object a line; a field that a line leaves out is null.

    Args:
        path: The file.
        schema: Field -> polars type, `String` for whatever is text in some lines and a number in others.
        needed: Fields that some line has to have.

    Raises:
        DataError: A line is no JSON object, or no line has one of `needed`.
    """
    import polars as pl

    try:
        frame = pl.read_ndjson(path, schema=dict(schema))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from error
    if absent := [name for name in needed if frame[name].is_null().all()]:
        raise DataError(f"{path}: no line has {', '.join(absent)}; expected {', '.join(schema)} in JSON lines")
    return frame


def counted(frame: pl.DataFrame, keep: pl.Expr, where: str, what: str) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The rows to keep, and the line that counts the others."""
    kept = frame.filter(keep)
    gone = frame.height - kept.height
    return kept, (f"{where}: {gone} {what} dropped",) if gone else ()


def _check_columns(path: Path, found: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in found]:
        raise DataError(
            f"{path}: no column {', '.join(missing)} (found {', '.join(found)}); expected {', '.join(columns)}, as "
            "published"
        )


def _unreadable(path: Path, error: BaseException) -> DataError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
    return DataError(f"{path}: cannot be read ({said}); expected the file as it is published")
