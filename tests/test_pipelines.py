"""transformers' pipeline("recommendation"): the recommender's own ranking, however it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from samples import FILMS
from saved import save_adapter

import peftrec
from peftrec.errors import DataError, ModelError
from peftrec.recommender import Recommender

HISTORY = ["Heat (1995):yes", "Toy Story (1995):no"]
CANDIDATES = ["Sabrina (1954)", "187", "Fargo (1996)"]
ASKED = {"history": HISTORY, "candidates": CANDIDATES}


@pytest.fixture(scope="module")
def adapter(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def recommender(adapter: Path, tiny_llama_folder: Path) -> Recommender:
    return Recommender.from_pretrained(adapter, base_model=tiny_llama_folder, items=FILMS)


@pytest.fixture(scope="module")
def recommend(adapter: Path, tiny_llama_folder: Path) -> Any:
    """By the adapter's folder, as a stranger would, though its base model is on no Hub that could be asked."""
    from transformers import pipeline

    assert peftrec.__version__  # importing peftrec is what makes the task known
    more = {"base_model": tiny_llama_folder, "items": FILMS}
    return pipeline("recommendation", model=str(adapter), model_kwargs=more)


def test_it_ranks_as_the_recommender_does(recommend: Any, recommender: Recommender) -> None:
    found = recommend(ASKED, top_k=2)
    assert found == [
        {"title": one.title, "item_id": one.item_id, "score": one.score, "probability": one.probability}
        for one in recommender.rank(HISTORY, CANDIDATES, k=2)
    ]
    assert len(found) == 2
    assert found[0]["score"] > found[1]["score"]


def test_without_candidates_it_ranks_the_items_table(recommend: Any) -> None:
    assert {one["item_id"] for one in recommend({"history": HISTORY})} == {12, 13, 14}
    assert {one["item_id"] for one in recommend({"history": HISTORY}, exclude_seen=False)} == {10, 11, 12, 13, 14}


def test_lists_generators_and_data_sets(recommend: Any) -> None:
    from torch.utils.data import Dataset

    class Two(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            if index > 1:
                raise IndexError
            return [ASKED, {"history": []}][index]

    one, other = recommend(ASKED), recommend({"history": []})
    assert recommend([ASKED, {"history": []}]) == [one, other]
    assert list(recommend(asked for asked in [ASKED, {"history": []}])) == [one, other]
    assert list(recommend(Two())) == [one, other]
    assert recommend([]) == []


def test_a_loaded_recommender_is_taken_as_it_is(recommend: Any, recommender: Recommender) -> None:
    from transformers import pipeline

    made = pipeline("recommendation", model=recommender, top_k=1)
    assert made.recommender is recommender
    assert made(ASKED) == recommend(ASKED, top_k=1)
    assert made(ASKED, top_k=2) == recommend(ASKED, top_k=2)
    assert "cpu" in repr(made)


def test_ratings_have_no_probability(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    folder = save_adapter(tiny_llama_folder, tmp_path, task="rating", scale=(1, 2, 3, 4, 5), prior=None)
    made = pipeline(
        "recommendation", model=folder, model_kwargs={"base_model": tiny_llama_folder, "items": FILMS}, dtype="float32"
    )
    (found,) = made({"history": ["Heat:4"], "candidates": ["187"]})
    assert found.keys() == {"title", "item_id", "score"}
    assert 1 <= found["score"] <= 5


def test_what_cannot_be_meant_is_refused(recommend: Any, recommender: Recommender, adapter: Path) -> None:
    from transformers import pipeline

    with pytest.raises(DataError, match="batch_size: 8; a person's candidates are read together already"):
        recommend(ASKED, batch_size=8)
    with pytest.raises(DataError, match="batch_size: 8"):
        pipeline("recommendation", model=recommender, batch_size=8)
    with pytest.raises(DataError, match="top_k: 0; expected a whole number from 1"):
        recommend(ASKED, top_k=0)
    with pytest.raises(DataError, match="input: keys candidates; expected a dict with history"):
        recommend({"candidates": CANDIDATES})
    with pytest.raises(DataError, match="input: keys history, candidate; expected a dict with history"):
        recommend({"history": HISTORY, "candidate": CANDIDATES})
    with pytest.raises(DataError, match="input: str; expected a dict with history"):
        recommend(["Heat:yes"])
    with pytest.raises(ModelError, match="model: int; expected an adapter's folder"):
        pipeline("recommendation", model=3)
    with pytest.raises(ModelError, match="pipeline: device_map; a recommendation takes revision, items, "):
        pipeline("recommendation", model=str(adapter), device_map="auto")
    with pytest.raises(ModelError, match="asked to save a pipeline"):
        recommend.save_pretrained("x")


def test_a_run_will_do_and_what_is_none_is_said(
    adapter: Path, recommend: Any, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    from transformers import pipeline

    more = {"base_model": tiny_llama_folder, "items": FILMS}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(adapter)
    assert pipeline("recommendation", model=tmp_path / "run", model_kwargs=more)(ASKED) == recommend(ASKED)
    with pytest.raises(ModelError, match=r"no peftrec\.json in it"):
        pipeline("recommendation", model=tmp_path)


def test_other_tasks_still_read_their_configs(tiny_llama_folder: Path) -> None:
    from transformers import pipeline

    made = pipeline("text-generation", model=str(tiny_llama_folder))
    assert made.model.config.hidden_size == 32


@pytest.mark.parametrize(
    "code",
    [
        "import peftrec; from transformers.pipelines import PIPELINE_REGISTRY as all",
        "from transformers.pipelines import PIPELINE_REGISTRY as all; import peftrec",
        "import peftrec.pipelines; from transformers.pipelines import PIPELINE_REGISTRY as all",
    ],
)
def test_the_task_is_known_whichever_is_imported_first(code: str) -> None:
    code += "; print('recommendation' in all.supported_tasks)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")
