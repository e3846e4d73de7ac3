"""The serving example over HTTP: under load, and with hostile images."""

from __future__ import annotations

import io
import runpy
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

import cure
from cure.config import DataConfig
from cure.data import load_split
from cure.data.decode import EncodedImage, Treatment, decode, open_image
from cure.runs.folder import RunFolder

EXAMPLE = Path(__file__).parents[2] / "examples" / "export_and_serve.py"


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    app = runpy.run_path(str(EXAMPLE))["build_app"](str(folder / "model.onnx"))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    ends = time.monotonic() + 30
    while not server.started and time.monotonic() < ends:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/classify"
    server.should_exit = True
    thread.join(timeout=30)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels by its header, in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(60_001))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_every_concurrent_request_gets_its_own_answer(run: cure.Run, address: str) -> None:
    images = load_split(RunFolder.open(run.path).config.data, "test", 40)
    contract = cure.from_pretrained(run.path.parent / "deploy" / "model.onnx").contract
    logits = run.model()(images.image / 255).detach()
    chances = (logits / contract.temperature).softmax(dim=1)
    bodies = [encoded(Image.fromarray(pixels[0].numpy())) for pixels in images.image]

    def ask(number: int) -> tuple[int, str, float]:
        answer = httpx.post(address, content=bodies[number % 40], timeout=60)
        top = answer.json()["top"][0]
        return answer.status_code, top["class"], top["probability"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(80)))
    for number, (status, name, probability) in enumerate(answers):
        own = chances[number % 40]
        assert status == 200
        assert name == str(int(own.argmax()))
        assert probability == pytest.approx(float(own.max()), abs=1e-4)


def test_hostile_images_are_refused_and_the_service_goes_on(address: str) -> None:
    grey = Image.new("L", (8, 8), 100)
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    hostile = {
        "bomb": bomb(),
        "truncated": encoded(Image.effect_noise((300, 300), 80))[:2000],
        "16 bits": encoded(deep),
        "animated": encoded(grey, save_all=True, append_images=[Image.new("L", (8, 8), 9)]),
        "gif": encoded(grey, "GIF"),
        "another size": encoded(Image.new("L", (9, 8))),
        "too long": bytes(3_000_000),
        "empty": b"",
        "no image": b"<svg onload='x'/>",
    }
    for name, content in hostile.items():
        status = httpx.post(address, content=content, timeout=60).status_code
        assert 400 <= status < 500, (name, status)
        assert httpx.post(address, content=encoded(grey), timeout=60).status_code == 200


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_photographs_are_read_as_in_training(mode: str, fit: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (31, 47, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by a quarter.
    kind, options = ("JPEG", {"exif": exif}) if mode in ("RGB", "L") else ("PNG", {})
    content = encoded(image, kind, **options)
    needs = {"size": [16, 16], "channels": 3, "resize": 16, "fit": fit, "background": "white"}
    ours = runpy.run_path(str(EXAMPLE))["read_image"](content, needs)
    config = DataConfig(source="x", resize=16, fit=fit, color="rgb")
    cell = EncodedImage(lambda: open_image(io.BytesIO(content)), "it")
    theirs = decode([cell], 1, Treatment.of(config)).image
    assert np.array_equal(ours, theirs.numpy().astype(np.float32) / 255)
