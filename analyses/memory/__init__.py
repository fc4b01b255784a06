"""What a recurrence remembers: how fast it forgets, how far back it reads, how large its states are and whether they
have settled.

Every function takes a `ssmlens.Trace` (all its layers, with a ``layer`` axis in the result), a `MixerTrace` or a
`Recurrence`, and returns a frozen `Result` in float64. Only real tokens count; batch rows stay separate. Axes:
``batch``, ``head`` (Mamba-1: one per inner channel), ``state`` (left out where all states of a head share the
decay), and ``token``, ``row`` or ``quantile``. What each number does not say is in analyses/README.md.
"""

from __future__ import annotations

from ssmlens.analyses._result import Result
from ssmlens.analyses.memory._cross import cross_layer_fidelity
from ssmlens.analyses.memory._decay import KINDS, half_life, retention
from ssmlens.analyses.memory._fidelity import fidelity
from ssmlens.analyses.memory._reach import mean_distance
from ssmlens.analyses.memory._rows import REDUCTIONS
from ssmlens.analyses.memory._saturation import onset_time, saturation
from ssmlens.analyses.memory._states import state_norm
from ssmlens.analyses.memory._summary import summary
from ssmlens.analyses.memory._transport import transport

__all__ = [
    "KINDS",
    "REDUCTIONS",
    "Result",
    "cross_layer_fidelity",
    "fidelity",
    "half_life",
    "mean_distance",
    "onset_time",
    "retention",
    "saturation",
    "state_norm",
    "summary",
    "transport",
]
