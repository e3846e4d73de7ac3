"""Weights on disk: what is read, what is refused, and that writing loses nothing."""

from __future__ import annotations

import argparse
import datetime
import errno
import gzip
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cure.errors import CheckpointError, CureNote, ModelError
from cure.models import Normalised, digest, load_weights, read_weights, save_weights
from cure.utils.io import write_atomically


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key])
        for key, value in first.items()
    )


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def test_written_weights_are_read_back(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "weights.safetensors"
    save_weights(Normalised(model, [0.5], [0.2]), path, {"epoch": "3"})
    assert same(read_weights(path), model.state_dict())
    assert same(safetensors.torch.load_file(path), model.state_dict())
    header = metadata(path)
    assert header["epoch"] == "3"
    assert header["sha256"] == digest(model.state_dict())
    other = Normalised(network(), [0.5], [0.2])
    load_weights(other, path)
    assert same(other.network.state_dict(), model.state_dict())
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_tied_and_strided_weights_are_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    model = model.to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "w.safetensors", {})
    assert same(read_weights(tmp_path / "w.safetensors"), model.state_dict())


def test_digest_depends_on_names_types_shapes_and_bytes() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bool)}
    reordered = dict(reversed(tensors.items()))
    assert digest(tensors) == digest(reordered)
    variants: list[dict[str, Tensor]] = [
        {"d": tensors["a"], "b": tensors["b"], "c": tensors["c"]},
        tensors | {"a": tensors["a"].view(2, 3)},
        tensors | {"a": tensors["a"].view(torch.int32)},
        tensors | {"b": torch.tensor(4)},
        {"a": tensors["a"]},
    ]
    assert len({digest(item) for item in [tensors, *variants]}) == 6
    strided = torch.arange(6.0).view(2, 3).t()
    assert digest({"a": strided}) == digest({"a": strided.contiguous()})
    assert digest({"a": torch.empty(0), "h": torch.ones(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"net": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.model.{key}": value for key, value in state.items()},
    ],
)
def test_common_checkpoints_are_unwrapped(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any], legacy: bool
) -> None:
    model = network()
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(model.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    assert same(read_weights(path), model.state_dict())
    other = network()
    load_weights(other, path)
    assert same(other.state_dict(), model.state_dict())


class Inside(nn.Module):
    """A network whose own names all start as a wrapper's would."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()


def test_prefixes_that_belong_to_the_network_stay(tmp_path: Path) -> None:
    model = Inside()
    torch.save(
        {f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "w"
    )
    other = Inside()
    load_weights(other, tmp_path / "w")
    assert same(other.state_dict(), model.state_dict())
    save_weights(model, tmp_path / "w.safetensors", {})
    assert same(read_weights(tmp_path / "w.safetensors"), model.state_dict())


class Spy:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["SPY_FOLDER"],)


@pytest.mark.parametrize("form", ["archive", "legacy", 0, 2, 4, 5])
def test_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str | int
) -> None:
    trap, path = tmp_path / "ran", tmp_path / "checkpoint.pt"
    monkeypatch.setenv("SPY_FOLDER", str(trap))
    content = {"state_dict": network().state_dict(), "extra": Spy()}
    if isinstance(form, int):
        path.write_bytes(pickle.dumps(content, protocol=form))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(CheckpointError, match=r"loading it would run code.*safetensors"):
        read_weights(path)
    assert not trap.exists()


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_the_conversion_that_the_refusal_names_works(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a 'strange' name.pt"
    model = network()
    content = {"state_dict": model.state_dict(), "share": Fraction(1, 2)}
    if form == "torch":
        torch.save(content, path)
    else:
        arrays = {name: value.numpy() for name, value in model.state_dict().items()}
        content["state_dict"] = arrays | {"names": np.array(["a"])}
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="once with: ") as caught:
        read_weights(path)
    command = str(caught.value).split("once with: ")[1].split(" (adapt")[0]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    assert same(read_weights(path.with_suffix(".safetensors")), model.state_dict())


VALUES = {
    "args": argparse.Namespace(rate=np.float32(0.1), out=Path("runs"), more=argparse.Namespace()),
    "when": datetime.datetime(2026, 1, 2),
    "took": datetime.timedelta(3),
    "options": types.SimpleNamespace(names=["a"]),
    "best": np.float64(3.5),
    "history": np.arange(3),
    "names": np.array(["a", "bc"]),
    "kind": np.dtype("float16"),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_values_beside_the_weights_are_read_over(tmp_path: Path, legacy: bool) -> None:
    model, path = network(), tmp_path / "w.pt"
    content = {"state_dict": model.state_dict()} | VALUES
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert same(read_weights(path), model.state_dict())
    other = network()
    load_weights(other, path)
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_in_the_place_of_tensors_are_read(tmp_path: Path, core: str) -> None:
    model, path = network(), tmp_path / "w.pt"
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    # In this form names of modules are lines, so that one of another length does no harm.
    torch.save({"model": arrays}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"multiarray" in content
    path.write_bytes(re.sub(rb"numpy\._?core\.multiarray", f"{core}.multiarray".encode(), content))
    assert same(read_weights(path), model.state_dict())
    np.savez(tmp_path / "w.npz", **arrays)
    assert same(read_weights(tmp_path / "w.npz"), model.state_dict())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path, form: str) -> None:
    state = network().state_dict()
    place = {name: f"part-{number % 2}.{form}" for number, name in enumerate(state)}
    for part in set(place.values()):
        some = {name: value for name, value in state.items() if place[name] == part}
        if form == "bin":
            torch.save(some, tmp_path / part)
        else:
            safetensors.torch.save_file(some, tmp_path / part)
    index = tmp_path / f"model.{form}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    assert same(read_weights(index), state)
    assert same(read_weights(tmp_path), state)
    (tmp_path / f"part-1.{form}").unlink()
    with pytest.raises(CheckpointError, match=rf"found no file .*part-1\.{form}"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": place | {"more": f"part-0.{form}"}}))
    torch.save({}, tmp_path / "part-1.bin")
    if form == "bin":
        with pytest.raises(CheckpointError, match=r"weights that its files do not hold, such as"):
            read_weights(index)
    for damage in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(damage)
        with pytest.raises(CheckpointError, match="is no index of weights"):
            read_weights(index)


def test_a_folder_is_read_where_it_is_plain_which_file_holds_the_weights(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(CheckpointError, match="expected a file with weights, got the folder"):
        read_weights(tmp_path)
    save_weights(model, tmp_path / "a.safetensors", {})
    assert same(read_weights(tmp_path), model.state_dict())
    save_weights(network(), tmp_path / "b.safetensors", {})
    with pytest.raises(CheckpointError, match=r"give a file of it: a\.safetensors, b\.safetens"):
        read_weights(tmp_path)
    save_weights(model, tmp_path / "model.safetensors", {})
    assert same(read_weights(tmp_path), model.state_dict())


def test_one_part_of_several_files_is_told(tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00002.safetensors"
    safetensors.torch.save_file({"0.weight": network()[0].weight.detach()}, part)
    with pytest.raises(CheckpointError, match=r"is one part of several: give their index"):
        load_weights(network(), part)


def test_an_average_without_statistics_beside_the_weights_is_told(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "w.pt"
    shadow = {name: value * 0.9 for name, value in model.named_parameters()}
    torch.save({"model": model.state_dict(), "ema": {"shadow": shadow}}, path)
    other = network()
    with pytest.warns(CureNote, match=r"'model' is taken; 'ema\.shadow' holds other values"):
        load_weights(other, path)
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_read_that_the_layers_of_the_network_rename(
    tmp_path: Path, prefix: str
) -> None:
    """PyTorch's parametrised weight norm reads the names of the older one."""
    old, new = network(), network()
    nn.utils.weight_norm(old[3])
    nn.utils.parametrizations.weight_norm(new[3])
    path, state = tmp_path / "w.pt", old.state_dict()
    torch.save({"model": {prefix + name: value for name, value in state.items()}}, path)
    load_weights(new, path)
    image = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(new(image), old(image))
    before = {name: value.clone() for name, value in new.state_dict().items()}
    for change in ({"3.weight_g": torch.ones(3, 2)}, {"3.weight_g": state["3.weight_g"].char()}):
        torch.save(state | change, path)
        with pytest.raises(CheckpointError, match=r"2 missing: 3\.parametrizations"):
            load_weights(new, path)
    torch.save(state | {"3.weight_v": state["3.weight_v"] * torch.nan}, path)
    with pytest.raises(CheckpointError, match="not finite"):
        load_weights(new, path)
    assert same(new.state_dict(), before)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"weights", mtime=0), r"w\.pt is no checkpoint but a gzip file; unpack it"),
        (b"<!DOCTYPE html><html>", "a web page; download"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull"),
        (b"\x89HDF\r\n\x1a\n", "as Keras writes them"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", r"array without a name; .* in an \.npz file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file, .*; give the weights as safetensors"),
        (b"\x08\x0a\x12\x04cure\x1a\x05", "an ONNX file, .*; give the run .* --to safetensors"),
    ],
    ids=["gzip", "page", "pointer", "hdf5", "npy", "gguf", "onnx"],
)
def test_files_of_another_form_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_weights(tmp_path / "w.pt")


def test_archives_of_another_form_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(CheckpointError, match=r"a TorchScript program, .* torch\.jit\.load"):
        read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside.pt", b"weights")
    with pytest.raises(CheckpointError, match=r"a zip archive of inside\.pt\); unpack it"):
        read_weights(path)


def test_a_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="would run code"):
        read_weights(path)


def test_no_warning_reaches_the_user(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "w.pt")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "expected a dictionary of tensors .* got a Tensor"),
        ([1, 2], "got a list"),
        ({}, "got a dictionary with"),
        ({"epoch": 3, "rate": 0.1}, "got a dictionary with 2 entries: epoch, rate"),
        ({"a": torch.ones(2), "epoch": 3}, "got a dictionary with 2 entries: a, epoch"),
    ],
)
def test_files_without_weights_are_told(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "w.pt")


def test_missing_empty_and_foreign_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no file with weights at"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"got the folder \S+$"):
        read_weights(tmp_path)
    for suffix in ("pt", "safetensors"):
        path = tmp_path / f"w.{suffix}"
        path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="is empty"):
            read_weights(path)
        for content in (b"<!DOCTYPE html>", b"version https://git-lfs", b"hello", b"\0" * 99):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"damaged or cut off|is no checkpoint but"):
                read_weights(path)
    safetensors.torch.save_file({}, tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_weights(tmp_path / "no.safetensors")


def _written(folder: Path, form: str) -> tuple[bytes, dict[str, Tensor]]:
    model = nn.Linear(2, 2)
    path = folder / f"whole.{form}"
    if form == "safetensors":
        save_weights(model, path, {"epoch": "3"})
    else:
        torch.save(model.state_dict(), path)
    return path.read_bytes(), model.state_dict()


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_no_flipped_byte_changes_weights_in_silence(tmp_path: Path, form: str) -> None:
    content, state = _written(tmp_path, form)
    path = tmp_path / f"flipped.{form}"
    found = 0
    for index in range(len(content)):
        flipped = bytearray(content)
        flipped[index] ^= 0xFF
        path.write_bytes(flipped)
        try:
            read = read_weights(path)
        except CheckpointError:
            found += 1
        else:
            assert same({key: read[key] for key in state}, state), index
    assert found > len(content) / 4


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_altered_and_truncated_weights_are_told(tmp_path: Path, form: str) -> None:
    content, state = _written(tmp_path, form)
    path = tmp_path / f"changed.{form}"
    index = content.index(state["weight"].numpy().tobytes())
    path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
    with pytest.raises(CheckpointError, match="altered after it was written"):
        read_weights(path)
    for length in (5, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged or cut off"):
            read_weights(path)


def _refused(model: nn.Module, state: dict[str, Tensor], path: Path, message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, path)
    assert same(model.state_dict(), before)


def test_weights_that_do_not_fit_are_told_and_nothing_is_loaded(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "w.pt"
    state = {key: value + 1 for key, value in model.state_dict().items()}
    _refused(
        model,
        {key: value for key, value in state.items() if not key.startswith("1.")},
        path,
        r"does not fit the model \(Sequential\): 4 missing: 1.weight, 1.bias, 1.running_mean, "
        r"1.running_var; check",
    )
    more = {f"extra.{index}": torch.ones(1) for index in range(7)}
    lacking = {key: value for key, value in (state | more).items() if key != "3.bias"}
    _refused(model, lacking, path, r"1 missing: 3.bias; 7 unexpected: extra.0, .*extra.4, \.\.\.")
    other = state | {"3.weight": torch.ones(4, 8), "3.bias": torch.ones(4)}
    _refused(
        model,
        other,
        path,
        r"2 of another shape: 3.weight \[4, 8\] for \[3, 8\], 3.bias \[4\] for \[3\]",
    )
    for value in (float("nan"), float("inf")):
        broken = state | {"3.bias": torch.tensor([0.0, value, 0.0])}
        _refused(model, broken, path, r"not finite \(1 in all: 3.bias\)")
    # Finite in the file, infinite in the network's type.
    huge = state | {"3.bias": torch.full((3,), 1e300, dtype=torch.float64)}
    _refused(model, huge, path, "not finite")


@pytest.mark.parametrize(
    "names", [("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std")]
)
def test_checkpoint_that_standardises_inside_needs_the_same_constants(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    model, path = network(), tmp_path / "w.pt"
    state = {f"module.{key}": value for key, value in network().state_dict().items()}
    state[names[0]] = torch.tensor([0.5]).view(1, 1, 1, 1)
    state[names[1]] = torch.tensor([0.2]).view(1, 1, 1, 1)
    message = r"standardises images inside .* model.mean \[0.5\] and model.std \[0.2\]"
    _refused(model, state, path, message)
    _refused(Normalised(model, [0.4], [0.2]), state, path, message)
    fitting = Normalised(model, [0.5], [0.2])
    load_weights(fitting, path)
    assert torch.equal(model[3].weight, state["module.3.weight"])
    del state[names[1]]
    _refused(fitting, state, path, "standardises images inside")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    old = network()
    save_weights(old, path, {})

    def full(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        CheckpointError, match="no space is left on the disk; nothing that existed was lost"
    ):
        write_atomically(path, full)

    def archive(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 960 vs 854")

    with pytest.raises(CheckpointError, match=r"could not write .*nothing that existed was lost"):
        write_atomically(path, archive)

    def stopped(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, stopped)

    def refuse(first: object, second: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match="Permission denied"):
            save_weights(network(), path, {})
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert same(read_weights(path), old.state_dict())
    with pytest.raises(CheckpointError, match="No such file or directory; nothing"):
        save_weights(old, tmp_path / "no" / "w.safetensors", {})


def test_content_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("flush"), flush(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
    write_atomically(tmp_path / "x", Path.touch)
    assert events == ["flush", "rename", "flush"]


Wrap = Callable[[dict[str, Tensor]], Any]


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: _under("backbone.encoder.", state),
        lambda state: {"weights": _under("student.", state), "step": 3},
        lambda state: [3, {"run": {"generator": state}}],
        lambda state: {"state_dict": state, "model": dict(state)},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    ],
    ids=["two prefixes", "container and prefix", "nested", "the same twice", "without counts"],
)
def test_any_prefix_and_any_container_is_found(tmp_path: Path, wrap: Wrap) -> None:
    model, other = network(), network()
    torch.save(wrap(model.state_dict()), tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert same(other.state_dict(), model.state_dict())


def test_a_prefix_of_the_network_alone_may_be_missing_in_the_file(tmp_path: Path) -> None:
    model, other = network(), Inside()
    torch.save({"net": model.state_dict()}, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert same(other.model.state_dict(), model.state_dict())


def test_entries_that_are_no_part_of_the_network_are_told(tmp_path: Path) -> None:
    model, other = network(), network()
    torch.save({"net": model.state_dict() | {"total_ops": torch.zeros(1)}}, tmp_path / "w.pt")
    with pytest.warns(CureNote, match=r"w.pt: ignored 1 entries .*: total_ops"):
        load_weights(other, tmp_path / "w.pt")
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda raw, ema: {"model": raw, "ema": ema},
        lambda raw, ema: {"state_dict": _under("model.", raw) | _under("ema.", ema)},
    ],
)
def test_of_two_sets_of_weights_one_must_be_chosen(
    tmp_path: Path, wrap: Callable[[Any, Any], Any]
) -> None:
    raw, ema, other = network(), network(), network()
    path = tmp_path / "w.pt"
    content = wrap(raw.state_dict(), {k: v + 1 for k, v in ema.state_dict().items()})
    _refused(other, content, path, r"2 sets of weights that fit .*model' and '.*ema'.*start_key=")
    load_weights(other, path, key="ema")
    assert torch.equal(other[0].weight, ema[0].weight + 1)
    load_weights(other, path, key="model")
    assert torch.equal(other[0].weight, raw[0].weight)
    with pytest.raises(CheckpointError, match="no weights under the key 'average'; it has"):
        load_weights(other, path, key="average")


def test_a_head_for_other_classes_is_drawn_anew_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for head in (nn.Linear(8, 1000), nn.Conv2d(8, 1000, 1)):
        model, other = network(), network()
        if isinstance(head, nn.Conv2d):
            other[3] = nn.Conv2d(8, 3, 1)
        model[3] = head
        _refused(other, model.state_dict(), path, "last layer '3' .* new_head=true")
        before = other[3].weight.clone()
        load_weights(other, path, new_head=True, seed=1)
        assert torch.equal(other[0].weight, model[0].weight)
        drawn = other[3].weight.clone()
        assert not torch.equal(drawn, before)
        load_weights(other, path, new_head="3", seed=1)
        assert torch.equal(other[3].weight, drawn)
        with pytest.raises(ModelError, match="'1' is no linear layer or 1x1 convolution"):
            load_weights(other, path, new_head="1")


def test_a_pickled_network_is_converted_by_the_command_that_the_refusal_names(
    tmp_path: Path,
) -> None:
    path, model, other = tmp_path / "whole.pt", network(), network()
    torch.save({"epoch": 3, "net": model, "optimizer": [torch.ones(2)]}, path)
    with pytest.raises(CheckpointError, match="once with: ") as caught:
        load_weights(other, path)
    command = str(caught.value).split("once with: ")[1]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    load_weights(other, path.with_suffix(".safetensors"))
    assert same(other.state_dict(), model.state_dict())


# What a file may hold instead of plain weights.


def test_whole_numbers_are_not_taken_for_weights(tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.weight"] = (100 * state["0.weight"]).to(torch.int8)
    state["0.weight_scale"] = torch.ones(1)
    torch.save(state, tmp_path / "int8.pt")
    with pytest.raises(CheckpointError, match=r"floating-point weights, got int8 in '0.weight'"):
        load_weights(network(), tmp_path / "int8.pt")


def test_quantised_and_sparse_weights_are_read(tmp_path: Path) -> None:
    model = network()
    state = model.state_dict()
    values = torch.quantize_per_tensor(state["0.weight"], 0.01, 0, torch.qint8)
    sparse = state["3.weight"].to_sparse()
    torch.save(state | {"0.weight": values, "3.weight": sparse}, tmp_path / "mixed.pt")
    other = network()
    load_weights(other, tmp_path / "mixed.pt")
    assert torch.equal(other[0].weight, values.dequantize())
    assert torch.equal(other[3].weight, model[3].weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_tied_weights_that_are_written_once_are_read(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "tied.safetensors"
    safetensors.torch.save_model(model, str(path))
    other = Tied()
    load_weights(other, path)
    assert same(other.state_dict(), model.state_dict())


def test_different_weights_for_one_tensor_are_refused(tmp_path: Path) -> None:
    """The last of them had been taken for both without a word."""
    free, path = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}), tmp_path
    torch.save(free.state_dict(), path / "free.pt")
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'first\.weight' and 'second\.weight'.* are one"):
        load_weights(model, path / "free.pt")
    assert same(model.state_dict(), before)


class Counting(nn.Module):
    """Keeps something in its state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"calls": 1}


def test_state_that_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    model, path = Counting(), tmp_path / "weights.safetensors"
    save_weights(model, path, {})
    other = Counting()
    load_weights(other, path)
    assert torch.equal(other.linear.weight, model.linear.weight)


@pytest.mark.parametrize(
    ("constants", "advice"),
    [
        ({"data_mean": [0.1, 0.2, 0.3]}, "--mean 0.1,0.2,0.3 --std 1.0,1.0,1.0"),
        (
            {"image_mean": [127.5] * 3, "image_std": [51.0] * 3},
            "divided by 255 .*--mean 0.5,0.5,0.5 --std 0.2,0.2,0.2",
        ),
    ],
)
def test_constants_are_advised_in_a_form_that_works(
    tmp_path: Path, constants: dict[str, list[float]], advice: str
) -> None:
    tensors = {name: torch.tensor(values) for name, values in constants.items()}
    torch.save(network().state_dict() | tensors, tmp_path / "own.pt")
    with pytest.raises(CheckpointError, match=advice):
        load_weights(network(), tmp_path / "own.pt")


def test_files_are_read_by_their_content_and_not_by_their_name(tmp_path: Path) -> None:
    model = network()
    save_weights(model, tmp_path / "one.pth", {})
    torch.save(model.state_dict(), tmp_path / "two.safetensors")
    torch.save(
        model.state_dict(), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False
    )
    for path in tmp_path.iterdir():
        assert same(read_weights(path), model.state_dict()), path.name
