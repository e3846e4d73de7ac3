"""What the README promises: its code runs, its commands exist, its figures are in results/."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cure.experiments.plan import entries, is_done, read_plan, results_of, write_tables
from cure.models import save_weights
from cure.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

CLASSIFIER = """
from torch import nn

def build(classes=2):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``photos/`` (red and blue squares with noise) and ``classifier.py``."""
    draws = np.random.default_rng(0)
    for number, name in enumerate(("blue", "red")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for index in range(800):
            pixels = draws.integers(0, 120, (8, 8, 3))
            pixels[:, :, 2 - 2 * number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "classifier", raising=False)
    return tmp_path


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language ("" for commands)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def test_the_python_runs_as_it_stands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    (place / "script.py").write_text(code)
    names = runpy.run_path(str(place / "script.py"))
    assert "pgd20" in capsys.readouterr().out
    assert names["robust"] is not names["build"]
    assert not names["robust"].training
    assert (place / "runs" / "finetune" / "checkpoints" / "best.safetensors").is_file()


def test_the_one_command_runs_and_its_run_can_be_evaluated(place: Path) -> None:
    from classifier import build  # type: ignore[import-not-found]

    (command,) = [line for block in blocks("") for line in block.splitlines() if "start=" in line]
    save_weights(build(), place / "weights.safetensors", {})
    words = shlex.split(command)
    assert words[0] == "cure"
    subprocess.run([sys.executable, "-m", "cure", *words[1:], "training.epochs=15"], check=True)
    evaluate = [sys.executable, "-m", "cure", "evaluate", "runs/mine", "--attacks", "pgd20"]
    done = subprocess.run(evaluate, check=True, capture_output=True, text=True)
    assert "natural" in done.stdout
    assert "pgd20" in done.stdout


def test_the_settings_that_the_text_names_are_settings() -> None:
    words = re.findall(r"`((?:threat|training|data|model)\.[a-z_.]+=[^` ]+)", README)
    words = [word for word in words if "model" not in word]
    assert len(words) >= 3
    load_recipe("digits", words)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_every_method_has_its_card() -> None:
    from cure.methods import METHODS

    for name in METHODS.names():
        card = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
        for part in ("**Idea.**", "Formula", "Command", "Cost of a step", "logged"):
            assert part in card, f"{name}: {part}"


def test_the_card_of_cure_names_every_setting_and_its_default() -> None:
    from pydantic import BaseModel

    from cure.methods.cure import CureConfig

    card = (ROOT / "docs" / "methods" / "cure.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| `?([^`|]+?)`? \|", card, flags=re.MULTILINE))

    def check(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            default = field.default
            if isinstance(default, BaseModel):
                check(type(default), f"{prefix}{name}.")
            elif prefix + name != "name":
                shown = rows[prefix + name]
                if isinstance(default, bool):
                    assert shown == str(default).lower()
                elif isinstance(default, float):
                    assert float(shown) == default
                elif default is not None:
                    assert shown == str(default)

    check(CureConfig, "")


RESULTS = ROOT / "results"


@pytest.mark.parametrize(
    ("document", "mark"),
    [
        ("README.md", "results/cifar10-mini/records.jsonl"),
        ("results/README.md", "cifar10-mini/table.md"),
        ("results/README.md", "ablation/table.md"),
        ("results/README.md", "ablation-digits/table.md"),
        ("results/README.md", "cifar10-mini-cure/table.md"),
        ("results/README.md", "precision/table.md"),
        ("results/README.md", "bench/cpu.json"),
        ("results/README.md", "evaluation"),
    ],
)
def test_the_figures_are_those_of_the_result_files(document: str, mark: str) -> None:
    figures = runpy.run_path(str(RESULTS / "figures.py"))
    text = (ROOT / document).read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {re.escape(mark)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert shown is not None
    if mark in ("bench/cpu.json", "evaluation"):
        expected = figures["bench" if "bench" in mark else "evaluations"]()
    elif mark.endswith(".jsonl"):
        expected = figures["comparison"](*figures["IN_README"])
    elif "mini-cure" in mark:
        expected = f"{figures['mini_table']()}\n\n{figures['mini_conditions']()}\n"
        assert (RESULTS / mark).read_text(encoding="utf-8") == expected
    else:
        expected = (RESULTS / mark).read_text(encoding="utf-8")
    assert shown[1] == expected


def test_the_studies_are_told_from_their_results() -> None:
    figures = runpy.run_path(str(RESULTS / "figures.py"))
    text = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    names = figures["studies"]()
    assert names
    for name in names:
        mark = f"<!-- results/studies/{name}.json -->\n"
        assert text.split(mark)[1].split("<!-- end -->")[0] == figures["study"](name)


PLANS = ("cifar10-mini", "ablation", "ablation-digits", "precision")
PLANS += ("studies/overfitting", "studies/gradients")


@pytest.mark.parametrize("name", PLANS)
def test_the_tables_of_plans_follow_from_the_results_of_their_runs(
    name: str, tmp_path: Path
) -> None:
    """The plan as it stands, the records of its runs and the table belong together."""
    plan = read_plan(RESULTS / name / "plan.yaml")
    shutil.copy(RESULTS / name / "records.jsonl", tmp_path)
    assert write_tables(plan, tmp_path) is not None
    for file in ("records.jsonl", "table.md"):
        assert (tmp_path / file).read_text() == (RESULTS / name / file).read_text()
    known = results_of(plan, tmp_path)
    for entry in entries(plan):
        is_done(plan, entry, tmp_path, known)  # Refuses results of other settings.
