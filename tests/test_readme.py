"""What README and docs promise: code runs, commands and names exist, figures are in results/."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from cure.cli.listing import listing
from cure.cli.main import app
from cure.errors import ModelError
from cure.evaluation.corruptions.operations import CORRUPTIONS
from cure.evaluation.diagnosis.table import CHECKS
from cure.experiments.plan import entries, read_plan
from cure.experiments.plan_work import is_done, results_of, write_tables
from cure.models import save_weights
from cure.recipe import load_recipe
from cure.runs.packed import read_packed
from cure.runs.results import FrontRecord
from cure.training import budget
from cure.utils.stats import student_t

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
"""What readers are told about the present; the changelog also names what is gone."""

CLASSIFIER = """
import torch
from torch import nn

def build(classes=2):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )
    with torch.no_grad():  # Trained, so to speak: blue and red are told apart, unsurely.
        for label, channel in enumerate((2, 0)):
            network[0].weight[channel] = torch.zeros(3, 3, 3)
            network[0].weight[channel, channel] = 1
            network[5].weight[label, channel] = 0.2
            network[5].weight[1 - label, channel] = -0.2
    return network
"""


PHOTOS = 30
"""Images a class: one step an epoch of the recipe photos, whose settings stay as they are."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``photos/`` (red and blue squares with noise) and ``classifier.py``."""
    draws = np.random.default_rng(0)
    for number, name in enumerate(("blue", "red")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for index in range(PHOTOS):
            pixels = draws.integers(0, 120, (8, 8, 3))
            pixels[:, :, 2 - 2 * number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *before.split(os.pathsep)]))
    monkeypatch.delitem(sys.modules, "classifier", raising=False)
    return tmp_path


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language ("" for commands)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def test_the_python_runs_as_it_stands(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The 36 epochs of the recipe are 36 steps here; 1,500 would take minutes.
    monkeypatch.setattr(budget, "reach_steps", lambda config, steps: (config, []))
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    (place / "script.py").write_text(code)
    names = runpy.run_path(str(place / "script.py"))
    assert "pgd20" in capsys.readouterr().out
    assert names["robust"] is not names["build"]
    assert not names["robust"].training
    assert (place / "runs" / "photos" / "checkpoints" / "best.safetensors").is_file()


def test_the_one_command_runs_and_its_run_can_be_evaluated(place: Path) -> None:
    from classifier import build  # type: ignore[import-not-found]

    joined = [block.replace("\\\n", " ") for block in blocks("")]
    (command,) = [line for block in joined for line in block.splitlines() if "start=" in line]
    save_weights(build(), place / "weights.safetensors", {})
    words = shlex.split(command)
    assert words[0] == "cure"
    few = "training.min_steps=30"
    subprocess.run([sys.executable, "-m", "cure", *words[1:], few], check=True)
    evaluate = [sys.executable, "-m", "cure", "evaluate", "runs/mine", "--attacks", "pgd20"]
    done = subprocess.run(evaluate, check=True, capture_output=True, text=True)
    assert "natural" in done.stdout
    assert "pgd20" in done.stdout


def imported(name: str) -> Any:
    """A module; None where it says which package it needs."""
    try:
        return importlib.import_module(name)
    except ModelError as error:
        if "pip install 'cure-at[" in str(error):
            return None
        raise


def pages(pattern: str) -> list[Any]:
    """A parameter for each match in all pages: name of the page, then the groups."""
    return [
        pytest.param(path.name, found, id=f"{path.name}: {found}"[:80])
        for path in PAGES
        for found in dict.fromkeys(re.findall(pattern, path.read_text("utf-8"), re.MULTILINE))
    ]


KEYS = {name.split(" = ")[0] for name, _ in listing("settings")}
SECTIONS = "data|model|natural|threat|attack|layers|training|evaluation"


def test_the_settings_that_pages_name_are_settings() -> None:
    words = [word for path in PAGES for word in re.findall(
        rf"(?<![\w.`/]`)\b((?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*)(?==|`)", path.read_text("utf-8")
    )]  # fmt: skip
    assert len(words) > 30
    known = KEYS | {key.rsplit(".", 1)[0] for key in KEYS}
    known |= {"natural.accuracy"}  # A key of result files.
    assert [
        word for word in words if word not in known and not word.endswith((".py", ".json"))
    ] == []
    settings = re.findall(r"`((?:threat|training|data)\.[a-z_.]+=[^` ]+)`", README)
    load_recipe("digits", settings)


def command_lines() -> list[tuple[str, str]]:
    """Every command line of a page: those in blocks, continued ones joined, and in text."""
    found = []
    for path in PAGES:
        text = path.read_text("utf-8").replace("\\\n", " ")
        lines = re.findall(r"^(?:torchrun .* -m )?(cure [a-z].*)$", text, re.MULTILINE)
        lines += re.findall(r"`(?:torchrun [^`]* -m )?(cure [a-z][^`]*)`", text)
        found += [(path.name, line.split("  #")[0].replace("\n", " ")) for line in lines]
    return found


def test_the_commands_and_options_of_pages_exist() -> None:
    group: Any = typer.main.get_command(app)
    lines = command_lines()
    assert len(lines) > 50
    for page, line in lines:
        words = line.split()[1:]
        command: Any = group
        with typer.Context(group) as context:
            while hasattr(command, "resolve_command") and words:
                if words[0].isupper() or words[0] == "...":
                    break
                # Raises where there is no such command.
                _, command, words = command.resolve_command(context, words)
        known = {option for parameter in command.params for option in parameter.opts}
        if not hasattr(command, "resolve_command"):
            options = [
                w.split("=")[0].strip(",.;)]") for w in words if w.strip("[(").startswith("--")
            ]
            assert {o.strip("[(") for o in options} <= known | {"--help"}, f"{page}: {line}"


@pytest.mark.parametrize(
    ("page", "name"), pages(r"(?<![\w./-])(cure(?:\.[A-Za-z_]\w*)+)(?<!\.md)(?!\.py|[\w:-])")
)
def test_the_python_names_of_pages_exist(page: str, name: str) -> None:
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(found, part) and imported(".".join(parts[:number])) is None:
            pytest.skip("needs a package that is not installed")
        found = getattr(found, part)


def test_the_numbers_of_checks_corruptions_and_studies_are_those_of_the_program() -> None:
    corruptions = len(CORRUPTIONS) - 1  # Of two forms of frost one is used.
    for path in PAGES:
        text = path.read_text("utf-8")
        assert set(re.findall(r"\[(\d+) checks\]", text)) <= {str(len(CHECKS))}, path.name
        corrupted = set(re.findall(r"\[(\d+) natural corruptions\]", text))
        assert corrupted <= {str(corruptions)}, path.name
    assert f"[{len(CHECKS)} checks]" in README
    assert f"[{corruptions} natural corruptions]" in README
    assert len(listing("studies")) == 8
    assert "[eight studies]" in README


FILES = r"`((?:src|tests|benchmarks|examples|docs|results)/[\w./-]*\w)"


def test_the_files_that_pages_name_exist() -> None:
    for path in PAGES:
        for name in re.findall(FILES, path.read_text("utf-8")):
            absent_yet = name.startswith(("results/gpu", "results/photos"))
            assert absent_yet or (ROOT / name).exists(), f"{path.name}: {name}"


def test_the_code_of_pages_is_python_and_its_imports_exist() -> None:
    count = 0
    for path in PAGES:
        fenced = re.findall(r"^ *```python\n(.*?)^ *```$", path.read_text("utf-8"), re.S | re.M)
        for code in fenced:
            if "--8<--" in code:
                continue  # A file of examples/, which has a test of its own.
            if code.lstrip() != code:
                code = re.sub(r"^   ", "", code, flags=re.MULTILINE)
            tree = ast.parse(code)
            count += 1
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cure"):
                    module = imported(str(node.module))
                    for alias in node.names if module is not None else []:
                        assert hasattr(module, alias.name), f"{path.name}: {alias.name}"
    assert count >= 5


def test_the_examples_are_included_by_reference() -> None:
    text = (ROOT / "docs" / "examples.md").read_text("utf-8")
    included = set(re.findall(r'--8<-- "(examples/\w+\.py)"', text))
    assert included == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert str(path.relative_to(ROOT / "docs")) in navigation


def test_the_picture_shows_the_results() -> None:
    """Each point of the SVG file says whose it is; the points are those of the records."""
    figures = runpy.run_path(str(ROOT / "docs" / "figures" / "front.py"))
    drawn = (ROOT / "docs" / "figures" / "front.svg").read_text("utf-8")
    expected = figures["mini"]()
    assert len(expected) >= 10
    for name, point in expected.items():
        assert f'id="{figures["place"](name, point)}"' in drawn, name
        assert f">{name}<" in drawn
    compared = (ROOT / "docs" / "methods-compared.md").read_text("utf-8")
    table = dict(re.findall(r"^\| ([a-z0-9-]+) \| \d \| [\d.]+.*?\| ([\d.]+) ", compared, re.M))
    assert {name: f"{robust:.1f}" for name, (_, robust) in expected.items()} == table


def test_the_front_holds_what_no_other_method_beats() -> None:
    figures = runpy.run_path(str(ROOT / "docs" / "figures" / "front.py"))
    points = {"a": (50.0, 30.0), "b": (60.0, 20.0), "c": (49.0, 29.0), "d": (70.0, 0.0)}
    assert figures["front"](points) == ["a", "b", "d"]
    assert figures["best"](points) == "a"  # 37.5, 30.0, 36.5 and 0.


def test_the_picture_of_the_batch_names_folders_of_the_package() -> None:
    figures = runpy.run_path(str(ROOT / "docs" / "figures" / "batch.py"))
    drawn = (ROOT / "docs" / "figures" / "batch.svg").read_text("utf-8")
    for _, _, _, title, text in figures["BOXES"].values():
        for part in re.findall(r"[a-z]+", title):
            places = [ROOT / "src" / "cure" / folder / part for folder in ("", "data")]
            assert any(p.is_dir() or p.with_suffix(".py").is_file() for p in places), part
        for line in (title, *text.split("\n")):
            assert line.replace(">", "&gt;") in drawn, line


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for document in [*PAGES, ROOT / "CHANGELOG.md"]:
        assert not re.search(r"^(<{7}|>{7}) ", document.read_text(encoding="utf-8"), re.MULTILINE)
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in link and link != "example-report.html":  # `make docs` makes that one.
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
    found = re.findall(r"^\| `([a-z_.]+)` \| `?([^`|]+?)`? \|", card, flags=re.MULTILINE)
    rows = dict(found)
    assert len(rows) == len(found), "a setting stands there twice"

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
MADE_BY = {
    "robust_overfitting": "overfitted",
    "extra_data": "extra_images",
    "why_cure": "parts_of_cure",
}
"""The function of ``results/figures.py`` that makes the tables of a folder."""


@pytest.mark.parametrize(
    ("document", "mark"),
    [
        ("docs/methods-compared.md", "results/cifar10-mini/records.jsonl"),
        ("README.md", "results/photos/fronts.json"),
        ("results/README.md", "photos/fronts.json"),
        ("README.md", "results/photos/table.json"),
        ("results/README.md", "photos/table.json"),
        ("results/README.md", "photos/few.json"),
        ("results/README.md", "cifar10-mini/table.md"),
        ("results/README.md", "ablation/table.md"),
        ("results/README.md", "ablation-digits/table.md"),
        ("results/README.md", "cifar10-mini-cure/table.md"),
        ("results/README.md", "precision/table.md"),
        ("results/README.md", "speedrun/log.jsonl"),
        ("results/README.md", "bench/cpu.json"),
        ("results/README.md", "bench/screened.json"),
        ("results/README.md", "extra_data/digits.json"),
        ("results/README.md", "why_cure/digits.json"),
        ("results/README.md", "why_cure/cifar10-mini.json"),
        ("results/README.md", "robust_overfitting/digits.json"),
        ("results/README.md", "robust_overfitting/photos.json"),
        ("results/README.md", "evaluation"),
    ],
)
def test_the_figures_are_those_of_the_result_files(document: str, mark: str) -> None:
    figures = runpy.run_path(str(RESULTS / "figures.py"))
    text = (ROOT / document).read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {re.escape(mark)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert shown is not None
    if mark == "bench/screened.json":
        expected = figures["screened"]()
    elif (folder := mark.split("/")[0]) in MADE_BY:
        expected = figures[MADE_BY[folder]](Path(mark).stem)
    elif mark in ("bench/cpu.json", "evaluation"):
        expected = figures["bench" if "bench" in mark else "evaluations"]()
    elif mark.endswith("photos/table.json"):
        expected = figures["photos"]()
    elif mark.endswith("photos/few.json"):
        expected = figures["few"]()
    elif mark.endswith("fronts.json"):
        expected = figures["headline" if document == "README.md" else "fronts"]()
    elif mark == "speedrun/log.jsonl":
        expected = figures["speed_log"]()
    elif mark.endswith(".jsonl"):
        expected = figures["comparison"](*figures["IN_README"])
    elif "mini-cure" in mark:
        expected = f"{figures['mini_table']()}\n\n{figures['mini_conditions']()}\n"
        assert (RESULTS / mark).read_text(encoding="utf-8") == expected
    else:
        expected = (RESULTS / mark).read_text(encoding="utf-8")
    assert shown[1] == expected


def test_what_goes_against_cure_is_told_from_the_comparison() -> None:
    lines = (RESULTS / "cifar10-mini" / "table.md").read_text(encoding="utf-8").splitlines()
    cells = {row[1].strip(): row[2:] for line in lines if len(row := line.split("|")) > 6}
    del cells["model"], cells["---"]
    few = [name for name, row in cells.items() if row[0].strip() == "1"]
    (fat, ours) = ([cell.split()[0] for cell in cells[name][1:4]] for name in ("fat", "cure"))
    more = float(fat[1]) - float(ours[1])
    document = " ".join((ROOT / "docs" / "methods-compared.md").read_text(encoding="utf-8").split())
    assert (len(few), len(cells)) == (6, 14)
    assert "six of the fourteen rows have one seed" in document
    assert f"FAT has hardly less and {more:.1f} points more robust accuracy" in document
    text = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"has {fat[0]} where CURE has {ours[0]}, with {fat[1]} in the place of {ours[1]} under "
        f"PGD-20 and {fat[2]} in the place of {ours[2]} under C&W"
    ) in text


def test_the_choice_of_the_photo_recipe_is_told_from_its_results() -> None:
    content = json.loads((RESULTS / "photos" / "choices.json").read_text(encoding="utf-8"))
    earlier = [row for row in content["earlier_table"]["rows"] if row["method"] == "cure"]
    rows = [*content["choices"], *content["before_cutmix"]["rows"], *earlier]
    rows += [*content["longer"]["rows"], *content["noted"]["rows"]]
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"{row['natural']:.1f}/{row['pgd20']:.1f}" in text
    noted = content["noted"]
    minutes = [f"{row['minutes']:.1f}" for row in noted["rows"] if row["method"] == "cure"]
    assert f"{', '.join(minutes[:2])} and {minutes[2]} minutes" in text
    left = [noted["autoattack"][f"after_{part}"] for part in ("apgd_ce", "apgd_t")]
    assert f"{left[0]:.1f} % stand after APGD-CE and {left[1]:.1f} % after the" in text
    table = json.loads((RESULTS / "photos" / "table.json").read_text(encoding="utf-8"))
    (seed_1,) = (r for r in table["rows"] if (r["method"], r["seed"]) == ("cure", 1))
    ours, flat = content["autoattack_seed_1"], " ".join(text.split())
    assert (
        f"{ours['after_apgd_ce']:.1f} % after APGD-CE and {ours['after_apgd_t']:.1f} % after the "
        "targeted APGD; FAB-T and Square found nothing more"
    ) in flat
    assert ours["after_fab_t"] == ours["after_apgd_t"] == seed_1["autoattack"]
    guide = (ROOT / "docs" / "guides" / "photos.md").read_text(encoding="utf-8")
    without, with_it = content["choices"]
    assert f"natural {with_it['natural']:.1f} and PGD-20 {with_it['pgd20']:.1f} with it" in guide
    assert f"{without['natural']:.1f} and {without['pgd20']:.1f} without" in guide


def test_the_photo_figures_of_the_readme_are_those_of_result_files() -> None:
    rows = json.loads((RESULTS / "photos" / "table.json").read_text(encoding="utf-8"))["rows"]
    text, network = " ".join(README.split()), "efficientnet-lite0"
    ours, at = (
        [row for row in rows if row["method"] == method and row["network"] == network]
        for method in ("cure", "at")
    )
    first, second, third = (f"{row['natural']}/{row['pgd20']}" for row in ours)
    assert f"ended at natural/PGD-20 {first}, {second} and {third}." in text
    (trades,) = (row for row in rows if row["method"] == "trades")
    less = ours[0]["natural"] - trades["natural"]
    assert f"has {trades['natural']}/{trades['pgd20']} from the start of seed 0" in text
    assert ours[0]["pgd20"] == trades["pgd20"]
    assert f"accuracy {less:.1f} points lower" in text
    second = {row["method"]: row for row in rows if row["network"] == "resnet18"}
    figures = {name: f"{row['natural']}/{row['pgd20']}" for name, row in second.items()}
    assert f"AT is ahead: {figures['at']}, CURE {figures['cure']}." in text
    theirs = [f"{row['natural']}/{row['pgd20']}" for row in at]
    assert f"AT has {theirs[0]}, {theirs[1]} and {theirs[2]}." in text
    long = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    for name, words in (
        (
            "natural",
            "{:.1f} points more natural accuracy (Student interval over the three seeds, paired: "
            "{:.1f} to {:.1f})",
        ),
        ("pgd20", "its robust accuracy differs by {:.1f} points ({:.1f} to {:.1f})"),
    ):
        gained = [mine[name] - other[name] for mine, other in zip(ours, at, strict=True)]
        figures = (statistics.fmean(gained), *student_t(gained))
        assert words.format(*figures) in text
        assert "{:.1f} ({:.1f} to {:.1f})".format(*figures) in long
    choices = json.loads((RESULTS / "photos" / "choices.json").read_text(encoding="utf-8"))
    assert f"at most {choices['noted']['autoattack']['after_apgd_t']} %" in text
    low, high = ours[1]["autoattack_interval"]
    assert f"AutoAttack leaves {ours[1]['autoattack']} % ({low:.1f} to {high:.1f})" in text


def test_the_line_of_at_is_told_from_its_results() -> None:
    rows = json.loads((RESULTS / "photos" / "at_line.json").read_text(encoding="utf-8"))["rows"]
    text = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    short = []
    for row in rows:
        parts = [row["test"][name] for name in ("natural", "pgd20")]
        told = [
            f"{part['accuracy']:.1f} ({part['interval'][0]:.1f} to {part['interval'][1]:.1f})"
            for part in parts
        ]
        assert " / ".join(told) in text
        short.append("/".join(f"{part['accuracy']:.1f}" for part in parts))
    assert [(row["seed"], row["natural_at_least"]) for row in rows] == [
        *((0, 81), (1, 81), (1, 80), (2, 81), (2, 82))
    ]
    flat = " ".join(README.split())
    assert f"validation photos, has {short[0]}, {short[1]} and {short[4]}: CURE" in flat


def test_the_robust_start_is_told_from_its_results() -> None:
    rows = json.loads((RESULTS / "photos" / "robust_start.json").read_text(encoding="utf-8"))
    text = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    both = [
        [row for row in rows["rows"] if row["start"] == start] for start in ("robust", "natural")
    ]
    for runs in both:
        first, second, third = (f"{row['natural']}/{row['pgd20']}" for row in runs)
        assert f"{first}, {second} and {third}" in text
    for name in ("natural", "pgd20"):
        gained = [robust[name] - natural[name] for robust, natural in zip(*both, strict=True)]
        figures = (statistics.fmean(gained), *student_t(gained))
        assert "{:.1f} ({:.1f} to {:.1f})".format(*figures) in text


def test_copies_that_are_found_are_told_from_their_results() -> None:
    found = json.loads((RESULTS / "bench" / "leaks.json").read_text(encoding="utf-8"))["changes"]

    def counts(side: str, *changes: str) -> tuple[int, ...]:
        return tuple(found[change][side]["found"] for change in changes)

    named = ("rotated by 15 degrees", "cropped to 70 % of the side", "channels exchanged")
    text = " ".join((ROOT / "docs" / "data.md").read_text(encoding="utf-8").split())
    of_features, of_pixels = counts("features", *named), counts("pixels", *named)
    assert (
        "found {} that were rotated by 15 degrees, {} cropped to 70 % of the side and {} with "
        "exchanged channels, where pixels found {}, {} and {};".format(*of_features, *of_pixels)
    ) in text
    for change in ("blurred over 5 pixels", "noise of 25 levels"):
        assert f"({counts('pixels', change)[0]} against {counts('features', change)[0]})" in text


def test_few_photographs_are_told_from_their_results() -> None:
    content = json.loads((RESULTS / "photos" / "few.json").read_text(encoding="utf-8"))
    rows = {row["row"]: row for row in content["rows"]}
    guide = (ROOT / "docs" / "guides" / "photos.md").read_text(encoding="utf-8")
    one, other = rows["short"], rows["long"]
    assert f"{one['n']}\nothers" in guide
    assert (
        f"after {one['steps']} steps natural {one['natural']:.1f} and PGD-20 {one['pgd20']:.1f}"
        in guide
    )
    assert f"after {other['steps']} steps {other['natural']:.1f} and {other['pgd20']:.1f}" in guide
    whole = rows["recipe"]
    assert f"{whole['steps']:,} steps {whole['natural']:.1f} and {whole['pgd20']:.1f}" in guide


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


def test_the_repeated_runs_of_the_fronts_have_the_accuracies_of_before() -> None:
    """As results/README.md says of runs on one kind of processor."""
    photos = ROOT / "results" / "photos"
    again = FrontRecord.read(photos / "fronts_again.json")
    before = {(r.method, r.value): (r.natural, r.content()[again.attack]) for r in again.rows}
    same, differences = [], []
    for name, record in read_packed(photos / "fronts" / "records.jsonl").items():
        if record.seed != 0:
            continue
        method, _, value = name.removesuffix("-seed0").partition("-")
        result, known = record.evaluations[-1], before[method, float(value) if value else None]
        found = (result.natural.accuracy, result.attacks[again.attack].accuracy)
        if result.environment.processor == again.environment.processor:
            same.append(found == known)
        else:
            differences.append(max(abs(a - b) for a, b in zip(found, known, strict=True)))
    assert len(same) == 7
    assert all(same)
    assert len(differences) == 6
    said = f"the six others differ by up to {max(differences):.1f} points"
    assert said in (ROOT / "results" / "README.md").read_text(encoding="utf-8")
