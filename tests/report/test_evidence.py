"""The page for a reviewer, and the hashes beside it, from planted records."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from planted_runs import cell, corruptions, diagnosis, evaluation, plant, whole_run, write
from reading_pages import Element, cells, drawings, read

import cure
from cure.attacks import Threat
from cure.errors import CureError
from cure.evaluation.calibration import calibration_under_attack
from cure.models import build_model, save_weights
from cure.recipe import load_recipe
from cure.report import evidence as module
from cure.report.evidence import Calibration, write_evidence
from cure.utils.engine import Engine
from helpers import Command, bright_or_dark, refused

SUMS = shutil.which("sha256sum")
KEYS = shutil.which("ssh-keygen")


@pytest.fixture(autouse=True)
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BROWSERS", ())


def section(page: Path, name: str) -> Element:
    return next(s for s in read(page).all("section") if s.attributes.get("id") == name)


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    assert SUMS is not None
    command = [SUMS, "-c", "--quiet", "SHA256SUMS"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


class Fixed(torch.nn.Module):
    """Confidence 0.75 for the class that the mean of an image is nearer to."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        sign = torch.sign(image.mean(dim=(1, 2, 3)) - 0.5) + 0.0 * image.sum(dim=(1, 2, 3))
        return torch.stack([-sign, sign], dim=1) * torch.tensor(3.0).log() / 2


class Sloped(torch.nn.Module):
    """Logits whose difference is ten times the mean of an image minus a half."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        along = 10 * (image.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([torch.zeros_like(along), along], dim=1)


def test_calibration_is_that_of_a_hand_computed_network() -> None:
    images = bright_or_dark(8, "test")
    images.image.copy_(torch.where(images.label > 0, 153, 102)[:, None, None, None])  # 0.6, 0.4
    engine = Engine.for_evaluation("cpu")
    fixed = calibration_under_attack(Fixed(), images, Threat("Linf", 0.05), engine=engine)
    # All right at confidence 0.75: the gap is 0.25, and 0.05 does not cross the half.
    assert fixed["natural"].ece == pytest.approx(0.25, abs=1e-6)
    assert fixed["pgd20"].ece == pytest.approx(0.25, abs=1e-6)
    found = calibration_under_attack(Sloped(), images, Threat("Linf", 0.2), engine=engine)
    # Means 0.6 and 0.4 are logit 1: confidence 1 / (1 + e^-1), all right.
    sure = 1 / (1 + torch.tensor(-1.0).exp().item())
    assert found["natural"].ece == pytest.approx(1 - sure, abs=1e-5)
    # An attack of 0.2 moves them to 0.4 and 0.6: the same confidence, all wrong.
    assert found["pgd20"].ece == pytest.approx(sure, abs=1e-5)


def test_every_part_of_a_whole_run_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole_run(tmp_path)
    images = bright_or_dark(8, "test")
    images.image.copy_(torch.where(images.label > 0, 153, 102)[:, None, None, None])
    threat, engine = Threat("Linf", 0.2), Engine.for_evaluation("cpu")
    reliabilities = calibration_under_attack(Sloped(), images, threat, engine=engine)
    planted = Calibration(reliabilities, module.describe_images(images), threat, 3, 0)
    monkeypatch.setattr(module, "_calibrate", lambda *_: planted)
    page = write_evidence(run).page
    attacks = cells(section(page, "attacks").all("table")[0])
    assert [row[0] for row in attacks] == ["PGD-20", "C&W", "AutoAttack"]
    assert "30.0 (24.1-36.7)" in " ".join(attacks[0][3].split())
    budgets = cells(section(page, "attacks").all("table")[1])
    assert budgets[0] == ["PGD-20", "steps 20", "not recorded"]
    diagnosed = cells(section(page, "diagnosis").all("table")[0])
    assert ["black box", "fail", "Square finds more."] in diagnosed
    shown = cells(section(page, "calibration").all("table")[0])
    assert shown == [
        ["natural", "100.0", "73.1", "26.9", "8"],
        ["PGD-20", "0.0", "73.1", "73.1", "8"],
    ]
    assert len(drawings(section(page, "calibration"))) == 1
    commands = cells(section(page, "reproduce").all("table")[0])
    assert commands[0][1] == "cure train digits --run planted"
    clauses = {row[1]: row[2] for row in cells(section(page, "clauses").all("table")[0])}
    assert clauses["NIST AI 100-2 E2023 2.3 poisoning attacks"] == "no evidence"
    assert set(clauses.values()) == {"evidence towards", "no evidence"}
    limits = section(page, "limits").text
    assert "black box" in limits
    assert "Corruptions were not" not in limits


def test_missing_parts_are_named_with_their_command(tmp_path: Path) -> None:
    run = plant(tmp_path / "bare")
    made = write_evidence(run, calibration_images=0)
    for name, command in {
        "data": "cure evaluate",
        "threat": "cure evaluate",
        "attacks": "cure evaluate",
        "diagnosis": "cure diagnose",
        "corruptions": "cure corruptions",
        "calibration": "cure report --evidence",
    }.items():
        missing = section(made.page, name)
        assert command in missing.one("pre").text, name
        assert not missing.all("table"), name
    limits = section(made.page, "limits").text
    for word in ("Accuracy", "AutoAttack", "diagnosis", "Corruptions", "Calibration"):
        assert word in limits
    rows = cells(section(made.page, "clauses").all("table")[0])
    there = {row[0] for row in rows if row[2] == "evidence towards"}
    assert there == {"Integrity"}
    assert made.pdf is None
    assert any("evidence.pdf was not written" in n for n in made.notes)


def test_what_was_certified_and_tried_in_other_norms_is_said(tmp_path: Path) -> None:
    ball = {"norm": "L2", "epsilon": 0.5, "epsilon_text": "0.5"}
    part = {"threat": ball, "attacks": {"apgd-ce": cell(31, 200) | {"settings": {}}}}
    beyond = {"unseen": {"L2": part, "all_threats": cell(17, 200)}, "verified": cell(3, 200)}
    made = write_evidence(
        plant(tmp_path / "beyond", results=[evaluation("beyond") | beyond]), calibration_images=0
    )
    limits = section(made.page, "limits").text
    assert "Attacks were tried in L2 and Linf only" in limits
    assert "certified" not in limits
    rows = cells(section(made.page, "clauses").all("table")[0])
    formal = [row[2] for row in rows if "formal methods" in row[1]]
    assert formal == ["evidence towards"] * 2
    plain = write_evidence(
        plant(tmp_path / "plain", results=[evaluation("plain")]), calibration_images=0
    )
    assert "cure evaluate" in section(plain.page, "limits").text
    assert "No bound was certified" in section(plain.page, "limits").text
    rows = cells(section(plain.page, "clauses").all("table")[0])
    assert {row[2] for row in rows if "formal methods" in row[1]} == {"no evidence"}


def test_attacks_on_other_weights_or_images_do_not_count(tmp_path: Path) -> None:
    """What the last checkpoint or other images withstood says nothing of the verdict's network."""
    strong = {"autoattack": 20, "square": 30}
    results = [
        evaluation("other", attacks=strong, checkpoint="last", curve=[(0.1, 50)]),
        evaluation("other", attacks=strong, data="another"),
        evaluation("other", attacks={"pgd20": 60}),
    ]
    run = plant(tmp_path / "other", results=results)
    made = write_evidence(run, calibration_images=0)
    limits = section(made.page, "limits").text
    for word in ("AutoAttack was not run", "No black-box attack", "Other radii were not measured"):
        assert word in limits
    assert "black box" not in section(made.page, "threat").text
    rows = cells(section(made.page, "clauses").all("table")[0])
    assert {row[2] for row in rows if "2.2.2 black-box" in row[1]} == {"no evidence"}
    # All that was run stays listed.
    assert "AutoAttack" in section(made.page, "attacks").text


def test_an_estimate_of_autoattack_is_no_autoattack(tmp_path: Path) -> None:
    made = write_evidence(
        plant(tmp_path / "run", results=[evaluation("run", attacks={"screened-ordered": 40})]),
        calibration_images=0,
    )
    assert "AutoAttack was not run" in section(made.page, "limits").text


def test_a_network_without_images_says_why_it_is_not_calibrated(tmp_path: Path) -> None:
    page = write_evidence(plant(tmp_path / "bare", results=[evaluation("bare")])).page
    assert "Not measured: " in section(page, "calibration").text


def test_a_real_network_is_calibrated_on_so_many_images(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", settings=["evaluation.batch_size=16"])
    config = load_recipe("digits", ["evaluation.batch_size=16"])
    classes = [str(number) for number in range(10)]
    write(run / "data.json", {"classes": classes, "channels": 1, "size": [8, 8]})
    model = build_model(config.model, classes=10, channels=1, size=(8, 8), seed=0, names=classes)
    (run / "checkpoints").mkdir()
    save_weights(model, run / "checkpoints" / "best.safetensors", {})
    shown = cells(
        section(write_evidence(run, calibration_images=16).page, "calibration").all("table")[0]
    )
    assert [(row[0], row[4]) for row in shown] == [("natural", "16"), ("PGD-20", "16")]
    assert 0 <= float(shown[1][1]) <= float(shown[0][1]) <= 100


def test_nothing_is_green(tmp_path: Path) -> None:
    run = plant(tmp_path / "good", results=[evaluation("good"), diagnosis("good")])
    tiles = [
        each.attributes["class"].split()
        for each in read(write_evidence(run, calibration_images=0).page).all("div")
        if each.attributes.get("class", "").startswith("tile")
    ]
    assert tiles
    assert not any("pass" in names for names in tiles)


@pytest.mark.skipif(SUMS is None, reason="sha256sum is not installed")
def test_an_altered_a_lost_and_an_oddly_named_file_are_found(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", results=[corruptions("run")])
    odd = run / "a\nb\\c.txt"
    odd.write_text("as it was")
    write_evidence(run, calibration_images=0)
    assert checked(run).returncode == 0
    # Again: the lists do not count themselves.
    write_evidence(run, calibration_images=0)
    assert checked(run).returncode == 0
    odd.write_text("altered")
    assert checked(run).returncode == 1
    odd.write_text("as it was")
    (run / "status.json").unlink()
    done = checked(run)
    assert done.returncode == 1
    assert "status.json" in done.stdout + done.stderr


@pytest.mark.skipif(SUMS is None, reason="sha256sum is not installed")
def test_a_file_whose_name_is_no_text_is_listed(tmp_path: Path) -> None:
    run = plant(tmp_path / "named")
    name = b"note-\xe9.txt"
    try:
        Path(os.fsdecode(bytes(run) + b"/" + name)).write_text("x")
    except OSError:
        pytest.skip("this system takes no such name")
    made = write_evidence(run, calibration_images=0)
    assert name in made.hashes.read_bytes()
    assert checked(run).returncode == 0


@pytest.mark.skipif(KEYS is None, reason="ssh-keygen is not installed")
def test_a_signature_holds_until_the_list_changes(tmp_path: Path) -> None:
    assert KEYS is not None
    key, run = tmp_path / "key", plant(tmp_path / "run")
    subprocess.run([KEYS, "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    made = write_evidence(run, calibration_images=0, sign=key)
    assert made.signature is not None
    assert "It is signed" in section(made.page, "integrity").text

    def holds() -> bool:
        words = ["-Y", "check-novalidate", "-n", "cure-evidence", "-s", str(made.signature)]
        text = made.hashes.read_bytes()
        return not subprocess.run([KEYS, *words], input=text, capture_output=True).returncode

    assert holds()
    made.hashes.write_text(made.hashes.read_text().replace("a", "b"))
    assert not holds()
    again = write_evidence(run, calibration_images=0)
    assert again.signature is None
    assert not (run / "SHA256SUMS.sig").exists()
    assert "It is unsigned" in section(again.page, "integrity").text
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(CureError, match="cannot sign"):
        write_evidence(run, calibration_images=0, sign=tmp_path / "none")
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    run = plant(tmp_path / "run")
    (run / "SHA256SUMS").write_text("mine")
    with pytest.raises(CureError, match="SHA256SUMS was not made by"):
        write_evidence(run, calibration_images=0)
    assert (run / "SHA256SUMS").read_text() == "mine"
    assert not (run / "evidence.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_pdf_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BROWSERS", ("chromium",))
    made = write_evidence(plant(tmp_path / "run"), calibration_images=0)
    assert made.pdf is not None
    assert made.pdf.read_bytes().startswith(b"%PDF")
    assert "evidence.pdf" in made.hashes.read_text()


def test_a_browser_that_fails_costs_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(module, "BROWSERS", (str(fake),))
    made = write_evidence(plant(tmp_path / "run"), calibration_images=0)
    assert made.pdf is None
    assert made.notes[0].startswith("evidence.pdf was not written: fake")


def test_a_run_may_lie_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plant(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_evidence("~/run", calibration_images=0).page == run / "evidence.html"


def test_the_command(tmp_path: Path, command: Command) -> None:
    run = str(plant(tmp_path / "run"))
    done = command("report", "--evidence", run, "--calibration-images", "0")
    assert done.status == 0
    assert "SHA256SUMS is unsigned" in done.out
    refused(command("report", run, "--sign", "key"), "--evidence")
    refused(command("report", "--evidence", run, run), "one run")
    assert cure.write_evidence is write_evidence
    assert Path(run, "evidence.html").exists()
