"""Detect a network that does not do better than guessing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cure.utils.stats import balanced_guessing


@dataclass(frozen=True)
class Guessing:
    """How far guessing reaches on some images.

    Attributes:
        counts: images of each class.
        balanced: whether balanced accuracy counts; always naming the largest class guesses, too.
    """

    counts: Sequence[int]
    balanced: bool

    @property
    def limit(self) -> float:
        """Accuracy, in percent, that guessing exceeds in about one of forty cases.

        >>> Guessing([50, 50], balanced=False).limit
        60.0
        """
        if self.balanced:
            return balanced_guessing(self.counts)
        chance = 1 / len(self.counts)
        return 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / sum(self.counts)))

    def natural(self, accuracies: Mapping[str, float | None]) -> float:
        """The natural accuracy, in percent, that is compared with it."""
        found = accuracies["natural_balanced" if self.balanced else "natural"]
        assert found is not None, "balanced accuracy is measured where it counts"
        return found

    def learnt(self, natural: float) -> bool:
        """Whether it is a fifth of the way from guessing to 100 %, which chance does not reach."""
        return natural > self.limit + 0.2 * (100 - self.limit)


class CollapseDetector:
    """Tells when a network that had learnt falls back to guessing, from its validations.

    Args:
        guessing: on the validation images.
        patience: so many validations in a row at chance are too many.
    """

    def __init__(self, guessing: Guessing, patience: int) -> None:
        self.guessing, self.patience = guessing, patience
        self.learnt = False
        """Whether a validation was clearly above guessing."""
        self.learnt_at_start = False
        self.at_chance = 0
        """Validations in a row that were not above guessing."""

    def start(self, validation: Mapping[str, float]) -> None:
        """Take the validation before the first step."""
        self.learnt_at_start = self.guessing.learnt(self.guessing.natural(validation))

    def add(self, validation: Mapping[str, float]) -> None:
        """Take the next validation."""
        natural = self.guessing.natural(validation)
        self.learnt |= self.guessing.learnt(natural)
        self.at_chance = self.at_chance + 1 if natural <= self.guessing.limit else 0

    @property
    def fallen(self) -> bool:
        """Whether it had learnt and is at chance."""
        return self.learnt and self.at_chance > 0

    @property
    def warns(self) -> bool:
        """Whether the last validation is the first at chance of a network that had learnt."""
        return (self.fallen or self.learnt_at_start) and self.at_chance == 1

    @property
    def lasting(self) -> bool:
        """Whether it was at chance too often in a row."""
        return self.at_chance >= self.patience

    def state(self) -> dict[str, bool | int]:
        """What a resumed run needs."""
        return {
            "risen": self.learnt,
            "at_chance": self.at_chance,
            "good_start": self.learnt_at_start,
        }

    def restore(self, state: Mapping[str, bool | int]) -> None:
        """Go on from :meth:`state`; of an earlier version it does not tell of the start."""
        self.learnt, self.at_chance = bool(state["risen"]), int(state["at_chance"])
        self.learnt_at_start = bool(state.get("good_start", False))
