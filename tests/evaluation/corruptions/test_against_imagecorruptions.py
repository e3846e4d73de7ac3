"""Where the package imagecorruptions still imports: the same photographs, here and there."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from cure.evaluation.corruptions.operations import CORRUPTIONS

BENCHMARK = runpy.run_path(
    str(Path(__file__).resolve().parents[3] / "benchmarks" / "corruptions.py")
)
IMAGES = [
    np.asarray(Image.fromarray(photograph).resize((224, 224)))
    for photograph in load_sample_images().images
]


@pytest.fixture(scope="module")
def theirs() -> object:
    try:
        return BENCHMARK["reference"]()
    # An import of five packages, each of which may miss another one.
    except Exception as error:
        pytest.skip(f"imagecorruptions does not import: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n != "frost_procedural"])
def test_the_change_is_as_large(name: str, theirs: object) -> None:
    np.random.seed(0)
    for severity in (2, 5):
        found = BENCHMARK["measured"](IMAGES * 2, name, severity, theirs)
        if name in BENCHMARK["CERTAIN"]:
            # Half a level is what their unrounded and our mended cutting off may differ by.
            assert found["apart"] < 0.5, severity
        elif name not in BENCHMARK["DIFFERENT"]:
            ratio = found["deviation"] / found["deviation there"]
            # Of four pictures; the heights of fog and the few drops of spatter vary most.
            assert abs(ratio - 1) < (0.35 if name in ("fog", "spatter") else 0.15), severity
