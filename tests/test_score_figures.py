from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peftrec import score_figures
from peftrec.metrics import click_metrics, rating_metrics
from peftrec.ranking import auc

STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


def legend(owner: Axes | Figure | None) -> list[str]:
    found = owner.legends[0] if isinstance(owner, Figure) else owner.get_legend()
    return [text.get_text() for text in found.get_texts()]


def test_roc_gives_each_auc_in_the_legend() -> None:
    label, scores = np.array([0, 1, 0, 1]), {"adapter": np.array([0, 1, 2, 3]), "mine": np.zeros(4)}
    figure = score_figures.roc(label, scores, "test")
    assert figure is not None
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["0.750  adapter", "0.500  mine", "0.500  chance"]


def test_curve_by_hand() -> None:
    false, true = score_figures._curve(np.array([0, 1, 0, 1]), np.array([1.0, 3.0, 2.0, 2.0]))
    assert false.tolist() == [0, 0, 0.5, 1]
    assert true.tolist() == [0, 0.5, 1, 1]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=2).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_area_under_the_curve_is_the_auc(rows: list[tuple[int, int]]) -> None:
    label, score = (np.array(column) for column in zip(*rows, strict=True))
    false, true = score_figures._curve(label, score)
    area = np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2)
    assert area == pytest.approx(auc(label, score))


def test_a_long_curve_is_thinned_between_its_ends() -> None:
    rng = np.random.default_rng(0)
    label, score = rng.integers(0, 2, 20_000), rng.normal(size=20_000)
    false, true = score_figures._curve(label, score)
    assert len(false) <= 1500
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_calibration_gives_the_ece_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    rating, user = rng.integers(1, 6, 200), np.zeros(200)
    score = rating + rng.normal(size=200)
    figure = score_figures.calibration(rating, {"adapter": score}, "test", "rating", STARS)
    assert figure is not None
    error = rating_metrics(rating, score, user, STARS)["ece"]
    assert legend(figure.axes[0]) == ["true on average", f"{error:.3f}  adapter"]
    figure = score_figures.calibration(rating > 3, {"adapter": score - 3}, "test")
    assert figure is not None
    assert legend(figure.axes[0])[1] == f"{click_metrics(rating > 3, score - 3, user)['ece']:.3f}  adapter"


def test_calibration_by_hand() -> None:
    # Two rows in the lowest bin, two in the highest: mean prediction to the right, mean rating upwards.
    figure = score_figures.calibration(
        np.array([1, 2, 5, 5]), {"adapter": [1.0, 1.2, 4.9, 5.0]}, "test", "rating", STARS
    )
    assert figure is not None
    assert figure.axes[0].lines[1].get_xydata() == pytest.approx(np.array([[1.1, 1.5], [4.95, 5]]))
    assert [bar.get_height() for bar in figure.axes[1].patches] == [2, *[0] * 13, 2]


def test_agreement_by_hand() -> None:
    rating = np.array([1, 1, 5, 5], dtype=np.float32)
    scores = {"adapter": [1.0, 2.0, 4.0, 5.0], "bias": [3.0, 3.0, 3.0, 4.0], "global_mean": np.full(4, 3.0)}
    figure = score_figures.agreement(rating, scores, "test", STARS)
    assert figure is not None
    above, below = figure.axes
    assert [line.get_xydata().tolist() for line in above.lines[1:]] == [[[1, 1.5], [5, 4.5]], [[1, 3], [5, 3.5]]]
    band = above.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1.1, 4.9))
    assert [bar.get_height() for bar in below.patches] == [2, 0, 0, 0, 2]
    assert legend(figure) == ["predicted as given", "adapter", "adapter, middle 80% of rows", "user+item bias"]


def test_errors_by_hand() -> None:
    rating = np.array([1, 2, 3, 4, 5])
    figure = score_figures.errors(rating, {"adapter": rating + np.array([0, 0.5, -1, 1.5, 2])}, "test")
    assert figure is not None
    assert legend(figure.axes[0]) == ["1.000  adapter"]
    off, share = figure.axes[0].lines[0].get_xydata().T
    assert np.interp([0.25, 0.5, 0.75], share, off) == pytest.approx([0.5, 1, 1.5], abs=1e-3)
    assert figure.axes[0].get_xlim() == (0, pytest.approx(1.98))


@pytest.mark.parametrize("draw", [score_figures.agreement, lambda *given: score_figures.errors(*given[:3])])
def test_no_rows_give_no_figure(draw) -> None:
    assert draw(np.array([]), {"adapter": np.array([])}, "test", STARS) is None
    assert draw(np.array([1.0]), {}, "test", STARS) is None
