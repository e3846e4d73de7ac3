"""An attack of your own, by its name in every evaluation: python add_an_attack.py

As bars.py in your folder, commands know it: ``CURE_PLUGINS=bars cure evaluate RUN --attacks bars``.
"""

import torch
from torch import Tensor, nn

import cure
from cure.attacks import Threat
from cure.attacks.registry import register
from cure.utils.random import generator


@register("bars", "random vertical bars of plus or minus epsilon, 20 tries", {"tries": 20})
def bars(
    model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
) -> Tensor:
    """Keep, of each image, the try with the highest loss; ``number`` is that of the batch."""
    draws = generator(image.device, seed, "bars", number)
    best, highest = image, torch.full(label.shape, -torch.inf, device=image.device)
    for _ in range(20):
        sign = torch.rand(len(image), 1, 1, image.shape[3], generator=draws, device=image.device)
        change = threat.project(threat.epsilon * (sign - 0.5).sign().expand_as(image))
        tried = (image + change).clamp(0, 1)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(tried), label, reduction="none")
        better = (loss > highest)[:, None, None, None]
        best, highest = torch.where(better, tried, best), torch.maximum(highest, loss)
    return best


if __name__ == "__main__":
    import tempfile

    settings = {"method": "at", "start": "scratch", "training.epochs": 3}
    run = cure.train("digits", settings, run=tempfile.mkdtemp() + "/run", quiet=True)
    result = cure.evaluate(run, attacks=["bars", "pgd20"], limit=200)
    for name, found in result["attacks"].items():
        print(f"{name}: {found['accuracy']:.1f} % still right")
