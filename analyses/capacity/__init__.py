"""What a state holds and what of it is used.

Bounds from above (`effective_state_size`, `hankel`), what the model needs (`rank_floor`), statistics of the state with
a null model beside them (`rank_statistics`, `rank_null`), memory for random inputs (`memory_capacity`,
`information_processing_capacity`, `fisher_memory`), laws of associative storage (`hebbian_load`, `effective_bits`), and
where a streamed model falls apart (`collapse`).
"""

from __future__ import annotations

from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._associative import effective_bits, hebbian_load
from ssmlens.analyses.capacity._collapse import BY, collapse, collapse_onset
from ssmlens.analyses.capacity._copied import copied_bits
from ssmlens.analyses.capacity._drive import LAWS, drive
from ssmlens.analyses.capacity._linear_memory import memory_capacity
from ssmlens.analyses.capacity._linear_theory import fisher_memory, memory_capacity_exact
from ssmlens.analyses.capacity._metrics import METRICS
from ssmlens.analyses.capacity._processing import POLYNOMIALS, information_processing_capacity, selectivity_tax
from ssmlens.analyses.capacity._rank_floor import READINGS, rank_floor
from ssmlens.analyses.capacity._rank_statistics import PER, rank_null, rank_statistics
from ssmlens.analyses.capacity._state_size import FORMS, effective_state_size, hankel
from ssmlens.analyses.capacity._summary import summary

__all__ = [
    "BY",
    "FORMS",
    "LAWS",
    "METRICS",
    "PER",
    "POLYNOMIALS",
    "READINGS",
    "Result",
    "collapse",
    "collapse_onset",
    "copied_bits",
    "drive",
    "effective_bits",
    "effective_state_size",
    "fisher_memory",
    "hankel",
    "hebbian_load",
    "information_processing_capacity",
    "memory_capacity",
    "memory_capacity_exact",
    "rank_floor",
    "rank_null",
    "rank_statistics",
    "selectivity_tax",
    "summary",
]
