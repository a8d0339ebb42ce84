"""Several adapters on one base model: each answers as it does alone, and nobody is in another one's way."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import FILMS, PRIOR
from test_recommender import save_adapter

from peftrec import adapters, artifact, backbone, config, hub, loading, recommender
from peftrec.artifact import Probe
from peftrec.errors import DataError, ModelError
from peftrec.recommender import Recommender
from peftrec.target import Target

METHODS = {
    "lora": config.Adapter(r=8),
    "dora": config.Adapter(r=4, variant="dora"),
    "pissa": config.Adapter(r=4, variant="pissa"),
    "adalora": config.Adapter(method="adalora", init_r=6, target_r=3, target_modules=["q_proj", "v_proj"]),
    "bottleneck": config.Adapter(method="bottleneck", variant="parallel", reduction_factor=4),
    "prefix": config.Adapter(method="prefix", num_virtual_tokens=3),
    "prompt": config.Adapter(method="prompt", num_virtual_tokens=5),
    "p_tuning": config.Adapter(method="p_tuning", num_virtual_tokens=4, encoder_hidden_size=8),
    "ia3": config.Adapter(method="ia3"),
    "ln_tuning": config.Adapter(method="ln_tuning"),
    "vera": config.Adapter(method="other", peft_type="VERA", fields={"r": "16"}),
}
STARS = Target("rating", scale=(1.0, 2.0, 3.0, 4.0, 5.0), offset=(0.0, 0.1, 0.2, 0.1, 0.0))
HEADS = {
    "classifier": Target(head="classifier"),
    "linear": Target(head="linear", offset=(0.0,)),
    "stars": Target("rating", "classifier", scale=STARS.scale, offset=STARS.offset),
}
HISTORY = ["Heat (1995):yes", "Toy Story (1995):no", "Fargo (1996):yes"]
CANDIDATES = ["Sabrina (1954)", "187 (1997)", "Babe"]
ORDER = ["Heat (1995):4", "Fargo (1996):2"]
PROBES = [Probe([("Heat (1995)", 1)], "Babe (1995)", 0.5), Probe([], "187", -0.25)]


def load(folder: Path, base: Path, **options: Any) -> Recommender:
    return Recommender.from_pretrained(folder, base_model=base, **{"items": FILMS, "strict": True, **options})


def memory(model: Any) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


@pytest.fixture(scope="module")
def folders(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each method and head, of ratings, and one under full, on the tiny Llama."""
    top = tmp_path_factory.mktemp("adapters")
    base = tiny_llama_folder
    made = {
        name: save_adapter(base, top / name, adapter=method, seed=number + 10)
        for number, (name, method) in enumerate(METHODS.items())
    }
    made |= {name: save_adapter(base, top / name, target=target) for name, target in HEADS.items()}
    made["first"] = save_adapter(base, top / "first")
    made["ratings"] = save_adapter(base, top / "ratings", target=STARS)
    made["pointwise"] = save_adapter(
        base, top / "pointwise", layout="pointwise", template="Films:\n{history}And {item}? Answer:"
    )
    made["full"] = save_adapter(base, top / "full", adapter=config.Adapter(method="full"), strength=0.02)
    return made


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the base models that were loaded."""
    found, real = [], backbone.load

    def noted(model: config.Model, *target: Any, **how: Any) -> backbone.Backbone:
        found.append(model.name)
        return real(model, *target, **how)

    monkeypatch.setattr(backbone, "load", noted)
    return found


@pytest.fixture(scope="module")
def several(folders: dict[str, Path], tiny_llama_folder: Path) -> Recommender:
    """All methods on one base model, and ratings."""
    made = load(folders["first"], tiny_llama_folder)
    for name in (*METHODS, "ratings", "pointwise"):
        made.load_adapter(folders[name], name, items=FILMS)
    return made


# --- each as if it were alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_as_alone(
    several: Recommender, folders: dict[str, Path], tiny_llama_folder: Path, method: str
) -> None:
    alone = load(folders[method], tiny_llama_folder)
    found = several.score(HISTORY, CANDIDATES, adapter=method)
    np.testing.assert_allclose(found, alone.score(HISTORY, CANDIDATES), atol=1e-6)
    assert np.abs(found - several.score(HISTORY, CANDIDATES)).max() > 1e-2
    for ask in (Recommender.probability, Recommender.rank, Recommender.events):
        arguments = [HISTORY] if ask is Recommender.events else [HISTORY, CANDIDATES]
        mine, theirs = ask(several, *arguments, adapter=method), ask(alone, *arguments)
        assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs


def test_the_first_answers_as_before(several: Recommender, folders: dict[str, Path], tiny_llama_folder: Path) -> None:
    alone = load(folders["first"], tiny_llama_folder)
    np.testing.assert_array_equal(several.score(HISTORY, CANDIDATES), alone.score(HISTORY, CANDIDATES))
    assert list(several.adapters) == ["default", *METHODS, "ratings", "pointwise"]


def test_tasks_answers_and_layouts_differ(
    several: Recommender, folders: dict[str, Path], tiny_llama_folder: Path
) -> None:
    ratings = load(folders["ratings"], tiny_llama_folder)
    np.testing.assert_allclose(
        several.score(ORDER, CANDIDATES, adapter="ratings"), ratings.score(ORDER, CANDIDATES), atol=1e-6
    )
    assert several.rank(ORDER, CANDIDATES, adapter="ratings")[0].probability is None
    with pytest.raises(DataError, match="this adapter predicts ratings"):
        several.probability(ORDER, CANDIDATES, adapter="ratings")
    pointwise = load(folders["pointwise"], tiny_llama_folder)
    np.testing.assert_allclose(
        several.score(HISTORY, CANDIDATES, adapter="pointwise"), pointwise.score(HISTORY, CANDIDATES), atol=1e-6
    )


def test_the_base_is_in_memory_once(folders: dict[str, Path], tiny_llama_folder: Path, loads: list[str]) -> None:
    found = load(folders["first"], tiny_llama_folder)
    base = memory(found.model)
    for name in METHODS:
        found.load_adapter(folders[name], name, items=FILMS)
    assert loads == [str(tiny_llama_folder)]
    trunk = found._base
    assert trunk is not None
    weights = memory(trunk.model)
    fingerprint = backbone.fingerprint(trunk.model)
    assert weights <= base
    for name in METHODS:
        # A layer norm that is tuned is the only thing that a model has instead of the base model's.
        missing = weights - memory(found.adapters[name].model)
        assert not missing, name
    assert fingerprint == trunk.base.fingerprint


def test_heads_of_several_sizes(folders: dict[str, Path], tiny_llama_folder: Path, loads: list[str]) -> None:
    together = load(folders["classifier"], tiny_llama_folder)
    for name in ("linear", "stars", "classifier"):
        together.load_adapter(folders[name], name, items=FILMS)
    assert len(loads) == 1
    for name in HEADS:
        history = ORDER if name == "stars" else HISTORY
        expected = load(folders[name], tiny_llama_folder).score(history, CANDIDATES)
        np.testing.assert_allclose(together.score(history, CANDIDATES, adapter=name), expected, atol=1e-6)
        assert expected.std() > 1e-3
    with pytest.raises(ModelError, match=r"head: tokens; this base model was loaded for a head that is trained, which"):
        together.load_adapter(folders["lora"], "lora")
    with pytest.raises(ModelError, match=r"head: linear; this base model was loaded for answer tokens, which"):
        load(folders["lora"], tiny_llama_folder).load_adapter(folders["linear"], "linear")


def test_encoders(tiny_bert_folder: Path, tmp_path: Path) -> None:
    texts = {"layout": "pointwise", "template": "{history}\t{item}"}
    for number, target in enumerate((HEADS["classifier"], HEADS["linear"], HEADS["stars"])):
        save_adapter(tiny_bert_folder, tmp_path / str(number), target=target, **texts)
    together = load(tmp_path / "0", tiny_bert_folder)
    for number in ("1", "2"):
        together.load_adapter(tmp_path / number, number, items=FILMS)
        history = ORDER if number == "2" else HISTORY
        expected = load(tmp_path / number, tiny_bert_folder).score(history, CANDIDATES)
        np.testing.assert_allclose(together.score(history, CANDIDATES, adapter=number), expected, atol=1e-6)
    about = artifact.read(save_adapter_like(tmp_path / "0", tmp_path / "causal"))
    with pytest.raises(ModelError, match="is of the kind encoder; the adapter was trained on one of the kind causal"):
        loading.put_on(together._base, tmp_path / "causal", about)  # type: ignore[arg-type]


def save_adapter_like(folder: Path, copy: Path) -> Path:
    """The same adapter, said to be of a causal model."""
    shutil.copytree(folder, copy)
    values = json.loads((copy / "peftrec.json").read_text())
    values["prompt"] |= {"kind": "causal", "answer_ids": [5, 6]}
    (copy / "peftrec.json").write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantized_weights_are_shared(tiny_llama_folder: Path, bits: str) -> None:
    # A classifier, because it is not asked anything while it is loaded, which is when 8-bit layers settle.
    base = backbone.load(
        config.Model(name=str(tiny_llama_folder), dtype="float32", **{bits: True}), HEADS["classifier"]
    ).model
    first, second = loading.share(base), loading.share(base)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        outputs = [one(ids, attention_mask=torch.ones_like(ids)).logits for one in (first, second, base)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert memory(first) == memory(second) == memory(base)
    layers = [dict(one.named_modules())["model.layers.0.mlp.up_proj"] for one in (first, base)]
    kept = [getattr(one, "quant_state", None) or one.state for one in layers]
    assert layers[0] is not layers[1]
    assert kept[0] is kept[1]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_equals_single_requests(several: Recommender) -> None:
    names = [None, *METHODS, "ratings", "pointwise", "default"]
    requests: list[Any] = []
    for number, name in enumerate(names * 3):
        ratings = name == "ratings"
        history = (ORDER if ratings else HISTORY)[: number % 4] * (1 + 3 * (number % 5))
        requests.append({"adapter": name, "history": history, "candidates": CANDIDATES[: number % 3 + number % 2]})
    found = several.score_many(requests)
    assert [len(one) for one in found] == [len(request["candidates"]) for request in requests]
    for request, scores in zip(requests, found, strict=True):
        single = several.score(request["history"], request["candidates"], adapter=request["adapter"])
        np.testing.assert_allclose(scores, single, atol=1e-5, rtol=0)
    assert several.score_many([]) == []
    backwards = several.score_many(requests[::-1])[::-1]
    for one, other in zip(found, backwards, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def test_short_requests_share_a_forward_pass(several: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, model = [], several.adapters["lora"].model
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    request = {"adapter": "lora", "history": HISTORY[:1], "candidates": CANDIDATES[:1]}
    many = several.score_many([request] * 4)  # type: ignore[list-item]
    assert len(passes) == 1
    passes.clear()
    single = several.score(HISTORY[:1], CANDIDATES[:1], adapter="lora")
    assert len(passes) == 1
    hook.remove()
    np.testing.assert_allclose(np.concatenate(many), np.repeat(single, 4), atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ("Heat", DataError, r"requests\[1\]: 'Heat'; expected a dict with history and candidates"),
        ({"history": []}, DataError, r"requests\[1\]: no candidates; expected a dict with history and candidates"),
        (
            {"history": [], "candidates": [], "adaptor": "b"},
            DataError,
            r"requests\[1\]: unknown key 'adaptor'; did you mean adapter\?",
        ),
        (
            {"history": ["Heat"], "candidates": []},
            DataError,
            r"requests\[1\]: history\[0\]: 'Heat' has no answer behind a colon",
        ),
        (
            {"history": [], "candidates": [], "adapter": "b"},
            ModelError,
            r"requests\[1\]: adapter: no 'b' is loaded; expected one of default, lora, .*; load_adapter it",
        ),
    ],
)
def test_bad_requests(several: Recommender, request_: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        several.score_many([{"history": [], "candidates": ["Heat"]}, request_])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"requests: .*; expected a list; put it in a list"):
        several.score_many({"history": [], "candidates": []})  # type: ignore[arg-type]


# --- coming and going -------------------------------------------------------------------------------------------------


def test_load_replace_and_unload(folders: dict[str, Path], tiny_llama_folder: Path) -> None:
    found = load(folders["first"], tiny_llama_folder, prior=False)
    first = found.score(HISTORY, CANDIDATES)
    found.load_adapter(folders["lora"], "b", items=FILMS, prior=False)
    lora = found.score(HISTORY, CANDIDATES, adapter="b")
    found.load_adapter(folders["ia3"], "b", items=FILMS, prior=False)
    assert not np.allclose(found.score(HISTORY, CANDIDATES, adapter="b"), lora)
    found.load_adapter(folders["lora"], "default", items=FILMS)
    assert found.prior == PRIOR
    ids = ["10", "11", "?"]
    added = PRIOR.scores(ids, [1, 0, 1], ["12", "14", "?"])
    np.testing.assert_allclose(found.score(HISTORY, CANDIDATES) - added, lora, atol=1e-5)
    found.load_adapter(folders["first"], "default", items=FILMS, prior=False)
    np.testing.assert_array_equal(found.score(HISTORY, CANDIDATES), first)
    with pytest.raises(ModelError, match=r"default: it answers requests that name no adapter; load another one in its"):
        found.unload_adapter("default")
    found.unload_adapter("b")
    for ask in (found.unload_adapter, lambda name: found.score([], [], adapter=name)):
        with pytest.raises(ModelError, match=r"adapter: no 'b' is loaded; expected one of default; load_adapter it"):
            ask("b")


def test_what_cannot_be_loaded_changes_nothing(
    folders: dict[str, Path], tiny_llama_folder: Path, tiny_qwen2_folder: Path, tmp_path: Path
) -> None:
    found = load(folders["first"], tiny_llama_folder)
    found.load_adapter(folders["lora"], "b", items=FILMS)
    before = found.score(HISTORY, CANDIDATES, adapter="b")
    other = save_adapter(tiny_qwen2_folder, tmp_path / "other", probes=PROBES)
    with pytest.raises(ModelError, match=r"fingerprint \w{16}; .*; load it with a base model of its own, or with str"):
        found.load_adapter(other, "b", items=FILMS)
    with pytest.raises(ModelError, match=r"trained under full, so it is a whole model and no adapter for a base model"):
        found.load_adapter(folders["full"], "b", items=FILMS)
    with pytest.raises(ModelError, match=r"nowhere: no such folder"):
        found.load_adapter(tmp_path / "nowhere", "b")
    with pytest.raises(ModelError, match=r"name: ''; expected what requests shall call the adapter"):
        found.load_adapter(folders["lora"], "")
    with pytest.raises(DataError, match=r"films\.csv: no such file"):
        found.load_adapter(folders["ia3"], "b", items=tmp_path / "films.csv")
    np.testing.assert_array_equal(found.score(HISTORY, CANDIDATES, adapter="b"), before)
    whole = load(folders["full"], tiny_llama_folder)
    with pytest.raises(ModelError, match=r"this recommender is one whole model \(full, or made from parts\)"):
        whole.load_adapter(folders["lora"], "b")


@pytest.mark.parametrize(
    ("setting", "harmless", "message"),
    [
        ("olora", (), "init_lora_weights is 'olora', which changes the base model's weights"),
        ("pissa", (), "init_lora_weights is 'pissa', which changes the base model's weights"),
        # What no list knows is found out.
        ("pissa", ("pissa",), "LORA with these settings changes the base model's weights"),
    ],
)
def test_an_adapter_that_would_change_the_base_is_refused(
    folders: dict[str, Path],
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    harmless: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(adapters, "HARMLESS_STARTS", (*adapters.HARMLESS_STARTS, *harmless))
    found = load(folders["first"], tiny_llama_folder)
    before = found.score(HISTORY, CANDIDATES)
    hostile = tmp_path / "hostile"
    shutil.copytree(folders["lora"], hostile)
    values = json.loads((hostile / "adapter_config.json").read_text())
    (hostile / "adapter_config.json").write_text(json.dumps(values | {"init_lora_weights": setting}))
    with pytest.raises(ModelError, match=message):
        found.load_adapter(hostile, "b", items=FILMS)
    np.testing.assert_array_equal(found.score(HISTORY, CANDIDATES), before)
    assert found._base is not None
    assert backbone.fingerprint(found._base.model) == found._base.base.fingerprint


def test_hot_swap(folders: dict[str, Path], tiny_llama_folder: Path) -> None:
    """While an adapter is exchanged, each answer is one adapter's: its scores, prior and task go together."""
    served = load(folders["first"], tiny_llama_folder)
    swapped = ["lora", "prompt", "pointwise", "prefix"]
    expected = [load(folders[name], tiny_llama_folder).score(HISTORY, CANDIDATES) for name in swapped]
    served.load_adapter(folders["lora"], "b", items=FILMS)
    stop, answers, failures = threading.Event(), [], []

    def ask() -> None:
        try:
            while not stop.is_set():
                answers.append(served.score(HISTORY, CANDIDATES, adapter="b"))
                answers.extend(served.score_many([{"adapter": "b", "history": HISTORY, "candidates": CANDIDATES}] * 2))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            for name in swapped:
                served.load_adapter(folders[name], "b", items=FILMS)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    distance = np.stack([[np.abs(one - other).max() for other in expected] for one in answers])
    assert distance.min(axis=1).max() < 1e-4, "an answer that no adapter gives"
    assert len(set(distance.argmin(axis=1).tolist())) > 1
    np.testing.assert_array_equal(served.score(HISTORY, CANDIDATES, adapter="b"), expected[-1])


# --- another base model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_base(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, trained on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("target", "unit"), [(Target(), "of log-odds"), (STARS, "rating points")])
def test_how_much_another_base_differs(
    tiny_llama_folder: Path, other_base: Path, tmp_path: Path, target: Target, unit: str
) -> None:
    folder = save_adapter(tiny_llama_folder, tmp_path / "a", target=target, probes=PROBES)
    with pytest.warns(UserWarning, match="base model: ") as caught:
        found = load(folder, other_base, strict=False)
    away = np.abs(found.probe_scores() - [0.5, -0.25])
    largest, mean = f"{max(away):.2g} {unit}", f"{sum(away) / 2:.2g}"
    expected = (
        f"its 2 recorded scores (float32) differ from those here (float32) by up to {largest}, {mean} in the mean"
    )
    assert str(caught[0].message).endswith(expected)
    assert caught[0].filename == __file__
    with pytest.raises(ModelError, match=r"fingerprint .*; load that base model, or load without strict"):
        load(folder, other_base)
    served = load(save_adapter(other_base, tmp_path / "b"), other_base)
    with pytest.raises(ModelError, match=r"; load it with a base model of its own, or with strict=False"):
        served.load_adapter(folder, "b", items=FILMS)
    with pytest.warns(UserWarning, match=re.escape(expected)):
        served.load_adapter(folder, "b", items=FILMS, strict=False)


def test_probes_are_asked_only_where_the_base_differs(
    tiny_llama_folder: Path, other_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(loading, "difference_of_scores", lambda adapter: asked.append(adapter) or "far off")
    folder = save_adapter(tiny_llama_folder, tmp_path / "a", probes=PROBES)
    load(folder, tiny_llama_folder).load_adapter(folder, "b", items=FILMS)
    assert asked == []
    with pytest.warns(UserWarning, match="far off"):
        load(folder, other_base, strict=False)
    assert len(asked) == 1


def test_no_probes(folders: dict[str, Path], other_base: Path) -> None:
    with pytest.warns(UserWarning, match="it records no scores to compare with: they may differ from the published"):
        load(folders["lora"], other_base, strict=False)


def test_probes_are_answered_without_the_prior(folders: dict[str, Path], tiny_llama_folder: Path) -> None:
    found = load(folders["first"], tiny_llama_folder)
    about = dataclasses.replace(found.artifact, probes=[Probe([("Heat (1995)", 1)], "Sabrina (1954)", 0.0)])
    artifact.write(folders["first"], about, PRIOR)
    bare = load(folders["first"], tiny_llama_folder, prior=False)
    expected = bare.score(["Heat (1995):yes"], ["Sabrina (1954)"])
    np.testing.assert_allclose(load(folders["first"], tiny_llama_folder).probe_scores(), expected, atol=1e-6)


# --- weights that are not whole ---------------------------------------------------------------------------------------


def changed(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The adapter with other weights."""
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    return copy


def without_the_last(state: dict[str, torch.Tensor]) -> None:
    del state[max(state)]


def with_one_more(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.backdoor"] = torch.zeros(1)


def with_a_longer_one(state: dict[str, torch.Tensor]) -> None:
    name = max(state)
    state[name] = torch.cat((state[name], state[name]))


@pytest.mark.parametrize("name", [*METHODS, *HEADS, "full"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_last, r"1 keys missing or unexpected, e\.g\. "),
        (with_one_more, r"1 keys missing or unexpected, e\.g\. base_model\.model\.backdoor; the file is not whole"),
        (with_a_longer_one, r"fit|do not fit"),
    ],
)
def test_missing_extra_and_misshapen_weights(
    folders: dict[str, Path],
    tiny_llama_folder: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    broken = changed(folders[name], tmp_path / "broken", change)
    with pytest.raises(ModelError, match=message) as caught:
        load(broken, tiny_llama_folder)
    assert "\n" not in str(caught.value)


def test_public_names() -> None:
    assert {"Recommender", "Recommendation", "Request", "Event"} <= set(recommender.__all__)
    assert adapters.is_whole(Path("nowhere")) is False


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_on_serving_runs(
    folders: dict[str, Path], tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[1] / "docs" / "serving.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    pulled: list[Any] = []

    def pull(name: str, revision: str | None = None, **how: Any) -> Path:
        pulled.append((name, revision))
        return folders[{"me/films": "first", "me/film-ratings": "ratings", "me/films-new": "prefix"}[name]]

    monkeypatch.setattr(hub, "pull", pull)
    monkeypatch.chdir(tmp_path)
    (tmp_path / tiny_llama_folder.name).symlink_to(tiny_llama_folder)  # as the adapters name their base model
    FILMS.write_csv("films.csv")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "serving.md", "exec"), names)
    assert pulled[:2] == [("me/films", "v1"), ("me/film-ratings", "v3")]
    assert len(blocks) >= 4
    assert [len(one) for one in names["scores"]] == [2, 1, 1]
    assert list(names["recommender"].adapters) == ["default"]
