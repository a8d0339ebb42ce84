"""Random adapters on tiny models, saved as a run saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from samples import PRIOR
from test_encoders import shape_of

from peftrec import adapters, artifact, backbone, config, encode, scorer
from peftrec.baselines import Prior
from peftrec.prompts import WholeText
from peftrec.target import Target

HEADER = "What this person rated, oldest first:\n"
QUESTIONS = [
    ([("Heat (1995)", 1), ("Toy Story (1995)", 0)], "Sabrina (1954)"),
    ([], "187 (1997)"),
    ([("187 (1997)", 1)], "Heat (1995)"),
]
BASES = {"tokens": (0.0, 0.0), "classifier": (0.0, 0.0), "linear": (0.0,)}


def save_adapter(
    base: Path,
    folder: Path,
    adapter: config.Adapter | None = None,
    *,
    task: Any = "click",
    head: Any = "tokens",
    scale: Sequence[float] = (0.0, 1.0),
    prior: Prior | None = PRIOR,
    data_name: str = "films",
    item: str = "{title} ({year})",
    strength: float = 0.3,
    **prompt: Any,
) -> Path:
    """A random adapter on the base model in `base`, in `folder`, as `RUN/adapter` holds it."""
    adapter = adapter or config.Adapter(r=4)
    target = Target(task, head, scale=tuple(scale), offset=BASES[head] if task == "click" else (0.0,) * len(scale))
    loaded = backbone.load(config.Model(name=str(base), dtype="float32"), target)
    codec = encode.task_codec(loaded.tokenizer, task, scale, HEADER, None, loaded.kind)
    template = codec.completed(None) if isinstance(codec, WholeText) else None
    layout = "pointwise" if template else "timeline"
    recipe = config.parse_recipe(
        {
            "task": task,
            "data": {"name": "ml-100k"},
            "prompt": {"item": item, "max_tokens": 512, "layout": layout, **prompt},
            "model": {"name": str(base), "dtype": "float32"},
            "output_dir": "x",
        },
        "r",
    )
    model = scorer.with_head(loaded.model, head, codec.answers)
    attached = adapters.attach(model, adapter, base_name="tiny/base", seed=3, steps=100)
    torch.manual_seed(3)
    for parameter in attached.parameters():
        if parameter.requires_grad:  # B is zero at the start: then nothing would be tested
            parameter.data += torch.randn_like(parameter) * strength
    adapters.save(attached, folder)
    loaded.tokenizer.save_pretrained(folder)
    about = artifact.describe(
        recipe,
        codec,
        loaded.base,
        target,
        data_name=data_name,
        data_sha256="0",
        like_at=4,
        max_item_tokens=32,
        example=QUESTIONS[0],
        template=template,
        probes=[artifact.Probe(history, candidate, 0.0) for history, candidate in QUESTIONS],
    )
    artifact.write(folder, about, prior)
    return folder


def save_run(base: Path, run: Path, **options: Any) -> Path:
    """The same inside a run's folder, whose recipe says where the base model is; its adapter's folder."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"data: {{name: ml-100k}}\nmodel: {{name: {base}}}\noutput_dir: x\n")
    return save_adapter(base, run / "adapter", **options)


def tiny_bert(folder: Path) -> Path:
    """A random BERT (float32) with a word piece tokenizer."""
    kind, shape, tokenizer = shape_of("bert")
    torch.manual_seed(1)
    kind(shape).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
