"""A page as a browser without scripts would see it."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

SECTIONS = [
    *("verdict", "trained", "accuracies", "trade-off", "learning", "overfitting", "epsilon"),
    *(
        "corruptions",
        "cka",
        "gradients",
        "minimal-perturbation",
        "pictures",
        "studies",
        "glossary",
        "made",
    ),
]
"""Ids of the sections, in their order."""

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its words, with spaces, dashes and signs as one types them."""
        said = "".join(c if isinstance(c, str) else c.text for c in self.children)
        for typeset, typed in (("\u00a0", " "), ("\u2013", "-"), ("\u2212", "-")):
            said = said.replace(typeset, typed)
        return " ".join(said.split())

    def all(self, name: str | None = None, **attributes: str) -> list[Element]:
        found: list[Element] = []
        for child in self.children:
            if isinstance(child, Element):
                fits = name in (None, child.name) and all(
                    child.attributes.get(key.rstrip("_")) == value
                    for key, value in attributes.items()
                )
                found += ([child] if fits else []) + child.all(name, **attributes)
        return found

    def one(self, name: str | None = None, **attributes: str) -> Element:
        (found,) = self.all(name, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.now = Element("", {})

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        made = Element(name, {k: v or "" for k, v in attributes}, self.now)
        assert len(made.attributes) == len(attributes), (name, attributes)
        self.now.children.append(made)
        if name not in VOID:
            self.now = made

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        made = Element(name, {k: v or "" for k, v in attributes}, self.now)
        self.now.children.append(made)

    def handle_endtag(self, name: str) -> None:
        assert name == self.now.name, f"</{name}> closes <{self.now.name}>"
        assert self.now.parent is not None
        self.now = self.now.parent

    def handle_data(self, data: str) -> None:
        self.now.children.append(data)


def read(path: Path) -> Element:
    """The page as a tree; fails when an element is not closed."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.now is reader.root, f"<{reader.now.name}> is not closed"
    return reader.root


def drawings(tree: Element) -> list[Element]:
    """The SVG files that images of the page hold, as trees."""
    found = []
    for image in tree.all("img"):
        content = base64.b64decode(image.attributes["src"].partition(",")[2]).decode()
        reader = _Reader()
        reader.feed(content)
        reader.close()
        found.append(reader.root.one("svg"))
    return found


def cells(table: Element) -> list[list[str]]:
    """The text of a table, row by row, without the head."""
    return [
        [c.text for c in row.children if isinstance(c, Element)]
        for row in table.one("tbody").all("tr")
    ]
