"""From a run to a file that other programs load: the function ``cure.export``."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from cure.config import OBJECT, checked
from cure.data import ImageSet, to_unit
from cure.errors import CheckpointError, ConfigError, CureError, CureNote, ModelError, unknown
from cure.evaluation.calibration import fit_temperature
from cure.evaluation.options import TargetKeywords
from cure.evaluation.target import Target
from cure.exporters.hub import check_repository, push_folder, write_hub_folder
from cure.exporters.onnx import OPSET, captured, lower_precision, onnx_model, quantise
from cure.models import describe, digest, save_weights
from cure.models.artefact import WEIGHTS, from_pretrained
from cure.models.contract import Contract, Measured, Normalisation, Preprocessing
from cure.models.onnx_network import OnnxNetwork
from cure.models.program_network import ProgramNetwork
from cure.models.wrapper import constants_inside, core, tensors_of
from cure.runs.folder import RunFolder
from cure.runs.results import EvaluationRecord, Finding, Findings
from cure.runs.run import Run
from cure.utils.io import first_line, is_there, user_path, write_atomically
from cure.utils.modes import in_evaluation
from cure.utils.stats import wilson

Format = Literal["onnx", "safetensors", "torch-export", "hub"]
FILES: dict[str, str] = {
    "onnx": "model.onnx",
    "safetensors": WEIGHTS,
    "torch-export": "model.pt2",
}
"""Name of the file in the folder, by format; ``hub`` is a folder of several."""

TOLERANCE = 1e-4
"""Largest difference of logits between the file and the run, as a share of the largest logit."""

AGREEMENT = 0.9
"""Least share of images that an int8 file must give the class that the float network gives."""

IMAGES = 1000
"""Validation images that are read: half of them check the file, half calibrate it."""


def export(
    run: Run | str | Path,
    to: Format,
    folder: str | Path,
    *,
    int8: bool = False,
    opset: int = OPSET,
    push: str | None = None,
    **options: Unpack[TargetKeywords],
) -> Path:
    """Write a trained network as a file (or hub folder) that other programs load.

    Normalisation is inside (of ``safetensors``, which hold weights alone, in the metadata);
    classes, size, threat, accuracies and versions are in the metadata
    (:class:`~cure.models.contract.Contract`).  The file is read back and compared with the run on
    validation images, and is not kept where its logits differ by more than :data:`TOLERANCE` of
    the largest logit; an int8 file where it gives fewer than :data:`AGREEMENT` of the images the
    same class.

    Args:
        run: a run or its folder.
        to: "onnx", "safetensors", "torch-export" or "hub".
        folder: where to write, made where it does not exist: ``model.onnx`` (``model.int8.onnx``),
            ``model.safetensors`` or ``model.pt2`` in it; a hub folder must be new.  A path that
            ends in the format's suffix is the file itself.
        int8: of "onnx": also quantise it, with half of the validation images.
        opset: of "onnx": version of its operators.
        push: of "hub": also upload the folder to this repository (``owner/name``); a new one
            is private.
        options: ``checkpoint``, ``data``, ``data_options``, ``limit``: see
            :class:`~cure.evaluation.options.TargetOptions`.

    Returns:
        The file, or the hub folder.

    Raises:
        CureError: when the network cannot be exported (in one sentence, with the operator's name),
            or the file does not compute what the run does; nothing is written then.

    >>> cure.export("runs/mine", "onnx", "deploy")                      # doctest: +SKIP
    PosixPath('deploy/model.onnx')
    """
    if to not in get_args(Format):
        raise ConfigError(unknown("format", to, get_args(Format)))
    opset = checked("opset", opset, int)
    if int8 and to != "onnx":
        raise ConfigError(f"int8 goes with the format onnx, got {to}")
    if push is not None and to != "hub":
        raise ConfigError(f"push goes with the format hub, got {to}")
    if push is not None:
        check_repository(push)
    place = _place(user_path(folder), to, int8)
    source = _Source.of(run, options)
    # Where the file will be moved from: a folder that is there already, on the same disk.
    there = next(parent for parent in place.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".export-") as scratch:
            made = _WRITERS[to](source, Path(scratch), int8, opset)
            place.parent.mkdir(parents=True, exist_ok=True)
            if made.is_dir():
                made.rename(place)
            else:
                write_atomically(place, lambda temporary: shutil.move(made, temporary))
    except OSError as error:
        raise CheckpointError(
            f"{place} cannot be written ({first_line(error)}); name another folder"
        ) from None
    if push is not None:
        push_folder(place, push)
    return place


def _place(folder: Path, to: str, int8: bool) -> Path:
    """The file or folder to make."""
    if to == "hub":
        place = folder
    else:
        name = FILES[to].replace(".onnx", ".int8.onnx") if int8 else FILES[to]
        place = folder if folder.suffix == Path(name).suffix else folder / name
    if is_there(place):
        raise ConfigError(f"{place} exists and is kept; name another folder")
    return place


@dataclass(frozen=True)
class _Source:
    """The network of a run, the images that check its files, and what is known of it.

    Attributes:
        model: in evaluation mode, on the processor.
        check: pixels [N, C, H, W] in [0, 1] of the images that check a file.
        calibration: those that calibrate int8.
        contract: without what only the file can tell.
    """

    model: nn.Module
    check: Tensor
    calibration: Tensor
    contract: Contract

    @classmethod
    def of(cls, run: Run | str | Path, options: TargetKeywords) -> _Source:
        how = TargetKeywords(split="validation", limit=IMAGES) | options
        target = Target.of(run, **how)
        if target.folder is None:
            raise ConfigError(f"expected a run folder to export, got {target.name}")
        images, model = target.load()
        model = in_evaluation(deepcopy(model).cpu()).requires_grad_(False)
        pixels = to_unit(images.rows(slice(None)))
        with torch.no_grad():
            logits = torch.cat([model(part) for part in torch.split(pixels, 256)])
        temperature = fit_temperature(logits, images.label)
        contract = _contract(target, target.folder, images, model, temperature)
        odd = 1 if len(pixels) > 1 else 0
        return cls(model, pixels[odd::2], pixels[::2], contract)

    def checked(self, network: Callable[[Tensor], Tensor], version_of: str = "") -> Contract:
        """The contract of a file whose logits were compared with those of the run.

        Args:
            network: what was read back from the file.
            version_of: package whose version the file depends on.

        Raises:
            ModelError: when they differ.
        """
        theirs, ours = self._both(network)
        difference = float((theirs - ours).abs().max())
        allowed = TOLERANCE * max(1.0, float(ours.abs().max()))
        if not difference <= allowed:  # also where it is not a number
            raise ModelError(
                f"the file's logits differ from those of the run by {difference:.2g} on "
                f"{len(ours)} validation images, allowed is {allowed:.2g}; it was not kept: "
                "export to another format, or report this network"
            )
        found = {"n": len(ours), "largest_difference": difference, "tolerance": allowed}
        return self.contract.model_copy(update={"check": found, "versions": _versions(version_of)})

    def agreeing(self, network: Callable[[Tensor], Tensor]) -> Contract:
        """The contract of an int8 file that gives most images the class of the float network.

        Raises:
            ModelError: when it gives too many another class.
        """
        theirs, ours = self._both(network)
        same = int((theirs.argmax(dim=1) == ours.argmax(dim=1)).sum())
        found = {
            "n": len(ours),
            "same_class": same,
            "interval": list(wilson(same, len(ours))),
            "largest_difference": float((theirs - ours).abs().max()),
            "calibration_images": len(self.calibration),
        }
        if same < AGREEMENT * len(ours):
            raise ModelError(
                f"int8 gives {len(ours) - same} of {len(ours)} validation images another class, "
                f"allowed is one in {round(1 / (1 - AGREEMENT))}; it was not kept: export "
                "without int8"
            )
        return self.contract.model_copy(
            update={"check": found, "precision": "int8", "versions": _versions("onnxruntime")}
        )

    @torch.no_grad()
    def _both(self, network: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the file and of the run; parts of unequal size try its batch dimension."""
        parts = [self.check[:1], *torch.split(self.check[1:], 64)]
        parts = [part for part in parts if len(part)]
        theirs = torch.cat([network(part) for part in parts])
        return theirs, torch.cat([self.model(part) for part in parts])


def _contract(
    target: Target, folder: RunFolder, images: ImageSet, model: nn.Module, temperature: float
) -> Contract:
    assert target.config is not None
    config, kind = target.config, folder.kind
    inside = constants_inside(model)
    constants = None
    if inside is not None:
        constants = Normalisation(mean=list(inside[0]), std=list(inside[1]))
    about, checkpoint = describe(model), target.options.checkpoint
    record = _evaluation(folder, checkpoint)
    return Contract(
        classes=list(kind.classes),
        preprocessing=Preprocessing(
            size=list(kind.size),
            channels=kind.channels,
            resize=config.data.resize,
            fit=config.data.fit,
            background=config.data.background,
        ),
        normalisation=constants,
        threat={"norm": config.threat.norm, "epsilon": str(config.threat.epsilon)},
        accuracies=_at_the_end(folder, checkpoint) if record is None else _accuracies(record),
        warnings=_warnings(folder, checkpoint, record),
        data={
            "name": images.name,
            "split": images.split,
            "n": len(images),
            "sha256": images.digest(),
        },
        network={
            "name": config.model.name,
            "options": config.model.options,
            "new_head": config.draws_head,
            "parameters": about["parameters"],
        },
        run={
            "name": config.name,
            "method": config.method.name,
            "checkpoint": checkpoint,
            "epoch": target.facts["epoch"],
            "seed": config.seed,
            "shares": folder.shares(),
            "weights_sha256": digest(tensors_of(core(model))),
        },
        temperature=temperature,
        versions=_versions(),
    )


def _evaluation(folder: RunFolder, checkpoint: str) -> EvaluationRecord | None:
    """The largest, then newest evaluation of the checkpoint on the run's own images, test images
    first."""
    known = [
        record
        for record in folder.evaluations()
        if record.model.checkpoint == checkpoint and record.data.own is not False
    ]
    known.sort(key=lambda record: (record.data.split == "test", record.natural.n, record.time))
    return known[-1] if known else None


def _accuracies(record: EvaluationRecord) -> list[Measured]:
    return [
        Measured(
            attack=name,
            accuracy=part.accuracy,
            interval=part.interval,
            n=part.n,
            split=record.data.split,
            norm=None if name == "natural" else record.threat.norm,
            epsilon=None if name == "natural" else record.threat.epsilon_text,
        )
        for name, part in {"natural": record.natural, **record.attacks}.items()
    ]


def _warnings(folder: RunFolder, checkpoint: str, record: EvaluationRecord | None) -> list[str]:
    """What the run knows against its accuracies: no gain, failed checks, estimates."""
    said = []
    outcome = folder.outcome() if checkpoint == "best" else None
    if outcome is not None and outcome.end is not None and outcome.gained is False:
        start, end = outcome.start, outcome.end
        said.append(
            f"training gained no robust accuracy: {start.robust:.1f} % before, {end.robust:.1f} % "
            f"after, under PGD-{end.steps} on {end.n:,} validation images"
        )
    found = {} if record is None or record.diagnosis is None else _checks(record.diagnosis)
    for diagnosis in folder.diagnoses():
        if diagnosis.model.checkpoint == checkpoint and diagnosis.data.own is not False:
            found |= _checks(diagnosis)
    failed = [check for check in found.values() if check.status == "fail"]
    said += [f"check {check.name} of the diagnosis failed: {check.meaning}" for check in failed]
    for name, part in ({} if record is None else record.attacks).items():
        if (estimate := part.estimate()) is not None:
            said.append(f"{name}: {estimate}")
    return [sentence.rstrip(".") for sentence in said]


def _checks(findings: Findings) -> dict[str, Finding]:
    return {check.name: check for check in findings.checks}


def _at_the_end(folder: RunFolder, checkpoint: str) -> list[Measured]:
    """Those on validation images with which the training ended."""
    outcome = folder.outcome()
    if outcome is None or outcome.end is None or checkpoint != "best":
        return []
    end, threat = outcome.end, folder.config.threat
    found = []
    for name, accuracy in (("natural", end.natural), (f"pgd{end.steps}", end.robust)):
        robust = name != "natural"
        found.append(
            Measured(
                attack=name,
                accuracy=accuracy,
                interval=list(wilson(round(accuracy * end.n / 100), end.n)),
                n=end.n,
                split="validation",
                norm=threat.norm if robust else None,
                epsilon=str(threat.epsilon) if robust else None,
            )
        )
    return found


def _versions(*packages: str) -> dict[str, str]:
    from cure.utils.version import VERSION

    found = {"cure": VERSION, "torch": torch.__version__}
    for package in filter(None, packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # such as onnxruntime-gpu
            found[package] = "unknown"
    return found


# Writers: (source, empty folder, int8, opset) to the file or folder that they made and checked.


def _write_onnx(source: _Source, scratch: Path, int8: bool, opset: int) -> Path:
    made = scratch / "model.onnx"
    program = captured(source.model, source.contract.kind)
    proto = onnx_model(program, source.contract, opset)  # Says where a package is missing.
    import onnx

    onnx.save(proto, made)
    try:
        contract = source.checked(OnnxNetwork(made), "onnx")
    except CureError as error:
        kind = lower_precision(program)
        if kind is None:
            raise
        raise ModelError(
            f"ONNX cannot hold this network: its forward computes in {kind}, as with "
            "torch.autocast; remove that from its forward (training.precision computes so in "
            "training alone), or export with --to safetensors"
        ) from error
    if int8:
        smaller = scratch / "int8.onnx"
        quantise(made, smaller, source.calibration)
        contract, made = source.agreeing(OnnxNetwork(smaller)), smaller
        proto = onnx.load(made)
    onnx.helper.set_model_props(proto, contract.metadata())
    onnx.checker.check_model(proto)
    onnx.save(proto, made)
    return made


def _write_safetensors(source: _Source, scratch: Path, int8: bool, opset: int) -> Path:  # noqa: ARG001
    made = scratch / WEIGHTS
    outside = source.contract
    if outside.normalisation is not None:
        constants = outside.normalisation.model_copy(update={"inside": False})
        outside = outside.model_copy(update={"normalisation": constants})
    save_weights(source.model, made, outside.metadata())
    read = _read_back(made, source)
    contract = source.checked(read)
    save_weights(
        source.model,
        made,
        contract.model_copy(update={"normalisation": outside.normalisation}).metadata(),
    )
    return made


def _write_program(source: _Source, scratch: Path, int8: bool, opset: int) -> Path:  # noqa: ARG001
    made = scratch / "model.pt2"
    program = captured(source.model, source.contract.kind)
    contract = source.checked(program.module())
    torch.export.save(program, made, extra_files=contract.metadata())
    source.checked(torch.export.load(made).module())
    try:
        read = ProgramNetwork(made)
    except CureError as error:
        reason = str(error).removeprefix(f"{made}: ")
        warnings.warn(
            f"evaluations and cure.from_pretrained do not run this file as PyTorch does: {reason}",
            CureNote,
            stacklevel=2,
        )
    else:
        source.checked(read)
    return made


def _write_hub(source: _Source, scratch: Path, int8: bool, opset: int) -> Path:  # noqa: ARG001
    made = scratch / "hub"
    write_hub_folder(made, source.model, source.contract)
    contract = source.checked(_read_back(made, source))
    shutil.rmtree(made)
    write_hub_folder(made, source.model, contract)
    return made


_WRITERS: dict[str, Callable[[_Source, Path, bool, int], Path]] = {
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
    "torch-export": _write_program,
    "hub": _write_hub,
}


def next_command(run: str | Path, made: Path) -> str:
    """The command that evaluates a file of :func:`export`.

    Args:
        run: the run that was exported.
        made: the file or hub folder.
    """
    name = RunFolder.open(Path(run)).config.model.name
    place = shlex.quote(str(made))
    if made.suffix == ".onnx":
        return f"cure evaluate {place} --data IMAGES --float {shlex.quote(str(run))}"
    if not _is_own(name) or made.suffix == ".pt2":
        return f"cure evaluate {place} --data IMAGES"
    weights = shlex.quote(str(made if made.is_file() else made / WEIGHTS))
    if name.startswith(OBJECT):
        return f"cure.from_pretrained('{made}', network=...) in Python, with a new network of yours"
    return f"cure evaluate --model {name} --weights {weights} --data IMAGES"


def _is_own(name: str) -> bool:
    """Whether a network is code of its own, which no file holds."""
    return ":" in name and not name.startswith(("timm:", "hf:"))


def _read_back(path: Path, source: _Source) -> nn.Module:
    """The network of a file; code of its own is taken from the run."""
    name: Any = source.contract.network["name"]
    if _is_own(name) or (name.startswith("hf:") and not path.is_dir()):
        return from_pretrained(path, network=_blank(source.model))
    return from_pretrained(path)


def _blank(model: nn.Module) -> nn.Module:
    """A copy of the network inside all wrappers, with other weights."""
    copy = deepcopy(core(model))
    with torch.no_grad():
        for tensor in tensors_of(copy).values():
            tensor.zero_()
    return copy
