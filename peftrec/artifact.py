"""`peftrec.json`: what a saved adapter needs to be asked again, as plain data that any program can read.

It may come from a stranger. It is read as data of bounded size, every value is checked, templates may name columns and
nothing else, and no file but `prior.json` beside it can be named.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from peftrec import config, values
from peftrec.calibration import MOST_KNOTS
from peftrec.errors import ModelError
from peftrec.opponents import SavedPrior, prior_from_json
from peftrec.prompts import ANSWER_MARK, LINE_END, Codec, Kind, WholeText, with_user
from peftrec.schema import Check, Reader, show

if TYPE_CHECKING:
    from peftrec.target import Target

FORMAT = 1
FILE: Final = "peftrec.json"
PRIOR_FILE: Final = "prior.json"
MOST_BYTES = {FILE: 1_000_000, PRIOR_FILE: 500_000_000}
MOST_TOKENS = 1_000_000

Name = Annotated[str, Check("text of at most 500 characters", lambda text: 0 < len(text) <= 500)]
Tokens = Annotated[int, Check(f"a number of tokens up to {MOST_TOKENS:,}", lambda n: 1 <= n <= MOST_TOKENS)]
Distinct = Check("different values", lambda a: len(a) == len(set(a)))
Several = Check("two or more different values", lambda a: len(a) == len(set(a)) > 1)
SideName = Annotated[
    str, Check("als, items_0, items_1 … or users", lambda name: bool(re.fullmatch(r"als|items_\d{1,2}|users", name)))
]
Finite = Annotated[float, Check("a finite number", math.isfinite)]
Point = Annotated[list[Finite], Check("two numbers", lambda point: len(point) == 2)]
Curve = Annotated[
    list[Point],
    Check(
        f"at most {MOST_KNOTS} points, each further up than the one before",
        lambda points: len(points) <= MOST_KNOTS and all(a < c and b < d for (a, b), (c, d) in pairwise(points)),
    ),
]


@dataclass(frozen=True)
class PromptFormat:
    """The prompt of a trained adapter: the recipe's, and what the tokenizer made of it."""

    layout: Literal["timeline", "pointwise"]
    header: str
    """Text before the first event, line end included."""
    item: values.Template
    """An item as text, over the columns of the items table."""
    answers: Annotated[list[str], Several]
    answer_ids: Annotated[list[int], Distinct]
    """The answers' tokens; empty where an encoder reads the answers as text only. Of clicks the score is the second
    one's logit minus the first one's at the last token (of an encoder-decoder model at its first step), of ratings the
    mean of `target.scale` under the softmax of their logits plus `target.offset`. Under another head than tokens these
    logits are the outputs of a sequence classification model."""
    max_tokens: Tokens
    max_item_tokens: Tokens
    """An item's text and the colon behind it are cut to this many tokens."""
    line_end: str = LINE_END
    bos: str | None = None
    """Token that stands before everything, as text; null where the tokenizer has none."""
    history: Literal["all", "liked"] = "all"
    """Which events are shown; liked are those from `like_at`."""
    max_history: values.Count | None = None
    template: values.Template | None = None
    kind: Kind = "causal"
    """Of the base model. Encoders and encoder-decoder models (seq2seq) have a template and read whole texts, with all
    special tokens that the tokenizer adds; of an encoder a tab in the template stands between the two texts."""
    example: str = ""
    """One short prompt up to the read position. Of a causal model `bos` is included: tokenize it without adding special
    tokens."""

    user: values.Template | None = None
    """A person as text, which stands where the template has {user}; empty where nothing is known of them."""

    def text(self, history: Sequence[tuple[str, int]], item: str, user: str = "") -> str:
        """The prompt as text, without `bos`, up to the position where the answer is read.

        Args:
            history: text and answer (its index) of each event shown, oldest first.
            item: text of the item in question.
            user: text of the person.
        """
        lines = "".join(f"{text}{ANSWER_MARK}{self.answers[answer]}{self.line_end}" for text, answer in history)
        if self.template is not None:
            return with_user(self.template, user).format(history=lines, item=item)
        return f"{self.header}{lines}{item}{ANSWER_MARK}"


@dataclass(frozen=True)
class Base:
    """The base model that the adapter was trained on; see `backbone.BaseModel`."""

    name: Name
    hub_id: Name
    fingerprint: Name
    parameters: values.Count
    dtype: Literal["float32", "bfloat16", "float16"]
    revision: Name | None = None
    license: Name | None = None
    note: Name | None = None


@dataclass(frozen=True)
class Source:
    """What the adapter was trained on: a data set's name or its file's, and the hash of its values."""

    name: Name
    sha256: Name


@dataclass(frozen=True)
class Scoring:
    """What the outputs at the read position mean; see `target.Target`."""

    head: Literal["tokens", "classifier", "linear"] = "tokens"
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    scale: Annotated[list[Finite], Several] = field(default_factory=lambda: [0.0, 1.0])
    """What each answer stands for, ascending."""
    offset: list[Finite] = field(default_factory=lambda: [0.0, 0.0])
    slope: Finite = 1.0
    centre: Finite = 0.0
    calibration: Curve = field(default_factory=list)
    """Points of the curve through which scores go at the end, prior included; see `calibration.fit`."""


@dataclass(frozen=True)
class Probe:
    """A question with the score that the adapter gave when it was saved.

    Attributes:
        history: text and answer (its index) of each event, oldest first.
        candidate: text of the item in question.
        score: without the prior, from float32.
        items: ids of the history's items and of the candidate, whose side vectors the score counts on; else none.
    """

    history: list[tuple[str, int]]
    candidate: str
    score: float
    items: list[str | None] = field(default_factory=list)


@dataclass(frozen=True)
class RecordProbe:
    """The same of an adapter of ready-made prompts: a record, and the score that it got."""

    record: dict[str, str]
    score: float


@dataclass(frozen=True)
class Artifact:
    """Everything in `peftrec.json`."""

    prompt: PromptFormat
    base_model: Base
    data: Source
    peftrec_version: Name
    task: Literal["click", "rating"] = "click"
    target: Scoring = field(default_factory=Scoring)
    like_at: float | None = None
    """Rating from which an event counts as liked; null where the data had labels, or nobody said."""
    clicks_alone: bool = False
    """Whether every event of the data was a click, beside which negatives were drawn."""
    prior: Literal["prior.json"] | None = None
    side: Annotated[list[SideName], Distinct] | None = None
    """Sources of the vectors in `side.safetensors`, which projectors add to the token that ends an event's question."""
    seed: int = 13
    probes: list[Probe] = field(default_factory=list)
    record_probes: list[RecordProbe] = field(default_factory=list)
    """In place of `probes` where the prompts are ready-made."""

    @property
    def recorded(self) -> list[float]:
        """Scores of all probes."""
        return [*(one.score for one in self.probes), *(one.score for one in self.record_probes)]


def describe(
    recipe: config.Recipe,
    codec: Codec | WholeText,
    base: Any,
    target: Target,
    *,
    data_name: str,
    data_sha256: str,
    like_at: float | None,
    max_item_tokens: int,
    example: tuple[Sequence[tuple[str, int]], str],
    template: str | None = None,
    probes: Sequence[Probe] = (),
    side: Sequence[str] = (),
) -> Artifact:
    """The artifact of a finished run; no path of this machine gets into it.

    Args:
        recipe: the run's recipe.
        codec: its prompt under the base model's tokenizer.
        base: the run's `backbone.BaseModel`.
        target: the run's.
        data_name: `Interactions.name`.
        data_sha256: `Interactions.sha256`.
        like_at: rating from which an event counts as liked, where that is known and matters.
        max_item_tokens: where item texts were cut.
        example: history and candidate of the example prompt, as in `PromptFormat.text`.
        template: the template in effect where the recipe leaves it to a default (prompt records).
        probes: questions with their scores.
        side: names of the sources of side vectors.
    """
    kind: Kind = codec.kind if isinstance(codec, WholeText) else "causal"
    prompt = PromptFormat(
        layout=recipe.prompt.layout,
        header=codec.header_text,
        item=recipe.prompt.item,
        answers=codec.answer_texts,
        answer_ids=list(codec.answers),
        max_tokens=recipe.prompt.max_tokens,
        max_item_tokens=max_item_tokens,
        line_end=codec.line_end_text,
        bos=codec.tokenizer.bos_token,
        history=recipe.prompt.history,
        max_history=recipe.prompt.max_history,
        template=template or recipe.prompt.template,
        kind=kind,
        user=recipe.prompt.user,
    )
    facts = {one.name: getattr(base, one.name) for one in dataclasses.fields(Base)}
    history, item = example
    text = prompt.text(history, item) if _asks_items(prompt.template) else item
    bos = prompt.bos if kind == "causal" else None
    return Artifact(
        prompt=dataclasses.replace(prompt, example=(bos or "") + text),
        base_model=Base(**{**facts, "name": public_name(base.name), "hub_id": public_name(base.hub_id)}),
        data=Source(", ".join(public_name(part) for part in data_name.split(", ")), data_sha256),
        peftrec_version=version("peftrec"),
        task=recipe.task,
        target=Scoring(
            target.head,
            target.loss,
            list(target.scale),
            list(target.offset),
            target.slope,
            target.centre,
            [list(point) for point in target.calibration],
        ),
        like_at=like_at,
        clicks_alone=recipe.data.sampled_negatives is not None,
        side=list(side) or None,
        seed=recipe.seed,
        probes=list(probes),
    )


def _asks_items(template: str | None) -> bool:
    return template is None or "item" in values.placeholders(template)


def uncalibrated(artifact: Artifact) -> Artifact:
    """The same adapter without its calibration, which fits its own scores alone, its prior in them."""
    return dataclasses.replace(artifact, target=dataclasses.replace(artifact.target, calibration=[]))


def public_name(name: str) -> str:
    """A Hub id or a data set's name as it is; of a path the last part only."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def write(folder: str | Path, artifact: Artifact, prior: SavedPrior | None) -> None:
    """Write `peftrec.json` and, where there is a prior, `prior.json`; each appears whole or not at all."""
    folder = Path(folder)
    if prior is not None:
        _replace(folder / PRIOR_FILE, prior.to_json())
    complete = dataclasses.replace(artifact, prior=None if prior is None else PRIOR_FILE)
    values = {"format": FORMAT, **dataclasses.asdict(complete)}
    for probe in values["probes"]:
        if not probe["items"]:
            del probe["items"]
    _replace(folder / FILE, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read(folder: str | Path) -> Artifact:
    """Read and check `folder/peftrec.json`.

    Raises:
        ModelError: there is no such folder or file, or the file is not what `write` writes.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        found = f"no {FILE} in it" if folder.is_dir() else "no such folder"
        inner = folder / "adapter"
        todo = f"use {inner}" if (inner / FILE).is_file() else "use RUN/adapter of a finished run"
        raise ModelError(f"{folder}: {found}; expected a folder with an adapter that peftrec saved; {todo}")
    try:
        found_values = json.loads(_text(path), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error}); expected what peftrec wrote; fetch the adapter again") from None
    if not isinstance(found_values, dict):
        raise ModelError(f"{path}: {show(found_values)}; expected a JSON object; fetch the adapter again")
    if (number := found_values.pop("format", None)) != FORMAT:
        raise ModelError(f"{path}: format {show(number)}; this version reads format {FORMAT}; upgrade peftrec")
    probes, record_probes = found_values.pop("probes", []), found_values.pop("record_probes", [])
    reader = Reader(Artifact, str(path))
    artifact = reader.section(Artifact, found_values)
    if reader.problems:
        more = f" (and {len(reader.problems) - 1} more)" if len(reader.problems) > 1 else ""
        raise ModelError(f"{reader.problems[0]}{more}; fetch the adapter again, or upgrade peftrec")
    _check_sizes(artifact, path)
    return dataclasses.replace(
        artifact,
        probes=_probes(probes, len(artifact.prompt.answers), path),
        record_probes=_record_probes(record_probes, path),
    )


def _check_sizes(artifact: Artifact, path: Path) -> None:
    """As many answers, tokens, ratings and offsets as belong together."""
    target, answers = artifact.target, len(artifact.prompt.answers)
    outputs = 1 if target.head == "linear" else answers
    tokens = 0 if artifact.prompt.kind == "encoder" else answers
    sizes = (len(artifact.prompt.answer_ids), len(target.scale), len(target.offset))
    if sizes != (tokens, answers, outputs) or target.scale != sorted(target.scale):
        raise ModelError(
            f"{path}: {answers} answers with {sizes[0]} tokens, {sizes[1]} ratings and {sizes[2]} offsets; expected "
            f"{tokens}, {answers} ascending and {outputs}; fetch the adapter again"
        )
    if artifact.prompt.kind != "causal" and artifact.prompt.template is None:
        raise ModelError(f"{path}: prompt.template: missing; {artifact.prompt.kind} needs one; fetch the adapter again")


def _probes(values: Any, answers: int, path: Path) -> list[Probe]:
    try:
        return [
            Probe(
                [(str(text), range(answers).index(answer)) for text, answer in one["history"]],
                str(one["candidate"]),
                float(one["score"]),
                [None if item is None else str(item) for item in one.get("items", [])],
            )
            for one in values
        ]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise ModelError(
            f"{path}: probes: not a list of objects with history, candidate and score; fetch the adapter again"
        ) from None


def _record_probes(values: Any, path: Path) -> list[RecordProbe]:
    try:
        return [
            RecordProbe({str(name): str(text) for name, text in one["record"].items()}, float(one["score"]))
            for one in values
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelError(
            f"{path}: record_probes: not a list of objects with record and score; fetch the adapter again"
        ) from None


def read_prior(folder: str | Path, artifact: Artifact) -> SavedPrior | None:
    """The prior beside `peftrec.json`, or None where the adapter has none.

    Raises:
        ModelError: the file is missing, too large, or not a prior.
    """
    if artifact.prior is None:
        return None
    path = Path(folder) / PRIOR_FILE
    if not path.is_file():
        raise ModelError(
            f"{path}: no such file, though {FILE} names it; fetch the adapter again, or load without prior"
        )
    try:
        return prior_from_json(artifact.task, _text(path))
    except (UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error}); fetch the adapter again") from None


def _text(path: Path) -> str:
    size, most = path.stat().st_size, MOST_BYTES[path.name]
    if size > most:
        raise ModelError(f"{path}: {size:,} bytes; expected at most {most:,}; fetch the adapter again")
    return path.read_text(encoding="utf-8")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
