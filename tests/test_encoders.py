"""Encoders and encoder-decoder models: pairs of texts, padded to the longest, one score whoever asks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from peftrec import Recommender, adapters, artifact, backbone, config, encode, heads, record, reload, scorer
from peftrec import train as training
from peftrec.errors import ConfigError, DataError, ModelError
from peftrec.packing import alike
from peftrec.prompts import PAIR, WholeText
from peftrec.split import Log
from peftrec.target import Target
from peftrec.timeline import LEAST_ROOM, TextWindows, collate

ROOT = Path(__file__).parents[1]
WORDS = ["heat", "toy", "story", "up", "doc", "film", "person", "rated", "oldest", "first", "whether", "they", "liked"]
WORDS += ["each", "yes", "no", "from", "to"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789'?,:;().<>[]/")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "vocab_size": 160,
    "max_position_embeddings": 130,
}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


# --- tiny models ------------------------------------------------------------------------------------------------------


def word_pieces() -> Any:
    """BERT's tokenizer: whole words, else letters; `[CLS] a [SEP] b [SEP]` with token types 0 and 1."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    every = dict.fromkeys([*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS])
    return BertTokenizer(vocab={word: place for place, word in enumerate(every)})


def words_with(template: str, pair: str, special: dict[str, int], **names: str) -> Any:
    """A tokenizer of whole words and letters that puts `special` tokens around texts as the templates say."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    every = dict.fromkeys([*special, "<unk>", *(f"▁{w}" for w in [*WORDS, *LETTERS]), *LETTERS, "▁"])
    pieces = [(piece, 0.0 if piece in special else -1.0 - len(piece) * 0.01) for piece in every]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=len(special), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=pair, special_tokens=list(special.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_input_names=["input_ids", "attention_mask"], **names
    )


def like_roberta() -> Any:
    return words_with(
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
        {"<s>": 0, "<pad>": 1, "</s>": 2},
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        pad_token="<pad>",
    )


def like_t5() -> Any:
    return words_with("$A </s>", "$A </s> $B </s>", {"<pad>": 0, "</s>": 1}, eos_token="</s>", pad_token="<pad>")


def shape_of(name: str) -> tuple[Any, Any, Any]:
    """Class to save, its config, and its tokenizer."""
    import transformers as t

    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    narrow = {"vocab_size": 160, "initializer_range": 0.3, "max_position_embeddings": 130}
    return {
        "bert": lambda: (t.BertModel, t.BertConfig(**SMALL), word_pieces()),
        # It guesses masked words: there is no pooler in its checkpoint.
        "bert-without-pooler": lambda: (t.BertForMaskedLM, t.BertConfig(**SMALL), word_pieces()),
        "electra": lambda: (t.ElectraModel, t.ElectraConfig(**SMALL, embedding_size=16), word_pieces()),
        "roberta": lambda: (t.RobertaModel, t.RobertaConfig(**SMALL, **special), like_roberta()),
        "xlm-roberta": lambda: (t.XLMRobertaModel, t.XLMRobertaConfig(**SMALL, **special), like_roberta()),
        "camembert": lambda: (t.CamembertModel, t.CamembertConfig(**SMALL, **special), like_roberta()),
        "albert": lambda: (t.AlbertModel, t.AlbertConfig(**SMALL, embedding_size=16, pad_token_id=0), word_pieces()),
        "distilbert": lambda: (
            t.DistilBertModel,
            t.DistilBertConfig(**narrow, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
            like_roberta(),
        ),
        "modernbert": lambda: (
            t.ModernBertModel,
            t.ModernBertConfig(**SMALL, pad_token_id=1, local_attention=8, global_attn_every_n_layers=2),
            like_roberta(),
        ),
        "t5": lambda: (
            t.T5ForConditionalGeneration,
            t.T5Config(
                vocab_size=160,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                pad_token_id=0,
                decoder_start_token_id=0,
            ),
            like_t5(),
        ),
        "bart": lambda: (
            t.BartForConditionalGeneration,
            t.BartConfig(
                vocab_size=160,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=130,
                init_std=0.3,
                decoder_start_token_id=2,
                **special,
            ),
            like_roberta(),
        ),
    }[name]()


ENCODERS = ("bert", "bert-without-pooler", "electra", "roberta", "xlm-roberta", "camembert")
ENCODERS += ("albert", "distilbert", "modernbert")
SEQ2SEQ = ("t5", "bart")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of that family, with its tokenizer."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            kind, shape, tokenizer = shape_of(name)
            torch.manual_seed(1)
            model = kind(shape).float()
            for part in model.modules():  # some families ignore initializer_range
                if isinstance(part, torch.nn.Linear):
                    torch.nn.init.normal_(part.weight, std=0.3)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return folder


def load(folder: Path, head: Any, outputs: int, **options: Any) -> backbone.Backbone:
    target = Target(head=head, offset=(0.0,) * outputs)
    return backbone.load(config.Model(name=str(folder), **{"dtype": "float32", **options}), target)


def stir(model: Any, seed: int = 3) -> None:
    """Move everything that trains away from its start, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def encoder_for(log: Log, loaded: backbone.Backbone, **prompt: Any) -> encode.Encoder:
    wanted = config.Prompt(layout="pointwise", **{"max_tokens": 120, **prompt})
    return encode.Encoder(log, wanted, loaded.tokenizer, "isolate", kind=loaded.kind)


def outputs_of(model: Any, data: Any) -> np.ndarray:
    rows, outputs = scorer.score_rows(model, data, range(len(data)))
    assert len(set(rows.tolist())) == len(rows)
    return outputs[np.argsort(rows)]


# --- which kind of model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "encoder") for name in ENCODERS), *((name, "seq2seq") for name in SEQ2SEQ)]
)
def test_kind_by_config(name: str, kind: str) -> None:
    assert heads.kind_of(shape_of(name)[1]) == kind


def test_kind_of_causal_models() -> None:
    import transformers as t

    for shape in (t.LlamaConfig(), t.GPT2Config(), t.Qwen2Config(), t.MistralConfig(), t.BertConfig(is_decoder=True)):
        assert heads.kind_of(shape) == "causal"


class TestCheck:
    """What the base model's config.json rules out; there are no weights beside it."""

    def check(self, tmp_path: Path, name: str, **sections: Any) -> list[str]:
        shape_of(name)[1].save_pretrained(tmp_path)
        values = {
            "data": {"name": "ml-100k"},
            "model": {"name": str(tmp_path)},
            "prompt": {"layout": "pointwise"},
            "score": {"head": "classifier"},
            "output_dir": "x",
            **sections,
        }
        recipe = config.parse_recipe(values, "r")
        try:
            backbone.check(recipe)
        except ConfigError as error:
            return [line.replace(str(tmp_path), name) for line in str(error).splitlines()]
        return []

    def test_what_goes(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, "bert") == []
        assert self.check(tmp_path, "t5", score={"head": "tokens"}) == []

    def test_all_mistakes_at_once(self, tmp_path: Path) -> None:
        found = self.check(
            tmp_path, "bert", prompt={}, score={}, adapter={"method": "prefix"}, eval={"base_model": False}
        )
        assert found == [
            "prompt.layout: timeline; bert is an encoder, whose tokens see those behind them; set pointwise",
            "score.head: tokens; bert is an encoder, which has no next token; expected a causal language model, not an "
            "encoder; or set classifier or linear",
            "adapter.method: prefix; bert is an encoder, and virtual tokens are for causal models; set another method",
        ]

    def test_decoders_answer_in_words(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, "bart") == [
            "score.head: classifier; bart is an encoder-decoder model, which answers in words; set tokens"
        ]

    def test_a_head_has_to_be_trained(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"score.head: classifier; such a head has to be trained; set it to"):
            self.check(tmp_path, "bert", adapter={"method": "none"})


def test_loading_refuses_too(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"score.head: tokens; .* is an encoder, which has no next token"):
        backbone.load(config.Model(name=str(folder_of("bert"))))
    with pytest.raises(ModelError, match=r"score.head: linear; .* answers in words; set tokens"):
        load(folder_of("t5"), "linear", 1)


def test_code_that_an_architecture_does_not_have(tmp_path: Path) -> None:
    import transformers as t

    t.MPNetModel(t.MPNetConfig(**SMALL)).save_pretrained(tmp_path)
    like_roberta().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model.attn_implementation: sdpa; .* has no such code; set it to eager"):
        load(tmp_path, "classifier", 2)
    assert load(tmp_path, "classifier", 2, attn_implementation="eager").kind == "encoder"


# --- pairs of texts ---------------------------------------------------------------------------------------------------


class TestWholeText:
    def codec(self, tokenizer: Any, kind: Any, **options: Any) -> WholeText:
        return WholeText(tokenizer, **{"header": "They rated:\n", "answers": ["no", "yes"], **options}, kind=kind)

    def test_a_pair_is_what_the_tokenizer_makes_of_two_texts(self) -> None:
        tokenizer = word_pieces()
        codec = self.codec(tokenizer, "encoder")
        whole = tokenizer("they rated: heat: yes;", "toy story")
        ids = codec.prompt(f"they rated: heat: yes; {PAIR}toy story")
        assert ids == whole["input_ids"]
        assert codec.types(ids) == whole["token_type_ids"]
        assert sorted(set(whole["token_type_ids"])) == [0, 1]

    def test_one_text_for_a_decoder(self) -> None:
        tokenizer = like_t5()
        codec = self.codec(tokenizer, "seq2seq")
        assert codec.prompt("heat: yes; toy story:") == tokenizer("heat: yes; toy story:")["input_ids"]
        assert codec.answers == [tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("no", "yes")]
        assert codec.types(codec.prompt("heat")) is None

    def test_the_template_in_effect(self) -> None:
        pair, one = self.codec(word_pieces(), "encoder", header="A {b}:"), self.codec(like_t5(), "seq2seq")
        assert pair.completed(None) == "A {{b}}: {history}\t{item}"
        assert one.completed(None) == "They rated: {history}{item}:"
        assert pair.completed("Saw {history} and {item}?") == "Saw {history} and \t{item}?"
        assert pair.completed("Saw {history}\tand {item}?") == "Saw {history}\tand {item}?"
        assert pair.completed("{instruction}\n{input}") == "{instruction}\n\t{input}"
        assert one.completed("Saw {history} and {item}?") == "Saw {history} and {item}?"
        with pytest.raises(DataError, match=r"prompt.template: .* the second begins with {item}; put something before"):
            pair.completed("{item}, after {history}")

    def test_no_text_ends_the_first_of_a_pair(self) -> None:
        codec = self.codec(word_pieces(), "encoder")
        assert codec.plain(f"heat{PAIR}toy [SEP] story") == "heat toy [ SEP] story"

    def test_a_decoder_answers_in_one_token(self) -> None:
        with pytest.raises(
            ModelError, match=r"prompt.answers: 'never' is 5 tokens in this tokenizer; one was expected"
        ):
            self.codec(like_t5(), "seq2seq", answers=["never", "yes"])
        with pytest.raises(ModelError, match=r"share a token"):
            self.codec(like_t5(), "seq2seq", answers=["yes", " yes"])
        assert self.codec(word_pieces(), "encoder", answers=["never ever", "yes"]).answers == []

    def test_token_types_of_another_kind_are_refused(self) -> None:
        from tokenizers import processors

        tokenizer = word_pieces()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP]:1 $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        with pytest.raises(ModelError, match="token types do not change"):
            self.codec(tokenizer, "encoder")

    def test_ratings_are_written_as_they_are(self) -> None:
        halves = tuple(k / 2 for k in range(1, 11))
        codec = encode.task_codec(word_pieces(), "rating", halves, kind="encoder")
        assert [answer.strip() for answer in codec.answer_texts] == [f"{value:g}" for value in halves]
        assert codec.header_text == "What this person rated, from 0.5 to 5: "


class TestPrompts:
    def texts(self, encoder: encode.Encoder, rows: list[int]) -> list[str]:
        data = encoder.evaluate(np.asarray(rows), "streaming", None)
        windows: Any = data.windows
        found = {}
        for index in range(len(windows)):
            arrays = windows.arrays(index)
            assert arrays["row"][0] >= 0
            assert (arrays["row"][1:] == -1).all()
            assert arrays["position_ids"].tolist() == list(range(len(arrays["row"])))
            found[int(arrays["row"][0])] = encoder.codec.tokenizer.decode(arrays["input_ids"])
        return [found[row] for row in rows]

    def test_history_and_item(self, make_log: Callable[..., Log], folder_of: Callable[[str], Path]) -> None:
        log = make_log([0, 0, 0, 0], [1, 2, 2, 3], [1, 0, 1, 0], item=[0, 2, 3, 1], split=[0, 0, 0, 2])
        bert = load(folder_of("bert"), "classifier", 2)
        found = self.texts(encoder_for(log, bert), [0, 1, 3])
        squeezed = [text.replace(" ", "") for text in found]
        start = "[CLS]whatthispersonrated,oldestfirst,andwhethertheylikedeach:"
        assert squeezed == [
            f"{start}[SEP]heat(1972)[SEP]",
            f"{start}heat(1972):yes;[SEP]toystory(1972)[SEP]",
            f"{start}heat(1972):yes;toystory(1972):no;toystory(1995):yes;[SEP]heat(1995)[SEP]",
        ]
        shown = self.texts(encoder_for(log, bert, history="liked", max_history=1, template="Saw {history} {item}"), [3])
        assert shown[0].replace(" ", "") == "[CLS]sawtoystory(1995):yes;[SEP]heat(1995)[SEP]"

    @given(seed=st.integers(0, 999), max_tokens=st.sampled_from([40, 60, 110]), name=st.sampled_from(["bert", "t5"]))
    def test_the_oldest_events_go_first(
        self,
        make_random_log: Callable[..., Log],
        folder_of: Callable[[str], Path],
        seed: int,
        max_tokens: int,
        name: str,
    ) -> None:
        log = make_random_log(seed, moments=40)
        base: Any = backbone.Backbone(None, shape_of(name)[2], None, heads.kind_of(shape_of(name)[1]))  # type: ignore[arg-type]
        encoder = encoder_for(log, base, max_tokens=max_tokens, header="They rated:")
        rows = np.flatnonzero(log.split > 0)
        data = encoder.evaluate(rows, "streaming", None)
        windows: Any = data.windows
        asked = []
        for index in range(len(windows)):
            ids, row = windows.arrays(index)["input_ids"].tolist(), int(windows.arrays(index)["row"][0])
            past = [i for i in range(row) if log.user[i] == log.user[row] and log.timestamp[i] < log.timestamp[row]]

            def newest(count: int, past: list[int] = past, row: int = row) -> list[int]:
                lines = [f"{encoder.texts[log.item[i]]}:{(' no', ' yes')[log.label[i]]}; " for i in past]
                text = (encoder.template or "").format(
                    history="".join(lines[len(lines) - count :]), item=encoder.texts[log.item[row]]
                )
                return encoder.codec.prompt(text)

            (kept,) = (count for count in range(len(past) + 1) if newest(count) == ids)
            assert len(ids) <= max_tokens
            # The candidate is reckoned as a line, with its colon and an answer.
            assert kept == len(past) or len(newest(kept + 1)) >= max_tokens - encoder.codec.tail_length
            asked.append(row)
        assert sorted(asked) == rows.tolist()


# --- rows -------------------------------------------------------------------------------------------------------------


class TestAlike:
    def test_by_hand(self) -> None:
        # 10 and 9 would be 20 wide, padded; 4, 4 and 3 are 12 in all.
        assert [row.tolist() for row in alike([3, 10, 4, 9, 4], 12)] == [[1], [3], [2, 4, 0]]
        assert len(alike([], 12)) == 0

    @given(st.lists(st.integers(1, 40)), st.integers(10, 200))
    def test_every_prompt_once_and_rows_that_fit(self, lengths: list[int], room: int) -> None:
        rows = alike(lengths, room)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        for row in rows:
            assert len(row) == 1 or len(row) * max(lengths[index] for index in row) <= room

    def test_a_row_is_not_small_because_prompts_are(
        self, make_random_log: Callable[..., Log], folder_of: Callable[[str], Path]
    ) -> None:
        data = encoder_for(make_random_log(2), load(folder_of("bert"), "linear", 1)).train(None)
        assert isinstance(data.windows, TextWindows)
        assert max(len(data[index]["row"]) for index in range(len(data))) > LEAST_ROOM / 2


def test_prompts_of_by_hand() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2]])
    mask = scorer.sight_mask({"segment": segment}, torch.float32)
    prompt, place = heads.prompts_of(mask)
    assert prompt.tolist() == [[0, 0, 1, 1, 1, 2], [3, 4, 4, 5, 5, 5]]
    assert place.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]]


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(("head", "outputs"), [("linear", 1), ("classifier", 2), ("classifier", 5)])
def test_rows_of_several_pairs_equal_each_alone(
    make_random_log: Callable[..., Log], folder_of: Callable[[str], Path], name: str, head: Any, outputs: int
) -> None:
    """Together in a row, batched, and as transformers itself reads the pair."""
    log = make_random_log(5)
    loaded = load(folder_of(name), head, outputs)
    model = loaded.model
    assert isinstance(model, heads.OnePromptEach)
    stir(model)
    rows = np.flatnonzero(log.split > 0)
    encoder = encoder_for(log, loaded)
    data = encoder.evaluate(rows, "streaming", None)
    packed = outputs_of(model, data)
    assert packed.shape == (len(rows), outputs)
    assert packed.std() > 0.1
    assert any(len(row) > 2 for row in data.rows)

    batch = collate([data[index] for index in range(len(data))])
    assert (batch["segment"] < 0).sum() > 130  # more than a prompt could be
    with torch.inference_mode():
        batched = scorer.read_outputs(model, batch, torch.float32)
    order = np.argsort(batch["row"][batch["labels"] >= 0].numpy())
    np.testing.assert_allclose(batched.numpy()[order], packed, **CLOSE)

    windows: Any = data.windows
    for index in range(len(windows)):
        arrays = windows.arrays(index)
        text = {"input_ids": torch.tensor(arrays["input_ids"])[None]}
        if "token_type_ids" in arrays:
            text["token_type_ids"] = torch.tensor(arrays["token_type_ids"])[None]
            assert arrays["token_type_ids"].max() == 1
        with torch.inference_mode():
            alone = model(**text, attention_mask=torch.ones_like(text["input_ids"])).logits[0]
        np.testing.assert_allclose(alone.numpy(), packed[np.searchsorted(rows, arrays["row"][0])], **CLOSE)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_the_answer_is_the_decoders_first_step(
    make_random_log: Callable[..., Log], folder_of: Callable[[str], Path], name: str
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    log = make_random_log(6)
    loaded = load(folder_of(name), "tokens", 2)
    encoder = encoder_for(log, loaded)
    answers = encoder.codec.answers
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    if name == "bart":
        bias = torch.linspace(-3, 3, 160)[None]
        plain.final_logits_bias.copy_(bias)
        loaded.model.final_logits_bias.copy_(bias)
    model = scorer.with_head(loaded.model, "tokens", answers)
    rows = np.flatnonzero(log.split > 0)
    data = encoder.evaluate(rows, "streaming", None)
    found = outputs_of(model, data)
    assert found.shape == (len(rows), 2)
    windows: Any = data.windows
    for index in range(len(windows)):
        arrays = windows.arrays(index)
        start = torch.tensor([[plain.config.decoder_start_token_id]])
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor(arrays["input_ids"])[None], decoder_input_ids=start).logits[0, 0]
        np.testing.assert_allclose(
            logits[answers].numpy(), found[np.searchsorted(rows, arrays["row"][0])], atol=1e-4, rtol=1e-5
        )


# --- trained, saved and loaded ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 people's ratings of 20 films; how good a film is can be read off its title."""
    folder = tmp_path_factory.mktemp("tables")
    random = np.random.default_rng(5)
    user = np.repeat(np.arange(30), 14)
    film = np.concatenate([random.permutation(20)[:14] for _ in range(30)])
    stars = np.clip(np.round(3 + (film % 2 * 2 - 1) * 1.2 + random.normal(size=len(user)) * 0.7), 1, 5).astype(int)
    table = {"user_id": user, "item_id": film, "rating": stars, "timestamp": 1_000_000 + np.arange(len(user)) % 14 * 60}
    pl.DataFrame(table).write_csv(folder / "ratings.csv")
    titles = [f"{('doc', 'story')[k % 2]} {k}" for k in range(20)]
    pl.DataFrame({"item_id": np.arange(20), "title": titles}).write_csv(folder / "films.csv")
    return folder


RUNS: dict[str, dict[str, Any]] = {
    "bert": {"task": "click", "score": "{head: classifier, prior: bias}"},
    "bert-without-pooler": {"task": "rating", "score": "{head: linear}"},
    "distilbert": {"task": "rating", "score": "{head: classifier, loss: squared_error}"},
    "t5": {"task": "click", "score": "{head: tokens}"},
    "bart": {"task": "rating", "score": "{head: tokens, prior: bias}"},
}


@pytest.fixture(scope="module")
def run_of(
    tables: Path, folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a run of the recipe, by name in `RUNS`."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name in made:
            return made[name]
        how, made[name] = RUNS[name], tmp_path_factory.mktemp("runs") / name
        like = "like_at: 4, " if how["task"] == "click" else ""
        path = tables / f"{name}.yaml"
        path.write_text(
            f"""
task: {how["task"]}
data: {{interactions: {tables}/ratings.csv, items: {tables}/films.csv, {like}split: {{kind: temporal, valid: 0.1}}}}
prompt: {{layout: pointwise, max_tokens: 60, header: "They rated:"}}
model: {{name: {folder_of(name)}, dtype: float32}}
adapter: {{method: lora, r: 4, lora_alpha: 8}}
score: {how["score"]}
train: {{max_steps: 20, evals: 1, learning_rate: 3.0e-3, gradient_accumulation_steps: 1, logging_steps: 1}}
eval: {{bootstrap: 20, recommend_k: 3}}
output_dir: {made[name]}
"""
        )
        done = subprocess.run(
            [sys.executable, ROOT / "recipes/finetune.py", "--config", path],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return made[name]

    return run


@pytest.mark.parametrize("name", ["bert-without-pooler", "roberta", "distilbert", *SEQ2SEQ])
def test_the_loss_falls_and_the_base_stays(
    make_random_log: Callable[..., Log], folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    log = make_random_log(3)
    log = dataclasses.replace(log, label=(log.item < 2).astype(np.int8))  # who asks for Heat likes it
    head, outputs = ("tokens", 2) if name in SEQ2SEQ else ("classifier", 2)
    target = Target(head=head, offset=(0.0,) * outputs)  # type: ignore[arg-type]
    loaded = load(folder_of(name), head, outputs)
    encoder = encoder_for(log, loaded, max_tokens=60, header="They rated:")
    model = scorer.with_head(loaded.model, head, encoder.codec.answers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attached = adapters.attach(model, config.Adapter(r=4), base_name="tiny", seed=1)
    data, valid = encoder.train(None), encoder.evaluate(np.flatnonzero(log.split == 1), "streaming", None)
    fitted = training.fit(
        attached,
        data,
        valid,
        target,
        lambda rows, outputs: {"loss": target.mean_loss(outputs, None, log.label[rows])},
        train=config.Train(max_steps=160, evals=1, learning_rate=5e-3, gradient_accumulation_steps=1, logging_steps=1),
        folder=tmp_path / "checkpoints",
        seed=1,
    )
    losses = [line["loss"] for line in fitted.log if "loss" in line]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    if head == "classifier":
        assert losses[0] == pytest.approx(np.log(2))  # training starts from the prior
    after = {
        key.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", ""): value
        for key, value in attached.state_dict().items()
        if "lora_" not in key and "modules_to_save" not in key
    }
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize("name", RUNS)
def test_a_served_adapter_scores_as_in_training(run_of: Callable[[str], Path], tables: Path, name: str) -> None:
    run = run_of(name)
    recorded = artifact.read(run / "adapter").recorded
    assert len(recorded) == 8
    assert reload.scores(run / "adapter") == pytest.approx(recorded, abs=1e-5)
    recommender = Recommender.from_pretrained(run / "adapter", items=tables / "films.csv", prior=False)
    events = pl.read_csv(tables / "ratings.csv").sort("user_id", "timestamp")
    history: list[Any] = []
    for row in record.read_predictions(run).filter(pl.col("split") == "test").head(6).iter_rows(named=True):
        mine = events.filter(pl.col("user_id") == row["user_id"])
        (now,) = mine.filter(pl.col("item_id") == row["item_id"])["timestamp"]
        past = mine.filter(pl.col("timestamp") < now).select("item_id", "rating")
        history = [{"item_id": item, "rating": stars} for item, stars in past.iter_rows()]
        assert len(history) > 5
        (score,) = recommender.score(history, [row["item_id"]])
        assert score == pytest.approx(row.get("score_no_prior", row["score"]), abs=1e-4)
    assert len(recommender.rank(history, k=3)) == 3


PLAIN = """
import json, sys
import torch, transformers
from peft import PeftModel
transformers.logging.set_verbosity_error()
base, folder = sys.argv[1:]
about = json.load(open(folder + "/peftrec.json"))
prompt, target = about["prompt"], about["target"]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

def texts(probe):
    lines = "".join(f"{text}:{prompt['answers'][label]}{prompt['line_end']}" for text, label in probe["history"])
    return [one.strip() for one in prompt["template"].format(history=lines, item=probe["candidate"]).split("\\t")]

if prompt["kind"] == "encoder":
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(target["offset"]), dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, folder).eval()
    ask = transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer, function_to_apply="none", top_k=None
    )
    found = []
    for probe in about["probes"]:
        text, pair = texts(probe)
        labels = {one["label"]: one["score"] for one in ask({"text": text, "text_pair": pair})}
        found.append([labels[name] for name in sorted(labels)])
else:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.inference_mode():
        found = [
            model(**tokenizer(*texts(probe), return_tensors="pt"), decoder_input_ids=start)
            .logits[0, 0, prompt["answer_ids"]].tolist()
            for probe in about["probes"]
        ]
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", RUNS)
def test_transformers_and_peft_alone_give_the_same_scores(
    run_of: Callable[[str], Path], folder_of: Callable[[str], Path], name: str
) -> None:
    """The text-classification pipeline, or the decoder's first step, in a process that knows nothing of peftrec."""
    folder = run_of(name) / "adapter"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, folder_of(name), folder], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outputs = np.asarray(json.loads(done.stdout.splitlines()[-1]), dtype=np.float32)
    about = artifact.read(folder)
    how = about.target
    target = Target(about.task, how.head, how.loss, tuple(how.scale), tuple(how.offset), how.slope, how.centre)
    assert outputs.shape == (8, target.outputs)
    assert outputs.std(axis=0).max() > 1e-3  # ten times what they may be off
    np.testing.assert_allclose(target.measure(outputs)[0], [probe.score for probe in about.probes], atol=1e-4)


def test_an_untrained_head_is_no_baseline(run_of: Callable[[str], Path]) -> None:
    assert "base_model" in record.read_record(run_of("t5")).baselines
    assert "base_model" not in record.read_record(run_of("bert")).baselines


def test_what_the_checkpoint_lacked_is_saved(run_of: Callable[[str], Path]) -> None:
    saved = load_file(run_of("bert-without-pooler") / "adapter/adapter_model.safetensors")
    prefix = "base_model.model."
    head = {f"{prefix}classifier.weight", f"{prefix}classifier.bias"}
    assert {name for name in saved if "lora_" not in name} == {
        *head,
        f"{prefix}bert.pooler.dense.weight",
        f"{prefix}bert.pooler.dense.bias",
    }
    saved = load_file(run_of("bert") / "adapter/adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == head
    config_of = json.loads((run_of("bert") / "adapter/adapter_config.json").read_text())
    assert config_of["task_type"] == "SEQ_CLS"
    assert json.loads((run_of("t5") / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_another_kind_of_base_model_is_refused(
    run_of: Callable[[str], Path], folder_of: Callable[[str], Path], tiny_llama_folder: Path
) -> None:
    with pytest.raises(ModelError, match=r"is of the kind causal; the adapter was trained on one of the kind encoder"):
        Recommender.from_pretrained(run_of("bert") / "adapter", base_model=tiny_llama_folder)
    with pytest.raises(ModelError, match=r"score.head: tokens; .* is an encoder"):
        Recommender.from_pretrained(run_of("t5") / "adapter", base_model=folder_of("bert"))
