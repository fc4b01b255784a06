"""How strongly an input still moves a later output, by gradients through the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._layers import listed
from ssmlens.analyses._ledger import Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import CASCADE, TEACHER_FORCED
from ssmlens.analyses.memory._remembrance import prompt_ids
from ssmlens.analyses.memory._split import bootstrap_weights, interval
from ssmlens.lens import Lens
from ssmlens.stepping import Stepper

__all__ = ["influence"]

LOCAL = "A gradient is the effect of an infinitely small change; what exchanging a token does may be something else."


def influence(
    source: Lens | Callable[[Tensor], Tensor],
    prompt: Any,
    positions: int | Sequence[int] = (-1,),
    *,
    probes: int = 8,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """How much the output at t moves with the input k tokens before: |d output[t] / d e[s]| * |e[s]|.

    The Frobenius norm of the Jacobian, estimated from random output directions v by the norms of v' J, one backward
    pass each for all sources at once (Hutchinson). It sees all paths through all layers, convolutions and gates.

    Args:
        source: a lens, whose output are the logits; or a differentiable function from inputs (t, d) to outputs (t, o).
        prompt: for a lens one text or ids (t,); else the inputs (t, d).
        positions: reading tokens t, negative ones from the end.
        probes: random directions; 0 takes every output instead, which is exact and for few outputs.
        repeats, confidence, seed: of the bootstrap over the directions, for the interval.
        progress: called with the backward passes done and all of them.

    Returns:
        Result with axes (position, back), NaN where t - back is before the text. The value lies between ``low`` and
        ``high`` (equal to it without probes). ``share`` is its part of the sum over the sources, ``mean_distance`` the
        mean of back under that share, and ``slope`` the nats per token at which the log of the value falls along the
        far half of the text (least squares over its logarithm), beside ``near_slope`` of the first 8 tokens back. The
        control of a lens, ``slowest_head``, is the log decay per token of its slowest head and state, the mean over
        the text: depth makes the whole slower than each of its parts.

    Raises:
        ValueError: for several rows, or positions that do not exist.
    """
    forward, inputs, settings, control = _prepare(source, prompt)
    total, wanted = len(inputs), listed(positions)
    wrong = [t for t in wanted if not -total <= t < total]
    if wrong or not wanted or probes < 0:
        raise ValueError(f"positions lie between 0 and {total - 1}, and probes are 0 or more")
    at = [t % total for t in wanted]
    leaf = inputs.detach().clone().requires_grad_(True)
    out = forward(leaf)
    out = out[:, None] if out.ndim == 1 else out
    if out.ndim != 2 or len(out) != total:
        raise ValueError(f"the outputs are (t, o), one row for each of the {total} inputs, got {tuple(out.shape)}")
    width = out.shape[-1]
    g = torch.Generator().manual_seed(seed)
    directions = torch.eye(width) if probes == 0 else torch.randn(probes, width, generator=g)
    squares = torch.zeros(len(at), len(directions), total, dtype=torch.float64)
    count, done = len(at) * len(directions), 0
    for i, t in enumerate(at):
        for r, v in enumerate(directions.to(out)):
            (grad,) = torch.autograd.grad(out[t] @ v, leaf, retain_graph=done + 1 < count)
            squares[i, r] = (grad.double().norm(dim=-1) * leaf.detach().double().norm(dim=-1)).square().cpu()
            done += 1
            if progress is not None:
                progress(done, count)
    part = _numbers(squares, at, probes, bootstrap_weights(len(directions), repeats, seed), confidence)
    settings |= {"positions": at, "probes": probes, "seed": seed, "tokens": total}
    settings["interval"] = f"{confidence:.0%} percentile bootstrap over {probes} directions" if probes else "exact"
    return Result(
        name="influence",
        value=part.pop("value"),
        dims=("position", "back"),
        units="output",
        coords={"position": at},
        columns=part,
        control=control,
        settings=settings,
        assumes=(LOCAL, TEACHER_FORCED),
        checked_by=CASCADE,
    )


def _prepare(source: Any, prompt: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, dict[str, Any], dict[str, Tensor]]:
    """The map from inputs (t, d) to outputs (t, o), its inputs, and what is known about them."""
    if not isinstance(source, Lens):
        inputs = torch.as_tensor(prompt)
        inputs = inputs if inputs.is_floating_point() else inputs.double()
        inputs = inputs[:, None] if inputs.ndim == 1 else inputs
        return source, inputs, {}, {}
    ids = prompt_ids(source, prompt)
    if len(ids) != 1:
        raise ValueError("influence looks at one text at a time")
    net = Stepper(source)
    inputs = net.embed(ids[0])

    def forward(vectors: Tensor) -> Tensor:
        # The stepper's own embedding, exchanged for one row per position.
        net.embedding = vectors
        _, logits = net.run(net.initial(), torch.arange(len(vectors), device=vectors.device)[None], chunk=len(vectors))
        assert logits is not None
        return logits[0]

    slowest = max(float(clock.mean_log_decay(m.recurrence).max()) for m in source.trace(ids))
    about = {"model": source.name, "fingerprint": source.fingerprint, "dtype": str(source.dtype), "output": "logits"}
    return forward, inputs, about, {"slowest_head": torch.tensor([[slowest]], dtype=torch.float64)}


def _numbers(squares: Tensor, at: list[int], probes: int, weights: Tensor, confidence: float) -> dict[str, Tensor]:
    """Squared norms (position, direction, source) to the columns of the result, sources by how far back they are."""
    total = squares.shape[2]
    # E |v' J|^2 is |J|^2 for directions of variance 1; every output in turn sums to it.
    scale = squares.shape[1] if probes else 1
    found = {name: torch.full((len(at), total), torch.nan, dtype=torch.float64) for name in ("value", "low", "high")}
    out = {name: torch.full((len(at), 1), torch.nan, dtype=torch.float64) for name in _SCALARS}
    for i, t in enumerate(at):
        back = squares[i, :, : t + 1].flip(-1)
        found["value"][i, : t + 1] = (back.sum(0) / scale).sqrt()
        ends = (
            interval((weights @ back / len(back)).sqrt(), confidence) if probes else (found["value"][i, : t + 1],) * 2
        )
        found["low"][i, : t + 1], found["high"][i, : t + 1] = ends
        own = found["value"][i, : t + 1]
        share, steps = own / own.sum(), torch.arange(t + 1, dtype=torch.float64)
        out["mean_distance"][i] = (share * steps).sum()
        out["near_slope"][i] = _slope(own[:8])
        out["slope"][i] = _slope(own[(t + 1) // 2 :])
    found["share"] = found["value"] / found["value"].nansum(1, keepdim=True)
    return {**found, **out}


_SCALARS = ("mean_distance", "near_slope", "slope")


def _slope(x: Tensor) -> float:
    """Least-squares slope of log x over its index, zeros left out."""
    where = (x > 0).nonzero()[:, 0].double()
    if len(where) < 2:
        return math.nan
    y = x[x > 0].log()
    steps = where - where.mean()
    return float((steps * (y - y.mean())).sum() / steps.square().sum())
