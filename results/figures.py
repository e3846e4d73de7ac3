"""Tables and curves from the JSON of results/, into files that the README and docs quote.

Run after `make mini`, `make table` or `make ablation`; it computes nothing that is not in the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cure.comparison import table

HERE = Path(__file__).parent
MINI = HERE / "cifar10-mini-cure"
IN_README = ("cifar10-mini", ["natural", "pgd20", "cw", "autoattack", "nrr_cw"])
NAMES = {"natural": "natural start", "cure": "CURE"}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def cell(part: dict[str, Any]) -> str:
    low, high = part["interval"]
    return f"{part['accuracy']:.1f} ({low:.1f} to {high:.1f})"


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
    minutes = (
        sum(
            json.loads(line)["seconds"] + json.loads(line)["validation_seconds"]
            for part in NAMES
            for line in (MINI / f"seed{seed}-{part}-timing.jsonl").read_text().splitlines()
        )
        / 60
    )
    return (
        f"{result['data']['name']} test, n = {result['data']['n']:,} images (AutoAttack: the first "
        f"500), {result['threat']['norm']} ε = {result['threat']['epsilon_text']}, "
        f"{len(seeds())} seed{'s' if len(seeds()) > 1 else ''}, Wilson 95 % intervals; "
        f"training took {minutes:.0f} minutes for seed {seed} on {environment['cores']} cores "
        f"({environment['processor']}), torch {environment['packages']['torch']}, "
        f"Python {environment['python']}."
    )


def mini_curves(target: Path) -> None:
    """Validation accuracy over epochs, natural start and CURE, all seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "cure"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (part, name) in zip(axes, NAMES.items(), strict=True):
        for seed in seeds():
            lines = (MINI / f"seed{seed}-{part}-metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            for key, style in (("natural", "-o"), ("robust", "--s")):
                points = [(r["epoch"], r["validation"][key]) for r in records if "validation" in r]
                label = f"{key}, seed {seed}"
                axis.plot(*zip(*points, strict=True), style, markersize=3, label=label)
        axis.set(title=name, xlabel="epoch", ylim=(0, 100))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("accuracy on 1,000 validation images, %")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def comparison(folder: str, columns: list[str]) -> str:
    """The groups of a plan's table.json with some of its columns, and its caption."""
    rows = read(HERE / folder / "table.json")["rows"]
    return table(rows, columns).markdown()


def insert(document: Path, mark: str, text: str) -> None:
    """Put the text between the document's mark and the next end."""
    whole = document.read_text(encoding="utf-8")
    before, rest = whole.split(f"{mark} -->\n", 1)
    _, after = rest.split("<!-- end -->", 1)
    document.write_text(f"{before}{mark} -->\n{text}<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    mini_curves(MINI / "curves.svg")
    mini = f"{mini_table()}\n\n{mini_conditions()}\n"
    (MINI / "table.md").write_text(mini, encoding="utf-8")
    insert(HERE / "README.md", "cifar10-mini-cure/table.md", mini)
    insert(HERE.parent / "README.md", "results/cifar10-mini/table.json", comparison(*IN_README))
    for folder in ("cifar10-mini", "ablation", "ablation-digits"):
        whole = (HERE / folder / "table.md").read_text(encoding="utf-8")
        insert(HERE / "README.md", f"{folder}/table.md", whole)
