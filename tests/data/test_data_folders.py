"""Image folders as people have them: every image is read, or said to be left out."""

from __future__ import annotations

import json
import random
import string
import sys
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, picture, pixels_of

from cure.config import DataConfig
from cure.data import ImageSet, decode, load, load_split, load_training
from cure.errors import DataError

HEIC = b"\0\0\0\x18ftypheic" + bytes(64)


def config(source, **changes) -> DataConfig:
    return DataConfig(source=str(source), **changes)


def fails(pattern: str, source, split: str = "train", **changes) -> None:
    with pytest.raises(DataError, match=pattern) as caught:
        load(config(source, **changes), split)
    assert "\n" not in str(caught.value)


def both(folder, **changes) -> list[ImageSet]:
    return [load(config(folder, **changes), split) for split in ("train", "test")]


def skipped(images: ImageSet) -> list[str]:
    return [str(one) for one in images.findings.skipped]


def two_classes(prefix: str = "", count: int = 3, start: int = 0) -> dict:
    return {
        f"{prefix}{name}/{i}.png": picture(start + 100 * k + i)
        for k, name in enumerate(("ant", "bee"))
        for i in range(count)
    }


# splits


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "training"])
@pytest.mark.parametrize("other", ["val", "valid", "Validation", "dev", "EVAL", "test", "Testing"])
def test_splits_are_found_by_any_usual_name(image_folder, train, other) -> None:
    folder = image_folder(two_classes(f"{train}/") | two_classes(f"{other}/", 2, 50))
    first, second = both(folder)
    assert (len(first), len(second)) == (6, 4)
    assert not first.findings.notes


def test_an_own_validation_split_is_used_beside_a_test_split(image_folder) -> None:
    folder = image_folder(
        two_classes("train/", 5) | two_classes("valid/", 2, 50) | two_classes("test/", 1, 70)
    )
    training, validation = load_training(config(folder))
    assert (len(training), len(validation), len(load(config(folder), "test"))) == (10, 4, 2)
    assert validation.split == "validation"
    assert "the split 'valid' validates" in training.findings.notes[0]
    assert torch.equal(load_split(config(folder), "validation").image, validation.image)
    carving = config(folder, validation_split="carve", validation=2)
    training, validation = load_training(carving)
    assert (len(training), len(validation)) == (8, 2)
    assert training.findings.notes == ("the split 'valid' is not used",)
    with pytest.raises(DataError, match="a split of its own to validate with"):
        load_training(config(folder, validation_split="test"))
    with pytest.raises(DataError, match=r"set data\.validation_split"):
        load_training(config(folder, validation_split="none"))


NAMED = {
    f"{name}.{i}.png": picture(100 * k + i)
    for k, name in enumerate(("ant", "bee"))
    for i in range(4)
}


def test_classes_from_file_names(image_folder) -> None:
    beside = {"test1/1.png": picture(300), "test/ant (2).png": picture(301)}
    folder = image_folder(
        {f"train/{name}": made for name, made in NAMED.items()}
        | {"train/more/wood_ant_07.png": picture(302), "test/bee-3.png": picture(303)}
        | beside
    )
    named = config(folder, labels="file_names")
    training, test = load(named, "train"), load(named, "test")
    assert training.classes == ("ant", "bee", "wood_ant")
    assert torch.bincount(training.label).tolist() == [4, 4, 1]
    assert test.label.tolist() == [0, 1]
    assert skipped(training) == ["1 image skipped: their names are no class with a number"]
    for place, made in NAMED.items():
        found = [row for row in training.image if torch.equal(row, pixels_of(made))]
        assert len(found) == 1, place


def test_file_names_that_say_a_class_are_offered(image_folder) -> None:
    fails(r"set data\.labels=file_names .*as 'ant\.0\.png' might", image_folder(NAMED))
    loose = image_folder(
        {f"train/{name}": made for name, made in NAMED.items()} | {"test1/1.png": picture(9)}
    )
    # Not taken for the classes "train" and "test1".
    fails(r"got 'test1', 'train', which hold images; .*file_names", loose)


@pytest.mark.parametrize("source", ["digits", "made.npz", "cifar10", "owner/name", "table.csv"])
def test_file_names_are_refused_where_there_are_none(tmp_path, monkeypatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CURE_DATA", raising=False)
    np.savez("made.npz", image=np.zeros((4, 8, 8), np.uint8), label=[0, 1, 0, 1])
    (tmp_path / "table.csv").write_text("file,label\na.png,a\nb.png,b\n")
    fails(
        rf"labels=file_names, got data\.source={source}, which is no folder here",
        source,
        labels="file_names",
    )


def test_file_names_are_refused_beside_parquet_files(tmp_path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    fails("that are a class and a number, .* got no image", tmp_path, labels="file_names")


def test_file_names_are_offered_beside_a_folder_of_other_files(image_folder) -> None:
    folder = image_folder({f"images/{name}": made for name, made in NAMED.items()})
    fails(r"got only the folder 'images'; add another class, or set data\.labels=file_n", folder)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "list.txt").write_text("")
    fails(r"got none in 'annotations' .*set data\.labels=file_names .*'ant\.0\.png' might", folder)


def test_names_without_a_class_are_not_offered(image_folder) -> None:
    camera = image_folder({f"{i}.png": picture(i) for i in range(4)})
    with pytest.raises(DataError, match="outside class folders") as caught:
        load(config(camera), "train")
    assert "file_names" not in str(caught.value)
    fails("that are a class and a number", camera, labels="file_names")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("source", ["digits", "folder"])
def test_a_limit_decodes_no_more_than_it_needs(image_folder, monkeypatch, split, source) -> None:
    source = source if source == "digits" else image_folder(two_classes(count=20))
    whole = load_split(config(source, validation=10), split)
    opened = []
    real = decode.decode_one
    monkeypatch.setattr(decode, "decode_one", lambda *a: opened.append(a) or real(*a))
    few = load_split(config(source, validation=10), split, limit=3)
    assert len(opened) == 3
    assert torch.equal(few.image, whole.image[:3])
    assert torch.equal(few.label, whole.label[:3])


def test_training_and_validation_are_what_carving_gave(image_folder) -> None:
    from cure.data import carve

    settings = config(image_folder(two_classes(count=20)), validation=0.2)
    expected = carve(load(settings, "train"), settings.validation, settings.split_seed)
    for ours, theirs in zip(load_training(settings), expected, strict=True):
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.label, theirs.label)
        assert ours.split == theirs.split


def test_an_unknown_split_with_the_same_classes_is_refused_by_name(image_folder) -> None:
    folder = image_folder(two_classes("train/") | two_classes("holdout/"))
    fails(r"the folder 'holdout' in .* has the classes of 'train'", folder)
    images = load(config(folder, test_split="holdout"), "test")
    assert len(images) == 6


def test_folders_that_look_like_splits_are_no_classes(image_folder) -> None:
    folder = image_folder(two_classes("train_set/") | two_classes("Test Images/"))
    fails(r"'Test Images', 'train_set' in .* hold the same folders, as splits hold", folder)
    named = config(folder, train_split="train_set", test_split="Test Images")
    assert [len(load(named, split)) for split in ("train", "test")] == [6, 6]


def test_a_link_to_a_folder_above_is_not_followed(image_folder) -> None:
    folder = image_folder(two_classes(count=5))
    (folder / "ant" / "back").symlink_to(folder)
    (folder / "bee" / "gone.png").symlink_to(folder / "nothing")
    first, second = both(folder)
    assert len(first) + len(second) == 10
    assert sorted(skipped(first)) == [
        "1 link skipped: they lead to a folder that is read already",
        "1 link skipped: what they point to is no file",
    ]


def test_a_sample_of_an_answer_beside_train_csv_is_left_out(tmp_path) -> None:
    rows = [(Path(name).stem, label) for name, label in labelled(tmp_path, place="train")]
    (tmp_path / "train.csv").write_text(text_of(rows, "id,label"))
    picture(0).save(tmp_path / "train" / "z.png")
    (tmp_path / "sample_submission.csv").write_text("id,label\nz,cat")
    images = load(config(tmp_path), "train")
    assert len(images) == 8
    assert skipped(images) == [
        "1 .csv file skipped: they are no images",
        "1 image skipped: train.csv does not name them",
    ]


def test_a_folder_beside_the_splits_is_counted(image_folder) -> None:
    files = two_classes("train/") | {"unlabelled/1.png": picture(0), "notes.txt": b"text"}
    images = load(config(image_folder(files), test_fraction=0.4), "train")
    assert "1 image skipped: 'unlabelled' is no split with class folders" in skipped(images)
    assert "1 .txt file skipped: they are no images" in skipped(images)


def test_what_lies_in_a_split_of_any_name_is_counted_once(image_folder) -> None:
    files = two_classes("train/", 5) | two_classes("holdout/", 2, 50)
    files |= {"train/a.txt": b"text", "holdout/b.txt": b"text"}
    folder = image_folder(files)
    for images in both(folder, test_split="holdout"):
        assert skipped(images) == ["1 .txt file skipped: they are no images"]
    assert skipped(load(config(folder / "train"), "train")) == [
        "1 .txt file skipped: they are no images"
    ]


def test_classes_that_hold_splits_are_refused(image_folder) -> None:
    files = {f"{c}/{s}/0.png": picture(0) for c in ("ant", "bee") for s in ("train", "val")}
    fails(r"classes 'ant', 'bee' that hold the splits 'train', 'val'; arrange", image_folder(files))


def test_one_folder_around_everything_is_entered(image_folder) -> None:
    folder = image_folder(two_classes("images/", 5))
    assert load(config(folder), "train").classes == ("ant", "bee")
    folder = image_folder(two_classes("images/train/") | two_classes("images/val/"))
    assert len(load(config(folder), "test")) == 6


# which files are images


def test_images_are_read_at_any_depth_and_with_any_suffix(image_folder) -> None:
    files = {
        "ant/0.png": picture(0),
        "ant/deep/er/1.JPG": encoded(picture(1), "JPEG"),
        "ant/2.jfif": encoded(picture(2), "JPEG"),
        "ant/IMG_3": encoded(picture(3)),
        "ant/4.weird": encoded(picture(4), "WEBP"),
        "ant/x/y/z/5": encoded(picture(5), "BMP"),
        "bee/6.ppm": encoded(picture(6), "PPM"),
        "bee/7.tga": encoded(picture(7), "TGA"),
        "bee/8.jp2": encoded(picture(8), "JPEG2000"),
        "bee/9": encoded(picture(9), "TIFF"),
    }
    first, second = both(image_folder(files))
    assert len(first) + len(second) == len(files)
    assert not first.findings.skipped


def test_the_first_picture_of_several_is_read_and_counted(image_folder) -> None:
    import io

    buffer = io.BytesIO()
    frames = [picture(i, mode="L") for i in range(3)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    files = {f"{c}/{i}.gif": encoded(picture(0, mode="L"), "GIF") for c in "ab" for i in range(5)}
    images = load(config(image_folder(files | {"a/0.gif": buffer.getvalue()})), "train")
    assert (images.image == images.image[:1]).all()
    assert images.findings.converted["moving or paged to their first picture"] == 1


def test_other_files_are_counted_with_the_reason(image_folder) -> None:
    files = two_classes(count=5) | {
        "ant/Thumbs.db": b"x",
        "ant/.DS_Store": b"x",
        "ant/.ipynb_checkpoints/0.png": picture(0),
        "__MACOSX/ant/._0.png": b"x",
        "bee/notes.txt": b"BM are the initials",
        "bee/README": b"P1 is the first",
        "loose.png": picture(3),
    }
    images = load(config(image_folder(files)), "train")
    assert sorted(skipped(images)) == [
        "1 .txt file skipped: they are no images",
        "1 file without a known suffix skipped: they are no images",
        "1 image skipped: they lie outside the class folders",
        "4 hidden and system files skipped: they are no images of yours",
    ]


def test_heic_is_counted_where_it_cannot_be_read(image_folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decode.formats.cache_clear()
    files = two_classes(count=5) | {f"ant/{i}.heic": HEIC for i in range(20)}
    files["bee/IMG_1"] = HEIC
    images = load(config(image_folder(files)), "train")
    assert skipped(images) == [
        "20 .heic files skipped: pip install pillow-heif",
        "1 HEIC file skipped: pip install pillow-heif",
    ]
    only = image_folder({f"only/{name}/0.heic": HEIC for name in "ab"}) / "only"
    fails(r"got no images \(2 \.heic files skipped: pip install pillow-heif\)", only)
    files = {"train/a/0.png": picture(0), "train/b/0.heif": HEIC}
    fails(r"none in 'b' \(1 \.heif file skipped: pip", image_folder(files) / "train")
    decode.formats.cache_clear()


def test_heic_is_read_where_the_package_is_installed(image_folder, monkeypatch) -> None:
    from PIL import Image, PngImagePlugin

    class Fake(PngImagePlugin.PngImageFile):
        """Reads a PNG behind the mark of an HEIC file."""

        format = "HEIF"

        def _open(self) -> None:
            import io

            self.fp.seek(len(HEIC))
            self.fp = io.BytesIO(self.fp.read())
            super()._open()

    def register() -> None:
        Image.register_open("HEIF", Fake, decode.is_heic)

    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    decode.formats.cache_clear()
    try:
        files = two_classes(count=4) | {"ant/9.heic": HEIC + encoded(picture(77))}
        first, second = both(image_folder(files))
        assert len(first) + len(second) == 9
        every = torch.cat([first.image, second.image])
        assert (every == pixels_of(picture(77))).all(dim=(1, 2, 3)).sum() == 1
    finally:
        Image.OPEN.pop("HEIF", None)
        Image.ID.remove("HEIF")
        decode.formats.cache_clear()


def test_damaged_files_are_named_at_once_or_skipped(image_folder) -> None:
    files = two_classes(count=20) | {
        f"{name}/broken{i}.jpg": b"\xff\xd8\xff\xe0" + bytes(i)
        for name in ("ant", "bee")
        for i in range(6)
    }
    folder = image_folder(files)
    with pytest.raises(
        DataError, match=r"12 images cannot be used .*; and 2 more\); repair"
    ) as caught:
        load(config(folder), "train")
    assert str(caught.value).count("broken") == 10
    first, second = both(folder, damaged="skip")
    assert len(first) + len(second) == 40
    texts = skipped(first) + skipped(second)
    assert sum(int(text.split()[0]) for text in texts) == 12
    assert all("damaged image" in text for text in texts)
    training, validation = load_training(config(folder, damaged="skip", validation=8))
    assert len(training) + len(validation) == len(first)


def test_every_layout_reads_or_counts_every_file(tmp_path) -> None:
    """Random trees of images and other files: their number is that of both splits and skipped."""
    draws = random.Random(0)
    content = [
        (".png", encoded(picture(0)), True),
        ("", encoded(picture(1), "JPEG"), True),
        (".JPEG", encoded(picture(2), "JPEG"), True),
        (".x" + "y" * 3, encoded(picture(3), "GIF"), True),
        (".txt", b"text", False),
        (".pdf", b"%PDF-1.4", False),
        (".mp4", b"\0\0\0\x18ftypisom" + bytes(40), False),
    ]
    for number in range(10):
        root = tmp_path / f"{number}"
        written = images = 0
        for name in ("ant", "bee", "cow"):
            for i in range(draws.randint(6, 12)):
                depth = draws.randint(0, 3)
                inner = [draws.choice(string.ascii_letters) for _ in range(depth)]
                suffix, data, is_image = content[0] if i < 4 else draws.choice(content)
                path = root.joinpath(name, *inner, f"f{i}{suffix}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                written += 1
                images += is_image
        first, second = both(root)
        assert len(first) + len(second) == images
        left_out = sum(one.count for one in first.findings.skipped)
        assert len(first) + len(second) + left_out == written


# classes


def test_classes_that_are_numbers_are_in_order_of_numbers(image_folder) -> None:
    files = {f"{c}/{i}.png": picture(20 * c + i) for c in range(12) for i in range(3)}
    images = load(config(image_folder(files)), "train")
    assert images.classes == tuple(map(str, range(12)))
    assert "version 0.1 sorted them as text" in images.findings.notes[0]


def test_a_class_missing_in_the_test_split_keeps_the_labels(image_folder) -> None:
    folder = image_folder(two_classes("train/") | {"val/bee/0.png": picture(0)})
    (folder / "val" / "ant").mkdir()
    assert load(config(folder), "test").label.tolist() == [1]


# tables of labels


def labelled(folder: Path, count: int = 5, place: str = "images") -> list[tuple[str, str]]:
    rows = []
    for k, name in enumerate(("cat", "dog")):
        for i in range(count):
            path = folder / place / f"{name[0]}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(100 * k + i).save(path)
            rows.append((path.relative_to(folder).as_posix(), name))
    return rows


def text_of(rows, header: str | None, separator: str = ",") -> str:
    lines = [] if header is None else [header]
    return "\n".join(lines + [separator.join(row) for row in rows])


@pytest.mark.parametrize(
    ("file", "header", "separator"),
    [
        ("labels.csv", "file_name,label", ","),
        ("anything.csv", "Image_Path;Class", ";"),
        ("labels.tsv", "filename\tspecies", "\t"),
        ("metadata.csv", "file_name,label", ","),
        ("labels.csv", None, ","),
        # Columns of other names: the one that holds files here, and the only other one.
        ("labels.csv", "Datei;Klasse", ";"),
    ],
)
def test_tables_of_labels_are_read(tmp_path, file, header, separator) -> None:
    rows = labelled(tmp_path)
    (tmp_path / file).write_text(text_of(rows, header, separator))
    first, second = both(tmp_path)
    assert first.classes == ("cat", "dog")
    assert (len(first), len(second)) == (8, 2)
    for images in (first, second):
        for image, label in zip(images.image, images.label.tolist(), strict=True):
            known = [picture(100 * label + i) for i in range(5)]
            assert any(torch.equal(image, pixels_of(one)) for one in known)
    assert not first.findings.skipped
    by_file = load(config(tmp_path / file), "train")
    assert torch.equal(by_file.image, first.image)


def test_lists_of_files_and_labels_are_read(tmp_path) -> None:
    rows = labelled(tmp_path)
    (tmp_path / "train.txt").write_text("".join(f"{n} {k}\n" for n, k in rows[1:-1]))
    (tmp_path / "val.txt").write_text("".join(f"{n}\t{k}\t0\t9\n" for n, k in rows[::9] * 2))
    (tmp_path / "README.txt").write_text("The images of\nour cats.\n")
    # Two files in a line are no file and its label.
    (tmp_path / "same.txt").write_text("".join(f"{n} {n}\n" for n, _ in rows))
    first, second = load(config(tmp_path), "train"), load(config(tmp_path), "test")
    assert first.classes == ("cat", "dog")
    assert torch.bincount(first.label).tolist() == [4, 4]
    assert second.label.tolist() == [0, 1]
    assert torch.equal(second.image[1], pixels_of(picture(104)))


def test_a_short_list_named_for_a_split_is_that_split(tmp_path) -> None:
    rows = labelled(tmp_path)
    (tmp_path / "train.txt").write_text("".join(f"{n} {k}\n" for n, k in rows[:4] + rows[5:9]))
    (tmp_path / "val.txt").write_text("".join(f"{n} {k}\n" for n, k in (rows[4], rows[9])))
    first, second = load(config(tmp_path), "train"), load(config(tmp_path), "test")
    assert torch.bincount(first.label).tolist() == [4, 4]
    assert second.label.tolist() == [0, 1]


def test_a_column_of_0_and_1_for_each_class_is_read(tmp_path) -> None:
    rows = labelled(tmp_path)
    marks = [
        (name, "3", *("1.0" if kind == k else "0" for k in ("dog", "cat"))) for name, kind in rows
    ]
    (tmp_path / "labels.csv").write_text(text_of(marks, "image,age,dog,cat"))
    images = load(config(tmp_path), "train")
    assert images.classes == ("cat", "dog")
    assert torch.bincount(images.label).tolist() == [4, 4]
    several = [*marks[:-1], (marks[-1][0], "3", "1", "1")]
    (tmp_path / "labels.csv").write_text(text_of(several, "image,age,dog,cat"))
    fails(
        r"labels\.csv is not read: none of its columns \('image', 'age', .*data.label_col", tmp_path
    )


@pytest.mark.parametrize("file", ["photos.csv", "scores.txt"])
def test_other_facts_do_not_replace_class_folders(image_folder, file: str) -> None:
    folder = image_folder(two_classes(count=6))
    names = [f"{kind}/{i}.png" for kind in ("ant", "bee") for i in range(6)]
    rows = [(name, "abc"[i % 3]) for i, name in enumerate(names)]
    header, separator = ("file,camera", ",") if file.endswith("csv") else (None, " ")
    (folder / file).write_text(text_of(rows, header, separator))
    assert load(config(folder), "train").classes == ("ant", "bee")
    if file.endswith("csv"):
        named = load(config(folder, label_column="camera"), "train")
        assert named.classes == ("a", "b", "c")
    else:
        fails("label_column=camera: expected a table", folder, label_column="camera")


@pytest.mark.parametrize("form", ["/home/jo/set/{}", "C:\\set\\{}", "/mnt/{}"])
def test_paths_of_another_machine_lead_to_the_files_here(tmp_path, form: str) -> None:
    rows = [(form.format(name), kind) for name, kind in labelled(tmp_path)]
    (tmp_path / "labels.csv").write_text(text_of(rows, "path,label"))
    assert torch.bincount(load(config(tmp_path), "train").label).tolist() == [4, 4]


def test_why_a_table_is_not_read_is_told(tmp_path) -> None:
    labelled(tmp_path)
    (tmp_path / "labels.csv").write_text("file,label\ngone/1.png,cat\n")
    (tmp_path / "boxes.json").write_text("{}")
    fails(
        r"only the folder 'images'; labels\.csv is not read: the files in its column 'file' are "
        r"not in this folder, such as 'gone/1\.png'; 'boxes\.json' cannot be read: write",
        tmp_path,
    )
    (tmp_path / "boxes.json").unlink()
    for text, why in (
        ("a,b\n1,2\n", r"none of its columns \('a', 'b'\) holds names of files"),
        ("file,label\n", "it has no rows"),
        ("file,label\nc0.png,\n", "its column 'label' is empty"),
    ):
        (tmp_path / "labels.csv").write_text(text)
        fails(why, tmp_path)


def test_splits_inside_folders_of_their_own_name(image_folder) -> None:
    wrapped = {f"seg_{one}/seg_{one}/": two_classes(count=5) for one in ("train", "test")}
    files = {place + name: made for place, some in wrapped.items() for name, made in some.items()}
    folder = image_folder(files | {"seg_pred/seg_pred/1.png": picture(7)})
    # Not taken for the classes seg_pred, seg_test and seg_train.
    fails(r"'seg_test', 'seg_train' .*name them with data\.train_split and data\.test_spl", folder)
    named = config(folder, train_split="seg_train", test_split="seg_test")
    training, test = load(named, "train"), load(named, "test")
    assert (len(training), len(test)) == (10, 10)
    assert len(training.classes) == 2
    assert skipped(training) == ["1 image skipped: 'seg_pred' is no split with class folders"]


def test_test_images_without_labels_are_left_out(image_folder) -> None:
    """The form of Tiny ImageNet."""
    places = [f"train/{kind}/images/{i}.png" for kind in "ab" for i in range(4)]
    places += [f"val/images/v{i}.png" for i in range(4)] + [
        f"test/images/t{i}.png" for i in range(3)
    ]
    folder = image_folder({place: picture(i) for i, place in enumerate(places)})
    lines = "".join(f"v{i}.png\t{'ba'[i % 2]}\t0\t0\t7\t7\n" for i in range(4))
    (folder / "val" / "val_annotations.txt").write_text(lines)
    training, test = load(config(folder), "train"), load(config(folder), "test")
    assert (len(training), test.label.tolist()) == (8, [0, 1, 0, 1])
    assert torch.equal(test.image[0], pixels_of(picture(9)))
    assert skipped(training) == ["3 images skipped: 'test' is no split with class folders"]


def test_metadata_jsonl_is_read(tmp_path) -> None:
    rows = labelled(tmp_path, place=".")
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    first, second = both(tmp_path)
    assert (len(first), len(second), first.classes) == (8, 2, ("cat", "dog"))


def test_metadata_in_splits_and_tables_named_like_splits(tmp_path) -> None:
    for split, count in (("train", 4), ("validation", 2)):
        rows = labelled(tmp_path / "a" / split, count, ".")
        (tmp_path / "a" / split / "metadata.csv").write_text(text_of(rows, "file_name,label"))
        (tmp_path / "b").mkdir(exist_ok=True)
        rows = labelled(tmp_path / "b", count, f"{split}_images")
        stripped = [(Path(name).stem, label) for name, label in rows]
        if split == "validation":
            stripped = rows
        (tmp_path / "b" / f"{split}.csv").write_text(
            text_of(
                [(f"{split}_images/{n}" if "/" not in n else n, k) for n, k in stripped], "id,label"
            )
        )
    for place in ("a", "b"):
        first, second = both(tmp_path / place)
        assert (len(first), len(second)) == (8, 4)


def test_a_column_may_name_the_split(tmp_path) -> None:
    rows = [
        (n, k, "test" if i % 5 == 0 else "train") for i, (n, k) in enumerate(labelled(tmp_path))
    ]
    (tmp_path / "labels.csv").write_text(text_of(rows, "file,label,split"))
    first, second = both(tmp_path)
    assert (len(first), len(second)) == (8, 2)


@pytest.mark.parametrize(
    ("column", "names"),
    [("data set", ("train", "valid")), ("stage", ("Training", "test")), ("is_valid", "01")],
)
def test_a_column_of_splits_is_known_by_its_values(tmp_path, column, names) -> None:
    rows = [(n, k, names[i % 5 == 0]) for i, (n, k) in enumerate(labelled(tmp_path))]
    (tmp_path / "birds.csv").write_text(text_of(rows, f"filepaths,labels,{column}"))
    first, second = both(tmp_path)
    assert (len(first), len(second)) == (8, 2)
    assert torch.bincount(first.label).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("columns", "flags"),
    [
        ("is_valid,is_test", ("00", "10", "01")),
        ("is_test,is_val", ("00", "01", "10")),
        ("is_train,is_valid", ("10", "01", "00")),
        ("is_train,is_test", ("10", "00", "01")),
        ("is_train,is_valid,is_test", ("100", "010", "001")),
    ],
)
def test_several_columns_of_true_and_false_name_three_splits(tmp_path, columns, flags) -> None:
    """Of each class the images 0 to 5 train, 6 and 7 validate, 8 and 9 test."""
    places = [0] * 6 + [1] * 2 + [2] * 2
    rows = [
        (name, kind, *flags[places[int(name[8])]]) for name, kind in labelled(tmp_path, count=10)
    ]
    (tmp_path / "labels.csv").write_text(text_of(rows, f"file_name,label,{columns}"))
    told = config(tmp_path)
    assert [len(load_split(told, one)) for one in ("train", "validation", "test")] == [12, 4, 4]


def test_a_row_of_two_splits_is_refused(tmp_path) -> None:
    rows = [(n, k, str(i % 2), str(i % 2)) for i, (n, k) in enumerate(labelled(tmp_path))]
    (tmp_path / "labels.csv").write_text(text_of(rows, "file_name,label,is_valid,is_test"))
    fails(r"one split a row .*got true in 'is_valid', 'is_test'", tmp_path)


def test_rows_without_a_split_among_others_are_refused(tmp_path) -> None:
    splits = ("train", "test", "")
    rows = [(n, k, splits[i % 3]) for i, (n, k) in enumerate(labelled(tmp_path, 6))]
    (tmp_path / "labels.csv").write_text(text_of(rows, "file_name,label,split"))
    fails(
        r"a split in every row of .* none in 4 of 12 rows, the first for 'images/c2\.png'", tmp_path
    )


def test_a_table_in_a_split_that_names_several_splits_is_refused(image_folder) -> None:
    folder = image_folder({**two_classes("train/"), **two_classes("test/", start=300)})
    rows = [(f"{c}/{i}.png", c, "val" if i else "train") for c in ("ant", "bee") for i in range(3)]
    (folder / "train" / "labels.csv").write_text(text_of(rows, "file_name,label,split"))
    fails(r"table of one split in .*got 'train', 'val'; remove the table's column", folder)


def test_a_table_beside_split_folders_keeps_the_splits(image_folder) -> None:
    folder = image_folder({**two_classes("train/"), **two_classes("test/", count=2, start=300)})
    rows = [
        (f"{s}/{c}/{i}.png", c)
        for s, most in (("train", 3), ("test", 2))
        for c in ("ant", "bee")
        for i in range(most)
    ]
    (folder / "birds.csv").write_text(text_of(rows, "filepaths,labels"))
    assert [len(images) for images in both(folder)] == [6, 4]


def test_lists_of_paths_alone_take_the_classes_from_the_folders(image_folder) -> None:
    folder = image_folder(two_classes(count=5))
    names = [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(5)]
    (folder / "test.txt").write_text("\n".join(names[::5]))
    # One list of a split alone does not say what the other images are.
    assert len(load(config(folder), "train")) == 8
    (folder / "train.txt").write_text("\n".join(n for n in names if n not in names[::5]))
    first, second = both(folder)
    assert (len(first), len(second)) == (8, 2)
    assert first.classes == ("ant", "bee")


def test_a_table_without_a_header_may_have_a_column_of_splits(tmp_path) -> None:
    rows = [
        (n, k, "test" if i % 5 == 0 else "train") for i, (n, k) in enumerate(labelled(tmp_path))
    ]
    (tmp_path / "labels.csv").write_text(text_of(rows, None))
    first, second = both(tmp_path)
    assert (len(first), len(second)) == (8, 2)
    assert first.classes == ("cat", "dog")


def test_two_ways_to_write_a_path_are_one_image(tmp_path, monkeypatch) -> None:
    rows = labelled(tmp_path / "photos")
    whole = [(str(tmp_path / "photos" / name), label) for name, label in rows]
    table = tmp_path / "photos" / "labels.csv"
    table.write_text(text_of(whole, "file_name,label"))
    monkeypatch.chdir(tmp_path)
    assert skipped(load(config("photos"), "train")) == []
    table.write_text(text_of([*rows, ("images/../images/c0.png", "dog")], "file_name,label"))
    fails(r"one label an image .*'cat' and 'dog' for 'c0\.png'", "photos")


def test_names_from_macos_are_those_of_other_systems(tmp_path) -> None:
    """The letter é as one character and as two."""
    for split, form in (("train", "NFC"), ("test", "NFD")):
        for k, name in enumerate(("café", "bee")):
            place = tmp_path / "a" / split / unicodedata.normalize(form, name)
            place.mkdir(parents=True)
            for i in range(3):
                picture(200 * (split == "test") + 100 * k + i).save(place / f"{i}.png")
    first, second = both(tmp_path / "a")
    assert torch.equal(first.label, second.label)
    rows = labelled(tmp_path / "b", place=unicodedata.normalize("NFC", "é"))
    apart = [(unicodedata.normalize("NFD", name), label) for name, label in rows]
    (tmp_path / "b" / "labels.csv").write_text(text_of(apart, "file_name,label"))
    assert len(load(config(tmp_path / "b"), "train")) == 8


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda rows: [*rows, ("images/gone.png", "cat")], r"gone\.png' cannot be used: .*No such"),
        (lambda rows: [*rows, ("images/c0.png", "")], r"label in every row of .*none in 1 rows"),
        (lambda rows: [*rows, ("images/c0.png", "dog")], r"one label an image.*'cat' and 'dog'"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, change, pattern) -> None:
    (tmp_path / "labels.csv").write_text(text_of(change(labelled(tmp_path)), "file_name,label"))
    fails(pattern, tmp_path, test_fraction=0.4)


def test_images_that_the_table_does_not_name_are_counted(tmp_path) -> None:
    rows = labelled(tmp_path)
    (tmp_path / "labels.csv").write_text(text_of(rows[:-1], "file_name,label"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    images = load(config(tmp_path), "train")
    assert "1 image skipped: labels.csv does not name them" in skipped(images)
    (tmp_path / "second.csv").write_text(text_of(rows, "file_name,label"))
    fails(r"one table of labels in .*got 'labels\.csv', 'second\.csv'", tmp_path)


def test_damaged_lines_of_metadata_are_named(tmp_path) -> None:
    labelled(tmp_path, place=".")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "c0.png", "label": "cat"}\n{oops\n')
    fails(r"line 2 of .*metadata\.jsonl' is no JSON object", tmp_path)


def test_rows_after_another_value_are_not_lost(tmp_path) -> None:
    lines = [json.dumps({"file_name": n, "label": k}) for n, k in labelled(tmp_path, place=".")]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines[:4], "[1]", *lines[4:]]))
    fails(r"line 5 of .*metadata\.jsonl' is no JSON object; write one", tmp_path)


def test_a_column_of_labels_that_is_missing_is_not_replaced_by_another(tmp_path) -> None:
    rows = [(name, kind, "ab"[i % 2]) for i, (name, kind) in enumerate(labelled(tmp_path))]
    (tmp_path / "labels.csv").write_text(text_of(rows, "file_name,label,breed"))
    assert load(config(tmp_path, label_column="breed"), "train").classes == ("a", "b")
    fails(
        r"labels\.csv is not read: none of its columns \('file_name', 'label', 'breed'\) is "
        r"'bread' \(data\.label_column\)",
        tmp_path,
        label_column="bread",
    )


def test_a_column_that_no_table_has_is_not_replaced_by_class_folders(image_folder) -> None:
    folder = image_folder(two_classes(count=5))
    sentence = r"^data\.label_column=bread: expected a table with this column .*; {}; correct it"
    fails(sentence.format("no table of labels is there"), folder, label_column="bread")
    rows = [(name, "ab"[i % 2]) for i, name in enumerate(two_classes(count=5))]
    (folder / "labels.csv").write_text(text_of(rows, "file_name,breed"))
    assert load(config(folder, label_column="breed"), "train").classes == ("a", "b")
    fails(sentence.format(r"labels\.csv is not read.*"), folder, label_column="bread")


def test_a_column_that_no_table_has_is_refused_beside_splits(image_folder) -> None:
    folder = image_folder(two_classes("train/") | two_classes("test/", 2, 50))
    fails("image_column=path: expected a table with this column", folder, image_column="path")


def test_a_home_folder_is_expanded(image_folder, monkeypatch) -> None:
    folder = image_folder(two_classes(count=5))
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load(config(f"~/{folder.name}"), "train")) == 8


# texts and tables beside images


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", f"caption,who\n{'long words ' * 40},me\n"),
        ("metadata.jsonl", json.dumps({"prompt": "long words " * 40, "photo": 1}) + "\n"),
        ("annotations.txt", f"{'long words ' * 40}1.0\n"),
        ("notes.csv", f"caption,who\n{'x' * 140_000},me\n"),
    ],
)
def test_texts_beside_class_folders_do_not_stop_reading(image_folder, name, content) -> None:
    folder = image_folder(two_classes())
    (folder / name).write_text(content)
    assert load(config(folder), "train").classes == ("ant", "bee")


def test_a_json_line_may_hold_any_separator_of_lines(image_folder) -> None:
    folder = image_folder({f"{i}.png": picture(i) for i in range(4)})
    rows = [{"file_name": f"{i}.png", "label": "ab"[i % 2], "note": "a\u2028b"} for i in range(4)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert load(config(folder, test_fraction=0.5), "train").classes == ("a", "b")


def test_a_table_in_utf_16_is_read(image_folder) -> None:
    folder = image_folder({f"{i}.png": picture(i) for i in range(8)})
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(8))
    (folder / "labels.csv").write_text("file_name,label\n" + rows, encoding="utf-16")
    assert load(config(folder), "train").classes == ("a", "b")


def test_a_table_that_names_images_in_class_folders_is_told(image_folder) -> None:
    folder = image_folder(two_classes())
    names = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(3)]
    rows = "".join(f"{name},{number % 3}\n" for number, name in enumerate(names))
    (folder / "predictions.csv").write_text("path,label\n" + rows)
    images = load(config(folder), "train")
    assert images.classes == ("0", "1", "2")
    assert "labels come from predictions.csv, not from the folders" in images.findings.notes


def test_a_parquet_table_without_images_does_not_hide_them(image_folder) -> None:
    import pandas

    folder = image_folder(two_classes())
    pandas.DataFrame({"file_name": ["a"], "weight": [1.0]}).to_parquet(folder / "more.parquet")
    assert load(config(folder), "train").classes == ("ant", "bee")


def test_folders_that_hold_the_same_folders_are_told(image_folder) -> None:
    folder = image_folder(two_classes("entrainement/") | two_classes("controle/"))
    images = load(config(folder), "train")
    assert images.classes == ("controle", "entrainement")
    (note,) = (n for n in images.findings.notes if "hold the same folders" in n)
    assert "'controle', 'entrainement' are splits, set data.train_split and data" in note
