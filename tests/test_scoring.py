"""`peftrec score`: every row once and in order, streamed, continued after a kill, by one process or two.

This file is also the program that lives and dies: `python tests/test_scoring.py COMMAND.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from filelock import FileLock
from hub_helpers import contents_of
from hub_server import READ, HubServer
from samples import FILMS
from test_recommender import save_adapter

from peftrec import cli, scoring
from peftrec.histories import Histories
from peftrec.pairs import score_pairs
from peftrec.recommender import Recommender

ROOT = Path(__file__).parents[1]
ROWS, PART = 50, 8  # 7 parts, the last one of 2 rows


class Place:
    """A folder with an adapter, tables, and the command that scores them."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.adapter, self.pairs, self.log = folder / "adapter", folder / "pairs.parquet", folder / "log.csv"
        save_adapter(base, self.adapter)
        FILMS.write_csv(folder / "films.csv")
        rng = np.random.default_rng(7)
        events = {
            "uid": [f"u{user}" for user in rng.integers(0, 5, 60)],
            "item_id": rng.choice(FILMS["item_id"].to_numpy(), 60),
            "stars": rng.integers(1, 6, 60),
            "timestamp": rng.integers(0, 1000, 60),
        }
        pl.DataFrame(events).write_csv(self.log)
        asked = {
            "note": [f"row {row}" for row in range(ROWS)],
            "uid": [f"u{user}" for user in rng.integers(0, 6, ROWS)],
            "item_id": rng.choice(FILMS["item_id"].to_numpy(), ROWS),
            "timestamp": rng.integers(0, 1100, ROWS),
        }
        pl.DataFrame(asked).write_parquet(self.pairs, row_group_size=11)

    def command(self, output: str | Path, *more: str, **changed: str | Path) -> list[str]:
        """The command's arguments; `changed` options take the place of the usual ones."""
        options = {
            "input": self.pairs,
            "history": self.log,
            "items": self.folder / "films.csv",
            "base-model": self.base,
            "part-rows": str(PART),
            "output": output,
            **{name.replace("_", "-"): value for name, value in changed.items()},
        }
        adapter = str(options.pop("adapter", self.adapter))
        said = [text for name, value in options.items() if value for text in (f"--{name}", str(value))]
        return ["score", adapter, *said, "--columns", "user_id=uid", "rating=stars", *more]


@pytest.fixture(scope="module")
def place(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), tiny_llama_folder)


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """Scores of an uninterrupted run of one process."""
    output = place.folder / "whole"
    assert cli.main(place.command(output)) == 0
    return output


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "parts").iterdir())}


def run(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def manifest(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return found


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_every_row_once_in_order_with_its_columns(place: Place, whole: Path) -> None:
    names = [f"part-{number:05}.parquet" for number in range(7)]
    assert list(parts(whole)) == names
    assert [pl.read_parquet(whole / "parts" / name).height for name in names] == [PART] * 6 + [2]
    found = pl.read_parquet(whole / "parts")
    assert found.drop("score", "probability").equals(pl.read_parquet(place.pairs))
    assert found.columns[-2:] == ["score", "probability"]
    assert manifest(whole)["complete"] is True
    assert manifest(whole)["rows"] == ROWS


def test_scores_are_the_recommenders(place: Place, whole: Path) -> None:
    recommender = Recommender.from_pretrained(place.adapter, base_model=place.base, items=FILMS)
    assert recommender.catalogue.items is not None
    columns = {"user_id": "uid", "rating": "stars"}
    log = Histories.read(place.log, recommender.artifact, recommender.catalogue.items, columns)
    found = pl.read_parquet(whole / "parts")
    asked = score_pairs(recommender, pl.read_parquet(place.pairs), log, columns={"user_id": "uid"})
    np.testing.assert_allclose(found["score"], asked["score"], atol=1e-4)
    np.testing.assert_allclose(found["probability"], 1 / (1 + np.exp(-found["score"].to_numpy())))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tsv"])
def test_other_kinds_of_files(place: Place, whole: Path, tmp_path: Path, kind: str) -> None:
    pairs = pl.read_parquet(place.pairs)
    file = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        pairs.write_ndjson(file)
    else:
        pairs.write_csv(file, separator="\t" if kind == "tsv" else ",")
    assert cli.main(place.command(tmp_path / "scores", input=file)) == 0
    found, expected = (pl.read_parquet(output / "parts") for output in (tmp_path / "scores", whole))
    assert found["score"].equals(expected["score"])
    assert found["note"].equals(expected["note"])


def test_what_is_said(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, place.command(tmp_path / "scores"))
    assert (code, err) == (0, "")
    cold = pl.read_parquet(tmp_path / "scores" / "parts")
    lines = out.splitlines()
    assert lines[0].startswith(f"pairs: 50 in {place.pairs}, ")
    assert 0 < int(lines[0].split(", ")[1].split()[0]) < len(cold)
    assert lines[1].startswith("histories: ")
    assert lines[1].endswith("known before each pair's time")
    assert lines[-2].startswith("scored 50 pairs in ")
    assert lines[-1] == f"{tmp_path}/scores: complete, 50 rows in 7 parts; read {tmp_path}/scores/parts"
    before = parts(tmp_path / "scores")
    code, out, err = run(capsys, place.command(tmp_path / "scores"))
    assert (code, err) == (0, "")
    assert "scored" not in out
    assert "complete, 50 rows" in out
    assert parts(tmp_path / "scores") == before


def test_without_history_a_warning(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [text for text in place.command(tmp_path / "scores", history="") if text != "rating=stars"]
    _, out, _ = run(capsys, arguments)
    assert "warning: no history (--history LOG)" in out
    scores = pl.read_parquet(tmp_path / "scores" / "parts")
    spread = scores.group_by("item_id").agg(pl.col("score").max() - pl.col("score").min())["score"]
    assert spread.max() < 1e-4


def test_other_users_than_the_logs_are_noticed(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pl.read_parquet(place.pairs).with_columns(uid=pl.lit("U1")).write_parquet(tmp_path / "pairs.parquet")
    _, out, _ = run(capsys, place.command(tmp_path / "scores", input=tmp_path / "pairs.parquet"))
    assert "warning: no pair's user has events in " in out


# --- memory -----------------------------------------------------------------------------------------------------------

STREAM = """
import re, sys
from pathlib import Path
from peftrec import tables
def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
begin, most, rows = own(), 0, 0
for index, frame in tables.pieces(sys.argv[1], 4096):
    rows += len(frame)
    most = max(most, own() - begin)
print(rows, most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
@pytest.mark.parametrize(("kind", "first"), [("parquet", 300_000), ("csv", 1_200_000), ("jsonl", 300_000)])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, kind: str, first: int) -> None:
    """Tables of 60 and 180 MB, for CSV, of which 220 MB are read ahead, of 240 and 720."""
    most = []
    for number, rows in enumerate((first, 3 * first)):
        file = tmp_path / f"{number}.{kind}"
        noted = pl.DataFrame({"user_id": np.arange(rows), "item_id": np.arange(rows) % 7}).with_columns(
            note=pl.col("user_id").cast(pl.String).str.pad_start(180, "x")
        )
        write = {"parquet": noted.write_parquet, "csv": noted.write_csv, "jsonl": noted.write_ndjson}[kind]
        write(file, **({"row_group_size": 50_000} if kind == "parquet" else {}))  # type: ignore[operator]
        del noted
        done = subprocess.run(
            [sys.executable, "-c", STREAM, str(file)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        read, peak = done.stdout.split()
        assert int(read) == rows
        most.append(float(peak))
        file.unlink()
    assert most[1] < most[0] + 60, most


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    code, out, err = run(capsys, arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    return err.strip()


def test_refused_before_anything_is_written(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, good = tmp_path / "scores", pl.read_parquet(place.pairs)
    film = good.with_columns(item_id=pl.when(pl.int_range(pl.len()) == 30).then(99).otherwise("item_id"))
    tables = {
        "renamed.parquet": good.rename({"uid": "customer"}),
        "film.parquet": film,
        "scored.parquet": good.with_columns(score=1.0),
        "empty.parquet": good.clear(),
    }
    for name, table in tables.items():
        table.write_parquet(tmp_path / name)
    (tmp_path / "pairs.json").write_text("[]")
    (tmp_path / "broken.parquet").write_text("PAR1")
    messages = {
        "renamed.parquet": "renamed.parquet: no column 'user_id' (found note, customer",
        "film.parquet": "film.parquet: item_id in row 31 is 99; expected an id of the items table of 5 items",
        "scored.parquet": "scored.parquet: a column 'score' is there already",
        "empty.parquet": "empty.parquet: no rows; expected at least one pair",
        "pairs.json": "pairs.json: cannot be read piece by piece; expected one of .csv",
        "broken.parquet": "broken.parquet: cannot be read",
        "none.parquet": "none.parquet: no such file; expected a table of pairs",
        ".": "a folder; expected a table of pairs",
    }
    for name, message in messages.items():
        assert message in refused(capsys, place.command(output, input=tmp_path / name)), name
        assert not output.exists()
    assert "no such folder; expected a folder with an adapter" in refused(
        capsys, place.command(output, adapter=tmp_path / "no")
    )
    assert "no.csv: no such file" in refused(capsys, place.command(output, history=tmp_path / "no.csv"))
    assert "part_rows: 0; expected a whole number from 1" in refused(capsys, place.command(output, part_rows="0"))
    assert not output.exists()


def test_a_folder_with_other_things(place: Place, whole: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("thesis.md", "parts/cat.png", "parts/part-00000.parquet"):
        output = tmp_path / name.replace("/", "-")
        (output / name).parent.mkdir(parents=True)
        (output / name).write_bytes(b"precious")
        said = refused(capsys, place.command(output))
        assert said.startswith(f"{output}: holds other things than scores (")
        assert (output / name).read_bytes() == b"precious"
        assert sorted(path.name for path in output.iterdir()) == [name.split("/")[0]]
    file = tmp_path / "file"
    file.write_text("precious")
    assert "not a folder" in refused(capsys, place.command(file))


@pytest.mark.parametrize("what", ["adapter", "input", "history", "items", "columns", "prior", "part_rows"])
def test_another_job(place: Place, whole: Path, tmp_path: Path, capsys: Any, what: str) -> None:
    more: list[str] = []
    changed: dict[str, Any] = {}
    if what == "adapter":
        changed["adapter"] = save_adapter(place.base, tmp_path / "adapter", seed=5)
    elif what == "input":
        changed["input"] = tmp_path / "pairs.parquet"
        pl.read_parquet(place.pairs).with_columns(note=pl.lit("x")).write_parquet(changed["input"])
    elif what in ("history", "items"):
        changed[what] = tmp_path / "changed.csv"
        source = place.log if what == "history" else place.folder / "films.csv"
        changed[what].write_text(source.read_text().replace("10,", "11,", 1))
    elif what == "part_rows":
        changed["part_rows"] = "9"
    else:
        more = ["--no-prior"] if what == "prior" else ["title=title"]
    before = parts(whole)
    arguments = place.command(whole, *(more if what != "columns" else []), **changed)
    if what == "columns":
        arguments += more
    assert f"manifest.json: scores of another job, whose {what} differed" in refused(capsys, arguments)
    assert parts(whole) == before


def test_the_same_job_from_another_place(place: Place, whole: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "moved.parquet").write_bytes(place.pairs.read_bytes())
    code, out, _ = run(capsys, place.command(whole, input=tmp_path / "moved.parquet"))
    assert code == 0
    assert "complete, 50 rows" in out


@pytest.mark.parametrize("kind", ["run", "file", "Hub"])
def test_an_adapter_by_another_name(
    place: Place, whole: Path, server: HubServer, tmp_path: Path, capsys: Any, monkeypatch: Any, kind: str
) -> None:
    """It is looked for once, what it is called makes no other job, and another revision does."""
    monkeypatch.setenv("HF_TOKEN", READ)
    run_folder, more, asked = tmp_path / "run", [], 0
    named: str | Path = run_folder if kind == "run" else f"file:{place.adapter}"
    shutil.copytree(place.adapter, run_folder / "adapter")
    if kind == "Hub":
        named, more, asked = "me/films", ["--revision", "v1"], 2  # model_info and snapshot_download
        commit = server.put(named, contents_of(place.adapter), private=True)
        server.repos[named].tags["v1"] = commit
        server.put(named, contents_of(save_adapter(place.base, tmp_path / "other", seed=5)))
    output = tmp_path / "scores"
    code, out, err = run(capsys, place.command(output, adapter=named) + more)
    assert (code, err) == (0, ""), out
    assert parts(output) == parts(whole)
    assert manifest(output) == manifest(whole)
    assert sum("/revision/v1" in line for line in server.log) == asked
    if kind == "Hub":
        said = refused(capsys, place.command(output, adapter=named))
        assert "scores of another job, whose adapter differed" in said
    else:
        said = refused(capsys, [*place.command(output, adapter=named), "--revision", "v1"])
        assert "revision v1; a folder has no revisions; leave it out" in said


def test_two_at_once(place: Place, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "scores").mkdir()
    with FileLock(tmp_path / "scores" / ".lock"):
        code, _, err = run(capsys, place.command(tmp_path / "scores"))
    assert code == 2
    assert err.startswith(f"{tmp_path}/scores: another process is scoring into it")


# --- kills ------------------------------------------------------------------------------------------------------------

MOMENTS = {"open", "os.mkdir", "os.remove", "os.rename"}


class Reaper:
    """Counts what this process does to the file system below `folder`, and kills it at the `last` time."""

    def __init__(self, folder: str, last: int | None) -> None:
        self.folder, self.last = folder, last
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in MOMENTS or self.folder not in f"{arguments[0]}":
            return
        self.seen.append(event)
        if len(self.seen) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def life(arguments: Sequence[str], output: Path, *, at: int | None = None, after: float | None = None) -> bool:
    """One child that scores, killed at a moment or after so many seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            reaper = Reaper(str(output), at)
            write = scoring._write

            def noted(folder: Path, index: int, frame: pl.DataFrame) -> None:
                with output.with_suffix(".scored").open("a") as file:
                    file.write(f"{index} {len(list((folder / 'parts').iterdir()))}\n")
                write(folder, index, frame)

            scoring._write = noted
            code = cli.main(arguments)
            output.with_suffix(".moments").write_text(json.dumps(reaper.seen))
            os._exit(code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), output.with_suffix(".log").read_text()
    return status == 0


def main(plan: dict[str, Any]) -> None:
    """One whole life, then `tries` outputs, each with three lives that are cut short and one that may end."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401 -- the children need not

    folder, random = Path(plan["folder"]), np.random.default_rng(3)

    def arguments(output: Path) -> list[str]:
        return [str(output) if text == "OUTPUT" else text for text in plan["command"]]

    begin = time.monotonic()
    assert life(arguments(folder / "first"), folder / "first")
    seconds = time.monotonic() - begin
    moments = json.loads((folder / "first.moments").read_text())
    # Just before the first ones of these a part is written and not yet in its place.
    renames = [number for number, event in enumerate(moments, 1) if event == "os.rename"][1:5]
    found = []
    for number in range(plan["tries"]):
        output = folder / f"try-{number}"
        lives = []
        for turn in range(3):
            how = {"at": int(random.integers(1, len(moments)))}
            if turn == 0:
                how = (
                    {"after": random.uniform(0.3, 1.0) * seconds} if number % 2 else {"at": int(random.choice(renames))}
                )
            ended = life(arguments(output), output, **how)  # type: ignore[arg-type]
            left = [path.name for path in output.glob(".part-*")] if output.is_dir() else []
            done = len(list(output.glob("parts/*")))
            lives.append({**how, "ended": ended, "left": left, "parts": done})
        assert life(arguments(output), output)
        found.append(lives)
    (folder / "found.json").write_text(json.dumps({"seconds": seconds, "moments": len(moments), "tries": found}))


@pytest.mark.slow
def test_killed_at_any_moment_and_continued(place: Place, tmp_path: Path) -> None:
    tries = 6
    plan = {"folder": str(tmp_path), "tries": tries, "command": place.command("OUTPUT")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    expected = parts(tmp_path / "first")
    assert len(expected) == 7
    for number in range(tries):
        output = tmp_path / f"try-{number}"
        assert parts(output) == expected, number
        assert manifest(output)["complete"] is True
        assert not list(output.glob(".part-*")), "what was half-written is cleared"
        # A part is scored again only where the kill came before it was in place.
        scored = [int(line.split()[0]) for line in output.with_suffix(".scored").read_text().splitlines()]
        assert set(scored) == set(range(7))
        assert len(scored) <= 7 + 3
    lives = [one for lives in json.loads((tmp_path / "found.json").read_text())["tries"] for one in lives]
    assert sum(not one["ended"] for one in lives) >= tries, lives
    assert any(one["parts"] in range(1, 7) for one in lives), lives
    assert any(one["left"] for one in lives), "no kill came while a part was written"


# --- two processes ----------------------------------------------------------------------------------------------------


def launch(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    settings = ["--config_file", str(ROOT / "recipes" / "accelerate" / "multi_cpu.yaml"), "--main_process_port", "0"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *settings, "-m", "peftrec", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )


def test_two_processes_score_what_one_scores(place: Place, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores"
    done = launch(place.command(output))
    assert done.returncode == 0, done.stdout + done.stderr
    shares = sorted(line.split()[1] for line in done.stdout.splitlines() if line.startswith("scored "))
    assert shares == ["24", "26"], done.stdout
    assert done.stdout.count(f"{output}: complete, 50 rows in 7 parts") >= 1
    assert manifest(output) == manifest(whole)
    found, expected = (pl.read_parquet(folder / "parts") for folder in (output, whole))
    assert found.drop("score", "probability").equals(expected.drop("score", "probability"))
    np.testing.assert_allclose(found["score"], expected["score"], rtol=0, atol=1e-5)


def test_two_processes_continue_what_one_began(place: Place, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores"
    (output / "parts").mkdir(parents=True)
    (output / "manifest.json").write_text(json.dumps({**manifest(whole), "complete": False}))
    kept = ["part-00000.parquet", "part-00003.parquet"]
    for name in kept:
        (output / "parts" / name).write_bytes((whole / "parts" / name).read_bytes())
    before = {name: (output / "parts" / name).stat().st_mtime_ns for name in kept}
    done = launch(place.command(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{output}: 2 parts are there, 5 are to do" in done.stdout
    assert {name: (output / "parts" / name).stat().st_mtime_ns for name in kept} == before
    found, expected = (pl.read_parquet(folder / "parts") for folder in (output, whole))
    np.testing.assert_allclose(found["score"], expected["score"], rtol=0, atol=1e-5)
    assert manifest(output)["complete"] is True


def test_a_mistake_is_said_once_by_two(place: Place, tmp_path: Path) -> None:
    done = launch(place.command(tmp_path / "scores", input=tmp_path / "no.parquet"))
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("no.parquet: no such file; expected a table of pairs") == 1


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
