"""Scan for one-channel heads (p = 1): Mamba-1, RG-LRU and their kin, walked block by block.

Layout inside this file: time first, then rows (batch, or batch x chunk), groups, states, channels::

    step   (t, r, g, 1, d)  dt or a scalar log-decay          A     (g, n, d)
    source (t, r, g, 1, d)  what is written, dt included       write (t, r, g, n, 1)

so that the channels of a group, which share ``write`` and ``read``, are contiguous. Time is walked in
blocks small enough for the cache: the decays of a block are exponentiated in place, one ``addcmul`` per
step advances the state, and one batched product reads the block out. Backward keeps the state before
each block and recomputes the rest. Derivation: README.md, "One channel per head".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import ScanInputs
from .segments import LOG2_E, base2

__all__ = ["scan"]

# at::internal::GRAIN_SIZE: elementwise calls on fewer elements run on the calling thread alone.
_GRAIN = 2**15
# Elements of one (block, rows, groups, n, d) buffer. CPU: 4 MB of float32 stay in the shared cache, and each
# block costs a few parallel regions, dear on a busy machine. GPU: enough steps per block to amortise launches.
_CPU_BLOCK, _GPU_BLOCK = 2**20, 2**26
# Elements advanced by one step: below the CPU figure calls dominate; a GPU is full from its figure on.
_CPU_STEP, _GPU_STEP = _GRAIN - 1, 2**22
_MIN_CHUNK = 16


def scan(x: ScanInputs, picks: Sequence[int], want_output: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Outputs (b, t, h, 1) or None, final state (b, h, 1, n), states (b, len(picks), h, 1, n).

    Args:
        x: inputs in the compute dtype, p = 1, t >= 1, no erase.
        picks: token positions whose states are wanted.
        want_output: False skips the read-out.
    """
    b, t, h, _ = x.value.shape
    groups = _common_groups(x)
    n_chunks = _chunk_count(x)
    chunk = -(-t // n_chunks)
    n_chunks = -(-t // chunk)
    layout = _Layout(b, t, groups, h // groups, n_chunks, chunk)

    source = x.value[..., 0] if x.dt is None else x.value[..., 0] * x.dt
    step, rate = _step_and_rate(x, layout)
    initial = None
    if x.initial is not None:
        initial = x.initial[:, :, 0].reshape(b, groups, layout.d, x.d_state).transpose(2, 3)
    keep = None
    if x.reset is not None:
        keep = (~layout.per_token(x.reset[..., None, None])).to(x.dtype)
    y, final, states = _DiagonalScan.apply(
        step,
        rate,
        layout.per_channel(source),
        layout.per_state(x.write),
        layout.per_state(x.read),
        initial,
        keep,
        tuple(divmod(i, chunk) for i in picks),
        n_chunks,
        want_output,
    )
    final = final.transpose(2, 3).reshape(b, h, 1, x.d_state)
    states = states.transpose(3, 4).reshape(b, len(picks), h, 1, x.d_state)
    return (layout.undo(y) if want_output else None), final, states


class _Layout(NamedTuple):
    """Moves (b, t, ...) tensors to (chunk, b * n_chunks, g, ..., ...) and back; pads the last chunk.

    A padded token has step 0 and writes 0, so it leaves the state alone.
    """

    b: int
    t: int
    g: int
    d: int
    n_chunks: int
    chunk: int

    def _fold(self, x: Tensor) -> Tensor:
        """(b, t, a, i, j) -> (chunk, b * n_chunks, a, i, j)."""
        if self.n_chunks == 1:
            return x.transpose(0, 1)
        missing = self.n_chunks * self.chunk - self.t
        if missing:
            x = torch.nn.functional.pad(x, (0, 0) * 3 + (0, missing))
        x = x.reshape(self.b, self.n_chunks, self.chunk, *x.shape[2:])
        return x.permute(2, 0, 1, 3, 4, 5).reshape(self.chunk, self.b * self.n_chunks, *x.shape[3:])

    def per_channel(self, x: Tensor) -> Tensor:
        """(b, t, h) -> (chunk, rows, g, 1, d)."""
        return self._fold(x.reshape(self.b, self.t, self.g, 1, self.d))

    def per_state(self, x: Tensor) -> Tensor:
        """(b, t, g', n) -> (chunk, rows, g, n, 1)."""
        if x.shape[2] != self.g:
            x = x.repeat_interleave(self.g // x.shape[2], dim=2)
        return self._fold(x[..., None])

    def per_token(self, x: Tensor) -> Tensor:
        """(b, t, 1, 1) -> (chunk, rows, 1, 1, 1)."""
        return self._fold(x[..., None])

    def per_element(self, x: Tensor) -> Tensor:
        """(b, t, h, n) -> (chunk, rows, g, n, d)."""
        return self._fold(x.reshape(self.b, self.t, self.g, self.d, x.shape[3]).transpose(3, 4))

    def undo(self, y: Tensor) -> Tensor:
        """(chunk, rows, g, 1, d) -> (b, t, h, 1)."""
        return y.transpose(0, 1).reshape(self.b, -1, self.g * self.d, 1)[:, : self.t]


def _common_groups(x: ScanInputs) -> int:
    """The coarsest grouping of heads that both write and read respect."""
    return math.lcm(x.write.shape[2], x.read.shape[2])


def _chunk_count(x: ScanInputs) -> int:
    """How many chunks advance side by side: one on a CPU, enough to fill a GPU otherwise."""
    if not x.value.is_cuda:
        return 1
    per_step = x.batch * x.n_heads * x.d_state
    wanted = -(-_GPU_STEP // max(per_step, 1))
    return max(1, min(wanted, x.length // _MIN_CHUNK))


def _step_and_rate(x: ScanInputs, layout: _Layout) -> tuple[Tensor, Tensor | None]:
    """The decay as (step, rate): log-decay = step * rate, or step alone when rate is None."""
    if x.A is not None and x.dt is not None:
        if x.A.shape[1] == 1:
            return layout.per_channel(x.dt * x.A[:, 0]), None
        rate = x.A.reshape(layout.g, layout.d, x.d_state).transpose(1, 2).contiguous()
        return layout.per_channel(x.dt), rate
    assert x.log_decay is not None
    if x.log_decay.shape[3] == 1:
        return layout.per_channel(x.log_decay[..., 0]), None
    return layout.per_element(x.log_decay), None


class _Pieces(NamedTuple):
    """What one walk reads; a block of rows and channels of everything."""

    step: Tensor
    rate: Tensor | None
    source: Tensor
    write: Tensor
    read: Tensor
    keep: Tensor | None

    def cut(self, rows: slice, channels: slice) -> _Pieces:
        keep = None if self.keep is None else self.keep[:, rows]
        rate = None if self.rate is None else self.rate[..., channels]
        step, source = self.step[:, rows, ..., channels], self.source[:, rows, ..., channels]
        return _Pieces(step, rate, source, self.write[:, rows], self.read[:, rows], keep)

    def at(self, start: int, stop: int) -> _Pieces:
        keep = None if self.keep is None else self.keep[start:stop]
        step, source = self.step[start:stop], self.source[start:stop]
        return _Pieces(step, self.rate, source, self.write[start:stop], self.read[start:stop], keep)


class _Buffers:
    """Memory reused by every block of one walk, with its per-step views made once."""

    def __init__(self, x: _Pieces, length: int, n_state_buffers: int) -> None:
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

    def fill_decay(self, x: _Pieces) -> Tensor:
        a = self.decay[: x.source.shape[0]]
        for out, step in zip(a.split(self.piece), x.step.split(self.piece), strict=True):
            torch.mul(step, self.rate, out=out)
            out.exp2_()
        return a if x.keep is None else a.mul_(x.keep)

    def fill_states(self, x: _Pieces, before: Tensor) -> Tensor:
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

    def fill_adjoints(self, x: _Pieces, dy: Tensor | None, injected: list[tuple[int, Tensor]], after: Tensor) -> Tensor:
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


def _tiles(x: _Pieces, n_chunks: int) -> Iterator[tuple[slice, slice]]:
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


def _block_length(x: _Pieces) -> int:
    per_step = x.source[0].numel() * x.write.shape[3]
    target = _GPU_BLOCK if x.source.is_cuda else _CPU_BLOCK
    return max(1, min(x.source.shape[0], target // max(per_step, 1)))


def _chunk_decay(x: _Pieces) -> Tensor:
    """Decay across a whole chunk, (rows, g, n | 1, d)."""
    total = x.step.sum(0)
    a = (total if x.rate is None else total * x.rate).exp()
    return a if x.keep is None else a * x.keep.amin(0)


def _carry(decay: Tensor, ends: Tensor, edge: Tensor, n_chunks: int, backward: bool) -> Tensor:
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


def _walk(
    x: _Pieces,
    state: Tensor,
    y: Tensor | None = None,
    saved: Tensor | None = None,
    picked: dict[int, list[tuple[Tensor, Any]]] | None = None,
) -> Tensor:
    """Walk a chunk forward from ``state`` (rows, g, n, d); returns the state after it.

    Fills the outputs ``y``, the states before every block ``saved``, and the ``picked`` states:
    ``{position: [(destination, rows of the state)]}``.
    """
    length = _block_length(x)
    buffers = _Buffers(x, length, 1)
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


def _adjoint_ends(x: _Pieces, dy: Tensor | None, injected: dict[int, list[tuple[Any, Tensor]]]) -> Tensor:
    """Gradient that leaves each chunk through its initial state when nothing enters its end."""
    length = _block_length(x)
    buffers = _Buffers(x, length, 2)
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


class _Gradients(NamedTuple):
    step: Tensor
    rate: Tensor | None
    source: Tensor
    write: Tensor
    read: Tensor


def _walk_back(
    x: _Pieces,
    dy: Tensor | None,
    saved: Tensor,
    injected: dict[int, list[tuple[Any, Tensor]]],
    after: Tensor,
    out: _Gradients,
) -> Tensor:
    """Gradients of one walk, accumulated into ``out``; returns the gradient of the state before it."""
    length = _block_length(x)
    buffers = _Buffers(x, length, 2)
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


class _DiagonalScan(torch.autograd.Function):
    """The whole scan of this file as one differentiable step, with block-wise recomputation."""

    @staticmethod
    def forward(ctx, step, rate, source, write, read, initial, keep, picks, n_chunks, want_output):  # type: ignore[no-untyped-def]
        x = _Pieces(step, rate, source, write, read, keep)
        t, rows, groups, _, d = source.shape
        n, b = write.shape[3], rows // n_chunks
        # Memory in the caller's order (rows, then time; d, then n): the views back cost nothing.
        y = source.new_empty(rows, t, groups, 1, d).transpose(0, 1) if want_output else None
        final = source.new_empty(b, groups, d, n).transpose(2, 3)
        states = source.new_empty(b, len(picks), groups, d, n).transpose(3, 4)
        entering = source.new_zeros(b, groups, n, d) if initial is None else initial.contiguous()
        needs_grad = any(ctx.needs_input_grad)
        walks = []
        for tile, channels in _tiles(x, n_chunks):
            part = x.cut(tile, channels)
            if n_chunks > 1:
                # Two passes: what each chunk ends with, then the same chunks from the right start.
                zero = torch.zeros_like(entering).repeat_interleave(n_chunks, 0)
                start = _carry(_chunk_decay(part), _walk(part, zero), entering, n_chunks, backward=False)
            else:
                start = entering[tile, ..., channels]
            n_blocks = -(-t // _block_length(part))
            saved = part.source.new_empty(n_blocks, *start.shape) if needs_grad else None
            picked: dict[int, list[tuple[Tensor, Any]]] = {}
            for k, (c, i) in enumerate(picks):
                place = states[:, k] if n_chunks > 1 else states[tile, k, ..., channels]
                picked.setdefault(i, []).append((place, slice(c, None, n_chunks)))
            end = _walk(part, start, None if y is None else y[:, tile, ..., channels], saved, picked)
            final[tile if n_chunks == 1 else slice(None), ..., channels] = end[n_chunks - 1 :: n_chunks]
            walks.append(saved)
        ctx.save_for_backward(step, rate, source, write, read, initial, keep, *walks)
        ctx.picks, ctx.n_chunks = picks, n_chunks
        ctx.set_materialize_grads(False)
        return (source.new_empty(0) if y is None else y), final, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal, dstates):  # type: ignore[no-untyped-def]
        step, rate, source, write, read, initial, keep, *walks = ctx.saved_tensors
        n_chunks = ctx.n_chunks
        x = _Pieces(step, rate, source, write, read, keep)
        _, rows, groups, _, d = source.shape
        n, b = write.shape[3], rows // n_chunks
        if dy is not None:
            dy = None if dy.numel() == 0 else dy.contiguous()
        out = _Gradients(
            torch.empty(step.shape, dtype=step.dtype, device=step.device),
            None if rate is None else torch.zeros_like(rate),
            torch.empty(source.shape, dtype=source.dtype, device=source.device),
            torch.zeros(write.shape, dtype=write.dtype, device=write.device),
            torch.zeros(read.shape, dtype=read.dtype, device=read.device),
        )
        leaving = source.new_zeros(b, groups, n, d) if dfinal is None else dfinal.contiguous()
        dinitial = source.new_empty(b, groups, n, d)
        for (tile, channels), saved in zip(_tiles(x, n_chunks), walks, strict=True):
            part = x.cut(tile, channels)
            part_dy = None if dy is None else dy[:, tile, ..., channels]
            injected: dict[int, list[tuple[Any, Tensor]]] = {}
            for k, (c, i) in enumerate(ctx.picks if dstates is not None else ()):
                gradient = dstates[:, k] if n_chunks > 1 else dstates[tile, k, ..., channels]
                injected.setdefault(i, []).append((slice(c, None, n_chunks), gradient))
            if n_chunks > 1:
                ends = _adjoint_ends(part, part_dy, injected)
                after = _carry(_chunk_decay(part), ends, leaving, n_chunks, backward=True)
            else:
                after = leaving[tile, ..., channels]
            piece = _Gradients(
                out.step[:, tile, ..., channels],
                None if out.rate is None else out.rate[..., channels],
                out.source[:, tile, ..., channels],
                out.write[:, tile],
                out.read[:, tile],
            )
            before = _walk_back(part, part_dy, saved, injected, after, piece)
            dinitial[tile if n_chunks == 1 else slice(None), ..., channels] = before[::n_chunks]
        return (*out, None if initial is None else dinitial, None, None, None, None)
