"""The runs that a run needs before its own first step: natural start, robust head, teachers.

:func:`prerequisites` lists them in the order of training; :func:`carry_out` trains those that are
missing, one after another, and then the run itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from cure.config import NATURAL, ROBUST, LayersConfig, RunConfig
from cure.data import steps_per_epoch
from cure.errors import CureError, Interrupted, RanksLost
from cure.models import load_weights
from cure.models.batch_norm import running_statistics
from cure.models.blocks import blocks, chosen, reinitialise
from cure.models.build import network_of
from cure.models.failure import network_errors
from cure.models.head import head_name
from cure.models.trial import fitted
from cure.registry import METHODS
from cure.runs.folder import RunFolder
from cure.training.budget import decide_cutmix, reach_steps
from cure.training.resources import memory_errors
from cure.training.setup import (
    Prepared,
    build_method,
    choose_layers,
    starting_network,
    teacher_config,
    teacher_networks,
)
from cure.training.tracking import TerminalTracker, Tracker, trackers_of
from cure.training.trainer import Trainer
from cure.utils.engine import Engine, configure
from cure.utils.random import generator


@dataclass(frozen=True)
class Prerequisite:
    """A run whose best weights another run needs.

    Attributes:
        phase: what the status of the run says meanwhile.
        folder: where it is trained, inside the folder of the run that needs it.
        config: what it is.
        prepared: its data and networks.
        receivers: networks that are loaded with its best weights.
    """

    phase: str
    folder: RunFolder
    config: RunConfig
    prepared: Prepared
    receivers: list[nn.Module]


def prerequisites(folder: RunFolder, config: RunConfig, prepared: Prepared) -> list[Prerequisite]:
    """What has to be trained before ``config``, in order; nothing for a run that has begun.

    Args:
        folder: of the run.
        config: the run.
        prepared: its data and networks.
    """
    if folder.state.exists():
        return []

    def inside(phase: str) -> RunFolder:
        return RunFolder(folder.inner(phase), folder.resumed_by, folder.writes)

    found: list[Prerequisite] = []
    teachers = config.method.teachers()
    receivers = [prepared.network] if config.starts_naturally else []
    receivers += [prepared.teachers[role] for role, t in teachers.items() if t.path == NATURAL]
    if receivers:
        own = replace(prepared, network=copy.deepcopy(prepared.initial), teachers={})
        theirs = natural_config(config)
        own_folder = inside("natural start")
        if (own_folder.path / "config.yaml").is_file():
            cutmix: Any = own_folder.config.data.augment.cutmix
            theirs = _with_cutmix(theirs, cutmix)
        elif prepared.decides_cutmix:
            theirs = _with_cutmix(theirs, "auto")
        theirs = _with_length(theirs, prepared)
        found.append(Prerequisite("natural start", own_folder, theirs, own, receivers))
    if config.start.startswith(ROBUST) and config.head.share:
        theirs = head_config(config, prepared.network)
        own = replace(prepared, network=copy.deepcopy(prepared.network), teachers={})
        # `layers` is for the run itself: its head may be one that does not learn there.
        learnt = dict(prepared.initial.named_parameters())
        for name, parameter in own.network.named_parameters():
            parameter.requires_grad_(learnt[name].requires_grad)
        choose_layers(own.network, theirs)
        found.append(Prerequisite("head", inside("head"), theirs, own, [prepared.network]))
    for role, source in teachers.items():
        if source.recipe is None:
            continue
        theirs = _with_length(teacher_config(f"method.{role}", source, config), prepared)
        initial = network_of(theirs, prepared.training.kind, None)
        own = replace(
            prepared,
            engine=fitted(Engine.of(theirs.training), initial),
            network=starting_network(initial, theirs, prepared.training.kind),
            initial=initial,
            teachers={},
        )
        own = replace(own, teachers=teacher_networks(theirs, own))
        phase = f"teacher {role}"
        found += prerequisites(inside(phase), theirs, own)
        receiver = prepared.teachers[role]
        found.append(Prerequisite(phase, inside(phase), theirs, own, [receiver]))
    return found


def _with_cutmix(config: RunConfig, cutmix: float | Literal["auto"]) -> RunConfig:
    augment = config.data.augment.model_copy(update={"cutmix": cutmix})
    data = config.data.model_copy(update={"augment": augment})
    return config.model_copy(update={"data": data})


def _with_length(config: RunConfig, prepared: Prepared) -> RunConfig:
    """A run with what depends on its number of steps."""
    steps = steps_per_epoch(prepared.training, config.training.batch_size)
    return decide_cutmix(reach_steps(config, steps)[0], steps)[0]


def carry_out(
    folder: RunFolder,
    config: RunConfig,
    prepared: Prepared,
    quiet: bool = False,
    first: Callable[[], None] | None = None,
) -> None:
    """Start or resume training; trains missing prerequisites first.

    Args:
        folder: of the run; it is locked meanwhile.
        config: the run.
        prepared: its data and networks.
        quiet: print nothing.
        first: what one process does in the folder before the training.
    """
    engine = prepared.engine
    with ExitStack() as held:
        with engine.agreeing():
            held.enter_context(folder.lock())
        if first is not None:
            engine.first(first)
        held.enter_context(recording_failure(folder))
        missing = prerequisites(folder, config, prepared)
        engine.first(lambda: _make_folders(missing))
        for needed in missing:
            _train_prerequisite(folder, needed, quiet)
        _train(folder, config, prepared, quiet)


@contextmanager
def recording_failure(folder: RunFolder) -> Iterator[None]:
    """Write to ``status.json`` why the run ended, unless a reason is already there.

    A run that is refused before it goes on, for example since its state is damaged, stays as it is.
    """
    before = folder.status().content()
    try:
        yield
    except RanksLost:
        raise  # At once: the launcher ends this process before it could write and say why.
    except BaseException as error:
        refused = isinstance(error, CureError) and folder.state.exists()
        if refused and folder.status().content() == before:
            raise
        asked = isinstance(error, Interrupted | KeyboardInterrupt)
        with suppress(CureError):
            if not asked:
                folder.set_failed(error)
            elif folder.status().state in ("new", "running", "finished"):
                folder.set_status(**(folder.status().content() | {"state": "stopped"}))
        raise


def _make_folders(needed: list[Prerequisite]) -> None:
    """Make the folders that are not there yet, a folder before those inside it."""
    for run in sorted(needed, key=lambda run: len(run.folder.path.parts)):
        if not run.folder.path.exists():
            RunFolder.create(run.folder.path, run.config, run.prepared.training.kind)


def _train_prerequisite(folder: RunFolder, needed: Prerequisite, quiet: bool) -> None:
    """Train a prerequisite unless it is finished, and load its weights where they are needed."""
    inner = needed.folder
    if not needed.prepared.engine.first(lambda: inner.status().finished):
        folder.set_status("running", phase=needed.phase)
        try:
            with ExitStack() as held:
                with needed.prepared.engine.agreeing():
                    held.enter_context(inner.lock())
                _train(inner, needed.config, needed.prepared, quiet, measures_gain=False)
        except BaseException:
            with suppress(CureError):
                folder.set_status(**(inner.status().content() | {"phase": needed.phase}))
            raise
    for network in needed.receivers:
        load_weights(network, inner.weights("best"))


def _train(
    folder: RunFolder,
    config: RunConfig,
    prepared: Prepared,
    quiet: bool,
    measures_gain: bool = True,
) -> None:
    """Train one run whose prerequisites are there, from the state in its folder if it has one."""
    engine = prepared.engine
    configure(config.training, engine.device)
    if not folder.state.exists():
        _draw_layers(prepared.network, config)
    for network in (prepared.network, *prepared.teachers.values()):
        engine.place(network)
    method = build_method(config, prepared)
    terminal = TerminalTracker(config.name)
    trackers: list[Tracker] = [] if quiet or not folder.writes else [terminal]
    if folder.writes:
        # A tracker that fails is reported also where the run is quiet.
        trackers += trackers_of(folder.path, config, terminal.warn)
    trainer = Trainer(
        config,
        method,
        prepared.training,
        prepared.validation,
        engine,
        folder,
        trackers,
        measures_gain,
        None if prepared.extra is None else prepared.extra.images,
    )
    for sentence in method.warnings():
        for tracker in trackers:
            tracker.warn(sentence)
    if config.training.parts > 1 and running_statistics(method):
        images = config.training.batch_size // engine.world // config.training.parts
        for tracker in trackers:
            tracker.warn(f"BatchNorm normalises over the {images} images of a part of a batch")
    with (
        recording_failure(folder),
        network_errors(),
        memory_errors(config, method, prepared, folder),
    ):
        trainer.fit()


def _draw_layers(network: nn.Module, config: RunConfig) -> None:
    """Reinitialise the layers that the configuration names, before the first step."""
    layers = config.layers
    if layers.reinitialise != "none":
        names = chosen(network, layers.update or blocks(network))
        draws = generator("cpu", config.seed, "reinitialise")
        reinitialise(network, names, draws, norms=layers.reinitialise == "all")


def natural_config(config: RunConfig) -> RunConfig:
    """The run that trains the start of ``config``: the same but for the method and ``natural``."""
    change = config.natural.model_dump(exclude_none=True)
    training = config.training.model_copy(
        update={
            "epochs": change.get("epochs", config.training.epochs),
            "minutes": None,
            "schedule_from": 0,
            "schedule_length": 0,
            "min_steps": config.natural.min_steps,
            "schedule": config.natural.schedule or config.training.schedule,
            "optimizer": config.training.optimizer.model_copy(
                update={k: change[k] for k in ("learning_rate", "weight_decay") if k in change}
            ),
            "averaging": None,
            "weight_perturbation": None,
            "keep_every": None,
            "record_gradients": None,
        }
    )
    return config.model_copy(
        update={
            "layers": LayersConfig(),
            "name": f"{config.name}-natural",
            # A natural teacher of a run that starts elsewhere begins as the network is built.
            "start": (config.start_path if config.starts_naturally else None) or "model",
            "method": METHODS["natural"].Config(name="natural"),
            "training": training,
        }
    )


def head_config(config: RunConfig, network: nn.Module) -> RunConfig:
    """The run that trains the head of ``start: robust:PATH``: ``at`` with all other layers fixed.

    Args:
        config: the run that starts with the head.
        network: its network, which names the layer.
    """
    head, training = config.head, config.training
    changes: dict[str, Any] = {
        "epochs": max(1, round(head.share * training.epochs)),
        "minutes": None,
        "schedule_from": 0,
        "schedule_length": 0,
        "averaging": None,
        "weight_perturbation": None,
        "keep_every": None,
        "record_gradients": None,
    }
    if head.learning_rate is not None:
        changes["optimizer"] = training.optimizer.model_copy(
            update={"learning_rate": head.learning_rate}
        )
    return config.model_copy(
        update={
            "layers": LayersConfig(update=(head_name(network, config.draws_head),)),
            "name": f"{config.name}-head",
            "method": METHODS["at"].Config(name="at"),
            "training": training.model_copy(update=changes),
        }
    )
