"""The Mamba-1 recurrence as one Triton kernel forward and one backward, for training on a GPU.

One program walks one batch row and a block of channels through time with the state in registers. The forward
pass stores every state, (b, t + 1, h, n) in float32, which is what makes the backward pass one plain walk back;
that buffer is why this kernel serves training at short lengths and nothing else.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["selective_scan"]

BLOCK = 32


@triton.jit
def _forward(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, y_ptr, s_ptr,
    length, heads, N: tl.constexpr, H: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) * H + tl.arange(0, H)
    n = tl.arange(0, N)
    inside = h < heads
    tile = h[:, None] * N + n[None, :]
    a = tl.load(a_ptr + tile, mask=inside[:, None], other=0.0)
    state = tl.zeros((H, N), dtype=tl.float32)
    row = tl.program_id(1).to(tl.int64) * length
    slot = tl.program_id(1).to(tl.int64) * (length + 1)
    if KEEP:
        tl.store(s_ptr + slot * heads * N + tile, state, mask=inside[:, None])
    for _ in range(length):
        x = tl.load(x_ptr + row * heads + h, mask=inside, other=0.0)
        dt = tl.load(dt_ptr + row * heads + h, mask=inside, other=0.0)
        b = tl.load(b_ptr + row * N + n)
        c = tl.load(c_ptr + row * N + n)
        state = tl.exp(dt[:, None] * a) * state + (dt * x)[:, None] * b[None, :]
        tl.store(y_ptr + row * heads + h, tl.sum(state * c[None, :], axis=1), mask=inside)
        if KEEP:
            slot += 1
            tl.store(s_ptr + slot * heads * N + tile, state, mask=inside[:, None])
        row += 1


@triton.jit
def _backward(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, s_ptr, dy_ptr, dx_ptr, ddt_ptr, da_ptr, db_ptr, dc_ptr,
    length, heads, N: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0), tl.program_id(1)
    h = block * H + tl.arange(0, H)
    n = tl.arange(0, N)
    inside = h < heads
    tile = h[:, None] * N + n[None, :]
    a = tl.load(a_ptr + tile, mask=inside[:, None], other=0.0)
    grad = tl.zeros((H, N), dtype=tl.float32)  # of the loss, with respect to the state after this step
    da = tl.zeros((H, N), dtype=tl.float32)
    row = batch.to(tl.int64) * length + length - 1
    slot = batch.to(tl.int64) * (length + 1) + length  # of the state after this step
    part = (batch.to(tl.int64) * tl.num_programs(0) + block) * length + length - 1
    state = tl.load(s_ptr + slot * heads * N + tile, mask=inside[:, None], other=0.0)
    for _ in range(length):
        slot -= 1
        x = tl.load(x_ptr + row * heads + h, mask=inside, other=0.0)
        dt = tl.load(dt_ptr + row * heads + h, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * heads + h, mask=inside, other=0.0)
        b = tl.load(b_ptr + row * N + n)
        c = tl.load(c_ptr + row * N + n)
        earlier = tl.load(s_ptr + slot * heads * N + tile, mask=inside[:, None], other=0.0)
        grad += dy[:, None] * c[None, :]
        tl.store(dc_ptr + part * N + n, tl.sum(dy[:, None] * state, axis=0))
        tl.store(db_ptr + part * N + n, tl.sum(grad * (dt * x)[:, None], axis=0))
        written = tl.sum(grad * b[None, :], axis=1)
        decay = tl.exp(dt[:, None] * a)
        kept = grad * decay * earlier
        tl.store(dx_ptr + row * heads + h, dt * written, mask=inside)
        tl.store(ddt_ptr + row * heads + h, tl.sum(kept * a, axis=1) + x * written, mask=inside)
        da += kept * dt[:, None]
        grad = grad * decay
        state = earlier
        row -= 1
        part -= 1
    tl.store(da_ptr + batch.to(tl.int64) * heads * N + tile, da, mask=inside[:, None])


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        batch, length, heads = x.shape
        n = A.shape[1]
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(x)
        states = x.new_empty((batch, length + 1, heads, n) if keep else (1,))
        grid = (triton.cdiv(heads, BLOCK), batch)
        _forward[grid](x, dt, A, B, C, y, states, length, heads, N=n, H=BLOCK, KEEP=keep, num_warps=1)
        if keep:
            ctx.save_for_backward(x, dt, A, B, C, states)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, states = ctx.saved_tensors
        batch, length, heads = x.shape
        n = A.shape[1]
        grid = (triton.cdiv(heads, BLOCK), batch)
        dx, ddt = torch.empty_like(x), torch.empty_like(x)
        dA = x.new_empty(batch, heads, n)
        dB, dC = x.new_empty(2, batch, grid[0], length, n)
        _backward[grid](
            x, dt, A, B, C, states, grads[0].contiguous(), dx, ddt, dA, dB, dC, length, heads, N=n, H=BLOCK, num_warps=1
        )  # fmt: skip
        return dx, ddt, dA.sum(0), dB.sum(1), dC.sum(1)


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y[t] = h[t] C[t] with h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t], from a zero state.

    Args:
        x: (b, t, h) what is written.
        dt: (b, t, h) step size, >= 0.
        A: (h, n) decay rate, <= 0; n is a power of two.
        B: (b, t, n) write direction.
        C: (b, t, n) read direction.

    Returns:
        (b, t, h) in float32; differentiable in every argument. Gu & Dao 2023, algorithm 2.
    """
    if not isinstance(y := _SelectiveScan.apply(*(v.float().contiguous() for v in (x, dt, A, B, C))), Tensor):
        raise TypeError("the scan returned no tensor")
    return y
