from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from pictures import encoded, picture, pixels_of
from PIL import Image

from cure.config import DataConfig
from cure.data import SHORT_NAMES, known_sources, load
from cure.errors import CureNote, DataError


def config(source, **changes) -> DataConfig:
    return DataConfig(source=str(source), **changes)


def train(source, **changes):
    return load(config(source, **changes), "train")


def fails(pattern: str, source, split: str = "train", **changes) -> None:
    """Loading fails with one sentence that matches and says what to do."""
    with pytest.raises(DataError, match=pattern) as caught:
        load(config(source, **changes), split)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(r"[;.] ", text), "says what to do"


# digits


def test_digits_are_carved_into_disjoint_splits() -> None:
    first, second = train("digits"), load(config("digits"), "test")
    assert first.image.shape == (1438, 1, 8, 8)
    assert second.image.shape == (359, 1, 8, 8)
    assert (first.split, second.split, first.name) == ("train", "test", "digits")
    assert first.classes == tuple("0123456789")
    assert first.image.max() == 255
    assert first.image.dtype == torch.uint8
    assert first.label.dtype == torch.int64
    shares = torch.bincount(second.label) / torch.bincount(torch.cat([first.label, second.label]))
    assert shares.min() > 0.19
    assert shares.max() < 0.21
    seen = {i.numpy().tobytes() for i in first.image}
    assert not any(i.numpy().tobytes() in seen for i in second.image)


def test_digits_split_is_stable_and_seeded() -> None:
    def fingerprint(**changes) -> str:
        image = load(config("digits", **changes), "test").image
        return hashlib.sha256(image.numpy()).hexdigest()[:16]

    assert fingerprint() == "a50017758be1e641"
    assert fingerprint(split_seed=1) != fingerprint()
    assert len(load(config("digits", test_fraction=0.5), "test")) == 898


def test_digits_values_are_scaled_from_sixteenths() -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    image = torch.cat([train("digits").image, load(config("digits"), "test").image])
    assert sorted(set(image.flatten().tolist())) == [round(v * 255 / 16) for v in range(17)]
    assert np.isclose(image.double().mean(), original.images.mean() * 255 / 16, atol=0.3)


def test_limit_comes_after_the_carve() -> None:
    whole, some = train("digits"), train("digits", limit=50)
    assert len(some) == 50
    assert torch.equal(some.image, whole.image[:50])
    assert len(load(config("digits", limit=50), "test")) == 359
    assert len(train("digits", limit=10_000)) == 1438


def test_resize_and_color() -> None:
    images = train("digits", resize=12, color="rgb", limit=30)
    assert images.image.shape == (30, 3, 12, 12)
    assert torch.equal(images.image[:, 0], images.image[:, 2])
    plain = train("digits", limit=30)
    expected = Image.fromarray(plain.image[0, 0].numpy()).resize((12, 12), Image.Resampling.BICUBIC)
    assert torch.equal(train("digits", resize=12, limit=30).image[0], pixels_of(expected))


@pytest.mark.parametrize("name", ["train{}", "{}_train", "{}train"])
def test_arrays_are_known_by_a_split_and_a_kind(tmp_path, name) -> None:
    path = tmp_path / "arrays.npz"
    pixels, label = np.arange(24 * 16, dtype=np.uint8).reshape(24, 4, 4), np.arange(24) % 2
    arrays = {name.format("X"): pixels[:18], name.format("Y"): label[:18]}
    arrays |= {key.replace("train", "test"): value for key, value in arrays.items()}
    np.savez(path, **arrays)
    assert [len(load(config(path), split)) for split in ("train", "test")] == [18, 18]


def test_a_carving_that_leaves_nothing_is_refused(tmp_path) -> None:
    path = tmp_path / "two.npz"
    np.savez(path, image=np.zeros((2, 4, 4), np.uint8), label=np.array([0, 1]))
    fails(
        r"carve 1 to 1 of the 2 images of 'two'.*got 0 with data\.test_fraction=0\.1",
        path,
        test_fraction=0.1,
    )


# names and paths


def test_known_sources_names_everything(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("CURE_DATA", str(tmp_path))
    known = dict(known_sources())
    assert set(known) == {"digits", "mine", *SHORT_NAMES}
    assert "CURE_DATA" in known["cifar10"]
    assert "uoft-cs/cifar100" in known["cifar100"]


def test_known_sources_survives_a_wrong_folder(monkeypatch) -> None:
    monkeypatch.setenv("CURE_DATA", "/no/such/folder")
    assert {name for name, _ in known_sources()} == {"digits", *SHORT_NAMES}


def test_unknown_names_and_paths(tmp_path) -> None:
    fails(r"unknown data source 'cifar1'; did you mean 'cifar10'\?.*owner/name", "cifar1")
    fails(r"does not exist; correct the path", tmp_path / "absent")
    fails(r"does not exist; correct the path", tmp_path / "absent.npz")
    fails(r"does not exist", "absent.npz")
    fails(r"does not exist", "folder/absent.npz")
    (tmp_path / "notes.txt").write_text("x")
    fails(
        r"a folder or a \.npz, \.parquet or \.csv file as data\.source, got the file",
        tmp_path / "notes.txt",
    )


def test_cure_data_must_be_a_folder(monkeypatch) -> None:
    monkeypatch.setenv("CURE_DATA", "/no/such/folder")
    fails(r"environment variable CURE_DATA, got '/no/such/folder'", "cifar10")


def test_a_name_is_looked_up_under_cure_data(write_parquet, monkeypatch) -> None:
    folder = write_parquet("train", [encoded(picture(i)) for i in range(10)], [0, 1] * 5)
    monkeypatch.setenv("CURE_DATA", str(folder.parent))
    images = train("pictures")
    assert images.name == "pictures"
    assert len(images) == 8
    fails(r"did you mean 'pictures'", "picture")


# the hub


def hub_stub(monkeypatch, result):
    import datasets

    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_names(monkeypatch) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    pictures = [picture(i) for i in range(6)]
    rows = {"image": [{"bytes": encoded(p), "path": None} for p in pictures], "label": [0, 1] * 3}
    table = datasets.Dataset.from_dict(rows, features=features)
    found = datasets.DatasetDict({"train": table, "test": table.select([5, 0])})
    calls = hub_stub(monkeypatch, found)
    images = train("someone/something:small")
    assert torch.equal(images.image, torch.stack([pixels_of(p) for p in pictures]))
    assert images.classes == ("a", "b")
    assert images.name == "someone/something:small"
    test = load(config("someone/something"), "test")
    assert torch.equal(test.image[0], pixels_of(pictures[5]))
    assert test.label.tolist() == [1, 0]
    assert train("svhn").name == "svhn"
    assert calls == [
        ("someone/something", "small"),
        ("someone/something", None),
        ("ufldl-stanford/svhn", "cropped_digits"),
    ]


def test_no_network(monkeypatch) -> None:
    hub_stub(monkeypatch, ConnectionError("Couldn't reach the Hub\nand more"))
    fails(r"'uoft-cs/cifar10'.*ConnectionError: Couldn't reach the Hub\).*set CURE_DATA", "cifar10")
    fails(r"'who/what'.*no folder of this name.*folder of parquet files", "who/what")


def test_the_real_library_offline(tmp_path) -> None:
    code = (
        "from cure.data import load; from cure.config import DataConfig\n"
        "from cure.errors import DataError\n"
        "try: load(DataConfig(source='cifar10'), 'train')\n"
        "except DataError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CURE_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "set CURE_DATA to a folder" in done.stdout


# parquet


def test_parquet_is_read_exactly(write_parquet) -> None:
    pictures = [picture(i) for i in range(700)]
    labels = [i % 2 for i in range(700)]
    write_parquet(
        "train",
        [encoded(p) for p in pictures[:400]],
        labels[:400],
        file="train-00000-of-00002.parquet",
    )
    folder = write_parquet(
        "train",
        [encoded(p, "WEBP") for p in pictures[400:500]] + [encoded(p) for p in pictures[500:]],
        labels[400:],
        file="train-00001-of-00002.parquet",
    )
    folder = write_parquet("test", [encoded(p) for p in pictures[:3]], [0, 1, 0])
    images = train(folder)
    expected = torch.stack([pixels_of(p) for p in pictures])
    assert torch.equal(images.image[:400], expected[:400])
    assert torch.equal(images.image[500:], expected[500:])
    assert images.label.tolist() == labels
    assert images.classes == ("cat", "dog")
    assert (images.name, images.split) == ("pictures", "train")
    assert torch.equal(train(folder, limit=450).image, images.image[:450])
    assert len(load(config(folder), "test")) == 3


def test_local_parquet_leaves_no_cache(write_parquet, tmp_path) -> None:
    folder = write_parquet("train", [encoded(picture(i)) for i in range(10)], [0, 1] * 5)
    code = (
        "import sys; from cure.data import load; from cure.config import DataConfig\n"
        "load(DataConfig(source=sys.argv[1]), 'train')"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment["HOME"] = str(home)
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)
    assert [p for p in home.rglob("*") if p.is_file()] == []


def test_splits_of_parquet(write_parquet) -> None:
    data = [encoded(picture(i)) for i in range(4)], [0, 1, 0, 1]
    folder = write_parquet("train", *data)
    assert len(load(config(folder, test_fraction=0.5), "test")) == 2
    write_parquet("validation", data[0][:3], data[1][:3])
    assert len(load(config(folder), "test")) == 3
    # Trained on, the validation split is no test split as well: one is carved from it.
    swapped = config(folder, train_split="validation", test_fraction=0.34)
    assert (len(load(swapped, "train")), len(load(swapped, "test"))) == (2, 1)
    write_parquet("test", data[0][:2], data[1][:2], file="test.parquet")
    assert len(load(config(folder), "test")) == 2
    assert len(load(config(folder, test_split="validation"), "test")) == 3
    assert len(load(config(folder, train_split="validation"), "train")) == 3
    fails(
        r"split 'holdout' in 'pictures', which has test, train, validation; set data\.test_split",
        folder,
        test_split="holdout",
    )
    fails(
        r"split 'learn' in 'pictures', which has.*set data\.train_split",
        folder,
        train_split="learn",
    )
    fails(r"different splits for training and test", folder, test_split="train")


@pytest.mark.parametrize("name", ["data.parquet", "0000.parquet", "photos-0-of-1.parquet"])
def test_the_only_parquet_file_may_have_any_name(write_parquet, name: str) -> None:
    folder = write_parquet("train", [encoded(picture(i)) for i in range(10)], [0, 1] * 5, file=name)
    for source in (folder, folder / name):
        assert [len(load(config(source), split)) for split in ("train", "test")] == [8, 2]
    (folder / name).rename(folder / "test.parquet")
    fails(r"expected a split 'train' in 'pictures', which has test", folder)
    (folder / "test.parquet").rename(folder / "one.parquet")
    shutil.copy(folder / "one.parquet", folder / "two.parquet")
    fails(r"expected a split 'train' in 'pictures', which has one, two", folder)


@pytest.mark.parametrize("form", ["{}", "split={}", "plain/{}"])
def test_parquet_in_folders_of_splits(write_parquet, tmp_path, form: str) -> None:
    count = {"train": 10, "test": 4}
    for split, images in count.items():
        encoded_ones = [encoded(picture(i)) for i in range(images)]
        folder = write_parquet(split, encoded_ones, [0, 1] * (images // 2), file="0.parquet")
        place = tmp_path / "set" / form.format(split)
        place.mkdir(parents=True)
        (folder / "0.parquet").rename(place / "0.parquet")
    source = tmp_path / "set"
    assert [len(load(config(source), split)) for split in count] == [10, 4]
    other = tmp_path / "set" / "other"
    other.mkdir()
    shutil.copy(place / "0.parquet", other / "1.parquet")
    fails(r"files of one data set in .*/set', got some in .*'other'.*give one of these", source)
    picture(1).save(source / "a.png")
    fails("images outside class folders", source)


def test_a_name_with_pattern_characters(write_parquet) -> None:
    folder = write_parquet("train", [encoded(picture(i)) for i in range(10)], [0, 1] * 5)
    moved = folder.rename(folder.with_name("odd [1] *name"))
    assert len(train(moved)) == 8


def test_columns_are_found_or_named(write_parquet) -> None:
    data = [encoded(picture(i)) for i in range(10)], [0, 1] * 5
    folder = write_parquet("train", *data, columns=("photo", "kind"))
    assert train(folder).classes == ("cat", "dog")
    assert len(train(folder, image_column="photo", label_column="kind")) == 8
    fails(
        r"column 'foto' \(data\.image_column\).*columns 'photo', 'kind'; name",
        folder,
        image_column="foto",
    )
    fails(
        r"column 'art' \(data\.label_column\).*columns 'photo', 'kind'", folder, label_column="art"
    )
    fails(r"encoded images \(bytes\) in column 'kind'", folder, image_column="kind")
    fails(r"whole numbers or class names in column 'photo'", folder, label_column="photo")


def test_no_column_fits(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    def write(**columns):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")

    pictures = [encoded(picture(i)) for i in range(10)]
    write(first=[1] * 10, second=[2] * 10)
    fails(
        r"column 'image' in split 'train'.*columns 'first', 'second'; set data\.image_column",
        tmp_path,
    )
    write(image=pictures, first=[0, 1] * 5, second=[0, 1] * 5)
    fails(r"column 'label'.*set data\.label_column", tmp_path)
    # Plain bytes without the metadata of Hugging Face datasets.
    assert train(tmp_path, label_column="first").classes == ("0", "1")
    write(image=pictures, label=[0.5, 1.5] * 5)
    fails(r"whole numbers or class names in column 'label'.*double", tmp_path)
    write(image=[*pictures[:9], None], label=[0, 1] * 5)
    fails(
        r"row 9 of train cannot be used: the row holds no image",
        tmp_path,
        test_fraction=0.1,
        split_seed=1,
    )


def test_unreadable_parquet(write_parquet) -> None:
    folder = write_parquet("train", [encoded(picture(i)) for i in range(10)], [0, 1] * 5)
    file = next(folder.glob("*.parquet"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    fails(r"expected a parquet file in '.*train-00000.*cannot be read", folder)
    file.write_bytes(b"")
    fails(r"cannot be read", folder)


def test_a_broken_image_is_named(write_parquet) -> None:
    pictures = [encoded(picture(i, (40, 40))) for i in range(600)]
    pictures[317] = pictures[317][:900]
    pictures[590] = b"not an image"
    labels = [0, 1] * 300
    folder = write_parquet("train", pictures, labels)
    write_parquet("test", pictures[:2], [0, 1])
    fails(
        r"2 images cannot be used \(row 317 of train \('train_317\.png'\): .*truncated.*; row 590 "
        r"of train .*none of PNG, JPEG.*\); repair them or take them out, or set data\.dam",
        folder,
    )
    assert len(train(folder, limit=317)) == 317
    write_parquet("train", [*pictures[:317], pictures[0], *pictures[318:]], labels)
    fails(r"image row 590 of train .*none of PNG, JPEG.*; repair it .*data\.damaged=skip", folder)
    images = train(folder, damaged="skip")
    assert len(images) == 599
    assert images.label.tolist() == labels[:590] + labels[591:]
    (skipped,) = images.findings.skipped
    assert str(skipped).startswith("1 damaged image skipped: row 590 of train")


@pytest.mark.parametrize(
    ("labels", "pattern"),
    [
        ([0, 1, 0, -1], r"labels of 0 or more in split 'train'.*got -1 in row 3"),
        ([0, 1, 0, None], r"label in every row of split 'train'.*none in row 3"),
        ([1, 1, 1, 1], r"at least two classes in split 'train'.*got only"),
        ([1, 2, 1, 2], r"labels 0\.\.1 for the 2 classes.*from 1 to 2; renumber"),
        ([0, 1, 0, 7], r"labels 0\.\.2 for the 3 classes.*from 0 to 7"),
    ],
)
def test_wrong_labels(write_parquet, labels, pattern) -> None:
    folder = write_parquet("train", [encoded(picture(i)) for i in range(4)], labels, names=None)
    fails(pattern, folder)


@pytest.mark.parametrize(
    ("kind", "labels"), [("float64", [0.0, 2, 1, 2]), ("bool", [False, True] * 2)]
)
def test_labels_may_be_whole_floats_or_booleans(write_parquet, kind: str, labels) -> None:
    import datasets

    images = [encoded(picture(i)) for i in range(8)]
    value = datasets.Value(kind)
    folder = write_parquet("train", images, labels * 2, names=None, label_type=value)
    folder = write_parquet("test", images, labels * 2, names=None, label_type=value)
    assert load(config(folder), "train").label.tolist() == [int(one) for one in labels * 2]
    if kind == "float64":
        write_parquet("train", images, [*labels, *labels[:3], 0.5], names=None, label_type=value)
        fails(r"names in column 'label' .*got double with 0\.5 in row 7; set", folder)


def test_labels_beyond_the_class_names(tmp_path) -> None:
    import json

    import pyarrow
    import pyarrow.parquet

    names = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    features = {"image": {"_type": "Image"}, "label": names}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [{"bytes": encoded(picture(i)), "path": None} for i in range(4)]
    table = pyarrow.table({"image": rows, "label": [0, 1, 2, 0]}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    fails(r"labels 0\.\.1 for the 2 classes in split 'train'.*got 2 in row 2", tmp_path)


def test_an_empty_split(write_parquet) -> None:
    folder = write_parquet("train", [], [])
    fails(r"expected images in split 'train'.*got none", folder)
    write_parquet("train", [encoded(picture(i)) for i in range(4)], [0, 1, 0, 1])
    write_parquet("test", [], [])
    fails(r"expected images in split 'test'.*got none", folder, "test")


def test_one_class_left_by_the_limit(write_parquet) -> None:
    pictures = [encoded(picture(i)) for i in range(20)]
    folder = write_parquet("train", pictures, [0] * 10 + [1] * 10)
    write_parquet("test", pictures[:2], [0, 1])
    assert len(train(folder, limit=11)) == 11
    fails(
        r"all 2 classes among the first 10 .* raise or leave out data\.limit=10", folder, limit=10
    )


def test_classes_that_a_limit_leaves_out_are_told(tmp_path) -> None:
    draws = np.random.default_rng(0)
    image = draws.integers(0, 256, (30, 8, 8, 3), np.uint8)
    # The test images class by class, as exports of folders often have them.
    label = np.repeat(np.arange(3), 10)
    np.savez(
        tmp_path / "sorted.npz", train_image=image, train_label=label, test_image=image,
        test_label=label,
    )  # fmt: skip
    config = DataConfig(source=str(tmp_path / "sorted.npz"))
    with pytest.warns(CureNote, match="the first 16 of 30 images hold 2 of 3 classes"):
        assert len(load(config, "test", 16)) == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(config, "test", 21)) == 21
        assert len(load(config, "test", 12)) == 12, "few in any order"
        assert len(load(config, "test")) == 30


def test_test_labels_follow_the_training_classes(write_parquet) -> None:
    pictures = [encoded(picture(i)) for i in range(4)]
    folder = write_parquet("train", pictures, [0, 1, 0, 1], names=["cat", "dog"])
    write_parquet("test", pictures, [0, 1, 1, 1], names=["dog", "cat"])
    images = load(config(folder), "test")
    assert images.label.tolist() == [1, 0, 0, 0]
    assert images.classes == ("cat", "dog")
    write_parquet("test", pictures, [0, 1, 1, 1], names=["dog", "owl"])
    fails(r"2 classes of the training split in split 'test'.*got unknown 'owl'", folder, "test")
    write_parquet("test", pictures, [0, 1, 2, 1], names=None)
    fails(r"labels 0\.\.1 for the 2 classes in split 'test'.*got 2 in row 2", folder, "test")
    write_parquet("test", pictures, [0, 1, -1, 1], names=None)
    fails(r"got -1 in row 2", folder, "test")


# kinds of images


def test_mixed_sizes(write_parquet) -> None:
    pictures = [picture(0), picture(1, (9, 7)), picture(2), picture(3, (6, 8))]
    folder = write_parquet("train", [encoded(p) for p in pictures], [0, 1, 0, 1])
    write_parquet("test", [encoded(p) for p in pictures], [0, 1, 0, 1])
    fails(
        r"row 0 of train \('train_0\.png'\) is 6x6 and row 1 of train \('train_1\.png'\) is 9x7 "
        r"pixels; set data\.resize=6",
        folder,
    )
    images = train(folder, resize=5)
    expected = pictures[1].resize((5, 5), Image.Resampling.BICUBIC)
    assert torch.equal(images.image[1], pixels_of(expected))


@pytest.mark.parametrize("grey_first", [False, True])
def test_grey_among_rgb_becomes_rgb(write_parquet, grey_first) -> None:
    pictures = [picture(0), picture(1, mode="L"), picture(2, mode="L"), picture(3)]
    if grey_first:
        pictures = [*pictures[1:], pictures[0]]
    folder = write_parquet("train", [encoded(p) for p in pictures], [0, 1, 0, 1])
    write_parquet("test", [encoded(p) for p in pictures], [0, 1, 0, 1])
    images = train(folder)
    expected = torch.stack([pixels_of(p.convert("RGB")) for p in pictures])
    assert torch.equal(images.image, expected)
    assert images.findings.converted == {"grey to RGB": 2}
    assert torch.equal(train(folder, color="rgb").image, expected)
    grey = torch.stack([pixels_of(p.convert("L")) for p in pictures])
    assert torch.equal(train(folder, color="grey").image, grey)


def test_palettes_and_cmyk_become_rgb(image_folder) -> None:
    palette, printed = picture(2).quantize(16), picture(3, (6, 6), "CMYK")
    folder = image_folder(
        {
            "train/a/0.png": picture(0),
            "train/b/0.png": palette,
            "train/b/1.tif": printed,
            "test/a/0.png": picture(0),
        }
    )
    images = train(folder)
    expected = [picture(0), palette.convert("RGB"), printed.convert("RGB")]
    assert torch.equal(images.image, torch.stack([pixels_of(p) for p in expected]))
    assert images.findings.converted == {"CMYK to RGB": 1}


def hidden(value: int) -> Image.Image:
    """A transparent picture of one colour with an opaque black square in the middle."""
    image = Image.new("RGBA", (6, 6), (value, 0, 255 - value, 0))
    image.paste((0, 0, 0, 255), (2, 2, 4, 4))
    return image


@pytest.mark.parametrize(
    ("background", "color"), [("white", (255, 255, 255)), ("#204060", (32, 64, 96))]
)
def test_transparent_images_stand_on_the_background(image_folder, background, color) -> None:
    half = Image.new("RGBA", (6, 6), (0, 0, 0, 128))
    grey = Image.new("LA", (6, 6), (10, 0))
    marked = picture(1).quantize(4)
    marked.info["transparency"] = 0
    opaque = picture(4, mode="RGB").convert("RGBA")
    folder = image_folder(
        {
            "train/a/0.png": hidden(0),
            "train/a/1.png": hidden(255),
            "train/b/0.png": half,
            "train/b/1.png": grey,
            "train/b/2.png": encoded(marked),
            "train/b/3.png": opaque,
            "test/a/0.png": picture(0),
        }
    )
    images = train(folder, background=background)
    by_order = dict(
        zip(("h0", "half", "h255", "grey", "marked", "opaque"), images.image, strict=True)
    )
    plain = torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 6, 6).clone()
    assert torch.equal(by_order["grey"], plain)
    plain[:, 2:4, 2:4] = 0
    assert torch.equal(by_order["h0"], plain)
    assert torch.equal(by_order["h255"], plain)
    expected = (torch.tensor(color) * 127 / 255).round()
    assert (by_order["half"][:, 0, 0].float() - expected).abs().max() <= 1
    index = torch.from_numpy(np.array(marked)) == 0
    assert index.any()
    behind = torch.tensor(color, dtype=torch.uint8)[:, None].expand(3, int(index.sum()))
    assert torch.equal(by_order["marked"][:, index], behind)
    assert torch.equal(by_order["opaque"], pixels_of(opaque.convert("RGB")))
    assert images.findings.converted[f"transparent to {background} behind"] == 5


def test_an_unknown_background_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a colour such as white"):
        config("digits", background="nocolour")


def test_transparent_grey_stays_grey_on_white(image_folder) -> None:
    grey = Image.new("LA", (6, 6), (10, 0))
    folder = image_folder({f"{c}/{i}.png": grey for c in "ab" for i in range(5)})
    assert train(folder).image.unique().tolist() == [255]
    assert train(folder).channels == 1
    assert train(folder, background="red").channels == 3


def test_crop_keeps_the_shape_of_oblong_images(image_folder) -> None:
    wide, high, square = picture(0, (20, 10)), picture(1, (8, 24)), picture(2, (12, 12))
    folder = image_folder(
        {
            "train/a/0.png": wide,
            "train/a/1.png": square,
            "train/b/0.png": high,
            "test/a/0.png": wide,
        }
    )
    images = train(folder, resize=6, fit="crop")
    bicubic = Image.Resampling.BICUBIC
    expected = [
        wide.resize((12, 6), bicubic).crop((3, 0, 9, 6)),
        high.resize((6, 18), bicubic).crop((0, 6, 6, 12)),
        square.resize((6, 6), bicubic),
    ]
    assert torch.equal(images.image, torch.stack([pixels_of(p) for p in expected]))
    assert images.findings.sizes == ((12, 12), (10, 20))
    stretched = train(folder, resize=6)
    assert torch.equal(stretched.image[0], pixels_of(wide.resize((6, 6), bicubic)))


def test_grey_kinds_become_grey(image_folder) -> None:
    bilevel = picture(0, mode="L").point(lambda v: 255 * (v > 127)).convert("1")
    folder = image_folder(
        {
            "train/a/0.png": bilevel,
            "train/b/0.png": picture(1, mode="L").convert("LA"),
            "test/a/0.png": bilevel,
        }
    )
    images = train(folder)
    assert images.image.shape == (2, 1, 6, 6)
    assert torch.equal(images.image[0], pixels_of(bilevel.convert("L")))


def wide_rgb_png() -> bytes:
    """A 16-bit RGB PNG, which Pillow reads but does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 6, 6, 16, 2, 0, 0, 0)
    body = zlib.compress((b"\0" + bytes(36)) * 6)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def wide_grey() -> bytes:
    return encoded(Image.fromarray(np.full((6, 6), 40_000, np.uint16)))


def wide_ppm() -> bytes:
    return b"P6\n6 6\n65535\n" + bytes(6 * 6 * 3 * 2)


@pytest.mark.parametrize("content", [wide_rgb_png, wide_grey, wide_ppm])
def test_images_of_16_bits_are_refused(image_folder, content) -> None:
    files = {"train/a/0.png": picture(0), "train/b/9.png": content(), "test/a/0.png": picture(0)}
    fails(
        r"b/9\.png' cannot be used: it has more than 8 bits a channel; convert it",
        image_folder(files),
    )


def test_photographs_are_turned_upright(image_folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    lying = picture(0, (8, 4))
    lying.save(buffer, "PNG", exif=exif)
    upright = picture(1, (4, 8))
    folder = image_folder(
        {"train/a/0.png": buffer.getvalue(), "train/b/0.png": upright, "test/a/0.png": upright}
    )
    images = train(folder)
    assert images.size == (8, 4)
    assert torch.equal(images.image[0], torch.rot90(pixels_of(lying), -1, (1, 2)))


# folders of images


def test_folder_with_splits(image_folder) -> None:
    files = {
        f"train/{c}/{i}.png": picture(10 * k + i)
        for k, c in enumerate(["ant", "bee", "cow"])
        for i in range(3)
    }
    folder = image_folder(
        files
        | {
            "val/cow/x.png": picture(99),
            "train/bee/notes.txt": b"ignored",
            "train/.hidden/x.png": picture(0),
        }
    )
    images = train(folder)
    assert images.classes == ("ant", "bee", "cow")
    # One of each class in turn, so that data.limit keeps every class.
    assert images.label.tolist() == [0, 1, 2] * 3
    order = [files[f"train/{c}/{i}.png"] for i in range(3) for c in ("ant", "bee", "cow")]
    assert torch.equal(images.image, torch.stack([pixels_of(p) for p in order]))
    test = load(config(folder), "test")
    assert test.label.tolist() == [2]
    assert torch.equal(test.image[0], pixels_of(picture(99)))


def test_folder_without_splits_is_carved(image_folder) -> None:
    files = {f"{c}/{i}.png": picture(10 * k + i) for k, c in enumerate("ab") for i in range(10)}
    folder = image_folder(files)
    first, second = train(folder), load(config(folder), "test")
    assert (len(first), len(second)) == (16, 4)
    assert torch.bincount(second.label).tolist() == [2, 2]
    together = {i.numpy().tobytes() for i in torch.cat([first.image, second.image])}
    assert len(together) == 20


def test_a_class_may_be_called_train(image_folder) -> None:
    files = {f"{c}/{i}.png": picture(i) for c in ("plane", "train") for i in range(5)}
    assert train(image_folder(files)).classes == ("plane", "train")


def test_folder_errors(image_folder, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(r"one sub-folder of images a class.*got an empty folder", empty)
    (empty / "sub").mkdir()
    fails(r"got no images", empty)
    (empty / "loose.png").write_bytes(encoded(picture(0)))
    fails(r"got images outside class folders", empty)
    folder = image_folder({"a/0.png": picture(0), "a/1.png": picture(1)})
    fails(r"at least two classes.*got only 'a'", folder)
    (folder / "b").mkdir()
    fails(r"every class folder of '.*', got none in 'b'", folder)


def test_folder_names_the_broken_file(image_folder) -> None:
    files = {f"{c}/{i}.png": picture(i, (30, 30)) for c in "ab" for i in range(5)}
    files["b/bad.png"] = encoded(picture(0, (30, 30)))[:400]
    fails(
        r"image '.*b/bad\.png' cannot be used: .*repair it or take it out",
        image_folder(files),
        split_seed=0,
    )


def test_folder_test_with_an_unknown_class(image_folder) -> None:
    folder = image_folder(
        {"train/a/0.png": picture(0), "train/b/0.png": picture(1), "test/c/0.png": picture(2)}
    )
    fails(r"unknown 'c'", folder, "test")


# arrays


RANDOM = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), np.uint8)
LABELS = np.arange(20) % 4


def saved(tmp_path, **arrays):
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("image", "label", "test_image", "test_label"),
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("X_train", "Y_train", "X_test", "Y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("image_train", "label_train", "image_validation", "label_validation"),
    ],
)
def test_npz_names(tmp_path, image, label, test_image, test_label) -> None:
    path = saved(
        tmp_path,
        **{
            image: RANDOM[:12],
            label: LABELS[:12],
            test_image: RANDOM[12:],
            test_label: LABELS[12:],
        },
    )
    images, test = train(path), load(config(path), "test")
    expected = torch.from_numpy(RANDOM).permute(0, 3, 1, 2)
    assert torch.equal(images.image, expected[:12])
    assert torch.equal(test.image, expected[12:])
    assert images.label.tolist() == LABELS[:12].tolist()
    assert images.classes == ("0", "1", "2", "3")
    assert images.name == "arrays"


@pytest.mark.parametrize("name", ["image", "images", "x", "img", "data", "X"])
@pytest.mark.parametrize("label", ["label", "labels", "y"])
def test_npz_without_splits_is_carved(tmp_path, name, label) -> None:
    path = saved(tmp_path, **{name: RANDOM, label: LABELS})
    assert len(train(path)) == 16
    assert len(load(config(path), "test")) == 4


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (RANDOM, (3, 5, 6)),
        (RANDOM.transpose(0, 3, 1, 2), (3, 5, 6)),
        (RANDOM[..., 0], (1, 5, 6)),
        (RANDOM[..., :1], (1, 5, 6)),
        (RANDOM[..., :1].transpose(0, 3, 1, 2), (1, 5, 6)),
        ((RANDOM / 255).astype(np.float32), (3, 5, 6)),
        (RANDOM / 255, (3, 5, 6)),
    ],
)
def test_npz_layouts(tmp_path, array, shape) -> None:
    path = saved(tmp_path, x_train=array, y_train=LABELS[:, None], x_test=array, y_test=LABELS)
    images = train(path)
    assert images.image.shape[1:] == shape
    expected = torch.from_numpy(RANDOM).permute(0, 3, 1, 2)[:, : shape[0]]
    assert torch.equal(images.image, expected)


FLOATS = RANDOM / 255


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        (FLOATS * 2 - 1, r"got floats from -1 to 1, outside \[0, 1\]; undo the normalisation"),
        (FLOATS * 255, r"floats from 0 to 255, outside \[0, 1\]"),
        (np.where(FLOATS > 0.9, np.nan, FLOATS), r"outside \[0, 1\]"),
        (FLOATS * 0.999, r"floats between the 256 levels"),
        (RANDOM.astype(np.int64), r"got int64; convert it with \.astype\('uint8'\)"),
        (RANDOM.astype(np.uint16), r"got uint16"),
        (RANDOM[..., :2], r"C of 1 or 3.*got shape \(20, 5, 6, 2\)"),
        (RANDOM[:, :3], r"could be either of the last two"),
        (RANDOM.reshape(20, -1), r"got shape \(20, 90\)"),
        (RANDOM[:19], r"got 19 images in 'x' and 20 labels in 'y'"),
        (RANDOM.astype(object), r"array 'x'.*cannot be read.*allow_pickle"),
    ],
)
def test_npz_images_refused(tmp_path, array, pattern) -> None:
    fails(pattern, saved(tmp_path, x=array, y=LABELS))


@pytest.mark.parametrize(
    ("labels", "pattern"),
    [
        (np.eye(4)[LABELS], r"whole numbers or class names, one an image.*shape \(20, 4\)"),
        (LABELS.astype(float), r"got float64"),
        (LABELS - 1, r"got -1 in row 0"),
        (LABELS * 0, r"at least two classes"),
        (LABELS + 1, r"labels 0\.\.3 .*from 1 to 4"),
    ],
)
def test_npz_labels_refused(tmp_path, labels, pattern) -> None:
    fails(pattern, saved(tmp_path, x=RANDOM, y=labels))


def test_npz_labels_may_be_names(tmp_path) -> None:
    names = np.array(["10", "9", "100", "1"])
    images = train(saved(tmp_path, x=RANDOM, y=names[LABELS]), test_fraction=0.1)
    assert images.classes == ("1", "9", "10", "100")
    assert "order of numbers" in images.findings.notes[0]


def test_npz_files_refused(tmp_path) -> None:
    fails(
        r"arrays 'image' and 'label'.*got 'pixels', 'target'; rename",
        saved(tmp_path, pixels=RANDOM, target=LABELS),
    )
    named = config(tmp_path / "arrays.npz", image_column="pixels", label_column="target")
    assert len(load(named, "train")) == 16
    path = saved(tmp_path, x=RANDOM, y=LABELS)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails(r"cannot be read", path)
    path.write_bytes(content[:200] + bytes(50) + content[250:])
    fails(r"cannot be read", path)
    path.write_bytes(b"")
    fails(r"cannot be read", path)
    path.write_bytes(b"plain text")
    fails(r"cannot be read", path)
    with path.open("wb") as file:
        np.save(file, RANDOM)
    fails(r"got a single array", path)


def test_a_test_label_unknown_to_training(tmp_path) -> None:
    path = saved(tmp_path, x_train=RANDOM, y_train=LABELS % 2, x_test=RANDOM, y_test=LABELS)
    fails(r"labels 0\.\.1 for the 2 classes in split 'test'.*training split, got 2", path, "test")


def test_many_threads_agree_with_one(tmp_path, monkeypatch) -> None:
    many = np.random.default_rng(1).integers(0, 256, (3000, 4, 4), np.uint8)
    path = saved(tmp_path, x=many, y=np.arange(3000) % 2)
    first = train(path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert torch.equal(first.image, train(path).image)


def _table(folder, **columns):
    import datasets

    rows = len(next(iter(columns.values())))
    images = [picture(i) for i in range(rows)]
    features = datasets.Features(
        {"image": datasets.Image()}
        | {
            name: datasets.Value("string" if isinstance(values[0], str) else "int64")
            for name, values in columns.items()
        }
    )
    made = datasets.Dataset.from_dict({"image": images} | columns, features=features)
    folder.mkdir()
    made.to_parquet(folder / "train.parquet")
    return folder


def test_the_column_of_labels_is_not_guessed_among_several(tmp_path) -> None:
    for number, columns in enumerate(
        (
            {"breed": ["a", "b"] * 10, "age": list(range(20))},
            {"id": list(range(20)), "species": ["a", "b"] * 10},
        )
    ):
        folder = _table(tmp_path / str(number), **columns)
        assert load(config(folder), "train").classes == ("a", "b")
    fails("set data.label_column", _table(tmp_path / "c", disease=["x"] * 9, patient=[1] * 9))
    fails("nearly as many values as rows", _table(tmp_path / "d", caption=list("abcdefgh")))
    images = load(config(_table(tmp_path / "e", finding=["a", "b"] * 10)), "train")
    assert images.findings.notes[0] == "labels are the column 'finding'"


@pytest.mark.parametrize(
    ("name", "advice"),
    [("all.zip", "unpack it"), ("all.tar.gz", "unpack it"), ("x.npy", "numpy.savez")],
)
def test_other_files_are_answered_by_what_helps(tmp_path, name, advice) -> None:
    (tmp_path / name).write_bytes(b"x")
    fails(advice, tmp_path / name)
