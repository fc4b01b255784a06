"""The one form that every model family lowers to, and that every analysis reads.

Per batch row and head, with the state ``h`` a (p, n) matrix::

    h[t] = exp(log_decay[t]) * h[t-1]                              the state after step t contains token t
    h[t] = h[t] - outer(h[t] @ erase_read[t], erase_write[t])      only families with a delta rule
    h[t] = h[t] + outer(value[t], write[t])
    y[t] = h[t] @ read[t] + skip[t]                                output (p,)

Glossary (Mamba | attention-like families):

==============  =====================================  =========================
here            Mamba-1 and Mamba-2                    GLA, RetNet, delta rule
==============  =====================================  =========================
``value``       x, after convolution and SiLU          v
``write``       dt * B of the head's group             k, beta * k
``read``        C of the head's group                  scaled q
``log_decay``   dt * A, with A = -exp(A_log)           log gate
``skip``        D * x                                  0
==============  =====================================  =========================

The write uses dt * B (Euler), as all released Mamba code does, not the zero-order hold printed in the papers.

Axes: ``b`` batch, ``t`` time of reading (row), ``s`` source time, a copy of t (column), ``h`` head, ``g`` group,
``p`` channel in head, ``n`` state. Mamba-1 has one head per inner channel and p = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssmlens.attention import ImplicitAttention
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs, expand_groups

__all__ = ["Recurrence"]


@dataclass(frozen=True, eq=False)
class Recurrence:
    """One causal linear recurrence: what a mixer wrote, kept, forgot and read.

    Factorised pieces (``dt``, ``A``, shared groups) stay factorised in ``inputs``; the properties below expand
    them on request. Computation is in float64 for float64 inputs and in float32 otherwise.

    Args:
        inputs: the scan inputs, see `ssmlens.kernels.inputs.ScanInputs`.
        D: (h,) or (h, p) weight of the current value in the output; None for no skip.
        lengths: (b,) number of real tokens of each row. Positions at and after it are padding on the right:
            they neither decay nor write nor read. None means that every position is real.
    """

    inputs: ScanInputs
    D: Tensor | None = None
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        h, p = self.n_heads, self.head_dim
        if self.D is not None and tuple(self.D.shape) not in ((h,), (h, p)):
            raise ValueError(f"D is (h={h},) or (h={h}, p={p}), got {tuple(self.D.shape)}")
        if self.lengths is not None and tuple(self.lengths.shape) != (self.batch,):
            raise ValueError(f"lengths is (b={self.batch},), got {tuple(self.lengths.shape)}")

    # Sizes

    @property
    def batch(self) -> int:
        return self.inputs.batch

    @property
    def length(self) -> int:
        """Positions on the time axis, padding included."""
        return self.inputs.length

    @property
    def n_heads(self) -> int:
        return self.inputs.n_heads

    @property
    def head_dim(self) -> int:
        return self.inputs.head_dim

    @property
    def d_state(self) -> int:
        return self.inputs.d_state

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything computed: float64 for float64 inputs, else float32."""
        return self.inputs.dtype

    @property
    def device(self) -> torch.device:
        return self.inputs.value.device

    @cached_property
    def real_lengths(self) -> Int[Tensor, " b"]:
        """Number of real tokens per row, (b,), also when nothing is padded."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((self.batch,), self.length, dtype=torch.long, device=self.device)

    @cached_property
    def real(self) -> Bool[Tensor, "b t"]:
        """True where the position holds a real token, (b, t)."""
        return torch.arange(self.length, device=self.device) < self.real_lengths[:, None]

    # The terms of the recurrence

    @property
    def value(self) -> Float[Tensor, "b t h p"]:
        return self.inputs.value

    @property
    def log_decay(self) -> Float[Tensor, "b t h m"]:
        """Natural log of the decay, (b, t, h, n), or (b, t, h, 1) when all n share it; -inf at a reset.

        Allocates b * t * h * n numbers for Mamba-1: long sequences are better served by ``dt`` and ``A``.
        """
        return self.inputs.full_log_decay()

    @property
    def write(self) -> Float[Tensor, "b t h n"]:
        """Write direction with dt included, (b, t, h, n)."""
        return self.inputs.full_write()

    @property
    def read(self) -> Float[Tensor, "b t h n"]:
        """Read direction, (b, t, h, n); a view where heads share it."""
        return expand_groups(self.inputs.read.to(self.dtype), self.n_heads)

    @property
    def skip(self) -> Float[Tensor, "b t h p"]:
        """What the current token adds to its own output around the state, (b, t, h, p)."""
        value = self.value.to(self.dtype)
        if self.D is None:
            return torch.zeros_like(value)
        D = self.D.to(self.dtype)
        return value * (D[:, None] if D.ndim == 1 else D)

    @property
    def erase_read(self) -> Float[Tensor, "b t h n"] | None:
        x = self.inputs.erase_read
        return None if x is None else expand_groups(x.to(self.dtype), self.n_heads)

    @property
    def erase_write(self) -> Float[Tensor, "b t h n"] | None:
        x = self.inputs.erase_write
        return None if x is None else expand_groups(x.to(self.dtype), self.n_heads)

    @property
    def initial(self) -> Float[Tensor, "b h p n"] | None:
        return self.inputs.initial

    @property
    def dt(self) -> Float[Tensor, "b t h"] | None:
        """Step size after softplus and limits, (b, t, h); None for families without one."""
        return self.inputs.dt

    @property
    def A(self) -> Float[Tensor, "h m"] | None:
        """Decay rate, (h, n) or (h, 1), <= 0; None for families with an explicit decay."""
        return self.inputs.A

    # Running it

    def run(self, *, impl: str = "auto") -> Float[Tensor, "b t h p"]:
        """Outputs y with the skip, (b, t, h, p); differentiable."""
        return self.add_skip(scan.run(self.inputs, impl=impl)[0])

    def add_skip(self, y: Float[Tensor, "b t h p"]) -> Float[Tensor, "b t h p"]:
        """y (b, t, h, p) of the state alone, with the skip added."""
        if self.D is None:
            return y
        D = self.D.to(y.dtype)
        return torch.addcmul(y, self.value.to(y.dtype), D[:, None] if D.ndim == 1 else D)

    def states(self, at: Sequence[int] | None = None, *, impl: str = "auto") -> Float[Tensor, "b k h p n"]:
        """The state after the steps ``at`` (negative counts from the end), (b, len(at), h, p, n); differentiable.

        Without ``at`` every state is returned, b * t * h * p * n numbers.
        """
        return scan.states(self.inputs, at, impl=impl)

    def final_state(self, *, impl: str = "auto") -> Float[Tensor, "b h p n"]:
        """The state after the last real token of each row, (b, h, p, n)."""
        return scan.run(self.inputs, impl=impl)[1]

    def statistics(self, *, impl: str = "auto") -> scan.Statistics:
        """Norms of the state at every token, (b, t, h) each, see `ssmlens.kernels.statistics.Statistics`.

        The states themselves are never held, and no gradient is recorded.
        """
        return scan.statistics(self.inputs, impl=impl)

    def stream_statistics(self, *, impl: str = "auto") -> Iterator[tuple[slice, scan.Statistics]]:
        """The same in stretches of time, (positions, statistics of these tokens), for texts of any length."""
        return scan.stream_statistics(self.inputs, impl=impl)

    @property
    def attention(self) -> ImplicitAttention:
        """The matrix M with ``y = M value + skip`` for a zero initial state, as an operator."""
        return ImplicitAttention(self.inputs)

    def __getitem__(self, index: Any) -> Recurrence:
        """A stretch of rows and of time, ``rec[:, a:b]``, carrying the state that the tokens before it left."""
        rows, times = index if isinstance(index, tuple) else (index, slice(None))
        if not (isinstance(rows, slice) and isinstance(times, slice)) or (rows.step, times.step) not in (
            (None, None),
            (1, 1),
            (None, 1),
            (1, None),
        ):
            raise IndexError("index a recurrence with slices of step 1, as in rec[:, a:b]")
        cut = {k: x if k == "A" else x[rows] for k, x in self.inputs.tensors().items()}
        inputs = replace(self.inputs, **cut)
        start, stop, _ = times.indices(self.length)
        stop = max(start, stop)
        part = inputs.slice(start, stop)
        if start:
            part = part.replace(initial=scan.run(inputs.slice(0, start))[1])
        lengths = None
        if self.lengths is not None:
            lengths = (self.lengths[rows] - start).clamp(0, stop - start)
        return Recurrence(part, D=self.D, lengths=lengths)

    def __repr__(self) -> str:
        kind = "scalar" if (self.A if self.A is not None else self.inputs.log_decay).shape[-1] == 1 else "per-state"  # type: ignore[union-attr]
        return (
            f"Recurrence(batch={self.batch}, length={self.length}, heads={self.n_heads}, head_dim={self.head_dim}, "
            f"d_state={self.d_state}, {kind} decay{', delta rule' if self.inputs.has_erase else ''}, {self.dtype})"
        )
