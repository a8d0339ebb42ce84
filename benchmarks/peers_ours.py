"""Our side of peers.py: the main recipe's training and scoring, and what this machine's arithmetic can reach."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import breakdown
import numpy as np
import torch
from torch.nn import functional as F
from workers import serve

from peftrec import adapters, artifact, assets, backbone, config, encode, interactions, scorer, split, train
from peftrec.datasets import DATASETS
from peftrec.draws import drawn_order
from peftrec.errors import ModelError
from peftrec.recommender import Recommender
from peftrec.target import Target
from peftrec.timeline import WindowDataset, collate

RECIPES = Path(__file__).parent.parent / "recipes/configs/ml-100k"
TRAINED_ON = 3000  # events of the people whose timelines are trained on
HISTORY = 50  # events that a prompt shows at most
SCORED_TOKENS = 4096  # of a prompt: 300 events fit
COPIED = 1 << 28  # bytes of the block that is copied
TOGETHER = 8  # requests that are served at once
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KNOWN: dict[str, Any] = {}


def setup(device: str, folder: str) -> dict[str, Any]:
    """Load everything, write both adapters below `folder`, and say what the other side needs to do the same."""
    backbone.quiet()
    recipe = config.load_recipe(RECIPES / "click_lora.yaml", ["--score.prior", "none"])
    loaded = backbone.load(recipe.model)
    if loaded.model.device.type != device:
        raise ModelError(f"--device {device}: the model went to {loaded.model.device.type}; choose that")
    data = interactions.load(recipe.data, recipe.seed)
    log = split.split(data, recipe.data.split, recipe.seed)
    drawn = drawn_order(len(log.user_ids), recipe.seed, "peers")
    learned = encode.whole_users(np.flatnonzero(log.split == split.TRAIN), log.user, TRAINED_ON, drawn)
    few = dataclasses.replace(log, split=np.where(np.isin(np.arange(len(log)), learned), split.TRAIN, split.TEST))
    single = dataclasses.replace(
        recipe.prompt, layout="pointwise", max_history=HISTORY, overlap=config.Prompt().overlap
    )
    short = dataclasses.replace(recipe.prompt, max_tokens=recipe.prompt.max_tokens // 2)
    layouts = {"timeline": recipe.prompt, "short": short, "pointwise": single}
    encoders = {
        name: encode.Encoder(few, prompt, loaded.tokenizer, recipe.eval.ties) for name, prompt in layouts.items()
    }
    model = scorer.answer_only(loaded.model, encoders["timeline"].codec.answers)
    model = adapters.attach(model, recipe.adapter, base_name=loaded.base.hub_id, seed=recipe.seed)
    KNOWN.update(
        recipe=recipe,
        log=log,
        model=model,
        plain=_plain(recipe, encoders["timeline"].codec.answers),
        windows={name: one.train(None) for name, one in encoders.items()},
        texts=encoders["timeline"].texts,
        scorers={
            "causal": _random_adapter(
                config.load_recipe(
                    RECIPES / "click_lora.yaml",
                    ["--score.prior", "none", "--prompt.max_tokens", str(SCORED_TOKENS), "--prompt.overlap", "256"],
                ),
                Path(folder, "causal"),
            ),
            "encoder": _random_adapter(config.load_recipe(RECIPES / "click_encoder.yaml"), Path(folder, "encoder")),
        },
    )
    codec = encoders["timeline"].codec
    trunk = loaded.model.config
    key = trunk.hidden_size * trunk.num_key_value_heads // trunk.num_attention_heads
    return {
        "base": loaded.tokenizer.name_or_path,
        "dtype": loaded.base.dtype,
        "encoder": str(assets.wheel_file(assets.ALL_MINILM_L6_V2).parent),
        "lora": {"r": recipe.adapter.r, "lora_alpha": recipe.adapter.lora_alpha}
        | {"target_modules": list(recipe.adapter.target_modules)},
        "answers": codec.answers,
        "shape": [trunk.num_hidden_layers, trunk.hidden_size, trunk.intermediate_size, key],
        "threads": torch.get_num_threads(),
        "people": len(np.unique(log.user[learned])),
        "events": len(learned),
        "timeline_tokens": KNOWN["windows"]["timeline"].tokens / KNOWN["windows"]["timeline"].events,
        "pointwise_tokens": KNOWN["windows"]["pointwise"].tokens / KNOWN["windows"]["pointwise"].events,
        "hardware": backbone.accelerators(),
    }


def _plain(recipe: config.Recipe, answers: Sequence[int]) -> Any:
    """The same model and LoRA without our kernels: PyTorch's fused attention and PEFT's layers, as in the beginning."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, _ = backbone.with_language_head(recipe.model, AutoModelForCausalLM)
    how = recipe.adapter
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=how.r, lora_alpha=how.lora_alpha, target_modules=list(how.target_modules)
    )
    return get_peft_model(scorer.answer_only(base, answers), lora)


def _random_adapter(recipe: config.Recipe, folder: Path) -> Recommender:
    """An adapter as a run leaves it, with random weights: what it says is of no matter here, how long it takes is."""
    target = Target(head=recipe.score.head, offset=(0.0, 0.0))
    loaded = backbone.load(recipe.model, target)
    data = interactions.load(recipe.data, recipe.seed, with_users=config.of_users(recipe))
    log = split.split(data, recipe.data.split, recipe.seed)
    encoder = encode.Encoder(log, recipe.prompt, loaded.tokenizer, recipe.eval.ties, kind=loaded.kind)
    model = scorer.with_head(loaded.model, target.head, encoder.codec.answers)
    model = adapters.attach(model, recipe.adapter, base_name=loaded.base.hub_id, seed=recipe.seed)
    torch.manual_seed(recipe.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    about = artifact.describe(
        recipe,
        encoder.codec,
        loaded.base,
        target,
        data_name=data.name,
        data_sha256=data.sha256,
        like_at=data.like_at,
        max_item_tokens=encoder.max_item_tokens,
        example=encoder.example(),
        template=encoder.template,
    )
    adapters.save(model, folder)
    loaded.tokenizer.save_pretrained(folder)
    artifact.write(folder, about, None)
    return Recommender.from_pretrained(folder, items=DATASETS[recipe.data.name].load().items)


def seconds_now() -> float:
    if KNOWN["model"].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- training ---------------------------------------------------------------------------------------------------------


def spread(sizes: Sequence[float], count: int) -> list[int]:
    """Indices of `count` of `sizes`, evenly from small to large, in an order drawn once."""
    order = np.argsort(sizes, kind="stable")
    places = ((np.arange(count) + 0.5) * len(order) / count).astype(int)
    picked: list[int] = np.random.default_rng(0).permutation(order[places]).tolist()
    return picked


def timeline_rows(rows: int, layout: str = "timeline") -> WindowDataset:
    """Rows of the main recipe with few to many events; of half their length for `short`."""
    data = KNOWN["windows"][layout]
    part = copy.copy(data)
    part.rows = [data.rows[i] for i in spread([_events(data[i]) for i in range(len(data))], rows)]
    part.events = sum(_events(part[i]) for i in range(rows))
    part.tokens = sum(part.lengths)
    return part


def pointwise_rows(events: int) -> WindowDataset:
    """Prompts from short to long, packed."""
    data = KNOWN["windows"]["pointwise"]
    windows = copy.copy(data.windows)
    windows.spans = data.windows.spans[spread(data.windows.lengths, events)]
    part = WindowDataset(windows, data.label, None, KNOWN["recipe"].prompt.max_tokens)
    part.events = events
    return part


def _events(row: dict[str, np.ndarray]) -> int:
    return int((row["labels"] >= 0).sum())


def prompts(events: int) -> list[dict[str, str]]:
    """The events of `pointwise_rows` as prompt and completion of TALLRec's form: titles liked, titles disliked."""
    log, texts, windows = KNOWN["log"], KNOWN["texts"], KNOWN["windows"]["pointwise"].windows
    made = []
    for index in spread(windows.lengths, events):
        *past, asked = windows.events_of(index).tolist()
        liked, disliked = (
            ", ".join(f'"{texts[log.item[row]]}"' for row in past if log.label[row] == label) or "none"
            for label in (1, 0)
        )
        made.append(
            {
                "prompt": "Instruction: from the films that a person liked and disliked, tell whether the person will "
                f"like another one. Answer Yes. or No.\nLiked: {liked}\nDisliked: {disliked}\n"
                f'Will this person like "{texts[log.item[asked]]}"?\nAnswer: ',
                "completion": ("No.", "Yes.")[log.label[asked]],
            }
        )
    return made


def fit(layout: str, size: int, model: str = "model") -> dict[str, float]:
    """The main recipe's trainer over `size` timeline rows or pointwise events, once; `model` may be `plain`."""
    data = pointwise_rows(size) if layout == "pointwise" else timeline_rows(size, layout)
    recipe = KNOWN["recipe"]
    how = dataclasses.replace(recipe.train, num_train_epochs=1.0, max_steps=-1, evals=0)
    with tempfile.TemporaryDirectory() as folder:
        fitted = train.fit(
            KNOWN[model], data, data, Target(), lambda *_: {}, train=how, folder=Path(folder), seed=recipe.seed
        )
    return {"seconds": fitted.seconds, "events": data.events, "tokens": data.tokens, "looks_back": looks_back(data)}


def read(rows: int, layout: str) -> dict[str, float]:
    """Scores of the events of timeline rows: the forward alone."""
    data = timeline_rows(rows, layout)
    begin = seconds_now()
    scorer.score_rows(KNOWN["model"], data, range(rows))
    return {"seconds": seconds_now() - begin, "tokens": data.tokens, "looks_back": looks_back(data)}


def looks_back(data: WindowDataset) -> float:
    """Tokens that one attends to, on average."""
    lengths = np.asarray(data.windows.lengths)[[window for row in data.rows for window in row]]
    return float((lengths**2).sum() / 2 / lengths.sum())


def profile(steps: int) -> dict[str, Any]:
    """Where a training step goes: see breakdown.py."""
    data = timeline_rows(1)
    batch = {key: value.to(KNOWN["model"].device) for key, value in collate([data[0]]).items()}
    return {"tokens": data.tokens, **breakdown.of_training(KNOWN["model"], batch, steps)}


# --- scoring ----------------------------------------------------------------------------------------------------------


def request(kind: str, number: int, history: int, candidates: int) -> dict[str, Any]:
    """What person `number` is asked: a history, candidates that are not in it, and the same as texts for others."""
    log, texts = KNOWN["log"], KNOWN["texts"]
    counts = np.bincount(log.user, minlength=len(log.user_ids))
    people = np.flatnonzero(counts >= history)
    user = int(people[number % len(people)])
    past = np.flatnonzero(log.user == user)[:history]
    fresh = np.random.default_rng(number).permutation(np.setdiff1d(np.arange(len(texts)), log.item[past]))[:candidates]
    ids = log.items["item_id"].to_list()
    told = {
        "history": [(ids[log.item[row]], int(log.label[row])) for row in past],
        "candidates": [ids[item] for item in fresh],
        "user": None,
    }
    recommender = KNOWN["scorers"][kind]
    if kind == "causal":
        codec = recommender.codec
        lines = [f"{texts[log.item[row]]}:{codec.answer_texts[log.label[row]]}\n" for row in past]
        begin = (codec.tokenizer.bos_token or "") + codec.header_text + "".join(lines)
        told["texts"] = [f"{begin}{texts[item]}:" for item in fresh]
        return told
    # The prompts that the encoder reads, cut where it cuts them.
    told["user"] = "30 years old, writer"
    whole = encode.item_texts(log.items, recommender.prompt.item)
    shown = past[-recommender.prompt.max_history :]
    lines = "".join(f"{whole[log.item[row]]}: {('no', 'yes')[log.label[row]]}; " for row in shown)
    told["texts"] = [[f"{told['user']}. Rated: {lines}".strip(), f"{whole[item]}:"] for item in fresh]
    return told


def score(kind: str, history: list[Any], candidates: list[Any], user: Any) -> dict[str, Any]:
    begin = seconds_now()
    found = KNOWN["scorers"][kind].score(history, candidates, user)
    return {"seconds": seconds_now() - begin, "scores": found.tolist()}


def burst(users: int, begin_at: int, history: int, candidates: int) -> list[float]:
    """Seconds that each of several people waits, from number `begin_at` on, who ask at the same moment."""
    asked = [request("causal", begin_at + number, history, candidates) for number in range(users)]
    requests: Any = [{"history": one["history"], "candidates": one["candidates"]} for one in asked]
    begin, waited = seconds_now(), []
    for first in range(0, users, TOGETHER):
        found = KNOWN["scorers"]["causal"].score_many(requests[first : first + TOGETHER])
        waited += [seconds_now() - begin] * len(found)
    return waited


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceiling(shape: list[int], tokens: int, types: list[str]) -> dict[str, float]:
    """Matrix products of the model's own shapes, forward and back, in FLOP a second, and bytes copied a second.

    Args:
        shape: layers, hidden size, intermediate size, key and value size.
        tokens: rows of the activations.
        types: of the numbers, bfloat16 or float32.
    """
    layers, hidden, inner, key = shape
    device = KNOWN["model"].device
    found: dict[str, float] = {}
    sizes = [(hidden, hidden), (key, hidden), (key, hidden), (hidden, hidden), (inner, hidden), (inner, hidden)]
    sizes.append((hidden, inner))
    for name in types:
        dtype = TYPES[name]
        # Fewer layers are not enough: they would stay in the cache.
        weights = [torch.randn(size, device=device, dtype=dtype) for _ in range(layers) for size in sizes]
        inputs = {n: torch.randn(tokens, n, device=device, dtype=dtype) for n in (hidden, inner, key)}
        flop = 2 * tokens * sum(weight.numel() for weight in weights)
        with torch.inference_mode():
            for way in ("forward", "backward"):
                begin = seconds_now()
                for weight in weights:
                    if way == "forward":
                        F.linear(inputs[weight.shape[1]], weight)
                    else:
                        inputs[weight.shape[0]] @ weight
                found[f"{name}_{way}"] = flop / (seconds_now() - begin)
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    begin = seconds_now()
    target.copy_(source)
    found["copy"] = 2 * COPIED / (seconds_now() - begin)  # read and written
    found["parameters"] = sum(size[0] * size[1] for size in sizes) * layers
    return found


if __name__ == "__main__":
    serve({one.__name__: one for one in (setup, prompts, fit, read, profile, request, score, burst, ceiling)})
