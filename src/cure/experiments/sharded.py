"""One evaluation by several jobs, of this machine or of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cure.errors import ConfigError, CureError, TrainingStopped
from cure.evaluation.evaluate import evaluate
from cure.evaluation.metrics import Result
from cure.evaluation.shards import Shard
from cure.experiments.executors import Executor, LocalExecutor, NoProcess, stopped_by_signals
from cure.runs.run import Run
from cure.utils.io import check_free, read_json, user_path

ONLY_WHOLE = ("robustbench", "bounds", "smoothing")
"""Arguments of ``evaluate`` that concern the merged result alone."""


def evaluate_in_shards(
    target: str | Path | Run,
    shards: int,
    *,
    output: str | Path,
    executor: Executor | None = None,
    tell: Callable[[str], None] = lambda line: None,  # noqa: ARG005
    **arguments: Any,
) -> Result:
    """Evaluate as :func:`cure.evaluate` does, with the images shared among jobs.

    Each job attacks every ``shards``-th image and keeps what it found in a file beside ``output``;
    a last job merges these.  Attacks draw other random numbers than in one process, so verdicts
    may differ on single images, as with another seed.  The same call goes on after a kill.  A job
    of this machine has a process of its own, which imports the calling script: keep the call in it
    under ``if __name__ == "__main__":``.

    Args:
        target: a run, or what names a network or an exported file.
        shards: number of jobs.
        output: JSON file of the result; must not exist.
        executor: does the jobs; by default one after the other on this machine.
        tell: called with a line about each job.
        arguments: those of :func:`cure.evaluate`; ``adversarial``, ``float_network`` and
            ``time_limit`` are refused.

    Raises:
        ConfigError: for what shards cannot do.
        TrainingStopped: when a job failed; what the others found is kept.
        CureError: as :func:`cure.evaluate`.

    >>> cure.evaluate_in_shards("runs/mine", 8, output="result.json")    # doctest: +SKIP
    """
    if isinstance(target, Run) and target.network is None:
        target = target.path
    if not isinstance(target, str | Path):
        raise ConfigError(
            "jobs of their own cannot receive a network in memory; expected a run's folder, a file "
            f"or a name, got {type(target).__name__}"
        )
    if shards < 1:
        raise ConfigError(f"shards: expected 1 or more, got {shards}")
    output = user_path(output)
    check_free(output)
    executor = executor or LocalExecutor(1)
    # Jobs that each use every core of one machine wait for one another.
    beside = executor.jobs if isinstance(executor, LocalExecutor) else 1
    threads = None if beside == 1 else max(1, (os.cpu_count() or 1) // beside)
    place = str(Path(output).resolve())
    ours = {key: value for key, value in arguments.items() if key not in ONLY_WHOLE}
    with stopped_by_signals():
        try:
            jobs = {
                shard: executor.submit(
                    _evaluate, str(target), place, ours | {"shard": str(shard)}, threads
                )
                for shard in (Shard(number, shards) for number in range(1, shards + 1))
            }
            failures = []
            for shard, job in jobs.items():
                try:
                    job.result()
                    tell(f"shard {shard}: done")
                except NoProcess:
                    raise
                # What submitit raises are RuntimeErrors.
                except (CureError, RuntimeError) as error:
                    failures.append(f"shard {shard}: {error}")
                    tell(failures[-1])
            if failures:
                raise TrainingStopped(
                    f"{len(failures)} of {shards} shards failed: {failures[0]}; the same command "
                    "repeats them"
                )
            whole = arguments | {"shards": shards}
            executor.submit(_evaluate, str(target), place, whole, threads).result()
        except BaseException:
            # Jobs of a cluster go on.
            if isinstance(executor, LocalExecutor):
                executor.cancel()
            raise
    result: Result = read_json(Path(output))
    return result


def _evaluate(target: str, output: str, arguments: dict[str, Any], threads: int | None) -> str:
    """One job; in its own process, except where a test runs it."""
    if threads is not None:
        torch.set_num_threads(threads)
    evaluate(target, output=output, **arguments)
    return output
