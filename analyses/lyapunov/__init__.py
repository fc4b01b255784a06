"""How perturbations of a state grow or die: Lyapunov exponents of a model on four levels, and of any map.

Of any differentiable map ``x -> x`` or ``(x, u) -> x``: `spectrum`, `covariant_vectors`, `transient_gain`, and from
runs alone `two_trajectory`; `kaplan_yorke` turns exponents into a dimension, and `systems` holds maps with known
answers. Of a language model:

==================  ===============================================================================================
`latent`            frozen gates: the mean log decay of every state
`stack`             the whole model with its text given, all layers and convolution windows
`transient_gain`    how much a perturbation can grow before it dies
`closed_loop`       the model fed with its own expectation of the next token
`divergence`        the model fed with the tokens that it draws
`summary`           all of them; what each level says and does not say is in `READING`
==================  ===============================================================================================

Rates are in nats per token or step. A key-value cache never decays, so that its exponents would be 0 in a growing
number; models with attention layers are not loaded by ssmlens, and no level mixes such entries in.
"""

from __future__ import annotations

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov import systems
from ssmlens.analyses.lyapunov._closed import TEMPERATURES, closed_loop
from ssmlens.analyses.lyapunov._covariant import covariant_vectors
from ssmlens.analyses.lyapunov._dimension import kaplan_yorke
from ssmlens.analyses.lyapunov._divergence import divergence
from ssmlens.analyses.lyapunov._latent import latent
from ssmlens.analyses.lyapunov._pair import two_trajectory
from ssmlens.analyses.lyapunov._spectrum import spectrum
from ssmlens.analyses.lyapunov._stack import stack
from ssmlens.analyses.lyapunov._summary import Budget, summary
from ssmlens.analyses.lyapunov._transient import HORIZONS, transient_gain
from ssmlens.analyses.lyapunov._words import READING, Reading

__all__ = [
    "HORIZONS",
    "READING",
    "TEMPERATURES",
    "Budget",
    "Reading",
    "Result",
    "closed_loop",
    "covariant_vectors",
    "divergence",
    "kaplan_yorke",
    "latent",
    "spectrum",
    "stack",
    "summary",
    "systems",
    "transient_gain",
    "two_trajectory",
]
