"""Every kind of adapter gives the same scores after it was pushed and pulled."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from hub_server import WRITE, HubServer
from test_adapters import METHODS, STEPS, nudge
from test_recommender import HEADER

from peftrec import adapters, artifact, backbone, config, hub, reload, scorer
from peftrec.artifact import Probe
from peftrec.baselines import Prior
from peftrec.prompts import Codec
from peftrec.recommender import Recommender
from peftrec.target import Target

QUESTIONS = [
    ([("Heat (1995)", 1), ("Toy Story (1995)", 0)], "What's Up, Doc? (1972)"),
    ([("Film 12 (1972)", 1)], "Heat (1995)"),
    ([], "Toy Story (1972)"),
]
BOTTLENECKS = {
    f"bottleneck_{kind}": config.Adapter(method="bottleneck", variant=kind, reduction_factor=4)  # type: ignore[arg-type]
    for kind in ("houlsby", "pfeiffer", "parallel")
}
EVERY = {**METHODS, **BOTTLENECKS, "loftq": config.Adapter(r=4, variant="loftq")}
WITH_HEADS = ("lora", "bottleneck_houlsby", "prefix", "full")
IN_A_FRESH_PROCESS = (("prefix_projection", "tokens"), ("bottleneck_houlsby", "classifier"), ("full", "linear"))
HEADS = {
    "tokens": Target(),
    "classifier": Target("click", "classifier", "cross_entropy", (0.0, 1.0), (0.0, 0.0)),
    "linear": Target("click", "linear", "cross_entropy", (0.0, 1.0), (0.0,)),
    "rating": Target("rating", "tokens", "squared_error", (1.0, 2.0), (0.0, 0.1)),
}


def trained(base: Path, method: config.Adapter, head: str, folder: Path) -> tuple[Path, list[float]]:
    """An adapter as a run leaves it, with its probes; and what the model answered while it was still in memory."""
    target = HEADS[head]
    loaded = backbone.load(config.Model(name=str(base), dtype="float32"), target)
    codec = Codec(loaded.tokenizer, HEADER, [" no", " yes"])
    recipe = config.parse_recipe(
        {
            "task": target.task,
            "data": {"name": "ml-100k"},
            "prompt": {"max_tokens": 256, "overlap": 32},
            "model": {"name": str(base), "dtype": "float32"},
            "output_dir": "x",
        },
        "r",
    )
    model = scorer.with_head(loaded.model, target.head, codec.answers)
    model = adapters.attach(
        model,
        method,
        base_name="tiny",
        seed=3,
        steps=STEPS,
        original=lambda: backbone.load(config.Model(name=str(base), dtype="float32"), target).model,
    )
    nudge(model)
    model.eval()
    about = artifact.describe(
        recipe,
        codec,
        loaded.base,
        target,
        data_name="films",
        data_sha256="0",
        like_at=None,
        max_item_tokens=32,
        example=QUESTIONS[0],
        probes=[Probe(history, candidate, 0.0) for history, candidate in QUESTIONS],
    )
    before = Recommender(about, model, loaded.tokenizer).probe_scores().tolist()
    folder.mkdir(parents=True)
    adapters.save(model, folder)
    loaded.tokenizer.save_pretrained(folder)
    prior = Prior(0.5, {"1": 0.25}, 3.0) if target.task == "click" else None
    artifact.write(folder, about, prior)
    scores = reload.scores(folder, base)
    probes = [dataclasses.replace(probe, score=score) for probe, score in zip(about.probes, scores, strict=True)]
    artifact.write(folder, dataclasses.replace(about, probes=probes), prior)
    return folder, before


@pytest.mark.parametrize(
    ("method", "head"),
    [(method, "tokens") for method in EVERY]
    + [
        (method, head)
        for head in HEADS
        if head != "tokens"
        for method in ("lora", "bottleneck_houlsby", "prefix", "full")
    ],
)
def test_pulled_scores_are_those_that_were_pushed(
    server: HubServer, tiny_llama_folder: Path, tmp_path: Path, method: str, head: str
) -> None:
    folder, before = trained(tiny_llama_folder, EVERY[method], head, tmp_path / "adapter")
    recorded = artifact.read(folder).recorded
    assert len(set(recorded)) == len(QUESTIONS)
    assert recorded == pytest.approx(before, abs=1e-4)
    hub.push(folder, "me/films", token=WRITE, reload_check=lambda _: None)
    shutil.rmtree(folder)
    pulled = hub.pull("me/films", token=WRITE)
    if (method, head) in IN_A_FRESH_PROCESS:
        assert hub.check_reload(pulled, base_model=tiny_llama_folder, tolerance=1e-6) <= 1e-6
    else:
        assert reload.scores(pulled, tiny_llama_folder) == pytest.approx(recorded, abs=1e-6)
