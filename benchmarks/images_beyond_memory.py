"""Time and memory of ``data.cache`` on photographs that do not fit into memory.

    python benchmarks/images_beyond_memory.py --output results/bench/images_beyond_memory.json

10,000 JPEG photographs of 224 pixels are made in a temporary folder by mirroring, cropping and
brightening those of a folder of parquet files (``--photos``), or of noise where there is none.
Each kind of cache then reads them in a process of its own: the training images with their account,
an epoch of augmented batches and the validation images.  Memory is the peak of the process
(VmHWM), PyTorch's libraries included, without a network.  A digest of all batches shows that they
are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

KINDS = ("disk, first time", "disk, used again", "none", "memory")


def make(folder: Path, count: int, side: int, photos: Path | None) -> None:
    """Write ``count`` photographs in ten class folders, and two a class for the test split."""
    originals = []
    if photos is not None:
        import pyarrow.parquet  # type: ignore[import-untyped]

        for file in sorted(photos.glob("train*.parquet")):
            for row in pyarrow.parquet.read_table(file).to_pylist():
                originals.append(row["image"]["bytes"])
    draws = np.random.default_rng(0)
    for number in range(count + 20):
        if originals:
            image = Image.open(io.BytesIO(originals[number % len(originals)])).convert("RGB")
            width, height = image.size
            left, top = draws.integers(0, width // 5 + 1), draws.integers(0, height // 5 + 1)
            image = image.crop((left, top, left + width * 4 // 5, top + height * 4 // 5))
            image = image.resize((side, side))
            image = ImageOps.mirror(image) if draws.random() < 0.5 else image
            image = ImageEnhance.Brightness(image).enhance(draws.uniform(0.7, 1.3))
        else:
            image = Image.fromarray(draws.integers(0, 256, (side, side, 3), np.uint8))
        split = "train" if number < count else "test"
        place = folder / split / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:06}.jpg", quality=90)


def measure(photos: str, kind: str, kept: str, batch_size: int) -> dict[str, object]:
    """Read all images with one kind of cache, in this process."""
    import torch

    from cure.config import AugmentConfig, DataConfig
    from cure.data import account, batches, epoch, load_training
    from cure.data.cache import CachePlace, no_words

    torch.set_num_threads(1)
    total = hashlib.sha256()
    started = peak()
    began = time.perf_counter()
    config = DataConfig(source=photos, cache=kind.split(",")[0], validation=500)
    training, validation = load_training(config, CachePlace(Path(kept), no_words))
    opened = time.perf_counter() - began
    began = time.perf_counter()
    account(training, validation)
    counted = time.perf_counter() - began
    began, images = time.perf_counter(), 0
    for batch in epoch(
        training, batch_size=batch_size, epoch=0, seed=0, augment=AugmentConfig(crop_padding=8)
    ):
        total.update(batch.image.numpy().tobytes())
        images += len(batch.label)
    seconds = time.perf_counter() - began
    for batch in batches(validation, batch_size):
        total.update(batch.image.numpy().tobytes())
    return {
        "images": len(training) + len(validation),
        "open_seconds": round(opened, 1),
        "account_seconds": round(counted, 1),
        "epoch_seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 1),
        "peak_mib": round(peak()),
        "libraries_mib": round(started),
        "digest": total.hexdigest(),
    }


def peak() -> float:
    """Largest memory of this process so far, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no VmHWM in /proc/self/status: this benchmark needs Linux")


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--photos", type=Path, help="folder of parquet files to make them from")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(*given.one, given.batch_size)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        photos, kept = Path(temporary) / "photos", Path(temporary) / "kept"
        make(photos, given.count, given.side, given.photos)
        found = {}
        for kind in KINDS:
            asked = [__file__, "--one", str(photos), kind, str(kept)]
            more = ["--batch-size", str(given.batch_size)]
            ended = subprocess.run(
                [sys.executable, *asked, *more], check=True, capture_output=True, text=True
            )
            found[kind] = json.loads(ended.stdout.splitlines()[-1])
            print(kind, found[kind], flush=True)
        encoded = sum(file.stat().st_size for file in photos.rglob("*.jpg"))
        stored = sum(file.stat().st_size for file in kept.glob("*.bin"))
    result = {
        "photographs": given.count,
        "side": given.side,
        "made_from": "photographs" if given.photos else "noise",
        "batch_size": given.batch_size,
        "encoded_mib": round(encoded / 2**20),
        "file_mib": round(stored / 2**20),
        "equal_batches": len({one["digest"] for one in found.values()}) == 1,
        "caches": found,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n")
    if not result["equal_batches"]:
        raise SystemExit("the batches differ")


if __name__ == "__main__":
    main()
