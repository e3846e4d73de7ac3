"""Known values of real data sets, and that reading them is exact."""

from __future__ import annotations

import hashlib

import pytest
import torch

from cure.config import DataConfig
from cure.data import load
from cure.errors import DataError

pytestmark = pytest.mark.data

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SHA256 = {
    "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "cifar100": "4cb8e5d9309da489bf6b19cc10cd96c3ae6f8daf225380b605aaee4c0d6aee19",
}


def sha256(image: torch.Tensor) -> str:
    """Of [N, C, H, W] uint8 in the order [N, H, W, C]."""
    return hashlib.sha256(image.permute(0, 2, 3, 1).contiguous().numpy()).hexdigest()


def test_cifar10_train(real_data) -> None:
    images = load(DataConfig(source="cifar10"), "train")
    assert images.image.shape == (50_000, 3, 32, 32)
    assert images.image.dtype == torch.uint8
    assert sha256(images.image) == SHA256["train"]
    assert (images.name, images.split, list(images.classes)) == ("cifar10", "train", CIFAR10)
    assert torch.bincount(images.label).tolist() == [5000] * 10
    deviation, mean = torch.std_mean(images.image.double() / 255, dim=(0, 2, 3))
    assert mean.tolist() == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
    assert deviation.tolist() == pytest.approx([0.24703, 0.24349, 0.26159], abs=1e-5)


def test_cifar10_test_and_limit(real_data) -> None:
    images = load(DataConfig(source="cifar10", limit=100), "test")
    assert len(images) == 10_000
    assert sha256(images.image) == SHA256["test"]
    assert torch.bincount(images.label).tolist() == [1000] * 10
    assert images.label[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    train = load(DataConfig(source="cifar10", limit=100), "train")
    assert len(train) == 100
    assert train.label[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]


def test_a_folder_reads_like_the_short_name(real_data) -> None:
    by_name = load(DataConfig(source="cifar10", limit=60), "train")
    by_path = load(DataConfig(source=str(real_data / "cifar10"), limit=60), "train")
    assert torch.equal(by_name.image, by_path.image)
    assert by_path.name == "cifar10"


def test_cifar100_has_a_test_split_only(real_data) -> None:
    if not (real_data / "cifar100").is_dir():
        pytest.skip("CURE_DATA holds no cifar100")
    images = load(DataConfig(source="cifar100"), "test")
    assert sha256(images.image) == SHA256["cifar100"]
    assert len(images.classes) == 100
    assert torch.bincount(images.label).tolist() == [100] * 100
    if not list((real_data / "cifar100").glob("train*")):
        with pytest.raises(DataError, match=r"split 'train' in 'cifar100', which has test"):
            load(DataConfig(source="cifar100"), "train")
    coarse = load(DataConfig(source="cifar100", label_column="coarse_label"), "test")
    assert len(coarse.classes) == 20


def test_imagenette_tests_on_validation_and_turns_grey_photographs_to_rgb(real_data) -> None:
    if not (real_data / "imagenette224").is_dir():
        pytest.skip("CURE_DATA holds no imagenette224")
    kept = load(DataConfig(source="imagenette224", resize=32), "train", limit=300)
    asked = load(DataConfig(source="imagenette224", resize=32, color="rgb"), "train", limit=300)
    assert torch.equal(kept.image, asked.image)
    assert kept.findings.converted["grey to RGB"] >= 1
    assert (kept.image[246, :1] == kept.image[246]).all()
    images = load(DataConfig(source="imagenette224", color="rgb", resize=64), "test")
    assert images.image.shape == (500, 3, 64, 64)
    assert images.classes[:2] == ("tench", "English springer")
    assert torch.bincount(images.label).tolist() == [50] * 10
    grey = (images.image[:, :1] == images.image).all(dim=(1, 2, 3))
    assert 1 <= int(grey.sum()) <= 50
