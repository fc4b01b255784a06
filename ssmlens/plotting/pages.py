"""The figures of `ssmlens.plotting` for interactive pages, with plotly: same names, colours and rules."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from . import palette
from .caption import Caption
from .labels import label, positions, thin, visible
from .scales import QUANTILE, as_array, causal, pool_max_abs, symmetric_limits

__all__ = ["attention_map", "attribution", "half_life_map", "save", "state_norms", "token_row"]

_MAX_LABELS = 48
_MAX_HOVER = 24
_NOTE_CHARACTERS = 110


def attention_map(
    matrix: Any,
    tokens: Sequence[str] | None = None,
    caption: Caption | None = None,
    *,
    quantile: float = QUANTILE,
    most: int = 512,
    dark: bool = False,
) -> go.Figure:
    """One implicit-attention map; hovering names both tokens and the value.

    Arguments and errors as for `ssmlens.plotting.attention_map`; ``dark`` takes the colours for a dark page.
    """
    caption = caption or Caption()
    values = causal(matrix)
    names = positions(tokens, len(values))
    pooled = pool_max_abs(values, most)
    limits = symmetric_limits(pooled.matrix, quantile)
    block = _blocks(names, pooled.factor)
    figure = go.Figure(
        go.Heatmap(
            z=pooled.matrix,
            zmin=-limits.value if caption.signed else 0.0,
            zmax=limits.value,
            colorscale=_scale(_colours(caption, dark)),
            customdata=np.broadcast_to(np.array(block, dtype=object)[None, :], pooled.matrix.shape),
            text=np.broadcast_to(np.array(block, dtype=object)[:, None], pooled.matrix.shape),
            hovertemplate="t: %{text}<br>s: %{customdata}<br>M[t, s] = %{z:.4g}<extra></extra>",
            hoverongaps=False,
            colorbar={"title": {"text": "M[t, s]"}},
        )
    )
    axis = _token_axis(names, pooled.factor)
    figure.update_xaxes(**axis, title="s: source token, read from", constrain="domain")
    figure.update_yaxes(**axis, title="t: reading token", autorange="reversed", scaleanchor="x", constrain="domain")
    # Cells without a value show the ground: neutral, so that nobody reads it as a small negative.
    figure.update_layout(plot_bgcolor=palette.MISSING_DARK if dark else palette.MISSING)
    return _finish(figure, caption.title("Implicit attention"), caption.note(limits.rule, pooled.rule), 640)


def token_row(
    values: Any,
    tokens: Sequence[str],
    caption: Caption | None = None,
    *,
    reader: int | None = None,
    quantile: float = QUANTILE,
    dark: bool = False,
) -> go.Figure:
    """What one token reads from each source, as bars coloured by sign and magnitude.

    Arguments and errors as for `ssmlens.plotting.token_row`; ``dark`` takes the colours for a dark page.
    """
    caption = caption or Caption()
    row = as_array(values).reshape(-1)
    names = positions(tokens, len(row))
    limits = symmetric_limits(row, quantile)
    figure = go.Figure(
        go.Bar(
            x=np.arange(len(row)),
            y=row,
            marker={
                "color": row,
                "cmin": -limits.value if caption.signed else 0.0,
                "cmax": limits.value,
                "colorscale": _scale(_colours(caption, dark)),
                "line": {"width": 0.5, "color": palette.MUTED},
            },
            customdata=_blocks(names, 1),
            hovertemplate="s: %{customdata}<br>M[t, s] = %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(**_token_axis(names, 1), title="s: source token, read from")
    figure.update_yaxes(title="M[t, s]", zeroline=True)
    what = "What the last token reads" if reader in (None, len(row) - 1) else f"What token {reader} reads"
    return _finish(figure, caption.title(what), caption.note(limits.rule), 320)


def half_life_map(half_lives: Mapping[int, Any], caption: Caption | None = None, *, unit: str = "tokens") -> go.Figure:
    """Half-life of every head, one strip per layer, on a logarithmic axis; the bar marks the median.

    Heads that never forget (inf) have no place on the axis: they are counted in the note.
    Arguments and errors as for `ssmlens.plotting.half_life_map`.
    """
    caption = caption or Caption()
    if not half_lives:
        raise ValueError("no layer to draw: give at least one layer's values")
    figure = go.Figure()
    never = 0
    for (layer, x), colour in zip(half_lives.items(), palette.layer_colours(len(half_lives))):
        row = as_array(x).reshape(-1)
        never += int(np.isinf(row).sum())
        heads = np.flatnonzero(np.isfinite(row) & (row > 0))
        figure.add_trace(
            go.Box(
                y=row[heads],
                name=f"layer {layer}",
                customdata=heads,
                boxpoints="all",
                jitter=0.6,
                pointpos=0,
                fillcolor="rgba(0,0,0,0)",
                line={"color": palette.MUTED, "width": 1},
                marker={"color": colour, "size": 5, "opacity": 0.7},
                hovertemplate=f"layer {layer}, head %{{customdata}}<br>%{{y:.4g}} {unit}<extra></extra>",
                showlegend=False,
            )
        )
    figure.update_yaxes(type="log", title=f"half-life ({unit})")
    note = f"{never} without decay, not drawn" if never else ""
    return _finish(figure, caption.title("Half-life by layer and head"), caption.note(note), 420)


def attribution(found: Any, target: str = "", row: int = 0, *, most: int = 14) -> go.Figure:
    """A waterfall from 0 to the logit, as `ssmlens.plotting.attribution`."""
    from .attributions import note_of, steps_to_logit, title_of

    names, steps = steps_to_logit(found, row, most)
    figure = go.Figure(
        go.Waterfall(
            orientation="h",
            y=[*(escape(name) for name in names), "logit"],
            x=[*steps, 0],
            measure=[*["relative"] * len(steps), "total"],
            text=[*(f"{x:+.3g}" for x in steps), f"{float(found.logit[row]):.4g}"],
            increasing={"marker": {"color": palette.diverging(11)[-2]}},
            decreasing={"marker": {"color": palette.diverging(11)[1]}},
            totals={"marker": {"color": palette.MUTED}},
            connector={"line": {"width": 0.6, "color": palette.MUTED}},
        )
    )
    figure.update_yaxes(autorange="reversed", title=None)
    figure.update_xaxes(title="logit")
    return _finish(figure, title_of(found, target), note_of(found, row), 140 + 26 * (len(names) + 1))


def state_norms(
    norms: Mapping[int, Any], tokens: Sequence[str] | None = None, caption: Caption | None = None
) -> go.Figure:
    """Norm of the hidden state of each layer over time.

    Arguments and errors as for `ssmlens.plotting.state_norms`.
    """
    caption = caption or Caption()
    if not norms:
        raise ValueError("no layer to draw: give at least one layer's values")
    curves = {layer: as_array(x).reshape(-1) for layer, x in norms.items()}
    length = len(next(iter(curves.values())))
    if any(len(x) != length for x in curves.values()):
        raise ValueError(f"one value per token in every layer, got {sorted({len(x) for x in curves.values()})}")
    names = positions(tokens, length)
    figure = go.Figure()
    for (layer, curve), colour in zip(curves.items(), palette.layer_colours(len(curves))):
        figure.add_trace(
            go.Scatter(
                x=np.arange(length),
                y=curve,
                mode="lines" if length > 1 else "markers",
                name=f"layer {layer}",
                line={"color": colour, "width": 2},
                customdata=_blocks(names, 1),
                hovertemplate=f"layer {layer} after %{{customdata}}: %{{y:.4g}}<extra></extra>",
            )
        )
    figure.update_xaxes(**_token_axis(names, 1), title="token")
    figure.update_yaxes(title="norm of the state h[t]")
    if all((curve[np.isfinite(curve)] > 0).all() for curve in curves.values()):
        figure.update_yaxes(type="log")
    return _finish(figure, caption.title("State norm over time"), caption.note(), 420)


def save(figure: go.Figure, path: str | Path) -> Path:
    """Write one self-contained .html page (about 5 MB: it carries plotly itself and loads nothing).

    The file appears whole or not at all.

    Raises:
        ValueError: for any other suffix.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"cannot write a page as {path.suffix or 'a file without suffix'}: choose .html")
    part = path.with_name(f".{path.name}.{os.getpid()}.html")
    try:
        figure.write_html(part, include_plotlyjs=True, include_mathjax=False, full_html=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _colours(caption: Caption, dark: bool) -> list[str]:
    return palette.diverging(dark=dark) if caption.signed else palette.positive_half(dark=dark)


def _scale(colours: Sequence[str]) -> list[list[float | str]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _blocks(names: Sequence[str], factor: int) -> list[str]:
    """What hovering calls each cell: position and token, or a range where cells were pooled. HTML-safe."""
    if factor == 1:
        return [f"{i} “{escape(label(name, _MAX_HOVER))}”" for i, name in enumerate(names)]
    ends = range(0, len(names), factor)
    return [f"{i} to {min(i + factor, len(names)) - 1}, from “{escape(visible(names[i]))}”" for i in ends]


def _token_axis(names: Sequence[str], factor: int) -> dict[str, Any]:
    chosen = thin(len(names), _MAX_LABELS)
    return {
        "tickvals": [i / factor for i in chosen],
        "ticktext": [escape(label(names[i])) for i in chosen],
        "tickfont": {"size": 9, "family": "monospace"},
        "showgrid": False,
        "zeroline": False,
    }


def _finish(figure: go.Figure, title: str, note: str, height: int) -> go.Figure:
    lines = textwrap.wrap(note, _NOTE_CHARACTERS)
    below = "".join(f"<br><sup>{escape(line)}</sup>" for line in lines)
    figure.update_layout(
        title={"text": escape(title) + below, "x": 0.02},
        height=height,
        template="plotly_white",
        margin={"l": 70, "r": 20, "t": 60 + 18 * len(lines), "b": 70},
        meta={"title": title, "note": note},
    )
    return figure
