"""What a model can do without, and how its tensors and its loss surface are shaped.

`removal` and `greedy` take blocks, scans and heads out; `token_scores` and `token_reduction` do it with tokens,
`layer_confidence` and `early_exit` with the layers above. `outliers` looks at the tails of a model's tensors before
and after rotations, `hessian` at the curvature of its loss.
"""

from __future__ import annotations

from ssmlens.analyses.sensitivity._early_exit import STATES, early_exit, layer_confidence
from ssmlens.analyses.sensitivity._greedy import greedy, rank_correlation
from ssmlens.analyses.sensitivity._hessian import Curvature, hessian, spectrum_ends, spectrum_moments
from ssmlens.analyses.sensitivity._outliers import ROTATIONS, TENSORS, gini, outlier_statistics, outliers, rotated
from ssmlens.analyses.sensitivity._removal import removal
from ssmlens.analyses.sensitivity._rotations import hadamard, karhunen_loeve, random_rotation
from ssmlens.analyses.sensitivity._text import SPLITS
from ssmlens.analyses.sensitivity._tokens import CONTROLS, SCORES, token_reduction, token_scores
from ssmlens.analyses.sensitivity._units import KINDS

__all__ = [
    "CONTROLS", "KINDS", "ROTATIONS", "SCORES", "SPLITS", "STATES", "TENSORS", "Curvature", "early_exit", "gini",
    "greedy", "hadamard", "hessian", "karhunen_loeve", "layer_confidence", "outlier_statistics", "outliers",
    "random_rotation", "rank_correlation", "removal", "rotated", "spectrum_ends", "spectrum_moments",
    "token_reduction", "token_scores",
]  # fmt: skip
