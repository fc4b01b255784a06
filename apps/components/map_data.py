"""What the map in the browser is given, the same for pages and notebooks."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlens.plotting import Caption, palette, pool_max_abs, symmetric_limits
from ssmlens.plotting.labels import label, visible

__all__ = ["MOST_CELLS", "Window", "map_data", "parts", "running"]

MOST_CELLS = 2048
"""Most cells per side that are sent; longer maps come pooled, and a part of them exactly when it is zoomed into."""

_FOLDER = Path(__file__).parent
_BEFORE = {"heatmap": ("grid", "shared")}
_HOVER_CHARACTERS = 24

Window = tuple[int, int, int]
"""A square part of a map: first row, first column, tokens per side."""


def map_data(
    matrix: NDArray[np.float32],
    tokens: Sequence[str],
    caption: Caption,
    *,
    target: int,
    source: int | None = None,
    dark: bool = False,
    window: Window | None = None,
    most: int = MOST_CELLS,
    group: str | None = None,
    like: NDArray[np.float32] | None = None,
    pins: bool = True,
) -> dict[str, Any]:
    """The map as plain data.

    Args:
        matrix: (t, s), units of y per value; entries above the diagonal are not drawn.
        tokens: one text per position.
        caption: model, layer, reduction and error; decides whether the colours are signed.
        target: the row that is framed, and shades the text.
        source: the column of the pinned pair, None where none is pinned.
        dark: draw for a dark page.
        window: the part to send; all by default.
        most: cells per side beyond which blocks are sent as their largest magnitude, with its sign and its place.
        group: maps of one group on a page share their cursor; None for a map by itself.
        like: another map (t, s) whose colours this one takes, so that both can be held against each other.
        pins: whether a click pins a pair, so that the map says so.
    """
    n = len(matrix)
    t, s, size = window or (0, 0, n)
    drawn = matrix[np.tri(n, dtype=bool)]
    limit = symmetric_limits(drawn if like is None else like[np.tri(len(like), dtype=bool)]).value
    title = caption.title(f"Implicit attention, {caption.reduction_words}")
    return {
        "title": title,
        "map": hashlib.sha256(f"{title} {tokens} {t} {s} {size}".encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "alt": (
            f"{title}. {n} tokens. Arrow keys move, with Shift by ten; {'Enter pins the pair; ' if pins else ''}plus, "
            f"minus and 0 zoom. {caption.error_words}"
        ),
        "window": [t, s, size],
        **_cells(matrix, (t, s, size), most),
        "row": _base64(matrix[target], "<f4"),
        "labels": [label(token) for token in tokens],
        "names": [label(token, _HOVER_CHARACTERS) for token in tokens],
        "text": [running(token) for token in tokens],
        # Words of a vocabulary without spaces would otherwise run together.
        "spaced": not any(c.isspace() for token in tokens for c in token),
        "quantity": f"M[t, s], {caption.reduction_words}",
        "shades": palette.TEXT_SHADE,
        "dark": dark,
        "limit": limit,
        "clipped": bool((np.abs(drawn) > limit).any()),
        "signed": caption.signed,
        "colours": palette.DIVERGING_DARK if dark else palette.DIVERGING,
        "target": target,
        "source": source,
        "group": group,
        "pins": pins,
    }


def running(token: str) -> str:
    """A token as part of a running text: spaces as they are, a line break with its mark, the rest made visible."""
    return "".join(c if c == " " else "↵\n" if c == "\n" else visible(c) for c in token) or visible(token)


@lru_cache
def parts(name: str) -> dict[str, str]:
    """The html, css and js of a component, from the files beside this one; several scripts make one module."""
    scripts = (*_BEFORE.get(name, ()), name)
    return {
        **{part: (_FOLDER / f"{name}.{part}").read_text("utf-8") for part in ("html", "css")},
        "js": "\n".join((_FOLDER / f"{script}.js").read_text("utf-8") for script in scripts),
    }


def _cells(matrix: NDArray[np.float32], window: Window, most: int) -> dict[str, Any]:
    t, s, size = window
    if size == len(matrix) <= most:
        # Half of a whole map is above the diagonal and never read.
        return {"triangle": True, "factor": 1, "where": None, "values": _base64(matrix[np.tril_indices(size)], "<f4")}
    part = matrix[t : t + size, s : s + size]
    if size <= most:
        return {"triangle": False, "factor": 1, "where": None, "values": _base64(part, "<f4")}
    pooled = pool_max_abs(np.where(np.tri(size, k=t - s, dtype=bool), part, np.nan), most)
    return {
        "triangle": False,
        "factor": pooled.factor,
        "where": _base64(pooled.where, "<u2"),
        "values": _base64(pooled.matrix, "<f4"),
    }


def _base64(x: Any, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(x, dtype=kind).tobytes()).decode("ascii")
