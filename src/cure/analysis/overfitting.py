"""Robust overfitting: accuracy on training, validation and test images over the epochs of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cure.analysis.study import STUDIES, Rows, Study, keep, unique
from cure.attacks import PGD
from cure.attacks.losses import CROSS_ENTROPY
from cure.config import RunConfig
from cure.data import ImageSet, batches
from cure.data.sources import check_not_memory
from cure.errors import CheckpointError, ConfigError
from cure.evaluation.options import check_counts
from cure.evaluation.runner import Progress, Result, no_progress
from cure.evaluation.target import epoch_of, load_split
from cure.models import digest, load_weights
from cure.models.build import network_of
from cure.models.checkpoint import read_weights
from cure.runs.folder import RunFolder
from cure.runs.records import EpochMetrics
from cure.runs.run import Run
from cure.training.overfitting_detector import robust_overfitting
from cure.training.validation import validation_attack
from cure.utils import plotting as drawing
from cure.utils.engine import Engine
from cure.utils.io import check_free
from cure.utils.plotting import Picture
from cure.utils.random import generator
from cure.utils.stats import independent_difference, paired_difference, wilson

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
        natural.append((model(image).argmax(dim=1) == batch.label).cpu())
        robust.append((model(adversarial).argmax(dim=1) == batch.label).cpu())
    return {"natural": torch.cat(natural), "robust": torch.cat(robust)}


def overfitting(
    runs: str | Path | Run | Sequence[str | Path | Run],
    *,
    limit: int | None = 1000,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> Result:
    """Accuracies of every kept checkpoint of runs, best against last, and the gaps between splits.

    Test images are looked back at: the best checkpoint was chosen on validation images.  Robust is
    the validation split's own attack (PGD, ``training.validation_steps``).  What was measured is
    kept beside the result and not measured again.

    Args:
        runs: runs, or their folders, one or several.  ``training.keep_every`` is what makes them
            keep weights; of a run without it the best and the last are measured, and the curves
            are those of its metrics.
        limit: images of each split: the first so many for validation and test, a seeded draw for
            training (without augmentation); all with None.
        batch_size: images attacked at once; by default the run's.
        device: "auto", "cpu", "cuda".
        seed: of the draw of training images.
        output: a JSON file in the place of the first run's ``studies/``.
        progress: told (run and epoch, images done, images in all).

    Returns:
        ``runs``: for each its name, method, ``attack``, number of images a split, ``recorded``
        (epoch, validation and training figures of the metrics), ``measured`` (epoch, and for each
        split natural and robust accuracy with interval), ``best`` and ``last`` epoch, ``gap``
        (best less last in points with its interval, :func:`paired_difference`),
        ``generalisation`` (training less test, robust, :func:`independent_difference`), ``alarm``
        (epoch and sentence of :func:`robust_overfitting`) and ``missing``: what the
        run did not keep and the setting that keeps it.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.

    Source: Rice, Wong, Kolter, ICML 2020; CURE, ICLR 2024, Figs. 4, 5c and Table 3, whose
    protocol says neither what chose the best checkpoint nor by which attack.
    """
    check_free(output)
    check_counts(limit=limit, batch_size=batch_size)
    targets = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    if not targets:
        raise ConfigError("expected one or more runs")
    opened = [_Opened.of(target) for target in targets]
    engine = Engine.for_evaluation(device)
    if output is None:
        journal = _Journal(opened[0].folder.path / "studies" / "overfitting-verdicts.jsonl")
    else:
        journal = _Journal(Path(output).with_name(f"{Path(output).stem}-verdicts.jsonl"))
    body: Result = {"seed": seed, "runs": []}
    names: list[str] = []
    for run in opened:
        names.append(unique(run.folder.path.name, names))
        splits = run.images(limit, seed)
        size = batch_size or run.config.evaluation.batch_size
        body["runs"].append(run.studied(names[-1], splits, size, engine, journal, progress))
    return keep("overfitting", body, folder=opened[0].folder, output=output)


@dataclass(frozen=True)
class _Opened:
    """A run whose checkpoints are measured."""

    folder: RunFolder
    config: RunConfig
    network: nn.Module | None

    @classmethod
    def of(cls, target: str | Path | Run) -> _Opened:
        path = target.path if isinstance(target, Run) else target
        folder = RunFolder.open(path)
        folder.weights("last")
        return cls(folder, folder.config, target.network if isinstance(target, Run) else None)

    def images(self, limit: int | None, seed: int) -> dict[str, ImageSet]:
        """Some images of each split."""
        check_not_memory(self.config)
        found = {}
        for name in SPLITS:
            images = load_split(self.config.data, name)  # type: ignore[arg-type]
            if name == "train":
                draws = generator("cpu", seed, "overfitting")
                order = torch.randperm(len(images), generator=draws)
                images = images.subset(order.sort().values if limit is None else order[:limit])
            found[name] = images if limit is None else images.subset(slice(0, limit))
        return found

    def studied(
        self,
        name: str,
        splits: Mapping[str, ImageSet],
        batch_size: int,
        engine: Engine,
        journal: _Journal,
        progress: Progress,
    ) -> Result:
        """All that is told of the run."""
        folder, config, records = self.folder, self.config, self.folder.metrics()
        ends = {end: folder.weights(end) for end in ("best", "last")}
        epochs = {end: epoch_of(path) for end, path in ends.items()}
        kept = folder.kept()
        paths = {epochs[end] or 0: path for end, path in ends.items()} | kept
        attack = validation_attack(config, engine)
        settings = {
            "name": f"pgd{attack.steps}",
            "step_size": config.attack.step_size.text,
            "epsilon": config.threat.epsilon.text,
            "norm": config.threat.norm,
            "start": attack.start,
        }
        model = engine.place(network_of(config, folder.kind, self.network)).eval()
        known: dict[int, dict[str, Verdicts]] = {}
        for epoch in sorted(paths):
            load_weights(model, paths[epoch])
            weights = digest(read_weights(paths[epoch]))
            known[epoch] = {}
            for split, images in splits.items():
                key = _key(weights, images, settings, batch_size, engine)
                found = journal.known(key)
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
            "validation_images": config.data.validation,
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
            "alarm": _alarm(records, int(config.data.validation)),
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
    pictures = digest({"image": images.image, "label": images.label})
    parts = [weights, pictures, settings, batch_size, engine.device.type, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Journal:
    """Verdicts on checkpoints, a line each: the same checkpoint is not attacked twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Verdicts] = {}
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                key = record.pop("key")
                self._known[key] = {
                    kind: torch.tensor([letter == "1" for letter in text])
                    for kind, text in record.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # It was cut short, or is nothing of ours: measured again.

    def known(self, key: str) -> Verdicts | None:
        return self._known.get(key)

    def add(self, key: str, found: Verdicts) -> None:
        self._known[key] = found
        line = {"key": key} | {
            kind: "".join("01"[int(right)] for right in found[kind].tolist()) for kind in found
        }
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}); make its folder writable or "
                "name an output file elsewhere"
            ) from None


# What is told of a result.


def _points(part: Result) -> str:
    low, high = part["interval"]
    return f"{part['difference']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"


def _share(part: Result) -> str:
    low, high = part["interval"]
    return f"{part['accuracy']:.1f} % ({low:.1f} to {high:.1f})"


def _at(run: Result, epoch: int | None) -> Result:
    return next(point for point in run["measured"] if point["epoch"] == (epoch or 0))


def _findings(result: Result) -> list[str]:
    told = []
    for run in result["runs"]:
        name, attack = run["name"], run["attack"]["name"]
        best, last = _at(run, run["best"]), _at(run, run["last"])
        gap = run["gap"]["test"]["robust"]
        low, high = gap["interval"]
        if run["best"] == run["last"]:
            told.append(
                f"{name}: the last epoch, {run['last']}, is the best on validation images, so "
                f"there is no gap; robust accuracy ({attack}) on {run['n']['test']:,} test images "
                f"is {_share(last['test']['robust'])}."
            )
        else:
            verdict = (
                "the run overfits robustly"
                if low > 0
                else "the last is better"
                if high < 0
                else "chance alone explains it"
            )
            natural = run["gap"]["test"]["natural"]
            told.append(
                f"{name}: robust accuracy ({attack}) on {run['n']['test']:,} test images is "
                f"{_share(best['test']['robust'])} with the weights of epoch {run['best']}, the "
                f"best on validation images, and {_share(last['test']['robust'])} with those of "
                f"epoch {run['last']}, the last: best less last {_points(gap)}, {verdict}. Natural "
                f"accuracy: best less last {_points(natural)}."
            )
        earlier = (
            f"; at epoch {run['best']} the gap is {_points(run['generalisation']['best'])}"
            if run["best"] != run["last"]
            else ""
        )
        told.append(
            f"{name}: at the end {_share(last['train']['robust'])} of {run['n']['train']:,} "
            "training images, taken without augmentation, withstand the attack, training less "
            f"test {_points(run['generalisation']['last'])}{earlier}."
        )
        if run["alarm"] is not None:
            told.append(f"{name}: the alarm came at epoch {run['alarm']['epoch']}.")
        if run["missing"] is not None:
            told.append(f"{run['missing']}.")
    told.append(
        "Test images are looked back at here and choose nothing: the best epoch was chosen on "
        "validation images, where its lead is therefore a little too large."
    )
    return told


def _tables(result: Result) -> list[Rows]:
    header = ["run", "best epoch", "last epoch", "robust best, %", "robust last, %"]
    header += ["best - last, points", "train - test at the end, points", "alarm"]
    cells = []
    for run in result["runs"]:
        best, last = _at(run, run["best"]), _at(run, run["last"])
        gaps = [
            "{:+.1f} ({:+.1f} to {:+.1f})".format(gap["difference"], *gap["interval"])
            for gap in (run["gap"]["test"]["robust"], run["generalisation"]["last"])
        ]
        if run["best"] == run["last"]:
            gaps[0] = "0 (the same weights)"
        cells.append(
            [
                run["name"],
                *(str(run[key]) for key in ("best", "last")),
                *(_share(point["test"]["robust"]) for point in (best, last)),
                *gaps,
                "-" if run["alarm"] is None else f"epoch {run['alarm']['epoch']}",
            ]
        )
    tables = [Rows("Best against last, test images", header, cells)]
    for run in result["runs"]:
        head = [
            "epoch",
            *(f"{kind}, {split}" for kind in ("natural", "robust") for split in SPLITS),
        ]
        rows = [
            [
                str(point["epoch"]),
                *(
                    f"{point[split][kind]['accuracy']:.1f}"
                    for kind in ("natural", "robust")
                    for split in SPLITS
                ),
            ]
            for point in run["measured"]
        ]
        tables.append(Rows(f"Accuracy over epochs, %, {run['name']}", head, rows))
    return tables


def _curve(run: Result, split: str, kind: str) -> tuple[str, list[int], list[Result]]:
    """The densest curve there is of a split: its label, epochs, and figures."""
    if run["kept"]:
        label, points = split, run["measured"]
        return label, [point["epoch"] for point in points], [point[split][kind] for point in points]
    recorded = [record for record in run["recorded"] if record["validation"]]
    if split == "validation":
        return (
            f"{split}, as recorded",
            [record["epoch"] for record in recorded],
            [{"accuracy": record["validation"][kind]} for record in recorded],
        )
    key = {"robust": "robust_accuracy", "natural": "accuracy"}[kind]
    known = [record for record in run["recorded"] if key in record["train"]]
    if split == "train" and known:
        return (
            "training batches, as recorded",
            [record["epoch"] for record in known],
            [{"accuracy": 100 * record["train"][key]} for record in known],
        )
    points = run["measured"]
    label = f"{split}, best and last"
    return label, [point["epoch"] for point in points], [point[split][kind] for point in points]


def _pictures(result: Result) -> list[Picture]:
    pictures = [_run_picture(run, number) for number, run in enumerate(result["runs"], 1)]
    if len(result["runs"]) > 1:
        pictures.append(_together(result["runs"]))
    return pictures


def _run_picture(run: Result, number: int) -> Picture:
    figure, panels = drawing.canvas(columns=2, width=8.4, height=3.8)
    for axes, kind in zip(panels, ("robust", "natural"), strict=True):
        for place, split in enumerate(SPLITS):
            label, epochs, parts = _curve(run, split, kind)
            alone = not run["kept"] and "recorded" not in label
            style = drawing.series(place) | ({"linestyle": "none"} if alone else {})
            dense = len(epochs) > 25
            axes.plot(
                epochs,
                [part["accuracy"] for part in parts],
                label=label,
                markevery=max(1, len(epochs) // 12) if dense else 1,
                **style,
            )
            if parts and "interval" in parts[0]:
                low, high = zip(*(part["interval"] for part in parts), strict=True)
                colour = drawing.COLOURS[place]
                if alone:
                    axes.vlines(epochs, low, high, color=colour, alpha=0.5)
                else:
                    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(run["best"] or 0, color=drawing.INK, linestyle=":", linewidth=1)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("epoch")
        what = f"accuracy under {run['attack']['name']}" if kind == "robust" else "natural accuracy"
        axes.set_ylabel(f"{what}, %")
        if kind == "natural" or not run["kept"]:
            drawing.legend(axes, fontsize=8)
    best, last = _at(run, run["best"]), _at(run, run["last"])
    return drawing.picture(
        figure,
        f"overfitting-{number}",
        f"Accuracy over the epochs of {run['name']}",
        f"Left under attack, right on natural images: curves of training, validation and test "
        f"images with 95 % intervals where checkpoints were measured. The dotted line is epoch "
        f"{run['best']}, the best on validation images. On test images robust accuracy is "
        f"{best['test']['robust']['accuracy']:.1f} % there and "
        f"{last['test']['robust']['accuracy']:.1f} % at the last epoch, {run['last']}.",
    )


def _together(runs: Sequence[Result]) -> Picture:
    """Robust accuracy of all runs on test images, or on validation images where some kept none."""
    split = "test" if all(run["kept"] for run in runs) else "validation"
    curves = {}
    for run in runs:
        _, epochs, parts = _curve(run, split, "robust")
        curves[run["name"]] = [
            (epoch, part["accuracy"]) for epoch, part in zip(epochs, parts, strict=True)
        ]
    attack = " or ".join(sorted({run["attack"]["name"] for run in runs}))
    ends = ", ".join(f"{name} {points[-1][1]:.1f} %" for name, points in curves.items() if points)
    return drawing.lines(
        "overfitting-runs",
        f"Robust accuracy on {split} images over epochs",
        curves,
        x="epoch",
        y=f"accuracy under {attack}, %",
        description=f"A curve a run. At the last epoch: {ends}.",
    )


STUDIES.register("overfitting")(
    Study(
        "overfitting",
        "Robust overfitting",
        "Does robust accuracy on new images fall while training goes on, and by how much?",
        "cure train RECIPE training.keep_every=5 --run RUN; cure analyse overfitting RUN",
        _findings,
        _tables,
        _pictures,
    )
)
