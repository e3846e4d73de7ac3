"""The page of runs: what is in it, what it says where something lacks, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from planted_runs import (
    cell,
    corruptions,
    diagnosis,
    evaluation,
    hostile_runs,
    plant,
    whole_run,
    write,
)
from reading_pages import SECTIONS, Element, cells, drawings, read

import cure
from cure.analysis.render import StudyTable, View
from cure.analysis.study import STUDIES, STUDY_FORMAT, RunStudyOptions, Study
from cure.errors import CureError
from cure.report import page as page_module
from cure.report.page import write_report
from cure.utils.plotting import Chart, Panel, Series, style_of
from cure.utils.stats import newcombe, wilson
from helpers import Command, refused


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run for a test to change."""
    return whole_run(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run with one result, whose page is drawn fast."""
    return plant(tmp_path / "small", robust=(), results=[evaluation("small")])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run, where it is by default."""
    return write_report(whole_run(tmp_path_factory.mktemp("written")))


@pytest.fixture(scope="module")
def tree(written: Path) -> Element:
    return read(written)


def section(tree: Element, name: str) -> Element:
    return tree.one("section", id=name)


@pytest.fixture
def planted_study(monkeypatch: pytest.MonkeyPatch) -> str:
    """A study that tells what its result says."""

    def view(result: dict[str, Any]) -> View:
        curve = Series("a", [0.0, 1.0], [1.0, float(result["value"])])
        return View(
            f"It grew to {result['value']}.",
            [
                StudyTable("Growth", ["what", "size"], [["it", str(result["value"])]]),
                StudyTable("Each", ["what"], [[str(number)] for number in range(20)]),
            ],
            [Chart("planted-lines", "A line", "It.", [Panel([curve])])],
        )

    STUDIES.names()  # What registers itself has done so.
    study = Study(
        "planted",
        "A planted study",
        "Does it grow?",
        "cure analyse planted RUN --limit 9",
        RunStudyOptions,
        lambda *_: {},
        view,
    )
    monkeypatch.setitem(STUDIES._entries, "planted", study)
    return "planted"


# What is in it.


def test_every_section_is_there_and_in_the_contents(tree: Element) -> None:
    found = [e.attributes["id"] for e in tree.one("main").children if isinstance(e, Element)]
    assert found == SECTIONS
    links = [a.attributes["href"] for a in tree.one("details", id="contents").all("a")]
    assert links == [f"#{name}" for name in SECTIONS]
    for name in SECTIONS:
        head = section(tree, name).one("h2")
        assert head.attributes["id"] == f"{name}-heading"
    ids = [e.attributes["id"] for e in tree.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_accuracies_are_those_of_the_results(tree: Element, written: Path) -> None:
    table = section(tree, "accuracies").all("table")[0]
    head = [th.text for th in table.one("thead").all("th")]
    assert head == [
        *("network", "method", "natural", "worst case", "AutoAttack", "NRR, AutoAttack"),
        *("C&W", "NRR, C&W", "PGD-20"),
    ]
    robust, natural = cells(table)
    result = json.loads((written.parent / "evaluations" / "best-test-1.json").read_text())
    low, high = result["natural"]["interval"]
    assert robust[0] == "1 robust"
    assert robust[1] == "cure"
    assert robust[2].startswith(f"75.0 ({low:.1f}-{high:.1f})")
    low, high = result["attacks"]["autoattack"]["interval"]
    assert robust[4].startswith(f"20.0 ({low:.1f}-{high:.1f})")
    # 2 x 75 x 20 / 95.
    assert robust[5] == "31.6"
    assert robust[8].startswith("30.0 (")
    assert natural[0] == "2 robust/natural"
    assert natural[2].startswith("95.0 (")
    assert natural[4].startswith("0.0 (0.0-1.9)")


def test_unseen_threats_and_certificates_stand_below_the_accuracies(tmp_path: Path) -> None:
    ball = {"norm": "L2", "epsilon": 0.5, "epsilon_text": "0.5"}
    attacks = {"apgd-ce": cell(31, 200) | {"settings": {}}}
    left = {"bounds": [5.0, 15.5], "undecided": 21, "n": 200, "stopped_in": "apgd-t"}
    result = evaluation("wide") | {
        "unseen": {
            "L2": {"threat": ball, "attacks": attacks, "unfinished": {"apgd-t": left}},
            "all_threats": cell(17, 200),
        },
        "verified": cell(3, 200),
    }
    file = write(tmp_path / "wide.json", result)
    page = write_report([file], output=tmp_path / "page.html").read_text(encoding="utf-8")
    words = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "L2 0.5, not asked for: apgd-ce 15.5" in words
    assert "L2 0.5, not asked for: apgd-t unfinished: 5.0 to 15.5" in words
    assert "every attack in every norm 8.5" in words
    assert "proved by interval bounds, Linf 0.1 1.5" in words
    plain = write_report(
        [write(tmp_path / "plain.json", evaluation("wide"))], output=tmp_path / "p"
    )
    assert "Beyond the threat" not in plain.read_text(encoding="utf-8")


def test_a_later_evaluation_of_fewer_images_changes_no_verdict(tmp_path: Path) -> None:
    whole = evaluation("run", attacks={"pgd20": 90, "cw": 80})
    few = evaluation("run", attacks={"pgd20": 3, "cw": 1}, natural=7, count=8)
    run = plant(tmp_path / "run", results=[whole, few | {"environment": whole["environment"]}])
    page = write_report([run], output=tmp_path / "page.html").read_text(encoding="utf-8")
    words = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "40.0 %" in words
    assert "12.5" not in words


def test_a_diagnosis_of_another_threat_says_nothing(tmp_path: Path) -> None:
    told = diagnosis("run", "fail")
    own = plant(tmp_path / "own", results=[evaluation("run"), told | {"epsilon": 0.1}])
    other = plant(tmp_path / "other", results=[evaluation("run"), told | {"epsilon": 0.0001}])
    for run, fails in ((own, True), (other, False)):
        page = write_report([run], output=run / "page.html").read_text(encoding="utf-8")
        assert ("Square finds more." in page) is fails


def test_certificates_of_two_evaluations_stand_together(tmp_path: Path) -> None:
    """Those of the weights that the tables are of, and of no other checkpoint."""
    proved = evaluation("run") | {"verified": cell(3, 200)}
    ball = {"norm": "L2", "epsilon": 0.5, "epsilon_text": "0.5"}
    attacks = {"apgd-ce": cell(31, 200) | {"settings": {}}}
    wide = evaluation("run", time="2026-01-01T12:00:00+00:00")
    wide |= {"unseen": {"L2": {"threat": ball, "attacks": attacks}}}
    last = evaluation("run", checkpoint="last") | {"verified": cell(199, 200)}
    run = plant(tmp_path / "run", results=[proved, wide, last])
    page = write_report([run], output=tmp_path / "page.html").read_text(encoding="utf-8")
    words = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "L2 0.5, not asked for: apgd-ce 15.5" in words
    assert "proved by interval bounds, Linf 0.1 1.5" in words
    assert "99.5" not in words


def test_the_verdict_has_numbers_intervals_images_and_the_start(tree: Element) -> None:
    said = section(tree, "verdict").text
    assert "robust is right on 75.0 % (68.6-80.5) of 200 test images as they are." in said
    assert "AutoAttack, the strongest attack tried, on 20.0 % (15.0-26.1) of these" in said
    assert "Against the network it started from (robust/natural): -20.0 points" in said
    assert "+20.0 points (+14.7 to +26.1) under AutoAttack" in said
    tiles = [t.text for t in section(tree, "verdict").all("p", class_="tile-value")]
    assert tiles == ["75.0 %", "20.0 %", "no"]
    assert "The diagnosis fails (black box): Square finds more." in said
    # Only runs that were named have a verdict; the start stands beside its run.
    assert "robust/natural is right" not in said


def test_a_difference_has_newcombes_interval() -> None:
    # Newcombe 1998, Table II (a), method 10: 56/70 - 48/80 is 0.20 (0.0524 to 0.3339).
    low, high = newcombe(80.0, wilson(56, 70), 60.0, wilson(48, 80))
    assert (round(low, 2), round(high, 2)) == (5.24, 33.39)


def unequal(correct: int) -> dict[str, Any]:
    """A result on 180 images of one class and 20 of another, ``correct`` of these right."""
    result = evaluation("ward", natural=180 + correct, attacks={"pgd20": 180})
    result["majority"] = {"class": "0", "accuracy": 90.0}
    result["data"]["images_by_class"] = [180, 20]
    for part, right in ((result["natural"], correct), (result["attacks"]["pgd20"], 0)):
        share = 100 * right / 20
        part["accuracy_by_class"] = [100.0, share]
        part["balanced_accuracy"] = (100 + share) / 2
        part["balanced_interval"] = [45.0, 99.0]
    return result


def test_classes_of_unequal_size(tmp_path: Path) -> None:
    result = unequal(0) | {"notes": ["the network: its weights were float16"]}
    page = write_report(plant(tmp_path / "ward", results=[result]))
    tree = read(page)
    said = section(tree, "verdict").text
    assert "always naming the largest class is right on 90.0 %" in said
    assert "It is no more accurate than always naming the largest class (90.0 %)" in said
    assert "Noted while evaluating: the network: its weights were float16." in said
    table = section(tree, "accuracies").all("table")[1]
    assert [th.text for th in table.one("thead").all("th")] == [
        *("class", "images", "natural", "PGD-20")
    ]
    assert cells(table) == [
        ["balanced (mean over the classes)", "200", "50.0 (45.0-99.0)", "50.0 (45.0-99.0)"],
        ["0", "180", "100.0", "100.0"],
        ["1", "20", "0.0", "0.0"],
    ]
    better = write_report(plant(tmp_path / "better", results=[unequal(15)]))
    assert "no more accurate" not in section(read(better), "verdict").text


def test_findings_stand_beside_the_numbers_they_concern(tree: Element) -> None:
    table = section(tree, "accuracies").all("table")[0]
    row = table.one("tbody").all("tr")[0]
    flags = [[a.attributes["href"] for a in cell.all("a")] for cell in row.all("td")]
    # black_box and precision are about attacks: natural accuracy stands as it is.
    assert flags[1] == []
    assert flags[3] == ["#remark-1", "#remark-2"]
    assert tree.one("li", id="remark-1").text == "fail: robust: black box: Square finds more."
    assert tree.one("li", id="remark-2").text == "warn: robust: precision: Logits are large."


def test_a_check_of_the_whole_evaluation_is_flagged_at_natural_accuracy(tmp_path: Path) -> None:
    check = {"name": "determinism", "status": "warn", "meaning": "It draws."}
    run = plant(tmp_path / "run", results=[evaluation("run", checks=[check])])
    row = section(read(write_report(run)), "accuracies").all("table")[0].one("tbody").all("tr")[0]
    assert [a.attributes["href"] for a in row.all("td")[1].all("a")] == ["#remark-1"]


def test_weak_attacks_alone_are_called_weak(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", results=[evaluation("run", attacks={"pgd20": 60, "noise": 140})])
    said = section(read(write_report(run)), "verdict").text
    assert "withstands PGD-20, the strongest attack tried, on 30.0 %" in said
    assert "comes from noise and PGD-20 alone" in said


def test_the_verdict_is_of_the_attack_that_left_fewest(tmp_path: Path) -> None:
    attacks = {"pgd20": 198, "cw": 200, "square": 17}
    run = plant(tmp_path / "run", results=[evaluation("run", attacks=attacks)])
    said = section(read(write_report(run)), "verdict").text
    assert "withstands Square, the strongest attack tried, on 8.5 %" in said
    assert "100.0 %" not in said
    assert "--attacks autoattack" in said


def test_only_a_diagnosis_makes_belief_green(tmp_path: Path) -> None:
    """The brief checks of an evaluation, here under noise alone, do not tell masked gradients."""
    passed = {"name": "natural_accuracy", "status": "pass", "meaning": "As expected."}
    result = evaluation("run", attacks={"noise": 140}, checks=[passed | {"measured": {}}])
    run = plant(tmp_path / "run", results=[result])
    for results, green in (([], False), ([diagnosis("run")], True)):
        for made in results:
            write(run / "diagnoses" / "001-best-test.json", made)
        tiles = section(read(write_report(run)), "verdict").all("div")
        (belief,) = [t for t in tiles if "can it be believed?" in t.text and not t.all("div")]
        assert ("pass" in belief.attributes["class"].split()) is green
        assert "no check failed" in belief.text


def test_the_verdict_is_of_the_run_s_own_images(tmp_path: Path) -> None:
    other = evaluation("run", 380, {"pgd20": 360}, count=400, data="easier")
    other["data"]["own"] = False
    results = [evaluation("run", attacks={"pgd20": 60}), other]
    run = plant(tmp_path / "run", results=results)
    said = section(read(write_report(run)), "verdict").text
    assert "75.0 %" in said
    assert "95.0 %" not in said


def test_curves_of_two_checkpoints_are_two_figures(tmp_path: Path) -> None:
    """The newest had taken the place of the others, whatever it was of."""
    results = [
        evaluation("run", curve=[(0.2, 20)]),
        evaluation("run", curve=[(0.2, 40)], data="elsewhere"),
        evaluation("run", curve=[(0.2, 60)], checkpoint="last"),
    ]
    shown = section(read(write_report(plant(tmp_path / "run", results=results))), "epsilon")
    assert len(shown.all("figure")) == 3
    for words in (
        "10.0 % correct at the largest change",
        "(digits, test images of the best checkpoint, n = 200)",
        "(elsewhere, test images of the best checkpoint, n = 200)",
        "(digits, test images of the last checkpoint, n = 200)",
    ):
        assert words in shown.text


def test_what_was_trained(tree: Element) -> None:
    card = tree.one("details", id="trained-1")
    for words in ("cure", "digits, 2 classes", "3 of ", "3 minutes in all, 60 seconds an epoch"):
        assert words in card.text, words
    assert "commit abc1234, torch 2.13.0" in card.text
    assert card.one("pre").text == "cure train digits --run planted"
    settings = dict(row for row in cells(card.one("table")))
    assert settings["method.percent"] == "30.0"


def test_curves_tables_say_the_numbers(tree: Element) -> None:
    figures = section(tree, "learning").all("figure")
    assert len(figures) == 4
    loss = cells(figures[0].one("table"))
    assert loss[0] == ["1 robust", "2.000", "1.000", "0.667"]
    overfitting = section(tree, "overfitting")
    assert "robust: best 30.0 % after epoch 2, last 25.0 % after epoch 3" in overfitting.text
    assert "5.0 points were lost" in overfitting.text
    epsilon = section(tree, "epsilon")
    assert "PGD-20 leaves no image correct from ε = 51/255 on" in epsilon.text
    assert cells(epsilon.one("table"))[0] == ["1 robust", "75.000", "50.000", "0.000"]
    groups, each = section(tree, "corruptions").all("table")
    assert cells(groups)[0][2].startswith("50.0 (")
    assert [row[:2] for row in cells(each)] == [["fog", "weather"], ["shot noise", "noise"]]


def test_every_drawing_has_a_title_and_a_description(tree: Element) -> None:
    found = drawings(tree)
    assert len(found) >= 8
    for image in tree.all("img"):
        title = image.parent.attributes["aria-label"]
        assert image.attributes["alt"].startswith(f"{title}. ")
        assert len(image.attributes["alt"]) > len(title) + 6
    for svg in found:
        assert len(svg.one("title").text) > 3
        assert len(svg.one("desc").text) > 3


def test_sections_without_data_name_their_command(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", robust=())
    tree = read(write_report(run))
    for name, command in {
        "accuracies": "cure evaluate run",
        "trade-off": "cure evaluate run",
        "learning": "cure resume run",
        "epsilon": "cure evaluate run --curve pgd20",
        "corruptions": "cure corruptions run",
        "cka": "cure analyse cka run",
        "gradients": "cure analyse gradients run",
        "overfitting": "cure analyse overfitting run",
        "minimal-perturbation": "cure analyse minimal-perturbation run",
        "pictures": "cure analyse minimal-perturbation run",
    }.items():
        commands = [pre.text for pre in section(tree, name).all("pre")]
        assert any(said.startswith(command) for said in commands), (name, commands)
    assert "has not been evaluated" in section(tree, "verdict").text


def test_a_study_is_told(small: Path, planted_study: str) -> None:
    result = {"format": STUDY_FORMAT, "study": planted_study, "environment": {}}
    write(small / "studies" / "planted-1.json", result | {"value": 7})
    write(small / "studies" / "planted-2.json", result | {"value": 8})
    write(small / "studies" / "planted-3.json", result)
    studies = section(read(write_report(small)), "studies")
    assert "It grew to 7." in studies.text
    assert "It grew to 8." in studies.text
    tables = [cells(table) for table in studies.all("table")]
    assert tables[::2] == [[["it", "7"]], [["it", "8"]]]
    # Long tables are folded.
    assert [details.one("summary").text for details in studies.all("details")] == ["Each", "Each"]
    assert len(drawings(studies)) == 2
    assert "A result of cure analyse planted of small is damaged" in studies.text


def test_a_study_that_was_not_made_says_its_own_command(small: Path, planted_study: str) -> None:
    commands = [pre.text for pre in section(read(write_report(small)), "studies").all("pre")]
    assert "cure analyse planted small --limit 9" in commands


# Several runs, and files.


def test_runs_are_overlaid_and_keep_their_marks(run: Path, tmp_path: Path) -> None:
    other = plant(tmp_path / "other", method="at", results=[evaluation("other", method="at")])
    tree = read(write_report([run, other], output=tmp_path / "both.html", title="Two"))
    assert tree.one("h1").text == "Two"
    rows = cells(section(tree, "accuracies").all("table")[0])
    assert [row[0] for row in rows] == ["1 robust", "2 robust/natural", "3 other"]
    assert len(section(tree, "learning").all("figure")) == 4
    legend = [a.text for a in tree.one("ul", class_="legend").all("a")]
    assert legend == ["1 robust", "2 robust/natural", "3 other"]


def test_one_start_of_several_runs_is_shown_once(run: Path, tmp_path: Path) -> None:
    other = plant(tmp_path / "other", results=[evaluation("other")])
    plant(other / "natural", method="natural")
    tree = read(write_report([run, other], output=tmp_path / "both.html"))
    legend = [a.text for a in tree.one("ul", class_="legend").all("a")]
    assert legend == ["1 robust", "2 robust/natural", "3 other"]
    said = section(tree, "verdict").text
    assert said.count("Against the network it started from (robust/natural)") == 2


def test_a_natural_teacher_is_no_start(tmp_path: Path) -> None:
    taught = plant(
        tmp_path / "taught",
        method="hat",
        results=[evaluation("taught")],
        settings=["start=elsewhere"],
    )
    plant(taught / "natural", method="natural")
    tree = read(write_report(taught, output=tmp_path / "page.html"))
    assert "it started from" not in section(tree, "verdict").text


def test_what_was_measured_otherwise_stands_in_a_table_of_its_own(
    small: Path, tmp_path: Path
) -> None:
    other = plant(tmp_path / "other", robust=(), results=[evaluation("other", count=400)])
    accuracies = section(
        read(write_report([small, other], output=tmp_path / "both.html")), "accuracies"
    )
    tables = [t for t in accuracies.all("table") if "Accuracy in percent" in t.text]
    assert [len(cells(table)) for table in tables] == [1, 1]
    assert "Measured differently, so not to be compared" in accuracies.text
    assert "number of images 200 against 400" in accuracies.text


def test_result_files_go_to_the_run_they_are_of(tmp_path: Path) -> None:
    run = plant(tmp_path / "run")
    files = [
        write(tmp_path / "evaluation.json", evaluation("run")),
        write(tmp_path / "corruptions.json", corruptions("run")),
        write(tmp_path / "diagnosis.json", diagnosis("run")),
        write(tmp_path / "stranger.json", evaluation("run", 100, method="trades")),
    ]
    tree = read(write_report([run, *files], output=tmp_path / "page.html"))
    rows = cells(section(tree, "accuracies").all("table")[0])
    # A result of another method is of another network, whatever it is called.
    assert [(row[0], row[1]) for row in rows] == [("1 run", "cure"), ("2 run-2", "trades")]
    assert "fog" in section(tree, "corruptions").text
    assert "2 of 2 checks passed (of cure diagnose)" in section(tree, "verdict").text


def test_cifar10_is_set_beside_the_paper_and_nothing_else_is(tmp_path: Path) -> None:
    result = evaluation("run", data="cifar10", epsilon=(8 / 255, "8/255"))
    run = plant(tmp_path / "run", results=[result])
    drawn = section(read(write_report(run)), "trade-off")
    rows = {row[0]: row[1:] for row in cells(drawn.one("table"))}
    assert rows["CURE"] == ["the paper", "86.76", "49.69"]
    assert rows["1 run"][0] == "here"
    # ACT and ARD have no AutoAttack in the paper.
    assert "ACT" not in rows
    assert len(rows) == 9
    assert "Table 1" in drawn.text
    for other in ({"data": "svhn"}, {"epsilon": (4 / 255, "4/255")}):
        kept = {"data": "cifar10", "epsilon": (8 / 255, "8/255")} | other
        result = evaluation("x", **kept)
        again = plant(tmp_path / next(iter(other)), robust=(), results=[result])
        assert "the paper" not in section(read(write_report(again)), "trade-off").text


def test_many_runs(tmp_path: Path) -> None:
    runs = [plant(tmp_path / f"run{n}", results=[evaluation(f"run{n}", 100 + n)]) for n in range(9)]
    tree = read(write_report(runs, output=tmp_path / "many.html"))
    assert len(cells(section(tree, "accuracies").all("table")[0])) == 9
    # Numbers and names in figures are those of the list of networks.
    legend = [a.text for a in tree.one("ul", class_="legend").all("a")]
    assert legend == [f"{n + 1} run{n}" for n in range(9)]
    for name in ("trade-off", "learning"):
        drawn = [text.text for text in drawings(section(tree, name))[0].all("text")]
        assert {f"{n + 1} run{n}" for n in range(9)} <= set(drawn)
    assert len({tuple(style_of(n).values()) for n in range(40)}) == 40


# Damage, and names that mean harm.


def test_a_damaged_file_costs_a_sentence(run: Path) -> None:
    (run / "evaluations" / "best-test-9.json").write_text('{"format": "cure-evaluation-1"')
    write(run / "evaluations" / "best-test-8.json", {"format": "cure-evaluation-1"})
    write(run / "corruptions" / "best-test-7.json", {"groups": {"fog": 3}})
    (run / "timing.jsonl").write_bytes(b"\xff\xfe")
    (run / "environment.json").write_text("[]")
    tree = read(write_report(run))
    said = [li.text for li in section(tree, "verdict").one("div", class_="trouble").all("li")]
    assert len(said) == 5
    for name in ("best-test-9", "best-test-8", "best-test-7", "timing", "environment"):
        assert any(name in sentence for sentence in said), (name, said)
    # Where on this machine the run lies is nobody's business.
    assert str(run.parent) not in (run / "report.html").read_text()
    assert cells(section(tree, "accuracies").all("table")[0])[0][2].startswith("75.0")


def test_robust_overfitting_is_told_of_methods_that_can_have_it(tmp_path: Path) -> None:
    falling = [50.0] * 6 + [20.0] * 6
    robust = plant(tmp_path / "robust", robust=falling)
    natural = plant(tmp_path / "natural", method="natural", robust=[8.0, 1.0, 0.5])
    page = write_report([robust, natural], output=tmp_path / "page.html")
    said = section(read(page), "overfitting").text
    assert "robust: robust overfitting: robust accuracy on validation images is 20.0 %" in said
    assert "natural: best" not in said
    steady = plant(tmp_path / "steady", robust=[20.0] * 6 + [50.0] * 6)
    assert "robust overfitting:" not in section(read(write_report(steady)), "overfitting").text


def test_numbers_that_are_none_do_not_break_a_page(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", results=[evaluation("run")])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "train": {"loss": NaN}, "validation": {"robust": "high"}}\n')
        file.write('{"epoch": 5, "train": [], "validation": null}\n{"epoch": "six"}\n[1]\n{"ep')
    tree = read(write_report(run))
    assert cells(section(tree, "learning").all("table")[0])[0][1:] == ["2.000", "1.000", "0.667"]


def test_names_that_mean_harm_stay_words(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    runs = hostile_runs(tmp_path)
    title = "</title><script>window.hurt=1</script>"
    path = write_report(runs, output=tmp_path / "page.html", title=title)
    tree = read(path)
    assert [e.text[:12] for e in tree.all("script")] == ['"use strict"']
    for image in tree.all("img"):
        assert re.fullmatch(r"data:image/svg\+xml;base64,[A-Za-z0-9+/]+=*", image.attributes["src"])
    for svg in drawings(tree):
        assert svg.all("script") == []
        loaded = {
            e.attributes.get(k, "#") for e in svg.all() for k in ("href", "xlink:href", "src")
        }
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in loaded)
        assert not [k for e in svg.all() for k in e.attributes if k.startswith("on")]
    text = path.read_text(encoding="utf-8")
    assert "\u202e" not in text
    assert "\x00" not in text
    handlers = [(e.name, k) for e in tree.all() for k in e.attributes if k.startswith("on")]
    assert handlers == []
    for link in [e for e in tree.all() if "href" in e.attributes]:
        assert link.attributes["href"].startswith(("#", "data:,")), link.attributes
    # In drawings "$" is a letter, and nothing is taken out of them.
    assert r"$\frac$ _x" in section(tree, "learning").text
    assert "49" not in [tree.one("h1").text]
    assert "{{ 7 * 7 }}" in tree.one("details", id="trained-1").text
    assert tree.one("h1").text == title
    # A command is there to be copied, and a name must not become one.
    commands = [code.text for code in section(tree, "verdict").all("code")]
    assert "cure diagnose '<script>window.hurt=1<'" in commands
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_nothing_can_be_loaded_from_anywhere(tree: Element, written: Path) -> None:
    policy = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]
    rules = dict(rule.split(maxsplit=1) for rule in policy.attributes["content"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]+'", rules["script-src"])
    # Names of XML's dialects are no addresses that are fetched.
    found = set(re.findall(r"https?://[^\s\"'<>)]+", written.read_text()))
    assert found <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_page_that_would_be_too_large_says_what_it_leaves_out(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_report(small).stat().st_size
    before = len(read(small / "report.html").all("img"))
    monkeypatch.setattr(page_module, "LARGEST", page_module._FOR_WORDS + 25_000)
    tree = read(write_report(small))
    assert len(tree.all("img")) < before
    assert (small / "report.html").stat().st_size < whole
    said = section(tree, "verdict").text
    assert "Left out because the page would be too large" in said
    assert "Left out to keep the page below" in tree.one("main").text


# Files.


def test_a_place_for_no_page_is_one_sentence(small: Path) -> None:
    (small / "report.html").mkdir()
    with pytest.raises(CureError, match="was not made by `cure report` and is kept"):
        write_report(small)
    with pytest.raises(CureError, match=r"x\.html cannot be written .*; name another"):
        write_report(small, output=small / f"{'x' * 300}.html")
    with pytest.raises(CureError, match=r"x\.onnx cannot be written .*; name another"):
        cure.export(small, "onnx", small / f"{'x' * 300}.onnx")


def test_a_page_of_a_run_is_replaced_and_no_other_file_is(small: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in small.rglob("*") if p.is_file()}
    path = write_report(small)
    path.write_text(path.read_text() + "<!-- old -->")
    assert "<!-- old -->" not in write_report(small).read_text()
    assert {p: p.read_bytes() for p in small.rglob("*") if p.is_file() and p != path} == before
    given = tmp_path / "given.html"
    write_report(small, output=given)
    with pytest.raises(CureError, match="exists and is kept"):
        write_report(small, output=given)
    path.write_text("mine")
    with pytest.raises(CureError, match="was not made by `cure report` and is kept"):
        write_report(small)
    assert path.read_text() == "mine"


def test_the_verb_is_a_function_whatever_was_imported(small: Path) -> None:
    for _ in range(2):
        assert cure.write_report is page_module.write_report
    assert cure.write_report(cure.Run(small)) == small / "report.html"


def test_the_command_says_where_the_page_is(command: Command, small: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    ended = command("report", small, "--output", output, "--title", "A & B")
    assert (ended.status, ended.out) == (0, f"report: {output}\n")
    assert read(output).one("head").one("title").text == "A & B · cure report"


def test_what_cannot_be_a_page_is_refused(command: Command, small: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    strange = write(tmp_path / "strange.json", {"format": "other"})
    part = write(tmp_path / "part.json", {"format": "cure-diagnosis-1", "checks": 3})
    study = write(tmp_path / "study.json", {"format": STUDY_FORMAT, "study": "nothing"})
    for words, said in (
        ((tmp_path / "nowhere",), "does not exist"),
        ((tmp_path,), "holds no run"),
        ((small, small), "named twice"),
        ((broken,), "cannot be read as JSON"),
        ((strange,), "its format is 'other'"),
        ((part,), "is no whole result of `cure diagnose`"),
        ((study,), "unknown study 'nothing'"),
    ):
        refused(command("report", *words, "--output", page), said)
        assert not page.exists()
    lone = write(tmp_path / "lone.json", evaluation("lone"))
    refused(command("report", lone), "name it with --output")
    refused(command("report", small, "--output", tmp_path / "no" / "page.html"), "does not exist")
    (small / "config.yaml").write_text("{")
    refused(command("report", small, "--output", page), "holds no whole configuration")


def test_a_page_of_files_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "lone.json", evaluation("lone"))
    tree = read(write_report(file, output=tmp_path / "page.html"))
    assert "lone is right on 75.0 %" in section(tree, "verdict").text
    assert "only results" in section(tree, "trained").text


def test_pictures_stand_apart_from_curves_of_perturbations(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("minimal-perturbation-curve", "minimal-perturbation-images")
    panel = Panel([Series("a", [0.0, 1.0], [1.0, 2.0])])
    view = View("It.", [], [Chart(name, name, "It.", [panel]) for name in names])
    STUDIES.names()
    name = "minimal-perturbation"
    study = Study(name, "It", "It?", "cure", RunStudyOptions, lambda *_: {}, lambda _: view)
    monkeypatch.setitem(STUDIES._entries, name, study)
    # A file of version 0.1 has the name of that version.
    write(
        small / "studies" / "perturbation-1.json",
        {"format": STUDY_FORMAT, "study": "perturbation", "environment": {}},
    )
    tree = read(write_report(small))
    for place, shown in ((name, "curve"), ("pictures", "images")):
        titles = [svg.one("title").text for svg in drawings(section(tree, place))]
        assert titles == [f"{name}-{shown}"]


def test_nothing_is_green_where_no_robust_accuracy_is_left(tmp_path: Path) -> None:
    for name, right, green in (("broken", 0, False), ("robust", 60, True)):
        attacks = {"pgd20": right, "cw": right, "autoattack": right}
        result = evaluation(name, attacks=attacks)
        run = plant(tmp_path / name, results=[result, diagnosis(name)])
        said = section(read(write_report(run)), "verdict")
        assert bool(said.all("div", class_="tile pass")) is green
        assert bool(said.all("div", class_="tile fail")) is not green
        assert ("is not robust" in said.text) is not green


def test_the_points_that_a_network_was_chosen_from(small: Path) -> None:
    def point(natural: float, robust: float, *shares: float) -> dict[str, Any]:
        intervals = {"natural_interval": wilson(80, 100), "robust_interval": wilson(30, 100)}
        found = {"shares": shares, "natural": natural, "robust": robust, "n": 100}
        return found | {key: list(value) for key, value in intervals.items()}

    chosen = point(81.25, 40.5, 0.25, 0.75)
    record = {
        "ends": ["natural start", "at"],
        "steps": 10,
        "points": [point(90.0, 0.0, 1.0, 0.0), chosen, point(70.0, 45.0, 0.0, 1.0)],
        "barriers": ["barrier: natural accuracy is 60.0 % at shares 0.50, 0.50"],
        "chosen": chosen,
        "met": False,
    }
    before = read(write_report(small))
    assert "mixed after training" not in section(before, "trade-off").text
    write(small / "tradeoff.json", record)
    told = section(read(write_report(small)), "trade-off")
    for words in ("from the weights of natural start, at", "No point meets", "at shares 0.50"):
        assert words in told.text
    assert "0.25 natural start, 0.75 at" in told.text
    assert len(drawings(told)) == len(drawings(section(before, "trade-off"))) + 1
    (small / "tradeoff.json").write_text('{"ends": 3}')
    assert "tradeoff.json" in read(write_report(small)).text
