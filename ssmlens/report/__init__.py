"""A report: one self-contained HTML page about what a model remembers of one text.

``build`` takes a trace, or a lens and a text; ``write`` puts the page on disk. The page loads nothing, follows the
reader's light or dark setting, prints, and works with the keyboard. `numbers` takes the numbers, `sections` words
and escapes them, `charts` draws two of the figures as SVG, and page.js the maps on a canvas.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmlens.errors import SsmlensError
from ssmlens.report.numbers import Numbers, measure
from ssmlens.report.page import render

if TYPE_CHECKING:
    from ssmlens.lens import Lens
    from ssmlens.trace import Trace

__all__ = ["MAX_TOKENS", "Numbers", "build", "check_length", "measure", "render", "write"]

MAX_TOKENS = 4096
"""Longest text of a report: beyond it a page would be slow to make and to read."""


def build(
    source: Lens | Trace,
    prompt: Any = None,
    *,
    title: str | None = None,
    row: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    lens: Lens | None = None,
) -> str:
    """One report as a string of HTML.

    Args:
        source: a trace; or a lens, which then runs ``prompt``.
        prompt: anything `Lens.trace` takes; only with a lens.
        title: heading of the page; by default it names the model.
        row: which prompt of a batch.
        decode: ids to text, for the predicted tokens; a lens brings its own tokenizer's.
        progress: called with (what is being done, steps done, steps in all).
        lens: the model behind a trace, so that its prediction can be taken apart; a lens as ``source`` is its own.

    Raises:
        SsmlensError: when the text is longer than 4096 tokens, the row does not exist, or ``prompt`` does not go
            with ``source``.
    """
    from ssmlens.trace import Trace

    if isinstance(source, Trace):
        if prompt is not None:
            raise SsmlensError("a prompt goes with a lens: a trace already has its own")
        trace = source
    else:
        if prompt is None:
            raise SsmlensError("a lens needs a prompt: give a text or token ids")
        if progress is not None:
            progress("forward pass", 0, 1)
        trace, lens = source.trace(prompt), source
        if decode is None and source.tokenizer is not None:
            decode = source.tokenizer.decode
    numbers = measure(check_length(trace), row=row, decode=decode, progress=progress, lens=lens)
    return render(numbers, title)


def check_length(trace: Trace) -> Trace:
    """The trace, when its text fits a report.

    Raises:
        SsmlensError: beyond 4096 tokens.
    """
    if trace.ids.shape[1] > MAX_TOKENS:
        raise SsmlensError(f"the text has {trace.ids.shape[1]} tokens and a report shows at most {MAX_TOKENS}")
    return trace


def write(path: str | Path, html: str) -> Path:
    """Write a page; the file appears whole or not at all. Returns the path."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
