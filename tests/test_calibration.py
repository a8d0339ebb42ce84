"""Calibration: the curve by hand, what it leaves alone, and how it goes with an adapter."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import save_adapter

from peftrec import artifact, calibration
from peftrec.errors import ConfigError, ModelError
from peftrec.recommender import Recommender
from peftrec.target import Target


def test_a_temperature_by_hand() -> None:
    """Log-odds of two that come true three times in four, as log 3 does: the slope is log 3 / 2."""
    score = np.tile([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0], 500)
    truth = np.tile([1, 1, 1, 0, 0, 0, 0, 1], 500)
    knots = calibration.fit("temperature", "click", score, truth)
    found = calibration.calibrated(np.array([2.0, 0.0, -4.0]), knots)
    np.testing.assert_allclose(found, [np.log(3), 0, -2 * np.log(3)], atol=2e-3)


def test_isotonic_by_hand() -> None:
    """Steps of the ratings 1, 2.5 (3 before 2, so their mean) and 5; half way between two middles is half way up."""
    score, truth = np.array([1.5, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 5.0])
    knots = calibration.fit("isotonic", "rating", score, truth)
    assert knots == ((1.5, 1.0), (2.5, 2.5), (4.0, 5.0))
    found = calibration.calibrated(np.array([1.0, 1.5, 2.0, 2.5, 3.25, 4.5]), knots)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.75, 2.5, 3.75, 5.5])
    target = Target("rating", scale=(1.0, 2.0, 3.0, 4.0, 5.0), offset=(0.0,) * 5, calibration=knots)
    np.testing.assert_allclose(target.calibrated(np.array([1.0, 4.5])), [1.0, 5.0])  # within the scale


def test_isotonic_of_clicks_is_finite() -> None:
    """Two rows that were not liked and two that were: (0 + 1/2) / 3 and (2 + 1/2) / 3."""
    knots = calibration.fit("isotonic", "click", [-3.0, -1.0, 1.0, 3.0], [0, 0, 1, 1])
    np.testing.assert_allclose(knots, [(-2, np.log(0.5 / 2.5)), (2, np.log(2.5 / 0.5))])


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["temperature", "isotonic"]), st.floats(0.2, 4))
def test_the_order_stays_and_the_fit_gets_better(seed: int, kind: str, bold: float) -> None:
    draw = np.random.default_rng(seed)
    fair = draw.normal(0, 1.5, 2000)
    label = (draw.random(2000) < 1 / (1 + np.exp(-fair))).astype(int)
    score = fair * bold
    knots = calibration.fit(kind, "click", score, label)  # type: ignore[arg-type]
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(knots))
    found = calibration.calibrated(score, knots)
    assert (np.argsort(found, kind="stable") == np.argsort(score, kind="stable")).all()

    def loss(log_odds: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, np.where(label == 1, -log_odds, log_odds))))

    # What keeps a step of few rows finite, and the lines between steps, may cost a little.
    assert loss(found) <= loss(score) + (0.001 if kind == "temperature" else 0.03)


def test_many_steps_are_thinned() -> None:
    rising = np.arange(5000.0)
    knots = calibration.fit("isotonic", "rating", rising, rising)
    assert len(knots) == calibration.MOST_KNOTS
    np.testing.assert_allclose(calibration.calibrated(rising, knots), rising)


def test_few_rows_are_warned_of() -> None:
    (line,) = calibration.warnings("isotonic", 499)
    assert line.startswith("score.calibration: isotonic on 499 validation rows")
    assert not calibration.warnings("isotonic", 500)
    assert not calibration.warnings("temperature", 10)


def test_without_knots_nothing_changes() -> None:
    score = np.array([3.0, -1.0])
    assert calibration.calibrated(score, ()) is score


def test_isotonic_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.isotonic", None)
    calibration.check("temperature")
    with pytest.raises(ConfigError, match=r"pip install 'peftrec\[sklearn\]', or choose temperature"):
        calibration.check("isotonic")


HISTORY, ASKED = ["Heat (1995):yes"], ["Sabrina (1954)", "187 (1997)"]


def test_a_saved_curve_is_what_scores_go_through(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    plain = Recommender.from_pretrained(folder, base_model=str(tiny_llama_folder))
    alone = Recommender.from_pretrained(folder, base_model=str(tiny_llama_folder), prior=False)
    raw, probes = plain.score(HISTORY, ASKED), plain.probe_scores()
    about = artifact.read(folder)
    knots = [[-100.0, -50.0], [100.0, 50.0]]
    curved = dataclasses.replace(about, target=dataclasses.replace(about.target, calibration=knots))
    artifact.write(folder, curved, plain.prior)
    found = Recommender.from_pretrained(folder, base_model=str(tiny_llama_folder))
    np.testing.assert_allclose(found.score(HISTORY, ASKED), raw / 2, atol=1e-6)
    np.testing.assert_allclose(found.probability(HISTORY, ASKED), 1 / (1 + np.exp(-raw / 2)), atol=1e-6)
    # Without the prior nobody knows how bold the scores are, and probes ask the model alone.
    bare = Recommender.from_pretrained(folder, base_model=str(tiny_llama_folder), prior=False)
    np.testing.assert_allclose(bare.score(HISTORY, ASKED), alone.score(HISTORY, ASKED), atol=1e-6)
    np.testing.assert_allclose(found.probe_scores(), probes, atol=1e-6)
    assert artifact.uncalibrated(curved) == about


@pytest.mark.parametrize(
    "points", [[[0, 0], [0, 1]], [[0, 1], [1, 0]], [[0]], [[0, "x"]], [[i, i] for i in range(201)]]
)
def test_a_curve_that_is_none_is_refused(tiny_llama_folder: Path, tmp_path: Path, points: list[object]) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "adapter")
    written = json.loads((folder / "peftrec.json").read_text())
    written["target"]["calibration"] = points
    (folder / "peftrec.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match=r"target\.calibration"):
        artifact.read(folder)
