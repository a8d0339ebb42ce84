from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_record import full_disk

from peftrec import figures
from peftrec.errors import PeftrecError
from peftrec.metrics import Interval, auc

LOG = [
    {"loss": 0.7, "step": 1, "epoch": 0.1},
    {"loss": 0.6, "step": 2},
    {"eval_loss": 0.65, "eval_auc": 0.6, "eval_uauc": float("nan"), "step": 2},
    {"train_loss": 0.65, "train_runtime": 1.0, "step": 2},
]


def inputs(**changes: Any) -> dict[str, Any]:
    """What `draw` needs for a run with a baseline, a scorer of counts and one slice that has one class."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 60)
    scores = {
        "adapter": rng.normal(size=60) + label,
        "bias": rng.normal(size=60),
        "popularity": rng.integers(0, 9, 60).astype(float),
    }
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    intervals = {
        name: {
            "test/auc": Interval(auc(label, score), 0.4, 0.9),
            "test/auc|cold_item": Interval(0.7, float("nan"), float("nan")),
            "test/auc|cold_user": nothing,
        }
        for name, score in scores.items()
    }
    rows = {"all": 60, "cold_item": 8, "cold_user": 3, "tail": 0}
    given = {
        "train_log": LOG,
        "best_step": 2,
        "label": label,
        "scores": scores,
        "intervals": intervals,
        "rows": rows,
        "ranking_only": ("popularity",),
    }
    return given | changes


def test_four_pngs_wide_enough_and_nothing_else(tmp_path: Path) -> None:
    before = mpl.rcParams.copy()
    written = figures.draw(tmp_path / "figures", **inputs())
    assert [path.name for path in written] == ["loss.png", "roc.png", "calibration.png", "slices.png"]
    assert sorted((tmp_path / "figures").iterdir()) == sorted(written)
    for path in written:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", head[16:20])[0] >= 900
    assert mpl.rcParams.copy() == before


def test_what_has_nothing_to_show_is_left_out_and_stale_files_go(tmp_path: Path) -> None:
    (tmp_path / "roc.png").write_bytes(b"of an earlier run")
    label = np.ones(3)
    written = figures.draw(
        tmp_path,
        **inputs(train_log=[], best_step=None, label=label, scores={"adapter": np.zeros(3)}, intervals={"adapter": {}}),
    )
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in written] == ["calibration.png"]


def test_loss_shows_what_was_logged_and_which_step_was_kept() -> None:
    figure = figures.loss(LOG, 2)
    assert figure is not None
    above, below = figure.axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == [
        "training",
        "validation",
        "weights kept (step 2)",
    ]
    assert above.lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.6]]
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["validation AUC"]


def test_loss_without_validation_has_one_panel() -> None:
    figure = figures.loss(LOG[:2], None)
    assert figure is not None
    assert len(figure.axes) == 1


def test_roc_gives_each_auc_in_the_legend() -> None:
    label, scores = np.array([0, 1, 0, 1]), {"adapter": np.array([0, 1, 2, 3]), "mine": np.zeros(4)}
    figure = figures.roc(label, scores, "test")
    assert figure is not None
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["0.750  adapter", "0.500  mine", "0.500  chance"]


def test_curve_by_hand() -> None:
    false, true = figures._curve(np.array([0, 1, 0, 1]), np.array([1.0, 3.0, 2.0, 2.0]))
    assert false.tolist() == [0, 0, 0.5, 1]
    assert true.tolist() == [0, 0.5, 1, 1]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=2).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_area_under_the_curve_is_the_auc(rows: list[tuple[int, int]]) -> None:
    label, score = (np.array(column) for column in zip(*rows, strict=True))
    false, true = figures._curve(label, score)
    area = np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2)
    assert area == pytest.approx(auc(label, score))


def test_a_long_curve_is_thinned_between_its_ends() -> None:
    rng = np.random.default_rng(0)
    label, score = rng.integers(0, 2, 20_000), rng.normal(size=20_000)
    false, true = figures._curve(label, score)
    assert len(false) <= 1500
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_slices_show_those_that_are_defined() -> None:
    given = inputs()
    figure = figures.slices(given["intervals"], given["rows"], "test")
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["all\n60 rows", "cold item\n8 rows"]


def test_a_full_disk_leaves_no_figure(tmp_path: Path) -> None:
    with full_disk(1000), pytest.raises(PeftrecError, match=r"loss.png: cannot be written \(File too large\)"):
        figures.draw(tmp_path, **inputs())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(PeftrecError, match="figures: cannot be made"):
        figures.draw(tmp_path / "figures", **inputs())
