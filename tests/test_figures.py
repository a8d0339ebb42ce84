from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from test_record import full_disk

from peftrec import figures
from peftrec.bootstrap import Interval
from peftrec.errors import PeftrecError
from peftrec.ranking import auc

LOG = [
    {"loss": 0.7, "step": 1, "epoch": 0.1},
    {"loss": 0.6, "step": 2},
    {"eval_loss": 0.65, "eval_auc": 0.6, "eval_uauc": float("nan"), "step": 2},
    {"train_loss": 0.65, "train_runtime": 1.0, "step": 2},
]


STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


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
        "task": "click",
        "train_log": LOG,
        "best_step": 2,
        "truth": label,
        "scores": scores,
        "intervals": intervals,
        "rows": rows,
        "ranking_only": ("popularity",),
    }
    return given | changes


def rated(**changes: Any) -> dict[str, Any]:
    """The same for ratings."""
    rng = np.random.default_rng(0)
    rating = rng.integers(1, 6, 60)
    scores = {name: rating + rng.normal(size=60) for name in ("adapter", "bias", "popularity", "global_mean")}
    given = {
        "task": "rating",
        "train_log": [{"loss": 1.4, "step": 1}, {"eval_loss": 1.3, "eval_rmse": 0.98, "eval_mae": 0.8, "step": 1}],
        "truth": rating,
        "scores": scores,
        "intervals": {name: {"test/rmse": Interval(1.0, 0.9, 1.1)} for name in ("adapter", "bias", "global_mean")},
        "scale": STARS,
        "loss": "squared_error",
    }
    return inputs(**given) | changes


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (inputs(), ["loss", "roc", "calibration", "slices"]),
        (rated(), ["loss", "ratings", "errors", "calibration", "slices"]),
    ],
    ids=["click", "rating"],
)
def test_pngs_wide_enough_and_nothing_else(tmp_path: Path, given: dict[str, Any], names: list[str]) -> None:
    before = mpl.rcParams.copy()
    written = figures.draw(tmp_path / "figures", **given)
    assert [path.stem for path in written] == names
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
        **inputs(train_log=[], best_step=None, truth=label, scores={"adapter": np.zeros(3)}, intervals={"adapter": {}}),
    )
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in written] == ["calibration.png"]


def test_loss_shows_what_was_logged_and_which_step_was_kept() -> None:
    figure = figures.losses(LOG, 2)
    assert figure is not None
    above, below = figure.axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == [
        "training",
        "validation",
        "weights kept (step 2)",
    ]
    assert above.lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.6]]
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["validation AUC"]


def test_loss_of_training_is_without_what_aligns_domains() -> None:
    figure = figures.losses([{"step": 1, "loss": 0.75, "align_loss": 0.25}, {"step": 2, "loss": 0.5}], None)
    assert figure is not None
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.5]]


def test_loss_of_ratings_names_its_unit_and_shows_the_error() -> None:
    figure = figures.losses(rated()["train_log"], None, "rating", "squared_error")
    assert figure is not None
    above, below = figure.axes
    assert above.get_ylabel() == "squared error (rating points²)"
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["validation RMSE"]
    assert below.lines[0].get_xydata().tolist() == [[1, 0.98]]


def test_loss_without_validation_has_one_panel() -> None:
    figure = figures.losses(LOG[:2], None)
    assert figure is not None
    assert len(figure.axes) == 1


def test_slices_show_those_that_are_defined() -> None:
    given = inputs()
    figure = figures.slices(given["intervals"], given["rows"], "test")
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["all\n60 rows", "cold item\n8 rows"]


def test_slices_of_ratings_say_that_lower_is_better_and_leave_out_who_predicts_none() -> None:
    given = rated()
    intervals = given["intervals"] | {"popularity": {"test/uauc": Interval(0.6, 0.5, 0.7)}}
    figure = figures.slices(intervals, given["rows"], "test", "rmse")
    assert figure is not None
    assert figure.axes[0].get_title() == "RMSE by slice of the test rows, with 95% intervals (lower is better)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["adapter", "user+item bias"]
    assert figure.axes[0].get_xlim()[0] > 0.5  # chance has no place on this axis


def test_a_full_disk_leaves_no_figure(tmp_path: Path) -> None:
    with full_disk(1000), pytest.raises(PeftrecError, match=r"loss.png: cannot be written \(File too large\)"):
        figures.draw(tmp_path, **inputs())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(PeftrecError, match="figures: cannot be made"):
        figures.draw(tmp_path / "figures", **inputs())
