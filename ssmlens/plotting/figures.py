"""Figures for files, with matplotlib. `ssmlens.plotting.pages` has the same names for interactive pages.

Each function takes numbers that are already final and returns a `matplotlib.figure.Figure` that belongs to no
window and no global state, so that threads and servers may draw at once.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from . import palette
from .caption import Caption
from .labels import drawable, label, positions, thin, visible
from .scales import QUANTILE, Limits, as_array, causal, pool_max_abs, symmetric_limits

__all__ = ["FORMATS", "attention_map", "half_life_map", "save", "state_norms", "token_row"]

FORMATS = (".png", ".svg", ".pdf")
_FONT = "DejaVu Sans"
_MONO = "DejaVu Sans Mono"
_SMALL = 8.0
_NOTE_CHARACTERS_PER_INCH = 17
_MAX_LABELS = 84
_CELL_INCHES = 0.16
_MIN_SIDE, _MAX_SIDE = 3.6, 8.4
_LINE_CHARACTERS = 88
_FEW_HEADS = 64


def attention_map(
    matrix: Any,
    tokens: Sequence[str] | None = None,
    caption: Caption | None = None,
    *,
    quantile: float = QUANTILE,
    most: int = 1024,
) -> Figure:
    """One implicit-attention map: row t reads from column s.

    Args:
        matrix: (t, s) one reduction or one head of the implicit attention, in units of y per value; above the
            diagonal nothing is drawn.
        tokens: one text per position; thinned to at most 84 labels, all of the map is drawn.
        caption: model, layer, reduction and reconstruction error for the title and the note.
        quantile: quantile of the magnitudes at which the colours end.
        most: largest number of cells per side; longer maps show the largest magnitude of each block.

    Raises:
        ValueError: when the matrix is not square or the tokens do not fit it.
    """
    caption = caption or Caption()
    values = causal(matrix)
    names = positions(tokens, len(values))
    pooled = pool_max_abs(values, most)
    limits = symmetric_limits(pooled.matrix, quantile)
    side = float(np.clip(_CELL_INCHES * len(values), _MIN_SIDE, _MAX_SIDE))
    figure, axes = _figure(side + 1.7, side + 1.6)
    image = axes.imshow(
        pooled.matrix,
        cmap=_signed_map(caption.signed),
        vmin=-limits.value if caption.signed else 0.0,
        vmax=limits.value,
        interpolation="nearest",
        origin="upper",
    )
    _token_axis(axes, names, pooled.factor, "x", "s: source token, read from")
    _token_axis(axes, names, pooled.factor, "y", "t: reading token")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend=_extend(limits, caption))
    bar.set_label("implicit attention M[t, s]", fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)
    return _finish(figure, axes, caption.title("Implicit attention"), caption.note(limits.rule, pooled.rule))


def token_row(
    values: Any,
    tokens: Sequence[str],
    caption: Caption | None = None,
    *,
    reader: int | None = None,
    quantile: float = QUANTILE,
    title: str | None = None,
    note: str = "",
) -> Figure:
    """The text, each token coloured by what one token reads from it, or by another value per token.

    Args:
        values: (s,) one row of the implicit attention.
        tokens: one text per value.
        caption: as for `attention_map`.
        reader: position of the token that reads, drawn with a frame.
        quantile: as for `attention_map`.
        title: in place of what a row of attention is called.
        note: added to the line below.

    Raises:
        ValueError: when the numbers of tokens and values differ.
    """
    caption = caption or Caption()
    row = as_array(values).reshape(-1)
    names = [drawable(visible(token)) for token in positions(tokens, len(row))]
    limits = symmetric_limits(row, quantile)
    colours = _signed_map(caption.signed)
    place, n_lines = _lay_out(names)
    figure, axes = _figure(10.4, 1.0 + 0.34 * n_lines)
    axes.set(xlim=(-0.5, _LINE_CHARACTERS + 0.5), ylim=(n_lines, 0))
    axes.axis("off")
    for i, ((x, y, text), value) in enumerate(zip(place, row)):
        part = value / limits.value if np.isfinite(value) else 0.0
        shade = colours(float(np.clip((part + 1) / 2 if caption.signed else part, 0, 1)))
        edge = palette.INK if i == reader else "none"
        axes.add_patch(Rectangle((x, y + 0.08), len(text), 0.84, facecolor=shade, edgecolor=edge, linewidth=1.4))
        ink = "white" if _is_dark(shade) else palette.INK
        # Nearly the full advance of a character at this figure width, so that text and box agree.
        axes.text(
            x + len(text) / 2, y + 0.5, text, family=_MONO, fontsize=12.5, color=ink, ha="center",
            va="center", parse_math=False,
        )  # fmt: skip
    what = "What the last token reads" if reader in (None, len(row) - 1) else f"What token {reader} reads"
    return _finish(figure, axes, title or caption.title(what), caption.note(note, limits.rule))


def half_life_map(half_lives: Mapping[int, Any], caption: Caption | None = None, *, unit: str = "tokens") -> Figure:
    """Half-life by layer (row) and head (column), on a logarithmic colour scale.

    Args:
        half_lives: layer -> (h,) half-life of each head, in tokens; inf where nothing is ever forgotten, NaN
            where it is not defined. Beyond 64 heads each layer is sorted from short to long.
        caption: as for `attention_map`.
        unit: unit of the values, for the colour bar.

    Raises:
        ValueError: when there is no layer.
    """
    caption = caption or Caption()
    layers, grid, ordered = _by_layer(half_lives)
    finite = grid[np.isfinite(grid) & (grid > 0)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 10.0)
    if low == high:
        low, high = low / 2, high * 2
    colours = ListedColormap(palette.ramp(palette.SEQUENTIAL, 256), name="ssmlens half-life").with_extremes(
        bad=palette.MISSING, under=palette.SEQUENTIAL[0], over=palette.NEVER
    )
    figure, axes = _figure(8.4, 1.9 + float(np.clip(0.3 * len(layers), 0.6, 8)))
    drawn = np.where(np.isposinf(grid), 2 * high, grid)  # beyond the scale: drawn in the colour of "never"
    image = axes.imshow(
        drawn, cmap=colours, norm=LogNorm(low, high), aspect="auto", interpolation="nearest", origin="upper"
    )
    axes.set_yticks(range(len(layers)), [f"layer {k}" for k in layers], fontsize=_SMALL)
    axes.set_xlabel("heads, sorted by half-life within each layer" if ordered else "head", fontsize=_SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=_SMALL)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, extend="max" if np.isinf(grid).any() else "neither")
    bar.set_label(f"half-life ({unit})", fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)
    never = f"{int(np.isinf(grid).sum())} without decay, beyond the scale" if np.isinf(grid).any() else ""
    return _finish(figure, axes, caption.title("Half-life by layer and head"), caption.note(never))


def state_norms(
    norms: Mapping[int, Any], tokens: Sequence[str] | None = None, caption: Caption | None = None
) -> Figure:
    """Norm of the hidden state of each layer over time.

    Args:
        norms: layer -> (t,) Euclidean norm of the layer's whole state after each token.
        tokens: one text per position, thinned to at most 84 labels.
        caption: as for `attention_map`.

    Raises:
        ValueError: when there is no layer, or the lengths differ.
    """
    caption = caption or Caption()
    if not norms:
        raise ValueError("no layer to draw: give at least one layer's values")
    curves = {layer: as_array(x).reshape(-1) for layer, x in norms.items()}
    length = len(next(iter(curves.values())))
    if any(len(x) != length for x in curves.values()):
        raise ValueError(f"one value per token in every layer, got {sorted({len(x) for x in curves.values()})}")
    names = positions(tokens, length)
    figure, axes = _figure(9.2, 4.4)
    for (layer, curve), colour in zip(curves.items(), palette.layer_colours(len(curves))):
        axes.plot(curve, color=colour, linewidth=1.6, label=f"layer {layer}", marker="." if length == 1 else None)
    if all((curve[np.isfinite(curve)] > 0).all() for curve in curves.values()):
        axes.set_yscale("log")
    axes.grid(color=palette.GRID, linewidth=0.5)
    axes.set_xlim(-0.5, length - 0.5)
    _token_axis(axes, names, 1, "x", "token")
    axes.set_ylabel("norm of the state h[t]", fontsize=_SMALL)
    axes.tick_params(axis="y", labelsize=_SMALL)
    axes.legend(fontsize=_SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _finish(figure, axes, caption.title("State norm over time"), caption.note())


def save(figure: Figure, path: str | Path, *, dpi: int = 200) -> Path:
    """Write a figure as .png, .svg or .pdf by its suffix, with title and note in its metadata and no date.

    The file appears whole or not at all.

    Raises:
        ValueError: for any other suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"cannot write a figure as {suffix or 'a file without suffix'}: choose {', '.join(FORMATS)}")
    title, description = figure.axes[0].get_title(), figure.get_label()
    metadata: dict[str, Any] = {
        ".png": {"Title": title, "Description": description, "Software": "ssmlens"},
        ".svg": {"Title": title, "Description": description, "Creator": "ssmlens", "Date": None},
        ".pdf": {"Title": title, "Subject": description, "Creator": "ssmlens", "CreationDate": None},
    }[suffix]
    part = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        figure.savefig(part, dpi=dpi, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, title: str, note: str) -> Figure:
    axes.set_title(drawable(title), fontsize=11, family=_FONT, parse_math=False)
    figure.set_label(note)
    if note:
        text = "\n".join(textwrap.wrap(drawable(note), int(figure.get_figwidth() * _NOTE_CHARACTERS_PER_INCH)))
        figure.supxlabel(text, fontsize=_SMALL - 1, color=palette.MUTED, parse_math=False)
    return figure


def _signed_map(signed: bool) -> Colormap:
    colours = palette.diverging(255) if signed else palette.positive_half(128)
    return ListedColormap(colours, name="ssmlens signed" if signed else "ssmlens magnitude").with_extremes(
        bad=palette.MISSING
    )


def _extend(limits: Limits, caption: Caption) -> str:
    if limits.clipped == 0:
        return "neither"
    return "both" if caption.signed else "max"


def _is_dark(shade: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = shade
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18


def _token_axis(axes: Axes, names: Sequence[str], factor: int, which: str, title: str) -> None:
    chosen = thin(len(names), _MAX_LABELS)
    at = [i / factor for i in chosen]
    texts = [drawable(label(names[i])) for i in chosen]
    size = 6.0 if len(at) > 24 else _SMALL
    if which == "x":
        ticks = axes.set_xticks(at, texts, rotation=90, fontsize=size, family=_MONO)
        axes.set_xlabel(title, fontsize=_SMALL)
    else:
        ticks = axes.set_yticks(at, texts, fontsize=size, family=_MONO)
        axes.set_ylabel(title, fontsize=_SMALL)
    for tick in ticks:
        for text in (tick.label1, tick.label2):
            text.set_parse_math(False)


def _lay_out(names: Sequence[str]) -> tuple[list[tuple[int, int, str]], int]:
    """(x, line, text) of each token on lines of fixed width; a long token is cut to one line."""
    place, x, y = [], 0, 0
    for name in names:
        text = name if len(name) <= _LINE_CHARACTERS else name[: _LINE_CHARACTERS - 1] + "…"
        if x + len(text) > _LINE_CHARACTERS:
            x, y = 0, y + 1
        place.append((x, y, text))
        x += len(text)
    return place, y + 1


def _by_layer(values: Mapping[int, Any]) -> tuple[list[int], np.ndarray, bool]:
    """Layers, a (layer, head) grid padded with NaN, and whether each row was sorted."""
    if not values:
        raise ValueError("no layer to draw: give at least one layer's values")
    rows = {layer: as_array(x).reshape(-1) for layer, x in values.items()}
    width = max(len(row) for row in rows.values())
    ordered = width > _FEW_HEADS
    grid = np.full((len(rows), max(width, 1)), np.nan)
    for i, row in enumerate(rows.values()):
        grid[i, : len(row)] = np.sort(row) if ordered else row
    return list(rows), grid, ordered
