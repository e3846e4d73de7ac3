"""Sweeps: many runs of one recipe with settings that vary.

Optuna's storage holds the trials, so workers on one or several machines share them. A trial is a
run in ``OUTPUT/runs``; the next worker in the same folder continues one that was interrupted.
``OUTPUT/sweep.json`` says which sweep the folder belongs to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from cure.config import Ratio, RunConfig
from cure.data.cache import CachePlace
from cure.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    ModelError,
    TrainingStopped,
)
from cure.evaluation.runner import Progress, no_progress
from cure.recipe import changed, check, layered, override, parse_override, read_recipe, read_yaml
from cure.runs.folder import RunFolder
from cure.training.budget import settle
from cure.training.prerequisites import natural_config
from cure.training.run import resume, train
from cure.training.setup import prepare
from cure.training.start import standardised_as_start
from cure.utils.io import first_line, read_json, write_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

SWEEP_FORMAT = "cure-sweep-1"

RULERS = ("data", "threat", "attack.step_size", "training.validation_steps", "training.precision")
"""Settings that accuracies on the validation images are measured by, so that none may vary."""

PLANNED = "planned"
"""Attribute of trials whose settings were given, not drawn."""

ORPHANED = 60
"""Seconds after which a running trial without a worker's name is given up."""


@dataclass(frozen=True)
class Varied:
    """A setting that varies: within a range, or over a few values.

    Attributes:
        key: its place in the recipe.
        choices: the values, where they are listed.
        low: least value of a range.
        high: largest.
        log: whether the range is even in the logarithm.
        whole: whether only whole numbers mean something.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def points(self, count: int) -> list[Any]:
        """``count`` values from end to end, or the listed ones."""
        if self.choices:
            return list(self.choices)
        shares = [place / (count - 1) for place in range(count)] if count > 1 else [0.5]
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            found = [math.exp(low + share * (high - low)) for share in shares]
        else:
            found = [self.low + share * (self.high - self.low) for share in shares]
        if self.whole:
            return list(dict.fromkeys(round(value) for value in found))
        # Without the last rounding errors, which would stand in every command line.
        return [min(max(float(f"{value:.12g}"), self.low), self.high) for value in found]

    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if self.whole:
            return distributions.IntDistribution(int(self.low), int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)


def read_varied(word: str) -> Varied:
    """The setting in ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log`` or ``KEY=A,B,C``.

    Raises:
        ConfigError: when the word says none of these.
    """
    key, _, text = word.partition("=")
    expected = ConfigError(
        f"vary: expected KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=A,B,C with LOW below HIGH and, for "
        f"log, above 0; got '{word}'"
    )
    if not key or not text:
        raise expected
    if "," in text or ":" not in text:
        try:
            choices = tuple(read_yaml(part) for part in text.split(","))
        except yaml.YAMLError:
            raise expected from None
        plain = all(isinstance(value, str | int | float | bool) for value in choices)
        if not plain or len(choices) < 2 or len(set(map(repr, choices))) < len(choices):
            raise expected
        return Varied(key, choices)
    ends = text.split(":")
    log = ends[-1] == "log"
    try:
        low, high = (float(Ratio(end)) for end in ends[: -1 if log else None])
    except ValueError:
        raise expected from None
    if not low < high < math.inf or (log and low <= 0):
        raise expected
    return Varied(key, (), low, high, log)


def fitting(raw: Mapping[str, Any], varied: Sequence[Varied], where: str) -> tuple[Varied, ...]:
    """The same settings, whole where the recipe takes whole numbers only.

    Args:
        raw: the recipe with its changes.
        varied: what varies.
        where: the recipe's name, for messages.

    Raises:
        ConfigError: when an end or a listed value is refused, a key is named twice, or it is one
            that accuracies are measured by.
    """
    found = []
    for one in varied:
        if any(f"{one.key}.".startswith(f"{r}.") for r in RULERS) and not one.key.startswith(
            "data.augment"
        ):
            raise ConfigError(
                f"vary: {one.key} changes what accuracy is measured on or by, so trials could not "
                "be compared; start a sweep for each value"
            )
        if [other.key for other in varied].count(one.key) > 1:
            raise ConfigError(f"vary: {one.key} is named twice")
        if not one.choices and one.low.is_integer() and one.high.is_integer():
            one = replace(one, whole=not _accepts(raw, one.key, one.high - 0.5))
        for value in one.choices or one.points(2):
            check(changed(raw, {one.key: value}), f"{where} with {one.key}={value}")
        found.append(one)
    return tuple(found)


def _accepts(raw: Mapping[str, Any], key: str, value: float) -> bool:
    try:
        check(changed(raw, {key: value}), key)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True)
class Sweep:
    """What is tried, and where.

    Attributes:
        recipe: a name or a file.
        settings: changes to it that all trials share.
        varied: what they differ in.
        grid: values of each range, all combined; None to let Optuna choose.
        trials: how many trials there are to be in the end, where Optuna chooses.
        seed: of Optuna's choices.
        storage: URL of a database, or a journal file; None for a journal in ``output``.
        output: folder of the runs.
    """

    recipe: str
    settings: tuple[str, ...]
    varied: tuple[Varied, ...]
    grid: int | None
    trials: int
    seed: int
    storage: str | None
    output: Path

    @property
    def raw(self) -> dict[str, Any]:
        """The recipe with the settings that all trials share."""
        return changed(read_recipe(self.recipe), dict(map(parse_override, self.settings)))

    @property
    def config(self) -> RunConfig:
        """The run that trials differ from."""
        return check(self.raw, f"recipe {self.recipe}")

    def combinations(self) -> list[dict[str, Any]]:
        """All settings of the grid; none where Optuna chooses."""
        if self.grid is None:
            return []
        points = [one.points(self.grid) for one in self.varied]
        keys = [one.key for one in self.varied]
        return [dict(zip(keys, values, strict=True)) for values in product(*points)]

    def command(self, settings: Mapping[str, Any]) -> str:
        """The command that trains with a trial's settings."""
        given = {parse_override(word)[0]: word for word in self.settings}
        own = {key: f"{key}={_word(value)}" for key, value in settings.items()}
        return shlex.join(["cure", "train", self.recipe, *layered(given, own).values()])

    def folder(self, number: int) -> Path:
        """The run of a trial."""
        return self.output / "runs" / f"trial-{number:04}"

    def identity(self) -> dict[str, Any]:
        """What makes it the same sweep, however much of it is done at a time."""
        varied = json.loads(json.dumps([asdict(one) for one in self.varied]))
        return {"settings": self.config.model_dump(mode="json"), "varied": varied}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other workers of this folder from choosing at the same time."""
        with (self.output / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _word(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return str(value)


def begin(sweep: Sweep) -> None:
    """Make the folder or find it as it was left, with its natural start and its grid.

    Raises:
        ConfigError: when the folder belongs to something else, or Optuna cannot use the storage.
    """
    path = sweep.output / "sweep.json"
    # A begin that was killed leaves empty folders and the lock.
    files = (entry for entry in sweep.output.rglob("*") if entry.is_file())
    foreign = sweep.output.is_file() or any(entry.name != ".lock" for entry in files)
    if foreign and not path.exists():
        raise ConfigError(
            f"{sweep.output} exists and holds something else; name another folder with --output"
        )
    here = {**sweep.identity(), "storage": hashlib.sha256(repr(sweep.storage).encode()).hexdigest()}
    if path.exists():
        kept = _read_file(sweep)
        for name, value in here.items():
            if kept.get(name) != value:
                raise ConfigError(
                    f"{sweep.output} was begun with other {name}; say the same as then, or name "
                    "another folder with --output"
                )
    # Whatever can be refused is refused before anything is written: data, network, storage.
    _optuna()
    middle = changed(sweep.raw, {one.key: one.points(1)[0] for one in sweep.varied})
    # Nothing is written yet, so images that go to a file later are decoded and dropped here.
    if sweep.config.data.cache == "disk":
        override(middle, "data.cache", "none")
    prepare(check(middle, f"recipe {sweep.recipe}"), None, None)
    if sweep.storage is not None:
        open_study(sweep)
    (sweep.output / "runs").mkdir(parents=True, exist_ok=True)
    with sweep.alone():
        if not path.exists():
            write_json(path, {"format": SWEEP_FORMAT, "home": uuid.uuid4().hex, **here})
        _natural_start(sweep)
        study = open_study(sweep)
        for settings in sweep.combinations():
            study.enqueue_trial(settings, user_attrs={PLANNED: True}, skip_if_exists=True)


def _read_file(sweep: Sweep) -> dict[str, Any]:
    """What ``sweep.json`` says: which sweep the folder belongs to."""
    content = read_json(sweep.output / "sweep.json")
    if not isinstance(content, dict) or "home" not in content:
        raise CheckpointError(
            f"{sweep.output / 'sweep.json'} is damaged; name another folder with --output"
        )
    return content


def _natural_path(sweep: Sweep) -> Path | None:
    """The natural start of all trials, where none of what varies changes it."""
    shared = all(one.key.startswith("method.") for one in sweep.varied)
    return sweep.output / "natural" if shared and sweep.config.starts_naturally else None


def _natural_start(sweep: Sweep) -> None:
    path = _natural_path(sweep)
    if path is None:
        return
    if not path.exists():
        config = natural_config(standardised_as_start(sweep.config))
        prepared = prepare(config, None, None, place=CachePlace.beside(path))
        RunFolder.create(path, settle(config, prepared)[0], prepared.training.kind)
    try:
        resume(path, quiet=True)
    except Interrupted:
        raise Interrupted(
            "stopped in the natural start of the trials; the same command goes on where it was"
        ) from None


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("a sweep needs optuna: pip install 'cure-at[sweeps]'") from None
    return optuna


def open_study(sweep: Sweep) -> Study:
    """Optuna's study of this sweep.

    Raises:
        ConfigError: when Optuna is not installed or cannot use the storage.
    """
    optuna = _optuna()
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = hashlib.sha256(json.dumps(sweep.identity(), sort_keys=True).encode()).hexdigest()
    try:
        storage: BaseStorage
        if sweep.storage is not None and "://" in sweep.storage:
            storage = RDBStorage(sweep.storage)
        else:
            # Lines of JSON; a journal in a file keeps no pickled copies, as one in Redis does.
            file = sweep.storage or str(sweep.output / "trials.journal")
            storage = JournalStorage(JournalFileBackend(file))
        study: Study = optuna.create_study(
            study_name=f"cure-{name[:16]}",
            storage=storage,
            directions=["maximize", "maximize"],
            load_if_exists=True,
        )
    except Exception as error:  # Whatever databases, their drivers and file systems raise.
        raise ConfigError(f"storage: Optuna cannot use it: {first_line(error)}") from None
    return study


# -- working -------------------------------------------------------------------------------------
#
# A trial whose worker was interrupted or killed is given up in Optuna's storage, and a new trial of
# the same settings is put in the queue that continues the same run: what Optuna's
# RetryFailedTrialCallback does for trials without a heartbeat, which a journal cannot record. That
# a worker lives is known by its lock on a file beside the run.


def work(sweep: Sweep, progress: Progress = no_progress) -> str:
    """Do trials until none is left to begin.

    Raises:
        Interrupted: after Ctrl-C; the next worker in this folder continues the trial.
    """
    home = str(_read_file(sweep)["home"])
    study = open_study(sweep)
    wanted = len(sweep.combinations()) or sweep.trials
    while (taken := _take(sweep, study, home)) is not None:
        trial, claim = taken
        with claim:
            _carry_out(sweep, study, trial)
        ended = ("finished", "failed", "repeated")
        done = sum(known["state"] in ended for known in trials(sweep))
        progress("trials", min(done, wanted), wanted)
    return "done"


def _take(sweep: Sweep, study: Study, home: str) -> tuple[Trial, IO[str]] | None:
    """A trial for this worker alone, and the locked file; None when all trials are begun."""
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    with sweep.alone():
        for trial in _latest(study).values():
            if trial.state == TrialState.RUNNING and _is_ours(trial, home):
                _requeue(sweep, study, trial)
        known = _latest(study)
        waiting = any(trial.state == TrialState.WAITING for trial in known.values())
        if not waiting and (sweep.grid is not None or len(known) >= sweep.trials):
            return None
        # Two workers never begin at the same number, so that no two draw alike.
        study.sampler = TPESampler(seed=sweep.seed + len(known))
        asked = study.ask({one.key: one.distribution() for one in sweep.varied})
        if sweep.grid is not None and not asked.user_attrs.get(PLANNED):
            # A worker on another machine has taken the last of the grid in this moment.
            study.tell(asked, state=TrialState.FAIL)
            return None
        asked.set_user_attr("home", home)
        claim = _claim(sweep, run_of(asked))
        assert claim is not None, "only a worker that holds the folder's lock claims"
        return asked, claim


def run_of(trial: Trial | FrozenTrial) -> int:
    """Number of the run that a trial trains: its own, or that of the trial it continues."""
    return int(trial.user_attrs.get("run", trial.number))


def _latest(study: Study) -> dict[int, FrozenTrial]:
    """The newest trial of each run, by number of the run."""
    every = study.get_trials(deepcopy=False)
    return {run_of(trial): trial for trial in sorted(every, key=lambda t: (run_of(t), t.number))}


def _requeue(sweep: Sweep, study: Study, trial: FrozenTrial) -> None:
    """Put the settings of a trial in the queue again if no process works on it."""
    from optuna.trial import TrialState

    claim = _claim(sweep, run_of(trial))
    if claim is None:
        return
    with claim:
        # Its worker may have finished it, and ended, since it was read.
        if study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING:
            return
        study.tell(trial.number, state=TrialState.FAIL)
        settings = _settings(sweep, trial)
        if settings is not None:
            study.enqueue_trial(settings, user_attrs={"run": run_of(trial), PLANNED: True})


def _is_ours(trial: FrozenTrial, home: str) -> bool:
    theirs = trial.user_attrs.get("home")
    if theirs is not None:
        return bool(theirs == home)
    began = trial.datetime_start
    return began is not None and time.time() - began.timestamp() > ORPHANED


def _claim(sweep: Sweep, number: int) -> IO[str] | None:
    """A lock that ends with its process, however that ends; None while another process has it."""
    path = sweep.folder(number)
    file = path.with_name(f".{path.name}.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _settings(sweep: Sweep, trial: FrozenTrial) -> dict[str, Any] | None:
    """What a trial tries; None when its worker was killed before that was settled."""
    settled = trial.system_attrs.get("fixed_params", {}) | trial.params
    keys = [one.key for one in sweep.varied]
    return {key: settled[key] for key in keys} if settled.keys() >= set(keys) else None


def _carry_out(sweep: Sweep, study: Study, trial: Trial) -> None:
    """Start or resume the run of a trial and tell Optuna the result."""
    from optuna.trial import TrialState

    def fail(reason: str) -> None:
        trial.set_user_attr("reason", reason)
        study.tell(trial, state=TrialState.FAIL)

    settings = {one.key: trial.params[one.key] for one in sweep.varied}
    run = run_of(trial)
    for number, other in _latest(study).items():
        if number < run and _settings(sweep, other) == settings:
            trial.set_user_attr("repeats", number)
            return fail(f"the same settings as trial {number}")
    path, natural = sweep.folder(run), _natural_path(sweep)
    start = {} if natural is None else {"start": str(natural)}
    name = {"name": f"{sweep.config.name}-{path.name}"}
    try:
        if path.exists():
            resume(path, quiet=True)
        else:
            given = dict(map(parse_override, sweep.settings))
            changes = layered(given, start | name, settings)
            train(sweep.recipe, changes, run=path, quiet=True)
    except Interrupted:
        raise Interrupted(
            f"stopped in trial {run}; the same command goes on where it was"
        ) from None
    except (TrainingStopped, ConfigError, DataError, ModelError) as error:
        return fail(str(error))
    folder = RunFolder.open(path)
    best = folder.status().best
    assert best is not None, "a finished run has a best epoch"
    assert best.validation is not None, "its accuracies are written with it"
    seconds = sum(line.total_seconds for line in folder.timing())
    trial.set_user_attr("facts", {"epoch": best.epoch, "seconds": seconds})
    study.tell(trial, [best.validation.natural, best.validation.robust])
    return None


def trials(sweep: Sweep) -> list[dict[str, Any]]:
    """All trials by number: settings, state, accuracies on the validation images in percent.

    A state is "waiting", "running" (or interrupted), "finished", "repeated" where Optuna drew the
    settings of an earlier trial again, or "failed"; the last two with a reason.
    """
    from optuna.trial import TrialState

    names = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}
    found = []
    for number, trial in _latest(open_study(sweep)).items():
        natural, robust = trial.values or (None, None)
        settings = _settings(sweep, trial)
        reason = trial.user_attrs.get("reason")
        if reason is None and settings is None and trial.state == TrialState.FAIL:
            reason = "interrupted before its settings were known"
        state = names.get(trial.state, trial.state.name.lower())
        facts = trial.user_attrs.get("facts", {})
        found.append(
            {
                "number": number,
                "settings": settings or {},
                "state": "repeated" if "repeats" in trial.user_attrs else state,
                "reason": reason,
                "natural": natural,
                "robust": robust,
                "epoch": facts.get("epoch"),
                "seconds": facts.get("seconds"),
                "command": sweep.command(settings or {}),
            }
        )
    return found
