"""Results to figures: matplotlib for files here, plotly for pages in `ssmlens.plotting.pages`.

Drawing computes nothing beyond colour limits and max-pooling of large maps, and says both in the figure.
Colours live in `ssmlens.plotting.palette`. The functions, the same in both worlds::

    attention_map(matrix, tokens, caption)      # (t, s)        one implicit-attention map
    token_row(values, tokens, caption)          # (s,)          the text coloured by one row
    half_life_map({layer: (h,)}, caption)       # half-life by layer and head
    state_norms({layer: (t,)}, tokens, caption) # norm of the state over time
    attribution(found, target)                  # an Attribution as a waterfall to its logit

For files only::

    scored_text(found, target)                  # the text coloured by the scores of an Attribution
    methods_side_by_side([found, ...])          # several methods on one prompt

``Caption.of(trace, layer, reduction)`` carries model, layer, reduction, sign and reconstruction error there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .caption import Caption
from .scales import Limits, Pooled, pool_max_abs, symmetric_limits

if TYPE_CHECKING:
    from .attributions import attribution, methods_side_by_side, scored_text
    from .figures import attention_map, half_life_map, save, state_norms, token_row

__all__ = [
    "Caption",
    "Limits",
    "Pooled",
    "attention_map",
    "attribution",
    "half_life_map",
    "methods_side_by_side",
    "pool_max_abs",
    "save",
    "scored_text",
    "state_norms",
    "symmetric_limits",
    "token_row",
]


def __getattr__(name: str) -> Any:
    # Pages and reports take colours and limits from here and never draw with matplotlib, which is slow to import.
    if name in ("figures", "pages"):
        return importlib.import_module(f".{name}", __name__)
    if name in ("attribution", "methods_side_by_side", "scored_text"):
        return getattr(importlib.import_module(".attributions", __name__), name)
    if name in __all__:
        return getattr(importlib.import_module(".figures", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
