"""The canvas map: one ES module, handed to the browser from the files beside this one; no build step, no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from ssmlens.plotting import Caption, palette
from ssmlens.plotting.labels import label, visible
from ssmlens.plotting.scales import symmetric_limits

__all__ = ["show"]

_FOLDER = Path(__file__).parent
_HOVER_CHARACTERS = 24


def show(
    matrix: NDArray[np.float32],
    tokens: Sequence[str],
    caption: Caption,
    *,
    target: int,
    dark: bool,
    key: str,
    on_pick: Callable[[], None],
) -> None:
    """Draw one causal map, rows read from columns.

    Args:
        matrix: (t, s), units of y per value; entries above the diagonal are not drawn.
        tokens: one text per position.
        caption: model, layer, reduction and error; decides whether the colours are signed.
        target: the row that is framed.
        dark: draw for a dark page.
        key: where the state of the component lives; while ``on_pick`` runs, ``st.session_state[key]["target"]`` is
            the row.
        on_pick: called after such a click.
    """
    limits = symmetric_limits(matrix[np.tri(len(matrix), dtype=bool)])
    title = caption.title(f"Implicit attention, {caption.reduction_words}")
    _component()(
        data={
            "title": title,
            "alt": f"{title}. {len(tokens)} tokens. Arrow keys move, Enter picks a row. {caption.error_words}",
            "values": base64.b64encode(np.ascontiguousarray(matrix, dtype="<f4").tobytes()).decode("ascii"),
            "labels": [label(token) for token in tokens],
            "names": [label(token, _HOVER_CHARACTERS) for token in tokens],
            "text": [_running(token) for token in tokens],
            # Words of a vocabulary without spaces would otherwise run together.
            "spaced": not any(c.isspace() for token in tokens for c in token),
            "quantity": f"M[t, s], {caption.reduction_words}",
            "shades": palette.TEXT_SHADE,
            "dark": dark,
            "limit": limits.value,
            "clipped": limits.clipped > 0,
            "signed": caption.signed,
            "colours": palette.DIVERGING_DARK if dark else palette.DIVERGING,
            "target": target,
        },
        key=key,
        on_target_change=on_pick,
    )


def _running(token: str) -> str:
    """A token as part of a running text: spaces as they are, a line break with its mark, the rest made visible."""
    return "".join(c if c == " " else "↵\n" if c == "\n" else visible(c) for c in token) or visible(token)


def _component() -> Any:
    # Registered by name at each run: Streamlit keeps one definition, and a test may start with an empty registry.
    parts = {part: (_FOLDER / f"heatmap.{part}").read_text("utf-8") for part in ("html", "css", "js")}
    return st.components.v2.component("ssmlens_heatmap", **parts)
