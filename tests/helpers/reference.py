"""Whole Mamba-1, Falcon-Mamba and Mamba-2 language models in float64, from a state dict, with nothing of ssmlens.

Written from the formulas of Gu and Dao (2023), Dao and Gu (2024) and the Falcon-Mamba report (2024), as loops over
time, taps and source tokens that can be checked by eye. One sequence at a time; no batch axis anywhere.

Letters: t tokens, d residual width, e inner width, h heads, p channels of a head, n states, g groups, r dt rank.
Mamba-1 has one head per inner channel, so h = e and p = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layer", "Model", "mamba1", "mamba2"]


@dataclass(frozen=True)
class Layer:
    """Everything that one mixer computes, float64.

    Args:
        input: (t, d) after the block's norm.
        x, z: (t, h, p) value after convolution and activation, (t, e) gate before its activation.
        dt, A, B, C, D: (t, h), (h, n) or (h, 1), (t, h, n), (t, h, n), (h,).
        log_decay, write: (t, h, n) or (t, h, 1), (t, h, n): dt A and dt B.
        states: (t, h, p, n) after each token.
        scan: (t, h, p) what is read from the states.
        skip: (t, h, p) D x; ``y`` is scan + skip.
        M: (h, t, s) implicit attention by its definition.
        distance: (h, t) mean distance of the sources of a row.
        output: (t, d) of the mixer.
    """

    input: Tensor
    x: Tensor
    z: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    log_decay: Tensor
    write: Tensor
    states: Tensor
    scan: Tensor
    skip: Tensor
    M: Tensor
    distance: Tensor
    output: Tensor

    @property
    def y(self) -> Tensor:
        return self.scan + self.skip


@dataclass(frozen=True)
class Model:
    """``residuals[k]`` (t, d) enters layer k, the last one leaves the last layer; ``logits`` is (t, v)."""

    residuals: list[Tensor]
    layers: list[Layer]
    logits: Tensor


def mamba1(
    weights: Mapping[str, Tensor],
    ids: Sequence[int],
    *,
    eps: float = 1e-5,
    bcdt_eps: float | None = None,
    act: str = "silu",
) -> Model:
    """Mamba-1; with ``bcdt_eps`` Falcon-Mamba, whose dt, B and C pass a weightless RMSNorm."""

    def mixer(hidden: Tensor, w: Mapping[str, Tensor]) -> Layer:
        channels, n = w["A_log"].shape
        rank = w["dt_proj.weight"].shape[1]
        projected = _linear(hidden, w["in_proj.weight"], w.get("in_proj.bias"))
        before, z = projected[:, :channels], projected[:, channels:]
        x = _act(_causal_conv(before, w["conv1d.weight"], w.get("conv1d.bias")), act)
        selected = _linear(x, w["x_proj.weight"])
        low_rank, B, C = selected[:, :rank], selected[:, rank : rank + n], selected[:, rank + n :]
        if bcdt_eps is not None:
            low_rank, B, C = (_rms(part, bcdt_eps) for part in (low_rank, B, C))
        dt = _softplus(_linear(low_rank, w["dt_proj.weight"], w["dt_proj.bias"]))
        B, C = (part[:, None, :].repeat(1, channels, 1) for part in (B, C))
        scan = _scan(x[:, :, None], dt, -torch.exp(w["A_log"]), B, C, w["D"])
        y = (scan["scan"] + scan["skip"])[:, :, 0] * _silu(z)
        return Layer(input=hidden, z=z, output=_linear(y, w["out_proj.weight"], w.get("out_proj.bias")), **scan)

    return _model(weights, ids, mixer, eps)


def mamba2(
    weights: Mapping[str, Tensor],
    ids: Sequence[int],
    *,
    groups: int,
    eps: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    act: str = "silu",
    norm_groups: int | None = None,
) -> Model:
    """Mamba-2 with the gate before the RMSNorm over each of ``norm_groups`` parts (by default ``groups``)."""

    def mixer(hidden: Tensor, w: Mapping[str, Tensor]) -> Layer:
        heads, inner = w["A_log"].shape[0], w["out_proj.weight"].shape[1]
        n = (w["conv1d.weight"].shape[0] - inner) // (2 * groups)
        projected = _linear(hidden, w["in_proj.weight"], w.get("in_proj.bias"))
        z, xBC, raw = torch.split(projected, [inner, inner + 2 * groups * n, heads], dim=1)
        xBC = _act(_causal_conv(xBC, w["conv1d.weight"], w.get("conv1d.bias")), act)
        x, B, C = torch.split(xBC, [inner, groups * n, groups * n], dim=1)
        dt = _softplus(raw + w["dt_bias"])
        dt = dt.clamp(min=dt_limit[0], max=dt_limit[1])
        x = x.reshape(len(x), heads, inner // heads)
        # Head i reads group i * groups // heads.
        group = [i * groups // heads for i in range(heads)]
        B, C = (part.reshape(len(part), groups, n)[:, group] for part in (B, C))
        scan = _scan(x, dt, -torch.exp(w["A_log"])[:, None], B, C, w["D"])
        y = (scan["scan"] + scan["skip"]).reshape(len(x), inner) * _silu(z)
        width = inner // (norm_groups or groups)
        normed = torch.cat([_rms(y[:, i : i + width], eps) for i in range(0, inner, width)], dim=1) * w["norm.weight"]
        return Layer(input=hidden, z=z, output=_linear(normed, w["out_proj.weight"], w.get("out_proj.bias")), **scan)

    return _model(weights, ids, mixer, eps)


def _model(weights: Mapping[str, Tensor], ids: Sequence[int], mixer, eps: float) -> Model:
    """Embedding, blocks ``r <- r + mixer(norm(r))``, final norm, head (the embedding when none is stored)."""
    w = {name.replace("backbone.embedding.", "backbone.embeddings."): x.double() for name, x in weights.items()}
    embedding = w["backbone.embeddings.weight"]
    residual = torch.stack([embedding[i] for i in ids])
    count = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("backbone.layers."))
    residuals, layers = [residual], []
    for k in range(count):
        prefix = f"backbone.layers.{k}."
        own = {name.removeprefix(prefix + "mixer."): x for name, x in w.items() if name.startswith(prefix + "mixer.")}
        layer = mixer(_rms(residual, eps) * w[prefix + "norm.weight"], own)
        residual = residual + layer.output
        layers.append(layer)
        residuals.append(residual)
    final = _rms(residual, eps) * w["backbone.norm_f.weight"]
    return Model(residuals, layers, _linear(final, w.get("lm_head.weight", embedding)))


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> dict[str, Tensor]:
    """The recurrence step by step, its matrix entry by entry; all as `Layer` names them."""
    length, heads, width = x.shape
    n = B.shape[2]
    log_decay = dt[:, :, None] * A
    write = dt[:, :, None] * B
    state, states, out = torch.zeros(heads, width, n, dtype=torch.float64), [], []
    for t in range(length):
        state = torch.exp(log_decay[t])[:, None, :] * state + x[t][:, :, None] * write[t][:, None, :]
        states.append(state)
        out.append((state * C[t][:, None, :]).sum(2))
    M = torch.zeros(heads, length, length, dtype=torch.float64)
    distance = torch.zeros(heads, length, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            total = log_decay[s + 1 : t + 1].sum(0)
            M[:, t, s] = (C[t] * torch.exp(total) * write[s]).sum(1)
        weight = M[:, t].abs()
        distance[:, t] = (weight * torch.tensor([float(t - s) for s in range(length)]).double()).sum(1) / weight.sum(1)
    return {
        "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "log_decay": log_decay, "write": write, "M": M,
        "states": torch.stack(states), "scan": torch.stack(out), "skip": D[:, None] * x, "distance": distance,
    }  # fmt: skip


def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every channel alone, (t, c); the last tap is the current token and there is nothing before the first."""
    taps = weight.shape[2]
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(taps):
            source = t - (taps - 1) + k
            if source >= 0:
                out[t] += weight[:, 0, k] * x[source]
        if bias is not None:
            out[t] += bias
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x @ weight.T
    return out if bias is None else out + bias


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(1, keepdim=True) + eps)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _act(x: Tensor, name: str) -> Tensor:
    return {"silu": _silu, "relu": lambda v: v.clamp(min=0), "tanh": torch.tanh}[name](x)


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
