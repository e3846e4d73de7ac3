"""From a run to a network for other programs: python export_and_serve.py

Weights go to a safetensors file, the computation to a torch.export program, which needs no
package but PyTorch.
"""

import tempfile
from pathlib import Path

import torch

import cure
from cure.models import save_weights

folder = Path(tempfile.mkdtemp())
settings = {"method": "at", "start": "scratch", "training.epochs": 2}
run = cure.train("digits", settings, run=folder / "run", quiet=True)
model = run.model()  # best weights, evaluation mode, on the processor

# 1. Weights alone, for the same architecture elsewhere.
save_weights(model, folder / "robust.safetensors", {"run": run.config.name})

# 2. The whole computation, for any batch size; pixels in [0, 1] in, logits out.
example = torch.rand(2, 1, 8, 8)
batch = torch.export.Dim("batch", min=1)
program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
torch.export.save(program, folder / "robust.pt2")

# 3. Serve it: nothing of this package is needed from here on.
served = torch.export.load(folder / "robust.pt2").module()
image = torch.rand(5, 1, 8, 8)
chances = served(image).softmax(dim=1)
print("classes", chances.argmax(dim=1).tolist())
with torch.no_grad():
    print("largest difference", float((served(image) - model(image)).abs().max()))
