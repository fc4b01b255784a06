"""Figures of a scan that was changed: its implicit attention and its states, as they entered the model's output."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._scan import Seen
from ssmlens.kernels import scan as kernel
from ssmlens.recurrence import Recurrence

__all__ = ["attention_map", "state_norms"]


def attention_map(seen: Seen, how: str | int) -> Tensor:
    """(b, t, s) implicit attention of one head or reduced over heads.

    Raises:
        SsmlensError: behind an exchange without a gain.
    """
    found = _map(seen, how)
    for rows, other in seen.passes:
        found = torch.where(rows[..., None], _reduced(other, how, None), found)
    return found


def state_norms(seen: Seen, head: int | None) -> Tensor:
    """(b, t) float64 norm of the state that each row has read, of one head or of all together."""
    assert seen.recurrence is not None
    inputs = seen.recurrence.inputs
    pieces, start, state = [], 0, inputs.initial
    for each in seen.exchanges:
        norm = kernel.statistics(inputs.slice(start, each.step + 1).replace(initial=state)).norm.double()
        norm[:, -1] = each.state.double().flatten(2).norm(dim=-1)
        pieces.append(norm)
        start, state = each.step + 1, each.state
    if start < inputs.length:
        pieces.append(kernel.statistics(inputs.slice(start, inputs.length).replace(initial=state)).norm.double())
    found = torch.cat(pieces, dim=1)
    for rows, other in seen.passes:
        found = torch.where(rows[..., None], kernel.statistics(other.inputs).norm.double(), found)
    return found.norm(dim=-1) if head is None else found[..., head]


def _map(seen: Seen, how: str | int) -> Tensor:
    """(b, t, s) of the recurrence, with what the exchanges left of it."""
    rec = seen.recurrence
    assert rec is not None
    if not seen.exchanges:
        return _reduced(rec, how, None)
    gains = torch.stack([each.gain for each in seen.exchanges])
    if bool(gains.isnan().any()):
        raise SsmlensError("the state was passed through a function here, so that its implicit attention is no matrix")
    if not isinstance(how, str):
        return _reduced(rec, how, None) * _left(seen, gains[..., how], rec)
    # Heads that every exchange treats alike share one factor, and most often all do.
    kinds, group = gains.flatten(0, 1).unique(dim=1, return_inverse=True)
    parts = []
    for i, kind in enumerate(kinds.T):
        heads = (group == i).nonzero()[:, 0].tolist()
        left = _left(seen, kind.unflatten(0, gains.shape[:2]), rec)
        parts.append((len(heads), _reduced(rec, how, heads) * (left if how == "mean" else left.abs())))
    return _joined(parts, how, rec.n_heads)


def _reduced(rec: Recurrence, how: str | int, heads: list[int] | None) -> Tensor:
    if isinstance(how, str):
        return rec.attention.reduce(how, heads)
    return rec.attention.dense([how])[:, 0]


def _left(seen: Seen, gains: Tensor, rec: Recurrence) -> Tensor:
    """(b, t, s) factor that exchanges with gains (e, b) leave of an entry: all that lie on its way from s to t."""
    t, s = torch.arange(rec.length)[:, None], torch.arange(rec.length)
    left = torch.ones(rec.batch, rec.length, rec.length, dtype=torch.float64)
    for each, gain in zip(seen.exchanges, gains):
        reads = t >= each.step if seen.read_now else t > each.step
        left = torch.where(reads & (s <= each.step), left * gain[:, None, None], left)
    return left.to(rec.device, rec.dtype)


def _joined(parts: list[tuple[int, Tensor]], how: str, n_heads: int) -> Tensor:
    """The reduction over all heads from those over groups of them, with the number of heads in each."""
    if how == "max_abs":
        return torch.stack([x for _, x in parts]).amax(0)
    if how == "norm":
        return torch.stack([x for _, x in parts]).norm(dim=0)
    return torch.stack([count * x for count, x in parts]).sum(0) / n_heads
