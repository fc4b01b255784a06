"""Walks along time for `chunked_diagonal`: a chunk forward, or backward with its gradients, block by block.

Layout: time first, then rows (batch, or batch x chunk), groups, states, channels::

    step   (t, r, g, 1 | n, d)  dt or a log-decay         rate  (g, n, d)
    source (t, r, g, 1, d)      what is written           write, read (t, r, g, n, 1)

The log-decay is step * rate, or step alone. Blocks of time are small enough for the cache: the decays of a
block are exponentiated in place, one ``addcmul`` per step advances the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .segments import LOG2_E, base2

__all__ = ["Gradients", "Pieces", "adjoint_ends", "block_length", "carry", "chunk_decay", "tiles", "walk", "walk_back"]

# at::internal::GRAIN_SIZE: elementwise calls on fewer elements run on the calling thread alone.
_GRAIN = 2**15
# Elements of one (block, rows, groups, n, d) buffer. CPU: 4 MB of float32 stay in the shared cache, and each
# block costs a few parallel regions, dear on a busy machine. GPU: enough steps per block to amortise launches.
_CPU_BLOCK, _GPU_BLOCK = 2**20, 2**26
# Elements advanced by one step of a CPU: below, calls dominate.
_CPU_STEP = _GRAIN - 1


class Pieces(NamedTuple):
    """What one walk reads; a block of rows and channels of everything."""

    step: Tensor
    rate: Tensor | None
    source: Tensor
    write: Tensor
    read: Tensor
    keep: Tensor | None

    def cut(self, rows: slice, channels: slice) -> Pieces:
        keep = None if self.keep is None else self.keep[:, rows]
        rate = None if self.rate is None else self.rate[..., channels]
        step, source = self.step[:, rows, ..., channels], self.source[:, rows, ..., channels]
        return Pieces(step, rate, source, self.write[:, rows], self.read[:, rows], keep)

    def at(self, start: int, stop: int) -> Pieces:
        keep = None if self.keep is None else self.keep[start:stop]
        step, source = self.step[start:stop], self.source[start:stop]
        return Pieces(step, self.rate, source, self.write[start:stop], self.read[start:stop], keep)


class Buffers:
    """Memory reused by every block of one walk, with its per-step views made once."""

    def __init__(self, x: Pieces, length: int, n_state_buffers: int) -> None:
        rows, groups, d = x.source.shape[1], x.source.shape[2], x.source.shape[4]
        n = x.write.shape[3]
        m = n if x.rate is not None else x.step.shape[3]
        self.decay = x.source.new_empty(length, rows, groups, m, d)
        self.decays = self.decay.unbind(0)
        self.full = [x.source.new_empty(length, rows, groups, n, d) for _ in range(n_state_buffers)]
        self.steps = [f.unbind(0) for f in self.full]
        self.rate = LOG2_E if x.rate is None else base2(x.rate)
        # Steps that one call fills: on a CPU just too few for torch to wake its other threads. A step is
        # worth microseconds, and on a machine with anything else to do a wake-up costs milliseconds.
        per_step = rows * groups * n * d
        self.piece = length if x.source.is_cuda else max(1, (_GRAIN - 1) // max(per_step, 1))

    def fill_decay(self, x: Pieces) -> Tensor:
        a = self.decay[: x.source.shape[0]]
        for out, step in zip(a.split(self.piece), x.step.split(self.piece), strict=True):
            torch.mul(step, self.rate, out=out)
            out.exp2_()
        return a if x.keep is None else a.mul_(x.keep)

    def fill_states(self, x: Pieces, before: Tensor) -> Tensor:
        """States of one block in buffer 0, from the state before it; decays must be filled."""
        k = x.source.shape[0]
        u = self.full[0][:k]
        pieces = (z.split(self.piece) for z in (u, x.source, x.write))
        for out, source, write in zip(*pieces, strict=True):
            torch.mul(source, write, out=out)
        steps, decays = self.steps[0], self.decays
        steps[0].addcmul_(decays[0], before)
        for i in range(1, k):
            steps[i].addcmul_(decays[i], steps[i - 1])
        return u

    def read_out(self, read: Tensor, y: Tensor) -> None:
        """Outputs of the block whose states are in buffer 0, into ``y`` (k, rows, g, 1, d)."""
        k, rows, groups = y.shape[:3]
        if y.is_cuda:
            y.copy_(torch.matmul(read.transpose(3, 4), self.full[0][:k]))
        elif rows * groups == 1:
            # Small products one by one stay on this thread; a batched one would wake the others.
            reads, outs = read[:, 0, 0].transpose(1, 2).unbind(0), y[:, 0, 0].unbind(0)
            for u, weights, out in zip(self.steps[0], reads, outs, strict=False):
                torch.mm(weights, u[0, 0], out=out)
        else:
            pieces = (z.split(self.piece) for z in (self.full[0][:k], read, y))
            for u, weights, out in zip(*pieces, strict=True):
                out.copy_((u * weights).sum(3, keepdim=True))

    def fill_adjoints(self, x: Pieces, dy: Tensor | None, injected: list[tuple[int, Tensor]], after: Tensor) -> Tensor:
        """Gradients of one block's states in buffer 1: d loss / d state, later steps included."""
        k = x.source.shape[0]
        q, steps, decays = self.full[1][:k], self.steps[1], self.decays
        if dy is None:
            q.zero_()
        else:
            torch.mul(dy, x.read, out=q)
        for i, gradient in injected:
            steps[i].add_(gradient)
        steps[k - 1].add_(after)
        for i in range(k - 2, -1, -1):
            steps[i].addcmul_(decays[i + 1], steps[i + 1])
        return q


def tiles(x: Pieces, n_chunks: int) -> Iterator[tuple[slice, slice]]:
    """Row and channel ranges that fit the CPU cache; everything at once where chunks go side by side."""
    rows, groups, d = x.source.shape[1], x.source.shape[2], x.source.shape[4]
    if x.source.is_cuda or n_chunks > 1:
        yield slice(0, rows), slice(0, d)
        return
    n = x.write.shape[3]
    per_channel = groups * n
    width = d if per_channel * d <= _CPU_STEP else max(1, -(-d // -(-per_channel * d // _CPU_STEP)))
    height = max(1, _CPU_STEP // (per_channel * width))
    for r in range(0, rows, height):
        for c in range(0, d, width):
            yield slice(r, min(r + height, rows)), slice(c, min(c + width, d))


def block_length(x: Pieces) -> int:
    per_step = x.source[0].numel() * x.write.shape[3]
    target = _GPU_BLOCK if x.source.is_cuda else _CPU_BLOCK
    return max(1, min(x.source.shape[0], target // max(per_step, 1)))


def chunk_decay(x: Pieces) -> Tensor:
    """Decay across a whole chunk, (rows, g, n | 1, d)."""
    total = x.step.sum(0)
    a = (total if x.rate is None else total * x.rate).exp()
    return a if x.keep is None else a * x.keep.amin(0)


def carry(decay: Tensor, ends: Tensor, edge: Tensor, n_chunks: int, backward: bool) -> Tensor:
    """Turn per-chunk ends (from zero) into what enters each chunk, given what enters the first one.

    ``edge`` (b, g, n, d) enters the first chunk (the last one when ``backward``).
    """
    b = edge.shape[0]
    decays = decay.view(b, n_chunks, *decay.shape[1:]).unbind(1)
    locals_ = ends.view(b, n_chunks, *ends.shape[1:]).unbind(1)
    entering: list[Tensor] = [edge] * n_chunks
    order = range(n_chunks - 1, -1, -1) if backward else range(n_chunks)
    state = edge
    for c in order:
        entering[c] = state
        state = torch.addcmul(locals_[c], decays[c], state)
    return torch.stack(entering, 1).flatten(0, 1)


def walk(
    x: Pieces,
    state: Tensor,
    y: Tensor | None = None,
    saved: Tensor | None = None,
    picked: dict[int, list[tuple[Tensor, Any]]] | None = None,
) -> Tensor:
    """Walk a chunk forward from ``state`` (rows, g, n, d); returns the state after it.

    Fills the outputs ``y``, the states before every block ``saved``, and the ``picked`` states:
    ``{position: [(destination, rows of the state)]}``.
    """
    length = block_length(x)
    buffers = Buffers(x, length, 1)
    state = state.clone()
    total = x.source.shape[0]
    for j, start in enumerate(range(0, total, length)):
        stop = min(start + length, total)
        block = x.at(start, stop)
        if saved is not None:
            saved[j].copy_(state)
        buffers.fill_decay(block)
        u = buffers.fill_states(block, state)
        state.copy_(u[-1])
        if y is not None:
            buffers.read_out(block.read, y[start:stop])
        if picked:
            for i in range(start, stop):
                for destination, rows in picked.get(i, ()):
                    destination.copy_(u[i - start][rows])
    return state


def adjoint_ends(x: Pieces, dy: Tensor | None, injected: dict[int, list[tuple[Any, Tensor]]]) -> Tensor:
    """Gradient that leaves each chunk through its initial state when nothing enters its end."""
    length = block_length(x)
    buffers = Buffers(x, length, 2)
    total = x.source.shape[0]
    after = x.source.new_zeros(buffers.full[0].shape[1:])
    for start in reversed(range(0, total, length)):
        stop = min(start + length, total)
        a = buffers.fill_decay(x.at(start, stop))
        grads = _dense_injections(injected, start, stop, after)
        q = buffers.fill_adjoints(x.at(start, stop), None if dy is None else dy[start:stop], grads, after)
        torch.mul(a[0], q[0], out=after)
    return after


def _dense_injections(
    injected: dict[int, list[tuple[Any, Tensor]]], start: int, stop: int, like: Tensor
) -> list[tuple[int, Tensor]]:
    """Gradients of picked states inside one block, as full (rows, g, n, d) tensors."""
    found = []
    for i in range(start, stop) if injected else ():
        for rows, gradient in injected.get(i, ()):
            full = torch.zeros_like(like)
            full[rows] = gradient
            found.append((i - start, full))
    return found


class Gradients(NamedTuple):
    step: Tensor
    rate: Tensor | None
    source: Tensor
    write: Tensor
    read: Tensor


def walk_back(
    x: Pieces,
    dy: Tensor | None,
    saved: Tensor,
    injected: dict[int, list[tuple[Any, Tensor]]],
    after: Tensor,
    out: Gradients,
) -> Tensor:
    """Gradients of one walk, accumulated into ``out``; returns the gradient of the state before it."""
    length = block_length(x)
    buffers = Buffers(x, length, 2)
    total = x.source.shape[0]
    after = after.clone()
    for j, start in reversed(list(enumerate(range(0, total, length)))):
        stop = min(start + length, total)
        block = x.at(start, stop)
        a = buffers.fill_decay(block)
        u = buffers.fill_states(block, saved[j])
        block_dy = None if dy is None else dy[start:stop]
        q = buffers.fill_adjoints(block, block_dy, _dense_injections(injected, start, stop, after), after)
        if block_dy is not None:
            out.read[start:stop] += torch.matmul(u, block_dy.transpose(3, 4))
        out.write[start:stop] += torch.matmul(q, block.source.transpose(3, 4))
        out.source[start:stop] = torch.matmul(block.write.transpose(3, 4), q)
        torch.mul(a[0], q[0], out=after)
        # d loss / d log-decay[t] = adjoint[t] * decay[t] * state[t-1]
        q[1:].mul_(u[:-1])
        q[0].mul_(saved[j])
        if out.rate is not None:
            assert block.rate is not None
            q.mul_(a)
            out.step[start:stop] = torch.mul(q, block.rate, out=u).sum(3, keepdim=True)
            out.rate.add_(q.mul_(block.step).sum((0, 1)))
        elif a.shape[3] == 1 != q.shape[3]:
            out.step[start:stop] = q.sum(3, keepdim=True) * a
        else:
            torch.mul(q, a, out=out.step[start:stop])
    return after
