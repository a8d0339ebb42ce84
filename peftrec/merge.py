"""Several adapters of one base model as one adapter: PEFT's ways to add, weigh and merge LoRA updates.

cat: the weighted sum itself, with the ranks of all; svd: its best approximation of one rank; linear: the factors are
added, which is not the sum of the updates and is small; ties (Yadav et al. 2023, arXiv:2306.01708) and dare (Yu et al.
2023, arXiv:2311.03099): values are trimmed, or dropped at random, before the factors are added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from peftrec import adapters, artifact, loading
from peftrec.backbone import Backbone
from peftrec.errors import ModelError
from peftrec.export import written
from peftrec.loaded_adapter import LoadedAdapter
from peftrec.methods import one_line

Kind = Literal["svd", "cat", "linear", "ties", "dare_linear", "dare_ties"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRIMMED = ("ties", "dare_linear", "dare_ties")
ALIKE = ("linear", *TRIMMED)  # these add factors, which must have one rank


@dataclass(frozen=True)
class Merged:
    """A merged adapter as it was written.

    Attributes:
        folder: where it is.
        r: its rank.
        names: the data sets that its parts were trained on.
    """

    folder: Path
    r: int
    names: tuple[str, ...]


def merge(
    parts: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    kind: Kind = "svd",
    density: float | None = None,
    r: int | None = None,
    base_model: str | Path | None = None,
    seed: int = 13,
) -> Merged:
    """Write several LoRA adapters as one, which is used as any other.

    Prompt, items and prior are those of the first one; its sample questions are answered anew.

    Args:
        parts: adapters' folders, their runs' or their Hub ids.
        output: a folder that is not there yet, or is empty.
        weights: of the parts; None weighs them alike, with a sum of one.
        kind: see the module's text.
        density: share of the values that ties and dare keep (default: 0.5).
        r: of svd; None is the highest of the parts.
        base_model: as in `Recommender.from_pretrained`.
        seed: of what dare drops.

    Raises:
        HubError: a part is not on the Hub, or not safe to read.
        ModelError: parts that do not go together, settings that mean nothing to this kind, or the folder cannot be
            written.
    """
    folders = [loading.find(part) for part in parts]
    found = [artifact.read(folder) for folder in folders]
    shares = [1 / max(1, len(parts))] * len(parts) if weights is None else list(weights)
    _check_settings(kind, len(parts), shares, density, r)
    for folder, about in zip(folders[1:], found[1:], strict=True):
        _check_together(folders[0], found[0], folder, about)
    ranks = [_rank(folder) for folder in folders]
    if kind in ALIKE and len(set(ranks)) > 1:
        raise ModelError(
            f"--kind: {kind}; it adds adapters of one rank, and these have {', '.join(map(str, ranks))}; choose svd or "
            "cat"
        )
    with written(output) as scratch:
        base = loading.load_base(found[0], folders[0], base_model=base_model, dtype="float32")
        if other := loading.difference_of_bases(found[0], base):
            warnings.warn(other, stacklevel=2)
        model = loading.put_on(base, folders[0], found[0])
        names = ["default", *(f"part{number}" for number in range(1, len(folders)))]
        torch.manual_seed(seed)
        try:
            for name, folder in zip(names[1:], folders[1:], strict=True):
                model.load_adapter(str(folder), name, torch_device=str(model.device))
            model.base_model.add_weighted_adapter(
                names,
                shares,
                "merged",
                combination_type=kind,
                svd_rank=r,
                svd_full_matrices=False,
                density=0.5 if density is None and kind in TRIMMED else density,
            )
        except adapters.BROKEN as error:
            raise ModelError(
                f"{', '.join(map(str, parts))}: PEFT cannot merge them ({one_line(error)}); choose another --kind"
            ) from error
        described = model.peft_config["merged"]
        described.use_rslora = False  # its lora_alpha is its rank: a scale of one
        adapters.save(model, scratch, "merged")
        about = _described(found, base, loading.put_on(base, scratch, found[0]))
        base.tokenizer.save_pretrained(scratch)
        artifact.write(scratch, about, artifact.read_prior(folders[0], found[0]))
    return Merged(Path(output), int(described.r), tuple(about.data.name.split(", ")))


def _check_settings(kind: str, parts: int, weights: Sequence[float], density: float | None, r: int | None) -> None:
    if parts < 2:
        raise ModelError(f"adapters: {parts}; expected two or more to merge")
    if kind not in KINDS:
        raise ModelError(f"--kind: {kind!r}; expected one of {', '.join(KINDS)}")
    if len(weights) != parts:
        raise ModelError(f"--weights: {len(weights)} for {parts} adapters; give one for each")
    if density is not None and (kind not in TRIMMED or not 0 < density <= 1):
        raise ModelError(f"--density: {density:g} with --kind {kind}; expected above 0 and up to 1, for ties and dare")
    if r is not None and (kind != "svd" or r < 1):
        raise ModelError(f"--rank: {r} with --kind {kind}; expected a whole number from 1, for svd; leave it out")


def _check_together(first: Path, ours: artifact.Artifact, other: Path, theirs: artifact.Artifact) -> None:
    same = {
        "base model's weights": (ours.base_model.fingerprint[:16], theirs.base_model.fingerprint[:16]),
        "task": (ours.task, theirs.task),
        "layout": (ours.prompt.layout, theirs.prompt.layout),
        "answers": (ours.prompt.answers, theirs.prompt.answers),
        "head": (ours.target.head, theirs.target.head),
    }
    for what, (mine, found) in same.items():
        if mine != found:
            raise ModelError(
                f"{other}: {what} {found}, and {first} has {mine}; expected adapters that differ in what they were "
                "trained on; leave one of them out"
            )
    if ours.side or theirs.side:
        raise ModelError(f"{first if ours.side else other}: it has side vectors; expected adapters without any")
    if ours.target.head != "tokens":
        raise ModelError(
            f"{first}: head {ours.target.head}, which was trained with each adapter; expected adapters with answer "
            "tokens (score.head: tokens)"
        )


def _rank(folder: Path) -> int:
    """Rank of a plain LoRA adapter; anything else is refused."""
    if adapters.is_whole(folder):
        raise ModelError(f"{folder}: a whole model (adapter.method: full); expected LoRA adapters")
    found = adapters.read_config(folder)
    if found.peft_type.value != "LORA" or found.use_dora:
        kind = "DoRA" if getattr(found, "use_dora", False) else found.peft_type.value
        raise ModelError(f"{folder}: {kind}; expected plain LoRA adapters, whose updates can be added")
    return int(found.r)


def _described(found: Sequence[artifact.Artifact], base: Backbone, model: object) -> artifact.Artifact:
    """The first one's `peftrec.json` with all data sets and the answers that the merged adapter gives."""
    first = artifact.uncalibrated(found[0])  # what the merged adapter says is not what that curve was fitted on
    names = ", ".join(dict.fromkeys(about.data.name for about in found))
    digest = hashlib.sha256("".join(about.data.sha256 for about in found).encode()).hexdigest()
    bare = dataclasses.replace(first, data=artifact.Source(names, digest), prior=None)
    scores = LoadedAdapter(bare, model, base.tokenizer, None, None).probe_scores().tolist()
    probes = [dataclasses.replace(one, score=score) for one, score in zip(first.probes, scores, strict=False)]
    rest = scores[len(probes) :]
    records = [dataclasses.replace(one, score=score) for one, score in zip(first.record_probes, rest, strict=True)]
    return dataclasses.replace(bare, probes=probes, record_probes=records)
