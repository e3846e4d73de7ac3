"""The command line: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from typer.main import get_command

from cure.attacks.registry import known_attacks
from cure.cli import listing
from cure.cli.main import app
from cure.config import DataConfig
from cure.data import ImageSet, load
from cure.evaluation.options import TargetKeywords, TargetOptions
from cure.methods import METHODS
from cure.models import MODELS
from cure.recipe import recipe_names
from helpers import Command, refused

SHRUNK = [
    "training.epochs=2",
    "natural.epochs=2",
    "natural.learning_rate=0.1",
    # Two epochs are too few steps for the recipe's own horizon.
    "method.revision.horizon=0.5",
    "training.validation_steps=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on the digits, trained by the command itself in a process of its own."""
    folder = tmp_path_factory.mktemp("work")
    words = [sys.executable, "-m", "cure", "train", "digits", *SHRUNK, "--run", "digits"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run folder: digits\n"
    assert done.stderr.count("cure evaluate digits") == 1
    assert "digits-natural epoch 2/2" in done.stderr
    assert "digits epoch 2/2" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["digits"]
    return folder / "digits"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# Help and lists.


def test_help_names_every_command(command: Command) -> None:
    ended = command("--help")
    assert ended.status == 0
    for name in ("train", "resume", "evaluate", "compare", "list", "demo"):
        assert name in ended.out
        shown = command(name, "--help")
        assert shown.status == 0
        assert "Usage" in shown.out


@pytest.mark.parametrize("words", [["--help"], ["evaluate", "--help"], ["analyse", "--help"]])
def test_help_does_not_wait_for_pytorch(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from cure.cli.main import main\n"
        f"sys.argv = ['cure', *{words}]\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_shell_completion_offers_every_command() -> None:
    code = "import sys; sys.argv = ['cure']; from cure.cli.main import main; main()"
    asked = {"_CURE_COMPLETE": "complete_bash", "COMP_WORDS": "cure ", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    names = set(done.stdout.split())
    assert {"train", "resume", "evaluate", "corruptions", "diagnose", "compare"} <= names
    assert names == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_commands_offer_every_option_of_a_target() -> None:
    """The keyword arguments of functions are the fields of TargetOptions, and so are options."""
    names = {"ImageSet": ImageSet}
    keywords = get_type_hints(TargetKeywords, localns=names)
    assert keywords == get_type_hints(TargetOptions, localns=names)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in ("evaluate", "corruptions", "diagnose"):
        options = {option.name for option in commands[name].params}
        expected = {key.removesuffix("s") if "options" in key else key for key in keywords}
        assert {"target", "model", *expected} <= options, name
    assert {option.name: option.default for option in commands["diagnose"].params}["limit"] == 200


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", METHODS.names()),
        ("models", [*MODELS.names(), "hf:NAME_OR_FOLDER", "timm:NAME", "package.module:callable"]),
        ("recipes", recipe_names()),
        ("attacks", [*known_attacks(), "pgdK"]),
        ("data", ["digits", "cifar10", "cifar100", "svhn"]),
    ],
)
def test_lists_give_a_line_with_a_description(
    command: Command, monkeypatch: pytest.MonkeyPatch, kind: str, names: list[str]
) -> None:
    monkeypatch.delenv("CURE_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "400")
    ended = command("list", kind)
    assert ended.status == 0
    shown = dict(line.split(maxsplit=1) for line in ended.out.splitlines() if line.strip())
    assert len(names) >= 2
    for name in names:
        assert len(shown[name].strip()) > 10, name


@pytest.mark.parametrize(
    "words", [("list",), ("tain",), ("train",), ("evaluate", "--limit", "few")]
)
def test_a_command_that_does_not_parse_ends_with_two(
    command: Command, words: tuple[str, ...]
) -> None:
    ended = command(*words)
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert "Usage" in ended.err


def test_a_list_that_is_none_is_answered_by_the_nearest(command: Command) -> None:
    refused(command("list", "attack"), "did you mean 'attacks'?")


def test_the_index_of_lists_equals_the_registries() -> None:
    stored = json.loads(listing.INDEX.read_text(encoding="utf-8"))
    assert stored == listing.make_index(), "`make index` writes it again"


@pytest.mark.parametrize("kind", ["settings", "attacks", "methods", "models", "studies"])
def test_lists_do_not_wait_for_pytorch(kind: str) -> None:
    code = (
        "import sys\n"
        "from cure.cli.main import main\n"
        f"sys.argv = ['cure', 'list', '{kind}']\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5


def test_what_was_added_to_a_folder_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that does not know a module is not used."""
    index = listing.make_index() | {"attacks": [["of the registry", "yes"]]}
    monkeypatch.setattr(listing, "make_index", lambda: index)
    assert listing.listing("attacks")[0][0] == "natural"
    monkeypatch.setattr(listing, "_modules", lambda: [*index["modules"], ["attacks", "mine"]])
    assert listing.listing("attacks") == [("of the registry", "yes")]


def test_memory_that_python_could_not_have_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Python's own error says nothing, unlike those of NumPy and PyTorch."""

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(listing, "_modules", refuse)
    ended = command("list", "attacks")
    assert ended.err.startswith("error: there is not enough memory (MemoryError); work on fewer")


# Training.


def test_a_run_folder_holds_what_its_documentation_says(trained: Path) -> None:
    for folder in (trained, trained / "natural"):
        files = set(contents(folder))
        assert {
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "timing.jsonl",
            "status.json",
            "checkpoints/best.safetensors",
            "checkpoints/last.safetensors",
            "checkpoints/state.safetensors",
        } <= files
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert not list(trained.rglob("*.tmp"))


def test_an_existing_folder_is_refused_and_unchanged(
    command: Command, trained: Path, tmp_path: Path
) -> None:
    before = contents(trained)
    refused(command("train", "digits", *SHRUNK, "--run", trained), "never overwrites", "resume")
    assert contents(trained) == before
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    refused(command("train", "digits", *SHRUNK, "--run", kept), "exists")
    refused(command("train", "digits", *SHRUNK, "--run", kept / "notes.txt"), "exists")
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]


def test_resuming_a_finished_run_changes_nothing(command: Command, trained: Path) -> None:
    before = contents(trained)
    ended = command("resume", trained)
    assert ended.status == 0
    assert contents(trained) == before
    assert f"run folder: {trained}" in ended.out


def test_resuming_a_finished_run_says_so(command: Command, trained: Path) -> None:
    ended = command("resume", trained)
    assert "finished" in ended.out + ended.err


def test_default_folders_are_numbered(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["method=natural", "start=scratch", "training.epochs=1"]
    words += ["training.validation_steps=1", "training.optimizer.learning_rate=0.05"]
    for folder in ("runs/digits", "runs/digits-2", "runs/digits-3"):
        ended = command("train", "digits", *words, "--quiet")
        assert ended.status == 0, ended.err
        assert ended.out == f"run folder: {folder}\nnext: cure evaluate {folder}\n"
        assert ended.err == ""
    ended = command("train", "digits", *words, "name=other.name", "--quiet")
    assert "runs/other.name" in ended.out
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "digits",
        "digits-2",
        "digits-3",
        "other.name",
    ]
    first, second = (tmp_path / "runs" / name for name in ("digits", "digits-2"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    weights = [load_file(run / "checkpoints" / "last.safetensors") for run in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# Evaluation.


def accuracy(run: Path, checkpoint: str = "best") -> float:
    """Natural test accuracy of a run's weights, computed without evaluation's own code."""
    images = load(DataConfig(source="digits"), "test")
    weights = load_file(run / "checkpoints" / f"{checkpoint}.safetensors")
    model = MODELS["small_cnn"](10, 1, (8, 8))
    model.load_state_dict(weights)
    with torch.no_grad():
        right = model.eval()(images.image / 255).argmax(dim=1) == images.label
    return 100 * float(right.double().mean())


def test_the_test_images_are_a_fifth_of_the_digits_and_none_that_trained() -> None:
    config = DataConfig(source="digits", validation=200)
    test, train = load(config, "test"), load(config, "train")
    assert (len(test), len(train)) == (359, 1438)
    pixels = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    joined = torch.cat([test.image, train.image])[:, 0].numpy()
    assert sorted(map(bytes, joined)) == sorted(map(bytes, pixels))


def test_evaluate_a_run(
    command: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    before = contents(trained)
    output = tmp_path / "result.json"
    words = ["--attacks", "natural, pgd5,cw", "--output", output]
    ended = command("evaluate", "digits", *words)
    assert ended.status == 0, ended.err
    # An evaluation may add to the run; what is there stays.
    assert before.items() <= contents(trained).items()
    result = json.loads(output.read_text())
    assert result["target"] == "digits"
    assert list(result["attacks"]) == ["pgd5", "cw"]
    assert result["natural"]["accuracy"] == pytest.approx(accuracy(trained))
    assert result["natural"]["n"] == result["data"]["n"] == 359
    assert result["threat"] == {"norm": "Linf", "epsilon": 0.15, "epsilon_text": "0.15"}
    assert result["model"]["method"] == "cure"
    assert result["model"]["name"] == "small_cnn"
    assert result["environment"]["command"].startswith("cure evaluate digits --attacks")
    shown = [result["natural"], *result["attacks"].values()]
    row = next(line for line in ended.out.splitlines() if " digits " in line and "%" not in line)
    for cell in shown:
        low, high = cell["interval"]
        assert f"{cell['accuracy']:.1f} ({low:.1f}-{high:.1f})" in ended.out
    assert row
    assert f"{result['nrr']['cw']:.1f}" in ended.out
    assert "359 images, Linf 0.15" in ended.out
    assert "cw: done (" in ended.err
    again = command("evaluate", "digits", *words)
    refused(again, "exists and is kept")
    assert json.loads(output.read_text()) == result


def test_a_result_file_names_no_place_on_this_machine(
    command: Command, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    ended = command("evaluate", trained, "--attacks", "natural", "--output", output)
    assert ended.status == 0, ended.err
    text = output.read_text()
    assert str(tmp_path) not in text
    assert str(trained.parent) not in text


def test_evaluate_the_natural_start(command: Command, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    ended = command("evaluate", trained / "natural", "--attacks", "natural", "--output", output)
    assert ended.status == 0, ended.err
    result = json.loads(output.read_text())
    assert result["target"] == "natural"
    assert result["model"]["method"] == "natural"
    assert result["natural"]["accuracy"] == pytest.approx(accuracy(trained / "natural"))


def test_evaluate_a_named_network_with_the_weights_of_a_run(
    command: Command, trained: Path, tmp_path: Path
) -> None:
    named, own = tmp_path / "named.json", tmp_path / "own.json"
    ended = command(
        *("evaluate", "--model", "small_cnn", "--data", "digits"),
        *("--weights", trained / "checkpoints" / "best.safetensors"),
        *("--attacks", "pgd3", "--epsilon", "0.15", "--output", named),
    )
    assert ended.status == 0, ended.err
    weights = trained / "checkpoints" / "best.safetensors"
    beside = command(
        *("evaluate", weights, "--model", "small_cnn", "--data", "digits"),
        *("--attacks", "pgd3", "--epsilon", "0.15", "--output", tmp_path / "beside.json"),
    )
    assert beside.status == 0, beside.err
    assert beside.out == ended.out
    ended = command("evaluate", trained, "--attacks", "pgd3", "--output", own)
    first, second = json.loads(named.read_text()), json.loads(own.read_text())
    assert first["target"] == "small_cnn"
    assert first["model"]["weights"] == "best.safetensors"
    for result in (first, second):
        for part in (result["natural"], result["attacks"]["pgd3"], result["worst_case"]):
            part.pop("seconds", None)
    for key in ("natural", "attacks", "worst_case", "nrr", "threat"):
        assert first[key] == second[key]


def test_choices_reach_the_result(command: Command, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    ended = command(
        *("evaluate", trained, "--checkpoint", "last", "--split", "validation", "--limit", 50),
        *("--attacks", "pgd2", "--epsilon", "8/255", "--norm", "l2", "--batch-size", 20),
        *("--seed", 3, "--device", "cpu", "--output", output),
    )
    assert ended.status == 0, ended.err
    result = json.loads(output.read_text())
    assert result["model"]["checkpoint"] == "last"
    assert result["model"]["epoch"] == 2
    assert (result["data"]["split"], result["data"]["n"]) == ("validation", 50)
    assert result["threat"] == {"norm": "L2", "epsilon": 8 / 255, "epsilon_text": "8/255"}
    assert result["seed"] == result["attacks"]["pgd2"]["seed"] == 3


def test_splits_differ_in_size(command: Command, trained: Path, tmp_path: Path) -> None:
    counts = {}
    for split in ("train", "validation", "test"):
        output = tmp_path / f"{split}.json"
        command("evaluate", trained, "--attacks", "natural", "--split", split, "--output", output)
        counts[split] = json.loads(output.read_text())["natural"]["n"]
    assert counts == {"train": 1238, "validation": 200, "test": 359}


MISUSES: dict[str, tuple[list[Any], str]] = {
    "neither": ([], "expected a run folder, or --model NAME"),
    "both": (["digits", "--model", "small_cnn"], "not both"),
    "weights": (["digits", "--weights", "x.pt"], "go with --model"),
    "option": (["digits", "--option", "width=16"], "go with --model"),
    "mean": (["digits", "--mean", "0.5"], "go with --model"),
    "no weights": (["--model", "small_cnn", "--data", "digits"], "without weights is random"),
    "no data": (["--model", "small_cnn", "--weights", "x.pt"], "--data"),
    "no number": (
        ["--model", "small_cnn", "--mean", "a,b", "--std", "1,1"],
        "--mean: expected numbers",
    ),
    "option word": (["--model", "small_cnn", "--option", "width"], "expected key=value"),
    "nowhere": (["runs/nowhere"], "runs/nowhere does not exist"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_of_evaluate(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = MISUSES[case]
    refused(command("evaluate", *words), message)
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_nothing_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped folder without a slash: what is wrong is the name, not that data is missing."""
    monkeypatch.chdir(tmp_path)
    refused(command("evaluate", "myrum"), "myrum")


def test_evaluate_beyond_the_threat(trained: Path, command: Command, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    words = ["evaluate", trained, "--attacks", "fgsm", "--limit", 10, "--output", output]
    refused(command(*words, "--smoothing", "0"), "standard deviation above 0")
    assert not list(tmp_path.iterdir())
    ended = command(*words, "--unseen", "--bounds", "--smoothing", "0.25")
    assert ended.status == 0, ended
    for title in (
        "beyond the threat",
        "L2 ",
        "L1 ",
        "proved by interval bounds",
        "certified in L2",
    ):
        assert title in ended.out + ended.err, title
    result = json.loads(output.read_text())
    assert set(result) >= {"unseen", "verified", "smoothed"}
    assert result["verified"]["accuracy"] <= result["attacks"]["fgsm"]["accuracy"]
