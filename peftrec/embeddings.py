"""Texts -> vectors, by any base model or adapter; kept by what they were made of.

Texts are read in blocks, and each block's vectors are a file of the cache, named by a hash of its texts, the model's
weights and how they were read. So a killed run goes on, a catalogue that grew is read where it is new, and several
processes share the blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peftrec import artifact, assets, backbone, config, heads, loading, values
from peftrec.backbone import Backbone
from peftrec.errors import DataError, ModelError
from peftrec.file_checks import WEIGHTS
from peftrec.folders import sha256
from peftrec.prompts import Kind, Texts
from peftrec.record import atomic
from peftrec.similarity import Vectors, normalized
from peftrec.target import Target

Pooling = Literal["mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
FITTING: dict[Kind, tuple[Pooling, ...]] = {
    "causal": ("mean", "last"),
    "encoder": ("mean", "cls"),
    "seq2seq": ("mean",),
}
"""What makes one vector of a text's tokens, by kind of model; the first is the default."""

FORMAT = 1
BLOCK = 2048  # texts of one file in the cache


@dataclass(frozen=True)
class Reading:
    """How a text becomes a vector.

    Attributes:
        pooling: `mean` of all tokens; `cls`, the first token (encoders); `last`, the last token (causal models). None
            is mean.
        layer: after which layer, as transformers counts hidden states: 0 is the embedding matrix alone, which takes no
            forward pass; -1 the last.
        normalize: divide each vector by its length.
        max_tokens: a longer text is cut behind them.
    """

    pooling: Pooling | None = None
    layer: int = -1
    normalize: bool = True
    max_tokens: int = 256


class Embedder:
    """A model that makes vectors of texts.

    Most people want `from_pretrained`.

    Args:
        model: base model or PEFT model, as `backbone.load` or `loading.put_on` made it.
        tokenizer: the base model's.
        kind: of the model.
        made_by: what tells its weights from others' (fingerprint, adapter, dtype), for the cache.
        reading: how texts become vectors.
        name: what messages call the model.

    Raises:
        ModelError: the model cannot read texts in this way.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        kind: Kind,
        made_by: Sequence[str | None],
        reading: Reading | None = None,
        *,
        name: str = "model",
    ) -> None:
        reading = reading or Reading()
        self.trunk, self.kind, self.name = _trunk(model, kind, name), kind, name
        self.reading = _checked(reading, kind, self.trunk, name)
        self._tokenizer, self._texts = tokenizer, Texts(tokenizer)
        self._made_by = list(made_by)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        reading: Reading | None = None,
        *,
        revision: str | None = None,
        base_model: str | Path | None = None,
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
    ) -> Embedder:
        """Load a base model, or an adapter on its base model.

        Args:
            model: a packaged model, a folder or a Hub id, of a base model or of an adapter (a run's folder, too).
            reading: how texts become vectors.
            revision: branch, tag or commit on the Hub.
            base_model: as in `Recommender.from_pretrained`, for adapters.
            dtype: of the weights: float32, bfloat16 or float16; None is as in `Recommender.from_pretrained`
                for adapters, else float32.
            device: as in torch; None is the GPU if there is one.
            trust_remote_code: run Python code that comes with the base model.
            token: for the Hub.

        Raises:
            ModelError: it cannot be loaded or cannot read texts in this way.
            AssetError: a packaged model cannot be fetched.
            HubError: an adapter on the Hub that is not safe to read.
        """
        name = str(model)
        if dtype is not None and dtype not in backbone.DTYPES:
            raise ModelError(f"dtype: {dtype!r}; expected one of {', '.join(backbone.DTYPES)}")
        if is_adapter(name, revision, token):
            folder = loading.find(name, revision, token=token)
            about = artifact.read(folder)
            base = loading.load_base(
                about,
                folder,
                base_model=base_model,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                token=token,
            )
            whole = loading.put_on(base, folder, about)
            return cls(whole, base.tokenizer, base.kind, made_by(base, folder), reading, name=name)
        if base_model is not None:
            raise ModelError(f"{name}: no adapter, so there is no base model to exchange; leave base_model out")
        wanted = config.Model(
            name=name,
            revision=revision,
            dtype=dtype or "float32",  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code,
        )
        base = load_base(wanted, token=token)
        if device is not None:
            base.model.to(device)
        return cls(base.model, base.tokenizer, base.kind, made_by(base), reading, name=name)

    @property
    def fingerprint(self) -> str | None:
        """Of the base model's weights."""
        return self._made_by[0]

    @property
    def size(self) -> int:
        """Dimensions of a vector, D."""
        return int(self.trunk.config.get_text_config().hidden_size)

    def reads(self, reading: Reading) -> Embedder:
        """The same model, reading in another way.

        Raises:
            ModelError: it cannot.
        """
        other = object.__new__(Embedder)
        other.__dict__ = {**self.__dict__, "reading": _checked(reading, self.kind, self.trunk, self.name)}
        return other

    def embed(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int = 4096,
        cache: bool = True,
        share: tuple[int, int] = (0, 1),
        progress: Callable[[int], object] | None = None,
    ) -> Vectors:
        """The vector of each text, (N, D), float32; equal texts are read once.

        Args:
            texts: none of them empty.
            batch_tokens: tokens of one forward pass, padding included.
            cache: whether vectors are looked up and kept in the cache folder, under `vectors`.
            share: (i, n): make every n-th block only, from block i on; the vectors of other blocks are 0 unless they
                are in the cache.
            progress: called with the number of texts after each block.

        Raises:
            DataError: a text is empty.
            PeftrecError: the cache cannot be written.
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"texts[{i}]: {text!r}; expected a text that is not empty")
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique = list(place)
        found = np.zeros((len(unique), self.size), dtype=np.float32)
        for number, begin in enumerate(range(0, len(unique), BLOCK)):
            block = unique[begin : begin + BLOCK]
            mine = number % share[1] == share[0]
            vectors = self._block(block, batch_tokens, cache, make=mine)
            if vectors is not None:
                found[begin : begin + len(block)] = vectors
            if progress is not None:
                progress(len(block))
        return found[[place[text] for text in texts]] if len(place) < len(texts) else found

    def _block(self, texts: list[str], batch_tokens: int, cache: bool, *, make: bool) -> Vectors | None:
        path = assets.cache_folder() / "vectors" / f"{self._key(texts)}.safetensors"
        if cache and (kept := _kept(path, (len(texts), self.size))) is not None:
            return kept
        if not make:
            return None
        vectors = self._made(texts, batch_tokens)
        if cache:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as scratch:
                save_file({"vectors": vectors}, scratch)
        return vectors

    def _key(self, texts: list[str]) -> str:
        """Equal for equal vectors."""
        facts = [FORMAT, self._made_by, asdict(self.reading), texts]
        return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()

    @torch.inference_mode()
    def _made(self, texts: list[str], batch_tokens: int) -> Vectors:
        plain = [self._texts.plain(text) for text in texts]
        ids = self._tokenizer(plain, truncation=True, max_length=self.reading.max_tokens)["input_ids"]
        for text, one in zip(texts, ids, strict=True):
            if not one:
                raise DataError(f"text {text!r}: no tokens in this tokenizer; expected words")
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        found = np.zeros((len(ids), self.size), dtype=np.float32)
        begin = 0
        while begin < len(order):
            longest = len(ids[order[begin]])
            batch = order[begin : begin + max(1, batch_tokens // longest)]
            found[batch] = self._pooled([ids[i] for i in batch]).float().cpu().numpy()
            begin += len(batch)
        return normalized(found) if self.reading.normalize else found

    def _pooled(self, rows: list[list[int]]) -> torch.Tensor:
        """Token ids, longest first -> (B, D)."""
        lengths = torch.tensor([len(row) for row in rows])
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (len(rows[0]) - len(row)) for row in rows]).to(self.trunk.device)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(ids.device)
        hidden = self._hidden(ids, mask)
        if self.reading.pooling == "mean":
            weight = mask[..., None].to(torch.float32)
            return (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)
        last = lengths - 1 if self.reading.pooling == "last" else torch.zeros_like(lengths)
        return hidden[torch.arange(len(rows)), last]

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        layer = self.reading.layer
        if layer == 0:
            return self.trunk.get_input_embeddings()(ids)  # type: ignore[no-any-return]
        options = {"use_cache": False} if self.kind == "causal" else {}
        output = self.trunk(input_ids=ids, attention_mask=mask.long(), output_hidden_states=layer != -1, **options)
        found: torch.Tensor = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return found


def load_base(model: config.Model, *, token: str | bool | None = None) -> Backbone:
    """A base model of any kind, for its vectors alone.

    Raises:
        AssetError: a packaged model cannot be fetched.
        ModelError: it cannot be loaded.
    """
    # An encoder has no answer tokens: whatever stands on its layers is not looked at.
    kind = backbone.kind_of(model)
    return backbone.load(model, Target(head="classifier") if kind == "encoder" else None, token=token)


def made_by(base: Backbone, adapter: Path | None = None) -> list[str | None]:
    """What tells the weights of a base model, with an adapter's folder or without, from others'."""
    files = [] if adapter is None else [adapter / name for name in WEIGHTS if (adapter / name).is_file()]
    return [base.base.fingerprint, base.base.dtype, base.base.quantization, *map(sha256, files)]


def is_adapter(name: str, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether `name` is an adapter and not a base model; asks the Hub where it is nothing on this machine."""
    folder = Path(name).expanduser()
    if name in assets.MODELS:
        return False
    if name.startswith(values.FILE_TARGET):
        return True
    if folder.is_dir():
        return any((place / artifact.FILE).is_file() for place in (folder, folder / "adapter"))
    if not loading.HUB_ID.fullmatch(name):
        return False
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(name, artifact.FILE, revision=revision), str):
        return True
    try:
        return bool(file_exists(name, artifact.FILE, revision=revision, token=token))
    except (OSError, HfHubHTTPError):  # loading it as a base model will say what is wrong
        return False


def _trunk(model: Any, kind: Kind, name: str) -> Any:
    """The layers without what stands on them, with an adapter's changes in them."""
    if hasattr(model, "peft_config"):
        if model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"{name}: virtual tokens in front of a prompt ({model.active_peft_config.peft_type.value.lower()}) say "
                "how it is answered and change no layer; embed with its base model"
            )
        model = model.get_base_model()
    return (model.get_encoder() if kind == "seq2seq" else model.base_model).eval()


def _checked(reading: Reading, kind: Kind, trunk: Any, name: str) -> Reading:
    fitting = FITTING[kind]
    pooling = reading.pooling or fitting[0]
    if pooling not in fitting:
        raise ModelError(f"pooling: {pooling!r}; {name} is {heads.WORDS[kind]}: expected {' or '.join(fitting)}")
    layers = int(trunk.config.get_text_config().num_hidden_layers)
    if not -layers - 1 <= reading.layer <= layers:
        raise ModelError(f"layer: {reading.layer}; {name} has {layers} layers: expected {-layers - 1} to {layers}")
    if reading.max_tokens < 1:
        raise ModelError(f"max_tokens: {reading.max_tokens}; expected a whole number from 1")
    backbone.check_window(trunk, reading.max_tokens)
    layer = -1 if reading.layer == layers else reading.layer + layers + 1 if reading.layer < -1 else reading.layer
    return replace(reading, pooling=pooling, layer=layer)


def _kept(path: Path, shape: tuple[int, int]) -> Vectors | None:
    """What a file of the cache holds; None where there is none, or it is broken."""
    try:
        found: Vectors = load_file(path)["vectors"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found.shape == shape else None
