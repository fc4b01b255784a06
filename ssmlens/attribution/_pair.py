"""One pair of tokens in one mixer: what the earlier one adds to the later one's output, and on which way.

A contribution ``T[t, s]`` (see `contributions`) goes through the taps of the convolution: token s is written at s and,
carried on by the convolution, at s + 1, ..., s + K - 1. So it is a sum of one vector per tap, and each of them is
what the state still holds of that write, and the skip where the write is at t itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ssmlens.attribution._contributions import contributions
from ssmlens.errors import SsmlensError
from ssmlens.trace import MixerTrace

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PairPath", "pair_path"]


@dataclass(frozen=True, eq=False)
class PairPath:
    """How one token reaches one later token inside one mixer.

    Args:
        layer: index of the layer.
        target: position t whose output is looked at.
        source: position s that contributes to it.
        by_tap: (k, d) what comes through each tap of the convolution, that of the token's own step first; they sum to
            the contribution T[t, s] in the residual stream.
        share: part of the mixer's output at t: the contribution along the output, over the output's length squared.
            The shares of all sources and of what no token owns sum to 1.
        attention: (h,) M[t, s] of every head.
        decay: (h, m) what decay leaves at t of a state after s: the product of the decays after s. m is 1 where the
            states of a head share their decay, else n. 1 where t is s.
        error: relative residual of all contributions of the layer, see `Contributions.error`.
    """

    layer: int
    target: int
    source: int
    by_tap: Float[Tensor, "k d"] = field(repr=False)
    share: float
    attention: Float[Tensor, " h"] = field(repr=False)
    decay: Float[Tensor, "h m"] = field(repr=False)
    error: float

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The contribution T[t, s], (d,)."""
        return self.by_tap.sum(0)

    @property
    def norm(self) -> float:
        """Its Euclidean length, in units of the residual stream."""
        return float(self.vector.norm())

    @property
    def tap_shares(self) -> Float[Tensor, " k"]:
        """(k,) each tap's part of the contribution: along it, over its length squared. They sum to 1; NaN where the
        contribution is zero. One above 1 is taken back by another below 0."""
        whole = self.vector
        return (self.by_tap @ whole) / whole.square().sum()

    @property
    def conv_share(self) -> float:
        """What the convolution carried into later steps before it was written: the shares of all taps but the first."""
        return float(self.tap_shares[1:].sum())

    @property
    def decay_range(self) -> tuple[float, float, float]:
        """Smallest, median and largest decay over heads and states."""
        flat = self.decay.flatten()
        return float(flat.min()), float(flat.quantile(0.5, interpolation="lower")), float(flat.max())

    def table(self) -> pd.DataFrame:
        """One row per head: head, M[t, s], and the largest decay of its states."""
        import pandas as pd

        return pd.DataFrame(
            {
                "head": range(len(self.attention)),
                "attention": self.attention.double().cpu().numpy(),
                "decay": self.decay.amax(1).double().cpu().numpy(),
            }
        )


def pair_path(mixer: MixerTrace, target: int, source: int, row: int = 0) -> PairPath:
    """What token ``source`` adds to the mixer's output at ``target``, and on which way.

    Args:
        mixer: one layer of a trace, with its weights.
        target: the position that reads; negative ones count from the end.
        source: the position that is read from, at or before the target.
        row: which prompt of a batch.

    Raises:
        SsmlensError: a source after its target, or a trace without weights.
        IndexError: a position or row that does not exist.
        UnsupportedModelError: a family without a known convolution and gate.
    """
    rec = mixer.recurrence
    if not 0 <= row < rec.batch:
        raise IndexError(f"row {row} does not exist: this trace has rows 0 to {rec.batch - 1}")
    length = int(rec.real_lengths[row])
    t, s = (_position(x, length) for x in (target, source))
    if s > t:
        raise SsmlensError(f"token {s} comes after token {t}: a source stands at or before its target")
    found = contributions(mixer)
    terms = found.terms
    with torch.no_grad():
        line = rec.attention.row(t)[row]  # (h, s)
        skip = None if terms.skip is None else terms.skip.reshape(rec.n_heads, -1)
        parts = []
        for k in range(terms.sources.shape[1]):
            if s + k > t:
                parts.append(terms.weight.new_zeros(len(terms.weight)))
                continue
            matrix = line[:, s + k, None].to(terms.weight.dtype).expand(-1, rec.head_dim)
            if s + k == t and skip is not None:
                matrix = matrix + skip
            parts.append(terms.weight @ (matrix.reshape(-1) * terms.sources[row, k, s] * terms.gate[row, t]))
        by_tap = torch.stack(parts)
        output = found.output[row, t]
        share = float(by_tap.sum(0) @ output / output.square().sum())
        between = rec[row : row + 1, s + 1 : t + 1].log_decay[0] if t > s else None
        width = 1 if between is None else between.shape[-1]
        decay = line.new_ones(rec.n_heads, width) if between is None else between.sum(0).exp()
    return PairPath(mixer.layer, t, s, by_tap, share, line[:, s].clone(), decay, found.error)


def _position(at: int, length: int) -> int:
    if not -length <= at < length:
        raise IndexError(f"position {at} is outside the {length} tokens of this prompt")
    return operator.index(at) % length
