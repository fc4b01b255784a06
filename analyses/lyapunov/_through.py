"""Tangents of a whole model through a stretch of text, layer by layer.

What a layer does around its recurrence is differentiated by torch, for all tokens and tangents at once. The recurrence
is not: with F the derivative of what a token does to the state that it finds,

    dh[t] = a[t] dh[t-1] + F[t],   F[t] = a[t] A ddt[t] h[t-1] + d(dt value)[t] write[t]^T + (dt value)[t] dwrite[t]^T
    dy[t] = dh[t] read[t] + h[t] dread[t]

so that all F of a stretch are three products, and a token costs one more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlens.kernels.inputs import ScanInputs
from ssmlens.stepping import LayerState, State, Stepper
from ssmlens.stepping._layer import Layer

__all__ = ["through"]

ENTRIES = 2**18
"""Numbers of the tangents of states that are held at once on a CPU: about its cache."""

GPU_ENTRIES = 2**25
"""The same on a GPU, where many small products cost more than one large one."""


def through(net: Stepper, state: State, tangents: State, vectors: Tensor) -> tuple[State, State]:
    """A state and its tangents after some tokens.

    Args:
        net: the model.
        state: of one row.
        tangents: of k rows.
        vectors: (1, t, d) input vectors, which the tangents do not change.

    Returns:
        The state and the tangents after the last token.
    """
    x = vectors.to(state.layers[0].h.dtype)
    dx = x.new_zeros(tangents.batch, *x.shape)
    after, moved = [], []
    for layer, own, change in zip(net.layers, state.layers, tangents.layers):
        x, dx, left, pushed = _layer(layer, (x, dx), own, change)
        after.append(left)
        moved.append(pushed)
    return State(tuple(after)), State(tuple(moved))


def _layer(
    layer: Layer, residual: tuple[Tensor, Tensor], state: LayerState, tangents: LayerState
) -> tuple[Tensor, Tensor, LayerState, LayerState]:
    """The residual stream (1, t, d) and its tangents (k, 1, t, d) after one layer, and what it carries on."""

    def before(x: Tensor, conv: Tensor) -> tuple[Tensor, ...]:
        inputs, z, window = layer.before(x, LayerState(state.h, conv))
        assert inputs.dt is not None
        return inputs.value, inputs.write, inputs.read, inputs.dt, z, window

    (*parts, z, window), (*changes, dz, dwindow) = _along(
        before, (residual[0], state.conv), (residual[1], tangents.conv[:, None])
    )
    value, write, read, dt = parts
    inputs = ScanInputs(value=value, write=write, read=read, dt=dt, A=layer.rate, initial=state.h)
    dvalue, dwrite, dread, ddt = changes
    y, h, dy, dh = recur(inputs, dvalue, dwrite, dread, ddt, tangents.h)
    x, dx = _along(layer.after, (residual[0], y, value, z), (residual[1], dy, dvalue, dz))
    return x, dx, LayerState(h, window), LayerState(dh, dwindow[:, 0])


def _along(function: Callable[..., Any], at: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """A function's value, and its derivatives along tangents with k rows in front, all through one evaluation."""
    dims: Any = (None, 0)
    pair: Any = torch.func.vmap(lambda *v: torch.func.jvp(function, at, v), out_dims=dims)(*tangents)
    return pair[0], pair[1]


def recur(
    inputs: ScanInputs, dvalue: Tensor, dwrite: Tensor, dread: Tensor, ddt: Tensor, dinitial: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A recurrence of one row and its tangents.

    Args:
        inputs: with dt, A and an initial state, b = 1.
        dvalue, dwrite, dread, ddt: tangents (k, 1, t, ...) of those of the inputs.
        dinitial: (k, h, p, n) tangents of the initial state.

    Returns:
        y (1, t, h, p), the final state (1, h, p, n), and their tangents (k, 1, t, h, p) and (k, h, p, n).
    """
    assert inputs.A is not None
    assert inputs.dt is not None
    assert inputs.initial is not None
    heads, groups, length = inputs.n_heads, inputs.write.shape[2], inputs.length
    split = (groups, heads // groups)
    # Time and groups first, then tangents: (t, g, k, h / g, p, n), with 1 for what an axis does not have.
    dt, value = inputs.dt[0].unflatten(1, split), inputs.value[0].unflatten(1, split)
    ddt, dvalue = (x[:, 0].unflatten(2, split).movedim(0, 2) for x in (ddt, dvalue))
    write, read = inputs.write[0], inputs.read[0]
    dwrite, dread = (x[:, 0].movedim(0, 2) for x in (dwrite, dread))  # (t, g, k, n)
    A = inputs.A.unflatten(0, split)
    decay = (dt[..., None] * A).exp()  # (t, g, h, n or 1)
    drive = dt[..., None] * value
    ddrive = ddt[..., None] * value[:, :, None] + dt[:, :, None, :, None] * dvalue
    h = _states(decay, drive, write, inputs.initial[0].unflatten(0, split))
    slope = (decay * A)[:, :, :, None] * h[:-1]  # (t, g, h, p, n)
    y = (h[1:] @ read[:, :, None, :, None])[..., 0]
    # The states do not move in this part of dy.
    dy = (h[1:].flatten(2, 3) @ dread.mT).unflatten(2, h.shape[2:4]).movedim(4, 2)  # (t, g, k, h, p)
    dh = dinitial.unflatten(1, split).movedim(0, 1)
    width = max(1, (ENTRIES if dh.device.type == "cpu" else GPU_ENTRIES) // dh.numel())
    moved = []
    for start in range(0, length, width):
        some = slice(start, start + width)
        force = slope[some, :, None] * ddt[some, ..., None, None]
        force.addcmul_(ddrive[some, ..., None], write[some, :, None, None, None])
        force.addcmul_(drive[some, :, None, ..., None], dwrite[some, :, :, None, None])
        dh = _accumulate(force, decay[some, :, None, :, None], dh)
        moved.append((force.flatten(2, 4) @ read[some, ..., None]).view(force.shape[:-1]))
    dy = dy + torch.cat(moved)
    return (
        y.flatten(1, 2)[None],
        h[-1].flatten(0, 1)[None],
        dy.movedim(2, 0).flatten(2, 3)[:, None],
        dh.movedim(1, 0).flatten(1, 2),
    )


def _states(decay: Tensor, drive: Tensor, write: Tensor, initial: Tensor) -> Tensor:
    """The states (t + 1, g, h, p, n) before and after every token."""
    force = drive[..., None] * write[:, :, None, None]
    h = torch.cat([initial[None], force])
    _accumulate(h[1:], decay[:, :, :, None], initial)
    return h


def _accumulate(force: Tensor, decay: Tensor, before: Tensor) -> Tensor:
    """Turn what each token adds into what there is after it, in place along the first axis; the last of them."""
    for now, kept in zip(force.unbind(), decay.unbind()):
        before = now.addcmul_(kept, before)
    return before
