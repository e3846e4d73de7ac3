"""Robust overfitting: accuracy on training, validation and test images over the epochs of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cure.analysis.render import (
    MISSING,
    StudyTable,
    View,
    accuracy,
    accuracy_series,
    listed,
    number,
    points,
)
from cure.analysis.study import STUDIES, RunStudyOptions, Study, open_runs, save_result
from cure.attacks import PGD
from cure.attacks.losses import CROSS_ENTROPY
from cure.config import RunConfig
from cure.data import ImageSet, batches, load_split
from cure.data.cache import CachePlace
from cure.data.sources import check_not_memory
from cure.errors import CheckpointError, ConfigError, DataError
from cure.evaluation.options import check_counts
from cure.evaluation.runner import Progress, Result
from cure.models import digest, load_weights
from cure.models.build import network_of
from cure.models.checkpoint import read_weights
from cure.models.checks import predicted
from cure.runs.folder import RunFolder, epoch_of
from cure.runs.records import EpochMetrics
from cure.runs.run import Run
from cure.training.overfitting_detector import robust_overfitting
from cure.training.validation import validation_attack
from cure.utils.engine import Engine
from cure.utils.modes import in_evaluation
from cure.utils.plotting import Chart, Panel, Series
from cure.utils.random import generator
from cure.utils.stats import independent_difference, paired_difference, wilson

NAME = "overfitting"
SPLITS = ("train", "validation", "test")

Verdicts = dict[str, Tensor]
"""Whether each image [N] is right: "natural" as it is, "robust" attacked."""


@torch.no_grad()
def verdicts(
    model: nn.Module, images: ImageSet, attack: PGD, engine: Engine, batch_size: int
) -> Verdicts:
    """Which images a network has right as they are and under the attack of the validation split.

    The random starts are those of :meth:`Trainer.validate`, so that epochs compare.
    """
    images = images.to(engine.device)
    natural, robust = [], []
    for batch in batches(images, batch_size):
        image = engine.arrange(batch.image)
        draws = engine.generator(0, "validation", batch.step)
        adversarial = attack(model, image, batch.label, CROSS_ENTROPY, draws)
        natural.append((predicted(model(image)) == batch.label).cpu())
        robust.append((predicted(model(adversarial)) == batch.label).cpu())
    return {"natural": torch.cat(natural), "robust": torch.cat(robust)}


@dataclass(frozen=True, kw_only=True)
class OverfittingOptions(RunStudyOptions):
    """Options of the study.

    Attributes:
        limit: images of each split: the first so many for validation and test, a seeded draw for
            training (without augmentation); all with None.
        batch_size: images attacked at once; by default the run's.
        device: "auto", "cpu", "cuda".
        seed: of the draw of training images.
    """

    limit: Annotated[int | None, "Images of each split."] = 1000
    batch_size: Annotated[int | None, "Images at once."] = None
    device: Annotated[str, "auto, cpu, cuda."] = "auto"
    seed: Annotated[int, "Seed of all draws."] = 0

    def __post_init__(self) -> None:
        check_counts(limit=self.limit, batch_size=self.batch_size)


def compute(targets: Sequence[Any], options: OverfittingOptions, progress: Progress) -> Result:
    """Accuracies of every kept checkpoint of runs, best against last, and the gaps between splits.

    ``training.keep_every`` makes runs keep weights; of a run without it the best and the last are
    measured, and the curves are those of its metrics.  The best checkpoint was chosen on validation
    images; the test images choose nothing.  Robust accuracy is under the attack of the validation
    split (PGD, ``training.validation_steps``).  What was measured is kept beside the result and not
    measured again.

    Returns:
        ``runs``: for each its name, method, ``attack``, number of images a split, ``recorded``
        (epoch, validation and training figures of the metrics), ``measured`` (epoch, and for each
        split natural and robust accuracy with interval), ``best`` and ``last`` epoch, ``gap``
        (best minus last in points with its interval, :func:`paired_difference`),
        ``generalisation`` (training minus test, robust, :func:`independent_difference`), ``alarm``
        (epoch and sentence of :func:`robust_overfitting`) and ``missing``: what the
        run did not keep and the setting that keeps it.

    Source: Rice, Wong, Kolter, ICML 2020; CURE, ICLR 2024, Figs. 4, 5c and Table 3, whose
    protocol says neither what chose the best checkpoint nor by which attack.
    """
    named = open_runs(targets)
    for name, folder in named:
        if not folder.metrics():
            raise ConfigError(
                f"{name} has no epochs: it was not trained, or chosen between weights by `cure "
                "tradeoff`; name the runs whose weights these were"
            )
    runs = [
        _Opened(name, folder, folder.config, target.network if isinstance(target, Run) else None)
        for (name, folder), target in zip(named, targets, strict=True)
    ]
    for run in runs:
        run.folder.weights("last")
    engine = Engine.for_evaluation(options.device)
    if options.output is None:
        journal = _Journal(runs[0].folder.path / "studies" / "overfitting-verdicts.jsonl")
    else:
        output = Path(options.output)
        journal = _Journal(output.with_name(f"{output.stem}-verdicts.jsonl"))
    body: Result = {"seed": options.seed, "runs": []}
    for run in runs:
        splits = run.images(options.limit, options.seed)
        size = options.batch_size or run.config.evaluation.batch_size
        body["runs"].append(run.studied(splits, size, engine, journal, progress))
    return save_result(NAME, body, folder=runs[0].folder, output=options.output)


@dataclass(frozen=True)
class _Opened:
    """A run whose checkpoints are measured."""

    name: str
    folder: RunFolder
    config: RunConfig
    network: nn.Module | None

    def images(self, limit: int | None, seed: int) -> dict[str, ImageSet]:
        """Some images of each split."""
        check_not_memory(self.config)
        found = {}
        place = CachePlace.beside(self.folder.path)
        for name in SPLITS:
            images = load_split(self.config.data, name, place=place)  # type: ignore[arg-type]
            if moved := self.folder.images_changed(images):
                raise DataError(f"{moved}; restore them, or train the run anew")
            if name == "train":
                draws = generator("cpu", seed, "overfitting")
                order = torch.randperm(len(images), generator=draws)
                images = images.subset(order.sort().values if limit is None else order[:limit])
            found[name] = images if limit is None else images.subset(slice(0, limit))
        return found

    def studied(
        self,
        splits: Mapping[str, ImageSet],
        batch_size: int,
        engine: Engine,
        journal: _Journal,
        progress: Progress,
    ) -> Result:
        """Accuracies of all kept checkpoints, and what follows from them."""
        name, folder, config = self.name, self.folder, self.config
        records = folder.metrics()
        ends = {end: folder.weights(end) for end in ("best", "last")}
        epochs = {end: epoch_of(path) for end, path in ends.items()}
        kept = folder.kept()
        paths = {epochs[end] or 0: path for end, path in ends.items()} | kept
        attack = validation_attack(config, engine)
        settings = {
            "name": f"pgd{attack.steps}",
            "step_size": str(attack.step_size),
            "epsilon": config.threat.epsilon.text,
            "norm": config.threat.norm,
            "start": attack.start,
        }
        model = in_evaluation(engine.place(network_of(config, folder.kind, self.network)))
        known: dict[int, dict[str, Verdicts]] = {}
        for epoch in sorted(paths):
            load_weights(model, paths[epoch])
            weights = digest(read_weights(paths[epoch]))
            known[epoch] = {}
            for split, images in splits.items():
                key = _key(weights, images, settings, batch_size, engine)
                found = journal.known(key, len(images))
                if found is None:
                    found = verdicts(model, images, attack, engine, batch_size)
                    journal.add(key, found)
                known[epoch][split] = found
            progress(f"{name} epoch {epoch}", len(splits), len(splits))
        best, last = known[epochs["best"] or 0], known[epochs["last"] or 0]
        missing = None
        if not kept:
            missing = (
                f"{name} kept no weights but the best and the last, so there are no "
                "curves of training and test images; train it with training.keep_every=N"
            )
        return {
            "name": name,
            "method": config.method.name,
            "state": folder.status().state,
            "epochs": config.training.epochs,
            "attack": settings,
            "n": {split: len(images) for split, images in splits.items()},
            "validation_images": folder.validation_images(),
            "recorded": [
                {
                    "epoch": record.epoch,
                    "train": record.train,
                    "validation": record.validation and record.validation.content(),
                }
                for record in records
            ],
            "measured": [
                {"epoch": epoch} | {split: _accuracies(v) for split, v in of_split.items()}
                for epoch, of_split in known.items()
            ],
            "kept": list(kept),
            "best": epochs["best"],
            "last": epochs["last"],
            "gap": {
                split: {kind: _gap(best[split][kind], last[split][kind]) for kind in best[split]}
                for split in splits
            },
            "generalisation": {
                end: _between(of_split["train"]["robust"], of_split["test"]["robust"])
                for end, of_split in (("best", best), ("last", last))
            },
            "alarm": _alarm(records, folder.validation_images()),
            "missing": missing,
        }


def _accuracies(found: Verdicts) -> Result:
    return {
        kind: {
            "accuracy": 100 * int(right.sum()) / len(right),
            "interval": list(wilson(int(right.sum()), len(right))),
            "correct": int(right.sum()),
            "n": len(right),
        }
        for kind, right in found.items()
    }


def _gap(best: Tensor, last: Tensor) -> Result:
    """Best less last, in points."""
    difference, low, high = paired_difference(
        int((last & ~best).sum()), int((best & ~last).sum()), len(best)
    )
    return {"difference": difference, "interval": [low, high]}


def _between(train: Tensor, test: Tensor) -> Result:
    difference, low, high = independent_difference(
        (int(train.sum()), len(train)), (int(test.sum()), len(test))
    )
    return {"difference": difference, "interval": [low, high]}


def _alarm(records: Sequence[EpochMetrics], images: int) -> Result | None:
    """When the alarm came first, and what it said."""
    for count in range(1, len(records) + 1):
        sentence = robust_overfitting(records[:count], images)
        if sentence is not None:
            return {"epoch": records[count - 1].epoch, "sentence": sentence}
    return None


def _key(
    weights: str, images: ImageSet, settings: Mapping[str, Any], batch_size: int, engine: Engine
) -> str:
    """All that verdicts depend on, as one word."""
    pictures = images.digest()
    parts = [weights, pictures, settings, batch_size, engine.device.type, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Journal:
    """Verdicts on checkpoints, a line each: the same checkpoint is not attacked twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Verdicts] = {}
        self._start = ""
        """What the next line begins with: the end of one that was cut short."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        if text and not text.endswith("\n"):
            self._start = "\n"
        for line in text.splitlines():
            try:
                record = json.loads(line)
                key = record.pop("key")
                self._known[key] = {
                    kind: torch.tensor([letter == "1" for letter in text])
                    for kind, text in record.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # It was cut short, or is nothing of ours: measured again.

    def known(self, key: str, images: int) -> Verdicts | None:
        """The verdicts on so many images; None where they are not kept, or not whole."""
        found = self._known.get(key, {})
        whole = all(len(found.get(kind, ())) == images for kind in ("natural", "robust"))
        return found if whole else None

    def add(self, key: str, found: Verdicts) -> None:
        self._known[key] = found
        line = {"key": key} | {
            kind: "".join("01"[int(right)] for right in found[kind].tolist()) for kind in found
        }
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{self._start}{json.dumps(line)}\n")
            self._start = ""
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}); make its folder writable or "
                "name an output file elsewhere"
            ) from None


# What is shown of a result.


def view(result: Result) -> View:
    """Best against last checkpoint, and accuracy over epochs."""
    runs = result["runs"]
    header = ["run", "best epoch", "last epoch", "robust best, %", "robust last, %"]
    header += ["best - last, points", "train - test at the end, points", "warning"]
    rows, said = [], []
    for run in runs:
        best, last = _at(run, run["best"]), _at(run, run["last"])
        same = run["best"] == run["last"]
        gap = "0 (same weights)" if same else points(run["gap"]["test"]["robust"])
        warned = MISSING if run["alarm"] is None else f"epoch {run['alarm']['epoch']}"
        ends = [accuracy(part["test"]["robust"]) for part in (best, last)]
        between = points(run["generalisation"]["last"])
        rows.append([run["name"], str(run["best"]), str(run["last"]), *ends, gap, between, warned])
        said.append(
            f"{run['name']} {ends[0]} % at its best epoch, {run['best']}, and {ends[1]} % at its "
            f"last, {run['last']}, a difference of {gap} points"
            + (f"; {run['missing']}" if run["missing"] is not None else "")
        )
    tables = [StudyTable("Best against last checkpoint, test images", header, rows)]
    tables += [_over_epochs(run) for run in runs]
    figures = [_curves(run, serial) for serial, run in enumerate(runs, 1)]
    if len(runs) > 1:
        figures.append(_together(runs))
    images = " or ".join(f"{n:,}" for n in sorted({run["n"]["test"] for run in runs}))
    finding = f"Robust accuracy ({_attacks(runs)}, {images} test images): {listed(said)}."
    return View(finding, tables, figures)


def _at(run: Result, epoch: int | None) -> Result:
    return next(point for point in run["measured"] if point["epoch"] == (epoch or 0))


def _over_epochs(run: Result) -> StudyTable:
    columns = [(kind, split) for kind in ("natural", "robust") for split in SPLITS]
    rows = [
        [
            str(point["epoch"]),
            *(number(point[split][kind]["accuracy"]) for kind, split in columns),
        ]
        for point in run["measured"]
    ]
    head = ["epoch", *(f"{kind}, {split}" for kind, split in columns)]
    return StudyTable(f"Accuracy over epochs, %, {run['name']}", head, rows)


def _curve(run: Result, split: str, kind: str) -> Series:
    """The densest curve there is of a split."""
    if not run["kept"]:
        recorded = [record for record in run["recorded"] if record["validation"]]
        key = {"robust": "robust_accuracy", "natural": "accuracy"}[kind]
        trained = [record for record in run["recorded"] if key in record["train"]]
        if split == "validation":
            epochs = [record["epoch"] for record in recorded]
            values = [record["validation"][kind] for record in recorded]
            return Series("validation, as recorded", epochs, values, style=1)
        if split == "train" and trained:
            epochs = [record["epoch"] for record in trained]
            values = [100 * record["train"][key] for record in trained]
            return Series("training batches, as recorded", epochs, values, style=0)
    measured = run["measured"]
    return accuracy_series(
        split if run["kept"] else f"{split}, best and last",
        [point["epoch"] for point in measured],
        [point[split][kind] for point in measured],
        line=bool(run["kept"]),
        style=SPLITS.index(split),
    )


def _curves(run: Result, serial: int) -> Chart:
    panels = [
        Panel(
            [_curve(run, split, kind) for split in SPLITS],
            "epoch",
            f"accuracy under {run['attack']['name']}, %"
            if kind == "robust"
            else "natural accuracy, %",
            marks=[(run["best"] or 0, "best")],
        )
        for kind in ("robust", "natural")
    ]
    best, last = (_at(run, run[end])["test"]["robust"]["accuracy"] for end in ("best", "last"))
    return Chart(
        f"overfitting-{serial}",
        f"Accuracy over the epochs of {run['name']}",
        "Training, validation and test images, with 95 % intervals where checkpoints were "
        f"measured. On test images robust accuracy is {best:.1f} % at the best epoch and "
        f"{last:.1f} % at the last.",
        panels,
        columns=2,
        width=8.4,
    )


def _attacks(runs: Sequence[Result]) -> str:
    return " or ".join(sorted({run["attack"]["name"] for run in runs}))


def _together(runs: Sequence[Result]) -> Chart:
    """Robust accuracy of all runs on test images, or on validation images where some kept none."""
    split = "test" if all(run["kept"] for run in runs) else "validation"
    series = [
        replace(_curve(run, split, "robust"), label=run["name"], style=place)
        for place, run in enumerate(runs)
    ]
    ends = listed(f"{each.label} {number(each.y[-1])} %" for each in series if each.y)
    return Chart(
        "overfitting-runs",
        f"Robust accuracy on {split} images over epochs",
        f"At the last epoch: {ends}.",
        [Panel(series, "epoch", f"accuracy under {_attacks(runs)}, %")],
    )


overfitting: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Robust overfitting",
        "Does robust accuracy on new images fall while training goes on, and by how much?",
        "cure train RECIPE training.keep_every=5 --run RUN; cure analyse overfitting RUN",
        OverfittingOptions,
        compute,
        view,
    )
)
