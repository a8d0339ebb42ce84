"""Training windows in other forms: events hidden from later ones, near events in another order, other words in front.

Every form is drawn by seed, epoch and window alone. So it is the same however many processes share an epoch, and a run
that is resumed draws what it would have drawn. Windows are cut and packed before, once and for all: nothing here makes
one longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftrec.draws import stream

if TYPE_CHECKING:
    from peftrec.config import Recipe

Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Augment:
    """What is drawn anew for each training window in each epoch.

    Attributes:
        seed: of all draws.
        history_dropout: chance of each event to be hidden from all others; its own answer is still asked.
        history_sample: most events of a window that others may see; None is no bound.
        shuffle_within: events at most so many seconds after the first of their group change places; 0 changes nothing.
        wordings: how many wordings there are, the recipe's own among them.
    """

    seed: int
    history_dropout: float = 0.0
    history_sample: int | None = None
    shuffle_within: int = 0
    wordings: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Augment | None:
        """What a recipe asks for; None where that is nothing."""
        train = recipe.train
        asked = cls(
            seed=recipe.seed,
            history_dropout=train.history_dropout,
            history_sample=train.history_sample,
            shuffle_within=train.shuffle_within,
            wordings=1 + len(recipe.prompt.paraphrases),
        )
        return None if asked == cls(recipe.seed) else asked

    def wording(self, epoch: int, window: int) -> int:
        """Which wording the window has in this epoch; 0 is the recipe's own."""
        return int(self._draws("wording", epoch, window).random() * self.wordings)

    def order(self, epoch: int, window: int, seconds: Places, still: int = 0) -> Places:
        """The order in which the window's events (n,) are read.

        Args:
            epoch: from 0.
            window: its number.
            seconds: when the events were, ascending (n,).
            still: so many of the last events keep their places.
        """
        free = max(0, len(seconds) - still)
        place = np.arange(len(seconds), dtype=np.int64)
        if not self.shuffle_within or not free:
            return place
        group, first = np.empty(free, dtype=np.int64), 0
        for index, second in enumerate(seconds[:free].tolist()):
            if second - seconds[first] > self.shuffle_within:
                first = index
            group[index] = first
        drawn = self._draws("order", epoch, window).random(free)
        place[:free] = np.lexsort((drawn, group))
        return place

    def visible(self, epoch: int, window: int, visible: Bools, still: int = 0) -> Bools:
        """Which of the window's events (n,) others may see, at most those that were `visible`; arguments as `order`."""
        free = max(0, len(visible) - still)
        kept = visible.copy()
        if self.history_dropout:
            kept[:free] &= self._draws("dropout", epoch, window).random(free) >= self.history_dropout
        if self.history_sample is not None:
            seen = np.flatnonzero(kept[:free])
            drawn = np.argsort(self._draws("sample", epoch, window).random(len(seen)), kind="stable")
            kept[seen[drawn[self.history_sample :]]] = False
        return kept

    def _draws(self, purpose: str, epoch: int, window: int) -> Any:
        return stream(self.seed, purpose, epoch, window)
