"""ONNX files: the graph with its normalisation inside, its metadata, and int8 quantisation."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from cure.data.images import ImageKind
from cure.errors import ModelError
from cure.models.contract import Contract
from cure.models.onnx_network import needs_package
from cure.utils.io import first_line

OPSET = 18
"""Read by onnxruntime since 1.14, TensorRT since 8.6 and OpenVINO since 2023."""

_OPERATORS = (
    r"No ONNX function found for <OpOverload\(op='([\w:.]+)'",
    r"operator '([\w:.]+)'",
    r"__torch__\.torch\.classes\.([\w.]+)",
)
_LINE = re.compile(r'File "([^"]+)", line (\d+), in forward')
TESTED = "2.11"
"""The oldest PyTorch with which exports to ONNX are tested."""
_ADVICE = "change the network's forward, or export with --to safetensors"


def captured(model: nn.Module, kind: ImageKind) -> Any:
    """The computation of a network as a ``torch.export`` program, for any batch size.

    Args:
        model: on the processor, in evaluation mode.
        kind: the images.

    Raises:
        ModelError: when PyTorch cannot capture it; names the operator or the reason.
    """
    draws = torch.Generator().manual_seed(0)
    example = torch.rand((2, kind.channels, *kind.size), generator=draws)
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError(
            "PyTorch cannot export TorchScript, which is an exported form already; export the "
            "network that it was made from, or --to safetensors"
        )
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(model, (example,), dynamic_shapes=sizes)
        except Exception as error:  # whatever a network or PyTorch's tracer raises
            raise ModelError(f"PyTorch cannot export this network: {_reason(error)}") from error


def lower_precision(program: Any) -> str | None:
    """``bfloat16`` or ``float16`` where a program of :func:`captured` computes in it."""
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                return str(value.dtype).removeprefix("torch.")
    return None


def onnx_model(program: Any, contract: Contract, opset: int = OPSET) -> Any:
    """An ``onnx.ModelProto`` of a program, with the contract in its metadata.

    Args:
        program: of :func:`captured`.
        contract: what the file says of itself.
        opset: version of the operators.

    Raises:
        ModelError: when a package is missing, or an operator has no ONNX counterpart.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise needs_package("onnx and onnxscript", error) from None
    with quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:
            if TorchVersion(torch.__version__) < TESTED:
                raise ModelError(
                    f"expected PyTorch {TESTED} or later to write ONNX, got {torch.__version__}, "
                    "which failed; install a later one, or export with --to safetensors"
                ) from error
            raise ModelError(f"ONNX cannot hold this network: {_reason(error)}") from error
    assert made is not None
    proto = made.model_proto
    found = [item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")]
    if found != [opset]:
        raise ModelError(
            f"this PyTorch writes opset {found[0] if found else 'none'} and cannot convert the "
            f"network to opset {opset}; say --opset {found[0] if found else OPSET}"
        )
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim[:1]:
            if size.dim_param:
                size.dim_param = "batch"
    describe(proto, contract)
    return proto


def describe(proto: Any, contract: Contract) -> None:
    """Put the contract into the metadata of an ``onnx.ModelProto``, in the place of another."""
    import onnx

    proto.producer_name, proto.producer_version = "cure", contract.versions.get("cure", "")
    onnx.helper.set_model_props(proto, contract.metadata())


def quantise(float_file: Path, int8_file: Path, images: Tensor) -> None:
    """Static int8 quantisation by onnxruntime.

    Weights are int8 with one scale a channel and 7 bits (no processor saturates on those),
    activations uint8 with the range that they have on the calibration images.

    Args:
        float_file: the ONNX file.
        int8_file: the file to write; it has no metadata yet.
        images: calibration images [N, C, H, W] float32 in [0, 1].

    Raises:
        ModelError: when a package is missing or onnxruntime cannot quantise the network.
    """
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise needs_package("onnx and onnxruntime", error) from None

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(torch.split(images, 32))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    prepared = int8_file.with_name(f"{int8_file.stem}-prepared.onnx")
    with quiet():
        try:
            quantization.shape_inference.quant_pre_process(
                str(float_file), str(prepared), skip_symbolic_shape=True
            )
            quantization.quantize_static(
                str(prepared),
                str(int8_file),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
            )
        except Exception as error:
            raise ModelError(
                f"onnxruntime cannot quantise this network: {_reason(error)}"
            ) from error
        finally:
            prepared.unlink(missing_ok=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, what PyTorch and onnxruntime log about their own workings is not shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The operator that is to blame, else the first line of the innermost error."""
    causes: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in causes:
        causes.append(inner)
        inner = inner.__cause__ or inner.__context__
    texts = [str(cause) for cause in reversed(causes)]
    for pattern in _OPERATORS:
        for text in texts:
            found = re.search(pattern, text)
            if found is not None:
                return f"the operator {found[1]} is not supported; {_ADVICE}"
    lines = [line for text in texts if (line := _LINE.search(text)) is not None]
    place = f" ({Path(lines[0][1]).name}, line {lines[0][2]})" if lines else ""
    if any("data-dependent" in text for text in texts):
        return f"its forward decides by the values of a tensor{place}; {_ADVICE}"
    if any("Constraints violated (batch)" in text for text in texts):
        return f"its forward fixes the number of images of a batch{place}; {_ADVICE}"
    return f"{first_line(causes[0])}{place}; {_ADVICE}"
