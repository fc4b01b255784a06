"""The sections of the page, each a string of HTML. All text that comes from a model or a user is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from ssmlens.plotting.caption import Caption
from ssmlens.plotting.labels import apart, visible
from ssmlens.report import charts, explained, wording
from ssmlens.report.about import FAMILIES, badge, settings
from ssmlens.report.numbers import ALL, REDUCTIONS, LayerNumbers, Numbers

__all__ = ["body", "options"]

Array = NDArray[np.float64]

_STRONGEST = 8
_THUMBS_PER_ROW = 12


def options(pairs: Iterable[tuple[str, str]]) -> str:
    """The entries of a select element."""
    return "".join(f'<option value="{escape(k)}">{escape(text)}</option>' for k, text in pairs)


def body(numbers: Numbers, shades: Array) -> str:
    """All sections in order; ``shades`` is the signed opacity of each token as the page opens."""
    parts = [_warning(numbers), _text(numbers, shades)]
    parts += [explained.section(numbers.explained, numbers.tokens, _inline, _explain(wording.EXPLAINED))]
    return "".join([*parts, _maps(numbers), _half_lives(numbers), _norms(numbers), _errors(numbers), settings(numbers)])


def _warning(numbers: Numbers) -> str:
    if numbers.verified:
        return ""
    return (
        '<section class="panel" role="alert"><h2>These figures do not describe the model</h2><p>At least one layer '
        f"was rebuilt with an error above the tolerance {numbers.tolerance:.0e}; see “How far the "
        "numbers can be trusted” below.</p></section>"
    )


def _text(numbers: Numbers, shades: Array) -> str:
    spans = []
    kind = "text apart" if apart(numbers.tokens) else "text"
    for i, (token, shade) in enumerate(zip(numbers.tokens, shades)):
        sign = " p" if shade > 0 else " n" if shade < 0 else ""
        last = " reader" if i == len(numbers.tokens) - 1 else ""
        style = f' style="--v:{abs(shade):.3f}"' if shade else ""
        spans.append(f'<span class="tok{sign}{last}" data-i="{i}"{style}>{_inline(token)}</span>')
    return (
        '<section id="text"><h2>The text, shaded by what <span id="who-reads">its last token</span> reads</h2>'
        f'<div class="panel"><div class="columns"><div><div class="{kind}" id="tokens" tabindex="0" role="group" '
        'aria-label="The text: arrow keys move along the tokens, Enter makes a token the reader">'
        f'{"".join(spans)}</div><p class="readout" id="readout" aria-live="polite"></p>'
        '<p class="scale">shading grows with the square root of magnitude; <span id="textscale"></span></p></div>'
        f"<div><h3>What comes next</h3>{_predictions(numbers)}</div></div></div>{_explain(wording.TEXT)}</section>"
    )


def _inline(token: str) -> str:
    """A token inside running text: its spaces stay spaces, line breaks are shown and kept."""
    if not token:
        return '<span class="ws">∅</span>'
    out = []
    for c in token:
        if c == " ":
            out.append(" ")
        elif c == "\n":
            out.append('<span class="ws">↵</span>\n')
        else:
            shown = visible(c)
            out.append(escape(c) if shown == c else f'<span class="ws">{escape(shown)}</span>')
    return "".join(out)


def _predictions(numbers: Numbers) -> str:
    peak = numbers.predictions[0].probability
    rows = "".join(
        f'<tr><td class="mono">{escape(visible(p.text))}</td><td>{_percent(p.probability)}</td><td aria-hidden="true">'
        f'<span class="bar" style="width:{100 * p.probability / peak if peak else 0:.0f}%"></span></td></tr>'
        for p in numbers.predictions
    )
    head = '<tr><th scope="col">token</th><th scope="col">probability</th><td></td></tr>'
    return f'<table class="predictions"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def _maps(numbers: Numbers) -> str:
    names = [(ALL, "all layers"), *((str(x.layer), f"layer {x.layer}") for x in numbers.layers)]
    columns = math.ceil(len(names) / math.ceil(len(names) / _THUMBS_PER_ROW))
    thumbs = "".join(
        f'<button type="button" data-layer="{key}" aria-pressed="{str(key == ALL).lower()}">'
        f'<canvas aria-hidden="true"></canvas>{name}</button>'
        for key, name in names
    )
    return (
        '<section id="maps"><h2>Implicit attention, layer by layer</h2><div class="panel"><div class="map"><div>'
        '<div class="stage"><canvas id="map" role="img" aria-label="Implicit attention map"></canvas><canvas '
        'id="cursor" tabindex="0" role="application" aria-label="Map cursor: arrow keys move it, with Shift by ten; '
        'Enter makes the row the reader" aria-describedby="pair"></canvas></div>'
        '<p class="scale"><span id="low"></span><canvas id="ramp" aria-hidden="true"></canvas><span id="high"></span>'
        '<span id="rule"></span></p></div><div><dl class="pair" id="pair" aria-live="polite"><dt>reading token t '
        '(row)</dt><dd id="who"></dd><dt>source token s (column)</dt><dd id="what"></dd><dt>distance</dt>'
        '<dd id="distance"></dd><dt>M[t, s]</dt><dd id="value"></dd></dl>'
        f"{_strongest(numbers)}<noscript><p>The maps are drawn by this page's own script, which is switched off; the "
        "table lists their strongest entries.</p></noscript></div></div>"
        f'<div class="thumbs" role="group" style="--columns:{columns}" '
        f'aria-label="Layers">{thumbs}</div></div>{_explain(wording.MAP)}</section>'
    )


def _strongest(numbers: Numbers) -> str:
    """The table twin of every map: its strongest entries off the diagonal."""
    how = REDUCTIONS[0]
    words = escape(Caption(reduction=how).reduction_words)
    maps = [(ALL, numbers.combined[how]), *((str(x.layer), x.maps[how]) for x in numbers.layers)]
    tables = []
    for key, matrix in maps:
        rows = "".join(
            f'<tr><td class="mono">{t} {escape(visible(numbers.tokens[t]))}</td><td class="left mono">{s} '
            f"{escape(visible(numbers.tokens[s]))}</td><td>{t - s}</td><td>{matrix[t, s]:.3g}</td></tr>"
            for t, s in _largest(matrix)
        )
        name = "All layers" if key == ALL else f"Layer {key}"
        tables.append(
            f'<div data-table="{key}"><h3>{name}: strongest reads of earlier tokens</h3><table><thead><tr>'
            '<th scope="col">reads</th><th scope="col" class="left">what</th><th scope="col">back</th>'
            f'<th scope="col">value</th></tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return f'{"".join(tables)}<p class="scale">{words}</p>'


def _largest(matrix: Array) -> list[tuple[int, int]]:
    """(t, s) of the largest magnitudes below the diagonal, one per reading token."""
    strict = np.abs(np.tril(matrix, -1))
    best = strict.argmax(axis=1)
    height = strict[np.arange(len(matrix)), best]
    order = [int(t) for t in np.argsort(-height, kind="stable")[:_STRONGEST] if height[t] > 0]
    return [(t, int(best[t])) for t in order]


def _half_lives(numbers: Numbers) -> str:
    length = len(numbers.tokens)
    chart = charts.strips(
        [(f"layer {x.layer}", x.half_life) for x in numbers.layers],
        reference=float(length),
        reference_text=f"text: {length}",
        y_title="half-life (tokens)",
        alt="Half-life of every head by layer on a logarithmic axis; the table below gives its quantiles.",
    )
    rows = "".join(_half_life_row(x, length) for x in numbers.layers)
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in (
            "layer",
            "shortest",
            "10 %",
            "median",
            "90 %",
            "longest",
            "beyond the text",
            "median, all states",
            "last token reads",
        )
    )
    return (
        f'<section id="half-lives"><h2>Half-lives, by layer and head</h2><div class="panel">{chart}<table><thead>'
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{_explain(wording.HALF_LIFE)}</section>"
    )


def _half_life_row(layer: LayerNumbers, length: int) -> str:
    known = layer.half_life[~np.isnan(layer.half_life)]
    cells = [f"layer {layer.layer}"]
    if known.size:
        # "lower" picks heads that exist, so that an infinite one does not make its neighbours infinite.
        cells += [_tokens(q) for q in np.quantile(known, (0, 0.1, 0.5, 0.9, 1), method="lower")]
        cells.append(f"{(known > length).mean():.0%} of heads")
    else:
        cells += ["undefined"] * 6
    cells.append(_tokens(layer.median_half_life))
    distance = layer.mean_distance[~np.isnan(layer.mean_distance)]
    cells.append(f"{distance.mean():.1f} tokens back" if distance.size else "nothing")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _norms(numbers: Numbers) -> str:
    chart = charts.lines(
        [(f"layer {x.layer}", x.norms) for x in numbers.layers],
        y_title="norm of h[t]",
        x_title="token",
        alt="Norm of each layer's state after every token; arrow keys move a cursor that reads out the values.",
    )
    rows = "".join(
        f"<tr><td>layer {x.layer}</td><td>{x.norms[0]:.3g}</td><td>{np.median(x.norms):.3g}</td>"
        f"<td>{x.norms.max():.3g}</td><td>{int(x.norms.argmax())}</td><td>{x.norms[-1]:.3g}</td></tr>"
        for x in numbers.layers
    )
    head = "".join(f'<th scope="col">{n}</th>' for n in ("layer", "first", "median", "largest", "at token", "last"))
    return (
        f'<section id="norms"><h2>State norms over time</h2><div class="panel">{chart}<p class="readout" '
        'id="normvalue" aria-live="polite">Point at the chart to read out values.</p><details><summary>As a table'
        f"</summary><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details></div>"
        f"{_explain(wording.NORMS)}</section>"
    )


def _errors(numbers: Numbers) -> str:
    rows = "".join(
        f"<tr><td>layer {x.layer}</td><td class=left>{escape(FAMILIES.get(x.family, x.family))}</td><td>{x.n_heads}"
        f"</td><td>{x.head_dim}</td><td>{x.d_state}</td><td>{x.error:.2e}</td>"
        f"<td>{badge(x.error <= numbers.tolerance, 'pass', 'fail')}</td></tr>"
        for x in numbers.layers
    )
    names = ("layer", "family", "heads", "channels per head", "states", "reconstruction error", "verdict")
    head = "".join(f'<th scope="col"{" class=left" if n == "family" else ""}>{n}</th>' for n in names)
    return (
        '<section id="errors"><h2>How far the numbers can be trusted</h2><div class="panel"><table><thead><tr>'
        f'{head}</tr></thead><tbody>{rows}</tbody></table><p class="scale">tolerance {numbers.tolerance:.0e} for '
        f"{escape(str(numbers.settings.get('dtype', '')))}</p></div>{_explain(wording.ERROR)}</section>"
    )


def _explain(pair: Sequence[str]) -> str:
    shows, hides = pair
    return f'<div class="explain"><p><b>What it shows.</b> {shows}</p><p><b>What it does not.</b> {hides}</p></div>'


def _percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 else "&lt; 0.1 %"


def _tokens(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
