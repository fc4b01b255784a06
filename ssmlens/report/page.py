"""The numbers of a report, laid out as one HTML page that loads nothing."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlens.plotting import palette
from ssmlens.plotting.caption import UNSIGNED, Caption
from ssmlens.plotting.labels import apart, plain, visible
from ssmlens.plotting.scales import causal, pool_max_abs, symmetric_limits
from ssmlens.report import about, sections
from ssmlens.report.numbers import ALL, REDUCTIONS, Numbers

__all__ = ["MAX_CELLS", "TEXT_POWER", "render"]

Array = NDArray[np.float64]

MAX_CELLS = 256
"""Longer texts are drawn with at most so many cells per side, each the largest magnitude of its block."""

TEXT_POWER = 0.5
"""Text is shaded by the magnitude to this power: with 1, all but the nearest tokens would look white."""


def render(numbers: Numbers, title: str | None = None) -> str:
    """The page, as one string of HTML with its style, script and data inside."""
    title = title or f"What {numbers.settings['model']} remembers"
    title = plain(title)
    factor = pool_max_abs(numbers.combined[REDUCTIONS[0]], MAX_CELLS).factor
    fill = {
        "title": escape(title),
        "heading": escape(title),
        "style": _style(),
        "script": _file("page.js"),
        "lead": about.lead(numbers),
        "facts": about.facts(numbers),
        "layer_options": sections.options(
            [(ALL, "all layers"), *((str(x.layer), f"layer {x.layer}") for x in numbers.layers)]
        ),
        "how_options": sections.options((how, Caption(reduction=how).reduction_words) for how in REDUCTIONS),
        "sections": sections.body(numbers, _shades(numbers)),
        "footer": about.footer(numbers),
        "data": _json(_data(numbers, factor)),
    }
    return Template(_file("page.html")).substitute(fill)


def _shades(numbers: Numbers) -> Array:
    """Signed opacity of each token in the page as it opens: all layers, first reduction, last token."""
    row = numbers.combined[REDUCTIONS[0]][-1]
    # The token's own entry would drown the rest: shading is relative to the earlier tokens.
    peak = np.abs(row[:-1]).max() if len(row) > 1 else np.abs(row).max()
    return np.sign(row) * np.abs((row / peak).clip(-1, 1)) ** TEXT_POWER if peak > 0 else np.zeros_like(row)


def _data(numbers: Numbers, factor: int) -> dict[str, Any]:
    layers = [_layer_data(ALL, "all layers", numbers.combined, factor)]
    for layer in numbers.layers:
        layers.append(_layer_data(str(layer.layer), f"layer {layer.layer}", layer.maps, factor))
    return {
        "tokens": numbers.tokens,
        "labels": [visible(token) for token in numbers.tokens],
        "apart": apart(numbers.tokens),
        "layers": layers,
        "reductions": list(REDUCTIONS),
        "unsigned": [how for how in REDUCTIONS if how in UNSIGNED],
        "words": {how: Caption(reduction=how).reduction_words for how in REDUCTIONS},
        "factor": factor,
        "relative": "each layer's row divided by its largest magnitude, then averaged over layers",
        "pooled": f"each cell is the largest magnitude of {factor} x {factor} entries",
        "power": TEXT_POWER,
        "ramps": {
            theme: {
                "signed": palette.diverging(129, dark=theme == "dark"),
                "magnitude": palette.positive_half(129, dark=theme == "dark"),
                "missing": palette.MISSING_DARK if theme == "dark" else palette.MISSING,
            }
            for theme in ("light", "dark")
        },
        "norms": [[f"layer {x.layer}", _rounded(x.norms)] for x in numbers.layers],
    }


def _layer_data(key: str, name: str, maps: dict[str, Array], factor: int) -> dict[str, Any]:
    packed, last = {}, {}
    for how, matrix in maps.items():
        drawn = pool_max_abs(causal(matrix), MAX_CELLS).matrix
        limits = symmetric_limits(drawn)
        lower = drawn[np.tri(len(drawn), dtype=bool)]
        packed[how] = {**_float16(lower), "limit": limits.value, "rule": limits.rule}
        if factor > 1:
            last[how] = _float16(matrix[-1])
    return {"key": key, "name": name, "maps": packed, "last": last}


def _float16(values: Array) -> dict[str, Any]:
    """``values / peak`` as little-endian float16 in base64: three digits, and no overflow whatever the scale."""
    peak = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    packed = (values / peak).astype("<f2").tobytes()
    return {"f16": base64.b64encode(packed).decode("ascii"), "peak": peak}


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]


def _json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever the text holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _style() -> str:
    shades = palette.TEXT_SHADE
    return (
        _file("page.css")
        .replace("$POS", " ".join(map(str, shades["positive"])))
        .replace("$NEG", " ".join(map(str, shades["negative"])))
    )


def _file(name: str) -> str:
    return resources.files("ssmlens.report").joinpath(name).read_text(encoding="utf-8")
