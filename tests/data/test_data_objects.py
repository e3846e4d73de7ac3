"""Images and labels that are Python objects, and folders of other libraries."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, picture, pixels_of
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from cure.config import DataConfig
from cure.data import ImageSet, as_images, load
from cure.data.original import read_plain_pickle
from cure.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 5, 6, 3), np.uint8)
NUMBERS = np.arange(12) % 3
NAMES = [["owl", "cat", "dog"][n] for n in NUMBERS]
IMAGE = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


class Items(Dataset):
    """A data set in the style of torchvision."""

    def __init__(self, form="pil", classes=None, label=int) -> None:
        self.form, self.label = form, label
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, i):
        from PIL import Image

        if i >= len(PIXELS):
            raise IndexError
        image = {
            "pil": lambda: Image.fromarray(PIXELS[i]),
            "tensor": lambda: IMAGE[i].float() / 255,
            "array": lambda: PIXELS[i],
        }[self.form]()
        label = self.label(NUMBERS[i])
        return {"image": image, "label": label} if self.form == "array" else (image, label)


def hub(names=False):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.Value("string")
            if names
            else datasets.ClassLabel(names=["a", "b", "c"]),
        }
    )
    from PIL import Image

    rows = {
        "image": [{"bytes": encoded(Image.fromarray(p)), "path": None} for p in PIXELS],
        "label": NAMES if names else NUMBERS.tolist(),
    }
    return datasets.Dataset.from_dict(rows, features=features)


PAIRS = {
    "arrays": lambda: (PIXELS, NUMBERS),
    "channels first": lambda: (PIXELS.transpose(0, 3, 1, 2), NUMBERS),
    "floats": lambda: (PIXELS / 255, NUMBERS.astype(np.float32)),
    "half": lambda: (torch.from_numpy(PIXELS / 255).half(), NUMBERS),
    "whole numbers": lambda: (PIXELS.astype(np.int64), NUMBERS[:, None]),
    "one-hot": lambda: [PIXELS, np.eye(3)[NUMBERS]],
    "tensors": lambda: (IMAGE, torch.from_numpy(NUMBERS)),
    "tensor floats": lambda: (IMAGE.float() / 255, torch.from_numpy(NUMBERS).int()),
    "list of arrays": lambda: (list(PIXELS), NUMBERS.tolist()),
    "list of items": lambda: list(zip(PIXELS, NUMBERS.tolist(), strict=True)),
    "dictionary": lambda: {"x": PIXELS, "y": NUMBERS},
    "splits": lambda: {"Train": (PIXELS, NUMBERS), "test": (PIXELS[:1], NUMBERS[:1])},
    "tensor data set": lambda: TensorDataset(IMAGE, torch.from_numpy(NUMBERS)),
    "pillow items": lambda: Items(),
    "tensor items": lambda: Items("tensor", label=lambda n: torch.tensor(n)),
    "dictionary items": lambda: Items("array"),
    "loader": lambda: DataLoader(Items("tensor"), batch_size=5, shuffle=True),
    "image set": lambda: ImageSet.of(IMAGE, torch.from_numpy(NUMBERS)),
    "sparse": lambda: (IMAGE.to_sparse(), NUMBERS),
    "hub": hub,
    "hub splits": lambda: __import__("datasets").DatasetDict({"train": hub()}),
}


def test_columns_of_one_hot_labels_are_classes_without_images_too() -> None:
    labels = np.eye(5)[NUMBERS]
    assert as_images((PIXELS, labels)).classes == ("0", "1", "2", "3", "4")
    items = [(pixels, label) for pixels, label in zip(PIXELS, labels, strict=True)]
    images = as_images(items)
    assert (images.classes, images.label.tolist()) == (tuple("01234"), NUMBERS.tolist())


def test_labels_that_number_something_else_are_refused_at_once() -> None:
    """A name for each number up to such a label would fill the memory."""
    labels = NUMBERS + 3_000_000
    for given in (
        lambda: as_images((PIXELS, labels)),
        lambda: ImageSet.of(IMAGE, torch.tensor(labels)),
    ):
        with pytest.raises(DataError, match="number the classes from 0, got 3,000,002 among 12"):
            given()
    assert len(as_images((PIXELS, NUMBERS + 900)).classes) == 903


@pytest.mark.parametrize("form", PAIRS)
def test_every_object_gives_the_same_images(form) -> None:
    images = as_images(PAIRS[form]())
    # Half precision holds each of the 256 levels, to the nearest.
    assert torch.equal(images.image, IMAGE)
    assert images.label.tolist() == NUMBERS.tolist()
    assert len(images.classes) == 3
    few = as_images(PAIRS[form](), limit=4)
    assert torch.equal(few.image, IMAGE[:4])
    assert few.classes == images.classes


@pytest.mark.parametrize(
    "given",
    [
        lambda: (PIXELS, NAMES),
        lambda: (PIXELS, np.array(NAMES)),
        lambda: (PIXELS, np.array(NAMES, dtype=object)),
        lambda: Items(label=lambda n: ["owl", "cat", "dog"][n]),
        lambda: hub(names=True),
    ],
)
def test_labels_may_be_names(given) -> None:
    images = as_images(given())
    assert images.classes == ("cat", "dog", "owl")
    assert [images.classes[n] for n in images.label.tolist()] == NAMES


def test_class_names_and_parts_of_a_data_set_are_kept() -> None:
    whole = Items(classes=["x", "y", "z"])
    part = as_images(Subset(whole, [3, 5, 7]))
    assert part.classes == ("x", "y", "z")
    assert torch.equal(part.image, IMAGE[[3, 5, 7]])
    loader = DataLoader(Items("tensor", ["x", "y", "z"]), sampler=SubsetRandomSampler([7, 3, 5]))
    images = as_images(loader)
    assert images.classes == ("x", "y", "z")
    assert torch.equal(images.image, IMAGE[[3, 5, 7]])


def test_a_loader_that_changes_its_batches_is_read_through() -> None:
    def collate(items):
        images, labels = zip(*items, strict=True)
        return 1 - torch.stack(images), torch.tensor(labels)

    loader = DataLoader(Items("tensor"), batch_size=5, collate_fn=collate)
    assert torch.equal(as_images(loader).image, 255 - IMAGE)


def test_settings_apply_to_objects() -> None:
    from PIL import Image

    sized = as_images(Items(), "train", DataConfig(source="x", resize=4, color="grey"))
    expected = Image.fromarray(PIXELS[0]).convert("L").resize((4, 4), Image.Resampling.BICUBIC)
    assert torch.equal(sized.image[0], pixels_of(expected))
    again = as_images(
        ImageSet.of(IMAGE, torch.from_numpy(NUMBERS)),
        "train",
        DataConfig(source="x", resize=4, color="grey"),
    )
    assert torch.equal(again.image, sized.image)


def test_the_split_of_a_dictionary_is_chosen() -> None:
    given = {"train": (PIXELS, NAMES), "valid": (PIXELS[:2], ["owl", "dog"])}
    images = as_images(given, "test")
    assert images.classes == ("cat", "dog", "owl")
    assert images.label.tolist() == [2, 1]
    with pytest.raises(DataError, match=r"a split 'test' in the dictionary.*'train'"):
        as_images({"train": (PIXELS, NAMES)}, "test")


def test_classes_are_those_of_the_training_split_whatever_its_name() -> None:
    given = {"fit": (PIXELS, NAMES), "look": (PIXELS[:2], ["owl", "dog"])}
    config = DataConfig(source="x", train_split="fit", test_split="look", validation_split="look")
    for split in ("test", "validation"):
        images = as_images(given, split, config)
        assert images.classes == ("cat", "dog", "owl")
        assert images.label.tolist() == [2, 1]


class Frame:
    """As much of a data frame as is asked for."""

    def __init__(self, **columns: list) -> None:
        self.values, self.columns = columns, list(columns)

    def __getitem__(self, name: str) -> list:
        return self.values[name]

    def to_dict(self) -> dict:
        return self.values


@pytest.mark.parametrize(
    "form",
    [
        lambda files, names: list(zip(files, names, strict=True)),
        lambda files, names: (files, names),
        lambda files, names: [
            {"path": str(f), "label": n} for f, n in zip(files, names, strict=True)
        ],
        lambda files, names: Frame(filename=list(map(str, files)), species=names, age=[3] * 12),
        lambda files, names: {"train": (files, np.array(names))},
    ],
)
def test_images_may_be_paths(form, tmp_path, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.setenv("HOME", str(tmp_path))
    files = [Path(f"~/{number}.png") for number in range(12)]
    for path, pixels in zip(files, PIXELS, strict=True):
        Image.fromarray(pixels).save(path.expanduser())
    images = as_images(form(files, NAMES))
    assert torch.equal(images.image, IMAGE)
    assert [images.classes[n] for n in images.label] == NAMES
    files[7].expanduser().unlink()
    with pytest.raises(DataError, match=r"/7\.png' cannot be used: .*No such file"):
        as_images(form(files, NAMES))
    left_out = as_images(form(files, NAMES), config=DataConfig(source="memory", damaged="skip"))
    assert len(left_out) == 11


class Broken(Items):
    def __getitem__(self, index):
        if index == 7:
            raise KeyError("no such cat")
        return super().__getitem__(index)


class Unreadable(Items):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("image file is truncated\nin 7.jpg")
        return super().__getitem__(index)


def wide(kind):
    """Pillow images that their conversion to 8 bits would turn white, or black."""
    from PIL import Image

    pixels = PIXELS[..., 0].astype(kind) * 257
    return [(Image.fromarray(one), int(n)) for one, n in zip(pixels, NUMBERS, strict=True)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Items("tensor"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (lambda: PIXELS, "got ndarray, which has no labels; pass \\(images, labels\\)"),
        (lambda: 3, "expected \\(images, labels\\)"),
        (lambda: Stream(), "whose length is not known"),
        (lambda: (i for i in range(3)), "whose length is not known"),
        (lambda: (PIXELS, NUMBERS[:5]), "12 labels, one an image"),
        (lambda: (PIXELS / 127.5 - 1, NUMBERS), "from -1 to 1; undo their standardisation"),
        (lambda: (PIXELS * 1.0, NUMBERS), "divide them by 255"),
        (lambda: (PIXELS * np.nan, NUMBERS), "got not a number or infinity; correct"),
        (lambda: (PIXELS[:0] / 255, NUMBERS[:0]), "expected images with pixels, got an array"),
        (lambda: (PIXELS.astype(np.int64) * 300, NUMBERS), "0..255"),
        (lambda: (PIXELS[..., :2], NUMBERS), "has no side of 1 or 3"),
        (lambda: (PIXELS[:, :3], NUMBERS), "could be either"),
        (lambda: (PIXELS.reshape(12, -1), NUMBERS), "got shape"),
        (lambda: (PIXELS, NUMBERS + 0.5), "whole numbers or names"),
        (lambda: (PIXELS, NUMBERS - 1), "labels from 0, got -1"),
        (lambda: (PIXELS, np.ones((12, 3))), "not one-hot"),
        (lambda: (PIXELS, [None] * 12), "numbers or names, got None"),
        (lambda: (PIXELS[:0], NUMBERS[:0]), "no image"),
        (lambda: TensorDataset(IMAGE), "got 1 parts"),
        (lambda: (PIXELS, NUMBERS, PIXELS, NUMBERS), r"got 4 arrays; pass .*\{'train': \(images"),
        (lambda: ((IMAGE, NUMBERS), (IMAGE, NUMBERS)), "got 2 pairs; pass the pair that is meant"),
        (
            Broken,
            "item 7 of the data set .* fails with KeyError: 'no such cat'; correct the data set",
        ),
        (lambda: wide(np.uint16), "item 0 of train.* has more than 8 bits a channel; convert it"),
        (lambda: wide(np.float32), "item 0 of train.* has more than 8 bits a channel; convert it"),
        (
            Unreadable,
            "item 7 .* fails with OSError: image file is truncated; .* without that item",
        ),
        (
            lambda: [(torch.rand(3, 4, 4) - row, row) for row in (1, 2, 1)],
            r"\(item 0 of train: expected [^;]*; undo their standardisation[^;]*; likewise item 1 "
            r"of train, item 2 of train\); repair",
        ),
        (lambda: [IMAGE[0], IMAGE[1], IMAGE[2]], "items \\(image, label\\)"),
        (lambda: {"a": 1}, "a split 'train' in the dictionary"),
        (lambda: ([PIXELS[0], PIXELS[1, :2]], [0, 1]), "images of one size"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(given, sentence) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        as_images(given())
    assert "\n" not in str(caught.value)


# folders of other libraries


def both(folder):
    return [load(DataConfig(source=str(folder)), split) for split in ("train", "test")]


def test_a_folder_of_save_to_disk_is_read(tmp_path) -> None:
    import datasets

    datasets.DatasetDict({"train": hub(), "test": hub().select(range(3))}).save_to_disk(
        str(tmp_path / "saved")
    )
    first, second = both(tmp_path / "saved")
    assert torch.equal(first.image, IMAGE)
    assert torch.equal(second.image, IMAGE[:3])
    hub(names=True).save_to_disk(str(tmp_path / "one"))
    first, second = both(tmp_path / "one")
    assert (len(first), len(second), first.classes) == (10, 2, ("cat", "dog", "owl"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="written by save_to_disk in"):
        both(tmp_path / "one")


def cifar(folder, protocol=2):
    folder.mkdir(parents=True)
    draws = np.random.default_rng(1)
    data = draws.integers(0, 256, (6, 20, 3072), np.uint8)
    for i, part in enumerate(data):
        name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
        content = {b"data": part, b"labels": [j % 10 for j in range(20)], b"filenames": ["a"] * 20}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    names = {b"label_names": [f"class {i}".encode() for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=protocol))
    return torch.from_numpy(data).reshape(6, 20, 3, 32, 32)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_the_python_batches_of_cifar_are_read(tmp_path, protocol, inside) -> None:
    data = cifar(tmp_path / "c" / inside, protocol)
    first, second = both(tmp_path / "c")
    assert torch.equal(first.image, data[:5].flatten(0, 1))
    assert torch.equal(second.image, data[5])
    assert first.classes[3] == "class 3"
    (tmp_path / "c" / inside / "data_batch_3").unlink()
    with pytest.raises(DataError, match="'data_batch_3' is missing"):
        both(tmp_path / "c")


class Trap:
    def __init__(self, call, *arguments) -> None:
        self.what = call, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_anything_else_is_refused_and_not_run(tmp_path, protocol) -> None:
    import os
    import shutil

    kept = tmp_path / "kept"
    kept.mkdir()
    traps = [
        Trap(os.mkdir, str(tmp_path / "made")),
        Trap(shutil.rmtree, str(kept)),
        Trap(eval, f"__import__('os').mkdir({str(tmp_path / 'made')!r})"),
        Trap(getattr, "a", "upper"),
        np.array([Trap(os.mkdir, str(tmp_path / "made"))], dtype=object),
    ]
    for trap in traps:
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps({b"data": trap}, protocol=protocol))
        with pytest.raises(DataError, match="expected the plain numbers and names of CIFAR"):
            read_plain_pickle(path)
    assert kept.is_dir()
    assert not (tmp_path / "made").exists()
    for content in (b"", b"text", pickle.dumps([1]), pickle.dumps({1: 2})[:-3]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="download the file again"):
            read_plain_pickle(path)


def idx(array) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inside", ["", "MNIST/raw"])
def test_idx_files_of_mnist_are_read(tmp_path, zipped, inside) -> None:
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 12), ("t10k", 5)):
        for kind, array in (
            ("images-idx3", PIXELS[:count, ..., 0]),
            ("labels-idx1", NUMBERS[:count].astype(np.uint8)),
        ):
            content = idx(np.ascontiguousarray(array))
            path = folder / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    first, second = both(tmp_path)
    assert torch.equal(first.image, IMAGE[:, :1])
    assert torch.equal(second.image, IMAGE[:5, :1])
    assert first.label.tolist() == NUMBERS.tolist()
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(DataError, match="expected an idx file in"):
        both(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="images and labels of split 'test'"):
        both(tmp_path)


def test_string_labels_of_parquet(write_parquet) -> None:
    import datasets

    pictures = [encoded(picture(i)) for i in range(6)]
    text = datasets.Value("string")
    folder = write_parquet(
        "train", pictures, ["owl", "cat", "owl", "cat", "dog", "dog"], label_type=text
    )
    write_parquet("test", pictures[:2], ["owl", "dog"], label_type=text)
    first, second = both(folder)
    assert first.classes == ("cat", "dog", "owl")
    assert first.label.tolist() == [2, 0, 2, 0, 1, 1]
    assert second.label.tolist() == [2, 1]


def test_labels_that_a_data_set_changes_are_those_of_its_items() -> None:
    class Parity(Dataset):
        """Keeps the numbers, and returns whether they are odd; the first one is not changed."""

        targets = list(range(10)) * 2

        def __len__(self) -> int:
            return 20

        def __getitem__(self, i):
            return torch.full((3, 4, 4), i / 20), self.targets[i] % 2

    assert as_images(Parity()).label.tolist() == [0, 1] * 10


def test_bfloat16_images_are_read() -> None:
    image = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    found = as_images((image.bfloat16(), [0, 1]))
    assert found.image.float().mean(dim=(1, 2, 3)).tolist() == [0, 255]


def test_a_transform_of_a_hub_data_set_is_told() -> None:
    given = hub().with_transform(lambda rows: rows)
    (note,) = as_images(given).findings.notes
    assert "its transform" in note


def test_whole_numbers_of_0_and_1_are_asked_about() -> None:
    binary = np.random.default_rng(0).integers(0, 2, (6, 4, 4))
    with pytest.raises(DataError, match="only 0 and 1"):
        as_images((binary.astype(np.uint8), [0, 1] * 3))
    assert set(as_images((binary.astype(bool), [0, 1] * 3)).image.unique().tolist()) == {0, 255}
