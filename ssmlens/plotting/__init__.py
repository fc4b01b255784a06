"""Results to figures: matplotlib for files here, plotly for pages in `ssmlens.plotting.pages`.

Drawing computes nothing beyond colour limits and max-pooling of large maps, and says both in the figure.
Colours live in `ssmlens.plotting.palette`. The functions, the same in both worlds::

    attention_map(matrix, tokens, caption)      # (t, s)        one implicit-attention map
    token_row(values, tokens, caption)          # (s,)          the text coloured by one row
    half_life_map({layer: (h,)}, caption)       # half-life by layer and head
    state_norms({layer: (t,)}, tokens, caption) # norm of the state over time

``Caption.of(trace, layer, reduction)`` carries model, layer, reduction, sign and reconstruction error there.
"""

from .caption import Caption
from .figures import attention_map, half_life_map, save, state_norms, token_row
from .scales import Limits, Pooled, pool_max_abs, symmetric_limits

__all__ = [
    "Caption",
    "Limits",
    "Pooled",
    "attention_map",
    "half_life_map",
    "pool_max_abs",
    "save",
    "state_norms",
    "symmetric_limits",
    "token_row",
]
