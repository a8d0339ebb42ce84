"""Adversarial training on the input embeddings: the move by hand, and what training does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_train import changed, fit, log, losses  # noqa: F401 (fixtures)
from torch import nn

from peftrec import fgm


def test_a_row_moves_along_its_gradient_by_epsilon() -> None:
    embeddings = nn.Embedding(4, 2).requires_grad_(False)
    embeddings.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    ids = torch.tensor([[0, 1], [2, 3]])
    with fgm.watched(embeddings) as outputs:
        out = embeddings(ids)
        # d/dx of 3 x[0, 0, 0] + 4 x[0, 1, 1] has length 5 in the first row; the second row asks nothing.
        (3 * out[0, 0, 0] + 4 * out[0, 1, 1]).backward()
    with fgm.moved(embeddings, outputs, epsilon=0.5):
        again = embeddings(ids)
    assert torch.allclose(again[0], torch.tensor([[1.0 + 0.5 * 3 / 5, 0.0], [0.0, 1.0 + 0.5 * 4 / 5]]))
    assert torch.equal(again[1], embeddings.weight[[2, 3]])
    assert torch.equal(embeddings(ids), embeddings.weight[ids])  # hooks are gone
    assert embeddings.weight.grad is None


def test_trained_embeddings_keep_their_gradient() -> None:
    embeddings = nn.Embedding(3, 2)
    with fgm.watched(embeddings) as outputs:
        embeddings(torch.tensor([[0, 1]])).sum().backward()
    assert embeddings.weight.grad[:2].tolist() == [[1, 1], [1, 1]]
    assert outputs[0].grad is not None


def test_the_loss_grows_along_the_move() -> None:
    torch.manual_seed(1)
    embeddings, head = nn.Embedding(10, 4), nn.Linear(4, 1)
    ids = torch.arange(6).reshape(2, 3)

    def loss() -> torch.Tensor:
        return (head(torch.tanh(embeddings(ids))) ** 2).mean()

    with fgm.watched(embeddings) as outputs:
        before = loss()
        before.backward()
    with fgm.moved(embeddings, outputs, epsilon=0.1):
        assert loss() > before


def test_training_learns_from_both_passes(fit: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    _, plain = fit(tmp_path / "plain", changed(max_steps=3, evals=0))
    moved, seen = fit(tmp_path / "fgm", changed(max_steps=3, evals=0, fgm_epsilon=5.0)), []
    assert losses(plain)[0] == losses(moved[1])[0]  # the loss that is shown is that of the batch as it is
    assert losses(plain)[1:] != losses(moved[1])[1:]
    real = fgm.moved

    def watching(*args: Any) -> Any:
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(fgm, "moved", watching)
    _, again = fit(tmp_path / "again", changed(max_steps=3, evals=0, fgm_epsilon=5.0))
    assert losses(again) == losses(moved[1])
    assert len(seen) == 3
    assert all(outputs[0].grad.norm() > 0 for _, outputs, _ in seen)
