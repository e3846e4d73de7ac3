"""How much memory a training needs, from the trial pass of its network, and what fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from cure.config import RunConfig
from cure.errors import ConfigError, OutOfMemory
from cure.methods import Method
from cure.models.trial import traits_of
from cure.runs.folder import RunFolder
from cure.training.setup import Prepared, build_method
from cure.utils.engine import Engine
from cure.utils.memory import available, gib, is_out_of_memory

SHARE = 0.8
"""Share of the free memory that ``accumulation_steps=auto`` plans with."""

DOUBT = 1.25
"""Estimate over free memory from which a run is refused; from 1 it is warned of."""

PASSING = 1.0
"""Memory of a pass itself (the layer at hand), in activations of one image."""

COPIES = 4
"""Gradients of a step and moments of the optimiser, in sizes of the trainable weights."""


@dataclass(frozen=True)
class MemoryNeed:
    """Estimated peak of a training, in bytes, beyond what the process holds before it.

    Attributes:
        fixed: for any batch: weights that the method owns, gradients, moments; on a GPU the images.
        per_image: of an image in a training step.
        per_validated: of an image that is attacked in a validation.
        part: images of a training step that are in memory at once.
        validated: images of a validation that are in memory at once.
    """

    fixed: int
    per_image: int
    per_validated: int
    part: int
    validated: int

    @property
    def peak(self) -> int:
        """Of a training step or of a validation, whichever needs more."""
        return self.fixed + max(self.part * self.per_image, self.validated * self.per_validated)

    def images(self, free: float) -> int:
        """Images of a training step that fit into ``free`` bytes; 0 when none does."""
        return max(0, int((free - self.fixed) // max(1, self.per_image)))


def memory_need(config: RunConfig, method: Method, prepared: Prepared) -> MemoryNeed:
    """What a run needs.

    Args:
        config: the run.
        method: its method.
        prepared: its data and networks.
    """
    engine, settings = prepared.engine, config.training
    activations = traits_of(prepared.network).activation_bytes
    trainable = sum(parameter.nbytes for parameter in method.trainable().values())
    owned = sum(value.nbytes for value in method.state_dict().values() if isinstance(value, Tensor))
    fixed = owned + COPIES * trainable
    if engine.device.type == "cuda":
        fixed += prepared.training.nbytes + prepared.validation.nbytes
        fixed += 0 if prepared.extra is None else prepared.extra.images.nbytes
    return MemoryNeed(
        fixed,
        round((method.graphs + PASSING) * activations),
        round((1 + PASSING) * activations),
        settings.batch_size // engine.world // settings.parts,
        min(config.evaluation.batch_size, len(prepared.validation)),
    )


def fit_memory(config: RunConfig, prepared: Prepared) -> tuple[RunConfig, list[str]]:
    """The run with a number in the place of ``accumulation_steps=auto``, and what to tell.

    Args:
        config: the run.
        prepared: its data and networks; not changed.

    Returns:
        The run, and sentences: the estimate, and a warning where it is above what is free.

    Raises:
        ConfigError: when the estimate is far above what is free, or not even one image fits.
    """
    engine, settings = prepared.engine, config.training
    need = memory_need(config, build_method(config, prepared), prepared)
    free = available(engine.device)
    if engine.world > 1 and free is not None:
        free = int(-engine.largest(-free)[0])
        if engine.device.type == "cpu":
            free //= engine.world
    where = "the GPU" if engine.device.type == "cuda" else "this machine"
    if settings.accumulation_steps == "auto":
        config = _in_parts(config, need, free, engine)
        need = memory_need(config, build_method(config, prepared), prepared)
    if not need.per_image or free is None:
        return config, []
    parts = config.training.parts
    at_once = f"{need.part} images" + (f", a batch in {parts} parts" if parts > 1 else "")
    line = f"memory: about {gib(need.peak)} for {at_once}; {gib(free)} free"
    if need.peak <= free:
        return config, [line]
    sentence = (
        f"training needs about {gib(need.peak)} of memory with {need.part} images at once, and "
        f"{where} has {gib(free)} free: {_advice(need, SHARE * free)}"
    )
    if need.peak > DOUBT * free:
        raise ConfigError(sentence)
    return config, [line, f"warning: {sentence}"]


def _in_parts(config: RunConfig, need: MemoryNeed, free: int | None, engine: Engine) -> RunConfig:
    """The fewest parts of a batch that fit."""
    size = config.training.batch_size // engine.world
    most = size if free is None else need.images(SHARE * free)
    if most < 1:
        raise ConfigError(
            f"training.accumulation_steps: not even one image fits: the weights need about "
            f"{gib(need.fixed)} and an image {gib(need.per_image)}, {gib(free or 0)} are free; "
            "take smaller images (data.resize) or a smaller network"
        )
    parts = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= most)
    training = config.training.model_copy(update={"accumulation_steps": parts})
    evaluation, validated = config.evaluation, config.evaluation.batch_size
    if free is not None and need.validated * need.per_validated > SHARE * free - need.fixed:
        validated = max(1, int((SHARE * free - need.fixed) // need.per_validated))
        evaluation = evaluation.model_copy(update={"batch_size": validated})
    return config.model_copy(update={"training": training, "evaluation": evaluation})


def _advice(need: MemoryNeed, free: float) -> str:
    """What to change, for images at once that fit into ``free`` bytes."""
    fits = need.images(free)
    if fits < 1:
        return "take smaller images (data.resize), a smaller network or a machine with more memory"
    sentences = []
    if need.part > fits:
        sentences.append(
            f"{fits} at once fit; training.batch_size=auto works on a batch in such parts, or say "
            f"training.batch_size={fits}"
        )
    fitting = int((free - need.fixed) // max(1, need.per_validated))
    if need.validated > fitting:
        sentences.append(f"evaluation.batch_size={max(1, fitting)} for the validation")
    return "; ".join(sentences) or "close other programs, or say training.batch_size=auto"


@contextmanager
def memory_errors(
    config: RunConfig, method: Method, prepared: Prepared, folder: RunFolder
) -> Iterator[None]:
    """Inside, an error of an allocator becomes one sentence with the batch size that fits.

    Args:
        config: the run.
        method: its method.
        prepared: its data and networks.
        folder: of the run.

    Raises:
        OutOfMemory: in the place of the allocator's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        need = memory_need(config, method, prepared)
        raise OutOfMemory(_sentence(need, config, prepared, folder)) from error


def _sentence(need: MemoryNeed, config: RunConfig, prepared: Prepared, folder: RunFolder) -> str:
    engine, size = prepared.engine, config.training.batch_size // prepared.engine.world
    held = available(engine.device)
    # At most half of what failed, whatever the estimate says.
    fits = min(need.part // 2, need.part if held is None else need.images(SHARE * held))
    what = "the GPU's memory" if engine.device.type == "cuda" else "the memory"
    parts = [n for n in range(1, size + 1) if size % n == 0 and size // n <= fits]
    if not parts:
        return (
            f"{what} does not hold {need.part} images at once, and less is not possible with this "
            "network; take smaller images (data.resize) or a smaller network in a new run"
        )
    return (
        f"{what} does not hold {need.part} images at once; {size // parts[0]} should fit: "
        f"`{folder.resume_command(f'training.accumulation_steps={parts[0]}')}` works on a batch in "
        f"{parts[0]} parts with the same result up to rounding"
    )
