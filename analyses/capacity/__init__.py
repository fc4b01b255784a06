"""What a state holds and what of it is used.

Bounds from above (`effective_state_size`, `hankel`), what the model needs (`rank_floor`), statistics of the state with
a null model beside them (`rank_statistics`, `rank_null`), memory for random inputs (`memory_capacity`,
`information_processing_capacity`), laws of associative storage (`hebbian_load`, `effective_bits`), and where a
streamed model falls apart (`collapse`).
"""

from __future__ import annotations

from ssmlens.analyses.capacity._state_size import FORMS, effective_state_size, hankel

__all__ = ["FORMS", "effective_state_size", "hankel"]
