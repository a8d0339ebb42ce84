"""Merged adapters: cat and svd are the weighted sum of the updates, and what does not go together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saved import QUESTIONS, save_adapter

from peftrec import adapters, artifact, cli, config, loading
from peftrec.errors import ModelError
from peftrec.loaded_adapter import LoadedAdapter
from peftrec.lora_start import scaling
from peftrec.merge import ALIKE, merge


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """What a LoRA adapter adds to each layer's weights."""
    state = load_file(folder / adapters.WEIGHTS)
    scale = scaling(adapters.read_config(folder))
    return {
        key: scale * state[key.replace("lora_A", "lora_B")] @ tensor for key, tensor in state.items() if "lora_A" in key
    }


@pytest.fixture(scope="module")
def parts(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("parts")
    ways = {
        "films": ({"adapter": config.Adapter(r=4, lora_alpha=8)}, {"data_name": "films"}),
        "books": ({"adapter": config.Adapter(r=4, lora_alpha=12)}, {"data_name": "books", "prior": None}),
        "wide": ({"adapter": config.Adapter(r=6, variant="rslora")}, {"data_name": "books"}),
        "dora": ({"adapter": config.Adapter(r=4, variant="dora")}, {}),
        "ia3": ({"adapter": config.Adapter(method="ia3")}, {}),
    }
    return {
        name: save_adapter(tiny_llama_folder, top / name, strength=0.1 * (place + 1), **one, **more)
        for place, (name, (one, more)) in enumerate(ways.items())
    }


def test_cat_is_the_weighted_sum(parts: dict[str, Path], tiny_llama_folder: Path, tmp_path: Path) -> None:
    done = merge(
        [parts["films"], parts["wide"]], tmp_path / "out", weights=[0.25, 2], kind="cat", base_model=tiny_llama_folder
    )
    assert (done.r, done.names) == (10, ("films", "books"))
    ours, films, wide = updates(tmp_path / "out"), updates(parts["films"]), updates(parts["wide"])
    for key, update in ours.items():
        torch.testing.assert_close(update, 0.25 * films[key] + 2 * wide[key], atol=1e-5, rtol=1e-4)


def test_svd_is_the_best_of_its_rank(parts: dict[str, Path], tiny_llama_folder: Path, tmp_path: Path) -> None:
    both = [parts["films"], parts["books"]]
    assert merge(both, tmp_path / "whole", r=8, base_model=tiny_llama_folder).r == 8
    assert merge(both, tmp_path / "cut", base_model=tiny_llama_folder).r == 4
    whole, cut, one, two = (updates(folder) for folder in (tmp_path / "whole", tmp_path / "cut", *both))
    for key, update in whole.items():
        total = 0.5 * one[key] + 0.5 * two[key]
        torch.testing.assert_close(update, total, atol=1e-5, rtol=1e-4)
        values = torch.linalg.svdvals(total)
        assert float((cut[key] - total).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ALIKE)
def test_every_kind_is_an_adapter_like_any_other(
    kind: Any, parts: dict[str, Path], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Its sample questions are answered by itself, and drawing again by the same seed gives the same."""
    found = []
    for name in ("a", "b"):
        merge([parts["films"], parts["books"]], tmp_path / name, kind=kind, base_model=tiny_llama_folder)
        about = artifact.read(tmp_path / name)
        base = loading.load_base(about, tmp_path / name, base_model=tiny_llama_folder)
        adapter = LoadedAdapter(about, loading.put_on(base, tmp_path / name, about), base.tokenizer, None, None)
        np.testing.assert_allclose(adapter.probe_scores(), about.recorded, atol=1e-4)
        found.append(about.recorded)
    assert found[0] == found[1]
    assert len(found[0]) == len(QUESTIONS)
    assert any(np.abs(found[0]) > 0)
    assert (about.data.name, about.prior) == ("films, books", artifact.PRIOR_FILE)
    assert (tmp_path / "a" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["films"], {}, "adapters: 1; expected two or more to merge"),
        (["films", "books"], {"weights": [1.0]}, "--weights: 1 for 2 adapters; give one for each"),
        (
            ["films", "books"],
            {"density": 0.3},
            "--density: 0.3 with --kind svd; expected above 0 and up to 1, for ties",
        ),
        (["films", "books"], {"kind": "ties", "density": 1.5}, "--density: 1.5 with --kind ties"),
        (["films", "books"], {"kind": "cat", "r": 3}, "--rank: 3 with --kind cat"),
        (["films", "books"], {"kind": "mean"}, "--kind: 'mean'; expected one of svd, cat, linear, ties"),
        (["films", "wide"], {"kind": "linear"}, "--kind: linear; it adds adapters of one rank, and these have 4, 6"),
        (["films", "dora"], {}, "DoRA; expected plain LoRA adapters"),
        (["films", "ia3"], {}, "IA3; expected plain LoRA adapters"),
    ],
)
def test_what_cannot_be_merged(
    names: list[str], options: dict[str, Any], message: str, parts: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        merge([parts[name] for name in names], tmp_path / "out", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_answers_or_tasks_are_refused(
    parts: dict[str, Path], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    stars = save_adapter(tiny_llama_folder, tmp_path / "stars", task="rating", scale=(1.0, 2.0, 3.0), prior=None)
    with pytest.raises(ModelError, match=r"stars: task rating, and .*films has click"):
        merge([parts["films"], stars], tmp_path / "out")


def test_the_verb(
    parts: dict[str, Path], tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(parts["films"]), str(parts["books"]), "--output", str(tmp_path / "out"), "--kind", "cat"]
    assert cli.main([*words, "--base-model", str(tiny_llama_folder), "--weights", "0.5", "0.5"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: an adapter of rank 8 from 2, trained on films, books\n"
    assert cli.main(words) == 2
    assert "there already; expected a folder that is new or empty" in capsys.readouterr().err
