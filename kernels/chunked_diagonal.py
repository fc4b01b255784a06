"""Scan for one-channel heads (p = 1): Mamba-1, RG-LRU and their kin, walked block by block.

Tensors are laid out time first (`diagonal_walk`), so that the channels of a group, which share ``write`` and
``read``, are contiguous. Backward keeps the state before each block of time and recomputes the rest.
Derivation: README.md, "One channel per head".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .diagonal_walk import Gradients, Pieces, adjoint_ends, block_length, carry, chunk_decay, tiles, walk, walk_back
from .inputs import ScanInputs

__all__ = ["scan"]

# Numbers advanced by one step of a GPU: below, it is not full and chunks go side by side.
_GPU_STEP = 2**22
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


class _DiagonalScan(torch.autograd.Function):
    """The whole scan of this file as one differentiable step, with block-wise recomputation."""

    @staticmethod
    def forward(ctx, step, rate, source, write, read, initial, keep, picks, n_chunks, want_output):  # type: ignore[no-untyped-def]
        x = Pieces(step, rate, source, write, read, keep)
        t, rows, groups, _, d = source.shape
        n, b = write.shape[3], rows // n_chunks
        # Memory in the caller's order (rows, then time; d, then n): the views back cost nothing.
        y = source.new_empty(rows, t, groups, 1, d).transpose(0, 1) if want_output else None
        final = source.new_empty(b, groups, d, n).transpose(2, 3)
        states = source.new_empty(b, len(picks), groups, d, n).transpose(3, 4)
        entering = source.new_zeros(b, groups, n, d) if initial is None else initial.contiguous()
        needs_grad = any(ctx.needs_input_grad)
        walks = []
        for tile, channels in tiles(x, n_chunks):
            part = x.cut(tile, channels)
            if n_chunks > 1:
                # Two passes: what each chunk ends with, then the same chunks from the right start.
                zero = torch.zeros_like(entering).repeat_interleave(n_chunks, 0)
                start = carry(chunk_decay(part), walk(part, zero), entering, n_chunks, backward=False)
            else:
                start = entering[tile, ..., channels]
            n_blocks = -(-t // block_length(part))
            saved = part.source.new_empty(n_blocks, *start.shape) if needs_grad else None
            picked: dict[int, list[tuple[Tensor, Any]]] = {}
            for k, (c, i) in enumerate(picks):
                place = states[:, k] if n_chunks > 1 else states[tile, k, ..., channels]
                picked.setdefault(i, []).append((place, slice(c, None, n_chunks)))
            end = walk(part, start, None if y is None else y[:, tile, ..., channels], saved, picked)
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
        x = Pieces(step, rate, source, write, read, keep)
        _, rows, groups, _, d = source.shape
        n, b = write.shape[3], rows // n_chunks
        if dy is not None:
            dy = None if dy.numel() == 0 else dy.contiguous()
        out = Gradients(
            torch.empty(step.shape, dtype=step.dtype, device=step.device),
            None if rate is None else torch.zeros_like(rate),
            torch.empty(source.shape, dtype=source.dtype, device=source.device),
            torch.zeros(write.shape, dtype=write.dtype, device=write.device),
            torch.zeros(read.shape, dtype=read.dtype, device=read.device),
        )
        leaving = source.new_zeros(b, groups, n, d) if dfinal is None else dfinal.contiguous()
        dinitial = source.new_empty(b, groups, n, d)
        for (tile, channels), saved in zip(tiles(x, n_chunks), walks, strict=True):
            part = x.cut(tile, channels)
            part_dy = None if dy is None else dy[:, tile, ..., channels]
            injected: dict[int, list[tuple[Any, Tensor]]] = {}
            for k, (c, i) in enumerate(ctx.picks if dstates is not None else ()):
                gradient = dstates[:, k] if n_chunks > 1 else dstates[tile, k, ..., channels]
                injected.setdefault(i, []).append((slice(c, None, n_chunks), gradient))
            if n_chunks > 1:
                ends = adjoint_ends(part, part_dy, injected)
                after = carry(chunk_decay(part), ends, leaving, n_chunks, backward=True)
            else:
                after = leaving[tile, ..., channels]
            piece = Gradients(
                out.step[:, tile, ..., channels],
                None if out.rate is None else out.rate[..., channels],
                out.source[:, tile, ..., channels],
                out.write[:, tile],
                out.read[:, tile],
            )
            before = walk_back(part, part_dy, saved, injected, after, piece)
            dinitial[tile if n_chunks == 1 else slice(None), ..., channels] = before[::n_chunks]
        return (*out, None if initial is None else dinitial, None, None, None, None)
