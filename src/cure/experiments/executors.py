"""Who does the runs of a plan or a study: processes of this machine, or jobs of a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from cure.errors import ConfigError, Interrupted, RanksLost
from cure.utils.io import first_line
from cure.utils.memory import keep_freed_memory

UNGUARDED = (
    "each run has a process of its own, which first runs the calling script and could not; keep "
    'that script in a file, with the call under `if __name__ == "__main__":`'
)


class NoProcess(ConfigError):
    """No process can be started, for this call and for all others of the script."""


class Job(Protocol):
    """A submitted call."""

    def result(self) -> str:
        """Wait for its end and return its value, or raise what it raised."""


class Executor(Protocol):
    """The part of ``concurrent.futures.Executor`` that is used here; submitit has it too."""

    def submit(self, function: Callable[..., str], /, *arguments: Any) -> Job:
        """Start the call, or put it in the queue."""


class LocalExecutor:
    """Runs calls on this machine, each in a new process, which imports the calling script.

    A new process for each call, so that its peak memory is the peak memory of the run. Threads
    start the processes: a process pool prefetches one task that cannot be cancelled.

    Args:
        jobs: calls at a time.

    Raises:
        ConfigError: when ``jobs`` is below 1, or such an import makes an executor.
    """

    def __init__(self, jobs: int) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise NoProcess(UNGUARDED)
        if jobs < 1:
            raise ConfigError(f"--jobs: expected 1 or more, got {jobs}")
        self.jobs = jobs
        self.threads = ThreadPoolExecutor(jobs)
        self.over = False
        # Processes of the user's own, such as the workers of a data loader.
        self.others = multiprocessing.active_children()

    def submit(self, function: Callable[..., str], /, *arguments: Any) -> Job:
        """Start the call, or put it in the queue."""
        return self.threads.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., str], *arguments: Any) -> str:
        if self.over:
            raise Interrupted("cancelled before it began")
        try:
            return _in_own_process(function, *arguments)
        except (Interrupted, KeyboardInterrupt, NoProcess):
            # A signal to all processes can end a run before this process receives it.
            self.over = True
            raise

    def cancel(self) -> None:
        """Start nothing more and stop what runs: a training saves its state after its step."""
        self.over = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in self.others:
                process.terminate()
        self.threads.shutdown()


def _in_own_process(function: Callable[..., str], *arguments: Any) -> str:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, keep_freed_memory) as process:
        try:
            process.submit(os.getpid).result()
        except BrokenProcessPool:
            raise NoProcess(UNGUARDED) from None
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RanksLost(
                "its process was killed, for want of memory or by a signal; the same call goes on"
            ) from None


def cluster_executor(cluster: str, folder: Path, options: Mapping[str, Any]) -> Executor:
    """Submits jobs to a cluster through submitit.

    Args:
        cluster: "slurm", or "local" to try it without a cluster.
        folder: where submitit keeps its files and the jobs' logs.
        options: submitit's parameters (``timeout_min``, ``slurm_partition``, ``cpus_per_task``).

    Raises:
        ConfigError: when submitit is not installed or does not know the cluster or an option.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "--cluster needs submitit: pip install 'cure-at[cluster]', or use --jobs"
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60, **options})
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise ConfigError(f"--cluster {cluster}: {first_line(error)}") from None
    return executor


class RayExecutor:
    """Runs calls as tasks of Ray: on the cluster that ``RAY_ADDRESS`` names, else this machine.

    Args:
        options: of each task (``num_cpus``, ``num_gpus``).

    Raises:
        ConfigError: when Ray is not installed or does not know an option.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "--cluster ray needs Ray: pip install 'cure-at[ray]', or use --jobs"
            ) from None
        self.ray = ray
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        try:
            self.task = ray.remote(**{"num_cpus": 1, "max_retries": 0, **options})(_called)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--cluster ray: {first_line(error)}") from None

    def submit(self, function: Callable[..., str], /, *arguments: Any) -> Job:
        """Start the call, or put it in the queue."""
        return _RayJob(self.ray, self.task.remote(function, arguments))


@dataclass(frozen=True)
class _RayJob:
    ray: Any
    reference: Any

    def result(self) -> str:
        try:
            return str(self.ray.get(self.reference))
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause or RuntimeError(str(error))) from None
        except self.ray.exceptions.RayError as error:
            raise RuntimeError(first_line(error)) from None


def _called(function: Callable[..., str], arguments: tuple[Any, ...]) -> str:
    return function(*arguments)


def executor_for(
    jobs: int, cluster: str | None, folder: Path, options: Mapping[str, Any]
) -> Executor:
    """The executor that a command was asked for.

    Args:
        jobs: calls at a time on this machine; without a cluster.
        cluster: "ray", or one of submitit's; None for this machine.
        folder: for the files of submitit.
        options: of the cluster.

    Raises:
        ConfigError: when the cluster's package is not installed, or an option is unknown.
    """
    if cluster is None:
        if options:
            raise ConfigError("--cluster-option goes with --cluster; add it")
        return LocalExecutor(jobs)
    return RayExecutor(options) if cluster == "ray" else cluster_executor(cluster, folder, options)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into KeyboardInterrupt, also where a shell ignores them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
