"""An ONNX file as a network: onnxruntime computes its logits, and no gradient comes back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cure.errors import CheckpointError, ModelError
from cure.models.contract import Contract
from cure.models.trial import Traits, with_traits
from cure.utils.io import first_line

INSTALL = "pip install 'cure-at[export]'"
NO_GRADIENT = "it is an ONNX file, which gives answers and no gradients"


def needs_package(name: str, error: ImportError) -> ModelError:
    """The error for a package of the extra ``export`` that is missing."""
    return ModelError(f"ONNX files need {name} ({first_line(error)}); {INSTALL}")


class OnnxNetwork(nn.Module):
    """An ONNX classifier.

    Args:
        path: the file; one input [B, C, H, W] of float32 in [0, 1], logits [B, classes] as its
            output (the one called ``logits``, or its only one).

    Attributes:
        contract: what the file says of itself; None where it was exported by others.
        quantised: whether it computes in integers.

    Raises:
        CheckpointError: when the file is missing or damaged.
        ModelError: when onnxruntime is missing or the file is no such classifier.
    """

    digest: Tensor
    _cure_untrainable = (
        "an ONNX file cannot be trained, because it gives no gradients; train the network that it "
        "was exported from"
    )

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"found no ONNX file at {path}")
        content = path.read_bytes()
        self.path = path
        self.session = _session(path)
        self.contract = Contract.of_metadata(self.session.get_modelmeta().custom_metadata_map, path)
        self.quantised = b"QuantizeLinear" in content or b"QLinearConv" in content
        # Two files are two networks for the journal of an evaluation.
        found = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
        self.register_buffer("digest", torch.from_numpy(found.copy()))
        self.input, self.output, (batch, *self.declared) = _ends(self.session, path)
        self.batch = batch if isinstance(batch, int) else None
        with_traits(self, Traits(no_gradient=NO_GRADIENT, untrainable=NO_GRADIENT))
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] in [0, 1]; no gradient reaches them."""
        self._check_shape(list(image.shape[1:]))
        pixels = image.detach().to("cpu", torch.float32).contiguous().numpy()
        step = self.batch or len(pixels)
        found = [self._run(pixels[first : first + step]) for first in range(0, len(pixels), step)]
        return torch.from_numpy(np.concatenate(found)).to(image)

    def _run(self, pixels: Any) -> Any:
        count = len(pixels)
        if self.batch is not None and count < self.batch:
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], self.batch - count, axis=0)])
        try:
            (logits,) = self.session.run([self.output], {self.input: pixels})
        except Exception as error:  # onnxruntime raises classes of its own
            raise ModelError(
                f"{self.path} failed on images of shape {list(pixels.shape)}: {first_line(error)}; "
                "name images of the size and colour that it was made for (--data-option resize=N)"
            ) from None
        return logits[:count]

    def _check_shape(self, came: list[int]) -> None:
        """Refuse images [C, H, W] of another shape than the file declares."""
        wanted = [
            declared if isinstance(declared, int) and declared > 0 else size
            for declared, size in zip(self.declared, came, strict=True)
        ]
        if wanted[0] != came[0]:
            needs = _setting("color", "grey" if wanted[0] == 1 else "rgb")
            if wanted[0] not in (1, 3):
                needs = "export a network for images of 1 or 3 channels"
            raise ModelError(
                f"{self.path} is made for images with {wanted[0]} channels, got {came[0]}: {needs}"
            )
        if wanted != came:
            _, height, width = wanted
            needs = f"give images of {height}x{width} pixels"
            raise ModelError(
                f"{self.path} is made for images of {height}x{width}, got {came[1]}x{came[2]}: "
                f"{_setting('resize', height) if height == width else needs}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxNetwork:
        """The network itself: it has no state that could change."""
        return self

    def extra_repr(self) -> str:
        """Name of the file."""
        return self.path.name


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise needs_package("onnxruntime", error) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as an ONNX file ({first_line(error)}); export it again"
        ) from None


def _setting(name: str, value: object) -> str:
    return f"set data.{name}={value} (of an evaluation --data-option {name}={value})"


def _ends(session: Any, path: Path) -> tuple[str, str, list[Any]]:
    """Names of input and output, and the declared shape of the input: numbers where fixed."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    named = [end for end in outputs if end.name == "logits"] or outputs
    if len(inputs) != 1 or len(named) != 1 or len(inputs[0].shape) != 4:
        came = ", ".join(f"{end.name} {end.shape}" for end in (*inputs, *outputs))
        raise ModelError(
            f"{path}: expected one input [B, C, H, W] and one output [B, classes], got {came}; "
            "call the output of the classifier logits"
        )
    if inputs[0].type != "tensor(float)":
        raise ModelError(
            f"{path}: expected an input of float32, got {inputs[0].type}; export it for float32 "
            "images in [0, 1]"
        )
    shape = inputs[0].shape
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        raise ModelError(
            f"{path}: expected images with the channel first, [B, C, H, W], got {shape}, where it "
            "is last; export the network with a first layer that permutes images [B, C, H, W]"
        )
    return inputs[0].name, named[0].name, shape
