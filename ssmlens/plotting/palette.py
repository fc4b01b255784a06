"""Every colour of ssmlens, in one place.

Signed quantities run from blue (negative) through near-white, or near-black on dark pages, to orange
(positive): the pair that stays apart in all common forms of colour blindness. Stops were laid out in OKLCH
with equal lightness on both arms, so that equal magnitudes look equally strong.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "DIVERGING",
    "DIVERGING_DARK",
    "GRID",
    "INK",
    "LAYER_STOPS",
    "MISSING",
    "MISSING_DARK",
    "MUTED",
    "NEVER",
    "SEQUENTIAL",
    "TEXT_SHADE",
    "diverging",
    "layer_colours",
    "positive_half",
    "ramp",
]

DIVERGING = (
    "#003b6f", "#03569c", "#1276ce", "#4e9cee", "#8ec2fd", "#c7e1ff",
    "#f7f7f7",
    "#f8d7be", "#efae7c", "#d97e2c", "#ad5d02", "#804301", "#5a2d00",
)  # fmt: skip
"""Signed map on a light ground: most negative, zero in the middle, most positive."""

DIVERGING_DARK = (
    "#9dd1fe", "#46a6ef", "#0c7dc3", "#075a8e", "#123b5a",
    "#1f1f1f",
    "#512e0a", "#7d4600", "#ad6200", "#db8833", "#feba7e",
)  # fmt: skip
"""The same map on a dark ground: zero recedes into the page, magnitude glows."""

SEQUENTIAL = ("#00224e", "#1f3a6e", "#4b546c", "#6d6e72", "#8e8978", "#b4a76b", "#dbc74f", "#fee838")
"""Unsigned quantities without a natural zero (half-lives): cividis, short to long."""

LAYER_STOPS = ("#3263c3", "#8459c3", "#bc549e", "#db5c6c", "#e77140", "#de9212")
"""Layers by depth, readable as lines on light and dark grounds; always labelled in words as well."""

TEXT_SHADE = {"positive": (236, 146, 58), "negative": (78, 156, 238)}
"""RGB of the highlighter behind text, laid over the page with an opacity that carries the magnitude."""

INK = "#1b1b1b"
MUTED = "#555555"
GRID = "#d9d9d9"
NEVER = "#e0559a"
"""Beyond the end of `SEQUENTIAL`: what is never forgotten."""

MISSING = "#ededed"
"""Cells without a value: later than the reader, or undefined."""

MISSING_DARK = "#26282c"
"""The same on a dark page."""


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def ramp(stops: Sequence[str], n: int) -> list[str]:
    """``n`` hex colours spread evenly over the stops, both ends included; the middle stop for ``n = 1``."""
    if n == 1:
        return [stops[len(stops) // 2]]
    colours = []
    for i in range(n):
        position = i * (len(stops) - 1) / (n - 1)
        low = min(int(position), len(stops) - 2)
        part = position - low
        pairs = zip(_rgb(stops[low]), _rgb(stops[low + 1]))
        colours.append("#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in pairs))
    return colours


def diverging(n: int = 255, *, dark: bool = False) -> list[str]:
    """The signed map in ``n`` colours; odd ``n`` has zero exactly in the middle."""
    return ramp(DIVERGING_DARK if dark else DIVERGING, n)


def positive_half(n: int = 128, *, dark: bool = False) -> list[str]:
    """The upper arm of the signed map, zero to most positive, for quantities that cannot be negative."""
    stops = DIVERGING_DARK if dark else DIVERGING
    return ramp(stops[len(stops) // 2 :], n)


def layer_colours(n: int) -> list[str]:
    """One colour per layer, first to last."""
    return ramp(LAYER_STOPS, n)
