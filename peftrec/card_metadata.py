"""The head of a model card: what the Hub reads of it, as the Hub's own client writes and checks it."""

from __future__ import annotations

import math

from huggingface_hub import EvalResult, ModelCardData

from peftrec.card_facts import Facts, hub_base, hub_data, named_data, recipe_of
from peftrec.config import Author
from peftrec.metrics import METRICS
from peftrec.report import HEADINGS

KEYS = (
    *("library_name", "base_model", "base_model_relation", "pipeline_tag", "license", "language"),
    *("tags", "datasets", "metrics", "model-index"),
)
"""What we write; other keys of a card are its author's."""

TASKS = {"click": "Click prediction", "rating": "Rating prediction"}


def metadata(facts: Facts, author: Author, name: str) -> ModelCardData:
    """The card's metadata, without what nobody knows.

    Args:
        facts: of the run.
        author: what its author says.
        name: of the model.
    """
    recipe, about = recipe_of(facts), facts.artifact
    whole = recipe.adapter.method == "full"
    base, data, results = hub_base(facts, author), named_data(facts), _results(facts)
    dataset = hub_data(facts)
    return ModelCardData(
        library_name="peftrec" if whole else "peft",
        base_model=base,
        base_model_relation=None if base is None else "finetune" if whole else "adapter",
        pipeline_tag="text-generation" if about.target.head == "tokens" else "text-classification",
        license=author.license,
        language=author.language or (data.language if data else None),
        tags=["peftrec", "recommendation", f"{about.task}-prediction", recipe.adapter.method],
        datasets=[dataset] if dataset else None,
        metrics=list(dict.fromkeys(one.metric_type for one in results)) or None,
        eval_results=results or None,
        model_name=name if results else None,
    )


def _results(facts: Facts) -> list[EvalResult]:
    """Every test metric that is defined, those of slices too."""
    task = facts.record.task
    found = []
    for key, value in facts.record.metrics.items():
        split, _, rest = key.partition("/")
        metric, _, part = rest.partition("|")
        if split != "test" or metric not in METRICS[task] or value is None or not math.isfinite(value):
            continue
        found.append(
            EvalResult(
                task_type=f"{task}-prediction",
                task_name=TASKS[task],
                dataset_type=hub_data(facts) or facts.artifact.data.name,
                dataset_name=facts.artifact.data.name,
                dataset_split=split,
                metric_type=metric,
                metric_name=HEADINGS[metric] + (f" ({part})" if part else ""),
                metric_value=value,
            )
        )
    return found
