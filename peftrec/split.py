"""Which rows train, which choose the checkpoint (valid) and which are reported (test): every row is in exactly one.

Also the table that everything downstream reads: plain arrays, sorted by user and time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from peftrec import config
from peftrec.draws import drawn_order
from peftrec.errors import DataError
from peftrec.interactions import CLICK_SCALE, Interactions, sorted_order

MOST_OF_ONE = 16  # training events of one person, where there are to be few
SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)

# What a column that gives the split may call them, in lower case.
NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "valid": VALID,
    "validation": VALID,
    "val": VALID,
    "dev": VALID,
    "test": TEST,
}


@dataclass(frozen=True)
class Log:
    """All events, sorted by user, then time, then the order of the source.

    Attributes:
        user: Row of `user_ids` (n,), int32.
        item: Row of `items` (n,), int32; -1 for prompt records.
        timestamp: Seconds (n,), int64; row numbers where the source has no times.
        label: Index of the answer (n,), int8: 0 or 1 for clicks, the place in `scale` for ratings.
        rating: The rating behind the label (n,), float32, or None where the source gives labels.
        split: 0 train, 1 valid, 2 test (n,), int8; the names are `SPLITS`.
        user_ids: Original user ids (number of users,).
        items: The items table; `item_id` holds the original ids.
        prompts: `instruction` and `input` (n rows) for prompt records, else None.
        scale: What each label stands for, ascending: 0 and 1 for clicks, the ratings that can be given for ratings.
        liked_from: Lowest label that counts as liked; None where nobody said.
        users: What is known of the users, one row for each of `user_ids`; None where it was not asked for.
        asked: Whether the answer of each event may be reported (n,), bool; None where that of each may. A record's
            history is told, and known of its person alone: it is no answer to find.
        drawn: Whether the events of label 0 are negatives that were drawn (`data.sampled_negatives`).
        key: Hash of all that it was made of, where that is known: see `prepared.load`.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    label: np.ndarray
    rating: np.ndarray | None
    split: np.ndarray
    user_ids: pl.Series
    items: pl.DataFrame
    prompts: pl.DataFrame | None = None
    scale: tuple[float, ...] = CLICK_SCALE
    liked_from: int | None = 1
    users: pl.DataFrame | None = None
    asked: np.ndarray | None = None
    drawn: bool = False
    key: str | None = None

    def __len__(self) -> int:
        return len(self.user)

    def keep(self, mask: np.ndarray) -> Log:
        """The same events where `mask` (n,) is true; users and items keep their codes."""
        return dataclasses.replace(
            self,
            user=self.user[mask],
            item=self.item[mask],
            timestamp=self.timestamp[mask],
            label=self.label[mask],
            rating=None if self.rating is None else self.rating[mask],
            split=self.split[mask],
            prompts=None if self.prompts is None else self.prompts.filter(pl.Series(mask)),
            asked=None if self.asked is None else self.asked[mask],
            key=None,
        )

    def rows(self, part: int) -> np.ndarray:
        """The events of a split (`TRAIN`, `VALID` or `TEST`) whose answers may be reported, indices ascending."""
        return np.flatnonzero(self.split == part if self.asked is None else (self.split == part) & self.asked)

    @cached_property
    def met(self) -> np.ndarray:
        """Whether each event took place, (n,), bool: all but the negatives that were drawn."""
        met: np.ndarray = self.label == 1 if self.drawn else np.ones(len(self), dtype=bool)
        return met

    @property
    def liked(self) -> np.ndarray:
        """Whether each event was liked, (n,), bool."""
        assert self.liked_from is not None, "a recipe that needs to know has been refused by now"
        liked: np.ndarray = self.label >= self.liked_from
        return liked


def split(interactions: Interactions, how: config.Split, seed: int, *, answered: bool = True) -> Log:
    """Sort the events and give each its split.

    A split that the source gives itself (a column, or one file each for train, valid and test) is used whatever `how`
    says. Where the events are not `answered`, labels do not matter and training events are enough.

    Raises:
        DataError: If a split comes out empty, or train or test with one class only; not `answered`, if train does.
    """
    events = interactions.events
    order = sorted_order(events["user"].to_numpy(), events["timestamp"].to_numpy())
    user, time, item = (events[name].to_numpy()[order] for name in ("user", "timestamp", "item"))
    rating = events["rating"].to_numpy()[order] if "rating" in events.columns else None
    liked_from: int | None = 1
    if "label" in events.columns:
        label = events["label"].to_numpy()[order]
    else:
        assert rating is not None
        steps = np.asarray(interactions.scale) - 1e-6  # ratings are float32
        label = (np.searchsorted(steps, rating, side="right") - 1).astype(np.int8)
        liked_from = None if interactions.like_at is None else int(np.searchsorted(steps, interactions.like_at - 2e-6))
        if liked_from in (0, len(steps)):
            low, high = interactions.scale[0], interactions.scale[-1]
            raise DataError(
                f"data.like_at: {interactions.like_at:g}; ratings go from {low:g} to {high:g}, so that "
                f"{'everything' if liked_from == 0 else 'nothing'} would be liked; set it above the lowest rating and "
                "not above the highest"
            )
    kind: str = how.kind
    if "split" in events.columns:
        parts = by_name(events["split"])[order]
        kind = "given"
    elif how.kind == "temporal":
        parts = temporal(time, how.valid, how.test)
    elif how.kind == "leave_last_out":
        parts = leave_last_out(user, time)
    elif how.kind == "kfold":
        parts = kfold(len(user), how.folds, how.fold, how.valid, seed)
        if interactions.drawn:
            parts = parts[click_of(label)]
    elif how.kind == "cold_item":
        if interactions.items.is_empty():
            raise DataError(f"{interactions.name}: prompt records name no items; a cold_item split needs them")
        parts = cold(item, how.valid, how.test, seed, "items")
    elif how.kind == "cold_user":
        parts = cold(user, how.valid, how.test, seed, "users")
    else:
        raise DataError(f"{interactions.name}: no split column was read; set data.split.column")
    # What a validation record tells is as good to choose by as what it asks for; a test record reports its target.
    asked = (parts != TEST) | events["target"].to_numpy()[order] if "target" in events.columns else None
    _check(parts, label if answered else None, interactions.scale, interactions.name, kind)
    records = "instruction" in events.columns
    return Log(
        user=user,
        item=item,
        timestamp=time,
        label=label,
        rating=rating,
        split=parts,
        user_ids=interactions.user_ids,
        items=interactions.items,
        prompts=events.select("instruction", "input")[order] if records else None,
        scale=interactions.scale,
        liked_from=liked_from,
        users=interactions.users,
        asked=asked,
        drawn=interactions.drawn,
    )


def few(log: Log, count: int, seed: int) -> Log:
    """The log with `count` of its training events; the others are as if nobody had recorded them.

    Of clicks beside drawn negatives it is so many clicks, with what was drawn beside them.

    They are the first training events of people drawn by `seed`, of each at most a quarter of `count` and at most 16:
    single events would have no history, and whole people would be one or two. Where all people have given so
    many, each gives the next.

    Raises:
        DataError: there are not so many, or all of them have one label.
    """
    train = np.flatnonzero((log.split == TRAIN) & log.met)
    if count > len(train):
        raise DataError(f"data.train_events: {count}; the data has {len(train)} training events; lower it")
    each = max(1, min(MOST_OF_ONE, count // 4))
    user = log.user[train]
    place = np.arange(len(train)) - np.searchsorted(user, user)  # of the event within its person's
    drawn = np.argsort(drawn_order(len(log.user_ids), seed, "train_events"))
    chosen = train[np.lexsort((place, drawn[user], place // each))[:count]]
    own = click_of(log.label) if log.drawn else np.arange(len(log))
    if not log.drawn and len(np.unique(log.label[chosen])) == 1:
        raise DataError(
            f"data.train_events: the {count} events drawn by seed {seed} all have one label; raise it, or change seed"
        )
    return log.keep((log.split != TRAIN) | np.isin(own, chosen))


def click_of(label: np.ndarray) -> np.ndarray:
    """The row of the click beside which each row was drawn, or its own if it is one, (n,): that is the next click."""
    clicks = np.flatnonzero(label == 1)
    found: np.ndarray = clicks[np.searchsorted(clicks, np.arange(len(label)))]
    return found


def temporal(time: np.ndarray, valid: float, test: float) -> np.ndarray:
    """Cut all events at two moments: train is (-inf, v), valid [v, t), test [t, inf).

    The moments are timestamps of events, at the quantiles that the shares ask for. Events of one timestamp are never
    cut apart: they go to the later side, so that valid and test hold at least their share.

    Args:
        time: Seconds (n,).
        valid: Share of the events in valid.
        test: Share of the events in test.
    """
    n = len(time)
    first_test = min(n - 1, n - round(test * n))
    first_valid = max(0, min(n - 1, n - round((valid + test) * n)))
    ordered = np.partition(time, (first_valid, first_test))
    parts = np.full(n, TRAIN, dtype=np.int8)
    parts[time >= ordered[first_valid]] = VALID
    parts[time >= ordered[first_test]] = TEST
    return parts


def leave_last_out(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Each user's last moment is test, the moment before it valid, all before that train.

    A moment is one timestamp with all of the user's events in it: which of them came last cannot be known. Users with
    fewer than three moments stay in train. Splits are in order for each user, not over all of them.

    Args:
        user: User codes (n,), sorted.
        time: Seconds (n,), sorted within each user.
    """
    starts_user = np.r_[True, user[1:] != user[:-1]]
    moment = np.cumsum(starts_user | np.r_[True, time[1:] != time[:-1]]) - 1
    first = moment[starts_user]
    last = np.r_[first[1:], moment[-1] + 1] - 1
    row_user = np.cumsum(starts_user) - 1
    enough = (last - first >= 2)[row_user]
    parts = np.full(len(user), TRAIN, dtype=np.int8)
    parts[enough & (moment == last[row_user] - 1)] = VALID
    parts[enough & (moment == last[row_user])] = TEST
    return parts


def kfold(n: int, folds: int, fold: int, valid: float, seed: int) -> np.ndarray:
    """Random folds of rows: `fold` is test, and a share `valid` of the rest is valid.

    The folds differ in size by one row at most, and are the same whichever of them is the test. What a model learns
    from may be later than what it is tested on: this is the protocol of much published work, not of a system in use.
    """
    order = drawn_order(n, seed, "kfold")
    parts = np.full(n, TRAIN, dtype=np.int8)
    fold_of = np.arange(n) * folds // n  # by position in the drawn order
    parts[order[fold_of == fold]] = TEST
    rest = order[fold_of != fold]
    parts[rest[drawn_order(len(rest), seed, "kfold valid")[: round(valid * len(rest))]]] = VALID
    return parts


def cold(code: np.ndarray, valid: float, test: float, seed: int, purpose: str) -> np.ndarray:
    """Hold out users or items with all of their events: shares of them, at least one each, are valid and test.

    Args:
        code: User or item code of each event (n,).
        valid: Share of the users or items in valid.
        test: Share of the users or items in test.
        seed: Draws them.
        purpose: `users` or `items`, so that one seed does not draw both alike.
    """
    present = np.unique(code)
    drawn = present[drawn_order(len(present), seed, f"cold {purpose}")]
    tests, valids = (max(1, round(share * len(present))) for share in (test, valid))
    part_of = np.full(int(present[-1]) + 1, TRAIN, dtype=np.int8)
    part_of[drawn[:tests]] = TEST
    part_of[drawn[tests : tests + valids]] = VALID
    return np.take(part_of, code)


def by_name(column: pl.Series) -> np.ndarray:
    """A split that the rows name themselves: train, valid or test, in any case; validation, val and dev are valid.

    Raises:
        DataError: If a row has another name or none.
    """
    names = column.str.strip_chars().str.to_lowercase()
    parts = names.replace_strict(NAMES, default=None, return_dtype=pl.Int8)
    if parts.null_count():
        unknown = column.filter(parts.is_null()).unique().sort()
        shown = ", ".join("nothing" if name is None else repr(name) for name in unknown.head(5))
        raise DataError(
            f"data.split.column: {parts.null_count()} rows have {shown}; expected train, valid or test in every row"
        )
    return parts.to_numpy()


def _check(parts: np.ndarray, label: np.ndarray | None, scale: tuple[float, ...], where: str, kind: str) -> None:
    counts = np.bincount(parts, minlength=3)
    sizes = ", ".join(f"{name} {count}" for name, count in zip(SPLITS, counts, strict=True))
    for part, name in enumerate(SPLITS if label is not None else SPLITS[:1]):
        found = ""
        if counts[part] == 0:
            found = f"{name} is empty"
        # A valid set of one class still has a loss; without both classes there is nothing to learn or to report.
        elif label is not None and part != VALID and len(classes := np.unique(label[parts == part])) == 1:
            what = "label" if scale == CLICK_SCALE else "rating"
            found = f"all {counts[part]} rows of {name} have {what} {scale[classes[0]]:g}"
        if found:
            wanted = "some events" if label is None else "both labels" if scale == CLICK_SCALE else "different ratings"
            raise DataError(f"{where}: {found} after a {kind} split ({sizes}); expected {wanted}: {_ADVICE[kind]}")


_ADVICE = {
    "temporal": "change data.split.valid and data.split.test, or see whether too many rows share a timestamp",
    "leave_last_out": "it needs users with events at three times or more; data.split.kind=temporal does not",
    "kfold": "change data.split.folds or data.split.valid, or bring more rows",
    "cold_user": "change data.split.valid and data.split.test, or bring more users",
    "cold_item": "change data.split.valid and data.split.test, or bring more items",
    "given": "give it rows of both in the source, or let data.split.kind choose",
}
