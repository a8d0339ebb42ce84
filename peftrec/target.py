"""What the model's outputs mean: the score that is reported and the loss that is trained, for each task and head.

A head gives each event K outputs: one for each answer (`tokens`, `classifier`) or a single one (`linear`). With what
the counts say of the event (its prior, measured from `centre`) they become

* clicks: the log-odds of a like, `output[1] - output[0] + prior`, or `output[0] + prior`;
* ratings: the mean of the answers' distribution, `softmax(output + offset + slope * prior * scale) @ scale`, which is
  what minimises the squared error of that distribution, or `output[0] + offset + prior`.

`offset` and `slope` make a distribution of a prior's single number: they are those of the ordinal logit (adjacent
categories; Agresti, Categorical Data Analysis, section 8.3) that fits the training ratings best by the prior alone, so
that a model whose outputs are all equal predicts what the prior predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from peftrec.calibration import Knots, calibrated
from peftrec.metrics import chances

Floats = npt.NDArray[np.float64]

_MOST_STEPS = 50
_MOST_FITTED = 200_000


@dataclass(frozen=True)
class Target:
    """How outputs, prior and label go together.

    Attributes:
        task: what is predicted.
        head: where the outputs come from.
        loss: what is trained; the linear head has but one loss for each task.
        scale: what each label stands for, ascending, (K,).
        offset: added to the outputs, (number of outputs,).
        slope: of the prior.
        centre: the prior of an event of which nothing is known.
        calibration: knots of the curve through which scores go at the end (`calibration.fit`); none leaves them.
    """

    task: Literal["click", "rating"] = "click"
    head: Literal["tokens", "classifier", "linear"] = "tokens"
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    scale: tuple[float, ...] = (0.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0)
    slope: float = 1.0
    centre: float = 0.0
    calibration: Knots = ()

    @property
    def outputs(self) -> int:
        """Number of outputs of the head, K."""
        return len(self.offset)

    def score(self, outputs: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """Outputs (..., K) and priors (...) -> log-odds of a like, or predicted ratings, (...), float32."""
        if self.head == "linear":
            return outputs[..., 0].float() + self.offset[0] + self.slope * (prior - self.centre)
        if self.task == "click":
            outputs = outputs.float()
            return outputs[..., 1] - outputs[..., 0] + self.slope * (prior - self.centre)
        return torch.softmax(self._logits(outputs, prior), dim=-1) @ self._scale(outputs)

    def losses(
        self,
        outputs: torch.Tensor,
        prior: torch.Tensor,
        label: torch.Tensor,
        taught: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each event, (...); `label` (...) is the index of its answer.

        `taught`, (..., M), is what the answer is taken for in its place, in the form of `own`.
        """
        if taught is None and self.forms > 1:
            return F.cross_entropy(self._logits(outputs, prior), label, reduction="none")
        goal = self.own(label) if taught is None else taught.float()  # DeepSpeed rounds what comes with a batch
        if self.task == "click":
            return F.binary_cross_entropy_with_logits(self.score(outputs, prior), goal[..., 0], reduction="none")
        if self.forms == 1:
            return (self.score(outputs, prior) - goal[..., 0]) ** 2
        return F.cross_entropy(self._logits(outputs, prior), goal, reduction="none")

    @property
    def forms(self) -> int:
        """Numbers by which the loss is told what an event's answer is, M: a chance, a rating, or a share of each."""
        return len(self.scale) if self.task == "rating" and self.loss == "cross_entropy" else 1

    def own(self, label: torch.Tensor) -> torch.Tensor:
        """The answers of index `label` (...) as the loss is told them, (..., M) float32."""
        if self.forms > 1:
            return F.one_hot(label, self.forms).float()
        return (label.float() if self.task == "click" else self._scale(label)[label])[..., None]

    def told(self, outputs: npt.NDArray[np.float32], prior: npt.ArrayLike | None) -> Floats:
        """What a model says of events, (n, M): scores, or shares of the answers where those are trained.

        Args:
            outputs: (n, K).
            prior: (n,), or None.
        """
        raw, added = self._tensors(outputs, prior)
        if self.forms > 1:
            return torch.softmax(self._logits(raw, added), dim=-1).numpy().astype(np.float64)
        return self.score(raw, added)[:, None].numpy().astype(np.float64)

    def agreed(self, told: Sequence[Floats]) -> Floats:
        """What several models have `told`, (n, M) each, comes to in the form of `own`, (n, M).

        The mean of their scores, as `ensemble.Ensemble` takes it, or of their distributions.
        """
        mean: Floats = np.mean(told, axis=0)
        return chances(mean) if self.task == "click" else mean

    def answers(self, outputs: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """What the most probable answer stands for, (...); of a linear head the value nearest to its score."""
        scale = self._scale(outputs)
        if self.task == "click":
            return scale[(self.score(outputs, prior) > 0).long()]
        if self.head == "linear":
            return scale[(self.score(outputs, prior)[..., None] - scale).abs().argmin(dim=-1)]
        return scale[self._logits(outputs, prior).argmax(dim=-1)]

    def measure(self, outputs: npt.NDArray[np.float32], prior: npt.ArrayLike | None = None) -> tuple[Floats, Floats]:
        """Scores, within the scale for ratings, and answers of events, (n,) each.

        Args:
            outputs: (n, K).
            prior: (n,); None is the model's own score, as if nothing were known of any event.
        """
        raw, added = self._tensors(outputs, prior)
        score = self.score(raw, added).numpy().astype(np.float64)
        if self.task == "rating":
            score = np.clip(score, self.scale[0], self.scale[-1])
        return score, self.answers(raw, added).numpy().astype(np.float64)

    def calibrated(self, score: Floats) -> Floats:
        """What scores as `measure` gives them, (n,), are taken for: within the scale for ratings."""
        score = calibrated(score, self.calibration)
        return np.clip(score, self.scale[0], self.scale[-1]) if self.task == "rating" else score

    def mean_loss(
        self, outputs: npt.NDArray[np.float32], prior: npt.ArrayLike | None, label: npt.NDArray[np.int8]
    ) -> float:
        """Mean of `losses` over events: (n, K), (n,) or None as in `measure`, and (n,)."""
        raw, added = self._tensors(outputs, prior)
        return float(self.losses(raw, added, torch.from_numpy(label.astype(np.int64))).mean())

    def _tensors(
        self, outputs: npt.NDArray[np.float32], prior: npt.ArrayLike | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raw = torch.from_numpy(np.ascontiguousarray(outputs, dtype=np.float32))
        known = np.full(len(raw), self.centre) if prior is None else np.asarray(prior)
        return raw, torch.from_numpy(known.astype(np.float32))

    def _logits(self, outputs: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        offset = torch.tensor(self.offset, dtype=torch.float32, device=outputs.device)
        return outputs.float() + offset + self.slope * (prior - self.centre)[..., None] * self._scale(outputs)

    def _scale(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.scale, dtype=torch.float32, device=outputs.device)


def pair_losses(score: torch.Tensor, label: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """How badly each window's liked events stand above its others, summed over the windows, a number.

    A window's loss is the mean over its pairs of a liked and a not liked event of `log(1 + exp(other - liked))`, times
    its events: so it weighs as they do in the sum of their own losses. A window without such a pair has none.

    Args:
        score: log-odds of a like, prior included (N,).
        label: 0 or 1 (N,).
        window: which window an event is of; those of one window stand together (N,).
    """
    total = score.new_zeros(())
    sizes = torch.unique_consecutive(window, return_counts=True)[1].tolist()
    for own, liked in zip(torch.split(score, sizes), torch.split(label == 1, sizes), strict=True):
        gaps = own[liked][:, None] - own[~liked][None, :]
        if gaps.numel():
            total = total + F.softplus(-gaps).mean() * len(own)
    return total


def fit_target(
    task: Literal["click", "rating"],
    head: Literal["tokens", "classifier", "linear"],
    loss: Literal["cross_entropy", "squared_error"],
    scale: tuple[float, ...],
    label: npt.NDArray[np.int8],
    prior: npt.ArrayLike | None,
) -> Target:
    """The target of a run.

    Args:
        task: as in the recipe.
        head: as in the recipe.
        loss: as in the recipe.
        scale: `Log.scale`.
        label: of the training events, (n,).
        prior: of the training events, (n,), or None where no event has one.
    """
    if task == "click":
        return Target(task, head, loss, scale, (0.0,) * (1 if head == "linear" else 2))
    mean = float(np.asarray(scale)[label].mean())
    if head == "linear":
        return Target(task, head, "squared_error", scale, (mean,), 0.0 if prior is None else 1.0, mean)
    if prior is None:
        # The head itself learns how frequent each answer is.
        return Target(task, head, loss, scale, (0.0,) * len(scale), 0.0)
    offset, slope = _ordinal_logit(np.asarray(scale), label, np.asarray(prior, dtype=np.float64) - mean)
    return Target(task, head, loss, scale, offset, slope, mean)


def _ordinal_logit(scale: Floats, label: npt.NDArray[np.int8], known: Floats) -> tuple[tuple[float, ...], float]:
    """Maximum likelihood of P(label = k) ~ exp(offset[k] + slope * known * scale[k]) by Newton's method.

    The offset of the lowest answer is 0; a slight ridge keeps those of answers that nobody gave finite.
    """
    every = max(1, len(label) // _MOST_FITTED)
    label, known = label[::every], known[::every]
    answers = len(scale)
    ridge = np.append(np.full(answers - 1, 1e-3), 1e-6)
    count = np.bincount(label, minlength=answers).astype(np.float64)
    found = np.append(np.log((count[1:] + 1) / (count[0] + 1)), 0.0)
    for _ in range(_MOST_STEPS):
        logits = np.append(0.0, found[:-1]) + found[-1] * known[:, None] * scale
        chance = np.exp(logits - logits.max(axis=1, keepdims=True))
        chance /= chance.sum(axis=1, keepdims=True)
        expected = chance @ scale
        gradient = (
            np.append((count - chance.sum(axis=0))[1:], float(((scale[label] - expected) * known).sum()))
            - ridge * found
        )
        hessian = np.empty((answers, answers))
        hessian[:-1, :-1] = np.diag(chance[:, 1:].sum(axis=0)) - chance[:, 1:].T @ chance[:, 1:]
        cross = (chance[:, 1:] * (scale[1:] - expected[:, None]) * known[:, None]).sum(axis=0)
        hessian[-1, :-1] = hessian[:-1, -1] = cross
        hessian[-1, -1] = float(((chance @ scale**2 - expected**2) * known**2).sum())
        step = np.linalg.solve(hessian + np.diag(ridge), gradient)
        # Far from the maximum a whole step could overshoot.
        found = found + step * min(1.0, 2.0 / float(np.abs(step).max(initial=1e-12)))
        if np.abs(step).max() < 1e-9:
            break
    return (0.0, *map(float, found[:-1])), float(found[-1])
