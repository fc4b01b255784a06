"""Effective state size: how many numbers the future really needs of the past, cut by cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._layers import Layers, Source, block_entries, collect, listed
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._gramians import block_spectra, dense_spectra
from ssmlens.kernels.workers import in_parts
from ssmlens.recurrence import Recurrence

__all__ = ["FORMS", "Operator", "effective_state_size", "entropy_rank", "hankel"]

FORMS = ("entropy", "tolerance", "relative", "rank")
"""What `effective_state_size` counts: exp(entropy of the normalised singular values); those above ``tolerance``;
those above ``tolerance`` times the largest; those above float64's rounding of the largest."""

Operator = Source | Tensor | np.ndarray | list[Any]
"""A recurrence, or a matrix (t, s) that mixes tokens, with any axes in front."""

DEFAULT_CUTS = 16

LINEAR = "the matrix is that of this text: gates frozen, the path around the recurrence (conv, gate, skip) left out"
PER_CHANNEL = "one channel of a head counts; the p channels of a head share the matrix, so its state holds p times that"
ENERGY = "singular values say how much passes, not whether it is used: rank_floor tells what the model needs"

CHECKED = "dense SVD of the same block, closed forms of band, delay, sum and attention: checks.py of this study"


def effective_state_size(
    source: Operator,
    cuts: int | Sequence[int] | str | None = None,
    *,
    form: str = "entropy",
    tolerance: float = 1e-3,
) -> Result:
    """How many dimensions of state the tokens after a cut need of those before it, per head and cut.

    The block M[i:, :i] of the implicit attention maps what comes before the cut i to what comes after it; no state
    smaller than its rank could do the same.

    Args:
        source: a trace, a mixer's trace, a recurrence, or a matrix (..., t, s), such as an attention map.
        cuts: positions i from 1 to t - 1; one, several, or "all". By default up to 16 evenly spaced ones that keep
            min(n, t / 4) tokens before and after them, since fewer tokens than states bound the rank by themselves.
        form: one of `FORMS`; what the value is. All four are in the columns.
        tolerance: of "tolerance" (in the units of M) and of "relative" (as a share of the largest).

    Returns:
        Result with axes (batch, head, cut), with ``layer`` in front for a trace; the axes of a matrix. The control
        ``rank_bound`` is min(i, t - i, n), which position and state size alone allow: where the value follows it,
        it says nothing of the model. Columns: ``entropy``, ``tolerance``, ``relative``, ``rank`` and ``largest``,
        the largest singular value. NaN where a row of the batch is too short for the cut.

    Raises:
        ValueError: for an unknown form, a cut outside the text, a matrix that is not square, or a text of one token.

    Source:
        The quantity: Parnichkun et al., "Quantifying memory utilization with effective state-size" (2025). Square-root
        Gramians instead of an SVD of the block cost O(t n^2) and O(n^3) a cut.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: choose one of {', '.join(FORMS)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance is above 0, got {tolerance}")

    def count(values: Tensor, cuts: Tensor, lengths: Tensor, size: int) -> dict[str, Tensor]:
        sizes = _sizes(values, tolerance)
        bound = torch.minimum(torch.minimum(cuts, lengths - cuts), torch.tensor(float(size)))
        return {"value": sizes[form], **sizes, "rank_bound": bound.expand_as(sizes[form]).clone()}

    about = {"form": form, "tolerance": tolerance}
    return _measure(source, cuts, count, "effective_state_size", ("rank_bound",), about, ())


def hankel(source: Operator, cuts: int | Sequence[int] | str | None = None) -> Result:
    """Singular values of the block from past to future, the time-varying Hankel spectrum, per head and cut.

    Args:
        source: as in `effective_state_size`.
        cuts: as in `effective_state_size`.

    Returns:
        Result with axes (batch, head, cut, order), largest first and 0 beyond the rank; the axes of a matrix, then
        (cut, order). Columns: ``energy``, the share of the squared values up to this order, and ``tail``, twice the
        sum of those beyond it. With constant gates ``tail`` bounds the error of a balanced truncation to this order;
        with gates that change it is a heuristic.

    Raises:
        ValueError: as `effective_state_size`.
    """

    def spectra(values: Tensor, cuts: Tensor, lengths: Tensor, size: int) -> dict[str, Tensor]:
        squares = values.square()
        total = squares.sum(-1, keepdim=True)
        tail = 2 * (values.sum(-1, keepdim=True) - values.cumsum(-1)).clamp(min=0)
        return {"value": values, "energy": squares.cumsum(-1) / total, "tail": tail}

    return _measure(source, cuts, spectra, "hankel", (), {}, ("order",))


def entropy_rank(values: Tensor) -> Tensor:
    """exp of the entropy of ``values`` over their sum, along the last axis; 0 where all are 0. Nothing negative."""
    total = values.sum(-1, keepdim=True)
    shares = torch.where(total > 0, values / total, 0.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def _sizes(values: Tensor, tolerance: float) -> dict[str, Tensor]:
    """The four counts of singular values (..., k), largest first."""
    largest = values[..., :1]
    # A product of two factors of 1e-16 relative error each; the rank of zeros is 0.
    floor = torch.finfo(torch.float64).eps * 8 * values.shape[-1] * largest
    return {
        "entropy": entropy_rank(values),
        "tolerance": (values > tolerance).sum(-1).double(),
        "relative": (values > tolerance * largest).sum(-1).double(),
        "rank": (values > floor).sum(-1).double(),
        "largest": largest[..., 0],
    }


def _measure(
    source: Operator,
    cuts: int | Sequence[int] | str | None,
    function: Any,
    name: str,
    control: tuple[str, ...],
    settings: Mapping[str, Any],
    extra: tuple[str, ...],
) -> Result:
    """``function`` of singular values (..., cuts, k), cuts, lengths and state size, over a source of any kind."""
    units = "1" if extra else "dimensions"
    if isinstance(source, Tensor | np.ndarray | list):
        matrix = torch.as_tensor(source).detach().cpu()
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"a matrix of weights is (..., t, s) with t = s, got {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("the matrix holds NaN or infinite numbers: its rank is not defined")
        length = matrix.shape[-1]
        chosen = _choose(cuts, length, length)
        where = torch.tensor(chosen, dtype=torch.float64)
        values = dense_spectra(matrix, chosen)
        part = function(values, where, torch.tensor(float(length)), length)
        names = {1: ("head",), 2: ("batch", "head")}.get(matrix.ndim - 2) or tuple(
            f"axis{i}" for i in range(matrix.ndim - 2)
        )
        return Result(
            name=name,
            value=part.pop("value"),
            dims=(*names, "cut", *extra),
            units=units,
            coords={"cut": chosen},
            columns={k: x for k, x in part.items() if k not in control},
            control={k: x for k, x in part.items() if k in control},
            settings={**settings, "source": f"matrix {tuple(matrix.shape)}"},
            assumes=(ENERGY,),
            checked_by=CHECKED,
        )
    layers = collect(source)
    for rec in layers:
        real = rec.real[:, :, None, None]
        if not all(bool(torch.isfinite(x.where(real, 0.0)).all()) for x in (rec.write, rec.read)):
            raise ValueError("writes or reads of the recurrence hold NaN or infinite numbers: its rank is not defined")
    longest = int(layers.lengths.max())
    chosen = _choose(cuts, longest, max(rec.d_state for rec in layers))
    parts = [_of_recurrence(rec, chosen, layers, function) for rec in layers]
    return layers.result(
        parts,
        ("batch", "head", "cut", *extra),
        coords={"cut": chosen},
        control=control,
        settings={**settings, "channels_per_head": [rec.head_dim for rec in layers]},
        name=name,
        units=units,
        assumes=(LINEAR, PER_CHANNEL, ENERGY),
        checked_by=CHECKED,
    )


def _of_recurrence(rec: Recurrence, cuts: list[int], layers: Layers, function: Any) -> dict[str, Tensor]:
    rec = Recurrence(rec.inputs.slice(0, int(layers.lengths.max())), lengths=rec.lengths)
    width = max(1, block_entries(rec) // (rec.batch * (rec.length * 4 + rec.d_state * len(cuts) * 2) * rec.d_state))

    def some(heads: Sequence[int]) -> Tensor:
        blocks = [heads[k : k + width] for k in range(0, len(heads), width)]
        return torch.cat([block_spectra(rec, cuts, slice(x[0], x[-1] + 1)).cpu() for x in blocks], dim=1)

    # Each decomposition is small: on several threads it would mostly wait for them.
    values = torch.cat(in_parts(range(rec.n_heads), some, alone=rec.device.type != "cpu"), dim=1)
    where, lengths = torch.tensor(cuts, dtype=torch.float64), layers.lengths[:, None, None]
    part = function(values, where, lengths, rec.d_state)
    reached = where < lengths  # (b, 1, cuts): the row has a token after the cut
    return {k: x.where(reached if x.ndim == 3 else reached[..., None], torch.nan) for k, x in part.items()}


def _choose(cuts: int | Sequence[int] | str | None, length: int, states: int) -> list[int]:
    """Increasing cuts of a text."""
    if length < 2:
        raise ValueError("a text of one token has no cut: give at least two")
    if cuts is None:
        margin = max(1, min(states, length // 4))
        count = min(DEFAULT_CUTS, length - 2 * margin + 1)
        steps = (length - 2 * margin) / max(count - 1, 1)
        return sorted({margin + math.floor(k * steps + 0.5) for k in range(count)})
    if isinstance(cuts, str):
        if cuts != "all":
            raise ValueError(f"cuts are positions, or 'all', got {cuts!r}")
        return list(range(1, length))
    chosen = listed(cuts)
    wrong = [i for i in chosen if not 1 <= i < length]
    if wrong or not chosen:
        what = f"cut {wrong[0]} does not exist" if wrong else "no cut was chosen"
        raise ValueError(f"{what}: {length} tokens have cuts 1 to {length - 1}")
    return sorted(set(chosen))
