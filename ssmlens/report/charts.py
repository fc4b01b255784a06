"""Two small charts as inline SVG: they print, follow the page's light or dark colours, and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from ssmlens.plotting import palette

__all__ = ["lines", "strips"]

Array = NDArray[np.float64]

WIDTH, HEIGHT = 1080, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 96, 18, 40
_GOLDEN = 0.6180339887498949
_LANE = 30
_NICE = (1, 2, 5)


def strips(rows: Sequence[tuple[str, Array]], *, reference: float, reference_text: str, y_title: str, alt: str) -> str:
    """One strip of dots per row on a logarithmic axis, a bar from the 10 % to the 90 % quantile, a tick at the median.

    Args:
        rows: (name, values); infinite values go to a lane of their own at the top, NaN is left out.
        reference: value at which a dashed line is drawn.
        reference_text: what that line means.
        y_title, alt: title of the axis, and what a screen reader says.
    """
    finite = np.concatenate([x[np.isfinite(x) & (x > 0)] for _, x in rows] + [np.array([reference])])
    low, high = _log_range(float(finite.min()), float(finite.max()))
    never = any(np.isinf(x).any() for _, x in rows)
    top = _TOP + (_LANE if never else 0)

    def y(value: float) -> float:
        part = (math.log10(value) - low) / (high - low)
        return HEIGHT - _BOTTOM - part * (HEIGHT - _BOTTOM - top)

    parts = [_log_axis(low, high, y), _y_title(y_title)]
    if never:
        middle = _TOP + _LANE / 2 - 6
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">never</text>')
    line = y(reference)
    parts.append(
        f'<path class="reference" d="M{_LEFT} {line:.1f}H{WIDTH - _RIGHT}"/><text class="tick" '
        f'x="{WIDTH - _RIGHT + 6}" y="{line + 4:.1f}">{escape(reference_text)}</text>'
    )
    column = (WIDTH - _LEFT - _RIGHT) / len(rows)
    for i, ((name, values), colour) in enumerate(zip(rows, palette.layer_colours(len(rows)))):
        centre = _LEFT + column * (i + 0.5)
        parts.append(_strip(values, centre, min(column * 0.36, 64), y, colour))
        parts.append(
            f'<text class="name" x="{centre:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(name)}</text>'
        )
    return _svg(parts, alt)


def _strip(values: Array, centre: float, spread: float, y: object, colour: str) -> str:
    place = y if callable(y) else float
    real = values[~np.isnan(values) & (values > 0)]
    if not real.size:
        return f'<text class="tick" x="{centre:.1f}" y="{HEIGHT / 2}" text-anchor="middle">undefined</text>'
    dots = []
    for i, value in enumerate(real):
        # Steps of the golden ratio never pile up, and the same numbers always give the same picture.
        x = centre + (2 * ((i * _GOLDEN) % 1) - 1) * spread
        dots.append(f"M{x:.1f} {_TOP + _LANE / 2 - 6 if math.isinf(value) else place(value):.1f}h0")
    size = 8 if real.size <= 32 else 4.5 if real.size <= 200 else 3
    shapes = [f'<path class="dots" stroke="{colour}" stroke-width="{size}" d="{"".join(dots)}"/>']
    finite = real[np.isfinite(real)]
    if finite.size:
        low, middle, high = (place(float(q)) for q in np.quantile(finite, (0.1, 0.5, 0.9), method="lower"))
        shapes.append(f'<path class="bar" d="M{centre:.1f} {low:.1f}V{high:.1f}"/>')
        shapes.append(f'<path class="median" d="M{centre - spread * 0.7:.1f} {middle:.1f}h{spread * 1.4:.1f}"/>')
    return "".join(shapes)


def lines(rows: Sequence[tuple[str, Array]], *, y_title: str, x_title: str, alt: str) -> str:
    """One curve per row over positions, on a logarithmic axis where every value is positive.

    The curves carry ``data-*`` attributes for the page's script, which adds a cursor.
    """
    length = len(rows[0][1])
    every = np.concatenate([x[np.isfinite(x)] for _, x in rows])
    logarithmic = bool(every.size) and bool((every > 0).all())
    if logarithmic:
        low, high = _log_range(float(every.min()), float(every.max()))
    else:
        low, high = 0.0, float(every.max()) if every.size and every.max() > 0 else 1.0

    def y(value: float) -> float:
        part = ((math.log10(value) if logarithmic else value) - low) / (high - low)
        return HEIGHT - _BOTTOM - part * (HEIGHT - _BOTTOM - _TOP)

    def x(i: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (i / (length - 1) if length > 1 else 0.5)

    axis = _log_axis(low, high, y) if logarithmic else _linear_axis(high, y)
    parts = [axis, _y_title(y_title), _positions(length, x), _x_title(x_title)]
    ends = _spread([y(float(c[-1])) if np.isfinite(c[-1]) else _TOP for _, c in rows])
    for (name, curve), colour, end in zip(rows, palette.layer_colours(len(rows)), ends):
        points = [f"{x(i):.1f} {y(float(v)):.1f}" for i, v in enumerate(curve) if np.isfinite(v)]
        path = "M" + "L".join(points) if points else ""
        path += "h0" if len(points) == 1 else ""
        parts.append(f'<path class="curve" stroke="{colour}" d="{path}"/>')
        parts.append(
            f'<path class="curve" stroke="{colour}" d="M{WIDTH - _RIGHT + 8} {end:.1f}h12"/>'
            f'<text class="name" x="{WIDTH - _RIGHT + 26}" y="{end + 4:.1f}">{escape(name)}</text>'
        )
    parts.append('<path class="cursor" d=""/>')
    return _svg(parts, alt, f'data-left="{_LEFT}" data-right="{WIDTH - _RIGHT}" data-n="{length}" tabindex="0"')


def _svg(parts: Sequence[str], alt: str, extra: str = "") -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}" {extra}>'
        f"{''.join(parts)}</svg>"
    )


def _log_range(low: float, high: float) -> tuple[float, float]:
    """Powers of ten a little beyond both ends, at least half a decade apart."""
    a, b = math.log10(low), math.log10(high)
    margin = max(0.06 * (b - a), 0.05)
    if b - a < 0.5:
        margin = (0.5 - (b - a)) / 2 + 0.05
    return a - margin, b + margin


def _log_axis(low: float, high: float, y: object) -> str:
    assert callable(y)
    steps = _NICE if high - low < 2.5 else (1,)
    every = max(1, math.ceil((high - low) / 8))
    out = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for step in steps:
            value = step * 10.0**power
            if low <= math.log10(value) <= high and power % every == 0:
                out.append(_tick(y(value), _short(value)))
    return "".join(out)


def _linear_axis(high: float, y: object) -> str:
    assert callable(y)
    return "".join(_tick(y(high * i / 4), f"{high * i / 4:.3g}") for i in range(5))


def _tick(at: float, text: str) -> str:
    return (
        f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _short(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _positions(length: int, x: object) -> str:
    assert callable(x)
    step = next(s * 10**k for k in range(9) for s in _NICE if length / (s * 10**k) <= 12)
    return "".join(
        f'<text class="tick" x="{x(i):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{i}</text>'
        for i in range(0, length, step)
    )


def _x_title(text: str) -> str:
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'


def _y_title(text: str) -> str:
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    return (
        f'<text class="tick" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'
    )


def _spread(wanted: Sequence[float], gap: float = 15) -> list[float]:
    """Label heights near the wanted ones, at least ``gap`` apart, in the same order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    last = -math.inf
    for i in order:
        last = placed[i] = max(wanted[i], last + gap)
    bottom = float(HEIGHT - _BOTTOM)
    for i in reversed(order):
        placed[i] = bottom = min(placed[i], bottom)
        bottom -= gap
    return placed
