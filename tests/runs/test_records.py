"""Records of run files: a run of version 0.1, unknown keys, damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cure.errors import CheckpointError
from cure.runs.folder import RunFolder
from cure.runs.records import (
    Environment,
    EpochMetrics,
    EpochTiming,
    FileRecord,
    GradientLine,
    Images,
    Status,
    TrackingIds,
    line_text,
    read_lines,
)
from cure.runs.results import (
    CorruptionRecord,
    DataFacts,
    DiagnosisRecord,
    EvaluationRecord,
    RunRecord,
    StudyRecord,
    read_result,
)
from helpers import Command

OLD = Path(__file__).parents[1] / "fixtures" / "run-0.1"
"""Trained, evaluated, diagnosed and studied by version 0.1.0 (commit 1b5f326)."""

KINDS: dict[str, type[FileRecord]] = {
    "status.json": Status,
    "data.json": Images,
    "environment.json": Environment,
    "evaluations": EvaluationRecord,
    "corruptions": CorruptionRecord,
    "diagnoses": DiagnosisRecord,
    "studies": StudyRecord,
}
LINES = {kind.file: kind for kind in (EpochMetrics, EpochTiming, GradientLine)}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run-0.1"))


def kind_of(path: Path) -> type[FileRecord]:
    return KINDS.get(path.name) or KINDS[path.parent.name]


JSON_FILES = sorted(path for path in OLD.rglob("*.json") if path.name != "tracking.json")


@pytest.mark.parametrize("path", JSON_FILES, ids=lambda path: str(path.relative_to(OLD)))
def test_every_json_file_of_0_1_is_read_and_written_the_same(path: Path, tmp_path: Path) -> None:
    record = kind_of(path).read(path)
    record.write(tmp_path / "again.json")
    before, after = (json.loads(p.read_text()) for p in (path, tmp_path / "again.json"))
    assert after == before
    typed = type(record).model_fields.keys()
    assert before.keys() - typed == set() or isinstance(record, StudyRecord)


@pytest.mark.parametrize("name", LINES)
def test_every_line_of_0_1_is_read_and_written_the_same(name: str) -> None:
    lines = read_lines(OLD / name, LINES[name])
    assert lines
    assert "".join(map(line_text, lines)) == (OLD / name).read_text()
    assert not any(line.model_extra for line in lines), "every key has a type"


def test_the_values_of_a_run_of_0_1() -> None:
    folder = RunFolder.open(OLD)
    assert folder.config.method.name == "cure"
    status = folder.status()
    assert status.finished
    assert status.best is not None
    assert status.best.epoch == 1
    assert [line.epoch for line in folder.metrics()] == [1, 2]
    assert folder.metrics()[0].validation == status.best.validation
    assert folder.timing()[1].ranks == 1
    assert folder.kind.classes == tuple("0123456789")
    assert folder.environment().cure == "0.1.0"
    evaluations = folder.evaluations()
    assert [result.model.checkpoint for result in evaluations] == ["best", "last"]
    assert evaluations[0].attacks["pgd20"].settings["steps"] == 20
    assert evaluations[0].natural.accuracy == 100 * 23 / 50
    assert folder.corruptions()[0].corruptions["fog"].severities["3"].n == 20
    assert folder.diagnoses()[0].verdict == "pass"
    assert folder.studies()[0].study == "gradients"
    assert "runs" in folder.studies()[0].body
    assert folder.gradients()[0].every == 10
    assert TrackingIds.read(OLD / "tracking.json").root.keys() == {"mlflow"}


def test_commands_take_a_run_of_0_1(
    old: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    compared = command("compare", old, old / "natural")
    assert compared.status == 0, compared.err
    assert "46.0 (33.0-59.6)" in compared.out
    watched = command("watch", old, "--once")
    assert watched.status == 0, watched.err
    assert "run-0.1: finished" in watched.out
    assert command("report", old, "--output", old.parent / "page.html").status == 0
    assert "run-0.1" in (old.parent / "page.html").read_text()
    words = ("--limit", 50, "--device", "cpu")
    evaluated = command("evaluate", old, *words, "--output", old.parent / "new.json")
    assert evaluated.status == 0, evaluated.err
    again = EvaluationRecord.read(old.parent / "new.json")
    before = RunFolder.open(OLD).evaluations()[0]
    assert again.natural.correct == before.natural.correct
    for name, part in before.attacks.items():
        # The same attack from the same seed; rounding may decide one image on another machine.
        assert again.attacks[name].correct == pytest.approx(part.correct, abs=1)
    assert len(RunFolder.open(old).evaluations()) == 3


def test_keys_of_newer_versions_are_kept(old: Path) -> None:
    path = old / "evaluations" / "best-test-1.json"
    content = json.loads(path.read_text())
    content["new"] = {"key": 1}
    content["natural"]["newer"] = [1, 2]
    path.write_text(json.dumps(content))
    record = EvaluationRecord.read(path)
    assert record.content() == content


def test_no_status_is_a_new_run(old: Path) -> None:
    (old / "status.json").unlink()
    assert RunFolder.open(old).status().state == "new"


@pytest.mark.parametrize("path", JSON_FILES, ids=lambda path: str(path.relative_to(OLD)))
@pytest.mark.parametrize("content", ["{", "[]", '{"format": "cure-evaluation-1"}', "\udcff"])
def test_a_damaged_file_is_one_sentence(path: Path, content: str, tmp_path: Path) -> None:
    if content.startswith("{") and path.name == "environment.json" and content != "{":
        return  # Every key of an environment may be missing.
    file = tmp_path / path.name
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=path.name) as refusal:
        kind_of(path).read(file)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert sentence.endswith(("restore it from a copy", "make it again"))


def test_half_a_last_line_is_left_out_and_a_damaged_line_is_refused(old: Path) -> None:
    path = old / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    assert [line.epoch for line in RunFolder.open(old).metrics()] == [1]
    path.write_text(text[20:])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1 is damaged"):
        RunFolder.open(old).metrics()


def test_results_are_told_apart_by_their_format(old: Path) -> None:
    assert isinstance(read_result(old / "diagnoses" / "best-test-1.json"), DiagnosisRecord)
    with pytest.raises(CheckpointError, match=r"its format is 'None'"):
        read_result(old / "status.json")


def test_a_type_that_is_not_the_file_s_is_refused(old: Path) -> None:
    path = old / "evaluations" / "best-test-1.json"
    content = json.loads(path.read_text())
    content["natural"]["accuracy"] = "46"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"natural\.accuracy.*make it again"):
        EvaluationRecord.read(path)


def test_a_run_in_one_file_holds_the_run(old: Path, tmp_path: Path) -> None:
    folder = RunFolder.open(old)
    record = RunRecord(
        format="cure-run-1",
        label="cure",
        config=folder.settings(),
        evaluations=folder.evaluations(),
        timing=folder.timing(),
    )
    record.write(tmp_path / "run.json")
    again = read_result(tmp_path / "run.json")
    assert isinstance(again, RunRecord)
    assert again == record


def test_a_result_on_other_images_answers_no_question_about_a_run() -> None:
    for own, expected in ((None, True), (True, True), (False, False)):
        facts = DataFacts(name="a", split="test", n=5, limit=None, own=own)
        assert facts.answers(None) is expected
