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
from PIL import Image, ImageOps

import cure

MOST_BYTES, MOST_PIXELS = 2_000_000, 4_000_000


def fitted(image: Image.Image, needs: dict) -> Image.Image:
    """The image in the size of the network, resized and cropped as in training."""
    (height, width), (w, h) = needs["size"], image.size
    if (w, h) == (width, height):
        return image
    if needs["resize"] is None:
        raise HTTPException(422, f"expected {width}x{height} pixels, got {image.size}")
    if needs["fit"] == "crop" and w != h:
        side, longer = width, int(width * max(w, h) / min(w, h))
        size = (longer, side) if w > h else (side, longer)
        left, top = (round((pixels - side) / 2) for pixels in size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        return image.crop((left, top, left + side, top + side))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def read_image(content: bytes, needs: dict) -> np.ndarray:
    """Pixels [1, C, H, W] in [0, 1]; what is no 8-bit picture is refused."""
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        if image.width * image.height > MOST_PIXELS:  # before anything is decoded
            raise HTTPException(413, f"more than {MOST_PIXELS} pixels")
        if getattr(image, "n_frames", 1) > 1 or image.mode not in ("L", "RGB", "RGBA", "P"):
            raise HTTPException(415, f"expected one 8-bit grey or RGB picture, got {image.mode}")
        image = ImageOps.exif_transpose(image)  # phones store photographs lying
        if image.mode in ("RGBA", "P"):
            behind = Image.new("RGBA", image.size, needs["background"])
            image = Image.alpha_composite(behind, image.convert("RGBA"))
        image = fitted(image.convert("RGB" if needs["channels"] == 3 else "L"), needs)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"no whole PNG or JPEG ({type(error).__name__})") from None
    pixels = np.asarray(image, np.float32).reshape(*needs["size"], -1) / 255
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
