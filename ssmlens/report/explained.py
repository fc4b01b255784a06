"""The report's section about the prediction: the exact frozen decomposition of the likeliest token's logit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssmlens.errors import ReconstructionError, UnsupportedModelError
from ssmlens.plotting.labels import apart, visible

if TYPE_CHECKING:
    from ssmlens.lens import Lens

__all__ = ["MOST_TOKENS", "Explained", "explain", "section"]

MOST_TOKENS = 1024
"""Longest text whose prediction is attributed: one more forward and backward pass of the whole model."""

_STRONGEST = 10


@dataclass(frozen=True)
class Explained:
    """One logit taken apart.

    Args:
        target: text of the explained token.
        scores: (t,) share of each token in the logit.
        bias: share of the additive weights.
        logit: what they sum to.
        error: |sum - logit| / |logit|.
    """

    target: str
    scores: NDArray[np.float64]
    bias: float
    logit: float
    error: float


def explain(lens: Lens, ids: Sequence[int], decode: Callable[[Sequence[int]], str] | None = None) -> Explained | None:
    """Decompose the top logit behind the last token; None for long texts and models that cannot be decomposed."""
    if len(ids) > MOST_TOKENS:
        return None
    from ssmlens.attribution import decompose

    try:
        found = decompose(lens, list(ids))
    except (UnsupportedModelError, ReconstructionError):
        return None
    target = int(found.target[0])
    return Explained(
        target=f"<{target}>" if decode is None else str(decode([target])),
        scores=found.scores[0].detach().double().cpu().numpy(),
        bias=float(found.bias[0]),
        logit=float(found.logit[0]),
        error=float(found.completeness_error[0]),
    )


def section(found: Explained | None, tokens: Sequence[str], inline: Callable[[str], str], explain_with: Any) -> str:
    """The section as HTML; empty without a decomposition."""
    if found is None:
        return ""
    peak = float(np.abs(found.scores).max()) or 1.0
    spans = []
    for token, score in zip(tokens, found.scores):
        sign = "p" if score > 0 else "n" if score < 0 else ""
        shade = np.sqrt(abs(score) / peak)
        spans.append(f'<span class="part {sign}" style="--v:{shade:.3f}" title="{score:+.4g}">{inline(token)}</span>')
    best = [int(k) for k in np.argsort(-np.abs(found.scores), kind="stable")[:_STRONGEST]]
    rows = "".join(
        f'<tr><td class="mono">{k} {escape(visible(tokens[k]))}</td><td>{found.scores[k]:+.3f}</td>'
        f"<td>{_share(found.scores[k], found.logit)}</td></tr>"
        for k in best
    )
    others = float(found.scores.sum() - found.scores[best].sum())
    sums = [(f"{len(tokens) - len(best)} other tokens", others)] if len(tokens) > len(best) else []
    sums += [("additive weights (bias)", found.bias), ("the logit", found.logit)]
    rows += "".join(f"<tr><td>{n}</td><td>{x:+.3f}</td><td>{_share(x, found.logit)}</td></tr>" for n, x in sums)
    kind = "text apart" if apart(list(tokens)) else "text"
    target = escape(visible(found.target))
    return (
        f'<section id="explained"><h2>What the logit of <span class="mono">{target}</span> is made of</h2>'
        f'<div class="panel"><div class="columns"><div><div class="{kind}">{"".join(spans)}</div><p class="scale">'
        f"shading grows with the square root of magnitude, full at {peak:.3g}; the shares below sum to the logit with "
        f'a relative error of {found.error:.0e}</p></div><div><table><thead><tr><th scope="col">token</th>'
        f'<th scope="col">share of the logit</th><th scope="col"></th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"</div></div>{explain_with}</section>"
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:+.0f}&nbsp;%" if whole else ""
