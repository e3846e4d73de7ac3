"""Random networks of a small grammar: tried, trained for a step and attacked, or refused.

A network is a list of words: what happens to the image, blocks, a way to lay features out, a head
and a form of output.  Words may fail to fit; PyTorch then raises, and the user is to read one
sentence.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tally import done_or_refused, examples, mostly_done
from torch import Tensor, nn

import cure
from helpers import bright_or_dark

CLASSES = 3


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Outputs:
    logits: Tensor
    loss: Tensor | None = None


class Attribute:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Residual(nn.Module):
    """x + f(x), added in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        out = self.inner(features)
        out += features
        return out.relu_()


class Shuffle(nn.Module):
    """The channel shuffle of ShuffleNet, by views."""

    def forward(self, features: Tensor) -> Tensor:
        batch, width, height, breadth = features.shape
        parts = features.view(batch, 2, width // 2, height, breadth)
        return parts.transpose(1, 2).reshape(batch, width, height, breadth)


class ChannelsInside(nn.Module):
    """A linear layer over channels and a LayerNorm, as in ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention over positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2)
        mixed = self.inner(tokens, tokens, tokens, need_weights=False)[0]
        return mixed.transpose(1, 2).view_as(features)


WIDTH = 4
BLOCKS = {
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "conv-stride": lambda: nn.Conv2d(WIDTH, WIDTH, 3, stride=2),
    "depthwise": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
    "pointwise": lambda: nn.Conv2d(WIDTH, WIDTH, 1),
    "circular": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2),
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "spectral-norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "old-spectral-norm": lambda: nn.utils.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "batch-norm": lambda: nn.BatchNorm2d(WIDTH),
    "batch-norm-plain": lambda: nn.BatchNorm2d(WIDTH, affine=False, momentum=None),
    "batch-norm-untracked": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "group-norm": lambda: nn.GroupNorm(2, WIDTH),
    "instance-norm": lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True),
    "local-norm": lambda: nn.LocalResponseNorm(2),
    "layer-norm": lambda: nn.LayerNorm([WIDTH, 8, 8]),
    "relu": lambda: nn.ReLU(),
    "relu-in-place": lambda: nn.ReLU(inplace=True),
    "leaky-in-place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "hardswish-in-place": lambda: nn.Hardswish(inplace=True),
    "elu-in-place": lambda: nn.ELU(inplace=True),
    "gelu": lambda: nn.GELU(),
    "prelu": lambda: nn.PReLU(WIDTH),
    "max-pool": lambda: nn.MaxPool2d(2),
    "average-pool": lambda: nn.AvgPool2d(2),
    "adaptive-pool": lambda: nn.AdaptiveAvgPool2d(3),
    "large-pool": lambda: nn.MaxPool2d(7),
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "dropout": lambda: nn.Dropout2d(0.3),
    "residual": lambda: Residual(WIDTH),
    "shuffle": lambda: Shuffle(),
    "channels-inside": lambda: ChannelsInside(WIDTH),
    "attention": lambda: Attention(WIDTH),
}
LAYOUTS = ("view", "flatten", "reshape", "mean", "as-strided", "flat-by-unflatten", "permuted")
IMAGES = ("as-is", "scaled", "in-place", "clamped", "rounded", "detached", "double", "half")
OUTPUTS = (
    *("logits", "logits", "tuple", "features-first", "list", "dict", "dict-of-scores", "object"),
    *("dataclass", "named", "tuple-in-training", "1x1", "squeezed", "double", "softmax"),
    *("one-number", "too-many", "labels", "nothing", "text"),
)
HABITS = ("none", "none", "none", "keeps-features", "frozen", "lazy", "counts", "stays-in-eval")


@dataclass(frozen=True)
class Words:
    """A network in words."""

    image: str
    blocks: tuple[str, ...]
    layout: str
    hidden: str
    output: str
    habit: str
    precision: str


class Network(nn.Module):
    """What the words say, for grey 8x8 images."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.words = words
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*(BLOCKS[name]() for name in words.blocks))
        with torch.no_grad():
            try:
                size = self.laid_out(self.blocks.eval()(torch.zeros(2, WIDTH, 8, 8))).shape[1]
            except RuntimeError:
                size = WIDTH  # The blocks do not fit; the error is to come from forward.
        self.blocks.train()
        hidden = {"none": [], "linear": [nn.Linear(size, size), nn.Tanh()]}
        hidden["batch-norm"] = [nn.BatchNorm1d(size)]
        outputs = CLASSES + 2 if words.output == "too-many" else CLASSES
        last = nn.LazyLinear(outputs) if words.habit == "lazy" else nn.Linear(size, outputs)
        self.head = nn.Sequential(*hidden[words.hidden], last)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if words.habit == "frozen":
            self.requires_grad_(False)
        if words.precision != "float" and words.habit != "lazy":
            getattr(self, words.precision)()

    def train(self, mode: bool = True) -> Network:
        return super().train(mode and self.words.habit != "stays-in-eval")

    def laid_out(self, features: Tensor) -> Tensor:
        batch = len(features)
        match self.words.layout:
            case "view":
                return features.view(batch, -1)
            case "reshape":
                return features.reshape(batch, -1)
            case "mean":
                return features.mean((2, 3))
            case "as-strided":
                size = features[0].numel()
                return features.as_strided((batch, size), (size, 1))
            case "flat-by-unflatten":
                return features.flatten().unflatten(0, (batch, -1))
            case "permuted":
                return features.permute(0, 2, 3, 1).contiguous().view(batch, -1)
        return features.flatten(1)

    def logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        match self.words.image:
            case "scaled":
                image = image * 2 - 1
            case "in-place":
                image = image.sub_(0.5).mul_(2)
            case "clamped":
                image = image.clamp_(0.1, 0.9)
            case "rounded":
                image = image.mul(8).round().div(8)
            case "detached":
                image = image.detach()
            case "double":
                image = image.double()
            case "half":
                image = image.half()
        features = self.laid_out(self.blocks(self.stem(image)))
        if self.words.habit == "keeps-features":
            self.kept = features
        if self.words.habit == "counts":
            self.seen += 1
        return self.head(features), features

    def forward(self, image: Tensor) -> Any:
        logits, features = self.logits(image)
        match self.words.output:
            case "tuple":
                return logits, features
            case "features-first":
                return features, logits
            case "list":
                return [logits]
            case "dict":
                return {"logits": logits, "features": features}
            case "dict-of-scores":
                return {"scores": logits, "loss": None}
            case "object":
                return Attribute(logits)
            case "dataclass":
                return Outputs(logits)
            case "named":
                return Named(logits, features)
            case "tuple-in-training":
                return (logits, logits.clone()) if self.training else logits
            case "1x1":
                return logits[:, :, None, None]
            case "squeezed":
                return logits.squeeze()
            case "double":
                return logits.double()
            case "softmax":
                return F.softmax(logits, 1)
            case "one-number":
                return logits.sum(1)
            case "labels":
                return logits.argmax(1)
            case "nothing":
                return None
            case "text":
                return "logits"
        return logits


networks = st.builds(
    Words,
    image=st.sampled_from(("as-is", *IMAGES)),
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), max_size=5).map(tuple),
    layout=st.sampled_from(LAYOUTS),
    hidden=st.sampled_from(["none", "none", "linear", "batch-norm"]),
    output=st.sampled_from(OUTPUTS),
    habit=st.sampled_from(HABITS),
    precision=st.sampled_from(["float", "float", "float", "half", "double", "bfloat16"]),
)
ONE_STEP = {
    "method": {"name": "at"},
    "start": "model",
    "data.validation": 4,
    "training.epochs": 1,
    "training.batch_size": 8,
    "training.validation_steps": 1,
    "training.threads": 1,
    "attack.steps": 2,
}


def build(words: Words) -> Network:
    torch.manual_seed(0)
    return Network(words)


def plain_logits(words: Words, image: Tensor) -> Tensor:
    """What the network says in plain PyTorch, in evaluation mode."""
    with torch.no_grad():
        return build(words).eval().float().logits(image.clone())[0]


@examples(25, 1000)
@given(networks)
def try_network(words: Words) -> None:
    images, test = bright_or_dark(12, classes=CLASSES), bright_or_dark(9, "test", CLASSES)
    network = build(words)
    lazy = words.habit == "lazy"
    before = {} if lazy else copy.deepcopy(network.state_dict())
    with done_or_refused("networks, evaluated"):
        found = cure.evaluate(network, data=test, attacks="pgd20", limit=4)
        logits = plain_logits(words, test.image[:4] / 255)
        first, second = logits.topk(2, dim=1).values.float().T
        # Lazy layers draw their weights in the first pass.
        same = words.precision == "float" and not lazy
        if same and (first - second > 1e-3).all():
            right = (logits.argmax(1) == test.label[:4]).sum().item()
            assert found["natural"]["correct"] == right
    with tempfile.TemporaryDirectory() as place, done_or_refused("networks, trained"):
        run = cure.train(
            "digits", ONE_STEP, run=Path(place) / "run", model=network, data=images, quiet=True
        )
        cure.evaluate(run, data=test, attacks="pgd20", limit=4)
    if words.precision == "float":
        for key, value in before.items():
            assert torch.equal(network.state_dict()[key], value), f"{key} was changed"


def test_a_random_network_works_or_is_refused_in_a_sentence() -> None:
    try_network()
    mostly_done("networks, evaluated", 0.2)
    mostly_done("networks, trained", 0.2)
