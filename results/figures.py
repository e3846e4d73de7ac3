"""Tables and curves from the records of results/, into files that the README and docs quote.

Run after `make mini`, `make table` or `make ablation`. Every figure is in a record:
`records.jsonl` of a plan (`cure table` writes it), or the JSON file of a command, in one line.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from cure.analysis.study import find_study
from cure.experiments.compare import table
from cure.experiments.compare.rows import Source, rows_of
from cure.experiments.pareto import hypervolume
from cure.runs.packed import read_packed
from cure.runs.results import FrontEstimate, FrontPoint, FrontRecord
from cure.utils.io import write_json
from cure.utils.stats import student_t

HERE = Path(__file__).parent
MINI = HERE / "cifar10-mini-cure"
COMPARED = HERE.parent / "docs" / "methods-compared.md"
FRONTS = HERE / "photos" / "fronts.json"
IN_README = ("cifar10-mini", ["natural", "pgd20", "cw", "autoattack", "nrr_cw"])
NAMES = {"natural": "natural start", "cure": "CURE"}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def cell(part: dict[str, Any]) -> str:
    low, high = part["interval"]
    return f"{part['accuracy']:.1f} ({low:.1f} to {high:.1f})"


def made_on(result: dict[str, Any]) -> str:
    """The machine and the version of PyTorch of a result, as a sentence."""
    machine = result["environment"]
    return f"{machine['processor']}, torch {machine['packages']['torch']}."


def seeds() -> list[int]:
    return sorted(int(p.name[4:].split("-")[0]) for p in MINI.glob("seed*-cure.json"))


def mini_table() -> str:
    """One row a model and seed: accuracy in percent with its Wilson 95 % interval."""
    lines = [
        "| model | seed | natural | PGD-20 | C&W | NRR (C&W) | AutoAttack, first 500 |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in seeds():
        for part, name in NAMES.items():
            whole = read(MINI / f"seed{seed}-{part}.json")
            first = read(MINI / f"seed{seed}-{part}-autoattack.json")
            attacks = whole["attacks"]
            lines.append(
                f"| {name} | {seed} | {cell(whole['natural'])} | {cell(attacks['pgd20'])} "
                f"| {cell(attacks['cw'])} | {whole['nrr']['cw']:.1f} "
                f"| {cell(first['attacks']['autoattack'])} |"
            )
    return "\n".join(lines)


def mini_conditions() -> str:
    """n, hardware and versions, from the files."""
    seed = seeds()[0]
    result = read(MINI / f"seed{seed}-cure.json")
    environment = result["environment"]
    times = [row for row in mini_epochs() if row["seed"] == str(seed)]
    minutes = sum(float(row["seconds"]) + float(row["validation_seconds"]) for row in times) / 60
    return (
        f"{result['data']['name']} test, n = {result['data']['n']:,} images (AutoAttack: the first "
        f"500), {result['threat']['norm']} ε = {result['threat']['epsilon_text']}, "
        f"{len(seeds())} seed{'s' if len(seeds()) > 1 else ''}, Wilson 95 % intervals; "
        f"training took {minutes:.0f} minutes for seed {seed} on {environment['cores']} cores "
        f"({environment['processor']}), torch {environment['packages']['torch']}, "
        f"Python {environment['python']}."
    )


def mini_epochs() -> list[dict[str, str]]:
    """The epochs of all seeds: accuracies on validation images and seconds."""
    with (MINI / "curves.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mini_curves(target: Path) -> None:
    """Validation accuracy over epochs, natural start and CURE, all seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "cure"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (part, name) in zip(axes, NAMES.items(), strict=True):
        for seed in seeds():
            rows = [r for r in mini_epochs() if (r["seed"], r["part"]) == (str(seed), part)]
            for key, style in (("natural", "-o"), ("robust", "--s")):
                points = [(int(r["epoch"]), float(r[key])) for r in rows if r[key]]
                label = f"{key}, seed {seed}"
                axis.plot(*zip(*points, strict=True), style, markersize=3, label=label)
        axis.set(title=name, xlabel="epoch", ylim=(0, 100))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("accuracy on 1,000 validation images, %")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


STEPS = {
    "yardstick": "straightforward CURE",
    "exact": "CURE, exact (float32)",
    "bf16_attack": "CURE, attack in bfloat16",
    "bf16": "CURE, all in bfloat16",
    "trades": "TRADES, exact (float32)",
}


def bench() -> str:
    """What a step costs, of each network: `make bench`."""
    result = read(HERE / "bench" / "cpu.json")
    lines = [
        "| network | step | images/s | ratio (range) | of the ceiling | peak MiB (ratio) "
        "| passes | gradient error | mask agrees | climbs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in result["nets"].values():
        sides, net = found["sides"], found["net"]
        base = sides["yardstick"]["peak_memory_mib"]
        for name, title in STEPS.items():
            row, (low, high) = sides[name], sides[name]["ratio_range"]
            passes = row["passes"]
            error = row.get("error")
            tail = (
                f"{error['largest']:.1e} | {100 * error['mask']:.1f} % | {error['climb']:.2f}"
                if error
                else " | | "
            )
            lines.append(
                f"| {net['model']}, batch {net['batch']} | {title} | "
                f"{row['images_per_second']:.1f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | "
                f"{100 * row['share_of_ceiling']:.0f} % | {row['peak_memory_mib']:.0f} "
                f"({row['peak_memory_mib'] / base:.2f}) | {passes['forward']}+{passes['backward']} "
                f"(+{passes['revision']}) | {tail} |"
            )
    machine, ceiling = result["machine"], result["ceilings_gflops"]
    lines += [
        "",
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, Python "
        f"{machine['python']}; {result['repetitions']} rounds, median of the ratios of a round. "
        "Ceiling: matrix products of side 2,048 (a convolution that needs fewer operations than "
        f"are counted can exceed it), {ceiling['fp32']:.0f} GFLOP/s in float32 and "
        f"{ceiling['bf16']:.0f} in bfloat16. Passes: forward + backward (+ forward of the revision "
        "model). Gradient error: largest relative L2 error over the tensors, before the mask, at "
        "the same adversarial images. Climbs: divergence that the attack reaches, of what the "
        "straightforward one reaches.",
    ]
    for name, found in result["nets"].items():
        shares = found["sides"]["exact"]["time_by_operation"]
        parts = found["sides"]["exact"]["parts"]
        whole = sum(parts.values())
        lines += [
            "",
            f"Where an exact step's time goes, {name}: "
            + ", ".join(f"{part} {100 * spent / whole:.0f} %" for part, spent in parts.items())
            + "; by operation: "
            + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())
            + ".",
        ]
    for what, several in result["growth"].items():
        lines += ["", f"Images a second by {what} (exact / attack in bfloat16):"]
        for row in several:
            net, speed = row["net"], row["images_per_second"]
            lines.append(
                f"- {net['model']} of width {net['options']['width']}, batch {net['batch']}: "
                f"{speed['exact']:.0f} / {speed['bf16_attack']:.0f}"
            )
    return "\n".join(lines) + "\n"


FEW = {
    "short": "36 epochs, CutMix: the recipe before `training.min_steps`",
    "slow": "the same with a quarter of the learning rate",
    "long": "120 epochs, CutMix",
    "recipe": "the recipe",
}
"""Rows of `photos/few.json` in words."""


def few() -> str:
    """The recipe photos with few photographs: `benchmarks/few_photos.py`."""
    result = read(HERE / "photos" / "few.json")
    lines = [
        "| run | steps | natural, start | natural | pgd20 |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row[name]:.1f} ({'-'.join(f'{end:.1f}' for end in row[f'{name}_interval'])})"
            for name in ("start_natural", "natural", "pgd20")
        ]
        lines.append(f"| {FEW[row['row']]} | {row['steps']:,} | {' | '.join(cells)} |")
    first = result["rows"][0]
    lines += [
        "",
        f"{first['per_class']} training photographs of each of ten classes, 64 pixels, threat "
        f"4/255. Percent of {first['n']} other photographs of the training split that are right, "
        f"with the 95 % interval over photographs; seed {first['seed']} alone. {made_on(result)}",
    ]
    return "\n".join(lines) + "\n"


def speed_log() -> str:
    """What was tried for the speedrun: `benchmarks/speedrun.py --validation`."""
    lines = (HERE / "speedrun" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    usual = read(HERE / "speedrun" / "cpu.json")["settings"]
    shown = [
        "| changed | epochs | natural | pgd20 | cw | worst case | to the first row |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        changes = [
            f"`{name}={json.dumps(value)}`"
            for name, value in row["settings"].items()
            if value != usual[name]
        ]
        low, high = row["interval"]
        more = "" if row is rows[0] else f"{row['worst_case'] - rows[0]['worst_case']:+.1f}"
        shown.append(
            f"| {', '.join(changes) or 'nothing'} | {row['epochs']:.2f} | {row['natural']:.1f} "
            f"| {row['pgd20']:.1f} | {row['cw']:.1f} | {row['worst_case']:.1f} "
            f"({low:.1f}-{high:.1f}) | {more} |"
        )
    first = rows[0]
    shown += [
        "",
        f"{first['minutes']:g} minutes of processor time on {first['threads']} thread, seed "
        f"{first['seeds'][0]}; percent of {first['n']:,} training images that are not trained on, "
        f"`worst case` with its 95 % interval over images. {made_on(first)}",
    ]
    return "\n".join(shown) + "\n"


def screened() -> str:
    """AutoAttack by its package and `--attacks screened`, in turn: `benchmarks/screened.py`."""
    result = read(HERE / "bench" / "screened.json")
    lines = [
        "| network | kind | left by the package | left by screened | processor seconds | ratio "
        "| broken by the package alone | by screened alone |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["networks"].items():
        left = [f"{row['accuracy'][side]:.1f}" for side in ("package", "screened")]
        spent = [row["seconds"][side]["processor"] for side in ("package", "screened")]
        lines.append(
            f"| {name.split(' ', 1)[1]} | {row['kind']} | {' | '.join(left)} "
            f"| {spent[0]:.1f} and {spent[1]:.1f} | {spent[0] / spent[1]:.2f} "
            f"| {len(row['only_package_breaks'])} | {len(row['only_screened_breaks'])} |"
        )
    medians = {
        "robust": result["ratio_processor"],
        "fragile": result["ratio_fragile_processor"],
    }
    said = ", ".join(f"{v:.2f} over the {k} ones" for k, v in medians.items() if v is not None)
    lines += [
        "",
        f"Percent of the first {result['n']} {result['split']} images that are right, one thread, "
        f"seed {result['seeds'][0]}; both sides in turn in one process. Median ratio: {said}. "
        f"{made_on(result)}",
    ]
    return "\n".join(lines) + "\n"


def copies() -> str:
    """Copies of held-out photographs that each search finds: `benchmarks/leaks.py`."""
    result = read(HERE / "bench" / "leaks.json")
    lines = ["| changed | found by pixels | by features |", "|---|---:|---:|"]
    for change, found in result["changes"].items():
        told = [
            "{} ({:.0f} to {:.0f})".format(part["found"], *part["interval"])
            for part in (found["pixels"], found["features"])
        ]
        lines.append(f"| {change} | {' | '.join(told)} |")
    lines += [
        "",
        f"Of {result['copies']} copies of test photographs at {result['pixels']} pixels, among "
        f"{result['held']} held-out ones, in percent with the 95 % interval; "
        f"{100 * result['usual']:.1f} % of {result['training']:,} training photographs are suspect "
        f"by their features. {made_on(result)}",
    ]
    return "\n".join(lines) + "\n"


def overfitted(name: str) -> str:
    """Best minus last robust accuracy of each method: `benchmarks/robust_overfitting.py`."""
    result = read(HERE / "robust_overfitting" / f"{name}.json")
    # Kept since a later version of the script.
    natural = "natural" in result["rows"][0]
    lines = [
        "| method | seeds | training images, last | best epochs | best | last | best - last |"
        + " natural, best |" * natural,
        "|---|---:|---:|---|---:|---:|---:|" + "---:|" * natural,
    ]
    for method, mean in result["means"].items():
        rows = [row for row in result["rows"] if row["method"] == method]
        train = fmean(row["curve"][-1]["train"] for row in rows)
        best, last = (fmean(row[key] for row in rows) for key in ("best", "last"))
        epochs = ", ".join(str(row["best_epoch"]) for row in rows)
        lines.append(
            f"| {method} | {len(rows)} | {train:.1f} | {epochs} | {best:.1f} | {last:.1f} "
            f"| {mean['best_minus_last']:+.1f}{between(mean['interval'])} |"
            + (f" {fmean(row['natural'] for row in rows):.1f} |" if natural else "")
        )
    n = result["rows"][0]["n"]
    lines += [
        "",
        f"Robust accuracy in percent under PGD-20 on {n} test images, means over seeds, the last "
        "column with the Student interval over seeds; `training images`: under the training "
        f"attack. {made_on(result)}",
    ]
    return "\n".join(lines) + "\n"


def parts_of_cure(name: str) -> str:
    """Each variant of CURE against the paper's form: `benchmarks/why_cure.py`."""
    result = read(HERE / "why_cure" / f"{name}.json")
    rows = [row for row in result["rows"] if row["variant"] == "paper"]
    means = [fmean(row[key] for row in rows) for key in ("natural", "pgd20")]
    lines = [
        "| variant | seeds | natural | over seeds | PGD-20 | over seeds |",
        "|---|---:|---:|---|---:|---|",
        f"| paper (accuracy) | {len(rows)} | {means[0]:.1f} | | {means[1]:.1f} | |",
    ]
    for variant, found in result["minus_paper"].items():
        cells = [
            f"{found[key]['difference']:+.1f}{between(found[key]['images'])} "
            f"| {between(found[key]['seeds']).strip(' ()')}"
            for key in ("natural", "pgd20")
        ]
        lines.append(f"| {variant} | {found['seeds']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Differences in percentage points on {rows[0]['n']} test images, paired by seed and "
        "image, with 95 % bootstrap intervals over images; beside them Student intervals over "
        f"seeds. {made_on(result)}",
    ]
    return "\n".join(lines) + "\n"


def extra_images(name: str) -> str:
    """What extra images buy that are made here: `benchmarks/extra_data.py`."""
    result = read(HERE / "extra_data" / f"{name}.json")
    lines = ["| images | seeds | natural | PGD-20 |", "|---|---:|---:|---:|"]
    for label in ("without", "with"):
        rows = [row for row in result["rows"] if row["row"] == label]
        means = [f"{fmean(row[key] for row in rows):.1f}" for key in ("natural", "pgd20")]
        lines.append(f"| {label} | {len(rows)} | {' | '.join(means)} |")
    change = result["with_minus_without"]
    cells = [
        f"{change[key]['mean']:+.1f}{between(change[key]['interval'])}"
        for key in ("natural", "pgd20")
    ]
    lines += [
        f"| with - without | {change['natural']['seeds']} | {' | '.join(cells)} |",
        "",
        f"Accuracy in percent on {result['rows'][0]['n']} test images, means over seeds; in "
        f"brackets the Student interval over seeds. {made_on(result)}",
    ]
    return "\n".join(lines) + "\n"


def between(interval: list[float] | None) -> str:
    """An interval of differences in brackets; empty for none."""
    return "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"


def evaluations() -> str:
    """The whole evaluation of several networks: `results/run_evaluation.sh`."""
    folder = HERE / "evaluation"
    suites = {p.name.removesuffix("-suite.json"): read(p) for p in folder.glob("*-suite.json")}
    if not suites:
        return "Not measured yet.\n"
    order = [name for name in ("natural", "at", "cure", "resnet18") if name in suites]
    attacks = dict.fromkeys(name for key in order for name in suites[key]["attacks"])
    heads = [f"{name} (n = {suites[name]['data']['n']})" for name in order]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(order)]
    lines.append("| natural | " + " | ".join(cell(suites[k]["natural"]) for k in order) + " |")
    for attack in attacks:
        parts = [suites[key]["attacks"].get(attack) for key in order]
        cells = " | ".join(cell(part) if part else "-" for part in parts)
        lines.append(f"| {attack} | {cells} |")
    lines.append(
        "| worst case | " + " | ".join(cell(suites[key]["worst_case"]) for key in order) + " |"
    )
    for attack in ("fmn", "deepfool"):
        parts = [suites[key]["attacks"].get(attack) for key in order]
        cells = " | ".join(
            f"{255 * part['median_distance']:.2f}/255" if part else "-" for part in parts
        )
        lines.append(f"| median smallest change, {attack} | {cells} |")
    for key in order:
        points = suites[key]["curve"]["points"]
        curve = ", ".join(f"{p['epsilon_text']}: {p['accuracy']:.1f}" for p in points)
        lines += ["", f"PGD-20 over epsilon, {key}: {curve}."]
    lines.append("")
    for key in order:
        diagnosis = folder / f"{key}-diagnosis.json"
        if diagnosis.exists():
            found = read(diagnosis)
            odd = [c["name"] for c in found["checks"] if c["status"] != "pass"]
            lines.append(
                f"- `cure diagnose`, {key}: {found['verdict']}, {len(found['checks'])} checks on "
                f"{found['n']} images" + (f"; not passed: {', '.join(odd)}" if odd else "")
            )
    corrupted = [key for key in order if (folder / f"{key}-corruptions.json").exists()]
    if corrupted:
        results = {key: read(folder / f"{key}-corruptions.json") for key in corrupted}
        lines += ["", "| corruptions | " + " | ".join(corrupted) + " |"]
        lines.append("|---|" + "---|" * len(corrupted))
        for name, part in results[corrupted[0]]["corruptions"].items():
            at = [results[key]["corruptions"].get(name) for key in corrupted]
            at3 = [f"{p['severities']['3']['accuracy']:.1f}" if p else "-" for p in at]
            lines.append(f"| {name}, severity 3 ({part['group']}) | " + " | ".join(at3) + " |")
        for kind in ("benchmark", "all", "cure"):
            means = [results[key]["means"].get(kind) for key in corrupted]
            shown = [f"{m['accuracy']:.1f}" if m else "-" for m in means]
            titles = {
                "benchmark": "mean of the 15",
                "all": "mean of all 19",
                "cure": "CURE's 17, severity 3",
            }
            lines.append(f"| {titles[kind]} | " + " | ".join(shown) + " |")
        counts = ", ".join(f"{key} {results[key]['data']['n']}" for key in corrupted)
        lines += ["", f"Images: {counts}; the means are over severities 1 to 5."]
    agreement = folder / "agreement.json"
    if agreement.exists():
        found = read(agreement)
        lines += [
            "",
            "| verdicts alike? | library | " + " | ".join(m["run"] for m in found["models"]) + " |",
            "|---|---|" + "---|" * len(found["models"]),
        ]
        for number, row in enumerate(found["models"][0]["rows"]):
            cells = []
            for model in found["models"]:
                r = model["rows"][number]
                cells.append(f"{r['ours']} / {r['theirs']}, {r['differ']} differ")
            lines.append(f"| {row['attack']} | {row['library']} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "Images of 500 that withstand ours / theirs, and on how many verdicts differ.",
        ]
    return "\n".join(lines) + "\n"


STUDIES_DOCUMENT = HERE.parent / "docs" / "studies.md"


def studies() -> list[str]:
    """Names of the studies whose result is there."""
    return sorted(path.stem for path in (HERE / "studies").glob("*.json"))


def study(name: str) -> str:
    """The first table and the finding of a study: `results/run_studies.sh`."""
    result = read(HERE / "studies" / f"{name}.json")
    view = find_study(result["study"]).view(result)
    machine = result["environment"]
    (first, title), *others = [
        (f"../results/studies/{_drawing(name, result, figure.name)}", figure.title)
        for figure in view.figures
    ]
    lines = [
        *(view.markdown(), ""),
        f"{machine['processor']}, {machine['threads']} thread(s), torch "
        f"{machine['packages']['torch']}, Python {machine['python']}.",
        *("", f"![{title}]({first})"),
    ]
    if others:
        lines += ["", " · ".join(f"[{title}]({path})" for path, title in others)]
    return "\n".join(lines) + "\n"


def _drawing(name: str, result: dict[str, Any], figure: str) -> str:
    return f"{name}{figure.removeprefix(find_study(result['study']).name)}.svg"


def draw_study(name: str) -> None:
    """Draw the figures of a study again from its result."""
    result = read(HERE / "studies" / f"{name}.json")
    for picture in find_study(result["study"]).view(result).pictures():
        path = HERE / "studies" / _drawing(name, result, picture.name)
        path.write_text(picture.svg, encoding="utf-8")


def comparison(folder: str, columns: list[str]) -> str:
    """The table of a plan with some of its columns, and its caption."""
    records = read_packed(HERE / folder / "records.jsonl")
    rows = rows_of([Source.of_record(record, name, name) for name, record in records.items()])
    return table(rows, columns).markdown()


def photos() -> str:
    """The recipe photos: `benchmarks/photos.py`, means over seeds."""
    result = read(HERE / "photos" / "table.json")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    networks = list(dict.fromkeys(row["network"] for row in result["rows"]))
    for row in sorted(result["rows"], key=lambda row: networks.index(row["network"])):
        groups.setdefault((row["network"], row["method"]), []).append(row)
    lines = [
        "| network | method | seeds | epochs | natural | pgd20 | autoattack | processor minutes |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (network, method), rows in groups.items():
        settings = rows[0]["settings"]
        epochs = settings.get("training.epochs", settings.get("epochs", "-"))
        cells = [photo_cell(rows, column) for column in ("natural", "pgd20", "autoattack")]
        minutes = fmean(row.get("processor_minutes", 0.0) for row in rows)
        lines.append(
            f"| {network} | {method} | {len(rows)} | {epochs} | {' | '.join(cells)} "
            f"| {minutes:.0f} |"
        )
    first = result["rows"][0]
    processors = sorted({row["processor"]["processor"] for row in result["rows"]})
    attacked = {row["autoattack_n"] for row in result["rows"] if row["autoattack"] is not None}
    counts = ", ".join(map(str, sorted(attacked)))
    seeds = sorted({row["seed"] for row in result["rows"] if row["autoattack"] is not None})
    of = f"of seed {', '.join(map(str, seeds))} alone, first {counts} photos"
    strong = f"after four strong attacks in turn ({of})" if attacked else "not run"
    lines += [
        "",
        f"Percent of {first['pgd20_n']} test photos that are right. One seed: 95 % interval over "
        "photos, which says nothing about the spread between seeds; several: mean with the Student "
        "interval over seeds. "
        "`natural`: unchanged photos; `pgd20`: after a 20-step attack that changes each value of a "
        f"pixel by at most 4/255; `autoattack`: {strong}. "
        "`processor minutes` of training, of all threads, on machines with other work "
        f"({', '.join(processors)}); with nothing else running they are fewer. The method "
        "`natural` is the start of the others, `plain` a plain loop of 50 lines without CutMix.",
    ]
    return "\n".join(lines) + "\n"


def photo_cell(rows: list[dict[str, Any]], column: str) -> str:
    """The mean accuracy of a method's rows, with an interval over photos (one seed) or seeds."""
    known = [row for row in rows if row[column] is not None]
    if not known:
        return "-"
    values = [row[column] for row in known]
    if len(known) > 1:
        low, high = student_t(values)
        low = max(0.0, low)
    else:
        low, high = known[0][f"{column}_interval"]
    return f"{fmean(values):.1f} ({low:.1f}-{high:.1f})"


BULK = {"classes", "distance_curve", "passes"}
"""Keys of results that no table and no picture needs."""


def small(value: Any) -> Any:
    """The same value without :data:`BULK`."""
    if isinstance(value, dict):
        return {key: small(inner) for key, inner in value.items() if key not in BULK}
    return [small(inner) for inner in value] if isinstance(value, list) else value


def compact() -> None:
    """Write every JSON file of results/ in one line, results of evaluations without bulk."""
    for path in HERE.rglob("*.json"):
        content = read(path)
        of_evaluation = content.get("format") == "cure-evaluation-1"
        write_json(path, small(content) if of_evaluation else content, compact=True)


def headline() -> str:
    """Three sentences for the README on the fronts: what is covered, the balance, what to take."""
    record = FrontRecord.read(FRONTS)
    areas, best = areas_of(record), balanced(record)
    first, second = list(areas)[:2]
    mean, low, high = ahead_of(record, first, second)
    lines = [
        f"- **Most of both**: `{first}` covers {over_seeds(areas[first])} of the area between 0 "
        f"and 100 % of both accuracies, `{second}` {over_seeds(areas[second])}, "
        f"{len(areas) - 2} others less. The difference is {mean:.1f} ({low:.1f} to {high:.1f})"
        + (", so these trainings do not rank the two." if low <= 0 else "."),
        "- **The best balance**: "
        + "; ".join(
            f"{setting(record, p)}, {over_seeds(p.natural)} of the unchanged and "
            f"{over_seeds(p.robust)} of the attacked photos right"
            for p in best[:2]
        )
        + (". The intervals overlap." if overlap(*best[:2]) else "."),
        f"- **What to take**: {taken(record, best[0])}",
    ]
    return "\n".join([*lines, "", conditions(record, over_photos=False)]) + "\n"


def fronts() -> str:
    """All about the fronts on photographs: what is reached, by which method, what to take."""
    record = FrontRecord.read(FRONTS)
    areas, best = areas_of(record), balanced(record)
    tried = Counter(point.curve for point in record.points)

    def said(label: str) -> str:
        own = len(record.curves[label].seeds)
        fewer = "" if own == seeds_of(record) else f" and {own} seed{'s' * (own > 1)}"
        return f"`{label}` {span(areas[label])} with {tried[label]} values{fewer}"

    lines = [
        "- **Most of both**: percent of the area between 0 and 100 % of both accuracies that a "
        f"method's points cover: {', '.join(map(said, areas))}. More values can only raise it."
    ]
    if seeds_of(record) > 1:
        lines.append(paired(record, *list(areas)[:2]))
    for each in record.comparisons:
        reached = {label: value for label, value in each.natural.items() if value is not None}
        words = ", ".join(
            f"`{label}` {span(reached[label])}"
            for label in sorted(reached, key=lambda label: -reached[label].mean)
        )
        lines.append(
            f"- **At an equal robust accuracy** of {each.robust:g} %, natural accuracy is {words}."
        )
    words = "; ".join(f"{setting(record, p)} {span(p.natural)} and {span(p.robust)}" for p in best)
    lines += [
        f"- **The best balance of a method** (harmonic mean), natural and robust: {words}.",
        f"- **What to take**: {taken(record, best[0])} The best balance was chosen on the photos "
        "that its figures are of, so these are a little high.",
    ]
    alike = [f"`{p.curve}`" for p in best[1:] if overlap(best[0], p)]
    if alike:
        lines[-1] += (
            f" Its intervals overlap with those of {', '.join(alike)}: "
            f"{counted_seeds(record)} on {record.data.n:,} photos cannot tell them apart."
        )
    return "\n".join([*lines, "", conditions(record)]) + "\n"


def seeds_of(record: FrontRecord) -> int:
    """The largest number of seeds of a method."""
    return max(len(curve.seeds) for curve in record.curves.values())


def counted_seeds(record: FrontRecord) -> str:
    return "one seed" if seeds_of(record) == 1 else f"{seeds_of(record)} seeds"


def is_complete(record: FrontRecord, label: str) -> bool:
    """Whether a method has as many seeds as any."""
    return len(record.curves[label].seeds) == seeds_of(record)


def areas_of(record: FrontRecord) -> dict[str, FrontEstimate]:
    """Percent of the area that the points of each method cover, the largest first."""
    found = {
        label: curve.hypervolume
        for label, curve in record.curves.items()
        if curve.hypervolume is not None and curve.knob is not None
    }
    order = sorted(found, key=lambda label: (not is_complete(record, label), -found[label].mean))
    return {label: found[label] for label in order}


def balanced(record: FrontRecord) -> list[FrontPoint]:
    """The point of each method with the best harmonic mean, the best first."""
    found: dict[str, FrontPoint] = {}
    for point in record.points:
        if record.curves[point.curve].knob is not None:
            found[point.curve] = max(found.get(point.curve, point), point, key=balance)
    return sorted(found.values(), key=lambda p: (not is_complete(record, p.curve), -balance(p)))


def taken(record: FrontRecord, best: FrontPoint) -> str:
    """Which recipe the best balance leads to."""
    if best.curve != "cure":
        return f"{setting(record, best)}, so `cure train photos method={best.curve}`."
    return (
        f"{setting(record, best)}. The recipe `photos` is this method, with `gamma` 1, for larger "
        "photos and more epochs; `cure tradeoff` moves its network towards more natural accuracy "
        "afterwards."
    )


def conditions(record: FrontRecord, *, over_photos: bool = True) -> str:
    """Number of seeds and photos, threat, intervals and settings of the fronts."""
    runs = read_packed(FRONTS.parent / "fronts" / "records.jsonl").values()
    made = {run.environment.processor for run in runs if run.environment is not None}
    kinds = []
    if over_photos:
        kinds.append("bootstrap intervals over photos")
    if seeds_of(record) > 1:
        kinds.append("Student intervals over the seeds")
    return (
        f"{counted_seeds(record).capitalize()}, {record.data.n:,} test photos, `{record.attack}` "
        f"within {record.threat.norm} {record.threat.epsilon_text}; in brackets 95 % "
        f"{', then '.join(kinds)}. Settings: recipe `{record.recipe}`, "
        + ", ".join(f"`{key}={value}`" for key, value in record.settings.items() if key in SAID)
        + f"; {', '.join(sorted(filter(None, made)))}, cure {record.environment.cure}."
    )


SAID = ("data.resize", "training.epochs", "data.augment.cutmix")
"""Settings of a front that the README names."""


def ahead_of(record: FrontRecord, first: str, second: str) -> tuple[float, float, float]:
    """How far one method's area is ahead of another's, seed by seed: mean and Student interval."""
    ahead = []
    for seed in sorted({*record.curves[first].seeds} & {*record.curves[second].seeds}):
        one, other = (
            hypervolume(
                [
                    (row.natural, row.content()[record.attack])
                    for row in record.rows
                    if (row.method, row.knob, row.seed) == (curve.method, curve.knob, seed)
                ],
                (record.reference[0], record.reference[1]),
            )
            for curve in (record.curves[first], record.curves[second])
        )
        ahead.append(one - other)
    return (fmean(ahead), *student_t(ahead))


def paired(record: FrontRecord, first: str, second: str) -> str:
    """Whether one method's area is ahead of another's."""
    mean, low, high = ahead_of(record, first, second)
    return (
        f"- **Between trainings**: `{first}` is {mean:.1f} ({low:.1f} to {high:.1f}) ahead "
        f"of `{second}` (Student interval over {seeds_of(record)} seeds, paired), so "
        + ("these trainings do not rank the two." if low <= 0 else "it is the better of the two.")
    )


def balance(point: FrontPoint) -> float:
    """Harmonic mean of natural and robust accuracy, 0 where one of them is 0."""
    pair = (point.natural.mean, point.robust.mean)
    return harmonic_mean(pair) if all(pair) else 0.0


def overlap(one: FrontPoint, other: FrontPoint) -> bool:
    """Whether the intervals of two points, over images or seeds, overlap in both accuracies."""

    def hull(value: FrontEstimate) -> tuple[float, float]:
        kinds = [value.images, *([] if value.seeds is None else [value.seeds])]
        return min(low for low, _ in kinds), max(high for _, high in kinds)

    pairs = ((one.natural, other.natural), (one.robust, other.robust))
    ends = [(hull(a), hull(b)) for a, b in pairs]
    return all(a[0] <= b[1] and b[0] <= a[1] for a, b in ends)


def setting(record: FrontRecord, point: FrontPoint) -> str:
    """A point's method with the value of its setting."""
    return f"`{point.curve}` with `{record.curves[point.curve].knob}` {point.value}"


def span(value: FrontEstimate) -> str:
    """A mean with its intervals: over images, and over seeds where there are several."""
    kinds = [value.images, *([] if value.seeds is None else [value.seeds])]
    return f"{value.mean:.1f} ({'; '.join(f'{low:.1f} to {high:.1f}' for low, high in kinds)})"


def over_seeds(value: FrontEstimate) -> str:
    """A mean with its interval over seeds; over images where there is one seed."""
    low, high = value.images if value.seeds is None else value.seeds
    return f"{value.mean:.1f} % ({low:.1f} to {high:.1f})"


def insert(document: Path, mark: str, text: str) -> None:
    """Put the text between the document's mark and the next end."""
    whole = document.read_text(encoding="utf-8")
    before, rest = whole.split(f"{mark} -->\n", 1)
    _, after = rest.split("<!-- end -->", 1)
    document.write_text(f"{before}{mark} -->\n{text}<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    compact()
    mini_curves(MINI / "curves.svg")
    mini = f"{mini_table()}\n\n{mini_conditions()}\n"
    (MINI / "table.md").write_text(mini, encoding="utf-8")
    insert(HERE / "README.md", "cifar10-mini-cure/table.md", mini)
    insert(COMPARED, "results/cifar10-mini/records.jsonl", comparison(*IN_README))
    insert(HERE.parent / "README.md", "results/photos/fronts.json", headline())
    insert(HERE / "README.md", "photos/fronts.json", fronts())
    insert(HERE.parent / "README.md", "results/photos/table.json", photos())
    insert(HERE / "README.md", "photos/table.json", photos())
    insert(HERE / "README.md", "photos/few.json", few())
    insert(HERE / "README.md", "speedrun/log.jsonl", speed_log())
    insert(HERE / "README.md", "bench/cpu.json", bench())
    insert(HERE / "README.md", "bench/screened.json", screened())
    insert(HERE / "README.md", "bench/leaks.json", copies())
    for name in ("digits", "photos"):
        insert(HERE / "README.md", f"robust_overfitting/{name}.json", overfitted(name))
    for name in ("digits", "cifar10-mini"):
        insert(HERE / "README.md", f"why_cure/{name}.json", parts_of_cure(name))
    insert(HERE / "README.md", "extra_data/digits.json", extra_images("digits"))
    insert(HERE / "README.md", "evaluation", evaluations())
    for name in studies():
        draw_study(name)
        insert(STUDIES_DOCUMENT, f"results/studies/{name}.json", study(name))
    for folder in ("cifar10-mini", "ablation", "ablation-digits", "precision"):
        whole = (HERE / folder / "table.md").read_text(encoding="utf-8")
        insert(HERE / "README.md", f"{folder}/table.md", whole)
