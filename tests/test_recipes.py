"""The recipe as people run it: a process of its own, its files afterwards, and what it says of mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hub_server import WRITE, HubServer
from safetensors.numpy import load_file

from peftrec import Recommender, artifact, assets, card, cli, config, contents, handover, record, reload, report
from peftrec.contents import list_files

ROOT = Path(__file__).parents[1]
FINETUNE = ROOT / "recipes" / "finetune.py"
# Those beside the folders hold several recipes, or want files of one's own.
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*/*.yaml"))
FOLDER = {"config.yaml", "run.json", "predictions.parquet", "figures", "adapter"}
ADAPTER = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "peftrec.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def finetune(*arguments: Any, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, FINETUNE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def check_card(run: Path) -> None:
    """The adapter's folder is ready to be published, with its card and the figures that it shows."""
    page = (run / "adapter/README.md").read_text(encoding="utf-8")
    repo_id = config.load_recipe(run / "config.yaml").hub.repo_id
    assert page == card.card_of(run, repo_id=repo_id if repo_id and not repo_id.startswith("file:") else None)
    shown = re.findall(r"\]\(figures/(.*?)\)", page)
    assert set(shown) == {path.name for path in (run / "adapter/figures").iterdir()}
    assert len(shown) >= 3
    assert contents.check_folder(run / "adapter") == []


def check_folder(run: Path) -> record.RunRecord:
    """Everything that a run promises is there, and the predictions alone give the same figures again."""
    assert {path.name for path in run.iterdir()} == FOLDER
    assert {path.name for path in (run / "adapter").iterdir()} >= ADAPTER
    check_card(run)
    assert len(artifact.read(run / "adapter").recorded) == 8
    found = record.read_record(run)
    again = report.compare_run(run).facts()
    assert again["metrics"].keys() == found.metrics.keys()
    for key, value in again["metrics"].items():
        assert np.isnan(value) if found.metrics[key] is None else value == pytest.approx(found.metrics[key], abs=1e-12)
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    # These begin as zeros; a head that begins so too passes nothing on in its first step.
    trained = [
        tensor
        for name, tensor in weights.items()
        if "lora_B" in name or name.endswith(("classifier.weight", "score.weight"))
    ]
    assert any(np.abs(tensor).max() > 0 for tensor in trained)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipe_runs_two_steps(path: Path, tmp_path: Path) -> None:
    """Real data and the real base model; the person's table and the adapter folder are there at the end."""
    small = {
        "train.max_steps": 2,
        "train.evals": 1,
        "train.gradient_accumulation_steps": 1,
        "data.sample_users": 40,
        "prompt.max_tokens": 256,
        "eval.max_valid_rows": 20,
        "eval.max_test_rows": 40,
        "output_dir": tmp_path / "run",
    }
    if config.load_recipe(path).prompt.layout == "timeline":
        small["prompt.overlap"] = 64
    done = finetune("--config", path, *(word for key, value in small.items() for word in (f"--{key}", value)))
    found = check_folder(tmp_path / "run")
    assert found.train["steps"] == 2
    rates = found.task == "rating"
    drawn = {"loss", "calibration", "slices"} | ({"ratings", "errors"} if rates else {"roc"})
    assert {path.stem for path in (tmp_path / "run/figures").iterdir()} == drawn
    untrained = ["base_model"] if config.load_recipe(path).score.head == "tokens" else []
    assert set(found.baselines) >= {"item_mean", "bias", "popularity", *(["mf"] if rates else untrained)}
    for words in ("user+item bias", f"{'RMSE' if rates else 'AUC'} by slice", "best of", "everything is in"):
        assert words in done.stdout
    if path.stem in ("click_lora_demo", "click_encoder"):
        check_plain_snippet(tmp_path / "run/adapter")


def check_plain_snippet(adapter: Path) -> None:
    """PEFT and transformers, the files of the card's folder and of the named wheels, and nothing of peftrec."""
    about = artifact.read(adapter)
    packaged = assets.MODELS[about.base_model.name]
    place = Path(packaged.members[0]).parent if about.base_model.note else Path(str(packaged.hub_id))
    (adapter / place).parent.mkdir(parents=True, exist_ok=True)
    (adapter / place).symlink_to(assets.wheel_file(packaged).parent)
    page = (adapter / "README.md").read_text(encoding="utf-8")
    (snippet,) = [one for one in re.findall(r"^```python\n(.*?)^```", page, flags=re.S | re.M) if "PeftModel" in one]
    code = f"{snippet}\nimport sys\nassert not any(name.startswith('peftrec') for name in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=adapter,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(about.probes[0].score, abs=1e-4)


def test_a_card_that_cannot_be_made_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handover.write_card(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: no model card ({tmp_path}/config.yaml: cannot be read;")
    assert line.endswith(f"the run is complete; peftrec card {tmp_path} tries again")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's own data under other names: 24 users, 30 films, 20 ratings each, and the same as prompt records."""
    folder = tmp_path_factory.mktemp("tables")
    random = np.random.default_rng(5)
    user = np.repeat(np.arange(24), 20)
    film = np.concatenate([random.permutation(30)[:20] for _ in range(24)])
    stars = np.clip(np.round(3.4 + (film % 5 - 2) * 0.6 + random.normal(size=len(user))), 1, 5).astype(int)
    seconds = 1_000_000 + random.permutation(len(user)) // 3 * 60  # some share their second
    pl.DataFrame({"uid": user, "movieId": film, "stars": stars, "ts": seconds}).write_csv(folder / "ratings.csv")
    pl.DataFrame({"movieId": np.arange(30), "title": [f"Film {k}" for k in range(30)]}).write_csv(folder / "films.csv")
    people = {"uid": np.arange(24), "job": ["cook", "baker"] * 12}
    pl.DataFrame(people).write_csv(folder / "people.csv")
    lines = [
        {"instruction": "Will they like it?", "input": f"Film {f}", "output": "Yes." if s >= 4 else "No."}
        for f, s in zip(film.tolist(), stars.tolist(), strict=True)
    ]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def own_recipe(tables: Path, model: Path, run: Path, *, data: str, prompt: str = "", more: str = "") -> Path:
    text = f"""
task: click
data: {data}
prompt: {{max_tokens: 256, {prompt}}}
model: {{name: {model}, dtype: float32}}
adapter: {{method: lora, r: 4, lora_alpha: 8}}
train: {{max_steps: 3, evals: 1, learning_rate: 1.0e-2, gradient_accumulation_steps: 1, logging_steps: 1}}
eval: {{bootstrap: 20, recommend_k: 3{", " + more if more else ""}}}
output_dir: {run}
"""
    path = tables / f"{run.name}.yaml"
    path.write_text(text)
    return path


FILM_COLUMNS: dict[str, Any] = {"columns": {"item_id": "movieId"}}
COLUMNS = "columns: {user_id: uid, item_id: movieId, rating: stars, timestamp: ts}, like_at: 4"


@pytest.mark.parametrize(
    ("split", "prompt", "more"),
    [
        ("{kind: leave_last_out}", "overlap: 64", "history: frozen"),
        (
            "{kind: kfold, folds: 4, valid: 0.2}",
            "overlap: 64, history: liked",
            "history: frozen, user_groups: [job]",
        ),
        (
            "{kind: cold_item, valid: 0.2, test: 0.2}",
            'layout: pointwise, template: "{history}? {item}:"',
            "ties: order",
        ),
    ],
    ids=["leave_last_out", "kfold", "cold_item"],
)
def test_own_tables(tables: Path, tiny_llama_folder: Path, tmp_path: Path, split: str, prompt: str, more: str) -> None:
    people = f"users: {tables}/people.csv, " if "user_groups" in more else ""
    data = f"{{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {people}{COLUMNS}, split: {split}}}"
    path = own_recipe(tables, tiny_llama_folder, tmp_path / "run", data=data, prompt=prompt, more=more)
    curve = "isotonic" if "kfold" in split else "none"
    finetune("--config", path, "--score.calibration", curve)
    found = check_folder(tmp_path / "run")
    assert bool(artifact.read(tmp_path / "run/adapter").target.calibration) is (curve == "isotonic")
    assert found.data["rows"] == 480
    assert [name for name in found.slices if "=" in name] == (["job=baker", "job=cook"] if people else [])
    assert ("By job it serves the group" in (tmp_path / "run/adapter/README.md").read_text()) is bool(people)
    recommender = Recommender.from_pretrained(tmp_path / "run/adapter", items=tables / "films.csv", **FILM_COLUMNS)
    assert len(recommender.rank([("Film 1", 1)], k=3)) == 3
    table = record.read_predictions(tmp_path / "run")
    counted = {name: facts["rows"] for name, facts in found.data["splits"].items() if name != "train"}
    assert dict(table["split"].value_counts().iter_rows()) == counted
    assert str(tiny_llama_folder) not in (tmp_path / "run/adapter/peftrec.json").read_text()
    assert str(tiny_llama_folder) not in (tmp_path / "run/adapter/adapter_config.json").read_text()


def test_clicks_alone(tables: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Of a log without answers: drawn items are asked for and shown to nobody, at the end and in the adapter, too."""
    log = pl.read_csv(tables / "ratings.csv").drop("stars")
    log.write_csv(tmp_path / "opened.csv")
    columns = "columns: {user_id: uid, item_id: movieId, timestamp: ts}, split: {valid: 0.2, test: 0.2}"
    data = f"{{interactions: {tmp_path}/opened.csv, items: {tables}/films.csv, sampled_negatives: 1, {columns}}}"
    path = own_recipe(tmp_path, tiny_llama_folder, tmp_path / "run", data=data, prompt="overlap: 64, history: liked")
    finetune("--config", path, *("--score.prior", "mf", "--score.calibration", "temperature"))
    found = check_folder(tmp_path / "run")
    clicks = sum(facts["positives"] for facts in found.data["splits"].values())
    assert clicks == log.height
    assert 1.6 * clicks < found.data["rows"] <= 2 * clicks
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert "before the prior is added and scores are calibrated." in card
    assert "no rate of clicks" in card
    about = artifact.read(tmp_path / "run/adapter")
    assert about.clicks_alone
    assert len(about.target.calibration) == 2
    shown = about.prompt.example
    assert shown.count(" yes") > 1
    assert " no" not in shown


def test_seeds_teach_one_adapter(
    tables: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pupil of two seeds learns something else than alone and says who taught it."""
    data = f"{{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {COLUMNS}}}"
    path = own_recipe(tmp_path, tiny_llama_folder, tmp_path / "alone", data=data, prompt="overlap: 64")
    elders = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate([*elders, tmp_path / "alone"], 1):
        finetune("--config", path, "--seed", seed, "--output_dir", run)
    taught = ("--seed", "3", "--train.teachers", json.dumps(list(map(str, elders))), "--train.distill", "0.75")
    finetune("--config", path, *taught, "--output_dir", tmp_path / "pupil")
    facts = check_folder(tmp_path / "pupil").adapter["taught_by"]
    assert facts["share"] == 0.75
    assert [one["name"] for one in facts["runs"]] == ["one", "two"]
    weights = [load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("pupil", "alone")]
    assert not all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert "taken for 0.25 of its own and 0.75 of what earlier" in (tmp_path / "pupil/adapter/README.md").read_text()
    assert cli.main(["validate", str(path), *taught]) == 0
    assert "their answers count 0.75" in capsys.readouterr().out
    other = finetune("--config", path, *taught, "--data.split.test", "0.3", "--output_dir", tmp_path / "x", expect=2)
    assert "another data than this recipe" in other.stderr
    assert not (tmp_path / "x").exists()


def test_prompt_records(tables: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = f"{{records: {tables}/records.jsonl, split: {{kind: kfold, folds: 4, valid: 0.2}}}}"
    path = own_recipe(tables, tiny_llama_folder, tmp_path / "run", data=data, prompt="layout: pointwise")
    finetune("--config", path)
    found = check_folder(tmp_path / "run")
    assert set(found.baselines) == {"base_model", "global_mean"}
    about = artifact.read(tmp_path / "run/adapter")
    assert {one.record["input"] for one in about.record_probes} <= {f"Film {number}" for number in range(30)}
    assert len(set(about.recorded)) > 1
    assert reload.scores(tmp_path / "run/adapter") == pytest.approx(about.recorded, abs=1e-5)


def test_prompt_records_as_events(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The adapter is one like that of a table: it has the prior, and ranks titles."""

    def record(number: int) -> dict[str, str]:
        liked, other, target = (f'"Film {(number * step) % 7}"' for step in (1, 2, 3))
        told = f"User Preference: {liked}\nUser Unpreference: {other}\n"
        asked = f"Whether the user will like the target movie {target}?"
        return {"instruction": "", "input": told + asked, "output": ["Yes.", "No."][number % 2]}

    files = {}
    for name, start in (("train", 0), ("valid", 20), ("test", 30)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([record(start + number) for number in range(10)]))
        files[name] = str(path)
    data = f"{{records: {json.dumps(files)}, records_as: events}}"
    recipe = own_recipe(tmp_path, tiny_llama_folder, tmp_path / "run", data=data, prompt="overlap: 64")
    finetune("--config", recipe, "--score.prior", "bpmf", "--score.head", "linear")
    found = check_folder(tmp_path / "run")
    assert [found.data["splits"][name]["rows"] for name in ("train", "valid", "test")] == [30, 30, 10]
    assert {"item_mean", "bias", "popularity"} <= set(found.baselines)
    recommender = Recommender.from_pretrained(tmp_path / "run/adapter")
    best = recommender.rank([("Film 1", 1)], ["Film 2", "Film 3"], k=2)
    assert sorted(one.title for one in best) == ["Film 2", "Film 3"]


@pytest.mark.parametrize("status", [None, 403])
def test_a_run_publishes_itself_or_says_how(
    tables: Path, tiny_llama_folder: Path, tmp_path: Path, status: int | None
) -> None:
    """Whether the Hub takes it or not: the run is whole, and the training has not failed."""
    data = f"{{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {COLUMNS}}}"
    run = tmp_path / "run"
    path = own_recipe(tables, tiny_llama_folder, run, data=data, prompt="overlap: 64")
    wanted = {"push": "true", "repo_id": "me/films", "private": "false", "tag": "v1", "commit_message": "Our films"}
    options = [word for name, value in wanted.items() for word in (f"--hub.{name}", value)]
    with HubServer() as server:
        if status is not None:
            server.fail("POST .*/commit/", status=status, times=100)
        here = {"HF_ENDPOINT": server.url, "HF_TOKEN": WRITE, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = finetune("--config", path, *options, HF_HOME=str(tmp_path / "home"), **here)
        check_folder(run)
        assert "Traceback" not in done.stdout + done.stderr
        warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: hub.push: ")]
        if status is None:
            assert warnings == []
            files = {name: file.read_bytes() for name, file in list_files(run / "adapter")[0].items()}
            assert server.files("me/films", "v1") == files
            assert not server.repos["me/films"].private
            assert re.match(r"Our films\n\nReload check: 8 probes in a fresh process", server.commits("me/films")[0])
            return
        assert server.files("me/films") == {}
    (line,) = warnings
    command = f"peftrec push {run} me/films --public --tag v1 --message 'Our films'"
    assert line.startswith("warning: hub.push: me/films: ")
    assert line.endswith(f"; the run is complete; push it later: {command}")
    with pytest.raises(SystemExit) as left:  # its words are understood, up to the help that is asked for instead
        cli.main([*shlex.split(command)[1:], "--help"])
    assert left.value.code == 0


def test_a_repository_that_cannot_be_is_refused_before_anything_else(tables: Path, tmp_path: Path) -> None:
    data = f"{{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {COLUMNS}}}"
    path = own_recipe(tables, tmp_path / "no-model", tmp_path / "run", data=data, prompt="overlap: 64")
    done = finetune("--config", path, "--hub.push", "true", "--hub.repo_id", "me/films/again", expect=2)
    assert re.search(r"hub\.repo_id: 'me/films/again'; expected namespace/name", done.stderr)
    assert not (tmp_path / "run").exists()


def test_killed_and_resumed_equals_never_killed(tables: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = f"{{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {COLUMNS}}}"
    steps = ["--train.max_steps", 40, "--train.evals", 10, "--adapter.lora_dropout", 0.1]
    runs = [tmp_path / name for name in ("whole", "killed")]
    recipes = [own_recipe(tables, tiny_llama_folder, run, data=data, prompt="overlap: 64") for run in runs]
    finetune("--config", recipes[0], *steps)

    arguments = [sys.executable, FINETUNE, "--config", recipes[1], *steps]
    process = subprocess.Popen(
        list(map(str, arguments)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    end = time.monotonic() + 300
    while not list(runs[1].glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (runs[1] / "run.json").exists()

    other = finetune("--config", recipes[1], "--resume", expect=2)  # the steps are missing: another recipe
    assert other.stderr.count("\n") == 1
    assert "another recipe" in other.stderr
    finetune("--config", recipes[1], *steps, "--resume")
    whole, killed = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert whole.keys() == killed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], killed[name])
    assert check_folder(runs[0]).metrics == check_folder(runs[1]).metrics


def test_a_run_that_has_ended_is_not_replaced_by_accident(
    tables: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Also the recipe without an adapter, which trains nothing and reports the base model under its own name."""
    data = f"{{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {COLUMNS}}}"
    path = own_recipe(tables, tiny_llama_folder, tmp_path / "run", data=data, prompt="overlap: 64")
    recipe = yaml.safe_load(path.read_text())
    del recipe["train"]
    recipe["adapter"] = {"method": "none"}
    path.write_text(yaml.safe_dump(recipe))
    finetune("--config", path)
    run = tmp_path / "run"
    assert {one.name for one in run.iterdir()} == FOLDER - {"adapter"}
    assert "base_model" not in record.read_record(run).baselines
    assert "base model, untrained" in report.compare_run(run).table()

    written = (run / "run.json").stat().st_mtime_ns
    assert "add --overwrite" in finetune("--config", path, expect=2).stderr
    assert "nothing to resume" in finetune("--config", path, "--resume").stdout
    assert (run / "run.json").stat().st_mtime_ns == written
    finetune("--config", path, "--overwrite")
    assert (run / "run.json").stat().st_mtime_ns > written

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/figures").touch()
    other = finetune("--config", path, "--output_dir", tmp_path / "photos", "--overwrite", expect=2)
    assert "holds other things than a run" in other.stderr
    assert (tmp_path / "photos/figures").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (["--data.columns", "{user_id: usr, item_id: movieId, rating: stars, timestamp: ts}"], r"no column 'usr'"),
        (["--prompt.item", "{titel}"], r"did you mean {title}"),
        (["--model.name", "nobody/nothing"], r"model.name: nobody/nothing could not be loaded"),
        (["--adapter.target_modules", "[nothing]"], r"adapter.target_modules: .* matches nothing"),
    ],
    ids=["column", "template", "model", "targets"],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tables: Path, tiny_llama_folder: Path, tmp_path: Path, override: list[str], line: str
) -> None:
    data = f"{{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {COLUMNS}}}"
    path = own_recipe(tables, tiny_llama_folder, tmp_path / "run", data=data, prompt="overlap: 64")
    done = finetune("--config", path, *override, expect=2)
    assert "Traceback" not in done.stderr
    (only,) = done.stderr.strip().splitlines()
    assert re.search(line, only), only
    assert not (tmp_path / "run").exists()
