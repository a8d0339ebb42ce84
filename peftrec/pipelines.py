"""transformers' `pipeline("recommendation", model=…)`: a saved adapter that ranks candidates for a history.

It is known as soon as both peftrec and `transformers.pipelines` are imported. The model is loaded by `Recommender`:
transformers is kept from loading the base model for itself, and from asking the Hub for its config.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers.pipelines
from transformers import AutoConfig, Pipeline, PreTrainedConfig

from peftrec.errors import DataError, ModelError
from peftrec.recommender import Recommender

TASK = "recommendation"
KEYS = ("history", "candidates", "user")
# What transformers says to every model that it loads, and what has no meaning for one that is not its own.
_SAID_TO_ALL = ("config", "code_revision", "local_files_only", "_from_pipeline")


class RecommendationPipeline(Pipeline):  # type: ignore[misc]
    """Ranks candidates for people by their histories.

    An input is a dict with `history`, and optionally `candidates` (else the whole items table is ranked) and `user`;
    they are those of `Recommender.rank`. It gives a list of dicts with title, item_id, score and, where clicks are
    predicted, probability, best first. A list of inputs gives a list of such lists, a generator or a data set gives
    them one by one.

    Args:
        model: a loaded recommender; `pipeline` makes it of a folder or a Hub id.
        device: as in transformers; None leaves the model where it is.
        batch_size: only 1: a person's candidates are read together already, people one after another.
        kwargs: `top_k` and `exclude_seen` as in a call, and what transformers' own class takes.

    Raises:
        ModelError: the model is no recommender.
        DataError: `batch_size` or `top_k` cannot be used.
    """

    _load_tokenizer = _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False

    def __init__(self, model: Recommender, *, device: Any = None, batch_size: int | None = None, **kwargs: Any) -> None:
        if not isinstance(model, Recommender):
            raise ModelError(
                f"model: {type(model).__name__}; expected an adapter's folder, a Hub id or a peftrec.Recommender"
            )
        _check_batch(batch_size)
        self.recommender = model
        super().__init__(model.model, device=model.model.device if device is None else device, **kwargs)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Rank the candidates of one input, or of each of several.

        Args:
            inputs: a dict, a list or a generator of dicts, or a torch data set of them.
            batch_size: only 1.
            kwargs: `top_k`: how many are kept of each ranking (default 10); `exclude_seen`: leave out what is in the
                history (default True); `num_workers` as in transformers.

        Raises:
            DataError: an input that cannot be read; see `Recommender.rank`.
        """
        _check_batch(batch_size)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.recommender.artifact.base_model.name} on {self.device}"

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Refused: an adapter is saved by its run, and published by `peftrec push`."""
        raise ModelError(
            f"{save_directory}: asked to save a pipeline; an adapter's folder is whole already: copy that, or use "
            "peftrec push"
        )

    def _sanitize_parameters(
        self, top_k: int | None = None, exclude_seen: bool | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise DataError(f"top_k: {top_k!r}; expected a whole number from 1")
        given = {"top_k": top_k, "exclude_seen": exclude_seen}
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def preprocess(self, input_: Any) -> dict[str, Any]:
        """One input as it was given, checked."""
        if not isinstance(input_, Mapping) or "history" not in input_ or not input_.keys() <= set(KEYS):
            found = f"keys {', '.join(map(str, input_))}" if isinstance(input_, Mapping) else type(input_).__name__
            raise DataError(
                f"input: {found}; expected a dict with history, and optionally candidates and user, or a list of those"
            )
        return dict(input_)

    def _forward(self, inputs: dict[str, Any], top_k: int = 10, exclude_seen: bool = True) -> Any:
        return self.recommender.rank(k=top_k, exclude_seen=exclude_seen, **inputs)

    def postprocess(self, ranked: Any) -> list[dict[str, Any]]:
        """Rankings as plain data."""
        return [
            {"title": one.title, "item_id": one.item_id, "score": one.score}
            | ({} if one.probability is None else {"probability": one.probability})
            for one in ranked
        ]


def _check_batch(batch_size: int | None) -> None:
    if batch_size not in (None, 1):
        raise DataError(
            f"batch_size: {batch_size}; a person's candidates are read together already, and people one after another; "
            "leave it out"
        )


class Loader:
    """What transformers takes for the class of our models."""

    @staticmethod
    def from_pretrained(name: str, *, dtype: Any = None, revision: Any = None, **kwargs: Any) -> Recommender:
        """A recommender by an adapter's folder or Hub id.

        Args:
            name: the folder or id.
            dtype: of the base weights, as text or a torch type; "auto" is that of the training.
            revision: of the adapter on the Hub.
            kwargs: `model_kwargs` of `pipeline`: other arguments of `Recommender.from_pretrained`.

        Raises:
            PeftrecError: as `Recommender.from_pretrained`, or it has no such argument.
        """
        options = {key: value for key, value in kwargs.items() if key not in _SAID_TO_ALL and value is not None}
        if dtype not in (None, "auto"):
            options["dtype"] = str(dtype).removeprefix("torch.")
        if revision is not None:
            # transformers' own kind of text carries the commit of the base model.
            options["revision"] = "".join(revision)
        known = inspect.signature(Recommender.from_pretrained).parameters
        if odd := sorted(options.keys() - known.keys()):
            raise ModelError(f"pipeline: {odd[0]}; a recommendation takes {', '.join(list(known)[1:])} in model_kwargs")
        return Recommender.from_pretrained(name, **options)


class _Config:
    """AutoConfig for `transformers.pipelines`, which asks for a base model's config before it looks at the task."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        """An empty config for our task, which has no use for one; otherwise as AutoConfig."""
        if kwargs.get("_from_pipeline") == TASK:
            return PreTrainedConfig()
        return AutoConfig.from_pretrained(*args, **kwargs)


transformers.pipelines.PIPELINE_REGISTRY.register_pipeline(TASK, RecommendationPipeline, pt_model=Loader, type="text")
transformers.pipelines.AutoConfig = _Config
