"""From a run to an HTTP service: python export_and_serve.py [--serve]

pip install 'cure-at[export]' fastapi uvicorn; then POST an image file to /classify.
"""

import io
import json
import sys
import tempfile

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image

import cure

MOST_BYTES, MOST_PIXELS = 2_000_000, 4_000_000


def read_image(content: bytes, needs: dict) -> np.ndarray:
    """Pixels [1, C, H, W] in [0, 1]; what is no plain 8-bit picture is refused."""
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        if image.width * image.height > MOST_PIXELS:  # before anything is decoded
            raise HTTPException(413, f"more than {MOST_PIXELS} pixels")
        if getattr(image, "n_frames", 1) > 1 or image.mode not in ("L", "RGB"):
            raise HTTPException(415, f"expected one 8-bit grey or RGB picture, got {image.mode}")
        image = image.convert("RGB" if needs["channels"] == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"no whole PNG or JPEG ({type(error).__name__})") from None
    height, width = needs["size"]
    if image.size != (width, height):
        if needs["resize"] is None or needs["fit"] != "stretch":
            raise HTTPException(422, f"expected {width}x{height} pixels, got {image.size}")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32).reshape(height, width, -1) / 255
    return pixels.transpose(2, 0, 1)[None]


def build_app(path: str) -> FastAPI:
    """The service for one ONNX file of ``cure export``."""
    session = onnxruntime.InferenceSession(path)
    known = session.get_modelmeta().custom_metadata_map
    classes, needs, temperature = (
        json.loads(known[key]) for key in ("classes", "preprocessing", "temperature")
    )
    app = FastAPI()

    def answer(content: bytes) -> dict:
        (logits,) = session.run(["logits"], {"image": read_image(content, needs)})
        scaled = logits[0] / temperature  # fitted on validation images when it was exported
        chances = np.exp(scaled - scaled.max())
        chances = chances / chances.sum()
        top = chances.argsort()[::-1][:3]
        return {"top": [{"class": classes[i], "probability": float(chances[i])} for i in top]}

    @app.post("/classify")
    async def classify(request: Request) -> dict:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MOST_BYTES:
                raise HTTPException(413, f"more than {MOST_BYTES} bytes")
        return await run_in_threadpool(answer, bytes(content))

    return app


if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    settings = {"method": "at", "start": "scratch", "training.epochs": 2, "attack.steps": 2}
    run = cure.train("digits", settings, run=f"{folder}/run", quiet=True)
    file = cure.export(run, "onnx", f"{folder}/deploy")
    app = build_app(str(file))
    print("exported", file.name, "difference", cure.from_pretrained(file).contract.check)
    if "--serve" in sys.argv:
        import uvicorn

        uvicorn.run(app, host="127.0.0.1", port=8000)
