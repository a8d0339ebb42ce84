"""The scikit-learn classifier: sklearn's own tools take it, and its chances are the recommender's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from samples import FILMS
from saved import save_adapter, save_run
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import RocCurveDisplay, roc_auc_score
from sklearn.utils.validation import check_is_fitted
from test_frames import LOG

from peftrec.errors import DataError
from peftrec.estimator import RecommenderClassifier
from peftrec.frames import score_frame
from peftrec.recommender import Recommender

PAIRS = pl.DataFrame(
    {"user_id": ["ann", "bob", "ann", "bob"], "item_id": [13, 13, 12, 14], "timestamp": [5, 9, 2, 9]}
).to_pandas()
LIKED = np.asarray([1, 0, 1, 0])


@pytest.fixture(scope="module")
def recommender(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    folder = save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("adapter"))
    return Recommender.from_pretrained(folder, base_model=tiny_llama_folder, items=FILMS)


@pytest.fixture
def classifier(recommender: Recommender) -> RecommenderClassifier:
    return RecommenderClassifier(recommender, history=LOG)


def test_its_chances_are_the_recommenders(classifier: RecommenderClassifier, recommender: Recommender) -> None:
    expected = score_frame(recommender, PAIRS, LOG)
    found = classifier.predict_proba(PAIRS)
    np.testing.assert_allclose(found[:, 1], expected["probability"], atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(classifier.decision_function(PAIRS), expected["score"], atol=1e-4)
    assert classifier.predict(PAIRS).tolist() == (expected["score"] > 0).astype(int).tolist()
    assert 0 < classifier.predict(PAIRS).sum() < 4, "one class alone proves nothing"
    assert classifier.classes_.tolist() == [0, 1]
    assert classifier.predict(expected).tolist() == classifier.predict(PAIRS).tolist(), "scores are no hindrance"


def test_questions_bring_their_own_history(classifier: RecommenderClassifier, recommender: Recommender) -> None:
    past = ["Heat (1995):yes", "Toy Story (1995):no"]
    asked = {"history": [past, past, []], "candidate": ["187", "Sabrina (1954)", "187"]}
    expected = [*recommender.score(past, ["187", "Sabrina (1954)"]), *recommender.score([], ["187"])]
    polars = pl.DataFrame(asked)
    for frame in (polars, polars.to_pandas()):
        np.testing.assert_allclose(classifier.decision_function(frame), expected, atol=1e-4)


def test_sklearns_tools_take_it(classifier: RecommenderClassifier) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    check_is_fitted(classifier)
    assert is_classifier(classifier)
    shown = CalibrationDisplay.from_estimator(classifier, PAIRS, LIKED, n_bins=2)
    np.testing.assert_allclose(shown.y_prob, classifier.predict_proba(PAIRS)[:, 1])
    curve = RocCurveDisplay.from_estimator(classifier, PAIRS, LIKED)
    assert curve.roc_auc == roc_auc_score(LIKED, classifier.decision_function(PAIRS))
    assert classifier.score(PAIRS, LIKED) == (classifier.predict(PAIRS) == LIKED).mean()


def test_clones_share_the_model(classifier: RecommenderClassifier, recommender: Recommender) -> None:
    copy = clone(classifier)
    assert copy is not classifier
    assert copy.get_params() == {"recommender": recommender, "history": LOG, "columns": None}
    assert copy.recommender is recommender
    assert copy.set_params(columns={"user_id": "who"}).fit(PAIRS, LIKED) is copy
    assert classifier.columns is None
    renamed = PAIRS.rename(columns={"user_id": "who"})
    assert copy.predict(renamed).tolist() == classifier.predict(PAIRS).tolist()
    with pytest.warns(UserWarning, match=r"X: 1 users have no events in the log \(such as 'cleo'\)"):
        assert len(classifier.predict(PAIRS.assign(user_id="cleo"))) == 4


def test_new_parameters_are_used(classifier: RecommenderClassifier) -> None:
    before = classifier.decision_function(PAIRS)
    after = classifier.set_params(history=LOG.with_columns(rating=6 - pl.col("rating"))).decision_function(PAIRS)
    assert np.abs(after - before).max() > 0.01


def test_a_folder_will_do_and_survives_pickling(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_run(tiny_llama_folder, tmp_path / "run", data_name="ml-100k")
    pairs = pl.DataFrame({"user_id": [1], "item_id": [50]})
    log = pl.DataFrame({"user_id": [1], "item_id": [1], "label": [1]})
    classifier = RecommenderClassifier(str(folder), log).fit()
    found = classifier.predict_proba(pairs)
    again = pickle.loads(pickle.dumps(classifier))
    assert "_loaded" not in vars(again)
    np.testing.assert_allclose(again.predict_proba(pairs), found)


def test_mistakes_are_one_line(recommender: Recommender, tiny_llama_folder: Path, tmp_path: Path) -> None:
    def ask(x: Any, **options: Any) -> Any:
        return RecommenderClassifier(**{"recommender": recommender, "history": LOG, **options}).predict_proba(x)

    with pytest.raises(DataError, match="X: ndarray; expected a polars or pandas DataFrame"):
        ask(np.zeros((2, 2)))
    with pytest.raises(DataError, match="X: pairs of users and items, but there is no log; give history="):
        ask(PAIRS, history=None)
    with pytest.raises(DataError, match=r"X: no column 'history' \(found candidate\)"):
        ask(pl.DataFrame({"candidate": ["Heat"]}))
    with pytest.raises(DataError, match="recommender: int; expected an adapter's folder"):
        ask(PAIRS, recommender=3)
    folder = save_adapter(tiny_llama_folder, tmp_path, task="rating", scale=(1, 2, 3, 4, 5), prior=None)
    rater = Recommender.from_pretrained(folder, base_model=tiny_llama_folder, items=FILMS)
    with pytest.raises(DataError, match="this adapter predicts ratings, which are no classes"):
        ask(PAIRS, recommender=rater)
