"""Single rows and columns of the implicit attention, at linear cost and memory (no delta rule).

Sums of log-decays start at the row (or column) itself and run outward, in float64: no difference is
taken, so the nearest entries are as exact as the furthest. On a CPU a walk outward over blocks of steps first
finds where everything has underflowed: beyond it a line is zero, and typically that is nearly all of a long one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .inputs import ScanInputs
from .segments import base2, split_forgets
from .workers import in_parts

__all__ = ["column", "distance", "row"]

# Elements of one (b, h, n, t) block of exponentials.
_CPU_BLOCK, _GPU_BLOCK = 2**21, 2**27

# Tokens of one step of the search for what has not underflowed.
_STRIDE = 512


def row(inputs: ScanInputs, t: int) -> Tensor:
    """M[t, :], (b, h, s); entries after t are exactly 0."""
    return _by_heads(inputs, lambda x: _row(x, t))


def column(inputs: ScanInputs, s: int) -> Tensor:
    """M[:, s], (b, h, t); entries before s are exactly 0."""
    return _by_heads(inputs, lambda x: _column(x, s))


def distance(inputs: ScanInputs, t: int) -> Tensor:
    """Mean distance of row t, (b, h) tokens; NaN where the row is all zero."""

    def one(x: ScanInputs) -> Tensor:
        weight = _row(x, t).abs()[..., : t + 1]
        away = torch.arange(t, -1, -1, device=weight.device, dtype=weight.dtype)
        return (weight @ away) / weight.sum(-1)

    return _by_heads(inputs, one)


def _by_heads(inputs: ScanInputs, line: Callable[[ScanInputs], Tensor]) -> Tensor:
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in inputs.tensors().values())
    device = inputs.value.device.type

    def lines(blocks: Sequence[ScanInputs]) -> list[Tensor]:
        with torch.autocast(device, enabled=False):
            return [line(x.cast()) for x in blocks]

    parts = in_parts(list(_head_blocks(inputs)), lines, alone=recorded or device != "cpu")
    return torch.cat([z for part in parts for z in part], 1)


def _head_blocks(x: ScanInputs) -> Iterator[ScanInputs]:
    """Blocks of heads; the last may be shorter. Whole groups, or parts of one, so that these stay shared."""
    budget = _GPU_BLOCK if x.value.is_cuda else _CPU_BLOCK
    size = max(1, budget // max(1, x.batch * x.d_state * x.length))
    per_group = max(1, x.n_heads // max(x.write.shape[2], x.read.shape[2]))
    if not x.n_heads:
        yield x
    for group in range(0, x.n_heads, per_group):
        for start in range(group, group + per_group, size):
            yield x.select_heads(slice(start, min(start + size, group + per_group)))


def _row(x: ScanInputs, t: int) -> Tensor:
    """The row from the sums over s+1 .. t, taken backwards from t."""
    start = t + 1 - _reach(x, t, outward=-1)
    before = x.slice(start, t + 1)
    # Shifted by one: the decay at t acts on s = t - 1, and nothing acts on s = t.
    kept = _decay_from(before, lambda z: torch.nn.functional.pad(z[..., 1:].flip(-1), (1, 0)).cumsum(-1).flip(-1))
    weight = before.read[:, -1].to(x.dtype)[..., None] * before.write.permute(0, 2, 3, 1)  # (b, g, n, s)
    line = _contract(kept, weight, x.n_heads)
    if before.dt is not None:
        line = line * before.dt.transpose(1, 2)
    return torch.nn.functional.pad(line, (start, x.length - t - 1))


def _column(x: ScanInputs, s: int) -> Tensor:
    stop = s + _reach(x, s, outward=1)
    after = x.slice(s, stop)
    kept = _decay_from(after, lambda z: torch.nn.functional.pad(z[..., 1:], (1, 0)).cumsum(-1))
    weight = after.write[:, 0].to(x.dtype)[..., None] * after.read.permute(0, 2, 3, 1)
    line = _contract(kept, weight, x.n_heads)
    if after.dt is not None:
        line = line * after.dt[:, 0, :, None]
    return torch.nn.functional.pad(line, (s, x.length - stop))


def _reach(x: ScanInputs, at: int, outward: int) -> int:
    """Entries of a line, counted from ``at``, after which every decay is exactly 0 in the compute dtype."""
    most = at + 1 if outward < 0 else x.length - at
    if x.value.is_cuda or most <= 2 * _STRIDE:
        return most
    underflow = -150.0 if x.dtype == torch.float32 else -1080.0
    halvings: Tensor | None = None
    # The decay at ``at`` itself acts on a row but not on a column; one step more or less is no matter here, as long
    # as no step is counted that has not been passed.
    for passed in range(1, most - _STRIDE, _STRIDE):
        first = at - passed + 1 - _STRIDE if outward < 0 else at + passed
        steps = x.slice(first, first + _STRIDE)
        if steps.log_decay is not None:
            block = split_forgets(steps.log_decay.detach(), None)[0].sum(1)  # (b, h, 1 | n)
        else:
            assert steps.dt is not None
            assert steps.A is not None
            block = steps.dt.detach().sum(1, dtype=torch.float64)[..., None] * base2(steps.A.detach()).double()
        halvings = block if halvings is None else halvings + block
        if halvings.amax() < underflow:
            return passed + _STRIDE
    return most


def _decay_from(x: ScanInputs, accumulate: Callable[[Tensor], Tensor]) -> Tensor:
    """exp of accumulated log-decays, (b, h, 1 | n, t), exactly 0 across a reset."""
    reset = None if x.reset is None else x.reset[:, :, None, None]
    if x.log_decay is None:
        assert x.dt is not None
        assert x.A is not None
        steps = accumulate(x.dt.double().transpose(1, 2)[:, :, None])  # (b, h, 1, t)
        kept = (steps.to(x.dtype) * base2(x.A)[:, :, None]).exp2()
        if reset is None:
            return kept
        return kept * (accumulate(reset.permute(0, 2, 3, 1).double()) == 0)
    log_decay, forgets = split_forgets(x.log_decay, reset)
    steps = accumulate(log_decay.permute(0, 2, 3, 1))
    marks = accumulate(forgets.permute(0, 2, 3, 1).double())
    return steps.masked_fill(marks != 0, -torch.inf).to(x.dtype).exp2()


def _contract(kept: Tensor, weight: Tensor, n_heads: int) -> Tensor:
    """Sum over n of kept (b, h, 1 | n, t) times weight (b, g, n, t): (b, h, t)."""
    if weight.shape[1] not in (1, n_heads):
        weight = weight.repeat_interleave(n_heads // weight.shape[1], 1)
    if kept.shape[2] == 1:
        return kept[:, :, 0] * weight.sum(2)
    return (kept * weight).sum(2)
