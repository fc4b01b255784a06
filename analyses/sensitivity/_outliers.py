"""Outliers of a model's tensors, before and after rotations that spread them over the channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.sensitivity._rotations import hadamard, karhunen_loeve, random_rotation
from ssmlens.bootstrap import BLOCKS, block_sums
from ssmlens.errors import SsmlensError
from ssmlens.trace import MixerTrace, Trace

__all__ = ["ROTATIONS", "TENSORS", "gini", "outlier_statistics", "outliers"]

TENSORS = ("input", "gate", "value", "write", "read", "dt", "output", "projected", "state")
"""What is looked at, channels last: the mixer's input (b t, d), the gate z before its activation, the scan's value x,
write B and read C without dt, dt by head, the scan's output with the skip, what enters the output projection, and the
state (samples are tokens, heads and channels of a head; channels are the n states)."""

ROTATIONS = ("none", "hadamard", "klt_hadamard", "klt_hadamard_held_out", "random")
"""What the channels go through: nothing; a Hadamard matrix (QuaRot); the eigenvectors of their covariance and then a
Hadamard matrix (MambaQuant); the same with the covariance of the other half of the text; a random rotation."""

STATES = 64
"""States that are looked at, evenly over the text."""


def outliers(
    trace: Trace, tensors: Sequence[str] = TENSORS, rotations: Sequence[str] = ROTATIONS, *, seed: int = 0
) -> Result:
    """Tail statistics of every layer's tensors, before and after rotations.

    Args:
        trace: with weights, for "projected".
        tensors: which, see `TENSORS`.
        rotations: which, see `ROTATIONS`.
        seed: of the random rotation and the bootstrap.

    Returns:
        Kurtosis of all entries about their mean (3 for a normal law), (tensor, layer, rotation), with ``low`` and
        ``high``, 95 % of the block bootstrap over 20 stretches. Columns: ``max_over_median`` of magnitudes, ``gini``
        of the channels' variances (0 when all are alike, 1 - 1/d when one has it all), ``top_energy`` (share of the
        sum of squares in the 1 % largest channels, at least one), ``int8_error`` (relative RMS error of rounding to
        255 even levels up to the largest magnitude), ``channels``. Control: ``normal_int8_error``, the same for
        normal numbers of this size, and the rotation "random".

    Raises:
        SsmlensError: for an unknown tensor or rotation.
    """
    wrong = [x for x in tensors if x not in TENSORS] or [x for x in rotations if x not in ROTATIONS]
    if wrong or not tensors or not rotations:
        raise SsmlensError(
            f"unknown tensor or rotation {wrong[0] if wrong else 'none'!r}: choose from {', '.join(TENSORS)}, and from "
            f"{', '.join(ROTATIONS)}"
        )
    trace.check()
    layers = sorted(trace.mixers)
    names = ("kurtosis", "low", "high", "max_over_median", "gini", "top_energy", "int8_error", "normal_int8_error")
    shape = (len(tensors), len(layers), len(rotations))
    numbers = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in names}
    channels = torch.zeros(*shape[:2], 1, dtype=torch.float64)
    for j, layer in enumerate(layers):
        for i, name in enumerate(tensors):
            x = _samples(trace[layer], name)
            channels[i, j] = x.shape[1]
            for k, rotation in enumerate(rotations):
                for what, number in outlier_statistics(rotated(x, rotation, seed), seed).items():
                    numbers[what][i, j, k] = number
    value = numbers.pop("kurtosis")
    control = {"normal_int8_error": numbers.pop("normal_int8_error")}
    return Result(
        name="kurtosis",
        value=value,
        dims=("tensor", "layer", "rotation"),
        units="1",
        coords={"tensor": list(tensors), "layer": layers, "rotation": list(rotations)},
        columns={**numbers, "channels": channels},
        control=control,
        settings={**trace.settings, "seed": seed, "states": STATES,
                  "reconstruction_error": dict(trace.reconstruction_error)},
        assumes=(
            "klt_hadamard has seen what it is judged on, so its variances are equal exactly; klt_hadamard_held_out "
            "tells what is left of that on the second half of the text.",
            "A rotation can be merged into the weights where only linear maps follow: not past the convolution, the "
            "gate, or dt.",
        ),
        checked_by="diag(H L H^T) = tr(L) / d; tests/analyses/sensitivity/test_outliers.py",
    )  # fmt: skip


def outlier_statistics(x: Tensor, seed: int = 0) -> dict[str, float]:
    """The numbers of `outliers` for samples x (m, d), in float64.

    Args:
        x: samples by channels.
        seed: of the bootstrap and the normal control.

    Raises:
        SsmlensError: for another shape or numbers that are not finite.
    """
    if x.ndim != 2 or not x.numel() or not bool(x.isfinite().all()):
        raise SsmlensError(f"samples are finite numbers (m, d), got shape {tuple(x.shape)}")
    x = x.double()
    centred = x - x.mean()
    sums = [block_sums(centred.pow(power).mean(1)) for power in (2, 4)]
    counts = block_sums(torch.ones(len(x)))
    low, high = _kurtosis_interval(sums[0], sums[1], counts, seed)
    square, fourth = (s.sum() / len(x) for s in sums)
    energy = x.square().sum(0).sort(descending=True).values
    magnitude = x.abs().flatten()
    count = max(1, round(0.01 * x.shape[1]))
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "kurtosis": _ratio(fourth, square.square()),
        "low": low,
        "high": high,
        "max_over_median": _ratio(magnitude.max(), magnitude.median()),
        "gini": gini(x.var(0, correction=0)),
        "top_energy": _ratio(energy[:count].sum(), energy.sum()),
        "int8_error": _int8_error(x),
        "normal_int8_error": _int8_error(normal),
    }


def gini(x: Tensor) -> float:
    """Gini coefficient of numbers that are not negative: 0 when all are equal, 1 - 1/d when one of d has it all."""
    x = x.double().flatten().sort().values
    if not len(x) or bool((x < 0).any()):
        raise SsmlensError("a Gini coefficient is of numbers that are not negative, and at least one")
    rank = torch.arange(1, len(x) + 1, dtype=torch.float64)
    return _ratio(((2 * rank - len(x) - 1) * x).sum(), len(x) * x.sum())


def rotated(x: Tensor, rotation: str, seed: int = 0) -> Tensor:
    """Samples (m, d) with their channels rotated, see `ROTATIONS`; the held-out way keeps the second half of them."""
    d = x.shape[1]
    if rotation == "none":
        return x
    if rotation == "random":
        return x @ random_rotation(d, seed).T.to(x.device)
    mix = hadamard(d).to(x.device) / math.sqrt(d) if rotation != "none" else None
    assert mix is not None
    if rotation == "hadamard":
        return x @ mix.T
    half = len(x) // 2 if rotation == "klt_hadamard_held_out" else 0
    seen = x[:half] if half else x
    return x[half:] @ karhunen_loeve(seen) @ mix.T


def _samples(mixer: MixerTrace, name: str) -> Tensor:
    """One tensor as (m, channels) in float64, real tokens only, in the order of the text."""
    rec = mixer.recurrence
    real = rec.real.cpu()

    def tokens(x: Tensor) -> Tensor:
        return x.detach().double().cpu()[real].flatten(1)

    if name == "state":
        at = torch.linspace(0, rec.length - 1, min(STATES, rec.length)).round().long().unique()
        states = rec.states(at.tolist()).detach().double().cpu()  # (b, k, h, p, n)
        return states.movedim(1, 0)[real[:, at].T].flatten(0, -2)
    if name in ("output", "projected"):
        y = rec.run().flatten(2)
        return tokens(y if name == "output" else _projected(mixer, y))
    direct: dict[str, Any] = {"input": lambda: mixer.input, "gate": lambda: mixer.gate, "value": lambda: rec.value}
    direct |= {"write": lambda: rec.inputs.write, "read": lambda: rec.inputs.read, "dt": lambda: rec.dt}
    x = direct[name]()
    if x is None:
        raise SsmlensError(f"layer {mixer.layer} has no {name}: leave it out of tensors")
    return tokens(x)


def _projected(mixer: MixerTrace, y: Tensor) -> Tensor:
    """What enters the output projection: y (b, t, e) gated, and in Mamba-2 normed."""
    gated = y * F.silu(mixer.gate.to(y.dtype))
    if mixer.family != "mamba2":
        return gated
    grouped = gated.unflatten(-1, (-1, mixer.config["norm_group"]))
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + mixer.config["norm_eps"])
    return normed.flatten(-2) * mixer.parameters["norm.weight"].to(y.dtype)


def _kurtosis_interval(square: Tensor, fourth: Tensor, counts: Tensor, seed: int) -> tuple[float, float]:
    if len(square) < 2:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(square), (1000, min(BLOCKS, len(square))), generator=generator)
    n, m2, m4 = (x[drawn].sum(1) for x in (counts, square, fourth))
    low, high = torch.quantile((m4 / n) / (m2 / n).square(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def _int8_error(x: Tensor) -> float:
    step = x.abs().max() / 127
    if not step:
        return 0.0
    return float(((x / step).round() * step - x).square().mean().sqrt() / x.square().mean().sqrt())


def _ratio(top: Any, bottom: Any) -> float:
    """0 / 0 is NaN, and anything else over 0 infinite."""
    top, bottom = float(top), float(bottom)
    if bottom:
        return top / bottom
    return math.inf if top else math.nan
