"""The batches that an evaluation has finished, kept on disk until all are.

A line of JSON a batch and part of an attack, after a first line that identifies the evaluation: one
that was killed or ran out of time continues where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from cure.errors import CheckpointError

JOURNAL_FORMAT = "cure-evaluation-partial-1"
SUFFIX = ".partial"

Identity = dict[str, Any]
"""What must be equal for one evaluation to continue another."""


@dataclass(frozen=True)
class BatchResult:
    """What one part of an attack did to one batch.

    Attributes:
        attack: its name.
        part: name of the part.
        batch: number of the batch, from 0.
        attacked: positions of its images in the set.
        fooled: those of them that are misclassified now.
        furthest: longest change, in the threat's norm.
        seconds: time it took.
        forward: images that passed forward through the network.
        backward: images for which a gradient came back.
        distances: of an attack that looks for the smallest change: its length for each attacked
            image, None where it found none.
    """

    attack: str
    part: str
    batch: int
    attacked: list[int]
    fooled: list[int]
    furthest: float
    seconds: float
    forward: int = 0
    backward: int = 0
    distances: list[float | None] | None = None


class Journal:
    """The results of the batches of one evaluation; only in memory without a path.

    Args:
        path: the file to continue or to make; None for none.
        identity: JSON values that all results depend on.

    Raises:
        CheckpointError: when the file belongs to another evaluation or is damaged, another process
            writes it, or it cannot be written.
    """

    def __init__(self, path: Path | None = None, identity: Identity | None = None) -> None:
        self.path = path
        self._results: dict[tuple[str, str, int], BatchResult] = {}
        self._file = None
        self._made = False
        if path is None:
            return
        try:
            # Never emptied when opened: it may hold hours of work.
            self._file = path.open("a+b")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror}); choose another output file or make "
                "its folder writable"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise CheckpointError(
                f"{path} is being written by another evaluation; wait for it or stop it"
            ) from None
        try:
            self._read(identity or {})
        except BaseException:
            self._file.close()
            raise

    def _read(self, identity: Identity) -> None:
        assert self._file is not None
        self._file.seek(0)
        whole = self._file.read()
        # A line that was being written when the process was killed has no end.
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            self._file.truncate(len(kept))
        if not kept:
            self._made = True
            self._append({"format": JOURNAL_FORMAT, "identity": identity})
            return
        try:
            first, *rest = [json.loads(line) for line in kept.splitlines()]
            stored = dict(first["identity"]) if first["format"] == JOURNAL_FORMAT else None
            results = [BatchResult(**line) for line in rest]
        except (ValueError, KeyError, TypeError):
            stored = None
        if stored is None:
            raise CheckpointError(
                f"{self.path} is no unfinished evaluation or is damaged; delete it or name another "
                "output file"
            )
        # As JSON gives it back: tuples are lists there.
        wanted = json.loads(json.dumps(identity))
        other = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
        if other:
            raise CheckpointError(
                f"{self.path} holds an unfinished evaluation with another {', '.join(other)}; "
                "repeat its command to finish it, delete it, or name another output file"
            )
        self.learn(results)

    def learn(self, results: Iterable[BatchResult]) -> None:
        """Take over results that are in the file already."""
        self._results |= {(r.attack, r.part, r.batch): r for r in results}

    def find(self, attack: str, part: str, batch: int, attacked: list[int]) -> BatchResult | None:
        """The result of a batch, if it is finished.

        Raises:
            CheckpointError: when it is of other images.
        """
        result = self._results.get((attack, part, batch))
        if result is not None and result.attacked != attacked:
            raise CheckpointError(
                f"{self.path} was begun where rounding differs (another machine or number of "
                "threads); finish it there, or delete it"
            )
        return result

    def results(self) -> list[BatchResult]:
        """All results so far, in the order in which they were added."""
        return list(self._results.values())

    def whole(self, attack: str, part: str, targets: list[int]) -> list[BatchResult] | None:  # noqa: ARG002
        """All results of a part of an attack on the images ``targets``, or None to attack them.

        See :class:`~cure.evaluation.shards.MergedShards`.
        """
        return None

    def add(self, result: BatchResult) -> None:
        """Add a result; it is on the disk afterwards."""
        self._results[result.attack, result.part, result.batch] = result
        self._append(asdict(result))

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}); make room and repeat the "
                "command: it goes on where it stopped"
            ) from None

    def remove(self) -> None:
        """The evaluation is finished and its result is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; one that was made for an evaluation that was refused is removed."""
        if kind is not None and self._made and not self._results:
            self.remove()
        if self._file is not None:
            self._file.close()


class JournalPart(Journal):
    """A part of an evaluation in the journal of the whole: its attacks have a word before them.

    Args:
        of: the journal of the whole, which stays open.
        word: such as "L2".
    """

    def __init__(self, of: Journal, word: str) -> None:
        super().__init__()
        self._of, self._word = of, word

    def find(self, attack: str, part: str, batch: int, attacked: list[int]) -> BatchResult | None:
        """See :meth:`Journal.find`."""
        found = self._of.find(self._named(attack), part, batch, attacked)
        return None if found is None else replace(found, attack=attack)

    def whole(self, attack: str, part: str, targets: list[int]) -> list[BatchResult] | None:
        """See :meth:`Journal.whole`."""
        found = self._of.whole(self._named(attack), part, targets)
        return None if found is None else [replace(each, attack=attack) for each in found]

    def add(self, result: BatchResult) -> None:
        """See :meth:`Journal.add`."""
        self._of.add(replace(result, attack=self._named(result.attack)))

    def _named(self, attack: str) -> str:
        return f"{self._word} {attack}"


def partial_of(output: Path) -> Path:
    """The journal beside ``output``, until that is finished."""
    return output.with_name(output.name + SUFFIX)


def begun_attacks(path: Path) -> list[str]:
    """Names of the attacks of the unfinished evaluation in a journal; none without a journal."""
    try:
        with path.open("rb") as file:
            return list(json.loads(file.readline())["identity"]["attacks"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # What is wrong with the file is said when it is opened.


def short(identity: Identity) -> str:
    """A name for an evaluation: twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
