"""Run folders as training and evaluating leave them, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cure.evaluation.metrics import nrr
from cure.recipe import dump, load_recipe
from cure.utils.stats import wilson

Content = dict[str, Any]

ENVIRONMENT = {
    "cure": "0.1.0",
    "commit": "abc1234",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0"},
    "processor": "a processor",
    "cores": 2,
    "threads": 1,
    "gpu": None,
    "command": "cure train digits --run planted",
    "time": "2026-01-01T10:00:00+00:00",
}


def cell(correct: int, count: int) -> Content:
    low, high = wilson(correct, count)
    accuracy = 100 * correct / count
    return {"accuracy": accuracy, "interval": [low, high], "correct": correct, "n": count}


def evaluation(
    target: str,
    natural: int = 150,
    attacks: Mapping[str, int] | None = None,
    *,
    count: int = 200,
    method: str = "cure",
    data: str = "digits",
    epsilon: tuple[float, str] = (0.1, "0.1"),
    curve: Sequence[tuple[float, int]] = (),
    checks: Sequence[Content] = (),
    checkpoint: str = "best",
    time: str = "2026-01-01T11:00:00+00:00",
) -> Content:
    """A result of ``cure evaluate``."""
    attacks = {"pgd20": 60, "cw": 50, "autoattack": 40} if attacks is None else attacks
    parts = {
        name: cell(correct, count) | {"seconds": 1.5, "settings": {"steps": 20}}
        for name, correct in attacks.items()
    }
    accuracy = {name: part["accuracy"] for name, part in parts.items()}
    result = {
        "format": "cure-evaluation-1",
        "target": target,
        "natural": cell(natural, count),
        "attacks": parts,
        "nrr": {
            name: nrr(100 * natural / count, accuracy[name]) if name in parts else None
            for name in ("cw", "autoattack")
        },
        "threat": {"norm": "Linf", "epsilon": epsilon[0], "epsilon_text": epsilon[1]},
        "data": {
            "name": data,
            "split": "test",
            "n": count,
            "classes": ["0", "1"],
            "size": [1, 8, 8],
        },
        "model": {
            "name": "small_cnn",
            "parameters": 1234,
            "checkpoint": checkpoint,
            "epoch": 3,
            "method": method,
            "recipe": "digits",
            "run_seed": 0,
        },
        "seed": 0,
        "environment": ENVIRONMENT | {"time": time, "command": f"cure evaluate {target}"},
    }
    if len(parts) > 1:
        result["worst_case"] = cell(min(attacks.values()), count) | {"over": list(parts)}
    if curve:
        points = [
            cell(right, count) | {"epsilon": size, "epsilon_text": str(size)}
            for size, right in curve
        ]
        result["curve"] = {"attack": "pgd20", "settings": {}, "points": points}
    if checks:
        result["diagnosis"] = {"verdict": "warn", "checks": list(checks), "left_out": {}}
    return result


def corruptions(target: str, method: str = "cure") -> Content:
    """A result of ``cure corruptions``."""
    fog = cell(100, 200) | {
        "group": "weather",
        "severities": {"1": cell(110, 200), "3": cell(90, 200)},
    }
    shot = cell(120, 200) | {
        "group": "noise",
        "severities": {"1": cell(130, 200), "3": cell(110, 200)},
    }
    return {
        "format": "cure-corruptions-1",
        "target": target,
        "natural": cell(150, 200),
        "means": {"benchmark": None, "all": None, "cure": None},
        "groups": {"weather": cell(100, 200), "noise": cell(120, 200)},
        "corruptions": {"fog": fog, "shot_noise": shot},
        "settings": {"severities": [1, 3]},
        **{key: evaluation(target, method=method)[key] for key in ("data", "model", "environment")},
    }


def diagnosis(target: str, status: str = "pass", method: str = "cure") -> Content:
    """A result of ``cure diagnose``."""
    checks = [
        {"name": "natural_accuracy", "status": "pass", "meaning": "As expected.", "measured": {}},
        {"name": "black_box", "status": status, "meaning": "Square finds more.", "measured": {}},
    ]
    return {
        "format": "cure-diagnosis-1",
        "target": target,
        "verdict": status,
        "checks": checks,
        "n": 200,
        **{key: evaluation(target, method=method)[key] for key in ("data", "model", "environment")},
    }


def write(path: Path, content: Content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def plant(
    folder: Path,
    *,
    method: str = "cure",
    results: Sequence[Content] = (),
    robust: Sequence[float] = (10.0, 30.0, 25.0),
    classes: Sequence[str] = ("0", "1"),
    settings: Sequence[str] = (),
    command: str = "cure train digits --run planted",
) -> Path:
    """A run of three epochs, with results filed in it."""
    folder.mkdir(parents=True)
    config = load_recipe("digits", [f"method={method}", *settings])
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    write(folder / "environment.json", ENVIRONMENT | {"command": command})
    write(folder / "data.json", {"classes": list(classes), "channels": 1, "size": [8, 8]})
    write(folder / "status.json", {"state": "finished"})
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch, value in enumerate(robust, start=1):
            record = {
                "epoch": epoch,
                "learning_rate": 0.1 / epoch,
                "train": {"loss": 2.0 / epoch, "robust_accuracy": epoch / 100},
                "validation": {"natural": 60.0 + epoch, "robust": value},
            }
            file.write(json.dumps(record) + "\n")
    timing = [{"epoch": e, "seconds": 60.0, "peak_memory_mib": 100.0} for e in (1, 2, 3)]
    (folder / "timing.jsonl").write_text("".join(json.dumps(t) + "\n" for t in timing))
    kinds = {"cure-evaluation-1": "evaluations", "cure-corruptions-1": "corruptions"}
    for number, result in enumerate(results, start=1):
        kind = kinds.get(result["format"], "diagnoses")
        write(folder / kind / f"best-test-{number}.json", result)
    return folder


def whole_run(place: Path) -> Path:
    """A run with everything but studies, and its natural start."""
    warning = {"name": "precision", "status": "warn", "meaning": "Logits are large."}
    folder = plant(
        place / "robust",
        results=[
            evaluation("robust", curve=[(0.05, 100), (0.2, 0)], checks=[warning]),
            corruptions("robust"),
            diagnosis("robust", "fail"),
        ],
    )
    plant(
        folder / "natural",
        method="natural",
        results=[
            evaluation("natural", 190, {"pgd20": 2, "cw": 1, "autoattack": 0}, method="natural")
        ],
    )
    return folder


HOSTILE = [
    "<script>window.hurt=1</script>",
    '"><img src=x onerror="window.hurt=1">',
    "</style><style>body{display:none}</style>",
    "</svg></title><svg onload=window.hurt=1>",
    r"$\frac$ $x_{$ \undefined",
    "javascript:window.hurt=1",
    "{{ 7 * 7 }} {% include 'page.css' %}",
    "\u202eturned\u202c \u0000\u0007",
    "name " * 80,
]


def hostile_run(folder: Path) -> Path:
    """A run whose every text means harm."""
    names = iter(HOSTILE * 4)
    result = evaluation(folder.name, attacks={"pgd20": 60, next(names): 50, next(names): 40})
    result["data"]["name"] = result["model"]["name"] = HOSTILE[1]
    result["threat"]["epsilon_text"] = HOSTILE[4]
    check = {"name": HOSTILE[0], "status": "fail", "meaning": " ".join(HOSTILE)}
    result["diagnosis"] = {"verdict": "fail", "checks": [check], "left_out": {}}
    harmed = corruptions(folder.name)
    for name in HOSTILE:
        harmed["corruptions"][name] = harmed["corruptions"]["fog"] | {"group": name}
        harmed["groups"][name] = harmed["groups"]["weather"]
    kept = plant(folder, classes=HOSTILE, command=" ".join(HOSTILE), results=[result, harmed])
    config = kept / "config.yaml"
    config.write_text(
        config.read_text().replace("name: digits", f"name: {json.dumps(HOSTILE[2])}", 1)
    )
    return kept


def hostile_runs(place: Path) -> list[Path]:
    """Runs whose every name means harm."""
    return [
        hostile_run(place / "<script>window.hurt=1<"),
        hostile_run(place / r"$\frac$ _x"),
        plant(place / ("long" * 60), robust=(), results=[evaluation("long" * 60)]),
        plant(place / "\u05d0\u05d1 \u202egnp.", robust=(), results=[evaluation("x")]),
    ]
