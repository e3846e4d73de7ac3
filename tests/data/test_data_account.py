"""What is said of the images of a run; class names of two sides; balanced sampling."""

from __future__ import annotations

import json

import pytest
import torch
from pictures import picture

from cure.config import AugmentConfig, DataConfig
from cure.data import (
    ImageKind,
    ImageSet,
    account,
    epoch,
    load_training,
    match_classes,
    relabelled,
)
from cure.data.accounting import account_of_run
from cure.data.loader import balanced_order
from cure.errors import ConfigError, CureNote, DataError


def images(label, split="train", shift=0, classes=("a", "b")) -> ImageSet:
    """Images that all differ, unless ``shift`` says the same."""
    label = torch.tensor(label)
    value = torch.arange(shift, shift + len(label))
    image = value[:, None, None, None].expand(-1, 1, 4, 4).to(torch.uint8)
    return ImageSet(image.contiguous(), label, classes, "made", split)


def test_counts_shares_missing_classes_and_duplicates() -> None:
    training = images([0] * 30 + [1] * 5)
    validation = images([0, 0, 0], "validation", 33)
    found = account(training, validation, images([0, 1], "test", 100))
    assert found.images == {"train": (30, 5), "validation": (3, 0), "test": (1, 1)}
    assert (found.largest, found.share, found.unequal) == ("a", 30 / 35, True)
    assert found.duplicates == {"train and validation": 2}
    assert found.missing == {"validation": ("b",)}
    assert found.few == ("b",)
    assert found.lines()[0] == (
        "data 'made': 35 train, 3 validation, 2 test images, 2 classes, 4x4 grey"
    )
    text = "\n".join(found.warnings())
    assert "the class 'a' has 86 % of the training images (a fair share is 50 %)" in text
    assert "data.sampler=balanced" in text
    assert "2 images of one split equal images of another (train and validation)" in text
    assert "no validation image of 'b'" in text
    assert "fewer than 10 training images in 'b'" in text
    json.dumps(found.content())


@pytest.mark.parametrize(
    ("counts", "unequal"),
    [
        ((10, 10), False),
        ((20, 10), False),
        ((21, 10), True),
        ((30, 10, 10), True),
        ((20, 10, 10), False),
        ((11,) * 10, False),
    ],
)
def test_unequal_classes(counts, unequal) -> None:
    label = [k for k, count in enumerate(counts) for _ in range(count)]
    names = tuple("abcdefghij"[: len(counts)])
    training = images(label, classes=names)
    found = account(training, images([0], "validation", 200, names))
    assert found.unequal == unequal
    assert any("fair share" in text for text in found.warnings()) == unequal


def test_equal_splits_are_not_warned_of() -> None:
    assert account(images([0, 1] * 20), images([0, 1], "validation", 90)).warnings() == []


def test_the_account_of_a_folder(image_folder) -> None:
    files = {
        f"{c}/{i}.png": picture(50 * k + i, (6, 8)) for k, c in enumerate("ab") for i in range(20)
    }
    files["a/grey.png"] = picture(7, (10, 12), "L")
    files["a/notes.txt"] = b"text"
    config = DataConfig(source=str(image_folder(files)), resize=6, validation=4)
    found = account_of_run(config, *load_training(config), with_test=True)
    assert {split: sum(counts) for split, counts in found.images.items()} == {
        "train": 29,
        "validation": 4,
        "test": 8,
    }
    assert found.sizes == ((8, 6), (12, 10))
    assert "6x8 to 10x12 pixels, now 6x6 RGB" in found.lines()[0]
    assert "1 image converted: grey to RGB" in found.lines()
    assert "1 .txt file skipped: they are no images" in found.lines()
    assert found.duplicates == {}


def test_a_test_split_that_cannot_be_used_is_told(image_folder) -> None:
    files = {
        f"train/{c}/{i}.png": picture(50 * k + i) for k, c in enumerate("ab") for i in range(20)
    }
    folder = image_folder(files | {"test/c/0.png": picture(99)})
    config = DataConfig(source=str(folder), validation=4)
    found = account_of_run(config, *load_training(config), with_test=True)
    assert "the test split cannot be used: expected the 2 classes" in found.warnings()[-1]


# class names


@pytest.mark.parametrize(
    ("ours", "theirs", "places"),
    [
        (("a", "b"), ("a", "b"), (0, 1)),
        (("a", "b"), ("b", "a"), (1, 0)),
        (("cat",), ("dog", "owl", "cat"), (2,)),
        (("Great_White shark",), ("goldfish", "great white shark"), (1,)),
        (("tench", "crane"), ("tench, Tinca tinca", "crane", "drake"), (0, 1)),
        (("0", "1", "2"), ("cat", "dog", "owl"), (0, 1, 2)),
        (("cat", "dog"), ("LABEL_0", "LABEL_1"), (0, 1)),
        (("0", "1", "2", "10"), ("0", "1", "10", "2"), (0, 1, 3, 2)),
    ],
)
def test_classes_are_matched_by_name(ours, theirs, places) -> None:
    assert match_classes(ours, theirs) == places


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        (("cat", "emu"), ("cat", "dog"), "'emu' is unknown to it"),
        (("0", "1"), ("cat", "dog", "owl"), "'0', '1' are unknown"),
        (("2", "3", "10", "11"), ("1", "2", "3", "10"), "'11' is unknown to it"),
        (("crane",), ("crane, bird", "crane, machine"), "could be 'crane, bird' or"),
        (
            ("cat", "tabby"),
            ("cat, tabby", "dog"),
            "several classes of the data fit 'cat, tabby'|fit the class",
        ),
    ],
)
def test_names_that_do_not_match_end_in_a_sentence(ours, theirs, sentence) -> None:
    with pytest.raises(DataError, match=sentence):
        match_classes(ours, theirs)


def test_placeholders_that_are_taken_in_order_are_said() -> None:
    with pytest.warns(CureNote, match="in their order: 'cat = 0', 'dog = 1'"):
        match_classes(("0", "1"), ("cat", "dog"))
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert match_classes((composed, "b"), ("b", apart)) == (1, 0)


def test_labels_follow_the_names_and_grey_images_the_channels() -> None:
    ours = images([0, 1, 1], classes=("dog", "cat"))
    found = relabelled(ours, ImageKind(("cat", "dog", "owl"), 3, (4, 4)))
    assert found.label.tolist() == [1, 0, 0]
    assert found.classes == ("cat", "dog", "owl")
    assert torch.equal(found.image, ours.image.expand(-1, 3, -1, -1))


# balanced sampling


@pytest.mark.parametrize("counts", [(90, 10), (50, 30, 21), (5, 0, 200)])
def test_a_balanced_order_gives_every_class_its_share(counts) -> None:
    label = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])
    order = balanced_order(label, torch.Generator().manual_seed(0))
    assert len(order) == len(label)
    drawn = torch.bincount(label[order], minlength=len(counts))
    present = [int(n) for n, count in zip(drawn, counts, strict=True) if count]
    assert max(present) - min(present) <= 1
    assert sum(present) == len(label)
    for one, count in enumerate(counts):
        if count:
            times = torch.bincount(order[label[order] == one], minlength=len(label))[label == one]
            assert times.max() - times.min() <= 1, "images of a class are drawn equally often"


def test_class_weights_scale_the_loss_of_each_image() -> None:
    import torch.nn.functional as F

    data = images([0] * 30 + [1] * 10)
    logits = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for augment in (None, AugmentConfig(crop_padding=0, flip=False, label_smoothing=0.2)):
        found = list(
            epoch(data, batch_size=8, epoch=0, seed=1, augment=augment, class_weights="balanced")
        )
        for batch in found:
            weight = torch.tensor([40 / 60, 40 / 20])[batch.label]
            each = F.cross_entropy(logits, batch.attack_target, reduction="none")
            assert torch.allclose(F.cross_entropy(logits, batch.target), (weight * each).mean())
        total = torch.cat([batch.target.sum(dim=1) for batch in found])
        assert total.mean() == pytest.approx(1)
    plain = next(epoch(data, batch_size=8, epoch=0, seed=1, augment=None))
    assert torch.equal(plain.target, plain.label)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_class_weights_balance_mixed_images_too(kind: str) -> None:
    data = images([0] * 300 + [1] * 100)
    augment = AugmentConfig(crop_padding=0, flip=False, **{kind: 1.0})
    found = list(
        epoch(data, batch_size=40, epoch=0, seed=1, augment=augment, class_weights="balanced")
    )
    # Every image has the same share in all, so both classes weigh 200 as they do unmixed.
    mass = torch.cat([batch.target for batch in found]).sum(dim=0)
    assert mass.tolist() == pytest.approx([200, 200], rel=1e-4)


@pytest.mark.parametrize("method", ["natural", "at", "trades", "cure"])
@pytest.mark.parametrize("setting", ["training.class_weights", "data.sampler"])
def test_unequal_classes_are_trained_equally(tmp_path, method, setting) -> None:
    """Where images tell nothing, a network names both classes alike, not by their size."""
    import cure

    draws = torch.Generator().manual_seed(0)
    label = torch.tensor([0] * 190 + [1] * 10)
    image = torch.rand(200, 1, 8, 8, generator=draws)
    given = ImageSet.of(image, label, ["many", "few"])
    common = {
        "training.epochs": 8,
        "training.validate_every": 8,
        "training.batch_size": 20,
        "training.optimizer.learning_rate": 0.01,
        "data.validation": 40,
        "start": "scratch",
        "method": method,
        "threat.epsilon": "1/255",
        "attack.step_size": "1/255",
        "attack.steps": 1,
    }

    def share_of_few(run: cure.Run) -> float:
        with torch.no_grad():
            return float(run.model("last")(given.image / 255).softmax(dim=1)[:, 1].mean())

    plain = cure.train("digits", common, data=given, run=tmp_path / "plain", quiet=True)
    equal = cure.train(
        "digits", common | {setting: "balanced"}, data=given, run=tmp_path / "equal", quiet=True
    )
    assert share_of_few(plain) + 0.05 < share_of_few(equal) < 0.7


def test_class_weights_need_a_method_that_takes_them(tmp_path) -> None:
    import cure

    settings = {"training.class_weights": "balanced", "method": "mart"}
    with pytest.raises(ConfigError, match=r"takes weights .*got mart; set data\.sampler=balanced"):
        cure.train("digits", settings, run=tmp_path / "run", quiet=True)


def test_balanced_epochs_are_repeatable_and_differ() -> None:
    data = images([0] * 90 + [1] * 10)

    def drawn(number: int, **more) -> list[int]:
        found = epoch(data, batch_size=10, epoch=number, seed=1, augment=None, **more)
        return torch.cat([batch.index for batch in found]).tolist()

    assert drawn(0, sampler="balanced") == drawn(0, sampler="balanced")
    assert drawn(0, sampler="balanced") != drawn(1, sampler="balanced")
    assert sorted(drawn(0)) == list(range(100))
    assert drawn(0, sampler="balanced", start=3) == drawn(0, sampler="balanced")[30:]
