"""What a run is: data, start, model, threat, attack, method, training, evaluation.

The docstring under each field is its help text, with its unit and its source.  Nothing here knows
a method: the ``method`` section is checked by the class that the method's own file declares (see
:mod:`cure.recipe`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from cure.errors import ConfigError

OBJECT = "object:"
"""Prefix of ``model.name`` when the network was passed as a Python object."""

MEMORY = "memory:"
"""Prefix of ``data.source`` when the images were passed as a Python object."""


NATURAL = "natural"
"""Value of ``start`` and of a teacher's ``path`` that means the run's own natural training."""

NATURAL_FROM = "natural:"
"""Prefix of a ``start`` whose weights are trained naturally first."""

ROBUST = "robust:"
"""Prefix of a ``start`` whose weights are robust already and get a new head."""


Split = Literal["train", "validation", "test"]
"""Images of a data set; the validation images are carved from the training images."""


class Ratio(float):
    """A number that may be written as a fraction, and remembers how it was written.

    ``Ratio("8/255")`` equals ``8 / 255`` and prints as ``8/255``.  The text is parsed as a
    fraction, never evaluated.
    """

    text: str

    def __new__(cls, value: str | float | int) -> Ratio:
        """Parse ``value``; a ``ValueError`` says what a number looks like."""
        text = str(value).strip()
        try:
            above, *below = (Fraction(part.strip()) for part in text.split("/"))
            if len(below) > 1:
                raise ValueError
            number = float(above / below[0] if below else above)
        except ZeroDivisionError:
            raise ValueError(f"expected a number, got '{text}', which divides by zero") from None
        except (ValueError, OverflowError):
            raise ValueError(f"expected a number such as 0.031 or 8/255, got '{text}'") from None
        ratio = super().__new__(cls, number)
        ratio.text = text
        return ratio

    def __reduce__(self) -> tuple[type[Ratio], tuple[str]]:
        return Ratio, (self.text,)

    def __str__(self) -> str:
        return self.text

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check(value: object) -> Ratio:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise PydanticCustomError("ratio", "expected a number such as 0.031 or 8/255")
            try:
                ratio = value if isinstance(value, Ratio) else cls(value)
            except (ValueError, OverflowError) as error:
                raise PydanticCustomError("ratio", "{text}", {"text": str(error)}) from None
            if not math.isfinite(ratio):
                raise PydanticCustomError("ratio", "expected a finite number")
            return ratio

        return core_schema.no_info_plain_validator_function(
            check, serialization=core_schema.to_string_ser_schema()
        )


def _positive(value: Ratio) -> Ratio:
    if value <= 0:
        raise PydanticCustomError(
            "positive",
            "expected a number above 0 (for images in [0, 1], 8/255 is usual for Linf), got {text}",
            {"text": value.text},
        )
    return value


def _kept(info: ValidationInfo) -> bool:
    """Whether the values are those of a run that exists: their units are not questioned then."""
    return bool(info.context and info.context.get("kept"))


def checked(name: str, value: Any, kind: Any) -> Any:
    """The value of an argument whose type is declared; numbers of NumPy become those of Python.

    Args:
        name: of the argument, for the message.
        value: what came.
        kind: its type: whole numbers, numbers and words (``Literal``) are checked, also beside
            None; anything else is returned as it is.

    Raises:
        ConfigError: in one sentence, when the value has another type or is no such word.

    >>> checked("limit", 10, int | None)
    10
    """
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    kinds = set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
    if value is None and NoneType in kinds:
        return None
    words = [word for each in kinds if get_origin(each) is Literal for word in get_args(each)]
    if words and value not in words:
        raise ConfigError(f"{name}: expected one of {', '.join(words)}; got {value!r}")
    whole = kinds <= {int, NoneType}
    if not whole and not kinds <= {float, NoneType}:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        what = "a whole number" if whole else "a number"
        raise ConfigError(f"{name}: expected {what}, got {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def checked_words(name: str, given: Any) -> list[str]:
    """Words that came in one text, with commas between them, or as several texts.

    Args:
        name: of the argument, for the message.
        given: what came.

    Raises:
        ConfigError: in one sentence, for anything else.

    >>> checked_words("attacks", "pgd20, cw"), checked_words("attacks", ("pgd20",))
    (['pgd20', 'cw'], ['pgd20'])
    """
    if isinstance(given, str):
        return [word.strip() for word in given.split(",")]
    words = list(given) if isinstance(given, Iterable) else [given]
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(f"{name}: expected one name or several, got {word!r}")
    return words


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def _by_name(section: object) -> object:
    """A bare name, ``model: resnet18``, for a section with that name."""
    return {"name": section} if isinstance(section, str) else section


def _alone(names: object) -> object:
    """A bare name, ``tracking: wandb``, for a list of it."""
    return [names] if isinstance(names, str) else names


class AugmentConfig(Section):
    """What happens to a training image on its way into a batch."""

    crop_padding: NonNegativeInt = 4
    """Pixels added on each side before a crop of the original size; 0 turns it off."""
    padding: Literal["zeros", "reflect"] = "zeros"
    """What fills the added pixels (TRADES lineage: zeros; Rice et al. and ACT: reflect)."""
    flip: bool = True
    """Mirror left and right with probability one half."""
    resized_crop: float | None = Field(default=None, gt=0, le=1)
    """Instead of the padded crop: a random part of the image of at least this share of its area
    (aspect ratio 3/4 to 4/3), resized to the size of the image.  0.5 is mild, 0.08 is the usual
    value for ImageNet from random weights."""
    color_jitter: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of brightness, contrast and saturation, drawn for each image."""
    mixup: NonNegativeFloat = 0.0
    """alpha of MixUp: images and labels of a batch are mixed in pairs with a share drawn from
    Beta(alpha, alpha); 0 turns it off.  Only for methods whose loss takes soft labels."""
    cutmix: NonNegativeFloat | Literal["auto"] = 0.0
    """alpha of CutMix: a rectangle is replaced by that of another image of the batch, and the
    labels are mixed by area; 0 turns it off.  With both, each batch draws one of the two.
    ``auto`` is 1, or 0 where the run has fewer than 500 steps or the method's loss takes no soft
    labels; fixed for the run."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the label that is spread over all classes."""

    @property
    def cutmix_alpha(self) -> float:
        """``cutmix`` as a number; 0 where ``auto`` is not decided yet."""
        return 0.0 if self.cutmix == "auto" else self.cutmix

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return bool(self.mixup or self.cutmix_alpha)

    @property
    def soft_labels(self) -> bool:
        """Whether labels become probabilities over classes."""
        return bool(self.mixes or self.label_smoothing)


def _count_or_share(value: int | float) -> int | float:
    """One message for both kinds of number, where a union would give one each."""
    if 0 < value < 1 or (value >= 1 and value == int(value)):
        return value if value < 1 else int(value)
    raise PydanticCustomError(
        "count_or_share", "expected a number of images, or a share of them such as 0.1"
    )


class DataConfig(Section):
    """Where images come from and how they are split."""

    source: str = Field(min_length=1)
    """``digits``; a short name (``cifar10``); a hub name (``uoft-cs/cifar10``); a folder of
    parquet files; a folder of images, one sub-folder a class, or with a table of labels
    (``labels.csv``, ``metadata.jsonl``, ``train.txt``); a folder of ``save_to_disk``,
    cifar-10-batches-py or MNIST idx files; or a ``.npz`` file."""
    train_split: str = "train"
    """Name of the split that is trained on."""
    test_split: str | None = None
    """Name of the split that ``evaluate`` uses; by default ``test``, else one called validation,
    val, valid, dev or eval."""
    validation_split: str | None = None
    """Name of the split that chooses checkpoints, or ``carve`` to carve it from the training split
    (``validation``); by default the source's own where it also has a test split, else carved."""
    image_column: str | None = None
    """Column (parquet, hub) or array (npz) of the images; found by itself when not given."""
    label_column: str | None = None
    """Column or array of the labels; found by itself when not given."""
    labels: Literal["found", "file_names"] = "found"
    """``file_names``: the class of an image file is its name without the number at the end
    (``cat.0.jpg``, ``great_dane_12.jpg``), wherever it lies in the folder."""
    resize: PositiveInt | None = None
    """Resize every image to this many pixels a side (antialiased); needed for mixed sizes."""
    fit: Literal["stretch", "crop"] = "stretch"
    """How ``resize`` treats oblong images: ``stretch`` changes their shape; ``crop`` resizes the
    shorter side and cuts the middle square out."""
    color: Literal["keep", "rgb", "grey"] = "keep"
    """Convert every image; ``keep`` converts grey images to RGB where any image is RGB."""
    background: str = "white"
    """Colour behind transparent images: a name, ``#rrggbb`` or ``rgb(0, 0, 0)``."""
    damaged: Literal["refuse", "skip"] = "refuse"
    """What to do with images that cannot be read: stop and name them, or leave them out and count
    them."""
    sampler: Literal["random", "balanced"] = "random"
    """``balanced`` draws every class equally often in each epoch: images of small classes are
    repeated and images of large classes left out, others in each epoch."""
    limit: PositiveInt | None = None
    """Use only the first so many images of the training split (before the validation split)."""
    validation: Annotated[int | float, AfterValidator(_count_or_share)] = 1000
    """Images carved from the training split, as a number or as a share (0.1); every choice of a
    checkpoint uses them alone."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share carved as the test split from a source that has none."""
    cache: Literal["memory", "disk", "none"] = "memory"
    """Where decoded images are: in memory; in a file that later runs on the same images use again
    (``disk``); or nowhere, decoded again for each batch (``none``).  Batches are the same."""
    cache_folder: str | None = None
    """Folder of ``cache=disk``; by default ``decoded-images`` beside the run."""
    split_seed: NonNegativeInt = 0
    """Seed of both carvings; not the run's seed, so that runs share their splits."""
    extra: str | None = Field(default=None, min_length=1)
    """More images to train on, generated ones for example: whatever ``source`` may be (of several
    splits the training split), or a ``.npz`` file or folder of images without labels.  Nothing is
    validated or evaluated on them."""
    extra_share: float = Field(default=0.7, gt=0, lt=1)
    """Share of every batch that is drawn from the extra images (0.7: Rebuffi et al. 2021, Wang et
    al. 2023).  A pass has as many steps as without them, over fewer images of the source."""
    extra_labels: str | None = None
    """Network that labels the extra images that have no label: the folder of a run (its best
    weights), or a weights file of the run's own network."""
    extra_leaks: Literal["report", "remove", "refuse"] = "report"
    """What to do with extra images that copy a test or validation image: count them, leave them
    out, or stop."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""

    @field_validator("extra_labels")
    @classmethod
    def _labels_of_extra_images(cls, labels: str | None, info: ValidationInfo) -> str | None:
        if labels is not None and info.data.get("extra") is None:
            raise PydanticCustomError("extra", "expected data.extra, whose images it labels")
        if labels == NATURAL:
            raise PydanticCustomError(
                "extra", "expected a run that is trained already, got natural; name its folder"
            )
        return labels

    @field_validator("background")
    @classmethod
    def _colour(cls, background: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(background)
        except ValueError:
            raise PydanticCustomError(
                "colour",
                "expected a colour such as white, #ff8800 or rgb(255, 136, 0), got {text}",
                {"text": background},
            ) from None
        return background


class ModelConfig(Section):
    """The network."""

    name: str = Field(min_length=1)
    """A registered architecture (``cure list models``), ``package.module:callable``,
    ``hf:NAME_OR_FOLDER`` (transformers) or ``timm:NAME``."""
    options: dict[str, Any] = {}
    """Arguments of the builder, for example ``{width: 16}``."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel of the [0, 1] image inside the model."""
    std: Annotated[tuple[PositiveFloat, ...] | None, Field()] = None
    """Divides each channel afterwards; given together with ``mean``."""

    @field_validator("mean")
    @classmethod
    def _mean_of_unit_images(
        cls, mean: tuple[float, ...] | None, info: ValidationInfo
    ) -> tuple[float, ...] | None:
        if mean is not None and max(mean, default=0.0) > 1 and not _kept(info):
            raise PydanticCustomError(
                "units",
                "expected the mean of images in [0, 1], got {mean}; divide mean and std by 255",
                {"mean": list(mean)},
            )
        return mean

    @field_validator("std")
    @classmethod
    def _std_goes_with_mean(cls, std: Any, info: Any) -> Any:
        mean = info.data.get("mean")
        if (std is None) != (mean is None) or (std and len(std) != len(mean)):
            raise PydanticCustomError(
                "mean_std", "mean and std are given together, with one number a channel each"
            )
        return std


def norm_name(norm: object) -> object:
    """The name that a norm has here; what is none stays as it is.

    >>> norm_name("l_inf")
    'Linf'
    """
    key = str(norm).lower().replace("_", "")
    names = {"linf": "Linf", "inf": "Linf", "l2": "L2", "2": "L2", "l1": "L1", "1": "L1"}
    return names.get(key, norm)


def beyond_unit_images(norm: str, epsilon: float) -> str | None:
    """What is wrong with a radius that is too large for images in [0, 1]; None if nothing is.

    >>> beyond_unit_images("L2", 3.0)
    """
    limit = {"Linf": 1.0, "L2": 16.0}.get(norm, math.inf)
    if epsilon <= limit:
        return None
    text = epsilon.text if isinstance(epsilon, Ratio) else f"{epsilon:g}"
    return (
        f"expected a radius of {limit:g} or less in {norm} for images in [0, 1], got {text}; "
        f"if it is meant for pixels from 0 to 255, say {text}/255"
    )


class ThreatConfig(Section):
    """What the adversary may do: change the image within a ball, inside [0, 1]."""

    norm: Literal["Linf", "L2", "L1"] = "Linf"
    """Norm of the change; L1 for evaluations only."""
    epsilon: Ratio = Ratio("8/255")
    """Radius of the ball, for images in [0, 1]."""

    _epsilon_positive = field_validator("epsilon")(_positive)

    @field_validator("epsilon")
    @classmethod
    def _epsilon_of_unit_images(cls, epsilon: Ratio, info: ValidationInfo) -> Ratio:
        if _kept(info):
            return epsilon
        if found := beyond_unit_images(str(info.data.get("norm")), epsilon):
            raise PydanticCustomError("units", "{found}", {"found": found})
        return epsilon

    @field_validator("norm", mode="before")
    @classmethod
    def _aliases(cls, norm: object) -> object:
        return norm_name(norm)


class AttackConfig(Section):
    """How training images are attacked."""

    name: Literal["pgd", "n-fgsm"] = "pgd"
    """``pgd``: projected gradient ascent.  ``n-fgsm``: uniform noise of ``noise`` epsilons, then
    one step of length epsilon, without projection on the ball (de Jorge et al., NeurIPS 2022);
    much cheaper, Linf only; ``steps``, ``step_size`` and ``start`` are not used."""
    steps: PositiveInt = 10
    """Steps of gradient ascent."""
    step_size: Ratio = Ratio("2/255")
    """Length of a step in the threat's norm, for images in [0, 1]; also of the attack on validation
    images, where it is a fifth to a half of ``threat.epsilon`` (else that takes a quarter)."""
    start: Literal["gaussian", "uniform", "none"] = "gaussian"
    """``gaussian``: image + 0.001 N(0, 1) (TRADES, CURE); ``uniform`` in the ball (Madry);
    ``none``: the image itself."""
    clamp_start: bool = True
    """Keep the starting point in [0, 1].  The released codes of TRADES, MART, CURE, HAT, ACT,
    ST-AT, ARD, IAD and LAS-TRADES do not, and take the first gradient beyond it (``false``)."""
    mode: Literal["eval", "train"] = "eval"
    """Mode of the network while it is attacked.  In ``train`` mode BatchNorm uses the batch's
    statistics; its running statistics are put back afterwards."""
    epsilon: Ratio | None = None
    """Radius of the training attack, where it differs from the threat's."""
    epsilon_factor: PositiveFloat = 1.0
    """Where ``epsilon`` is not given: the radius of the training attack as a multiple of
    ``threat.epsilon``."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the run over which epsilon and the step size rise linearly from 0.  A pretrained
    network attacked with the whole epsilon from the first step falls to chance."""
    noise: NonNegativeFloat = 1.0
    """``n-fgsm``: size of the uniform noise before the step, in epsilons."""
    objective: Literal["method", "cross_entropy"] = "method"
    """What the attack maximises: what the method says, or always the cross-entropy.  The KL
    divergence to a confident prediction has a small gradient at the start of a fine-tuning."""
    check_every: PositiveInt | None = None
    """``n-fgsm``: compare with PGD on a training batch every so many steps.  Where the network
    withstands the single step and not PGD (catastrophic overfitting), training goes back to the
    last saved state and takes two steps from there on."""

    _step_size_positive = field_validator("step_size")(_positive)

    @field_validator("epsilon")
    @classmethod
    def _epsilon_positive(cls, value: Ratio | None) -> Ratio | None:
        return None if value is None else _positive(value)


class TeacherConfig(Section):
    """A trained network that the method learns from; a word alone is its ``path``."""

    path: str | None = None
    """Folder of a run (its best weights), or a weights file of the run's own network; ``natural``
    is the run's natural start, trained where there is none."""
    recipe: str | None = None
    """In the place of a path: train the teacher first, by this recipe on the run's own data."""
    settings: dict[str, Any] = {}
    """Changes to that recipe: ``{method: at, training.epochs: 10}``."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, section: object) -> object:
        return {"path": section} if isinstance(section, str) else section

    @model_validator(mode="after")
    def _path_or_recipe(self) -> TeacherConfig:
        if (self.path is None) == (self.recipe is None):
            raise PydanticCustomError(
                "teacher", "expected the path of a run or checkpoint, or {{recipe: NAME}}"
            )
        if self.settings and self.recipe is None:
            raise PydanticCustomError("teacher", "settings go with a recipe")
        return self


class MethodConfig(Section):
    """Base of every method's own settings."""

    name: str
    """The registered name of the method (``cure list methods``)."""

    def teachers(self) -> dict[str, TeacherConfig]:
        """The trained networks that the method asks for, by the name of their setting."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, TeacherConfig)}

    def needs_length(self) -> bool:
        """Whether a schedule of the method depends on the number of steps of the training."""
        return False

    def sweep(self) -> tuple[str, ...]:
        """Default search space: ``percent=10:50``, ``alpha=0.05:0.5:log``, ``k=1,2,4``."""
        return ()


class OptimizerConfig(Section):
    """The optimiser and its parameter groups."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent with momentum, or AdamW."""
    learning_rate: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: NonNegativeFloat = 5e-4
    """L2 penalty, added to the gradient (``adamw``: decoupled weight decay)."""
    head_rate: PositiveFloat = 1.0
    """Factor on the learning rate of the classifier, the last linear layer."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Layer-wise decay: factor on the learning rate from each part of the network to the part
    before it, counted from the classifier (parts: stem, B1 to B4, classifier)."""
    decay_norms: bool = True
    """Whether weight decay also applies to biases and to the weights of norms."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimizerConfig:
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise PydanticCustomError(
                "nesterov",
                "nesterov: expected sgd with momentum, got {name} and {momentum}",
                {"name": self.name, "momentum": f"{self.momentum:g}"},
            )
        return self


class ScheduleConfig(Section):
    """Learning rate over the run; times are shares of the run, so a shorter run keeps the shape."""

    name: Literal["constant", "piecewise", "cosine", "one_cycle", "one_cycle_cosine"] = "piecewise"
    """``piecewise`` drops at the milestones; ``cosine`` falls to 0; ``one_cycle`` rises linearly
    to the peak, then falls linearly to 0; ``one_cycle_cosine`` rises by a cosine from a 25th of the
    peak and falls by a cosine to a 250,000th, while the momentum falls from 0.95 to 0.85 and rises
    again (PyTorch's ``OneCycleLR``; HAT)."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Shares of the run at which ``piecewise`` drops (0.5 and 0.75: epochs 100 and 150 of 200)."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """What ``piecewise`` multiplies the rate with at each milestone."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run over which the rate rises linearly from 0 (all schedules)."""
    peak: float = Field(default=0.25, gt=0, lt=1)
    """Share of the run at which ``one_cycle`` and ``one_cycle_cosine`` are highest."""

    @field_validator("milestones")
    @classmethod
    def _ascending(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise PydanticCustomError("milestones", "expected milestones in ascending order")
        return milestones


class AveragingConfig(Section):
    """An average of the weights over time, evaluated in the place of the trained ones."""

    kind: Literal["exponential", "equal"] = "exponential"
    """A moving average, or the plain mean of all that were taken (SWA)."""
    decay: float = Field(default=0.999, ge=0, lt=1)
    """Share that an exponential average keeps when weights are taken."""
    every: Literal["step", "epoch"] = "step"
    """When weights are taken (SWA: at the end of an epoch)."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run after which averaging begins."""
    warmup: bool = False
    """Exponential averages: keep at most n / (9 + n) after n weights, so that an average that
    starts early forgets the first weights."""
    batch_norm: Literal["averaged", "recomputed"] = "averaged"
    """Statistics of its BatchNorm: averaged like weights, or computed anew after every epoch from
    all training images as they are (SWA)."""


class WeightPerturbationConfig(Section):
    """Adversarial weight perturbation (AWP) around the method."""

    gamma: PositiveFloat = 0.01
    """Size of the perturbation relative to each weight tensor (AT: 0.01; TRADES: 0.005)."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run after which it begins (released code for TRADES: epoch 10 of 200)."""


class TrainingConfig(Section):
    """How long, how fast, and what is kept."""

    epochs: PositiveInt = 200
    """Passes over the training images."""
    schedule_from: NonNegativeInt = 0
    """Epoch from which the schedule of the learning rate runs to the end; ``cure resume RUN
    training.epochs=N`` sets it to where a finished run ended."""
    schedule_length: NonNegativeInt = 0
    """Epochs that the schedules of method and attack are shares of, where not all: ``cure resume``
    keeps there the length that a run had first."""
    batch_size: PositiveInt = 128
    """Images a step; an incomplete last batch is left out.  ``auto`` on the command line keeps the
    recipe's number and sets ``accumulation_steps=auto``."""
    accumulation_steps: PositiveInt | Literal["auto"] = 1
    """Parts that a batch is worked on in, one after another, so that only one is in memory
    (gradient accumulation): the same step up to rounding, but BatchNorm normalises over a part.
    ``auto`` takes the fewest parts that fit into the free memory, fixed for the run."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""
    schedule: Annotated[ScheduleConfig, BeforeValidator(_by_name)] = ScheduleConfig()
    """The learning rate over time."""
    clip_norm: PositiveFloat | None = None
    """Scale the whole gradient down to this Euclidean norm when it is longer."""
    batch_norm: Literal["eval_attack", "frozen", "train"] = "eval_attack"
    """Statistics of BatchNorm.  ``eval_attack``: the loss uses those of the batch, the attack the
    running ones.  ``train``: both use those of the batch; before each validation the running ones
    are computed anew from the training images.  ``frozen``: both use the running ones of the
    start, which do not change; for pretrained networks and small data."""
    class_weights: Literal["none", "balanced"] = "none"
    """``balanced`` weights the cross-entropy of each image by N / (K n_c), where its class has n_c
    of the N training images; for methods whose loss takes soft labels."""
    minutes: PositiveFloat | None = None
    """Budget of wall time instead of ``epochs``: a few steps are timed before training, and the
    number of epochs that fits is fixed for the run.  Validation is included."""
    min_steps: PositiveInt | None = None
    """At least so many steps: where images are few, ``epochs`` rises to reach them, and
    ``validate_every`` with it, both fixed for the run.  Setting ``epochs`` or ``minutes`` drops
    it."""
    precision: Literal["fp32", "bf16_attack", "bf16"] = "fp32"
    """``bf16_attack`` computes adversarial images in bfloat16 and trains in float32.  A processor
    without instructions for bfloat16 takes longer; a note says so."""
    channels_last: bool = True
    """Store images with the channel innermost: faster convolutions, float32 rounding differs."""
    compile: bool = False
    """Compile the attack's passes with ``torch.compile``, on a GPU into CUDA graphs.  It takes a
    minute at the start; on a processor it gains nothing over what is done anyway."""
    averaging: AveragingConfig | None = None
    """Average the weights over time."""
    weight_perturbation: WeightPerturbationConfig | None = None
    """Learn at perturbed weights (AWP)."""
    validate_every: PositiveInt = 1
    """Epochs between two measurements on the validation split (the last epoch always is)."""
    validation_steps: PositiveInt = 10
    """PGD steps for robust accuracy on the validation split, with the training attack's size."""
    checkpoint_every: PositiveInt | None = None
    """Also write the resumable state every so many steps inside an epoch."""
    select: Literal["auto", "accuracy", "balanced"] = "auto"
    """Validation figure that the best weights are chosen by: accuracy, or balanced accuracy, the
    mean over the classes.  ``auto`` takes balanced accuracy where one class has more than twice its
    even share of the validation images, or more than two thirds of them."""
    keep_every: PositiveInt | None = None
    """Keep the weights of every so many epochs, and of the last one, as
    ``checkpoints/epoch-0005.safetensors``."""
    record_gradients: PositiveInt | None = None
    """Every so many steps, record the size of gradients and what a mask conserves, for ``cure
    analyse gradients``."""
    collapse_patience: PositiveInt = 5
    """Stop after so many validations in a row with natural accuracy at chance.  With few validation
    images that holds only for a network that had been clearly above it."""
    device: str = "auto"
    """``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``."""
    threads: PositiveInt | None = None
    """Processor threads; by default PyTorch's choice.  Part of what makes a run repeat."""
    deterministic: bool = True
    """On a GPU, prefer operations that repeat exactly; warns where PyTorch has none."""

    @model_validator(mode="before")
    @classmethod
    def _automatic_batch(cls, raw: object) -> object:
        if not isinstance(raw, dict) or raw.get("batch_size") != "auto":
            return raw
        rest = {k: v for k, v in raw.items() if k != "batch_size"}
        return {"accumulation_steps": "auto"} | rest

    @model_validator(mode="after")
    def _schedule_within_the_run(self) -> TrainingConfig:
        if self.schedule_from >= self.epochs:
            raise PydanticCustomError(
                "schedule_from",
                "schedule_from: expected less than the {epochs} epochs, got {given}",
                {"epochs": self.epochs, "given": self.schedule_from},
            )
        return self

    @property
    def schedule_epochs(self) -> int:
        """Epochs that the schedules of method and attack are shares of: before an extension."""
        return self.schedule_length or self.schedule_from or self.epochs

    @property
    def parts(self) -> int:
        """``accumulation_steps`` as a number; 1 where ``auto`` is not decided yet."""
        return 1 if self.accumulation_steps == "auto" else self.accumulation_steps


class NaturalStartConfig(Section):
    """The natural training that ``start: natural`` does first, where it differs from the main one.

    Each value replaces the one of the same name in ``training``.
    """

    epochs: PositiveInt | None = None
    """Passes over the training images."""
    min_steps: PositiveInt | None = None
    """At least so many steps, as ``training.min_steps``; setting ``natural.epochs`` drops it."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """L2 penalty."""
    schedule: Annotated[ScheduleConfig | None, BeforeValidator(_by_name)] = None
    """Learning rate over the natural run."""


class HeadConfig(Section):
    """Training of the new head of ``start: robust:PATH``, before all layers learn.

    A random head would send arbitrary gradients through a robust backbone and undo it.  So the head
    is trained first, by adversarial training (``at``) with all other layers fixed.

    Source: RoLI (robust linear initialisation), Hua et al., CVPR 2024.
    """

    share: float = Field(default=0.25, ge=0, le=1)
    """Passes over the training images for the head, as a share of ``training.epochs`` and besides
    them, at least one; 0 leaves the head as it was drawn."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the head; by default that of the run."""


class LayersConfig(Section):
    """Which parts of the network learn (the paper's study U-b)."""

    update: tuple[str, ...] = ()
    """Parts that learn: ``B1`` to ``B4``, ``stem``, ``classifier``, or names
    of modules; all when none is named."""
    reinitialise: Literal["none", "weights", "all"] = "none"
    """Draw what learns anew before training; ``weights`` leaves the scale and shift of norms
    (released code), ``all`` does not."""
    stem: Literal["frozen", "updated"] = "frozen"
    """Whether what comes before the first block learns although it is not named, never drawn
    anew (paper's text: frozen; released code: updated)."""
    statistics: Literal["frozen", "updated"] = "frozen"
    """Whether BatchNorm of frozen parts goes on with its statistics (released code: updated)."""


class EvaluationConfig(Section):
    """Defaults of ``cure evaluate RUN``."""

    attacks: tuple[str, ...] = ("natural", "pgd20", "cw")
    """Names from ``cure list attacks``."""
    limit: PositiveInt | None = None
    """Only the first so many images of the split."""
    batch_size: PositiveInt = 256
    """Images attacked at once."""


def starts_naturally(start: str) -> bool:
    """Whether a run with this ``start`` trains its own natural start first."""
    return start == NATURAL or start.startswith(NATURAL_FROM)


class RunConfig(Section):
    """Everything that determines a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$")
    """Name for results and for the default run folder."""
    description: str = ""
    """One line on what the recipe is for."""
    seed: NonNegativeInt = 0
    """Seed of everything random in the run."""
    data: DataConfig
    """Images."""
    model: Annotated[ModelConfig, BeforeValidator(_by_name)]
    """Network."""
    start: str = "natural"
    """Weights at the beginning: ``natural`` trains naturally first; ``model`` or ``scratch`` keep
    those the model is built with (trained ones for hub models, random ones otherwise);
    ``natural:PATH`` takes those of a checkpoint or run folder and trains naturally first;
    ``robust:PATH`` takes a robust backbone, of other images too, and trains a new head first (see
    ``head``); anything else is the path of a checkpoint or run folder."""
    start_key: str | None = None
    """Where a checkpoint holds several sets of weights: the name of the one to take, such as
    ``ema``; also ``start.key``."""
    new_head: bool | str = False
    """Give the network a new last layer with one output a class and keep the rest, of its own
    weights or of a checkpoint; ``true`` takes the last linear layer or 1x1 convolution that is as
    wide as the logits, a name that layer.  The new layer is random: ``start=natural`` or
    ``start=natural:PATH`` trains it first.  ``start=RUN`` of the same classes keeps that of the
    run."""
    start_check: Literal["refuse", "warn", "off"] = "warn"
    """Where the start names classes hardly better than by chance, because its classes have another
    order or images are standardised twice or never: stop before the first step, say so, or say
    nothing."""
    natural: NaturalStartConfig = NaturalStartConfig()
    """The natural training of ``start: natural``."""
    head: HeadConfig = HeadConfig()
    """The training of the head of ``start: robust:PATH``."""
    threat: ThreatConfig = ThreatConfig()
    """What the adversary may do."""
    attack: AttackConfig = AttackConfig()
    """The attack that training uses."""
    method: SerializeAsAny[MethodConfig]
    """The training method and its settings."""
    layers: LayersConfig = LayersConfig()
    """Which parts of the network learn."""
    training: TrainingConfig = TrainingConfig()
    """The training loop."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The default evaluation."""
    tracking: Annotated[tuple[str, ...], BeforeValidator(_alone)] = ()
    """Experiment trackers that receive the numbers of every epoch: tensorboard, wandb, mlflow."""

    @property
    def training_epsilon(self) -> float:
        """Radius of the attack that training uses."""
        if self.attack.epsilon is not None:
            return self.attack.epsilon
        return self.attack.epsilon_factor * self.threat.epsilon

    @property
    def start_path(self) -> str | None:
        """The checkpoint or run folder that ``start`` names, or None where it names none."""
        if self.start in (NATURAL, "scratch", "model"):
            return None
        return self.start.removeprefix(ROBUST).removeprefix(NATURAL_FROM)

    @property
    def starts_naturally(self) -> bool:
        """Whether the run trains its own natural start first."""
        return starts_naturally(self.start)

    @property
    def draws_head(self) -> bool | str:
        """Whether the last layer is drawn anew, or the name of the layer that is."""
        return self.new_head or self.start.startswith(ROBUST)

    @model_validator(mode="before")
    @classmethod
    def _start_section(cls, raw: object) -> object:
        """``start.key=ema`` beside ``start=PATH``."""
        if not isinstance(raw, dict) or not isinstance(raw.get("start"), dict):
            return raw
        section = dict(raw["start"])
        rest = {k: v for k, v in raw.items() if k != "start"}
        if "name" in section:
            rest["start"] = section.pop("name")
        if "key" in section:
            rest["start_key"] = section.pop("key")
        return rest | ({"start": section} if section else {})

    @model_validator(mode="after")
    def _step_inside_the_ball(self, info: ValidationInfo) -> RunConfig:
        if _kept(info):
            return self
        epsilon = self.training_epsilon
        # Single-step attacks with a random start step by up to two radii.
        longest = epsilon * (1 if self.attack.steps > 1 else 2)
        if self.attack.name == "pgd" and self.attack.step_size > longest * (1 + 1e-9):
            step = self.attack.step_size.text
            meant = f"{step}/255" if self.attack.step_size >= 1 else f"{epsilon / 4:.4g}"
            raise PydanticCustomError(
                "units",
                "attack.step_size: expected a step no longer than the radius {epsilon}, got "
                "{step}; say attack.step_size={meant}",
                {"epsilon": f"{epsilon:.4g}", "step": step, "meant": meant},
            )
        return self


def defaults(section: type[Section]) -> dict[str, Any]:
    """The settings of a section that need not be given, as a run keeps them.

    >>> defaults(ThreatConfig)
    {'norm': 'Linf', 'epsilon': '8/255'}
    """
    found = section.model_construct().model_dump(mode="json")
    for name, field in section.model_fields.items():
        kind = field.annotation
        if field.is_required() and isinstance(kind, type) and issubclass(kind, Section):
            found[name] = defaults(kind)
    return found
