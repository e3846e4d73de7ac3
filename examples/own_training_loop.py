"""CURE in a plain PyTorch loop: python own_training_loop.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cure

digits = load_digits()
images = (
    torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
)  # [N, 1, 8, 8] in [0, 1]
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)
test_images, test_labels = images[1500:], labels[1500:]

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(256, 10),
)

epochs = 6
threat = cure.Threat("Linf", 0.1)
method = cure.methods.CURE(
    model,
    threat=threat,
    steps=len(loader) * epochs,
    revision={"horizon": 0.1},  # memory of the revision model, a share of the training
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(epochs):
    for batch_images, batch_labels in loader:
        step = method(batch_images, batch_labels)  # adversarial images, loss, masked gradients
        optimizer.zero_grad()
        step.backward()  # or accelerator.backward(step.loss), self.manual_backward(step.loss)
        optimizer.step()
        method.update()
    print(f"epoch {epoch + 1}: loss {step.metrics['loss']:.3f}")

robust = method.inference_model().eval()
attacked = cure.attacks.PGD(threat, steps=20)(robust, test_images, test_labels)
for name, tested in (("natural", test_images), ("PGD-20", attacked)):
    right = (robust(tested).argmax(dim=1) == test_labels).float().mean()
    print(f"{name} accuracy {100 * right:.1f} %")
