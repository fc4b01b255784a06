"""Sends a recurrence to the Triton kernel that suits it, forward and backward.

=====================================  ==================  ==========================================
recurrence                             forward             backward
=====================================  ==================  ==========================================
one channel per head                   `walk`              `walk_backward`
one decay per head, several channels   `ssd`               `ssd_backward`
one decay per state, several channels  `walk`              the chunked PyTorch path, computed anew
delta rule                             `walk`              the chunked PyTorch path, computed anew
=====================================  ==================  ==========================================

Every state of several channels is `walk`'s work too: writing them is the cost, and a walk does nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from triton import knobs

from .. import chunked
from ..inputs import ScanInputs
from . import ssd, ssd_backward, walk, walk_backward

__all__ = ["refusal", "run", "states"]

Picks = list[int] | Literal["all"] | None
Outputs = tuple[Tensor | None, Tensor, Tensor | None]

# Matrix units take at least 16 rows and columns: below that, padding them costs more than a walk.
_LEAST_CHANNELS = 8
# Programs along all but the first axis of a launch; sequences of the batch are one of them.
_MOST_ROWS = 65_535


def refusal(x: ScanInputs) -> str | None:
    """Why these inputs cannot run here, as the end of a sentence; None when they can."""
    if not (x.value.is_cuda or _interpreted()):
        return "needs tensors on a CUDA device (or TRITON_INTERPRET=1 in the environment)"
    if peek_interpreter_stack() is not None or _has_tangents(x):
        return "knows neither torch.func nor forward-mode derivatives: use impl='chunked' or 'naive'"
    if x.value.dtype == torch.float64:
        return "computes in float32: float64 inputs run with impl='chunked'"
    if x.batch > _MOST_ROWS:
        return (
            f"takes at most {_MOST_ROWS:,} sequences at a time, got {x.batch:,}: cut the batch, or use impl='chunked'"
        )
    return None


def _has_tangents(x: ScanInputs) -> bool:
    """Whether forward-mode derivatives are carried, which a kernel would drop without a word."""
    # Outside of `forward_ad.dual_level` unpacking never finds any, and this is asked at every call.
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(z).tangent is not None for z in x.tensors().values())


def _interpreted() -> bool:
    return bool(knobs.runtime.interpret)


def run(x: ScanInputs, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """Outputs (b, t, h, p) and final state (b, h, p, n), float32.

    Args:
        x: the recurrence.
        precision: of matrix products over chunks, "float32" or "bfloat16"; walks are float32 always.
    """
    y, final, _ = _scan(x, None, True, precision)
    assert y is not None
    return y, final


def states(x: ScanInputs, at: Sequence[int] | None = None) -> Tensor:
    """States (b, len(at) or t, h, p, n), float32; never more than those asked for."""
    every = at is None or list(at) == list(range(x.length))
    _, _, found = _scan(x, "all" if every else list(at or ()), False, "float32")
    assert found is not None
    return found


def _scan(x: ScanInputs, picks: Picks, want_output: bool, precision: str) -> Outputs:
    if not x.length or not x.value.numel() or not x.d_state or picks == []:
        if picks is None:
            return *chunked.run(x), None
        every = chunked.states(x, range(x.length) if isinstance(picks, str) else picks)
        return None, every, every
    names, pieces = zip(*x.tensors().items(), strict=True)
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in pieces)
    if not recorded:
        return _forward(x, picks, want_output, precision)[:3]
    kind = _Recomputed if x.has_erase or (x.head_dim > 1 and _per_state(x)) else _Fused
    return kind.apply(names, picks, want_output, precision, *pieces)


def _per_state(x: ScanInputs) -> bool:
    decay = x.log_decay if x.A is None else x.A
    assert decay is not None
    return decay.shape[-1] > 1


def by_chunks(x: ScanInputs, picks: Picks = None) -> bool:
    """Whether matrix units do this one."""
    fits = x.head_dim >= _LEAST_CHANNELS and not x.has_erase and not (_per_state(x) and x.d_state > 1)
    return fits and picks != "all"


def _forward(
    x: ScanInputs, picks: Picks, want_output: bool, precision: str, keep: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None, Any]:
    """Outputs and what the backward pass wants of them."""
    if by_chunks(x, picks):
        scanned = ssd.forward(x, picks, precision=_SHORT[precision], want_output=want_output)
        return scanned.y, scanned.final, scanned.states, scanned
    between = walk_backward.EVERY if keep and picks is None else None
    walked = walk.forward(x, picks, want_output=want_output, every=between)
    return walked.y, walked.final, walked.states, walked


_SHORT = {"float32": "fp32", "bfloat16": "bf16"}


class _Fused(torch.autograd.Function):
    """A forward kernel with the backward kernel written for it."""

    @staticmethod
    def forward(
        ctx: Any,
        names: tuple[str, ...],
        picks: Picks,
        want_output: bool,
        precision: str,
        *pieces: Tensor,
    ) -> Outputs:
        x = ScanInputs(**dict(zip(names, pieces, strict=True)))
        y, final, found, kept = _forward(x, picks, want_output, precision, keep=True)
        ctx.set_materialize_grads(False)
        ctx.names, ctx.picks, ctx.precision = names, picks, precision
        ctx.by_chunks = by_chunks(x, picks)
        ctx.chunk = kept.chunk if ctx.by_chunks else None
        boundaries = kept.boundaries if ctx.by_chunks else (kept.states if picks is None else None)
        ctx.save_for_backward(*pieces, *([] if boundaries is None else [boundaries]))
        return y, final, found if picks is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dstates: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.names)
        pieces = ctx.saved_tensors[:count]
        boundaries = ctx.saved_tensors[count] if len(ctx.saved_tensors) > count else None
        x = ScanInputs(**dict(zip(ctx.names, pieces, strict=True)))
        if ctx.by_chunks:
            found = ssd_backward.backward(
                x, dy, dfinal, dstates, ctx.picks, boundaries, ctx.chunk, _SHORT[ctx.precision]
            )
        elif x.head_dim == 1:
            if boundaries is None:
                boundaries = walk.forward(x, every=walk_backward.EVERY, want_output=False).states
            found = walk_backward.backward(x, dy, dfinal, dstates, ctx.picks, boundaries, walk_backward.EVERY)
        else:
            found = _anew(x, ctx.needs_input_grad[4:], ctx.names, ctx.picks, [dy, dfinal, dstates])
        return None, None, None, None, *_in_order(ctx, pieces, found)


class _Recomputed(torch.autograd.Function):
    """A forward kernel whose gradient is that of the chunked PyTorch path, computed anew; differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        names: tuple[str, ...],
        picks: Picks,
        want_output: bool,
        precision: str,
        *pieces: Tensor,
    ) -> Outputs:
        ctx.set_materialize_grads(False)
        ctx.names, ctx.picks = names, picks
        ctx.save_for_backward(*pieces)
        x = ScanInputs(**dict(zip(names, pieces, strict=True)))
        return _forward(x, picks, want_output, precision)[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x = ScanInputs(**dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        found = _anew(x, ctx.needs_input_grad[4:], ctx.names, ctx.picks, list(grads), torch.is_grad_enabled())
        return None, None, None, None, *_in_order(ctx, ctx.saved_tensors, found)


def _anew(
    x: ScanInputs,
    wanted: Sequence[bool],
    names: Sequence[str],
    picks: Picks,
    grads: list[Tensor | None],
    twice: bool = False,
) -> dict[str, Tensor]:
    """Gradients through the chunked PyTorch path."""
    pieces = x.tensors()
    leaves = [k for k, want in zip(names, wanted, strict=True) if want]
    with torch.enable_grad():
        if not twice:
            pieces = {k: z.detach().requires_grad_(k in leaves) for k, z in pieces.items()}
        again = ScanInputs(**pieces)
        outputs: list[Tensor | None] = [None, None, None]
        if grads[0] is not None or grads[1] is not None:
            outputs[:2] = chunked.run(again)
        if grads[2] is not None:
            assert picks is not None
            outputs[2] = chunked.states(again, range(x.length) if isinstance(picks, str) else picks)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            [pieces[k] for k in leaves],
            [grad for _, grad in pairs],
            create_graph=twice,
            allow_unused=True,
        )
    return {k: z for k, z in zip(leaves, found, strict=True) if z is not None}


def _in_order(ctx: Any, pieces: Sequence[Tensor], found: dict[str, Tensor]) -> list[Tensor | None]:
    """The gradients as autograd takes them: one for each input, in its dtype, None where none was asked for."""
    wanted = ctx.needs_input_grad[4:]
    return [
        found[k].to(z.dtype) if want and k in found else None
        for k, z, want in zip(ctx.names, pieces, wanted, strict=True)
    ]
