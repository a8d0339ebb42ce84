"""Trained heads on causal models: outputs at every position, saved and read back the PEFT way."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peftrec import Recommender, adapters, artifact, backbone, config, encode, heads, scorer
from peftrec import train as training
from peftrec.errors import ModelError
from peftrec.prompts import Pieces
from peftrec.split import Log
from peftrec.target import Target, fit_target

FAMILIES = ["tiny_llama_folder", "tiny_gpt2_folder", "tiny_qwen2_folder"]
HEADS = [("linear", 1), ("classifier", 2), ("classifier", 5)]
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def load(folder: Path, head: Any = "classifier", outputs: int = 2, **options: Any) -> backbone.Backbone:
    target = Target(head=head, offset=(0.0,) * outputs)
    return backbone.load(config.Model(name=str(folder), **{"dtype": "float32", **options}), target)


def stir(model: Any, seed: int = 3) -> Any:
    """Move everything that trains away from its start, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def encoder_for(log: Log, loaded: backbone.Backbone, **prompt: Any) -> encode.Encoder:
    return encode.Encoder(log, config.Prompt(**{"overlap": 0, **prompt}), loaded.tokenizer, "isolate")


def without_ties(log: Log) -> Log:
    return dataclasses.replace(log, timestamp=np.arange(len(log)))


def outputs_of(model: Any, data: Any) -> np.ndarray:
    rows, outputs = scorer.score_rows(model, data, range(len(data)))
    return outputs[np.argsort(rows)]


class TestEveryPosition:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_transformers_on_every_beginning(self, request: pytest.FixtureRequest, family: str) -> None:
        """Its class reads a prompt's last token: (B, T, K) holds that for each prompt that ends anywhere."""
        model = stir(load(request.getfixturevalue(family), "classifier", 5).model)
        ids = torch.tensor([[0, 30, 40, 50, 60, 70]])
        causal = torch.zeros(1, 1, 6, 6).masked_fill_(~torch.ones(6, 6, dtype=torch.bool).tril(), -1e9)
        with torch.inference_mode():
            every = model(input_ids=ids, attention_mask=causal, position_ids=torch.arange(6)[None]).logits
            assert every.shape == (1, 6, 5)
            for end in range(1, 7):
                prefix = ids[:, :end]
                plain = model(input_ids=prefix, attention_mask=torch.ones_like(prefix)).logits
                torch.testing.assert_close(every[:, end - 1], plain, **CLOSE)
        assert every.std() > 0.1

    @pytest.mark.parametrize(("head", "outputs"), HEADS)
    def test_training_starts_from_the_prior(
        self, make_random_log: Callable[..., Log], tiny_llama_folder: Path, head: Any, outputs: int
    ) -> None:
        loaded = load(tiny_llama_folder, head, outputs)
        data = encoder_for(make_random_log(1), loaded).train(None)
        assert (outputs_of(loaded.model, data) == 0).all()

    def test_the_head_is_float32_on_a_base_of_half_width(self, tiny_llama_folder: Path) -> None:
        model = stir(load(tiny_llama_folder, dtype="bfloat16").model)
        trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"score.weight": torch.float32}
        assert model.dtype == torch.bfloat16
        with torch.inference_mode():
            assert model(input_ids=torch.tensor([[0, 30, 40]])).logits.dtype == torch.float32

    def test_the_base_is_the_same_with_any_head(self, tiny_llama_folder: Path) -> None:
        plain = backbone.load(config.Model(name=str(tiny_llama_folder), dtype="float32")).base
        for head, outputs in HEADS:
            assert load(tiny_llama_folder, head, outputs).base == plain

    def test_a_checkpoint_without_its_weights(self, tiny_llama_folder: Path, tmp_path: Path) -> None:
        import shutil

        from safetensors.torch import save_file

        shutil.copytree(tiny_llama_folder, tmp_path, dirs_exist_ok=True)
        state = load_file(tmp_path / "model.safetensors")
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            ModelError, match=r"model.name: 1 weights of LlamaFor.* are not in the checkpoint, e.g. model."
        ):
            load(tmp_path)

    def test_a_head_of_other_labels_is_begun_anew(self, tiny_llama_folder: Path, tmp_path: Path) -> None:
        """A checkpoint may hold a classifier of its own: of three labels it does not fit, of two it is not ours."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        for labels in (3, 2):
            other = AutoModelForSequenceClassification.from_pretrained(tiny_llama_folder, num_labels=labels)
            torch.nn.init.ones_(other.score.weight)
            other.save_pretrained(tmp_path / str(labels))
            AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path / str(labels))
            assert (load(tmp_path / str(labels)).model.score.weight == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("head", "outputs"), HEADS)
def test_timeline_pointwise_and_candidates_agree(
    request: pytest.FixtureRequest, make_random_log: Callable[..., Log], family: str, head: Any, outputs: int
) -> None:
    log = without_ties(make_random_log(4, users=1))
    loaded = load(request.getfixturevalue(family), head, outputs)
    model = stir(loaded.model)
    rows = np.flatnonzero(log.split > 0)
    whole, single = (
        outputs_of(model, encoder_for(log, loaded, layout=layout, max_tokens=400).evaluate(rows, "frozen", None))
        for layout in ("timeline", "pointwise")
    )
    assert whole.shape == (len(rows), outputs)
    np.testing.assert_allclose(whole, single, **CLOSE)
    encoder = encoder_for(log, loaded)
    codec: Any = encoder.codec
    asked = codec.questions([encoder.texts[item] for item in log.item], 64)
    past = [token for i in np.flatnonzero(log.split == 0) for token in (*asked[i], *codec.tail(int(log.label[i])))]
    history = np.asarray([*codec.header, *past])
    cached = scorer.score_candidates(model, history, Pieces.of([asked[row] for row in rows]), chunk_tokens=40)
    np.testing.assert_allclose(cached, whole, **CLOSE)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "ia3", "prefix", "prompt", "p_tuning"])
def test_the_head_trains_with_every_method(
    make_random_log: Callable[..., Log], tiny_llama_folder: Path, tmp_path: Path, method: Any
) -> None:
    log = make_random_log(2, users=2)
    loaded = load(tiny_llama_folder)
    data = encoder_for(log, loaded).train(None)
    attached = adapters.attach(
        loaded.model, config.Adapter(method=method, num_virtual_tokens=4), base_name="tiny", seed=1
    )
    stir(attached)
    found = outputs_of(attached, data)
    assert found.shape == (data.events, 2)
    assert found.std() > 0.01
    adapters.save(attached, tmp_path)
    assert any("score" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = adapters.load(load(tiny_llama_folder).model, tmp_path)
    np.testing.assert_allclose(outputs_of(again, data), found, **CLOSE)


# --- trained, saved and read by others --------------------------------------------------------------------------------

PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base, folder, ids, outputs = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=int(outputs), dtype=torch.float32)
assert model.config.pad_token_id is not None
model = PeftModel.from_pretrained(model, folder).eval()
with torch.inference_mode():
    print(json.dumps([model(torch.tensor([one])).logits[0].tolist() for one in json.loads(ids)]))
"""


@pytest.mark.parametrize(
    ("family", "head", "task"),
    [
        ("tiny_llama_folder", "classifier", "rating"),
        ("tiny_gpt2_folder", "linear", "rating"),
        ("tiny_qwen2_folder", "linear", "click"),
    ],
)
def test_trained_saved_and_read_by_plain_peft(
    request: pytest.FixtureRequest,
    make_random_log: Callable[..., Log],
    tmp_path: Path,
    family: str,
    head: Any,
    task: Any,
) -> None:
    log = without_ties(make_random_log(3))
    scale = (1.0, 2.0, 3.0) if task == "rating" else (0.0, 1.0)
    log = dataclasses.replace(log, label=(log.item % len(scale)).astype(np.int8), scale=scale)
    target = fit_target(task, head, "cross_entropy", scale, log.label[log.split == 0], None)
    folder = request.getfixturevalue(family)
    loaded = backbone.load(config.Model(name=str(folder), dtype="float32"), target)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    encoder = encode.Encoder(log, config.Prompt(max_tokens=200, overlap=0), loaded.tokenizer, "isolate", task=task)
    model = adapters.attach(loaded.model, config.Adapter(r=4), base_name="tiny", seed=1)
    rows = np.flatnonzero(log.split > 0)
    data = encoder.evaluate(rows, "streaming", None)
    fitted = training.fit(
        model,
        encoder.train(None),
        data,
        target,
        lambda rows, outputs: {"loss": target.mean_loss(outputs, None, log.label[rows])},
        train=config.Train(max_steps=60, evals=1, learning_rate=5e-3, gradient_accumulation_steps=1, logging_steps=1),
        folder=tmp_path / "checkpoints",
        seed=1,
    )
    losses = [line["loss"] for line in fitted.log if "loss" in line]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name

    adapters.save(model, tmp_path / "adapter")
    single = encode.Encoder(
        log, config.Prompt(layout="pointwise", max_tokens=400), loaded.tokenizer, "isolate", task=task
    ).evaluate(rows[:6], "streaming", None)
    windows: Any = single.windows
    asked = {int(one["row"].max()): one for one in map(windows.arrays, range(len(windows)))}
    # The text up to the read position; what follows it in a window is the answer.
    ids = [asked[row]["input_ids"][: int(asked[row]["row"].argmax()) + 1].tolist() for row in rows[:6].tolist()]
    ours = outputs_of(model, single)
    arguments = [folder, tmp_path / "adapter", json.dumps(ids), str(target.outputs)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = np.asarray(json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    assert theirs.std() > 0.05

    about = artifact.describe(
        config.parse_recipe(
            {
                "task": task,
                "data": {"name": "ml-100k"},
                "prompt": {"max_tokens": 200, "overlap": 0},
                "model": {"name": str(folder), "dtype": "float32"},
                "score": {"head": head},
                "output_dir": "x",
            },
            "r",
        ),
        encoder.codec,
        loaded.base,
        target,
        data_name="films",
        data_sha256="0",
        like_at=None,
        max_item_tokens=encoder.max_item_tokens,
        example=encoder.example(),
    )
    loaded.tokenizer.save_pretrained(tmp_path / "adapter")
    artifact.write(tmp_path / "adapter", about, None)
    recommender = Recommender.from_pretrained(tmp_path / "adapter", base_model=folder, items=log.items)
    for row, outputs in zip(rows[:6].tolist(), ours, strict=True):
        past = [i for i in range(row) if log.user[i] == log.user[row] and log.timestamp[i] < log.timestamp[row]]
        history = [(f"i{log.item[i]}", scale[log.label[i]]) for i in past]
        (score,) = recommender.score(history, [f"i{log.item[row]}"])
        assert score == pytest.approx(float(target.measure(outputs[None])[0][0]), abs=1e-5)


def test_names_of_heads_that_transformers_puts_on(tiny_llama_folder: Path) -> None:
    model = load(tiny_llama_folder).model
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert isinstance(model, heads.EveryPosition)
    assert model.config.num_labels == 2
