"""The library calls behind a figure, as a program that runs."""

from __future__ import annotations

import textwrap

from ssmlens import zoo
from ssmlens.apps.store import Opened, Reading

__all__ = ["opening", "snippet", "text_of"]

_WIDTH = 88


def opening(opened: Opened, name: str = "lens") -> str:
    """The line that loads the model."""
    dtype = "" if opened.dtype == "float32" else f", dtype={opened.dtype!r}"
    return f"{name} = ssmlens.load({opened.source.name!r}{dtype})"


def text_of(reading: Reading) -> str:
    """The text as an expression: the shipped passage by its name, any other as a literal."""
    name = reading.opened.source.name
    if name in zoo.names() and reading.text == zoo.passage(name):
        return f"zoo.passage({name!r})"
    if len(reading.text) <= _WIDTH:
        return repr(reading.text)
    # Cut at any character: implicit concatenation puts the pieces together again.
    pieces = [reading.text[i : i + _WIDTH] for i in range(0, len(reading.text), _WIDTH)]
    return "(\n" + textwrap.indent("\n".join(map(repr, pieces)), "    ") + "\n)"


def snippet(about: Reading | Opened, body: str, imports: tuple[str, ...] = ()) -> str:
    """A whole program.

    Args:
        about: a reading, which gives ``lens``, ``text`` and ``trace``; or a model alone, which gives ``lens``.
        body: what follows; leaves the figure in ``figure``, or the numbers in ``table`` where there is no figure.
        imports: import lines that the body needs, besides ``import ssmlens``.
    """
    named = set(imports)
    if isinstance(about, Opened):
        lines = [opening(about)]
    else:
        text = text_of(about)
        lines = [opening(about.opened), f"text = {text}"]
        if "trace" in body:
            lines.append("trace = lens.trace(text)")
        if text.startswith("zoo."):
            named.add("from ssmlens import zoo")
    head = "\n".join(["import ssmlens", *sorted(named)])
    return f"{head}\n\n{chr(10).join(lines)}\n\n{textwrap.dedent(body).strip()}\n"
