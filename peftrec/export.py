"""A saved adapter in the forms that other programs take: one merged model, or a LoRA folder that vLLM serves."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from peftrec import adapters, artifact, backbone, loading, quantized, scorer
from peftrec.errors import ModelError
from peftrec.loaded_adapter import target_of
from peftrec.methods import one_line

FORMATS = ("merged", "vllm")
TOLERANCE = 1e-4
# vLLM's --max-lora-rank takes these; an adapter's own rank may be lower.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Settings of PEFT that vLLM does not implement, or did not in versions that are still in use.
VLLM_REFUSED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
)


@dataclass(frozen=True)
class Merged:
    """A merged model as it was written.

    Attributes:
        folder: where it is.
        bytes: of its weights.
        difference: largest difference of its scores to the adapter's, over the adapter's sample questions, in float32.
    """

    folder: Path
    bytes: int
    difference: float


@dataclass(frozen=True)
class ForVllm:
    """A LoRA folder for vLLM as it was written.

    Attributes:
        folder: where it is.
        base_model: the model to serve it on.
        max_lora_rank: the least `--max-lora-rank` that takes it.
    """

    folder: Path
    base_model: str
    max_lora_rank: int


def merged(
    adapter: str | Path,
    output: str | Path,
    *,
    base_model: str | Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Merged:
    """Write base model and adapter as one model that plain transformers loads.

    It is merged in float32, and asked the adapter's sample questions before it is written. A trained head is part of
    it; the prior is not: `peftrec.json` and `prior.json` are copied beside it.

    Args:
        adapter: an adapter's folder or its run's, or its Hub id.
        output: a folder that is not there yet, or is empty.
        base_model: as in `Recommender.from_pretrained`.
        dtype: of the weights that are written; in 16 bits scores differ by what rounding them makes.

    Raises:
        ModelError: the adapter cannot be loaded or merged, its base is quantized, merging changed the scores, or the
            folder cannot be written.
    """
    adapter = loading.find(adapter)
    about = artifact.read(adapter)
    _check_side(adapter, about)
    if dtype not in backbone.DTYPES:
        raise ModelError(f"dtype: {dtype!r}; expected one of {', '.join(backbone.DTYPES)}")
    with written(output) as folder:
        loaded = loading.load_base(about, adapter, base_model=base_model, dtype="float32")
        if quantized.layers(loaded.model) or getattr(loaded.model.config, "quantization_config", None) is not None:
            raise ModelError(
                f"base model: {loaded.base.name} is quantized, and merging would round the adapter away; give one that "
                "is not (--base-model)"
            )
        if other := loading.difference_of_bases(about, loaded):
            warnings.warn(other, stacklevel=2)
        base, answers = loaded.model, about.prompt.answer_ids
        put_back = _output_matrix(base) if about.target.head == "tokens" else None
        model = adapters.load(scorer.with_head(base, about.target.head, answers), adapter)
        before = _plain_scores(model, loaded.tokenizer, about, slice(None))
        model = _merge(model, adapter)
        if put_back is not None:
            put_back(model)
        after = _plain_scores(model, loaded.tokenizer, about, slice(None) if put_back is None else answers)
        difference = float(np.abs(after - before).max())
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{adapter}: merged, it scores its sample questions differently by up to {difference:.2g}; expected at "
                f"most {TOLERANCE:g}; use the adapter as it is"
            )
        if about.target.head == "classifier":
            names = [answer.strip() for answer in about.prompt.answers]
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: place for place, name in enumerate(names)}
        model.to(backbone.DTYPES[dtype]).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # which only their owner may read otherwise
            weights.chmod((folder / "config.json").stat().st_mode)
        _copy(adapter, folder, (artifact.FILE, artifact.PRIOR_FILE))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Merged(Path(output), size, difference)


def for_vllm(adapter: str | Path, output: str | Path) -> ForVllm:
    """Write a LoRA adapter as a folder that vLLM accepts, by its documented constraints; vLLM itself is not run.

    Args:
        adapter: an adapter's folder or its run's, or its Hub id.
        output: a folder that is not there yet, or is empty.

    Raises:
        ModelError: the adapter is none that vLLM serves, or the folder cannot be written.
    """
    adapter = loading.find(adapter)
    about = artifact.read(adapter)
    _check_side(adapter, about)
    found = _lora_config(adapter)
    problems = [f"{name} is {found[name]!r}" for name in VLLM_REFUSED if found.get(name)]
    if found.get("bias", "none") != "none":
        problems.append(f"bias is {found['bias']!r}")
    if isinstance(found.get("init_lora_weights"), str):
        problems.append(f"init_lora_weights is {found['init_lora_weights']!r}")
    if about.prompt.kind != "causal" or about.target.head != "tokens":
        problems.append(f"it is a {about.target.head} head on a model of the kind {about.prompt.kind}")
    rank = found.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= VLLM_RANKS[-1]:
        problems.append(f"r is {rank!r}")
    problems = problems or _odd_weights(adapter / adapters.WEIGHTS, int(rank or 0))
    if problems:
        raise ModelError(
            f"{adapter}: {problems[0]}; vLLM takes plain LoRA of one rank up to {VLLM_RANKS[-1]} on linear layers of "
            "causal models; export it as merged"
        )
    with written(output) as folder:
        _copy(adapter, folder, (adapters.CONFIG, adapters.WEIGHTS, artifact.FILE, artifact.PRIOR_FILE))
    least = next(allowed for allowed in VLLM_RANKS if allowed >= int(rank or 0))
    return ForVllm(Path(output), about.base_model.hub_id, least)


def _check_side(adapter: Path, about: artifact.Artifact) -> None:
    if about.side:
        raise ModelError(
            f"{adapter}: side vectors, which only peftrec can add; serve it with peftrec, or train without side"
        )


@contextmanager
def written(output: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes `output` when the block ends well, and vanishes when it does not."""
    target = Path(output)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ModelError(f"{target}: there already; expected a folder that is new or empty; choose another")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            inner = Path(scratch) / "whole"
            inner.mkdir()
            yield inner
            inner.replace(target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


# --- merged -----------------------------------------------------------------------------------------------------------


def _merge(model: Any, adapter: Path) -> Any:
    if not hasattr(model, "peft_config"):  # the method trained the model itself
        return model
    described = model.peft_config["default"]
    kind = str(described.peft_type.value)
    if described.is_prompt_learning:
        raise ModelError(f"{adapter}: {kind}; its virtual tokens are no part of any weight; use the adapter as it is")
    try:
        return model.merge_and_unload(safe_merge=True)
    except (*adapters.BROKEN, NotImplementedError) as error:
        raise ModelError(
            f"{adapter}: PEFT cannot merge {kind} ({one_line(error)}); expected LoRA or one of its kin; use the "
            "adapter as it is"
        ) from error


def _output_matrix(model: Any) -> Callable[[Any], None]:
    """What puts a model's output matrix, which the answer rows replace, back as it is now.

    Where all weights were trained this matters: the answers were read by the matrix as it was, though the model says
    that it is tied to the input embeddings.
    """
    output = copy.deepcopy(model.get_output_embeddings())
    tied, bias = model.config.tie_word_embeddings, getattr(model, "final_logits_bias", None)

    def put_back(merged: Any) -> None:
        merged.set_output_embeddings(output.to(merged.device))
        if bias is not None:
            merged.final_logits_bias = bias
        merged.config.tie_word_embeddings = tied and torch.equal(merged.get_input_embeddings().weight, output.weight)
        if merged.config.tie_word_embeddings:
            merged.tie_weights()

    return put_back


@torch.inference_mode()
def _plain_scores(model: Any, tokenizer: Any, about: artifact.Artifact, outputs_at: Any) -> np.ndarray:
    """Scores of the adapter's sample questions without the prior, asked as one would without peftrec, (n,).

    Args:
        model: the model.
        tokenizer: its.
        about: the adapter's.
        outputs_at: where in the logits of a token or prompt its outputs are.
    """
    prompt = about.prompt
    bos = (prompt.bos or "") if prompt.kind == "causal" else ""
    texts = [bos + prompt.text(probe.history, probe.candidate) for probe in about.probes] or [prompt.example]
    outputs = []
    for text in texts:
        if prompt.kind == "causal":
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            first, tab, second = text.partition("\t")
            ids = tokenizer(first, second if tab else None, return_tensors="pt")
        ids = ids.to(model.device)
        if prompt.kind == "seq2seq":
            ids["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]], device=model.device)
        logits = model(**ids).logits[0]
        if about.target.head == "tokens":
            logits = logits[-1]
        outputs.append(logits[outputs_at].float().cpu().numpy())
    return target_of(about).measure(np.stack(outputs))[0]


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _lora_config(adapter: Path) -> dict[str, Any]:
    path = adapter / adapters.CONFIG
    if not path.is_file():
        raise ModelError(f"{adapter}: no {adapters.CONFIG}, for all weights were trained; export it as merged")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({one_line(error)}); fetch the adapter again") from error
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind != "LORA":
        raise ModelError(f"{adapter}: {kind}; vLLM takes LoRA only; export it as merged, if it can be")
    assert isinstance(found, dict)
    return found


def _odd_weights(path: Path, rank: int) -> list[str]:
    """What vLLM would not take among the tensors: it wants pairs of matrices of the rank."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        return [f"{path.name} cannot be read ({one_line(error)})"]
    ends = {".lora_A.weight": 0, ".lora_B.weight": 1}
    halves: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None or len(shape) != 2 or shape[ends[end]] != rank:
            return [f"{name} has the shape {shape}"]
        halves.setdefault(name.removesuffix(end), set()).add(end)
    return [f"{name} lacks one of its two matrices" for name, found in halves.items() if len(found) < 2]
