"""Extension of griffe: the markup of our docstrings, for Markdown.

Roles such as ``:class:`~cure.Run` `` become links where the object has a place in the site,
examples and literal blocks become fenced code.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
LITERAL = re.compile(
    r"^( *)(?:\.\. code-block:: (\w+)|(\S.*):)(?<=:|\w)\n\n((?:\1 +\S.*\n?|\n)+)", re.MULTILINE
)


class Docstrings(Extension):
    """Rewrite every docstring when it is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for modules, classes, functions and attributes."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """A docstring of this package in Markdown."""
    text = EXAMPLE.sub(lambda found: fence(found[0], "pycon", found[1]), text)
    text = LITERAL.sub(literal, text)
    return ROLE.sub(reference, text)


def fence(code: str, language: str, indent: str) -> str:
    """Lines of code as a fenced block."""
    return f"{indent}```{language}\n{code.rstrip()}\n{indent}```\n"


def literal(found: re.Match[str]) -> str:
    """A block after ``::`` or ``.. code-block::``."""
    indent, language, sentence, code = found.groups()
    if language is None and not sentence.endswith(":"):
        return found[0]
    before = f"{indent}{sentence}\n\n" if sentence else ""
    return f"{before}{fence(code, language or 'python', indent)}\n"


def reference(found: re.Match[str]) -> str:
    """A role as a link that may be missing."""
    short, name = found[1], found[2]
    shown = name.rsplit(".", 1)[-1] if short else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'
