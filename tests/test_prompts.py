"""Text becomes tokens piece by piece, and the pieces put together are the tokens of the whole text."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrec.errors import DataError, ModelError
from peftrec.prompts import Codec, Pieces, item_texts

WORDS = st.text(st.sampled_from("abHE 159.,:!?'()&-\n\té本"), max_size=24)


@pytest.fixture(params=["tokenizer", "word_start_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class TestItemTexts:
    items = pl.DataFrame(
        {
            "item_id": ["a", "b"],
            "title": ["Heat", "  Up\n to  you\t"],
            "year": [1995.0, None],
            "genres": [["Crime", "Drama"], []],
        }
    )

    def test_columns_as_a_person_writes_them(self) -> None:
        assert item_texts(self.items, "{title} ({year}) {genres}") == ["Heat (1995) Crime, Drama", "Up to you ()"]

    def test_unknown_column_names_the_nearest(self) -> None:
        with pytest.raises(DataError, match=r"no column 'titel'.*did you mean \{title\}\?"):
            item_texts(self.items, "{titel}")

    def test_unlike_any_column_lists_them(self) -> None:
        with pytest.raises(DataError, match="use one of item_id, title, year, genres"):
            item_texts(self.items, "{zzz}")

    def test_empty_text_names_the_item(self) -> None:
        with pytest.raises(DataError, match=r"item 'b' has no text under prompt.item '\{year\}'"):
            item_texts(self.items, "{year}")


def test_pieces_are_ragged_rows() -> None:
    pieces = Pieces.of([[5, 6], [], [7]])
    assert pieces.flat.tolist() == [5, 6, 7]
    assert pieces.start.tolist() == [0, 2, 2, 3]
    assert pieces.lengths.tolist() == [2, 0, 1]
    assert Pieces.of([]).lengths.tolist() == []


class TestCodec:
    def test_pieces_equal_the_whole_text(self, any_tokenizer: Any, header: str, titles: list[str]) -> None:
        codec = Codec(any_tokenizer, header, [" no", " yes"])
        text, built = header, list(codec.header)
        for code, (title, question) in enumerate(zip(titles, codec.questions(titles, 64), strict=True)):
            built += question + codec.tail(code % 2)
            text += f"{title}:{(' no', ' yes')[code % 2]}\n"
        assert built == [any_tokenizer.bos_token_id, *ids(any_tokenizer, text)]

    @given(texts=st.lists(WORDS.filter(str.strip), min_size=1, max_size=4))
    def test_pieces_equal_the_whole_text_for_any_titles(self, tokenizer: Any, texts: list[str]) -> None:
        folded = item_texts(pl.DataFrame({"item_id": range(len(texts)), "title": texts}), "{title}")
        codec = Codec(tokenizer, "Films", [" no", " yes"])
        built = list(codec.header)
        for question in codec.questions(folded, 1000):
            built += question + codec.tail(1)
        whole = "Films\n" + "".join(f"{text}: yes\n" for text in folded)
        assert built == [tokenizer.bos_token_id, *ids(tokenizer, whole)]

    def test_a_title_that_spells_a_special_token_stays_text(self, tokenizer: Any, header: str) -> None:
        codec = Codec(tokenizer, header, [" no", " yes"])
        (question,) = codec.questions([f"Heat {tokenizer.bos_token}"], max_tokens=64)
        assert tokenizer.bos_token_id not in question
        assert tokenizer.decode(question) == f"Heat {tokenizer.bos_token}:"

    def test_one_line_end_behind_a_header(self, tokenizer: Any) -> None:
        assert Codec(tokenizer, "Films", [" no", " yes"]).header == Codec(tokenizer, "Films\n", [" no", " yes"]).header

    def test_no_header_leaves_the_bos(self, any_tokenizer: Any) -> None:
        assert Codec(any_tokenizer, "", [" no", " yes"]).header == [any_tokenizer.bos_token_id]

    def test_answers_are_one_token(self, any_tokenizer: Any, header: str) -> None:
        codec = Codec(any_tokenizer, header, [" no", " yes"])
        assert [any_tokenizer.decode([token]).strip() for token in codec.answers] == ["no", "yes"]
        assert codec.tail(1) == [codec.answers[1], *codec.line_end]

    def test_answer_of_several_tokens(self, tokenizer: Any, header: str) -> None:
        with pytest.raises(ModelError, match=r"prompt.answers: ' liked very' is \d+ tokens after ':'"):
            Codec(tokenizer, header, [" no", " liked very"])

    def test_answers_of_one_token_between_them(self, tokenizer: Any, header: str) -> None:
        with pytest.raises(ModelError, match="share a token"):
            Codec(tokenizer, header, [" no", " no"])

    def test_header_that_would_merge_with_the_first_line(self, tokenizer: Any) -> None:
        # GPT-2's pattern takes two line ends as one token only where the text ends there.
        if ids(tokenizer, "\n\n") == ids(tokenizer, "\n") * 2:
            tokenizer = type(tokenizer)(tokenizer_object=_merging_line_ends(tokenizer), bos_token="<s>")
        with pytest.raises(ModelError, match=r"prompt.header"):
            Codec(tokenizer, "Films\n\n", [" no", " yes"])

    def test_long_question_keeps_beginning_and_mark(self, any_tokenizer: Any, header: str) -> None:
        codec = Codec(any_tokenizer, header, [" no", " yes"])
        text = "Heat Heat Heat Heat Heat Heat Heat Heat"
        (whole,), (cut,) = codec.questions([text], 64), codec.questions([text], 6)
        assert len(cut) == 6 < len(whole)
        assert cut[:5] == whole[:5]
        assert any_tokenizer.convert_ids_to_tokens(cut[-1:]) == [":"]

    def test_written_titles_are_cut_and_spell_no_special_token(self, any_tokenizer: Any, header: str) -> None:
        codec = Codec(any_tokenizer, header, [" no", " yes"])
        assert codec.written(["Heat <s>", "Heat </s><s>"], 64) == ["Heat < s>", "Heat < /s>< s>"]
        long = "Heat Heat Heat Heat Heat Heat Heat Heat"
        (cut,) = codec.written([long], 6)
        assert long.startswith(cut)
        assert not cut.endswith(" ")
        # The very tokens to which a timeline cuts it.
        assert codec.questions([cut], 64) == codec.questions([long], 6)
        assert codec.written([cut], 6) == [cut]

    @given(text=WORDS.filter(str.strip), most=st.integers(4, 12))
    def test_written_titles_are_the_longest_beginning_that_fits(self, tokenizer: Any, text: str, most: int) -> None:
        codec = Codec(tokenizer, "", [" no", " yes"])
        text = " ".join(text.split())
        (cut,) = codec.written([text], most)
        assert text.startswith(cut)
        (whole,) = codec.questions([cut], 1000)
        assert len(whole) <= most

    def test_the_longest_prompt_that_fits(self, tokenizer: Any, header: str) -> None:
        codec = Codec(tokenizer, header, [" no", " yes"])
        texts = ["".join(f"event {i}\n" for i in range(9 - count, 9)) + "Heat:" for count in range(10)]
        lengths = [len(ids(tokenizer, text)) + 1 for text in texts]
        for most, room, expected in ((9, lengths[9], 9), (9, lengths[9] - 1, 8), (9, lengths[4], 4), (3, 999, 3)):
            found = codec.fitted(texts.__getitem__, most, room)
            assert found == [tokenizer.bos_token_id, *ids(tokenizer, texts[expected])]
        assert codec.fitted(texts.__getitem__, 9, lengths[0]) == codec.prompt("Heat:")
        assert codec.fitted(texts.__getitem__, 9, lengths[0] - 1) is None


def _merging_line_ends(tokenizer: Any) -> Any:
    import json

    from tokenizers import Tokenizer

    made = json.loads(tokenizer.backend_tokenizer.to_str())
    line_end = tokenizer.convert_ids_to_tokens(ids(tokenizer, "\n"))[0]
    made["model"]["vocab"][line_end * 2] = len(made["model"]["vocab"])
    made["model"]["merges"].append([line_end, line_end])
    return Tokenizer.from_str(json.dumps(made))
