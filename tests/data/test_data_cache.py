"""Images in memory, in a file and decoded when needed: the same batches, bit for bit."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encoded, picture

from cure.config import AugmentConfig, DataConfig
from cure.data import Batch, ImageSet, account, batches, cache, epoch, load, load_training
from cure.data import decode as decode
from cure.data.cache import CachePlace
from cure.data.loader import to_unit
from cure.errors import DataError
from cure.models import digest

KINDS = ["memory", "disk", "none"]
AUGMENTS = [
    None,
    AugmentConfig(crop_padding=1),
    AugmentConfig(resized_crop=0.5, color_jitter=0.3, mixup=0.4, cutmix=1.0),
]


@pytest.fixture(autouse=True)
def cache_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images are enough for a test."""
    monkeypatch.setattr(cache, "SMALL", 0)


@pytest.fixture
def place(tmp_path: Path) -> CachePlace:
    said: list[str] = []
    made = CachePlace(tmp_path / "kept", said.append)
    object.__setattr__(made, "said", said)
    return made


@pytest.fixture(params=["folder", "parquet", "npz"])
def source(request: Any, training_folder: Any, write_parquet: Any, tmp_path: Path) -> Path:
    """30 pictures, of which the first are grey and the last in colour."""
    modes = ["L"] * 11 + ["RGB"] * 19
    pictures = [picture(i, (9, 7), mode) for i, mode in enumerate(modes)]
    if request.param == "folder":
        forms = ["png", "jpg"]
        named = {f"{'ab'[i % 2]}/{i:03}.{forms[i % 3 == 0]}": one for i, one in enumerate(pictures)}
        return training_folder(named)
    labels = [i % 2 for i in range(30)]
    if request.param == "parquet":
        write_parquet("test", [encoded(one) for one in pictures[:2]], labels[:2])
        return write_parquet("train", [encoded(one) for one in pictures], labels)
    path = tmp_path / "arrays.npz"
    pixels = np.stack([one.convert("RGB") for one in pictures])
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:2], y_test=labels[:2])
    return path


@pytest.fixture
def training_folder(image_folder: Any) -> Callable[[dict[str, Any]], Path]:
    """Writes images {"a/1.png": picture} as a training split beside a test split."""

    def write(files: dict[str, Any]) -> Path:
        first = next(iter(files.values()))
        test = {f"test/{name}/t.png": first for name in "ab"}
        return image_folder({f"train/{name}": one for name, one in files.items()} | test)

    return write


def read(source: Path, kind: str, place: CachePlace, **more: Any) -> tuple[ImageSet, ImageSet]:
    config = DataConfig(source=str(source), cache=kind, validation=6, **more)
    return load_training(config, place)


def same(first: list[Batch], second: list[Batch]) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return (a is None and b is None) or (
            a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)
        )

    fields = ("image", "label", "index", "soft_label", "weighted")
    return len(first) == len(second) > 0 and all(
        a.step == b.step and all(equal(getattr(a, f), getattr(b, f)) for f in fields)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("kind", ["disk", "none"])
def test_batches_are_equal_bit_for_bit(source: Path, kind: str, place: CachePlace) -> None:
    ours = dict(zip(("train", "validation"), read(source, kind, place), strict=True))
    memory = dict(zip(("train", "validation"), read(source, "memory", place), strict=True))
    for split, images in ours.items():
        want = memory[split]
        assert images.lazy is not None
        assert images.image.device.type == "meta"
        assert images.nbytes == 0 < want.nbytes == want.image.numel()
        assert want.lazy is None
        assert images.kind == want.kind
        assert images.findings == want.findings
        assert torch.equal(images.label, want.label)
        assert torch.equal(images.in_memory().image, want.image)
        assert same(list(batches(images, 4)), list(batches(want, 4)))
        assert same(list(batches(images, 4, limit=5)), list(batches(want, 4, limit=5)))
        assert images.digest() == digest({"image": want.image, "label": want.label})
        chosen = torch.tensor([4, 0, 3])
        assert torch.equal(images.subset(chosen).rows(slice(1, 3)), want.image[chosen[1:]])
        mask = want.label == 1
        assert torch.equal(
            images.subset(mask).subset(slice(1)).rows(slice(None)), want.image[mask][:1]
        )
    for augment in AUGMENTS:
        for more in (
            {},
            {"start": 2},
            {"sampler": "balanced", "class_weights": "balanced"},
            {"rank": 0, "world": 2},
            {"rank": 1, "world": 2, "start": 1},
        ):
            options = {"batch_size": 4, "epoch": 3, "seed": 5, "augment": augment, **more}
            found = list(epoch(ours["train"], **options))
            assert same(found, list(epoch(memory["train"], **options))), (augment, more)
    assert account(*ours.values()) == account(*memory.values())


@pytest.mark.parametrize("kind", KINDS)
def test_grey_images_become_colour_where_a_network_takes_colour(
    training_folder: Any, kind: str, place: CachePlace
) -> None:
    folder = training_folder({f"{'ab'[i % 2]}/{i}.png": picture(i, mode="L") for i in range(20)})
    images = read(folder, kind, place)[0]
    assert images.channels == 1
    wide = images.with_channels(3)
    assert wide.image.shape == (14, 3, 6, 6)
    assert torch.equal(wide.rows(slice(None)), images.rows(slice(None)).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_damaged_images_are_left_out_or_refused(
    training_folder: Any, write_parquet: Any, place: CachePlace, kind: str, form: str
) -> None:
    files = {f"{'ab'[i % 2]}/{i:02}.png": encoded(picture(i)) for i in range(20)}
    files["a/04.png"] = files["a/04.png"][:60]
    if form == "folder":
        source = training_folder(files)
    else:
        rows = [files[name] for name in sorted(files)]
        write_parquet("test", rows[:2], [0, 1])
        source = write_parquet("train", rows, [0] * 10 + [1] * 10)
    with pytest.raises(DataError, match=r"04\.png|row 2"):
        read(source, kind, place)
    # The second time the file is there already.
    for _ in range(2):
        train, validation = read(source, kind, place, damaged="skip")
        whole = read(source, "memory", place, damaged="skip")
        assert len(train) + len(validation) == 19
        assert train.findings == whole[0].findings
        assert torch.equal(train.rows(slice(None)), whole[0].image)
        assert torch.equal(validation.rows(slice(None)), whole[1].image)


def test_images_of_two_sizes_are_refused_and_leave_no_file(
    training_folder: Any, place: CachePlace
) -> None:
    sizes = [(6, 6)] * 19 + [(5, 6)]
    folder = training_folder(
        {f"{'ab'[i % 2]}/{i:02}.png": picture(i, s) for i, s in enumerate(sizes)}
    )
    for kind in KINDS:
        with pytest.raises(DataError, match="one size"):
            read(folder, kind, place)
    assert [one.name for one in place.folder.iterdir() if one.suffix != ".lock"] == []


def test_values_of_lazy_images_cannot_be_used_by_mistake(source: Path, place: CachePlace) -> None:
    images = read(source, "disk", place)[0]
    with pytest.raises(TypeError, match="meta"):
        images.image.numpy()
    with pytest.raises((NotImplementedError, RuntimeError)):
        float(images.image.float().mean())
    layer = torch.nn.Conv2d(3, 2, 3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        layer(to_unit(images.image[:2])).sum().item()


# The file.


def files_of(place: CachePlace) -> list[Path]:
    return sorted(place.folder.glob("*.bin"))


def test_the_size_is_said_first_and_the_file_is_used_again(
    source: Path, place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(source, "disk", place)[0]
    (file,) = files_of(place)
    assert file.stat().st_size == 30 * 3 * 7 * 9
    assert "30 decoded images" in place.said[-1]  # type: ignore[attr-defined]
    assert str(file) in place.said[-1]  # type: ignore[attr-defined]
    said = len(place.said)  # type: ignore[attr-defined]
    content = np.memmap(file, np.uint8, "r", shape=(30, 3, 7, 9))
    rest = {one.tobytes() for one in content}
    assert all(one.numpy().tobytes() in rest for one in first.rows(slice(None)))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode_to", None)  # Nothing is decoded again.
        again = read(source, "disk", place)[0]
    assert torch.equal(again.rows(slice(None)), first.rows(slice(None)))
    assert len(place.said) == said  # type: ignore[attr-defined]
    assert files_of(place) == [file]


def test_other_content_or_another_treatment_is_another_file(
    training_folder: Any, place: CachePlace
) -> None:
    files = {f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)}
    folder = training_folder(files)
    read(folder, "disk", place)
    read(folder, "disk", place, resize=4)
    assert len(files_of(place)) == 2
    # The same name, size and time of the file, but one pixel is another one.
    path = folder / "train" / "a" / "04.png"
    image = files["a/04.png"].copy()
    image.putpixel((0, 0), (1, 2, 3))
    path.write_bytes(encoded(image))
    changed = read(folder, "disk", place)
    assert len(files_of(place)) == 3
    want = read(folder, "memory", place)
    assert torch.equal(changed[0].rows(slice(None)), want[0].image)


def test_images_of_a_format_that_is_read_now_are_decoded_again(
    write_parquet: Any, place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `pip install pillow-heif`, which the first reading advises."""
    known = decode.formats()
    cells = [encoded(picture(i), "PNG" if i else "BMP") for i in range(12)]
    write_parquet("test", cells[1:3], [0, 1])
    folder = write_parquet("train", cells, [i % 2 for i in range(12)])
    with monkeypatch.context() as patch:
        for module in (cache, decode):
            fewer = tuple(name for name in known if name != "BMP")
            patch.setattr(module, "formats", lambda fewer=fewer: fewer, raising=False)
        assert sum(map(len, read(folder, "disk", place, damaged="skip"))) == 11
    assert sum(map(len, read(folder, "disk", place, damaged="skip"))) == 12


@pytest.mark.parametrize("damage", ["description", "half a description", "short", "temporary"])
def test_a_file_that_was_cut_off_is_written_again(
    training_folder: Any, place: CachePlace, damage: str
) -> None:
    folder = training_folder({f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)})
    want = read(folder, "disk", place)[0].in_memory().image
    (file,) = files_of(place)
    about = file.with_suffix(".json")
    left = file.with_name(f".{file.name}.123-abc.tmp")
    if damage == "description":
        about.unlink()
    elif damage == "half a description":
        about.write_text(about.read_text()[:40])
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.unlink()
        left.write_bytes(b"half of it")
    said = len(place.said)  # type: ignore[attr-defined]
    assert torch.equal(read(folder, "disk", place)[0].rows(slice(None)), want)
    assert len(place.said) == said + 1  # type: ignore[attr-defined]
    assert json.loads(about.read_text())["shape"] == [20, 3, 6, 6]
    assert not left.exists()


def test_a_file_that_is_cut_off_while_it_is_used_is_no_wrong_image(
    training_folder: Any, place: CachePlace
) -> None:
    folder = training_folder({f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)})
    images = read(folder, "disk", place)[0]
    (file,) = files_of(place)
    with file.open("rb+") as opened:
        opened.truncate(500)
    with pytest.raises(DataError, match="cut off"):
        list(batches(images, 5))


def test_images_that_change_while_they_are_used_are_no_wrong_images(
    training_folder: Any, place: CachePlace
) -> None:
    folder = training_folder({f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)})
    images = read(folder, "none", place)[0]
    assert len(list(batches(images, 5))) == 3
    (folder / "train" / "a" / "00.png").write_bytes(encoded(picture(0, (5, 5))))
    (folder / "train" / "b" / "01.png").unlink()
    with pytest.raises(DataError, match=r"another size|no longer"):
        list(batches(images, 14))


def _read_in_a_process(folder: str, kept: str, answers: Any) -> None:
    cache.SMALL = 0
    config = DataConfig(source=folder, cache="disk", validation=6)
    images = load_training(config, CachePlace(Path(kept), answers.put))[0]
    answers.put(("digest", images.digest()))


def test_two_processes_write_one_file(training_folder: Any, tmp_path: Path) -> None:
    folder = training_folder({f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)})
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    given = (str(folder), str(tmp_path / "kept"), answers)
    processes = [context.Process(target=_read_in_a_process, args=given) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [one for one in found if isinstance(one, str)]
    assert len(lines) == 1, "only the first one writes"
    assert len({one for one in found if not isinstance(one, str)}) == 1
    assert len(list((tmp_path / "kept").glob("*.bin"))) == 1


def test_a_disk_without_room_is_refused_before_anything_is_decoded_into_it(
    training_folder: Any, place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = training_folder({f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)})
    real = cache.shutil.disk_usage
    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda path: real(path)._replace(free=20 * 3 * 36 - 1)
    )
    with pytest.raises(DataError, match=r"data\.cache_folder"):
        read(folder, "disk", place)
    assert files_of(place) == []


def test_the_folder_is_a_setting(training_folder: Any, tmp_path: Path, place: CachePlace) -> None:
    folder = training_folder({f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)})
    read(folder, "disk", place, cache_folder=str(tmp_path / "elsewhere"))
    assert len(list((tmp_path / "elsewhere").glob("*.bin"))) == 1
    assert not place.folder.exists()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"data\.cache_folder"):
        read(folder, "disk", place, cache_folder=str(tmp_path / "taken"))


def test_beside_the_run() -> None:
    assert CachePlace.beside("/a/b/run").folder == Path("/a/b/decoded-images")
    assert CachePlace.beside(None).folder == Path("runs/decoded-images")


def test_a_few_images_stay_in_memory(
    training_folder: Any, place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SMALL", 20)
    folder = training_folder({f"{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(20)})
    for kind in ("disk", "none"):
        images = load(DataConfig(source=str(folder), cache=kind), "train", place=place)
        assert images.lazy is None
    assert not place.folder.exists()


def test_the_digest_is_that_of_the_whole_tensors(numbered: Any) -> None:
    images = numbered(700)
    total = hashlib.sha256(repr(("image", "torch.uint8", (700, 1, 4, 4))).encode())
    total.update(images.image.numpy().tobytes())
    total.update(repr(("label", "torch.int64", (700,))).encode())
    total.update(images.label.numpy().tobytes())
    assert images.digest() == total.hexdigest()
    assert images.digest() == digest({"image": images.image, "label": images.label})
