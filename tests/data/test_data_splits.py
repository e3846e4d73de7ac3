from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cure.data import carve, stratified
from cure.errors import DataError


def fingerprint(index: torch.Tensor) -> str:
    return hashlib.sha256(",".join(map(str, index.tolist())).encode()).hexdigest()[:16]


STABLE = "e91b71d643602747"


def test_stratified_is_the_same_in_every_process() -> None:
    label = torch.arange(100) % 7
    _, chosen = stratified(label, 20, 3, "validation")
    assert fingerprint(chosen) == STABLE
    code = (
        "import torch; from cure.data import stratified;"
        "print(stratified(torch.arange(100) % 7, 20, 3, 'validation')[1].tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(chosen.tolist())


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_stratified_is_disjoint_complete_and_even(
    sizes: list[int], share: float, seed: int
) -> None:
    label = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))]
    count = round(share * len(label))
    rest, chosen = stratified(label, count, seed, "test")
    assert len(chosen) == count
    assert torch.cat([rest, chosen]).sort().values.tolist() == list(range(len(label)))
    assert rest.tolist() == sorted(rest.tolist())
    assert chosen.tolist() == sorted(chosen.tolist())
    for c, size in enumerate(sizes):
        assert abs(int((label[chosen] == c).sum()) - count * size / len(label)) < 1


def test_the_choice_depends_on_seed_and_purpose() -> None:
    label = torch.arange(200) % 4
    chosen = {
        tuple(stratified(label, 40, seed, purpose)[1].tolist())
        for seed in (0, 1)
        for purpose in ("test", "validation")
    }
    assert len(chosen) == 4


def test_the_choice_is_not_the_first_of_each_class() -> None:
    _, chosen = stratified(torch.zeros(1000, dtype=torch.int64), 100, 0, "test")
    assert 350 < float(chosen.float().mean()) < 650


def test_carve_keeps_images_with_their_labels(numbered) -> None:
    train = numbered(90, classes=3)
    rest, validation = carve(train, 30, seed=0)
    assert (len(rest), len(validation)) == (60, 30)
    assert (rest.split, validation.split) == ("train", "validation")
    assert torch.bincount(validation.label).tolist() == [10, 10, 10]
    for part in (rest, validation):
        assert torch.equal(part.image[:, 0, 0, 0].long() % 3, part.label)
    together = torch.cat([rest.image, validation.image])[:, 0, 0, 0].sort().values
    assert together.tolist() == list(range(90))


@pytest.mark.parametrize("count", [0, 90, 1000])
def test_carve_refuses_a_split_that_does_not_fit(numbered, count: int) -> None:
    with pytest.raises(DataError, match=rf"1 to 89 .* 90 training images.*validation={count}"):
        carve(numbered(90), count, seed=0)
