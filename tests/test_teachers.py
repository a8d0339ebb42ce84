"""Several earlier runs as teachers: what they agree on, what the loss makes of it, and who may not teach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from saved import save_adapter

from peftrec import adapters, backbone, config, earlier, encode, scorer, teachers, train
from peftrec.errors import ConfigError, ModelError
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import collate

STARS = (1.0, 2.0, 3.0)
TARGETS = {
    "click": Target(),
    "linear click": Target(head="linear", offset=(0.0,)),
    "rating": Target("rating", scale=STARS, offset=(0.0,) * 3),
    "squared error": Target("rating", loss="squared_error", scale=STARS, offset=(0.0,) * 3),
    "linear rating": Target("rating", "linear", "squared_error", STARS, (2.0,)),
}


def click_of(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


class TestTarget:
    def test_a_click_is_learned_as_a_chance(self) -> None:
        outputs, prior, label = torch.tensor([[0.0, 1.5]]), torch.tensor([0.5]), torch.tensor([0])
        (loss,) = Target().losses(outputs, prior, label, torch.tensor([[0.75]])).tolist()
        chance = click_of(2.0)
        assert loss == pytest.approx(-0.75 * math.log(chance) - 0.25 * math.log(1 - chance))

    def test_a_rating_is_learned_as_a_number_or_as_shares(self) -> None:
        outputs, prior, label = torch.tensor([[0.0, math.log(2), 0.0]]), torch.zeros(1), torch.tensor([0])
        (squared,) = TARGETS["squared error"].losses(outputs, prior, label, torch.tensor([[2.5]])).tolist()
        assert squared == pytest.approx(0.25)  # chances 1/4, 1/2, 1/4 have the mean 2
        shares = torch.tensor([[0.0, 0.5, 0.5]])
        (loss,) = TARGETS["rating"].losses(outputs, prior, label, shares).tolist()
        assert loss == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))

    @pytest.mark.parametrize("name", TARGETS)
    def test_taught_its_own_answer_an_event_has_its_own_loss(self, name: str) -> None:
        target = TARGETS[name]
        outputs = torch.randn(7, target.outputs, generator=torch.Generator().manual_seed(1))
        label = torch.arange(7) % len(target.scale)
        own = target.own(label)
        assert own.shape == (7, target.forms)
        torch.testing.assert_close(
            target.losses(outputs, torch.zeros(7), label, own), target.losses(outputs, torch.zeros(7), label)
        )

    def test_teachers_agree_on_the_mean_of_their_scores(self) -> None:
        # Each beside a prior of its own.
        told = [Target().told(np.array([row], np.float32), [prior]) for row, prior in (([0, 1], 0.5), ([1, 4], 0.7))]
        assert [one.tolist() for one in told] == [[[pytest.approx(1.5)]], [[pytest.approx(3.7)]]]
        assert Target().agreed(told)[0, 0] == pytest.approx(click_of((1.5 + 3.7) / 2))
        linear = TARGETS["linear rating"]
        ratings = [linear.told(np.array([[gap]], np.float32), None) for gap in (0.5, -0.1)]
        assert linear.agreed(ratings)[0, 0] == pytest.approx(2.2)

    def test_teachers_agree_on_the_mean_of_their_distributions(self) -> None:
        several = [np.log(np.array([shares], np.float32)) for shares in ([0.5, 0.25, 0.25], [0.1, 0.1, 0.8])]
        target = TARGETS["rating"]
        agreed = target.agreed([target.told(one, None) for one in several])
        assert agreed[0].tolist() == pytest.approx([0.3, 0.175, 0.525])


def pupil_of(teacher: str, *, distill: float = 0.5, **changed: Any) -> config.Recipe:
    """A recipe with one teacher."""
    made: dict[str, Any] = {
        "data": {"name": "ml-100k"},
        "adapter": {"method": "lora", "r": 4},
        "train": {"teachers": [teacher], "distill": distill},
        "output_dir": "x",
        "seed": 2,
    }
    return config.parse_recipe({**made, **changed}, "r")


@pytest.fixture
def school(
    tiny_llama_folder: Path, make_random_log: Callable[..., Log], tmp_path: Path
) -> tuple[Any, encode.Encoder, Log, list[teachers.Teacher]]:
    """A fresh adapter, what asks it, a log, and two teachers whose answers differ."""
    how = config.Adapter(r=4)
    found = []
    for name, strength in (("one", 0.3), ("two", -0.6)):
        adapter = earlier.read(str(save_adapter(tiny_llama_folder, tmp_path / name, how, strength=strength)))
        found.append(teachers.Teacher(adapter, Target(), 13))
    loaded = backbone.load(config.Model(name=str(tiny_llama_folder), dtype="float32"), Target())
    log = make_random_log(3)
    encoder = encode.Encoder(log, config.Prompt(item="{title}", max_tokens=256), loaded.tokenizer, "isolate")
    model = adapters.attach(
        scorer.with_head(loaded.model, "tokens", encoder.codec.answers), how, base_name="tiny", seed=9
    )
    return model, encoder, log, found


def test_answers_are_taken_for_a_share_of_what_the_teachers_say(school: Any) -> None:
    model, encoder, log, elders = school
    prior = np.linspace(-1, 1, len(log))
    before = {name: tensor.clone() for name, tensor in adapters.training_state(model).items()}
    data = encoder.train(prior, None)
    recipe = pupil_of("x", distill=0.25)
    goal = teachers.taught(model, elders, data, log, prior, recipe, Target())
    after = adapters.training_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    said = []
    for teacher in elders:
        earlier.take_over(model, teacher.adapter, "click")
        rows, outputs = train.score(model, data, description="alone")
        said.append(outputs[:, 1] - outputs[:, 0] + prior[rows])
    assert not np.allclose(said[0], said[1], atol=0.01)
    assert rows.tolist() == np.flatnonzero(log.split == 0).tolist()
    expected = 0.75 * log.label[rows] + 0.25 / (1 + np.exp(-np.mean(said, axis=0)))
    assert goal.shape == (len(log), 1)
    np.testing.assert_allclose(goal[rows, 0], expected, atol=1e-5)
    assert not goal[log.split > 0].any()


def test_a_teacher_is_asked_beside_the_prior_of_its_own_seed(school: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder, log, elders = school
    asked: list[int] = []

    def measure(_: Log, recipe: config.Recipe) -> Any:
        asked.append(recipe.seed)
        assert recipe.eval.baselines == []
        return SimpleNamespace(prior=np.full(len(log), 5.0))

    monkeypatch.setattr(teachers.opponents, "measure", measure)
    own = [dataclasses.replace(elders[0], seed=2), dataclasses.replace(elders[0], seed=3)]
    data, prior = encoder.train(None, None), np.zeros(len(log))
    recipe = pupil_of("x", distill=1.0, score={"prior": "mf"})
    row = int(np.flatnonzero(log.split == 0)[0])
    goals = [teachers.taught(model, [one], data, log, prior, recipe, Target())[row, 0] for one in own]
    assert asked == [3]
    assert np.log(goals[1] / (1 - goals[1])) - np.log(goals[0] / (1 - goals[0])) == pytest.approx(5.0, abs=1e-3)


def test_rows_carry_what_their_events_are_taught(school: Any) -> None:
    model, encoder, log, _ = school
    data = encoder.train(None, None)
    plain = collate([data[i] for i in range(len(data))])
    data.taught = np.stack([np.arange(len(log)), -np.arange(len(log))], axis=1).astype(np.float32)
    batch = collate([data[i] for i in range(len(data))])
    assert batch.keys() - plain.keys() == {"taught"}
    assert batch["taught"].shape == (*batch["row"].shape, 2)
    read = batch["row"] >= 0
    assert batch["taught"][read][:, 0].tolist() == batch["row"][read].tolist()
    assert not batch["taught"][~read].any()
    # The loss of a click that is taught to be as likely as not is that of both answers' mean.
    data.taught = np.full((len(log), 1), 0.5, np.float32)
    half = scorer.interaction_loss(model, collate([data[0]]), torch.float32, Target(), 1)
    both = []
    for answer in (0, 1):
        one = dict(collate([data[0]]))
        del one["taught"]
        one["labels"] = torch.where(one["labels"] >= 0, answer, one["labels"])
        both.append(scorer.interaction_loss(model, one, torch.float32, Target(), 1))
    assert half.item() == pytest.approx((both[0] + both[1]).item() / 2, rel=1e-5)


class TestWhoMayTeach:
    @pytest.fixture
    def pupil(self, tiny_llama_folder: Path, tmp_path: Path) -> config.Recipe:
        """A recipe, and in `run` what it names as its teacher."""
        save_adapter(tiny_llama_folder, tmp_path / "run/adapter", config.Adapter(r=4))
        recipe = pupil_of(str(tmp_path / "run"), distill=0.25, model={"name": str(tiny_llama_folder)})
        self.write(tmp_path, recipe, seed=1)
        return recipe

    def write(self, tmp_path: Path, recipe: config.Recipe, **changed: Any) -> None:
        alone = dataclasses.replace(recipe, train=config.Train(), **changed)
        (tmp_path / "run/config.yaml").write_text(config.dump_recipe(alone))

    def test_another_seed_of_the_recipe(self, pupil: config.Recipe, tmp_path: Path) -> None:
        (found,) = teachers.find(pupil)
        assert (found.adapter.folder, found.adapter.key) == (tmp_path / "run/adapter", "train.teachers")
        assert found.seed == 1
        assert teachers.facts([found], 0.25)["runs"][0].keys() == {"name", "sha256"}
        assert config.recipe_to_dict(pupil)["train"]["distill"] == 0.25

    def test_another_split_or_prompt(self, pupil: config.Recipe, tmp_path: Path) -> None:
        self.write(tmp_path, pupil, data=config.Data(name="ml-100k", split=config.Split(test=0.2)))
        with pytest.raises(ConfigError, match=r"another data than this recipe; expected a run of the same"):
            teachers.find(pupil)
        self.write(tmp_path, pupil, prompt=config.Prompt(header="Films:\n"))
        with pytest.raises(ConfigError, match="another prompt"):
            teachers.find(pupil)

    @pytest.mark.parametrize(
        ("changed", "key"),
        [
            ({"train": config.Train(order="random"), "eval": config.Eval(history="frozen")}, r"train\.order"),
            ({"eval": config.Eval(history="frozen")}, r"eval\.history"),
            ({"start": config.Start(adapter="elsewhere")}, "start"),
        ],
    )
    def test_another_prior_or_start(
        self, changed: dict[str, Any], key: str, pupil: config.Recipe, tmp_path: Path
    ) -> None:
        theirs = dataclasses.replace(pupil, **{"train": config.Train(), **changed})
        (tmp_path / "run/config.yaml").write_text(config.dump_recipe(theirs))
        with pytest.raises(ConfigError, match=f"has another {key} than this recipe"):
            teachers.find(pupil)

    def test_other_rows_in_the_same_file(self, pupil: config.Recipe) -> None:
        found = teachers.find(pupil)
        about = found[0].adapter.about
        assert about is not None
        teachers.check_data(found, about.data.sha256)
        with pytest.raises(ConfigError, match=r"learned from tables of hash .*, here they have fce6; what it met may"):
            teachers.check_data(found, "fce6")

    def test_one_run_twice_and_the_run_itself(self, pupil: config.Recipe, tmp_path: Path) -> None:
        twice = dataclasses.replace(pupil.train, teachers=[str(tmp_path / "run"), f"{tmp_path}/run/"])
        with pytest.raises(ConfigError, match="run/ is named twice"):
            teachers.find(dataclasses.replace(pupil, train=twice))
        with pytest.raises(ConfigError, match="run is output_dir, too"):
            teachers.find(dataclasses.replace(pupil, output_dir=str(tmp_path / "run")))

    def test_a_base_model_that_runs_its_own_code(self, pupil: config.Recipe, tmp_path: Path) -> None:
        self.write(tmp_path, pupil, model=dataclasses.replace(pupil.model, trust_remote_code=True))
        assert len(teachers.find(pupil)) == 1

    def test_test_rows_that_a_seed_draws(self, pupil: config.Recipe, tmp_path: Path) -> None:
        folds = config.Data(name="ml-100k", split=config.Split(kind="kfold"))
        pupil = dataclasses.replace(pupil, data=folds)
        self.write(tmp_path, pupil, seed=1)
        with pytest.raises(ConfigError, match="has seed 1, this recipe 2, and its events or splits are drawn"):
            teachers.find(pupil)
        self.write(tmp_path, pupil, seed=2)
        assert len(teachers.find(pupil)) == 1

    def test_another_rank_and_no_run(self, pupil: config.Recipe, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"train\.teachers: .* has r 4, the recipe's adapter 8; set adapter\.r"):
            teachers.find(dataclasses.replace(pupil, adapter=config.Adapter(r=8)))
        (tmp_path / "run/config.yaml").unlink()
        with pytest.raises(ConfigError, match=r"run holds no config\.yaml; expected the folder of a run"):
            teachers.find(pupil)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": {"distill": 0.2}}, r"train\.distill: does nothing under train\.teachers"),
        ({"train": {"teachers": ["a"], "distill": 0}}, r"train\.distill: 0; expected a share above 0"),
        ({"train": {"teachers": ["a", "a"]}}, r"train\.teachers"),
        (
            {"train": {"teachers": ["a"]}, "adapter": {"method": "p_tuning"}},
            r"train\.teachers: .*not all that its training needs",
        ),
    ],
)
def test_what_does_not_go_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse_recipe({"data": {"name": "ml-100k"}, "output_dir": "x", **changed}, "r")
