"""How robust is this network?  python evaluate_any_model.py

For files and hubs the command does the same: ``cure evaluate hf:NAME --data FOLDER``.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import cure

digits = load_digits()
images = (
    torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
)  # [N, 1, 8, 8] in [0, 1]
labels = torch.tensor(digits.target)

# Any network that takes images in [0, 1] and returns logits; here a plainly trained one.
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[:1500]), labels[:1500]).backward()
    optimizer.step()

data = cure.ImageSet.of(images[1500:], labels[1500:], name="digits", split="test")
result = cure.evaluate(model, data=data, attacks=["fgsm", "pgd20"], epsilon=0.05, limit=200)
print(f"natural: {result['natural']['accuracy']:.1f} %")
for name, attack in result["attacks"].items():
    low, high = attack["interval"]
    print(f"{name}: {attack['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})")

# Whether such numbers can be believed: gradients that vanish, steps that do too little, ...
diagnosis = cure.diagnose(model, data=data, epsilon=0.05, limit=50)
print("diagnosis:", diagnosis["verdict"])
