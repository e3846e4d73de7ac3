"""State files: what goes in comes out, and nothing damaged is taken for whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cure.errors import CheckpointError
from cure.runs.state import load_state, save_state

STATE = {
    "done": 7,
    "best": None,
    "name": "a/b",
    "nested": {"numbers": [1, 2.5, True, "x"], 3: torch.arange(4, dtype=torch.int64)},
    "weights": {"w": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()},
    "empty": {},
}


def same(one: object, other: object) -> bool:
    """Equal trees, bit for bit, with the same types."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path / "state", STATE)
    state = load_state(tmp_path / "state")
    assert state["nested"].keys() == STATE["nested"].keys(), "integer keys stay integers"
    assert same(state, STATE)


def test_values_next_to_each_other_in_memory_stay_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_state(tmp_path / "state", {"a": whole[:3], "b": whole[3:], "c": whole})
    state = load_state(tmp_path / "state")
    assert state["b"].tolist() == [3, 4, 5]
    assert state["c"].tolist() == list(range(6))


def test_what_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="plain values, not Posix"):
        save_state(tmp_path / "state", {"path": tmp_path})
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("cut", [0, 7, 40, 400, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "state"
    save_state(path, STATE)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError):
        load_state(path)


def test_a_changed_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, STATE)
    whole = path.read_bytes()
    for position in range(0, len(whole), 11):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            state = load_state(path)
        except CheckpointError:
            continue
        # A byte of padding says nothing; all that counts must be as it was.
        assert same(state, STATE)
