"""MkDocs hooks: files outside docs/ as pages, and tables from the registries.

Links in Markdown files are those of the repository, so that they also work where the repository
is read; here they become links of the site.  A page says ``<!-- list KIND -->`` where the table of
``cure list KIND`` belongs.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

from cure.cli.listing import listing

ROOT = Path(__file__).resolve().parents[1]
DOCS = PurePosixPath("docs")
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "results/corruptions/*.md",
    "results/**/*.svg",
)
"""Files outside docs/ that are part of the site."""
REPORT = ROOT / "build" / "example" / "report.html"
"""The example page, which ``make docs`` writes first."""
LINK = re.compile(r"(\]\()([^)#\s]+)(?=[#)])")
LIST = re.compile(r"^<!-- list (\w+) -->$", re.MULTILINE)

log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files outside docs/ and the example page."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    if REPORT.exists():
        files.append(File.generated(config, "example-report.html", abs_src_path=str(REPORT)))
    else:
        log.warning("the example page is missing: run `make docs`, which writes it")
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Put tables in and turn links of the repository into links of the site."""
    here = PurePosixPath(page.file.src_uri)
    folder = PurePosixPath(Path(page.file.abs_src_path).relative_to(ROOT).as_posix()).parent

    def link(found: re.Match[str]) -> str:
        target = found[2]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        place = PurePosixPath(os.path.normpath(folder / target))
        uri = place.relative_to(DOCS) if place.is_relative_to(DOCS) else place
        if files.get_file_from_path(str(uri)) is None:
            uri = PurePosixPath(os.path.normpath(here.parent / target))  # MkDocs warns of it.
        return found[1] + os.path.relpath(uri, here.parent)

    return LIST.sub(lambda found: table(found[1]), LINK.sub(link, markdown))


def table(kind: str) -> str:
    """``cure list KIND`` as a table; settings with a table for each section of a recipe."""
    if kind != "settings":
        return rows("name", listing(kind))
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, text in listing(kind):
        key, _, default = name.partition(" = ")
        section = key.split(".")[0] if "." in key else "run"
        owner, _, rest = text.partition(": ") if section == "method" else ("", "", text)
        title = f"method={owner}" if owner else section
        sections.setdefault(title, []).append((key, default, rest))
    return "\n\n".join(
        f"## {title}\n\n" + rows("key", content, "default") for title, content in sections.items()
    )


def rows(first: str, content: list[Any], *between: str) -> str:
    """A Markdown table whose last column explains the first."""
    head = [first, *between, "meaning"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for *names, text in content:
        cells = [f"`{name}`" if name else "" for name in names]
        lines.append("| " + " | ".join([*cells, text.replace("|", "\\|")]) + " |")
    return "\n".join(lines)
