"""Scan for heads with several channels (p > 1): chunks as matrix products (Mamba-2, GLA, retention).

Inside a chunk the outputs are the masked matrix of README.md, "Matrix products inside a chunk"; between
chunks only the state travels. With one decay per head the heads of a group share ``read @ write^T`` and
the state products; with one decay per state the decays enter the matrix element by element.
Letters: c chunk, l position read, s position written, q head within its group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import ScanInputs, expand_groups
from .segments import Clock, running_clock

__all__ = ["scan"]

# A decay per state costs n exponentials for each pair of a chunk, so those chunks are short.
_SCALAR_CHUNK, _VECTOR_CHUNK = 64, 16
# The carry between the chunks of one block is a (chunks x chunks) product.
_MAX_CHUNKS = 32
# Elements of the largest buffer of one block.
_CPU_BUDGET, _GPU_BUDGET = 2**23, 2**28
# States made at a time: beyond 32 MB a buffer is fetched from the system anew, page by page.
_CPU_STATES = 2**21


def scan(x: ScanInputs, picks: Sequence[int], want_output: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Outputs (b, t, h, p) or None, final state (b, h, p, n), states (b, len(picks), h, p, n).

    Args:
        x: inputs in the compute dtype, t >= 1, no erase.
        picks: token positions whose states are wanted.
        want_output: False skips the read-out.
    """
    state = x.initial
    if state is None:
        state = x.value.new_zeros(x.batch, x.n_heads, x.head_dim, x.d_state)
    many = len(picks) > x.length // 4
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in x.tensors().values())
    if many and not (want_output or x.value.is_cuda or recorded):
        return None, *_walk(x, state, picks)
    outputs, states = [], []
    order = sorted(range(len(picks)), key=picks.__getitem__)
    for start, n_chunks, length in _blocks(x, many):
        stop = start + n_chunks * length
        block = _Block.of(x.slice(start, stop).replace(initial=None), n_chunks, length)
        entering, end = _carry(block, state)
        states += _states(block, entering, [picks[k] - start for k in order if start <= picks[k] < stop])
        if want_output:
            outputs.append(_outputs(block, entering))
        state = end
    picked = torch.cat(states, 1) if states else state.new_empty(x.batch, 0, *state.shape[1:])
    if order != list(range(len(picks))):
        back = sorted(range(len(order)), key=order.__getitem__)
        picked = picked.index_select(1, torch.tensor(back, device=state.device))
    # A copy: the view would keep the boundary states of the whole last block alive.
    final = state.clone(memory_format=torch.contiguous_format)
    return (torch.cat(outputs, 1) if want_output else None), final, picked


def _walk(x: ScanInputs, state: Tensor, picks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Final and picked states step by step: where most states are wanted, writing them is the work."""
    out = state.new_empty(x.batch, len(picks), *state.shape[1:])
    places: dict[int, list[int]] = {}
    for k, i in enumerate(picks):
        places.setdefault(i, []).append(k)
    decay = x.full_log_decay().exp()[:, :, :, None]  # (b, t, h, 1, 1 | n)
    value, write = x.value[..., None], x.full_write()[:, :, :, None]
    spare = torch.empty_like(state, memory_format=torch.contiguous_format)
    for i in range(x.length):
        first, *others = places.get(i, [-1])
        following = spare if first < 0 else out[:, first]
        torch.mul(state, decay[:, i], out=following)
        following.addcmul_(value[:, i], write[:, i])
        for k in others:
            out[:, k].copy_(following)
        state = following
    return state.clone(), out


class _Block(NamedTuple):
    """A stretch of n_chunks x length tokens, folded; b leads every tensor."""

    value: Tensor  # (b, c, l, h, p), dt included
    write: Tensor  # (b, c, l, g, n); g = h when the decay is per state
    read: Tensor  # (b, c, l, g, n)
    clock: Clock  # (b, c, l, h, 1 | n), restarts in every chunk

    @classmethod
    def of(cls, x: ScanInputs, n_chunks: int, length: int) -> _Block:
        def fold(z: Tensor) -> Tensor:
            return z.reshape(z.shape[0], n_chunks, length, *z.shape[2:])

        clock = running_clock(x, fold, dim=2)
        write, read = x.write, x.read
        if clock.time.shape[4] > 1 or write.shape[2] != read.shape[2]:
            write, read = expand_groups(write, x.n_heads), expand_groups(read, x.n_heads)
        value = x.value if x.dt is None else x.value * x.dt[..., None]
        return cls(fold(value), fold(write), fold(read), clock)

    @property
    def per_state(self) -> bool:
        return self.clock.time.shape[4] > 1

    def grouped(self, z: Tensor) -> Tensor:
        """(b, c, l, h, p) -> (b, c, g, l, q * p): the heads of a group side by side."""
        b, c, length, h, p = z.shape
        groups = self.write.shape[3]
        return z.reshape(b, c, length, groups, h // groups * p).transpose(2, 3)


def _blocks(x: ScanInputs, many_states: bool) -> Iterator[tuple[int, int, int]]:
    """(start, n_chunks, chunk length) of each block: whole chunks while they last, then the rest."""
    vector = (x.A if x.A is not None else x.log_decay).shape[-1] > 1  # type: ignore[union-attr]
    # States at many times repeat the work of a chunk for each: a shorter chunk then costs less.
    length = _VECTOR_CHUNK if vector or many_states else _SCALAR_CHUNK
    per_token = (
        x.batch
        * x.n_heads
        * max(
            length * (x.d_state if vector else 1),
            x.head_dim * max(1, x.d_state // length),
            length * x.head_dim if many_states else 0,
        )
    )
    budget = _GPU_BUDGET if x.value.is_cuda else _CPU_BUDGET
    most = max(1, min(_MAX_CHUNKS, budget // (length * per_token)))
    start = 0
    while x.length - start >= length:
        n_chunks = min(most, (x.length - start) // length)
        yield start, n_chunks, length
        start += n_chunks * length
    if start < x.length:
        yield start, 1, x.length - start


def _carry(block: _Block, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state entering each chunk (b, c, h, p, n), and the one leaving the last (b, h, p, n)."""
    b, c, _, h, p = block.value.shape
    n, dtype = block.write.shape[4], state.dtype
    total = block.clock.map(lambda z: z[:, :, -1:])  # (b, c, 1, h, m)
    to_end = total.since(block.clock, dtype)
    if block.per_state:
        added = block.grouped(block.value).transpose(3, 4) @ (block.write * to_end).transpose(2, 3)
    else:
        added = block.grouped(block.value * to_end).transpose(3, 4) @ block.write.transpose(2, 3)
    added = added.reshape(b, c, h, p, n)
    if not block.per_state and _at_once(state.device):
        return _carry_at_once(total, added, state)
    through = total.since(None, dtype).transpose(2, 3)  # (b, c, h, 1, 1 | n)
    entering = []
    for i in range(c):
        entering.append(state)
        state = (state * through[:, i]).add_(added[:, i])
    return torch.stack(entering, 1), state


def _at_once(device: torch.device) -> bool:
    """Whether the carry is one product: more arithmetic than a loop, but not two small launches a chunk."""
    return device.type == "cuda"


def _carry_at_once(total: Clock, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`_carry` for one decay per head: every boundary a weighted sum of the first state and what chunks add."""
    b, c, h, p, n = added.shape
    ticks = total.map(lambda z: torch.nn.functional.pad(z[:, :, 0, :, 0].transpose(1, 2).cumsum(2), (1, 0)))
    place = torch.arange(c + 1, device=state.device)
    later, earlier = ticks.map(lambda z: z[..., :, None]), ticks.map(lambda z: z[..., None, :])
    mix = later.since(earlier, state.dtype, place[:, None] >= place)  # (b, h, c + 1, 1 + c)
    parts = torch.cat([state[:, None], added], 1).transpose(1, 2).reshape(b, h, c + 1, p * n)
    every = (mix @ parts).view(b, h, c + 1, p, n).transpose(1, 2)
    return every[:, :c], every[:, c]


def _outputs(block: _Block, entering: Tensor) -> Tensor:
    """(b, c * l, h, p)."""
    b, c, length, h, p = block.value.shape
    groups, n = block.write.shape[3:]
    dtype = block.value.dtype
    position = torch.arange(length, device=block.value.device)
    causal = position[:, None] >= position
    read, write = block.read.transpose(2, 3), block.write.transpose(2, 3)  # (b, c, g, l, n)
    if block.per_state:
        clock = block.clock.map(lambda z: z.transpose(2, 3))  # (b, c, h, l, n)
        earlier = clock.map(lambda z: z[..., None, :, :])
        decay = clock.map(lambda z: z[..., :, None, :]).since(earlier, dtype, causal[..., None])
        matrix = ((decay * write[..., None, :, :]) @ read[..., None]).squeeze(-1)
        carried = (read * clock.since(None, dtype)) @ entering.transpose(3, 4)  # (b, c, h, l, p)
        inside = matrix @ block.value.transpose(2, 3)
        return (inside + carried).transpose(2, 3).reshape(b, c * length, h, p)
    clock = block.clock.map(lambda z: z[..., 0].transpose(2, 3))  # (b, c, h, l)
    earlier = clock.map(lambda z: z[..., None, :])
    decay = clock.map(lambda z: z[..., :, None]).since(earlier, dtype, causal)
    shared = read @ write.transpose(3, 4)  # (b, c, g, l, s)
    matrix = decay.view(b, c, groups, h // groups, length, length) * shared[:, :, :, None]
    inside = matrix.view(b, c, h, length, length) @ block.value.transpose(2, 3)  # (b, c, h, l, p)
    carried = read @ entering.reshape(b, c, groups, h // groups * p, n).transpose(3, 4)
    carried = carried.view(b, c, groups, length, h // groups, p).transpose(2, 3).reshape(b, c, length, h, p)
    y = carried * block.clock.since(None, dtype) + inside.transpose(2, 3)
    return y.reshape(b, c * length, h, p)


def _states(block: _Block, entering: Tensor, at: list[int]) -> list[Tensor]:
    """States after the given positions of the block, in parts (b, k, h, p, n) that make up len(at)."""
    b, _, length, h, p = block.value.shape
    n, m = block.write.shape[4], block.clock.time.shape[4]
    dtype = block.value.dtype
    budget = _GPU_BUDGET if block.value.is_cuda else _CPU_STATES
    some = max(1, budget // (b * h * max(p * n, length * p, length * m)))
    found = []
    for first in range(0, len(at), some):
        pick = torch.tensor(at[first : first + some], device=block.value.device)
        chunk, place = pick // length, pick % length
        clock = block.clock.map(partial(torch.index_select, dim=1, index=chunk))  # (b, k, s, h, m)
        flat = block.clock.map(lambda z: z.flatten(1, 2))
        now = flat.map(partial(torch.index_select, dim=1, index=pick)).map(lambda z: z[:, :, None])  # (b, k, 1, h, m)
        written = (torch.arange(length, device=pick.device) <= place[:, None])[None, :, :, None, None]
        decay = now.since(clock, dtype, written)
        value, write = block.value.index_select(1, chunk), block.write.index_select(1, chunk)
        if m == 1:
            value = value * decay
        else:
            write = write * decay
        added = block.grouped(value).transpose(3, 4) @ write.transpose(2, 3)
        kept = now.since(None, dtype).transpose(2, 3)  # (b, k, h, 1, m)
        found.append(torch.addcmul(added.reshape(b, len(pick), h, p, n), kept, entering.index_select(1, chunk)))
    return found
