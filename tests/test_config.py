from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrec import coherence, config, schema, values
from peftrec.config import dump_recipe, load_recipe, parse_recipe, recipe_to_dict
from peftrec.errors import ConfigError
from peftrec.values import placeholders

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*/*.yaml"))
SMALL: dict[str, Any] = {"data": {"name": "ml-100k"}, "output_dir": "runs/x"}


def with_values(**values: Any) -> dict[str, Any]:
    """The smallest recipe, with dotted keys (two underscores for the dot) set; `data` replaces the source."""
    mapping: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for key, value in values.items():
        *sections, name = key.split("__")
        node = mapping
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return mapping


def mistakes(mapping: Any) -> list[str]:
    try:
        parse_recipe(mapping, "x.yaml")
    except ConfigError as error:
        return str(error).split("\n")
    return []


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def file_problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return [line.replace(str(path), "x.yaml") for line in caught.value.problems]


# What is read


def test_smallest_recipe_has_the_defaults() -> None:
    recipe = parse_recipe(SMALL, "x.yaml")
    assert recipe == config.Recipe(data=config.Data(name="ml-100k"), output_dir="runs/x")
    assert (recipe.task, recipe.seed, recipe.prompt.answers) == ("click", 13, None)
    assert (recipe.train.learning_rate, recipe.train.warmup_steps, recipe.data.split.kind) == (5e-4, 0.05, "temporal")


def test_own_tables_in_the_format_of_ml_latest_small() -> None:
    columns = {"user_id": "userId", "item_id": "movieId"}
    data = {"interactions": "ratings.csv", "items": "movies.csv", "columns": columns, "like_at": 4}
    assert parse_recipe({"data": data, "output_dir": "x"}, "x.yaml").data == config.Data(
        interactions="ratings.csv", items="movies.csv", columns=columns, like_at=4.0
    )


def test_declared_types_decide_what_text_means(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        data: {interactions: someone/ratings, hub_revision: 0123, rating_range: [.5, 5], sample_users: 1e3}
        prompt: {answers: [no, yes], header: ''}
        model: {revision: 1e10}
        adapter: {target_modules: [q_proj, v_proj]}
        train: {learning_rate: 3e-4, num_train_epochs: 2, torch_compile: True}
        output_dir: 2024-01-01
        """,
    )
    recipe = load_recipe(path)
    assert recipe.data == config.Data(
        interactions="someone/ratings", hub_revision="0123", rating_range=[0.5, 5.0], sample_users=1000
    )
    assert (recipe.prompt.answers, recipe.prompt.header) == (["no", "yes"], "")
    assert (recipe.model.revision, recipe.output_dir) == ("1e10", "2024-01-01")
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.train == config.Train(learning_rate=3e-4, num_train_epochs=2.0, torch_compile=True)
    assert [type(x) for x in (recipe.train.num_train_epochs, recipe.data.sample_users)] == [float, int]


def test_null_is_the_default_and_is_not_given() -> None:
    mapping = with_values(prompt__overlap=None, prompt__layout="pointwise", train=None, model__revision=None)
    assert parse_recipe(mapping, "x.yaml").prompt == config.Prompt(layout="pointwise")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(recipe_to_dict(recipe), "again") == recipe


def test_limits_of_what_is_scored_need_no_validation_passes() -> None:
    recipe = parse_recipe(with_values(train={"evals": 0}, eval={"max_valid_rows": 9}), "x.yaml")
    assert recipe.eval.max_valid_rows == 9


def test_epochs_may_stand_beside_steps() -> None:
    recipe = parse_recipe(with_values(train={"num_train_epochs": 2, "max_steps": 9}), "x.yaml")
    assert recipe.train.max_steps == 9


def test_nothing_trained_keeps_no_training_settings() -> None:
    kept = recipe_to_dict(parse_recipe(with_values(adapter={"method": "none"}), "x.yaml"))
    assert "train" not in kept
    assert "base_model" not in kept["eval"]


# What is refused


def test_five_mistakes_come_at_once() -> None:
    mapping = with_values(
        train={"learning_rte": "3e-4", "evals": True},
        prompt__layout="timelin",
        data__split={"kind": "kfold", "folds": 5, "fold": 5},
        adapter={"method": "none", "r": 8},
    )
    assert mistakes(mapping) == [
        "x.yaml: prompt.layout: 'timelin'; expected one of timeline, pointwise; did you mean timeline?",
        "x.yaml: train.learning_rte: unknown key; did you mean learning_rate?",
        "x.yaml: train.evals: true; expected a whole number",
        "x.yaml: data.split.fold: 5; expected below data.split.folds (5): folds are counted from 0",
        "x.yaml: adapter.r: does nothing under adapter.method: none; remove it, or change adapter.method",
    ]


WRONG_VALUES = [
    ({"output_dir": None}, "output_dir: missing; it has no default: add it"),
    ({"output_dir": " "}, "output_dir: ' '; expected text that is not empty"),
    ({"output_dir": 3}, "output_dir: 3; expected text; put it in quotes"),
    ({"task": "ratings"}, "task: 'ratings'; expected one of click, rating; did you mean rating?"),
    ({"seed": -1}, "seed: -1; expected a whole number from 0 to 2**32 - 1"),
    ({"seed": "1.5"}, "seed: '1.5'; expected a whole number"),
    ({"seed": 10**400}, "seed: "),
    ({"learning_rate": 1}, "learning_rate: unknown key; did you mean train.learning_rate?"),
    ({"train__history": "frozen"}, "train.history: unknown key; did you mean prompt.history or eval.history?"),
    ({"train__zzz": 1}, "train.zzz: unknown key; expected one of num_train_epochs, max_steps,"),
    ({"train__evals": {"a": 1}}, "train.evals: {'a': 1}; expected a whole number"),
    ({"train": 3}, "train: 3; expected a mapping with the keys num_train_epochs, max_steps,"),
    ({"train__learning_rate": 0}, "train.learning_rate: 0; expected a number above 0"),
    ({"train__learning_rate": "nan"}, "train.learning_rate: 'nan'; expected a number"),
    ({"train__learning_rate": float("inf")}, "train.learning_rate: inf; expected a number"),
    ({"train__max_steps": 0}, "train.max_steps: 0; expected -1 or a whole number from 1"),
    ({"train__warmup_steps": 1.5}, "train.warmup_steps: 1.5; expected a share below 1 or a whole number of steps"),
    ({"train__torch_compile": "yes"}, "train.torch_compile: 'yes'; expected true or false"),
    ({"train__torch_compile": 1}, "train.torch_compile: 1; expected true or false"),
    ({"adapter__r": 0}, "adapter.r: 0; expected a whole number from 1"),
    ({"adapter__lora_dropout": 1}, "adapter.lora_dropout: 1; expected a share from 0 to below 1"),
    ({"adapter__target_modules": []}, "adapter.target_modules: []; expected at least one module name"),
    ({"adapter__target_modules": ["q", "q"]}, "adapter.target_modules: ['q', 'q']; expected each at most once"),
    ({"adapter__target_modules": 3}, "adapter.target_modules: 3; expected text or a list"),
    ({"eval__slices": ["cold_usr"]}, "eval.slices: 'cold_usr'; expected one of cold_item, cold_user, popularity; did"),
    ({"eval__slices": "cold_user"}, "eval.slices: 'cold_user'; expected a list"),
    ({"eval__bootstrap": -1}, "eval.bootstrap: -1; expected a whole number from 0"),
    ({"prompt__answers": [" no"]}, "prompt.answers: [' no']; expected at least two answers"),
    ({"prompt__answers": [" a", " a"]}, "prompt.answers: [' a', ' a']; expected each at most once"),
    ({"prompt__answers": ["", " yes"]}, "prompt.answers: ''; expected text that is not empty"),
    ({"prompt__answers": [False, True]}, "prompt.answers: false; expected text; put it in quotes"),
    ({"prompt__item": "film"}, "prompt.item: 'film'; expected a template with plain {column} names"),
    ({"prompt__item": "{title"}, "prompt.item: '{title'; expected a template with plain {column} names"),
    ({"prompt__item": "{title.__class__}"}, "prompt.item: '{title.__class__}'; expected a template"),
    ({"prompt__item": "{}"}, "prompt.item: '{}'; expected a template"),
    ({"prompt__item": {"title": None}}, "prompt.item: {'title': None}; expected text; put it in quotes"),
    ({"prompt__max_tokens": 256}, "prompt.overlap: 256 tokens; expected fewer than prompt.max_tokens (256); lower it"),
    ({"prompt__template": "{history}{item}"}, "prompt.template: does nothing under prompt.layout: timeline; remove"),
    (
        {"prompt": {"layout": "pointwise", "template": "{item}"}},
        "prompt.template: '{item}'; expected {history} and {item} in it; add what is missing",
    ),
    ({"prompt": {"layout": "pointwise", "overlap": 8}}, "prompt.overlap: does nothing under prompt.layout: pointwise"),
    ({"model__attn_implementation": "flash_attention_2"}, "model.attn_implementation: flash_attention_2 cannot hide"),
    ({"train": {"lr_scheduler_type": "constant", "warmup_steps": 3}}, "train.warmup_steps: does nothing under train."),
    ({"task": "rating", "train": {"pairwise": 1}}, "train.pairwise: does nothing under task: rating; remove it"),
    ({"prompt": {"layout": "pointwise"}, "train": {"pairwise": 1}}, "train.pairwise: does nothing under prompt.layout"),
    ({"train": {"pairwise": -1}}, "train.pairwise: -1; expected"),
    ({"adapter": {"method": "none"}, "train": {"max_steps": 9}}, "train.max_steps: does nothing under adapter.method"),
    (
        {"adapter": {"method": "none"}, "eval": {"base_model": True}},
        "eval.base_model: does nothing under adapter.method: none",
    ),
    ({"train": {"evals": 0, "early_stopping_patience": 1}}, "train.early_stopping_patience: does nothing under train."),
    ({"data": {}}, "data: no source; expected one of data.name, data.interactions and data.records; add one"),
    ({"data": {"interactons": "a.csv"}}, "data.interactons: unknown key; did you mean interactions?"),
    ({"data": {"name": "a", "interactions": "b"}}, "data: data.name and data.interactions given; expected one source"),
    ({"data__items": "a.csv"}, "data.items: does nothing under data.name: ml-100k; remove it, or change data.name"),
    ({"data": {"interactions": "A.CSV", "hub_revision": "a"}}, "data.hub_revision: does nothing under data.interac"),
    (
        {"data": {"interactions": "a", "columns": {"uid": "user_id"}}},
        "data.columns: uid: user_id is the wrong way roun",
    ),
    ({"data": {"interactions": "a", "columns": {"user_id": ""}}}, "data.columns: ''; expected text that is not empty"),
    ({"data__rating_range": [5, 1]}, "data.rating_range: [5, 1]; expected two numbers, lowest and highest"),
    ({"data": {"name": "a", "rating_range": [1, 5], "like_at": 1}}, "data.like_at: 1 gives all rows one label; expect"),
    ({"data__split": {"kind": "column"}}, "data.split.column: missing; data.split.kind: column needs the name of the"),
    ({"data__split": {"column": "a"}}, "data.split.column: does nothing under data.split.kind: temporal"),
    ({"data__split": {"kind": "kfold", "test": 0.2}}, "data.split.test: does nothing under data.split.kind: kfold"),
    ({"data__split": {"valid": 0.5, "test": 0.5}}, "data.split: valid 0.5 and test 0.5 leave nothing to train on"),
    ({"data__split": {"valid": 0}}, "data.split.valid: 0; expected a share between 0 and 1, both excluded"),
    (
        {"align": {"kind": "mmd"}},
        "align.target: missing; align.kind: mmd needs another domain's events; set align.target.items_where, align.tar",
    ),
    (
        {"align": {"kind": "mmd", "target": {"name": "a", "interactions": "b"}}},
        "align.target.interactions: b, and align.target.name too; expected one source; remove the other",
    ),
    (
        {
            "align": {"kind": "mmd", "target": {"items_where": {"a": ["c", "b"]}}},
            "data__items_where": {"a": ["b", "c"]},
        },
        "align.target: names the recipe's own events; expected another domain; change its items_where, or its source",
    ),
    (
        {"align": {"kind": "mmd", "target": {"name": "ml-100k"}}, "data": {"name": "ml-100k"}},
        "align.target: names the recipe's own events; expected another domain; change its items_where, or its source",
    ),
    ({"align": {"weight": 2}}, "align.weight: does nothing under align.kind: none; remove it, or change align.kind"),
    ({"align": {"kind": "corel"}}, "align.kind: 'corel'; expected one of none, coral, mmd, adversarial, cpc"),
    (
        {"align": {"kind": "cpc", "ramp": 2, "target": {"name": "a"}}},
        "align.ramp: 2; expected a share from 0 to 1",
    ),
    (
        {"align": {"kind": "cpc", "target": {"name": "a", "items": "b.csv"}}},
        "align.target.items: does nothing under align.target.interactions: null; remove it, or change align.target.int",
    ),
    (
        {"align": {"kind": "cpc", "target": {"name": "a"}}, "adapter": {"method": "none"}},
        "align.kind: does nothing under adapter.method: none; remove it, or change adapter.method",
    ),
    ({"hub": {"push": True}}, "hub.repo_id: missing; hub.push needs to know where to: expected namespace/name"),
    ({"hub": {"push": True, "repo_id": "a/b/c"}}, "hub.repo_id: 'a/b/c'; expected namespace/name of a model on"),
    ({"hub": {"repo_id": "me/films"}}, "hub.repo_id: does nothing under hub.push: false; remove it, or change"),
    ({"hub": {"push": True, "repo_id": "file:x", "tag": "v1"}}, "hub.tag: does nothing under hub.repo_id: file:x"),
    (
        {"hub": {"push": True, "repo_id": "me/films", "create_pr": True, "revision": "wide"}},
        "hub.revision: wide; a pull request (hub.create_pr) is made against main; remove one of them",
    ),
    (
        {"hub": {"push": True, "repo_id": "me/films"}, "adapter__method": "none"},
        "hub.push: true, and adapter.method: none makes no adapter; set it to false",
    ),
]


@pytest.mark.parametrize(("values", "expected"), WRONG_VALUES, ids=[text[:40] for _, text in WRONG_VALUES])
def test_one_mistake_is_one_line(values: dict[str, Any], expected: str) -> None:
    (line,) = mistakes(with_values(**values))
    assert line.startswith(f"x.yaml: {expected}")
    assert len(line.splitlines()) == 1
    assert len(line) < 500


RECORDS = {"data": {"records": "a.jsonl"}, "prompt__layout": "pointwise"}


def test_records_bring_their_own_prompts_and_split() -> None:
    files = {"train": "a.json", "valid": "b.json", "test": "c.json"}
    template = "{instruction}\n{input}\n"
    mapping = with_values(data={"records": files}, prompt={"layout": "pointwise", "template": template})
    assert parse_recipe(mapping, "x.yaml").data.records == files


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt__layout": "timeline"}, "prompt.layout: timeline; ready-made prompts (data.records) need pointwise"),
        ({"prompt__history": "liked"}, "prompt.history: does nothing under data.records: a.jsonl; remove it, or"),
        ({"prompt__template": "{item}"}, "prompt.template: '{item}'; records have {instruction} and {input} only"),
        ({"data__hub_revision": "a"}, "data.hub_revision: does nothing under data.records: a.jsonl; remove it, or"),
        (
            {"score__prior": "bias"},
            "score.prior: bias; prompts have no items to count the ratings of; set data.rec",
        ),
        ({"data__records": {"train": "a", "test": "b"}}, "data.records: {'test': 'b', 'train': 'a'}; expected the thr"),
        ({"data__records": ["a"]}, "data.records: ['a']; expected text or a mapping"),
    ],
)
def test_records_refuse_what_does_not_fit(values: dict[str, Any], expected: str) -> None:
    lines = mistakes(with_values(**{**RECORDS, "data": {"records": "a.jsonl"}, **values}))
    assert [line for line in lines if line.startswith(f"x.yaml: {expected}")]


def test_user_groups_need_a_users_table() -> None:
    data = {"interactions": "a.csv", "items": "b.csv", "like_at": 4}
    (line,) = mistakes(with_values(data=data, eval={"user_groups": ["age"]}))
    assert line == "x.yaml: data.users: missing; eval.user_groups names columns of it; set it"
    found = parse_recipe(with_values(data={**data, "users": "c.csv"}, eval={"user_groups": ["age"]}), "x.yaml")
    assert config.of_users(found) == {"age": "eval.user_groups"}
    (line,) = mistakes(with_values(data={**data, "users": "c.csv"}))
    assert line.startswith("x.yaml: data.users: does nothing under prompt.user: null; remove it")
    template = {"layout": "pointwise", "template": "{user} {history} {item}", "user": "{age}, {job}"}
    found = parse_recipe(with_values(prompt=template, eval={"user_groups": ["age", "gender"]}), "x.yaml")
    assert config.of_users(found) == {"age": "prompt.user", "gender": "eval.user_groups", "job": "prompt.user"}


def test_what_an_author_says_is_of_an_adapter() -> None:
    told = parse_recipe(with_values(card={"license": "mit", "citation": "2026"}), "x.yaml")
    assert told.card == config.Author(license="mit", citation="2026")
    assert config.recipe_to_dict(told)["card"] == {"license": "mit", "citation": "2026"}
    assert "card" not in config.recipe_to_dict(parse_recipe(with_values(), "x.yaml"))
    (line,) = mistakes(with_values(adapter={"method": "none"}, card={"license": "mit"}))
    assert line.startswith("x.yaml: card.license: does nothing under adapter.method: none")
    lines = mistakes(with_values(card={"license": "MIT License", "base_model": "a/b/c", "language": "English"}))
    assert len(lines) == 3


def test_a_key_known_to_be_wrong_is_not_judged_further() -> None:
    """With the layout unknown, nobody can say whether the template is used."""
    assert len(mistakes(with_values(prompt={"layout": "pontwise", "template": "{history} {item}"}))) == 1


# Files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml: output_dir: missing"),
        ("- a\n", "x.yaml: ['a']; expected a mapping with the keys task, data, prompt,"),
        ("seed: 1\ntrain: {a: 1\n", "x.yaml, line 3, column 1: expected ',' or '}'"),
        ("seed: 1\nprompt:\n  item: {title} ({year})\n", "x.yaml, line 3, column 17: "),
        ("seed: 1\nseed: 2\n", "x.yaml, line 2, column 1: seed is given twice; expected YAML with each key once"),
        ("train:\n  r: 1\n  r: 1\n", "x.yaml, line 3, column 3: r is given twice"),
        ("seed: 1\n---\nseed: 2\n", "x.yaml, line 2, column 1: but found another document"),
        ("seed: !!python/object/apply:os.system [ls]\n", "x.yaml, line 1, column 7: could not determine a constructor"),
        ("seed: !!timestamp x\n", "x.yaml, line 1, column 7: could not determine a constructor"),
        ("? [a]\n: 1\n", "x.yaml, line 1, column 3: found unhashable key"),
        ("seed: \x07\n", "x.yaml: special characters are not allowed"),
        ("[" * 50_000, "x.yaml: nested too deeply"),
        ("a\n  : 'b\n\n c'\n'train': &t {r: 3, d: *t}\n", "x.yaml, "),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, text: str, expected: str) -> None:
    lines = file_problems(written(tmp_path, text))
    assert lines[0].startswith(expected)
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert file_problems(tmp_path / "no.yaml")[0].endswith(": no such file; expected a recipe in YAML; check the path")
    assert "cannot be read (Is a directory)" in file_problems(tmp_path)[0]
    path = tmp_path / "x.yaml"
    path.write_bytes(b"seed: \xff")
    assert file_problems(path) == [
        "x.yaml: byte 6 is not UTF-8; expected a recipe in YAML; save it as UTF-8",
    ]


def test_a_billion_laughs_is_one_short_line(tmp_path: Path) -> None:
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
    for line in file_problems(written(tmp_path, f"a0: &a0 lol\n{laughs}\nseed: *a8\n")):
        assert len(line) < 500


def test_only_the_command_line_may_allow_foreign_code(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(with_values(model__trust_remote_code=True)))
    (line,) = file_problems(path)
    assert line.startswith("x.yaml: model.trust_remote_code: true in a file")
    assert load_recipe(path, ["--model.trust_remote_code=true"]).model.trust_remote_code is True


# The command line


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--train.learning_rate", "1e-4"], "train.learning_rate", 1e-4),
        (["--train.learning_rate=1e-4"], "train.learning_rate", 1e-4),
        (["--seed", "1", "--seed=2"], "seed", 2),
        (["--train.max_steps", "-1"], "train.max_steps", -1),
        (["--train.torch_compile", "true"], "train.torch_compile", True),
        (["--prompt.item", "{title} ({year})"], "prompt.item", "{title} ({year})"),
        (["--prompt.item={title}=={year}"], "prompt.item", "{title}=={year}"),
        (["--prompt.header=--- # rated: [\n"], "prompt.header", "--- # rated: [\n"),
        (["--prompt.header", ""], "prompt.header", ""),
        (["--prompt.header", "true"], "prompt.header", "true"),
        (["--prompt.answers", "[' -', ' +']"], "prompt.answers", [" -", " +"]),
        (["--adapter.target_modules", "all-linear"], "adapter.target_modules", "all-linear"),
        (["--adapter.target_modules", ".*[qv]_proj"], "adapter.target_modules", ".*[qv]_proj"),
        (["--adapter.target_modules", "[q_proj, v_proj]"], "adapter.target_modules", ["q_proj", "v_proj"]),
        (["--model.revision", "0123"], "model.revision", "0123"),
        (["--model.revision", "null"], "model.revision", None),
        (["--data.rating_range", "[1, 5]"], "data.rating_range", [1.0, 5.0]),
        (["--data.name=null", "--data.records=a.json", "--prompt.layout=pointwise"], "data.records", "a.json"),
        (["--data.name=null", "--data.interactions=a", "--data.columns.user_id=u"], "data.columns", {"user_id": "u"}),
        (
            ["--data.name=null", "--data.interactions=a", "--data.columns={user_id: u}"],
            "data.columns",
            {"user_id": "u"},
        ),
    ],
)
def test_overrides(tmp_path: Path, arguments: list[str], key: str, expected: Any) -> None:
    value: Any = load_recipe(written(tmp_path, yaml.safe_dump(SMALL)), arguments)
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_bad_overrides_name_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(with_values(train__r=1, score="bias")))
    arguments = ["--train.learning_rte", "1", "--train.evals=x", "seed=3", "--adapter", "lora", "--score.prior", "bias"]
    assert file_problems(path, *arguments, "--trian.evals=1", "--eval.ties", "--seed", "1", "--a.b.c=1") == [
        "command line: train.learning_rte: unknown key; did you mean learning_rate?",
        "command line: seed: expected --section.key VALUE; put text that holds blanks in quotes",
        "command line: adapter: a section; expected one of its keys: "
        + ", ".join(f"adapter.{key.name}" for key in fields(config.Adapter)),
        "command line: score.prior: the file has 'bias' above it; expected a mapping there",
        "command line: trian.evals: unknown key; did you mean train.evals?",
        "command line: eval.ties: no value; expected --eval.ties VALUE",
        "command line: a.b.c: unknown key",
        "x.yaml: score: 'bias'; expected a mapping with the keys head, loss, prior, blend, calibration",
        "x.yaml: train.r: unknown key; did you mean adapter.r?",
        "command line: train.evals: 'x'; expected a whole number",
    ]


def test_an_override_changes_one_of_two_sections_that_share_a_yaml_anchor(tmp_path: Path) -> None:
    text = "data: {interactions: a, columns: &c {user_id: u}}\neval: {}\noutput_dir: x\nprompt: &p {}\nmodel: *p\n"
    recipe = load_recipe(written(tmp_path, text), ["--prompt.layout", "pointwise"])
    assert (recipe.prompt.layout, recipe.model) == ("pointwise", config.Model())


# There and back


names = st.text(min_size=1, max_size=12).filter(str.strip)
counts = st.integers(1, 10**6)
shares = st.floats(0.01, 0.49)
positive = st.floats(1e-12, 1e6)
columns = st.dictionaries(st.sampled_from(["user_id", "item_id", "genre"]), names.map("c".__add__))


def optional(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


def distinct(*values: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), unique=True)


plain_data = st.recursive(
    st.none() | st.booleans() | counts | shares | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


published = st.just({}) | optional(private=st.booleans(), tag=names, create_pr=st.booleans()).map(
    lambda values: {"push": True, "repo_id": "me/films", **values}
)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    """A valid section `adapter`, with any of its keys left out."""
    method = draw(st.sampled_from(list(coherence.METHOD_KEYS)))
    targets = names | st.lists(names, min_size=1, unique=True)
    values: dict[str, st.SearchStrategy[Any]] = {
        "variant": st.sampled_from({"lora": ["plain", "pissa"], "bottleneck": ["parallel"]}.get(method, ["plain"])),
        "r": counts,
        "init_r": st.integers(17, 99),
        "target_r": st.integers(1, 16),
        "lora_alpha": counts,
        "lora_dropout": st.floats(0, 0.99),
        "target_modules": targets,
        "tinit": st.floats(0, 0.49),
        "deltaT": counts,
        "num_virtual_tokens": counts,
        "fields": st.dictionaries(names, plain_data, max_size=3),
    }
    if method == "prefix" and draw(st.booleans()):
        return {"method": method, "prefix_projection": True, **draw(optional(encoder_hidden_size=counts))}
    own = {key: values[key] for key in coherence.METHOD_KEYS[method] if key in values}
    given = draw(optional(**own)) | ({"peft_type": "VERA"} if method == "other" else {})
    return given if method == "lora" and draw(st.booleans()) else {"method": method, **given}


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A valid recipe as a mapping, with any of its keys left out."""
    source = draw(st.sampled_from(["name", "file", "hub", "records", "record files"]))
    records = source.startswith("record")
    layout = "pointwise" if records else draw(st.sampled_from(["timeline", "pointwise"]))

    data = draw(optional(sample_users=counts))
    if records:
        data["records"] = draw(names if source == "records" else st.just({"train": "a", "valid": "b", "test": "c"}))
    elif source == "name":
        data["name"] = draw(names)
    else:
        data |= draw(optional(items=names, columns=columns, rating_range=st.just([1, 5.5])))
        data |= draw(optional(like_at=st.floats(1.5, 5.0)))
        data["interactions"] = "r.csv" if source == "file" else "someone/ratings"
        if source == "hub":
            data |= draw(optional(hub_revision=names))
    if source != "record files":
        kind = draw(st.sampled_from(["temporal", "leave_last_out", "kfold", "cold_user", "cold_item", "column"]))
        allowed = {
            "kfold": {"valid": shares, "folds": st.integers(3, 9), "fold": st.integers(0, 2)},
            "column": {},
            "leave_last_out": {},
        }.get(kind, {"valid": shares, "test": shares})
        data["split"] = {"kind": kind, **draw(optional(**allowed)), **({"column": "s"} if kind == "column" else {})}

    prompt = {"layout": layout, **draw(optional(max_tokens=st.integers(300, 9999), answers=st.just(["-", "no: #"])))}
    events = {"history": st.sampled_from(["all", "liked"]), "item": st.just("{title}: {{{year}}}"), "header": st.text()}
    if layout == "timeline":
        prompt |= draw(optional(overlap=st.integers(0, 299), **events))
    elif records:
        prompt |= draw(optional(template=st.sampled_from(["{instruction}\n{input}", "{input}"])))
    else:
        template = {"template": names.map(lambda text: text.translate({123: "", 125: ""}) + "{item}\n{history}")}
        chosen = draw(optional(max_history=counts, **{**events, **template}))
        prompt |= {key: value for key, value in chosen.items() if key != "header" or "template" not in chosen}

    train = draw(
        optional(
            num_train_epochs=positive,
            max_steps=st.just(-1) | counts,
            learning_rate=positive,
            weight_decay=st.floats(0, 1),
            evals=counts,
            early_stopping_patience=counts,
            metric_for_best_model=st.sampled_from(["loss", "auc", "uauc"]),
            gradient_checkpointing=st.booleans(),
        )
    )
    train |= draw(st.just({"lr_scheduler_type": "constant"}) | optional(warmup_steps=st.floats(0, 0.99) | counts))
    adapter = draw(adapters())
    if adapter.get("method") == "prefix":
        train.pop("gradient_checkpointing", None)
    bare = adapter.get("method") == "none"
    return {
        "data": data,
        "prompt": prompt,
        "model": draw(
            optional(name=names, revision=names, dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]))
        ),
        "adapter": adapter,
        "score": {} if records else draw(optional(prior=st.sampled_from(["none", "bias"]))),
        "train": {} if bare else train,
        "hub": {} if bare else draw(published),
        "eval": draw(
            optional(
                slices=distinct("cold_item", "cold_user", "popularity"),
                **({} if records else {"baselines": distinct("item_mean", "bias", "popularity")}),
                **({} if bare else {"base_model": st.booleans()}),
                max_valid_rows=counts,
                max_test_rows=counts,
                bootstrap=st.integers(0, 10**6),
            )
        ),
        "output_dir": draw(names),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(deadline=None)
@given(recipes())
def test_dump_then_parse_is_identity(tmp_path_factory: pytest.TempPathFactory, mapping: dict[str, Any]) -> None:
    recipe = parse_recipe(mapping, "x.yaml")
    assert parse_recipe(recipe_to_dict(recipe), "x.yaml") == recipe
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "x.yaml") == recipe, "any YAML reader"
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe


@settings(deadline=None)
@given(recipes(), st.data())
def test_a_stray_key_anywhere_is_refused(mapping: dict[str, Any], data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(["data", "prompt", "model", "adapter", "score", "train", "eval"]))
    mapping[section] = {**mapping[section], "xyzzy": 1}
    (line,) = mistakes(mapping)
    assert line.startswith(f"x.yaml: {section}.xyzzy: unknown key; expected one of ")


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(recipes(), st.data())
def test_junk_is_an_error_and_never_a_crash(mapping: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(schema.leaves(config.Recipe))))
    *sections, name = key.split(".")
    node = mapping
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = data.draw(junk)
    for line in mistakes(mapping):
        assert line.startswith("x.yaml: ")
        assert len(line.splitlines()) == 1


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("abseed:{}[]!&*-,?|>%@'\"# \n\t0")) | st.text())
def test_any_text_is_a_recipe_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_recipe(path)


def test_a_header_is_dumped_as_one_readable_line() -> None:
    assert '  header: "Gesehene Filme, älteste zuerst:\\n"\n' in dump_recipe(
        parse_recipe(with_values(prompt__header="Gesehene Filme, älteste zuerst:\n"), "x.yaml")
    )


@given(st.from_regex(r"[\w./-]{1,12}", fullmatch=True) | st.text(max_size=100) | st.integers(90, 100).map("x".__mul__))
def test_names_of_repositories_are_those_of_the_hub(name: str) -> None:
    try:
        validate_repo_id(name)
        allowed = True
    except HFValidationError:
        allowed = False
    assert values.is_repo_id(name) == (allowed or (name.startswith("file:") and name != "file:"))


def test_the_command_that_publishes_later() -> None:
    values = {
        "push": True,
        "repo_id": "me/films",
        "private": False,
        "commit_message": "Our films",
        "allow": ["a@b.org"],
    }
    how = parse_recipe(with_values(hub=values), "x.yaml").hub
    assert how.command("runs/x") == "peftrec push runs/x me/films --public --message 'Our films' --allow a@b.org"


def test_keys_that_do_nothing_are_not_dumped() -> None:
    recipe = parse_recipe(SMALL, "x.yaml")
    assert not {"hub", "side", "align"} & recipe_to_dict(recipe).keys()
    bare = replace(recipe, adapter=config.Adapter(method="none", r=3))
    assert recipe_to_dict(bare)["adapter"] == {"method": "none"}
    assert recipe_to_dict(recipe)["data"] == {
        "name": "ml-100k",
        "split": {"kind": "temporal", "valid": 0.1, "test": 0.1},
    }


def test_the_dump_shares_nothing_with_the_recipe() -> None:
    recipe = parse_recipe(SMALL, "x.yaml")
    recipe_to_dict(recipe)["eval"]["slices"].append("x")
    assert recipe.eval.slices == ["cold_item", "cold_user", "popularity"]


# The module itself


def test_placeholders() -> None:
    assert placeholders("{title} ({year}), {{{title}}}") == ["title", "year", "title"]
    for text in ("{", "}", "{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a b}"):
        with pytest.raises(ValueError, match=r"."):
            placeholders(text)


def test_every_field_has_a_docstring() -> None:
    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    fields = [
        (f"{node.name}.{ast.unparse(line.target)}", after)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name != "Check"
        for line, after in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(line, ast.AnnAssign)
    ]
    assert len(fields) > 60
    for name, after in fields:
        assert isinstance(after, ast.Expr), f"{name} has no docstring"
        assert isinstance(after.value, ast.Constant), f"{name} has no docstring"
