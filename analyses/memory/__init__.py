"""What a recurrence remembers: how fast it forgets, how far back it reads, what a probe can still tell of the past, how
large its states are and whether they have settled.

From a `ssmlens.Trace` (all its layers, with a ``layer`` axis in the result), a `MixerTrace` or a `Recurrence`::

    retention, half_life, timescale_spectrum, mean_distance, channel_class    decay and reach
    saturation, onset_time, state_norm, summary                               how full and how settled the states are
    fidelity, cross_layer_fidelity, transport, recall_by_age                  what of the past is still there
    window_by_difference, norm_clip, rescaled                                 remedies, on one recurrence

From a `ssmlens.Lens` and a prompt, through the whole network::

    effective_remembrance, influence, state_stream, answers_by_age

`fidelity` and `cross_layer_fidelity` also take plain states and targets, `modes` a state matrix, `collapse_onset`
losses and variances.

Every function but `rescaled` returns a frozen `Result` in float64. Only real tokens count; batch rows stay separate
unless a probe is fitted on them. Axes: ``batch``, ``head`` (Mamba-1: one per inner channel), ``state`` (left out where
all states of a head share the decay), and ``token``, ``row``, ``quantile`` or ``lag``. What each number does not say is
in docs/studies/memory.md.
"""

from __future__ import annotations

from ssmlens.analyses._result import Result
from ssmlens.analyses.memory._age import recall_by_age
from ssmlens.analyses.memory._answers import answers_by_age
from ssmlens.analyses.memory._cross import cross_layer_fidelity
from ssmlens.analyses.memory._decay import KINDS, half_life, retention
from ssmlens.analyses.memory._fidelity import fidelity
from ssmlens.analyses.memory._influence import influence
from ssmlens.analyses.memory._mitigate import norm_clip, rescaled, window_by_difference
from ssmlens.analyses.memory._reach import mean_distance
from ssmlens.analyses.memory._remembrance import effective_remembrance
from ssmlens.analyses.memory._rows import REDUCTIONS
from ssmlens.analyses.memory._saturation import onset_time, saturation
from ssmlens.analyses.memory._spectrum import channel_class, modes, timescale_spectrum
from ssmlens.analyses.memory._states import state_norm
from ssmlens.analyses.memory._stream import collapse_onset, state_stream
from ssmlens.analyses.memory._summary import summary
from ssmlens.analyses.memory._transport import transport

__all__ = [
    "KINDS",
    "REDUCTIONS",
    "Result",
    "answers_by_age",
    "channel_class",
    "collapse_onset",
    "cross_layer_fidelity",
    "effective_remembrance",
    "fidelity",
    "half_life",
    "influence",
    "mean_distance",
    "modes",
    "norm_clip",
    "onset_time",
    "recall_by_age",
    "rescaled",
    "retention",
    "saturation",
    "state_norm",
    "state_stream",
    "summary",
    "timescale_spectrum",
    "transport",
    "window_by_difference",
]
