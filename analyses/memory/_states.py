"""How large the states are at every token, and how much of them each token lets survive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssmlens.analyses._layers import Source, collect, positions
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _rows as heads
from ssmlens.analyses.memory._assumes import CONSTANT_DRIVE, OBSERVED
from ssmlens.recurrence import Recurrence

__all__ = ["state_norm"]

NAMES = ("value", "kept_norm", "write_norm", "before")


def state_norm(source: Source, at: Sequence[int] | None = None, *, reduce: str = "none") -> Result:
    """Frobenius norm of each head's state after each token, over the head's channels and states.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        at: these tokens only; negative counts from the end of each row. All by default: without a reduction that is
            one number for each token and head.
        reduce: how the heads of a layer are joined.
            "none": every head on its own axis.
            "mean": mean over heads.
            "median": middle head.
            "pooled": root of the sum of squares, the norm of all heads' states together.

    Returns:
        Result in the units of the state with axes (batch, token, head), without ``head`` when reduced; NaN at padding.
        ``kept_norm`` is what the decay (and the erase of a delta rule) of this token left of the state before it, and
        ``kept_share`` that over the norm before; NaN where there was none. The control, ``write_norm``, is the norm of
        what this token writes: of a state without memory.

    Raises:
        ValueError: for an unknown reduction, or a token that does not exist.
    """
    layers = collect(source)
    if reduce not in heads.REDUCTIONS:
        raise ValueError(f"unknown reduction {reduce!r}: choose one of {', '.join(heads.REDUCTIONS)}")
    longest = int(layers.lengths.max())
    labels = list(range(longest)) if at is None else [int(t) for t in at]
    where = positions(layers, labels)
    parts = [_norms(rec, where, at is None, reduce) for rec in layers]
    return layers.result(
        parts,
        ("batch", "token", *(["head"] if reduce == "none" else [])),
        {"token": labels},
        name="state_norm",
        units="state",
        control=("write_norm",),
        settings={"at": "all" if at is None else labels, "reduce": reduce},
        assumes=(OBSERVED,),
        checked_by=CONSTANT_DRIVE,
    )


def _norms(rec: Recurrence, where: Tensor, whole: bool, reduce: str) -> dict[str, Tensor]:
    """The numbers of one layer at the tokens ``where`` (b, k), -1 for none: (b, k) or (b, k, h) in float64."""
    axes = () if reduce != "none" else (rec.n_heads,)
    out = {name: torch.full((*where.shape, *axes), torch.nan, dtype=torch.float64) for name in NAMES}
    for stretch, numbers in _stretches(rec, int(where.max())):
        here = (where >= stretch.start) & (where < stretch.stop)
        place = (where - stretch.start).clamp(0, stretch.stop - stretch.start - 1)
        for name, x in zip(NAMES, numbers, strict=True):
            if whole:
                # Tokens in order: one stretch after the other.
                target = out[name][:, stretch]
                target.copy_(_join(x, reduce)[:, : target.shape[1]])
            elif bool(here.any()):
                x = x.gather(1, place.to(x.device)[..., None].expand(-1, -1, rec.n_heads))
                out[name] = _join(x, reduce).where(here.view(*here.shape, *[1] * len(axes)), out[name])
    known = (where >= 0).view(*where.shape, *[1] * len(axes))
    out = {name: x.where(known, torch.nan) for name, x in out.items()}
    before = out.pop("before")
    out["kept_share"] = (out["kept_norm"] / before).where(before > 0, torch.nan)
    return out


def _stretches(rec: Recurrence, last: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Stretches of time up to the token ``last``, with the numbers that `NAMES` names, (b, tokens, h)."""
    before = torch.zeros(rec.batch, 1, rec.n_heads, device=rec.device, dtype=rec.dtype)
    if rec.initial is not None:
        before = rec.initial.to(rec.dtype).norm(dim=(-2, -1))[:, None]
    for stretch, found in rec.stream_statistics():
        if stretch.start > last:
            return
        earlier = torch.cat([before, found.norm[:, :-1]], 1)
        yield stretch, (found.norm, found.kept, _written(rec, stretch), earlier)
        before = found.norm[:, -1:]


def _written(rec: Recurrence, stretch: slice) -> Tensor:
    """Norm of outer(value, write) of some tokens, (b, t, h)."""
    x = rec.inputs.slice(stretch.start, stretch.stop)
    value, write = x.value.to(rec.dtype).norm(dim=-1), x.write.to(rec.dtype).norm(dim=-1)
    norm = value * write.repeat_interleave(rec.n_heads // write.shape[2], 2)
    return norm if x.dt is None else norm * x.dt.to(rec.dtype)


def _join(x: Tensor, how: str) -> Tensor:
    x = x.double()
    return (x.square().sum(-1).sqrt() if how == "pooled" else heads.reduce_heads(x, how)).cpu()
