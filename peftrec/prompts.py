"""Text: an event becomes one line, and a line becomes token ids.

A timeline reads

    <bos>{header}
    {item text}: yes
    {item text}: no
    {item text}:            <- read position: the last token before the answer

Every item is tokenized once, whatever the number of events, and events are put together from those pieces. That
equals tokenizing the whole text at once because each piece begins after a line break and each answer after a colon;
`Codec` checks it when it is made, and refuses a tokenizer for which it is not so.

Encoders and encoder-decoder models read a text as a whole, with their own special tokens around it: `WholeText`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peftrec.errors import DataError, ModelError

if TYPE_CHECKING:
    import polars as pl

Kind = Literal["causal", "encoder", "seq2seq"]
"""Kinds of base model: each token sees those before it; all see all; or the latter with a decoder that answers."""

LINE_END = "\n"
ANSWER_MARK = ":"
PAIR = "\t"
"""Stands between the two texts that an encoder reads as a pair."""


def item_texts(items: pl.DataFrame, template: str) -> list[str]:
    """Text of each item by `template`, whose placeholders are columns of `items`.

    White space is folded to single blanks, because a line break ends an event.

    Raises:
        DataError: a placeholder names no column, or an item's text comes out empty.
    """
    texts = _row_texts(items, template, "prompt.item", "items table")
    for i, text in enumerate(texts):
        if not text:
            raise DataError(
                f"items table: item {items['item_id'][i]!r} has no text under prompt.item {template!r}; "
                "give it one or drop the item"
            )
    return texts


def user_texts(users: pl.DataFrame, template: str) -> list[str]:
    """Text of each user by `template`, as in `item_texts`; empty where nothing that it shows is known.

    Raises:
        DataError: a placeholder names no column.
    """
    texts = _row_texts(users, template, "prompt.user", "users table")
    nothing = template.format(
        **dict.fromkeys((name for _, name, _, _ in string.Formatter().parse(template) if name), "")
    )
    return ["" if text == " ".join(nothing.split()) else text for text in texts]


def with_user(template: str, user: str) -> str:
    """A prompt's template with a person's text in place of `{user}`."""
    return template.replace("{user}", user.replace("{", "{{").replace("}", "}}"))


def _row_texts(rows: pl.DataFrame, template: str, key: str, table: str) -> list[str]:
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    for name in fields:
        if name not in rows.columns:
            near = get_close_matches(name, rows.columns, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else f"use one of {', '.join(rows.columns)}"
            raise DataError(f"{key}: no column '{name}' in the {table} ({', '.join(rows.columns)}); {hint}")
    columns = {name: rows[name].to_list() for name in fields}
    return [
        " ".join(template.format(**{name: plain_value(columns[name][i]) for name in fields}).split())
        for i in range(rows.height)
    ]


def plain_value(value: Any) -> str:
    """A table's value as a person would write it: no null and no NaN, no `.0` behind a year, lists with commas."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


@dataclass(frozen=True)
class Pieces:
    """Ragged token ids, or other whole numbers: piece `i` is `flat[start[i]:start[i + 1]]`."""

    flat: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        piece: np.ndarray = self.flat[self.start[index] : self.start[index + 1]]
        return piece

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, (number of pieces,)."""
        return np.diff(self.start)

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]]) -> Pieces:
        """Lay lists of token ids end to end."""
        start = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in ids], out=start[1:])
        flat = np.fromiter((token for piece in ids for token in piece), dtype=np.int64, count=int(start[-1]))
        return cls(flat, start)


def _special_tokens(tokenizer: Any) -> list[str]:
    """What the tokenizer takes for one special token wherever a text spells it, the longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token))


class Texts:
    """Whole texts as a tokenizer writes them, cut where they are too long.

    Args:
        tokenizer: a transformers tokenizer.
    """

    line_end_text = LINE_END

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of `{text}:` for each text."""
        return [len(self._plain_ids(text + ANSWER_MARK)) for text in texts]

    def plain(self, text: str) -> str:
        """`text` with a blank in whatever spells a special token: in a template's prompt it then stays text.

        The template itself may hold special tokens, such as the marks of a chat.
        """
        for special in self._special:
            text = text.replace(special, f"{special[:1]} {special[1:]}")
        return text

    def written(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Item texts as a template's prompt writes them: `plain`, and `{text}:` not longer than `max_tokens`."""
        plain = [self.plain(text) for text in texts]
        return [
            text if length <= max_tokens else self._shortened(text, max_tokens)
            for text, length in zip(plain, self.question_lengths(plain), strict=True)
        ]

    def _shortened(self, text: str, max_tokens: int) -> str:
        def beginning(characters: int) -> str:
            return text[:characters].rstrip()

        def fits(characters: int) -> bool:
            return self.question_lengths([beginning(characters)])[0] <= max_tokens

        return beginning(_most(fits, len(text)))

    def prompt(self, text: str) -> list[int]:
        """A whole prompt as token ids, in which `text` may spell special tokens."""
        bos = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        return bos + self._plain_ids(text)

    def fitted(self, text: Callable[[int], str], most: int, max_tokens: int) -> list[int] | None:
        """The longest prompt that fits.

        Args:
            text: the prompt with that many of the newest events, or of a text's last characters.
            most: at most so many.
            max_tokens: tokens of the prompt at most.

        Returns:
            Token ids, or None where the prompt is too long even with 0 of them.
        """
        ids = self.prompt(text(most))
        if len(ids) <= max_tokens:
            return ids
        ids = self.prompt(text(_most(lambda count: len(self.prompt(text(count))) <= max_tokens, most)))
        return ids if len(ids) <= max_tokens else None


class Codec(Texts):
    """A prompt as token ids: header, line end, one token for each answer, and the items' pieces on demand.

    Args:
        tokenizer: a transformers tokenizer.
        header: text before the first event; a line end is added if it has none.
        answers: answer texts by class, each of which must be one token after the colon.

    Raises:
        ModelError: an answer is not one token, or the tokenizer merges across line ends.
    """

    def __init__(self, tokenizer: Any, header: str, answers: Sequence[str]) -> None:
        super().__init__(tokenizer)
        self.header_text = header if not header or header.endswith(LINE_END) else header + LINE_END
        self.header: list[int] = self.prompt(self.header_text)
        self._mark = self._plain_ids("a" + ANSWER_MARK)[-1:]
        self.answer_texts = list(answers)
        self.line_end: list[int] = self._after("a" + ANSWER_MARK + answers[0], [LINE_END])[0]
        self.answers: list[int] = [self._answer_id(answer) for answer in answers]
        if len(set(self.answers)) != len(self.answers):
            raise ModelError(f"prompt.answers: {list(answers)} share a token in this tokenizer; choose distinct words")
        self._check(answers)

    def _after(self, before: str, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text where it stands behind `before`.

        Tokenizers that mark word starts (SentencePiece) would put a blank in front of a text that stands alone. A title
        that spells a special token stays text: only the recipe's header or template may hold special tokens.
        """
        prefix = self._plain_ids(before)
        joined = [before + text for text in texts]
        whole = self.tokenizer(joined, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text, ids in zip(texts, whole, strict=True):
            if list(ids[: len(prefix)]) != prefix:
                raise ModelError(
                    f"tokenizer: {before + text!r} does not begin with the tokens of {before!r}; an event's tokens "
                    "would depend on its neighbour; use another prompt or base model"
                )
        return [list(ids[len(prefix) :]) for ids in whole]

    def _answer_id(self, answer: str) -> int:
        (ids,) = self._after("a" + ANSWER_MARK, [answer])
        if len(ids) != 1:
            raise ModelError(
                f"prompt.answers: {answer!r} is {len(ids)} tokens after '{ANSWER_MARK}' in this tokenizer; one was "
                "expected; choose a shorter word (most often with a blank in front)"
            )
        return int(ids[0])

    def _check(self, answers: Sequence[str]) -> None:
        """A header and two lines in one text must be the same tokens as put together from pieces."""
        first, second = self.questions(["Heat (1995)", "What's Up, Doc?"], max_tokens=64)
        built = [*first, self.answers[0], *self.line_end, *second, self.answers[-1], *self.line_end]
        text = f"Heat (1995):{answers[0]}{LINE_END}What's Up, Doc?:{answers[-1]}{LINE_END}"
        (whole,) = self._after(LINE_END, [text])
        if built != whole:
            raise ModelError(
                "tokenizer: lines tokenized one by one differ from the same lines in one text; "
                "use layout: pointwise with a template, or another base model"
            )
        if self.header_text and self._plain_ids(self.header_text + text) != self._plain_ids(self.header_text) + built:
            raise ModelError(
                f"prompt.header: the tokens at the end of {self.header_text[-20:]!r} change with the next line; "
                "expected a header that ends in one line break; remove blank lines and blanks at its end"
            )

    def questions(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of `{text}:` for each text, the text cut so that none is longer than `max_tokens`."""
        ids = self._after(LINE_END, [text + ANSWER_MARK for text in texts])
        mark = self._mark
        return [piece if len(piece) <= max_tokens else [*piece[: max_tokens - len(mark)], *mark] for piece in ids]

    def question_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of `{text}:` at the beginning of a line, for each text."""
        return [len(ids) for ids in self._after(LINE_END, [text + ANSWER_MARK for text in texts])]

    def tail(self, answer: int) -> list[int]:
        """What follows a read position once the answer is known: the answer token and the line end."""
        return [self.answers[answer], *self.line_end]

    @property
    def tail_length(self) -> int:
        """Tokens of a tail."""
        return 1 + len(self.line_end)


class WholeText(Texts):
    """A prompt for a model that reads whole texts: an encoder a pair, an encoder-decoder model one.

    Lines end in a semicolon, since most of their tokenizers drop line breaks. In a prompt as text a tab stands between
    the two texts of a pair.

    Args:
        tokenizer: a transformers tokenizer.
        header: text before the first event.
        answers: answer texts by class; an encoder-decoder model's must be one token each.
        kind: of the model.

    Raises:
        ModelError: an answer is not one token, or the tokenizer marks pairs in a way of its own.
    """

    line_end_text = "; "

    def __init__(self, tokenizer: Any, header: str, answers: Sequence[str], *, kind: Kind) -> None:
        super().__init__(tokenizer)
        self.kind = kind
        self.header_text = f"{header.strip()} " if header.strip() else ""
        self.header: list[int] = []  # it is part of the template
        self.answer_texts = list(answers)
        self.answers: list[int] = [] if kind == "encoder" else [self._answer_id(answer) for answer in answers]
        if len(set(self.answers)) != len(self.answers):
            raise ModelError(f"prompt.answers: {list(answers)} share a token in this tokenizer; choose distinct words")
        question = "a" + ANSWER_MARK
        between = [len(self._plain_ids(question + answer + self.line_end_text + question)) for answer in answers]
        self.tail_length = max(between) - 2 * len(self._plain_ids(question))
        self._has_types = kind == "encoder" and "token_type_ids" in tokenizer.model_input_names
        if self._has_types:
            pair = tokenizer("a", "b")
            if self.types(pair["input_ids"]) != list(pair["token_type_ids"]):
                raise ModelError(
                    "tokenizer: its token types do not change from 0 to 1 behind the first separator; use another "
                    "encoder"
                )

    def _answer_id(self, answer: str) -> int:
        ids = self._plain_ids(answer)
        if len(ids) != 1:
            raise ModelError(
                f"prompt.answers: {answer!r} is {len(ids)} tokens in this tokenizer; one was expected; choose a "
                "shorter word"
            )
        return ids[0]

    def completed(self, template: str | None) -> str:
        """The template in effect: the recipe's or, without one, header, history and item; of a pair with a tab.

        Where a recipe's template has no tab, the second text begins with the item (of prompt records, the input).

        Raises:
            DataError: nothing stands before the item.
        """
        pair = self.kind == "encoder"
        if template is None:
            header = self.header_text.replace("{", "{{").replace("}", "}}")
            return header + "{history}" + (f"{PAIR}{{item}}" if pair else f"{{item}}{ANSWER_MARK}")
        if not pair or PAIR in template:
            return template
        name = "{item}" if "{item}" in template else "{input}"
        first, found, rest = template.partition(name)
        if not first.strip() or not found:
            raise DataError(
                f"prompt.template: {template!r}; an encoder reads two texts, and the second begins with {name}; put "
                "something before it, or a tab between the two"
            )
        return f"{first}{PAIR}{found}{rest}"

    def plain(self, text: str) -> str:
        """As in `Texts`; nor does it end the first text of a pair."""
        return super().plain(text).replace(PAIR, " ")

    def prompt(self, text: str) -> list[int]:
        """A whole prompt as token ids, the tokenizer's special tokens included."""
        texts = text.split(PAIR, 1) if self.kind == "encoder" else [text]
        return list(self.tokenizer(*(one.strip() for one in texts))["input_ids"])

    def questions(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of `{text}:` for each text, at most `max_tokens`: how much room each takes."""
        return [self._plain_ids(text + ANSWER_MARK)[:max_tokens] for text in texts]

    def types(self, ids: Sequence[int]) -> list[int] | None:
        """Token types of a prompt: 0 up to the first separator, 1 behind it; None where the model has none."""
        if not self._has_types:
            return None
        first = list(ids).index(self.tokenizer.sep_token_id) + 1
        return [0] * first + [1] * (len(ids) - first)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number below `most`, which is too large, that fits; 0 where none does."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
