"""Where a run lies beside a planted front, and what it says to change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cure
from cure.errors import CheckpointError, ConfigError
from cure.experiments.recommend import recommend
from helpers import Command, refused

TINY = {
    "data.limit": 300,
    "data.validation": 50,
    "model": {"name": "small_cnn", "options": {"width": 4}},
    "start": "scratch",
    "method": {"name": "trades", "beta": 3.0},
    "attack.steps": 1,
    "training.epochs": 1,
    "training.validation_steps": 1,
    "training.threads": 1,
    "training.collapse_patience": 100,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of recipe digits whose result is 60 % natural and 20 % under PGD-2, of 100 images."""
    folder = tmp_path_factory.mktemp("recommend") / "run"
    cure.train("digits", TINY, run=folder)
    cure.evaluate(folder, attacks=["pgd2"], limit=100)
    (file,) = (folder / "evaluations").glob("*.json")
    result = json.loads(file.read_text())
    result["natural"] |= {"accuracy": 60.0, "correct": 60}
    result["attacks"]["pgd2"] |= {"accuracy": 20.0, "correct": 20}
    file.write_text(json.dumps(result))
    return folder


def planted(run: Path, points: list[tuple[str, Any, float, float]], **changes: Any) -> Path:
    """A front with intervals of 2 points on both sides; points: curve, value, natural, robust."""

    def estimate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "images": [mean - 2, mean + 2], "seeds": None}

    (file,) = (run / "evaluations").glob("*.json")
    result = json.loads(file.read_text())
    knobs = {"trades": "beta", "at": "natural_share", "cure": "gamma"}
    content = {
        "format": "cure-front-1",
        "recipe": "digits",
        "settings": {},
        "data": {"name": result["data"]["name"], "split": "test", "n": 100},
        "threat": {k: result["threat"][k] for k in ("norm", "epsilon", "epsilon_text")},
        "attack": "pgd2",
        "reference": [0.0, 0.0],
        "rows": [],
        "points": [
            {
                "curve": curve,
                "value": value,
                "seeds": [0, 1],
                "natural": estimate(natural),
                "robust": estimate(robust),
                "dominated": False,
            }
            for curve, value, natural, robust in points
        ],
        "curves": {
            curve: {
                "method": curve,
                "knob": knobs[curve],
                "more": None,
                "seeds": [0, 1],
                "hypervolume": None,
                "robust_range": None,
            }
            for curve in dict.fromkeys(point[0] for point in points)
        },
        "common_range": None,
        "comparisons": [],
        "missing": [],
        "environment": result["environment"],
    }
    path = run / "planted.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_the_neighbouring_values_of_its_own_setting(run: Path) -> None:
    # At 20 % robust the line from (66, 14) to (58, 22) has 60.
    file = planted(
        run,
        [("trades", 1.0, 66.0, 14.0), ("trades", 3.0, 58.0, 22.0), ("trades", 6.0, 57.0, 23.0)],
    )
    found = recommend(run, [file])
    assert (found.natural, found.robust) == (60.0, 20.0)
    assert found.ahead == pytest.approx(0.0)
    assert "0.0 points of natural accuracy above the known front" in found.place
    assert "100 images, 2 seeds" in found.place
    assert found.change == (
        "trades with beta 3.0 there has natural 58.0 %, pgd2 22.0 %; "
        "beta 1.0: +8.0 natural, -8.0 pgd2; "
        "beta 6.0: -1.0 natural, +1.0 pgd2 (within the intervals over images)"
    )


def test_neighbours_are_those_by_value_whatever_the_order_of_the_front(run: Path) -> None:
    points = [("trades", 6.0, 57.0, 23.0), ("trades", 1.0, 66.0, 14.0), ("trades", 3.0, 58.0, 22.0)]
    change = recommend(run, [planted(run, points)]).change
    assert change.startswith("trades with beta 3.0 there has")
    assert "beta 1.0: +8.0 natural" in change
    assert "beta 6.0: -1.0 natural" in change


def test_a_fraction_is_a_number(run: Path) -> None:
    points = [(value, natural, 20.0) for value, natural in (("2/10", 62.0), ("3/10", 61.0))]
    curves = {
        "trades-attack.epsilon": {
            **{"method": "trades", "knob": "attack.epsilon", "more": None},
            **{"seeds": [0, 1], "hypervolume": None, "robust_range": None},
        }
    }
    file = planted(run, [("trades", value, x, y) for value, x, y in points], curves=curves)
    front = json.loads(file.read_text())
    for point in front["points"]:
        point["curve"] = "trades-attack.epsilon"
    file.write_text(json.dumps(front))
    shutil.copytree(run, other := run.with_name("other"), dirs_exist_ok=True)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("  epsilon: null", "  epsilon: 29/100", 1))
    assert "epsilon: 29/100" in (other / "config.yaml").read_text()
    change = recommend(other, [file]).change
    assert change.startswith(
        "nearest measured to attack.epsilon 29/100: trades-attack.epsilon with "
    )
    assert "attack.epsilon 3/10 there has natural 61.0 %" in change


def test_a_point_that_is_ahead_in_both(run: Path) -> None:
    file = planted(run, [("trades", 3.0, 59.0, 21.0), ("at", 0.25, 65.0, 26.0)])
    found = recommend(run, [file])
    assert found.change == (
        "at with natural_share 0.25 has natural 65.0 %, pgd2 26.0 %: "
        "+5.0 natural and +6.0 pgd2 against this run"
    )
    # A difference within the interval of the point is no reason to change the method.
    file = planted(run, [("trades", 3.0, 59.0, 21.0), ("at", 0.25, 61.5, 21.5)])
    assert recommend(run, [file]).change.startswith("trades with beta 3.0")


def test_other_images_give_changes_but_no_place(run: Path) -> None:
    data = {"name": "other", "split": "test", "n": 100}
    points = [("trades", 1.0, 90.0, 50.0), ("trades", 6.0, 80.0, 60.0), ("at", 0.0, 95.0, 70.0)]
    found = recommend(run, [planted(run, points, data=data)])
    assert found.ahead is None
    assert "compare changes only" in found.place
    (file,) = (run / "evaluations").glob("*.json")
    # The same images at another size are other images.
    larger: dict[str, Any] = {
        "name": json.loads(file.read_text())["data"]["name"],
        "split": "test",
        "n": 100,
    }
    assert "robust than the whole" in recommend(run, [planted(run, points, data=larger)]).place
    larger["size"] = [1, 16, 16]
    assert "compare changes only" in recommend(run, [planted(run, points, data=larger)]).place
    assert found.change.startswith("nearest measured to beta 3.0: trades with beta 1.0")
    assert "beta 6.0: -10.0 natural, +10.0 pgd2" in found.change


def test_a_run_outside_of_the_front_and_of_a_method_that_is_not_on_it(run: Path) -> None:
    high = recommend(run, [planted(run, [("at", 0.0, 50.0, 1.0), ("at", 0.5, 55.0, 0.5)])])
    assert ": more robust than the whole known front" in high.place
    found = recommend(run, [planted(run, [("at", 0.0, 50.0, 99.0), ("at", 0.5, 55.0, 98.0)])])
    assert ": less robust than the whole known front" in found.place
    assert "from pgd2 98.0 to 99.0 %" in found.place
    assert found.change.startswith("the front has no run of trades")


def test_a_front_whose_curve_has_no_point_yet(run: Path) -> None:
    curve = {"knob": "beta", "more": None, "seeds": [], "hypervolume": None, "robust_range": None}
    curves = {"at": curve | {"method": "at"}, "trades": curve | {"method": "trades"}}
    found = recommend(run, [planted(run, [("at", 0.0, 50.0, 30.0)], curves=curves)])
    assert found.change.startswith("the front has no run of trades")


def test_the_command(run: Path, command: Command) -> None:
    file = planted(run, [("trades", 1.0, 66.0, 14.0), ("trades", 3.0, 58.0, 22.0)])
    ended = command("recommend", run, "--front", file)
    assert ended.status == 0, ended
    assert len(ended.out.strip().splitlines()) == 2


def test_nothing_is_said_without_evidence(run: Path, command: Command) -> None:
    points = [("trades", 1.0, 66.0, 14.0)]
    threat = {"norm": "L2", "epsilon": 0.1, "epsilon_text": "0.1"}
    others = {"name": "photographs", "split": "test", "n": 100}
    for changes in ({"recipe": "photos", "data": others}, {"threat": threat}):
        with pytest.raises(ConfigError, match="expected a front of recipe digits"):
            recommend(run, [planted(run, points, **changes)])
    with pytest.raises(CheckpointError, match="--attacks pgd50"):
        recommend(run, [planted(run, points, attack="pgd50")])
    refused(command("recommend", run), "expected a front of recipe digits")


def test_a_run_of_a_front_has_its_place_on_it(run: Path, tmp_path: Path) -> None:
    front = planted(run, [("trades", 1.0, 66.0, 14.0), ("trades", 6.0, 60.0, 22.0)])
    shutil.copytree(run, tmp_path / "row")
    path = tmp_path / "row" / "config.yaml"
    path.write_text(path.read_text().replace("name: digits", "name: trades-6.0", 1))
    assert recommend(tmp_path / "row", [front]).place == recommend(run, [front]).place
    # So has a run of any name on the images of the front.
    path.write_text(path.read_text().replace("name: trades-6.0", "name: mine", 1))
    assert recommend(tmp_path / "row", [front]).place == recommend(run, [front]).place
