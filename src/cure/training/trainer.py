"""The training loop.  It knows no method by name: a method returns gradients, or a loss.

One step is :meth:`Trainer.train_step`; everything else is about stopping, resuming and measuring.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from cure.config import RunConfig
from cure.data import Batch, ImageSet, steps_per_epoch
from cure.errors import CheckpointError, ConfigError, Interrupted, RanksLost, TrainingStopped
from cure.methods import Method, Metrics
from cure.methods.step import Step
from cure.methods.wrappers.averaging import recompute_statistics
from cure.models import load_weights
from cure.models.batch_norm import running_statistics
from cure.models.checkpoint import save_weights
from cure.models.wrapper import tensors_of
from cure.runs.folder import RunFolder, epoch_name
from cure.runs.records import Accuracies, EpochMetrics, EpochTiming, MeasuredAccuracies, Outcome
from cure.runs.state import load_state, save_state
from cure.training.catastrophic import detector_of
from cure.training.collapse import CollapseDetector, Guessing
from cure.training.gradient_logger import GradientLogger
from cure.training.optimizer import build_optimizer
from cure.training.outcome import FINAL_STEPS, judge, short_run_warnings, start_warnings
from cure.training.overfitting_detector import robust_overfitting
from cure.training.schedule import learning_rate, momentum, progress_at
from cure.training.step import arranged, optimizer_step, training_batches
from cure.training.totals import Totals
from cure.training.tracking import Tracker
from cure.training.validation import validate
from cure.utils.engine import Engine, Grads
from cure.utils.io import first_line
from cure.utils.random import derive
from cure.utils.stats import is_unequal

# Steps between two checks of the loss: each check waits for the device.
GUARD_EVERY = 50

SHOW_EVERY = 5.0
"""Seconds between two updates of ``status.json``."""


class Trainer:
    """Trains one method in one run folder; goes on from the folder's state if it has one."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        training: ImageSet,
        validation: ImageSet,
        engine: Engine,
        folder: RunFolder,
        trackers: Sequence[Tracker] = (),
        measures_gain: bool = True,
        extra: ImageSet | None = None,
    ) -> None:
        self.config = config
        # Prerequisite runs do not compare start and end.
        self.measures_gain = measures_gain and method.selection != "natural"
        self.method = method
        self.training = training.to(engine.device)
        self.validation = validation.to(engine.device)
        self.extra = None if extra is None else extra.to(engine.device)
        self.engine = engine
        self.folder = folder
        self.trackers = trackers
        self.parameters = method.trainable()
        self.optimizer = build_optimizer(config.training.optimizer, method.model, self.parameters)
        self.steps_per_epoch = steps_per_epoch(training, config.training.batch_size)
        self.total_steps = self.steps_per_epoch * config.training.epochs
        self.gradient_logger = (
            GradientLogger(config.training.record_gradients, self.parameters, folder)
            if config.training.record_gradients is not None and folder.writes
            else None
        )
        self.done = 0
        self.totals = Totals(engine.device)
        self.best: dict[str, Any] | None = None
        self.warned_of_overfitting = False
        self.catastrophic = detector_of(config, method)
        self._stop_asked = False
        self._shown = time.monotonic()

    @cached_property
    def counts(self) -> list[int]:
        """Validation images of each class."""
        label = self.validation.label.cpu()
        found: list[int] = torch.bincount(label, minlength=len(self.validation.classes)).tolist()
        return found

    @cached_property
    def balanced(self) -> bool:
        """Whether the best weights are chosen by balanced accuracy."""
        select = self.config.training.select
        return select == "balanced" or (select == "auto" and is_unequal(self.counts))

    @property
    def final_steps(self) -> int:
        """Steps of the attack on the start and on the best weights, which are compared."""
        return max(FINAL_STEPS, self.config.training.validation_steps)

    @cached_property
    def collapse(self) -> CollapseDetector:
        """What tells when the network falls back to guessing."""
        guessing = Guessing(self.counts, self.balanced)
        return CollapseDetector(guessing, self.config.training.collapse_patience)

    # -- one run -------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end of the run, or raise having kept a state to resume from.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM.
            TrainingStopped: when the loss is not finite or the network stays at chance.
        """
        if self.folder.state.exists():
            self.restore()
        # Ranks may differ where the builder of a network draws without a seed.
        self.engine.spread(tensors_of(self.method).values())
        self.folder.rewind(self.done // self.steps_per_epoch, self.done)
        if self.gradient_logger is not None:
            self.gradient_logger.start()
        # A resumed run does not repeat a warning.
        known = robust_overfitting(self.folder.metrics(), len(self.validation))
        self.warned_of_overfitting = known is not None
        self._measure_start()
        if self.catastrophic is not None and not self.folder.state.exists():
            self.save()  # A state to go back to already in the first epoch.
        for tracker in self.trackers:
            tracker.start(self.total_steps, self.done)
        self.folder.set_status("running", step=self.done, steps=self.total_steps)
        try:
            with self._own_chance():
                with self._stop_on_signal():
                    while self.done < self.total_steps:
                        self._train_epoch(self.done // self.steps_per_epoch)
                with self._stop_on_signal(at_once=True):
                    self._measure_end()
        except (Interrupted, KeyboardInterrupt):
            self.folder.set_status("stopped", step=self.done, steps=self.total_steps)
            raise
        except RanksLost:
            raise  # At once: the launcher ends this process before it could write and say why.
        except BaseException as error:
            self.folder.set_failed(error, step=self.done)
            raise
        finally:
            for tracker in self.trackers:
                tracker.close()
        self.folder.set_status("finished", step=self.done, steps=self.total_steps, best=self.best)
        # Barrier: the other ranks may read what the first rank wrote.
        self.engine.any(False)

    def _train_epoch(self, number: int) -> None:
        self.method.on_epoch(number)
        self.method.train()
        began, before = (time.perf_counter(), time.process_time()), self.done
        settings = self.config.training
        start = self.done % self.steps_per_epoch
        for batch in training_batches(
            self.config, self.training, self.extra, self.engine, number, start
        ):
            metrics = self.train_step(batch)
            self.totals.add(metrics, batch.step)
            self.done += 1
            if self.catastrophic is not None and self.catastrophic.overfits(batch, settings.parts):
                self._go_back()
                return
            for tracker in self.trackers:
                tracker.step(settings.batch_size, metrics)
            self._show_progress()
            last = self.done % self.steps_per_epoch == 0
            if self.done % GUARD_EVERY == 0:
                self._check_finite()
            if not last:
                self._maybe_save_inside(settings.checkpoint_every)
        self.method.after_epoch(number)
        seconds = {
            "seconds": time.perf_counter() - began[0],
            # Of all threads; unlike wall time, hardly affected by other work on the machine.
            "processor_seconds": time.process_time() - began[1],
        }
        images = (self.done - before) * settings.batch_size
        self._finish_epoch(number + 1, seconds, images)

    def _show_progress(self) -> None:
        """Write how far the run is, every few seconds, for ``cure watch``."""
        if time.monotonic() - self._shown > SHOW_EVERY:
            self._shown = time.monotonic()
            self.folder.set_status("running", step=self.done, steps=self.total_steps)

    def _go_back(self) -> None:
        """Return to the last saved state and train with two attack steps from there."""
        assert self.catastrophic is not None
        at = self.done
        self.engine.any(False)  # The first rank has written the state that the others read.
        self.restore()
        self.method.context.fallback = True
        self.folder.rewind(self.done // self.steps_per_epoch, self.done)
        self.save()
        for tracker in self.trackers:
            tracker.warn(
                f"catastrophic overfitting at step {at}: on a training batch the single-step "
                f"attack left {self.catastrophic.single_step:.0f} % right and PGD "
                f"{self.catastrophic.pgd:.0f} %; "
                f"training goes on from step {self.done} with a two-step attack"
            )

    def train_step(self, batch: Batch) -> Metrics:
        """One optimiser step: gradients of the method, clipping, step, moving averages."""
        batch = arranged(batch, self.engine)
        # For dropout and similar layers, which draw from PyTorch's global generator.
        # Each rank has its own seed; otherwise all ranks would drop the same units.
        of_rank = (self.engine.rank,) if self.engine.rank else ()
        torch.manual_seed(derive(self.config.seed, "network", batch.step, *of_rank))
        self._set_learning_rate(batch.step)

        def look(step: Step, gradients: Grads) -> None:
            if self.gradient_logger is not None:
                self.gradient_logger.step(batch.step, gradients, step.masking)

        step = optimizer_step(
            self.method, self.optimizer, self.parameters, batch, self.config, look
        )
        return self._of_all_ranks(step.metrics) | self.method.after_step(batch.step)

    @torch.no_grad()
    def _of_all_ranks(self, metrics: Metrics) -> Metrics:
        """The metrics of the whole batch; BatchNorm's running statistics become those of all ranks.

        At every step and in one exchange: so all ranks are in the same state after each step, which
        the first can save for all, and they decide alike whatever they decide by it.
        """
        if self.engine.world == 1:
            return metrics
        statistics = running_statistics(self.method)
        means = self.engine.average([*metrics.values(), *statistics])
        if statistics:
            torch._foreach_copy_(statistics, means[len(metrics) :])
        return dict(zip(metrics, means, strict=False))

    def _set_learning_rate(self, step: int) -> None:
        settings = self.config.training
        progress = progress_at(settings, step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = momentum(settings, progress)
            group["lr"] = group.get("rate_factor", 1.0) * learning_rate(settings, progress)

    # -- measuring -----------------------------------------------------------------------------

    def _finish_epoch(self, number: int, seconds: dict[str, float], images: int) -> None:
        """Validate, record, save: in that order, so that a killed run repeats the whole of it."""
        self._check_finite()
        record: dict[str, Any] = {
            "epoch": number,
            "epochs": self.config.training.epochs,
            "step": self.done,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train": self.totals.means(),
        }
        began = time.perf_counter()
        due = number % self.config.training.validate_every == 0
        if due or self.done == self.total_steps:
            record["validation"] = self.validate()
        (processor_seconds,) = self.engine.sums(seconds["processor_seconds"])
        (peak_memory,) = self.engine.largest(self.engine.peak_memory())
        timing = {
            "epoch": number,
            "seconds": seconds["seconds"],
            "processor_seconds": processor_seconds,
            "images_per_second": images / seconds["seconds"],
            "validation_seconds": time.perf_counter() - began,
            "peak_memory_mib": peak_memory,
            "ranks": self.engine.world,
        }
        self.folder.append(EpochMetrics.model_validate(record))
        self.folder.append(EpochTiming.model_validate(timing))
        for tracker in self.trackers:
            tracker.epoch(record, timing)
        self._maybe_warn()
        self.totals = Totals(self.engine.device)
        if self._is_alive(record.get("validation")):
            self._save_weights(record)
            if self.gradient_logger is not None:
                self.gradient_logger.save()
            self.save()
        if self.engine.any(self._stop_asked):
            self._interrupt()

    def _maybe_warn(self) -> None:
        """Warn once when the run overfits."""
        if self.warned_of_overfitting or not self.trackers:
            return
        sentence = robust_overfitting(self.folder.metrics(), len(self.validation))
        if sentence is not None:
            self.warned_of_overfitting = True
            for tracker in self.trackers:
                tracker.warn(sentence)

    def validate(self, steps: int | None = None) -> dict[str, float]:
        """Natural and robust accuracy in percent on the validation split.

        Args:
            steps: of the attack; by default ``training.validation_steps``.
        """
        model, images = self._evaluated(), self.validation
        return validate(model, images, self.config, self.engine, steps, balanced=self.balanced)

    def _evaluated(self) -> nn.Module:
        """The network that is evaluated; its BatchNorm has the statistics of its weights."""
        model = self.method.inference_model()
        if self.config.training.batch_norm == "train":
            recompute_statistics(model, self.method.context.natural_images())
        return model

    def _measure_start(self) -> None:
        """Accuracies before the first step, printed and kept in the run."""
        if not self.measures_gain or self.done:
            return
        before = self.engine.first(self.folder.outcome)
        if before is not None:
            self.collapse.start(before.start.content())
            return
        if self.config.start != "scratch" and not self.config.starts_naturally:
            # Nothing else keeps these weights, with this head and in this order of the classes,
            # which `cure tradeoff` goes back towards.
            self._write(self.method.model, "start", {"run": self.config.name, "epoch": "0"})
        found = self.validate(self.final_steps)
        self.collapse.start(found)
        start = self._measured(found, self.final_steps)
        warned = start_warnings(start, self.config, self.collapse.guessing)
        if warned and self.config.start_check == "refuse":
            raise ConfigError(f"{warned[0]}; or set start_check=warn to train nevertheless")
        if self.config.start_check == "off":
            warned = []
        self.folder.set_outcome(Outcome(start=start))
        warned += short_run_warnings(
            self.config, self.config.training.epochs * self.steps_per_epoch
        )
        for tracker in self.trackers:
            tracker.say(f"start: {start}")
            if self.balanced:
                tracker.say(self._why_balanced())
            for sentence in warned:
                tracker.warn(sentence)
        if self.config.training.batch_norm == "train":
            self.save()  # Its statistics were computed anew, which a resumed run does not repeat.

    def _measure_end(self) -> None:
        """Accuracies of the best weights under a stronger attack, and what training gained."""
        if not self.measures_gain:
            return
        self.engine.any(False)  # The first rank has written the weights that the others read.
        network = copy.deepcopy(self.method.inference_model())
        load_weights(network, self.folder.weights("best"))
        network = self.engine.place(network)
        found = validate(
            network,
            self.validation,
            self.config,
            self.engine,
            self.final_steps,
            balanced=self.balanced,
        )
        end = self._measured(found, self.final_steps)
        before = self.folder.outcome()
        # A run that an earlier version began has no measured start: nothing was robust there.
        start = before.start if before else end.model_copy(update={"natural": 0.0, "robust": 0.0})
        baseline = 100 * max(self.counts) / len(self.validation)
        result = judge(start, end, self.folder.metrics(), self.config, baseline)
        self.folder.set_outcome(result)
        for tracker in self.trackers:
            for line in result.lines(str(self.folder.resumed_by)):
                tracker.say(line)

    def _why_balanced(self) -> str:
        """Says that the best weights are chosen by balanced accuracy, and how not to."""
        largest = self.validation.classes[self.counts.index(max(self.counts))]
        share = 100 * max(self.counts) / len(self.validation)
        return (
            f"the best weights are chosen by balanced accuracy: '{largest}' has {share:.0f} % of "
            "the validation images (training.select=accuracy chooses by accuracy)"
        )

    def _measured(self, found: dict[str, float], steps: int) -> MeasuredAccuracies:
        return MeasuredAccuracies(**found, n=len(self.validation), steps=steps)

    def _check_finite(self) -> None:
        """Stop when a loss since the last check, or a weight, is not finite."""
        bad = self.totals.first_bad()
        weights: list[Tensor] = list(self.parameters.values())
        if bad is None and torch.stack(torch._foreach_norm(weights)).sum().isfinite():
            return
        at = self.done - 1 if bad is None else bad
        rate = self.optimizer.param_groups[0]["lr"]
        raise TrainingStopped(
            f"the loss or the weights stopped being finite at step {at} (epoch "
            f"{at // self.steps_per_epoch + 1}, learning rate {rate:.3g}); {self._kept()}. Try a "
            "lower training.optimizer.learning_rate, training.clip_norm=1, a "
            "training.schedule.warmup, or training.precision=fp32 in a new run"
        )

    def _is_alive(self, validation: dict[str, float] | None) -> bool:
        """Whether the network may be saved: not when it had learnt and fell back to chance.

        Raises:
            TrainingStopped: when it stays at chance too long, or ends there.
        """
        collapse = self.collapse
        if validation is None:
            return not collapse.fallen
        collapse.add(validation)
        last = self.done == self.total_steps
        percent = f"{collapse.guessing.natural(validation):.1f} %"
        epoch = self.done // self.steps_per_epoch
        if collapse.warns and not last:
            for tracker in self.trackers:
                tracker.warn(
                    f"natural accuracy on the validation split fell to chance ({percent}) at epoch "
                    f"{epoch}; the training stops when it stays there for {collapse.patience} "
                    "validations"
                )
        if collapse.lasting or (collapse.fallen and last):
            raise TrainingStopped(
                f"natural accuracy on the validation split was at chance "
                f"({percent}{' balanced' if self.balanced else ''}) {collapse.at_chance} times in "
                f"a row up to epoch {epoch}; {self._kept()}. Try a lower "
                "training.optimizer.learning_rate, a training.schedule.warmup, a smaller "
                "threat.epsilon at first, or start=natural in a new run"
            )
        return not collapse.fallen

    def _kept(self) -> str:
        weights = self.folder.checkpoints / "last.safetensors"
        return (
            f"the last good weights are kept in {weights}"
            if weights.exists()
            else ("no checkpoint had been written yet")
        )

    # -- stopping and resuming -----------------------------------------------------------------

    def save(self) -> None:
        """Write everything that resuming needs, with any number of ranks."""
        if not self.folder.writes:
            return
        save_state(
            self.folder.state,
            {
                "done": self.done,
                "method": dict(self.method.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "totals": self.totals.state(),
                "best": self.best,
                **self.collapse.state(),
                "ranks": self.engine.world,
                "fallback": self.method.context.fallback,
            }
            | ({} if self.gradient_logger is None else {"gradients": self.gradient_logger.state()}),
        )

    def restore(self) -> None:
        """Continue from the folder's state, with the same bits.

        Raises:
            CheckpointError: when the state is damaged or of another network.
        """
        state = load_state(self.folder.state)
        try:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder.state} does not fit the run's recipe "
                f"({first_line(error)}); restore config.yaml or the state from a copy"
            ) from None
        self.done = state["done"]
        self.totals = Totals.of(state["totals"], self.engine.device)
        self.best = state["best"]
        self.collapse.restore(state)
        self.method.context.fallback = state.get("fallback", False)
        if self.gradient_logger is not None and "gradients" in state:
            self.gradient_logger.restore(state["gradients"], self.engine.device)
        # States of early versions do not hold the number of ranks.
        self._warn_of_ranks(state.get("ranks", 1))

    def _warn_of_ranks(self, before: int) -> None:
        """Warn that a resumed run has another number of ranks, and say what that changes."""
        now, batch = self.engine.world, self.config.training.batch_size
        if before == now:
            return
        normalised = (
            f"; BatchNorm normalises over {batch // now} images at a time instead of "
            f"{batch // before}"
            if running_statistics(self.method)
            else ""
        )
        sentence = (
            f"this run was on {before} rank{'s' * (before > 1)} up to step {self.done} and goes on "
            f"with {now}: the batches and what is drawn for them stay the same, but sums are "
            f"rounded otherwise and dropout draws otherwise{normalised}"
        )
        for tracker in self.trackers:
            tracker.warn(sentence)

    def _save_weights(self, record: dict[str, Any]) -> None:
        validation = record.get("validation")
        model = self._evaluated() if validation is None else self.method.inference_model()
        facts = {"epoch": str(record["epoch"]), "run": self.config.name}
        if validation is not None:
            facts |= {f"validation_{name}": str(value) for name, value in validation.items()}
            if self.best is None or self._rank(validation) > self._rank(self.best["validation"]):
                self.best = {"epoch": record["epoch"], "validation": validation}
                self._write(model, "best", facts)
        self._write(model, "last", facts)
        every = self.config.training.keep_every
        if every is not None and (record["epoch"] % every == 0 or self.done == self.total_steps):
            self._write(model, epoch_name(record["epoch"]), facts)

    def _rank(self, validation: dict[str, float]) -> tuple[float, float]:
        return Accuracies.model_validate(validation).rank(self.method.selection)

    def _write(self, model: nn.Module, name: str, facts: dict[str, str]) -> None:
        if self.folder.writes:
            save_weights(model, self.folder.checkpoints / f"{name}.safetensors", facts)

    def _maybe_save_inside(self, every: int | None) -> None:
        due = every is not None and self.done % every == 0
        # Signals reach ranks at different steps: all stop after the step at which one has a signal.
        stopping = self.engine.any(self._stop_asked)
        if not (due or stopping):
            return
        self._check_finite()
        if self._is_alive(None):
            self.save()
        if stopping:
            self._interrupt()

    def _interrupt(self) -> None:
        raise Interrupted(
            f"stopped after step {self.done} of {self.total_steps}; "
            f"continue with `{self.folder.resume_command()}`"
        )

    def _own_chance(self) -> AbstractContextManager[None]:
        """Restore PyTorch's global generators afterwards: each step seeds them."""
        device = self.engine.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    @contextmanager
    def _stop_on_signal(self, at_once: bool = False) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM finish the step; a second one is not caught.

        Args:
            at_once: stop in the middle, where there is no step to finish and all is saved.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self._stop_asked = True
            signal.signal(number, before[signal.Signals(number)])
            if at_once:
                self._interrupt()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
