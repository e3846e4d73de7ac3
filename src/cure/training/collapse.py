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
    def chance(self) -> float:
        """Accuracy, in percent, of guessing evenly or of naming the largest class.

        >>> Guessing([40, 60], balanced=False).chance, Guessing([40, 60], balanced=True).chance
        (60.0, 50.0)
        """
        even = 100 / len(self.counts)
        return even if self.balanced else max(even, 100 * max(self.counts) / sum(self.counts))

    @property
    def limit(self) -> float:
        """Accuracy, in percent, that guessing exceeds in about one of forty cases.

        >>> Guessing([50, 50], balanced=False).limit
        60.0
        """
        if self.balanced:
            return balanced_guessing(self.counts)
        even = 1 / len(self.counts)
        return max(self.chance, 100 * (even + 2 * math.sqrt(even * (1 - even) / sum(self.counts))))

    @property
    def _tenth(self) -> float:
        """A tenth of the way from chance to 100 %."""
        return self.chance + 0.1 * (100 - self.chance)

    @property
    def tells(self) -> bool:
        """Whether there are enough images for guessing to stay near chance.

        >>> Guessing([4, 3, 3], balanced=False).tells, Guessing([90, 80, 80], balanced=False).tells
        (False, True)
        """
        return self.limit <= self._tenth

    def explains(self, natural: float) -> bool:
        """Whether a natural accuracy is no better than guessing.

        Of few images guessing may get many right, so only what is near chance counts there.

        >>> Guessing([4, 3, 3], balanced=False).explains(60)
        False
        """
        return natural <= min(self.limit, self._tenth)

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
        self.at_chance = self.at_chance + 1 if self.guessing.explains(natural) else 0

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
        """Whether it was at chance too often in a row.

        A network that has not learnt yet is given up only where the images can tell.
        """
        known = self.learnt or self.learnt_at_start or self.guessing.tells
        return known and self.at_chance >= self.patience

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
