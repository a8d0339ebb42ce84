"""The command: what each verb prints, and that every mistake is a line on stderr and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from peftrec import cli, cli_recommend, recommender, sources
from peftrec.config import Data
from peftrec.errors import DataError

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command in this process."""
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder with a user's own tables and a recipe for them."""
    events = pl.DataFrame({"uid": [1, 1, 2], "movieId": [1, 2, 1], "rating": [5, 1, 4], "timestamp": [1, 2, 3]})
    events.write_csv(tmp_path / "events.csv")
    pl.DataFrame({"movieId": [1, 2], "title": ["Heat", "Babe"]}).write_csv(tmp_path / "films.csv")
    (tmp_path / "recipe.yaml").write_text(
        f"data:\n  interactions: {tmp_path}/events.csv\n  items: {tmp_path}/films.csv\n  like_at: 4\n"
        "  columns: {user_id: uid, item_id: movieId}\noutput_dir: runs/mine\n"
    )
    return tmp_path


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "peftrec", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
    assert all(verb in done.stdout for verb in ("validate", "datasets", "recommend", "score", "evaluate"))
    assert min(seconds) < 1


def test_validate(capsys: Capture, tables: Path) -> None:
    code, out, err = run(capsys, "validate", f"{tables}/recipe.yaml", "--train.max_steps", "7")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tables}/recipe.yaml: valid\n")
    assert "7 steps" in out
    assert "runs/mine" in out


def test_validate_names_all_mistakes_at_once(capsys: Capture, tables: Path) -> None:
    code, out, err = run(
        capsys, "validate", f"{tables}/recipe.yaml", "--train.learning_rte", "1", "--prompt.layout", "pointwize"
    )
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2
    assert "learning_rate" in err
    assert "pointwise" in err


def test_validate_looks_at_the_files(capsys: Capture, tables: Path) -> None:
    mistakes = ["--data.columns.user_id", "user", "--prompt.item", "{title} {yeer}"]
    code, _, err = run(capsys, "validate", f"{tables}/recipe.yaml", *mistakes)
    assert code == 2
    events, films = err.splitlines()
    assert "events.csv: no column 'user'" in events
    assert "prompt.item: no column 'yeer'" in films


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(name="ml-10k"), r"data.name: no data set 'ml-10k'; expected one of amazon"),
        (Data(interactions="{}/events.csv", items="{}/films.csv", columns={"user_id": "uid"}), "no column 'item_id'"),
        (
            Data(interactions="{}/events.csv", items="{}/films.csv", columns={"user_id": "uid", "item_id": "movieId"}),
            "set data.like_at",
        ),
        (Data(records="{}/events.csv"), "no columns 'instruction', 'input', 'output'"),
    ],
)
def test_data_is_checked(tables: Path, data: Data, message: str) -> None:
    placed = {name: value.format(tables) if isinstance(value, str) else value for name, value in vars(data).items()}
    with pytest.raises(DataError, match=message):
        sources.check(Data(**placed))


def test_a_hub_data_set_is_not_fetched() -> None:
    sources.check(Data(interactions="someone/something"))


def test_datasets(capsys: Capture) -> None:
    code, out, _ = run(capsys, "datasets")
    assert code == 0
    assert out.startswith("ml-100k ")
    assert "data.folder: a folder with behaviors.tsv and news.tsv\n" in out


# --- recommend --------------------------------------------------------------------------------------------------------


class Fake:
    """Stands in for a loaded adapter: it records how it was loaded and scores items by the length of their title."""

    def __init__(self, folder: str, **options: Any) -> None:
        self.loaded = {"folder": folder, **options}
        self.parts = _parts()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts, name)


def _parts() -> Any:
    from peftrec import artifact
    from peftrec.catalogue import Catalogue
    from peftrec.loaded_adapter import LoadedAdapter
    from peftrec.target import Target

    class Scored(LoadedAdapter):
        def __init__(self) -> None:
            films = pl.DataFrame({"item_id": [1, 2, 3], "title": ["Heat", "Toy Story", "Babe: A Pig"]})
            self.prompt = artifact.PromptFormat(
                layout="timeline",
                header="",
                item="{title}",
                answers=[" no", " yes"],
                answer_ids=[1, 2],
                max_tokens=64,
                max_item_tokens=8,
            )
            self.artifact = artifact.Artifact(
                self.prompt,
                artifact.Base("a", "a", "f", 1, "float32"),
                artifact.Source("films", "0"),
                "0",
                like_at=4,
            )
            self.prior, self.target, self.sources = None, Target(), {}
            self.catalogue = Catalogue(films, "{title}")

        def _outputs(self, questions: Any) -> Any:
            return [np.array([[0.0, len(item.text) - 9] for item in one.candidates]) for one in questions]

    made = recommender.Recommender.__new__(recommender.Recommender)
    made._adapters = {"default": Scored()}
    return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Adapters loaded by the command, in order."""
    made: list[Fake] = []

    def from_pretrained(folder: str, **options: Any) -> Fake:
        made.append(Fake(folder, **options))
        return made[-1]

    monkeypatch.setattr(recommender.Recommender, "from_pretrained", from_pretrained)
    return made


def test_recommend(capsys: Capture, fake: list[Fake]) -> None:
    code, out, err = run(capsys, "recommend", "runs/x/adapter", "--history", "Heat:yes", "Fargo:2", "--no-prior")
    assert (code, err) == (0, "")
    assert fake[0].loaded["prior"] is False
    lines = out.splitlines()
    assert lines[0] == "Heat: yes"
    assert lines[1] == "Fargo: no  (not in the items table: read as it is)"
    assert [line.split()[0] for line in lines[3:]] == ["1", "2"]
    assert lines[3].endswith("+2.000  Babe: A Pig")
    assert "0.881" in lines[3]


def test_recommend_as_json(capsys: Capture, fake: list[Fake]) -> None:
    arguments = ["--history", "1:yes", "--candidates", "Toy Story", "Babe: A Pig", "--k", "1", "--json"]
    code, out, _ = run(capsys, "recommend", "runs/x/adapter", *arguments)
    found = json.loads(out)
    assert code == 0
    assert found["history"] == [{"title": "Heat", "item_id": 1, "label": 1}]
    assert [(one["title"], one["item_id"], one["score"]) for one in found["recommended"]] == [("Babe: A Pig", 3, 2.0)]


def test_cold_start(capsys: Capture, fake: list[Fake]) -> None:
    code, out, _ = run(capsys, "recommend", "runs/x/adapter", "--k", "2")
    assert code == 0
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "Toy Story (1995)"], "history[0]: 'Toy Story (1995)' has no answer behind a colon"),
        (["--history", "77:yes"], "history[0]: no item id '77'"),
        (["--k", "0"], "--k: 0; expected a whole number from 1"),
        (["--columns", "item_id=movieId"], "--columns: no --items"),
        (["--columns", "movieId", "--items", "x.csv"], "--columns: 'movieId'; expected OURS=THEIRS"),
    ],
)
def test_recommend_refuses_in_one_line(capsys: Capture, fake: list[Fake], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, "recommend", "runs/x/adapter", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


def test_no_such_adapter(capsys: Capture, tmp_path: Path) -> None:
    for folder, found in ((tmp_path, "no peftrec.json in it"), (tmp_path / "no", "no such folder")):
        code, _, err = run(capsys, "recommend", str(folder), "--history", "Heat:yes")
        assert code == 2
        assert err.startswith(f"{folder}: {found}")
        assert len(err.splitlines()) == 1


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, make_random_log: Any) -> Path:
    """A run folder with a recipe and predictions."""
    from peftrec import baselines, config, record

    log = make_random_log(5, users=8, events=20)
    rows = np.flatnonzero(log.split > 0)
    known = baselines.predict(log, "streaming")
    table = record.predictions(
        log,
        rows,
        task="click",
        score=np.linspace(-1, 1, len(rows)),
        baselines={"item_mean": known.scores["item_mean"][rows]},
    )
    record.write_predictions(tmp_path, table)
    recipe = config.parse_recipe({"data": {"name": "ml-100k"}, "output_dir": "x", "eval": {"bootstrap": 20}}, "r")
    (tmp_path / "config.yaml").write_text(config.dump_recipe(recipe))
    return tmp_path


def test_evaluate_prints_the_table_of_the_run(capsys: Capture, finished: Path) -> None:
    from peftrec import report

    code, out, err = run(capsys, "evaluate", str(finished))
    assert (code, err) == (0, "")
    assert out == report.compare_run(finished).table() + "\n"


def test_evaluate_as_json(capsys: Capture, finished: Path) -> None:
    from peftrec import report

    code, out, _ = run(capsys, "evaluate", str(finished), "--json", "--bootstrap", "0")
    assert code == 0
    found = json.loads(out)
    expected = report.compare_run(finished).facts()["metrics"]
    assert found["metrics"]["test/auc"] == pytest.approx(expected["test/auc"])
    assert found["intervals"]["adapter"]["test/auc"] == [None, None]
    code, out, _ = run(capsys, "evaluate", str(finished), "--split", "valid", "--json", "--bootstrap", "0")
    assert "valid/auc" in json.loads(out)["metrics"]


def test_evaluate_refuses_in_one_line(capsys: Capture, finished: Path) -> None:
    for arguments in ([str(finished / "no")], [str(finished), "--bootstrap", "-1"]):
        code, out, err = run(capsys, "evaluate", *arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1


# --- ends -------------------------------------------------------------------------------------------------------------


def test_interrupted(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_recommend, "_datasets", interrupted)
    assert run(capsys, "datasets") == (130, "", "")


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from peftrec import cli; sys.stdin.read(); sys.exit(cli.main(['datasets']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.stdin.close()
    with child.stderr as stderr:
        assert stderr.read() == b""
    assert child.wait() == 1


def test_unknown_arguments(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["datasets", "--wat"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --wat" in capsys.readouterr().err
