"""An evaluation in shards: independent jobs attack a part of the images each.

A shard writes a :class:`~cure.evaluation.journal.Journal` and nothing else.  Merging runs the
evaluation once more with all of these files in the place of the attacks, so a merged result is made
by the same code as any other.  It is refused unless every image that a part of an attack had to try
was tried in exactly one shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cure.errors import CheckpointError, ConfigError, counted
from cure.evaluation.journal import BatchResult, Identity, Journal


@dataclass(frozen=True)
class Shard:
    """One part of several of the images.

    Attributes:
        number: which one, from 1.
        of: how many there are.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8", the second of eight.

        >>> Shard.parse("2/8")
        Shard(number=2, of=8)

        Raises:
            ConfigError: when it is not of this form, or there is no such shard.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ConfigError(f"shard: expected one such as 2/8, the second of eight, got {text!r}")
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, count: int) -> Tensor:
        """Which of ``count`` images are in it [count], bool: every ``of``-th, so of all classes."""
        return torch.arange(count) % self.of == self.number - 1

    def file(self, output: Path) -> Path:
        """Where its results are until they are merged into ``output``."""
        return output.with_name(f"{output.name}.shard-{self.number}-of-{self.of}")

    def identity(self, whole: Identity) -> Identity:
        """The identity of its file, from that of the evaluation."""
        return whole | {"shard": str(self)}


class MergedShards(Journal):
    """The results of all shards, to be read instead of attacking.

    Args:
        output: the file of the merged result.
        count: the number of shards.
        identity: of the evaluation.

    Raises:
        CheckpointError: when a shard's file is missing, in use, or of another evaluation.
    """

    def __init__(self, output: Path, count: int, identity: Identity) -> None:
        super().__init__()
        shards = [Shard(number, count) for number in range(1, count + 1)]
        missing = [str(shard) for shard in shards if not shard.file(output).is_file()]
        if missing:
            raise CheckpointError(
                f"{shards[0].file(output).parent} lacks shards of {output.name}: "
                f"{', '.join(missing)}; evaluate them with the same command and --shard"
            )
        self._files = [shard.file(output) for shard in shards]
        for shard, file in zip(shards, self._files, strict=True):
            with Journal(file, shard.identity(identity)) as journal:
                self.learn(journal.results())

    def whole(self, attack: str, part: str, targets: list[int]) -> list[BatchResult]:
        """All results of a part of an attack, which are of the images ``targets``.

        Raises:
            CheckpointError: when an image is missing, or was not to be attacked.
        """
        found = [each for each in self.results() if (each.attack, each.part) == (attack, part)]
        attacked = sorted(place for each in found for place in each.attacked)
        if attacked != targets:
            lost, more = set(targets) - set(attacked), set(attacked) - set(targets)
            what, count = ("not attacked", lost) if lost else ("attacked and should not be", more)
            raise CheckpointError(
                f"the shards do not fit together: in {attack} {part}, "
                f"{counted(len(count), 'image')} {what}; repeat the shards that were stopped, all "
                "on the same kind of machine"
            )
        return found

    def remove(self) -> None:
        """The merged result is written."""
        for file in self._files:
            file.unlink(missing_ok=True)
