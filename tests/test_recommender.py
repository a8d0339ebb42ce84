"""The recommender: what it understands, what it scores, and that plain PEFT gives the same figures."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import FILMS, PRIOR

from peftrec import adapters, artifact, backbone, config, encode, scorer
from peftrec.bpmf import BpmfPrior, LogOdds
from peftrec.catalogue import Catalogue, read_history, read_items
from peftrec.errors import DataError, ModelError
from peftrec.prompts import WholeText
from peftrec.recommender import Recommender
from peftrec.target import Target

HEADER = "What this person rated, oldest first, and whether they liked each:\n"


def save_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 3,
    strength: float = 0.3,
    adapter: config.Adapter | None = None,
    target: Target | None = None,
    probes: list[artifact.Probe] | None = None,
    model: dict[str, Any] | None = None,
    **prompt: Any,
) -> Path:
    """A random adapter on the base model in `base`, with everything that a run leaves beside it."""
    import torch

    target = target or Target()
    loaded = backbone.load(config.Model(**{"name": str(base), "dtype": "float32", **(model or {})}), target)
    template = prompt.get("template")
    header = "" if template else HEADER
    codec = encode.task_codec(loaded.tokenizer, target.task, target.scale, header, None, loaded.kind)
    recipe = config.parse_recipe(
        {
            "task": target.task,
            "data": {"name": "ml-100k"},
            "prompt": {"item": "{title} ({year})", "max_tokens": 512, **prompt},
            "model": {"name": str(base), "dtype": "float32"},
            "score": {"head": target.head},
            "output_dir": "x",
        },
        "r",
    )
    attached = scorer.with_head(loaded.model, target.head, codec.answers)
    attached = adapters.attach(attached, adapter or config.Adapter(r=4), base_name="tiny", seed=seed, steps=10)
    torch.manual_seed(seed)
    for parameter in attached.parameters():
        if parameter.requires_grad:  # B is zero at the start: then nothing would be tested
            parameter.data.add_(torch.randn_like(parameter), alpha=strength)
    folder.mkdir(parents=True, exist_ok=True)
    adapters.save(attached, folder)
    loaded.tokenizer.save_pretrained(folder)
    about = artifact.describe(
        recipe,
        codec,
        loaded.base,
        target,
        data_name="films",
        data_sha256="0",
        like_at=4,
        max_item_tokens=32,
        example=([("Heat (1995)", 1)], "Sabrina (1954)"),
        template=codec.completed(template) if isinstance(codec, WholeText) else None,
        probes=probes or (),
    )
    artifact.write(folder, about, None if target.task == "rating" else PRIOR)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_llama_folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def load(adapter: Path, tiny_llama_folder: Path) -> Callable[..., Recommender]:
    def load(**options: Any) -> Recommender:
        return Recommender.from_pretrained(adapter, base_model=tiny_llama_folder, **{"items": FILMS, **options})

    return load


@pytest.fixture(scope="module")
def recommender(load: Callable[..., Recommender]) -> Recommender:
    """Without the prior: the model's own scores."""
    return load(prior=False)


def reshaped(recommender: Recommender, **prompt: Any) -> Recommender:
    """The same model under another prompt."""
    about = dataclasses.replace(recommender.artifact, prompt=dataclasses.replace(recommender.artifact.prompt, **prompt))
    return Recommender(about, recommender.model, recommender.codec.tokenizer, items=recommender.catalogue.items)


# --- what is understood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "labels"),
    [
        (["Heat:yes", "Heat: NO ", "Heat:like", "Heat:dislike"], [1, 0, 1, 0]),
        (["Heat:1", "Heat:0"], [1, 0]),
        (["Heat:1", "Heat:4.5"], [0, 1]),  # one number that is no label makes all of them ratings
        ([("Heat", 1), (10, 0), ("Heat", True), ("Heat", "yes")], [1, 0, 1, 1]),
        ([("Heat", 5), (10, 3)], [1, 0]),
        ([{"title": "Heat", "label": 1}, {"item_id": 10, "rating": 1}, {"item_id": 10, "rating": 4}], [1, 0, 1]),
        (["Star Wars: A New Hope:yes"], [1]),
        (["Heat: good"], [1]),
        ([], []),
    ],
)
def test_answers(history: list[Any], labels: list[int]) -> None:
    assert [label for _, label in read_history(history, 4.0, [" bad", " good"])] == labels


def test_the_last_colon_splits() -> None:
    assert read_history(["Star Wars: A New Hope:yes"], None, [" no", " yes"]) == [("Star Wars: A New Hope", 1)]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (
            ["Toy Story (1995)"],
            r"history\[0\]: 'Toy Story \(1995\)' has no answer behind a colon; expected 'title:yes'",
        ),
        (["Heat:yes", "Star Wars: A New Hope"], r"history\[1\]: .* has no answer behind a colon"),
        ([":yes"], r"history\[0\]: ':yes' has no title before the answer"),
        ([("Heat", "maybe")], r"history\[0\]: \('Heat', 'maybe'\); expected"),
        ([("Heat",)], r"history\[0\]"),
        ([{"title": "Heat"}], r"history\[0\]"),
        (["Heat:nan"], r"history\[0\]"),
        ("Heat:yes", r"expected a list; put it in a list"),
    ],
)
def test_bad_histories(history: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_history(history, 4.0, [" no", " yes"])


def test_a_rating_needs_a_scale() -> None:
    with pytest.raises(DataError, match="rating 5, but the adapter was trained on labels"):
        read_history(["Heat:5"], None, [" no", " yes"])


@pytest.mark.parametrize(
    ("entry", "text", "row"),
    [
        ("Toy Story (1995)", "Toy Story (1995)", 1),
        ("toy  story", "Toy Story (1995)", 1),
        ("Sabrina (1995)", "Sabrina (1995)", 3),
        (11, "Toy Story (1995)", 1),
        (np.int64(11), "Toy Story (1995)", 1),
        ("11", "Toy Story (1995)", 1),
        ("187", "187 (1997)", 4),  # a title before an id
        ({"item_id": 12}, "Sabrina (1954)", 2),
        ({"title": "Sabrina", "year": 1995}, "Sabrina (1995)", 3),
        ({"item_id": 11, "title": "Toy Story 1"}, "Toy Story 1 (1995)", 1),
        ({"title": "toy story (1995)"}, "Toy Story (1995)", 1),  # the table says how a title is written
        ({"title": "Toy Story (1995)", "year": 1995}, "Toy Story (1995)", 1),
        ({"title": "Fargo (1996)", "year": 1996}, "Fargo (1996)", None),
        ({"item_id": 99, "title": "Fargo (1996)", "year": 1996}, "Fargo (1996)", None),
        ({"item_id": 11, "title": "Toy Story (1995)"}, "Toy Story (1995)", 1),
        ("Fargo (1996)", "Fargo (1996)", None),
        ({"title": "Fargo", "year": 1996}, "Fargo (1996)", None),
        ({"title": "Fargo", "year": 1996, "item_id": 99}, "Fargo (1996)", None),
    ],
)
def test_items(entry: Any, text: str, row: int | None) -> None:
    found = Catalogue(FILMS, "{title} ({year})").find(entry, "here")
    assert (found.text, found.row) == (text, row)
    if row is not None:
        assert found.item_id == FILMS["item_id"][row]


def test_a_title_of_another_encoding_is_named() -> None:
    catalogue = Catalogue(FILMS, "{title}")
    for entry in ("caf\udce9", {"title": "caf\udce9"}, {"title": "caf", "year": "caf\udce9"}):
        with pytest.raises(
            DataError, match=r"^here: 'caf\\udce9' is not UTF-8; expected a title or an item id in UTF-8$"
        ):
            catalogue.find(entry, "here")


def test_titles_that_carry_their_year() -> None:
    films = pl.DataFrame({"item_id": ["a", "b"], "title": ["Heat (1995)", "Babe (1995)"]})
    catalogue = Catalogue(films, "{title}")
    assert [catalogue.find(entry, "here").row for entry in ("Babe", "babe (1995)", "b")] == [1, 1, 1]


def test_an_ambiguous_title_is_said() -> None:
    with pytest.warns(UserWarning, match=r"'Sabrina' may be 'Sabrina \(1954\)' or 'Sabrina \(1995\)'; the first"):
        assert Catalogue(FILMS, "{title}").find("Sabrina", "here").row == 2


def test_one_text_is_not_ambiguous_where_ids_do_not_matter() -> None:
    assert Catalogue(FILMS, "{title}", ids_matter=False).find("Sabrina", "here").text == "Sabrina"
    with pytest.warns(UserWarning, match="may be"):
        Catalogue(FILMS, "{title} ({year})", ids_matter=False).find("Sabrina", "here")


def test_unknown_ids() -> None:
    with pytest.raises(
        DataError, match=r"here: no item id 15 in the items table of 5 items; nearest are 14 187, 13 Sabrina"
    ):
        Catalogue(FILMS, "{title}").find(15, "here")
    with pytest.raises(DataError, match="here: no item id '99999'"):
        Catalogue(FILMS, "{title}").find("99999", "here")
    with pytest.raises(DataError, match="item id 10, but there is no items table"):
        Catalogue(None, "{title}").find(10, "here")
    assert Catalogue(None, "{title}").find({"item_id": 10, "title": "Heat"}, "here").item_id == 10


@pytest.mark.parametrize("entry", [None, 1.5, True, ["Heat"], {"year": 1995}, "  "])
def test_no_item(entry: Any) -> None:
    with pytest.raises(DataError, match="here: "):
        Catalogue(FILMS, "{title}").find(entry, "here")


def test_items_from_files_and_frames(tmp_path: Path) -> None:
    path = tmp_path / "films.csv"
    FILMS.rename({"item_id": "movieId"}).write_csv(path)
    read = read_items(path, {"item_id": "movieId"})
    assert read["title"].to_list() == FILMS["title"].to_list()
    headed = FILMS.with_columns(headline=pl.col("title").str.to_uppercase())
    assert read_items(headed, {"title": "headline"})["title"].to_list()[:2] == ["HEAT", "TOY STORY"]
    assert "headline" not in read_items(headed, {"title": "headline"}).columns
    with pytest.raises(DataError, match=r"no column 'item_id'.*columns.item_id=movieId"):
        read_items(path)
    with pytest.raises(DataError, match="items: int; expected the path of a table"):
        read_items(3)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"item_id": [1, 2], "title": ["Heat", ""]})
    assert read_items(frame)["title"].to_list() == ["Heat"]


# --- what is scored ---------------------------------------------------------------------------------------------------

titles_of = st.lists(st.sampled_from(["Heat (1995)", "Toy Story (1995)", "Fargo (1996)", "Babe", "187 (1997)"]))
few_examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few_examples
@given(
    history=st.lists(st.tuples(st.sampled_from(["Heat (1995)", "Babe", "Fargo (1996)"]), st.booleans()), max_size=30),
    candidates=titles_of.filter(bool),
    order=st.randoms(use_true_random=False),
)
def test_a_score_depends_on_no_other_candidate(
    recommender: Recommender, history: list[Any], candidates: list[str], order: Any
) -> None:
    together = recommender.score(history, candidates)
    alone = [recommender.score(history, [one])[0] for one in candidates]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    shuffled = list(range(len(candidates)))
    order.shuffle(shuffled)
    again = recommender.score(history, [candidates[i] for i in shuffled])
    np.testing.assert_allclose(again, together[shuffled], atol=1e-4)


@few_examples
@given(
    history=st.lists(
        st.tuples(st.sampled_from(["Heat (1995)", "Babe", "Fargo (1996)"]), st.integers(0, 1)), max_size=9
    ),
    candidates=titles_of.filter(bool),
)
def test_timeline_equals_one_prompt_per_pair(
    recommender: Recommender, history: list[tuple[str, int]], candidates: list[str]
) -> None:
    template = HEADER.replace("{", "{{") + "{history}{item}:"
    single = reshaped(recommender, layout="pointwise", template=template)
    np.testing.assert_allclose(recommender.score(history, candidates), single.score(history, candidates), atol=1e-4)


@pytest.mark.parametrize("max_tokens", [64, 90, 512])
def test_a_template_reads_in_service_as_in_training(
    recommender: Recommender, make_random_log: Callable[..., Any], titles: list[str], max_tokens: int
) -> None:
    template = "Films:\n{history}And {item}? Answer:"
    log = make_random_log(2, users=2, events=8, moments=30)
    log = dataclasses.replace(log, items=log.items.with_columns(title=pl.Series([*titles[:-1], "Film <s> 12 " * 20])))
    prompt = config.Prompt(layout="pointwise", template=template, max_tokens=max_tokens)
    encoder = encode.Encoder(log, prompt, recommender.codec.tokenizer, "order")
    rows = np.flatnonzero(log.split == 2)
    data = encoder.evaluate(rows, "streaming", None)
    asked, outputs = scorer.score_rows(recommender.model, data, range(len(data)))
    expected = dict(zip(asked.tolist(), outputs[:, 1] - outputs[:, 0], strict=True))
    about = dataclasses.replace(
        recommender.artifact.prompt,
        layout="pointwise",
        template=template,
        item="{title}",
        header="",
        max_tokens=max_tokens,
        max_item_tokens=encoder.max_item_tokens,
    )
    single = Recommender(
        dataclasses.replace(recommender.artifact, prompt=about),
        recommender.model,
        recommender.codec.tokenizer,
        items=log.items,
    )
    for row in rows.tolist():
        past = [i for i in range(row) if log.user[i] == log.user[row]]
        history = [({"item_id": f"i{log.item[i]}"}, int(log.label[i])) for i in past]
        (score,) = single.score(history, [{"item_id": f"i{log.item[row]}"}])
        assert score == pytest.approx(expected[row], abs=1e-4)


PLAIN_PEFT = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter, base = sys.argv[1:3]
about = json.load(open(f"{adapter}/peftrec.json"))
prompt = about["prompt"]
assert load_file(f"{adapter}/adapter_model.safetensors")
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
for history, candidate in json.load(sys.stdin):
    lines = [f"{text}:{prompt['answers'][answer]}{prompt['line_end']}" for text, answer in history]
    text = (prompt["bos"] or "") + prompt["header"] + "".join(lines) + candidate + ":"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        no, yes = model(ids).logits[0, -1, prompt["answer_ids"]].tolist()
    print(yes - no)
assert not any(name.split(".")[0] == "peftrec" for name in sys.modules)
"""


def plain_scores(folder: Path, base: Path, questions: list[Any]) -> list[float]:
    """Scores by PEFT and transformers alone, in a process that never imports peftrec."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, str(folder), str(base)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(line) for line in done.stdout.splitlines()]


HISTORY = [("Heat (1995)", 1), ("Toy Story (1995)", 0), ("Fargo (1996)", 1)]
CANDIDATES = ["Sabrina (1954)", "What's Up, Doc? (1972)", "Heat (1995)"]


def test_plain_peft_gives_the_same_scores(recommender: Recommender, adapter: Path, tiny_llama_folder: Path) -> None:
    questions = [[history, one] for history in (HISTORY, []) for one in CANDIDATES]
    ours = [*recommender.score(HISTORY, CANDIDATES), *recommender.score([], CANDIDATES)]
    np.testing.assert_allclose(plain_scores(adapter, tiny_llama_folder, questions), ours, atol=1e-4)
    assert np.std(ours) > 0.01, "scores that are all equal prove nothing"


def test_plain_peft_gives_the_same_scores_on_the_real_model(tmp_path: Path) -> None:
    from peftrec import assets

    base = assets.cache_folder() / "models"
    backbone.load(config.Model(name="smollm2-135m-instruct", dtype="float32"))
    (base,) = (path for path in base.glob("smollm2-135m-instruct*") if path.is_dir())
    folder = save_adapter(base, tmp_path / "adapter", strength=0.02)
    ours = Recommender.from_pretrained(folder, base_model=base, items=FILMS, prior=False)
    expected = plain_scores(folder, base, [[HISTORY, one] for one in CANDIDATES])
    np.testing.assert_allclose(ours.score(HISTORY, CANDIDATES), expected, atol=1e-3)


def test_the_prior_is_added_and_knows_what_the_prompt_leaves_out(
    load: Callable[..., Recommender], recommender: Recommender
) -> None:
    history = ["Heat (1995):no", "Toy Story (1995):yes", "Fargo (1996):yes"]
    with_prior = load().score(history, ["Sabrina (1954)", "Unheard Of"])
    expected = PRIOR.scores([10, 11, "?"], [0, 1, 1], [12, "?"])
    np.testing.assert_allclose(with_prior - recommender.score(history, ["Sabrina (1954)", "Unheard Of"]), expected)
    liked = reshaped(recommender, history="liked")
    liked.adapters["default"].prior = PRIOR
    np.testing.assert_allclose(
        liked.score(history, [12]), recommender.score(history[1:], [12]) + expected[:1], atol=1e-5
    )


def test_a_prior_of_bayesian_factors_is_added(load: Callable[..., Recommender], recommender: Recommender) -> None:
    items = {"10": (0.5, 1.0, 0.1, 0.2), "11": (-0.5, 0.5, 0.3, 0.0), "12": (0.0, 2.0, -0.1, 1.0)}
    bayes = BpmfPrior(0.5, 0.5, (2.0,), items, (0.0, 1.0), LogOdds(4.0, 0.2, -2.0, PRIOR))
    with_prior = load()
    with_prior.adapters["default"].prior = bayes
    history = ["Heat (1995):no", "Toy Story (1995):yes", "Fargo (1996):yes"]
    added = with_prior.score(history, ["Sabrina (1954)", "Unheard Of"]) - recommender.score(
        history, ["Sabrina (1954)", "Unheard Of"]
    )
    np.testing.assert_allclose(added, bayes.scores([10, 11, "?"], [0, 1, 1], [12, "?"]), atol=1e-5)


def test_the_oldest_events_are_left_out(recommender: Recommender) -> None:
    long = ["Heat (1995):yes", "Toy Story (1995):no"] * 50 + ["Fargo (1996):yes", "Heat (1995):no"]
    short = reshaped(recommender, max_tokens=170)
    tail = [*short.codec.questions(["Heat (1995)", "Fargo (1996)"], 32)]
    assert all(len(ids) < 32 for ids in tail)
    scores = short.score(long, CANDIDATES)
    assert np.isfinite(scores).all()
    # With the whole history every newer suffix that fits gives the same as the cut one: find which was kept.
    kept = [
        n
        for n in range(len(long))
        if np.allclose(recommender.score(long[-n:] if n else [], CANDIDATES), scores, atol=1e-4)
    ]
    assert kept
    assert 0 < kept[0] < len(long)
    two = reshaped(recommender, layout="pointwise", max_history=2)
    np.testing.assert_allclose(two.score(long, CANDIDATES), recommender.score(long[-2:], CANDIDATES), atol=1e-4)


def test_no_room_for_any_history_still_scores(recommender: Recommender) -> None:
    tight = reshaped(recommender, max_tokens=len(recommender.codec.header) + 40)
    np.testing.assert_allclose(
        tight.score(["Heat (1995):yes"] * 9, CANDIDATES), recommender.score([], CANDIDATES), atol=1e-4
    )


def test_no_candidates(recommender: Recommender) -> None:
    assert recommender.score(["Heat:yes"], []).shape == (0,)
    assert recommender.rank(["Heat:yes"], []) == []


def test_rank(recommender: Recommender) -> None:
    scores = recommender.score(["Heat (1995):yes"], FILMS["item_id"].to_list())
    best = recommender.rank(["Heat (1995):yes"], k=3)
    order = [i for i in np.argsort(-scores) if i != 0][:3]
    assert [one.item_id for one in best] == [FILMS["item_id"][int(i)] for i in order]
    assert best[0].item == FILMS.row(int(order[0]), named=True)
    assert best[0].score == pytest.approx(scores[order[0]], abs=1e-4)
    assert best[0].probability == pytest.approx(1 / (1 + math.exp(-best[0].score)))
    everything = recommender.rank(["Heat (1995):yes"], k=99, exclude_seen=False)
    assert len(everything) == 5
    given_ones = recommender.rank(["Heat (1995):yes"], ["Fargo (1996)", "heat", 11])
    assert {one.item for one in given_ones} == {"Fargo (1996)", 11}
    np.testing.assert_allclose(recommender.probability([], [10]), 1 / (1 + np.exp(-recommender.score([], [10]))))


def test_ranking_needs_something_to_rank(load: Callable[..., Recommender], recommender: Recommender) -> None:
    with pytest.raises(DataError, match="candidates: none given, and there is no items table"):
        load(items=None).rank([])
    for k, shown in ((0, "0"), ("3", "'3'"), (1.5, "1.5")):
        with pytest.raises(DataError, match=f"k: {shown}; expected a whole number from 1"):
            recommender.rank([], k=k)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected a list; put it in a list"):
        recommender.score([], "Heat")


def test_ready_made_prompts(recommender: Recommender) -> None:
    own = reshaped(recommender, layout="pointwise", template="{instruction}\n{input}\nAnswer:")
    records = [{"instruction": "Like it?", "input": title} for title in ("Heat", "Babe")]
    assert own.score([], records).shape == (2,)
    assert {one.item["input"] for one in own.rank([], records)} == {"Heat", "Babe"}
    with pytest.raises(DataError, match=r"candidates\[0\]: 'Heat'; expected a dict with instruction, input"):
        own.score([], ["Heat"])
    with pytest.raises(DataError, match="history: this adapter was trained on ready-made prompts"):
        own.score(["Heat:yes"], records)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_base_model_is_said_or_refused(adapter: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"base model: .* fingerprint \w{16}; the adapter was trained on .* with \w{16}"
    ):
        Recommender.from_pretrained(adapter, base_model=tmp_path)
    with pytest.raises(ModelError, match="fingerprint"):
        Recommender.from_pretrained(adapter, base_model=tmp_path, strict=True)


def test_another_tokenizer_is_refused(recommender: Recommender) -> None:
    with pytest.raises(ModelError, match=r"tokenizer: answers \[' no', ' yes'\] are the tokens"):
        reshaped(recommender, answer_ids=[1, 2])


def test_a_prompt_longer_than_the_model_is_refused(recommender: Recommender) -> None:
    with pytest.raises(ModelError, match=r"prompt.max_tokens: 2049; this .* takes up to 2048 tokens"):
        reshaped(recommender, max_tokens=2049)


def test_only_the_caller_lets_a_model_run_its_own_code(
    load: Callable[..., Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], backbone.load

    def noted(model: config.Model, *target: Any, **how: Any) -> backbone.Backbone:
        asked.append(model.trust_remote_code)
        return real(dataclasses.replace(model, trust_remote_code=False), *target, **how)

    monkeypatch.setattr(backbone, "load", noted)
    load()
    load(trust_remote_code=True)
    assert asked == [False, True]


@pytest.mark.parametrize("text", ["a: [", "unrelated: true", "- 1", "model: {name: .}"])
def test_an_unrelated_config_beside_an_adapter(
    adapter: Path, tiny_llama_folder: Path, tmp_path: Path, text: str
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ModelError, match="base_model=FOLDER"):
        Recommender.from_pretrained(tmp_path / "adapter")
    assert Recommender.from_pretrained(tmp_path / "adapter", base_model=tiny_llama_folder).score([], ["Heat"]).size


def test_a_base_model_that_is_nowhere(adapter: Path, load: Callable[..., Recommender]) -> None:
    with pytest.raises(ModelError, match="base_model=FOLDER"):
        Recommender.from_pretrained(adapter)
    with pytest.raises(ModelError, match="dtype: 'int8'; expected one of"):
        load(dtype="int8")
