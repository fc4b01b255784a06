"""Knockout by its definition: mixers of whole sequences as matrices, entries and taps set to zero by hand.

Float64, one sequence, loops of `reference`; nothing of ssmlens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import reference
import torch
from checkpoints import GROUPED_NORM
from torch import Tensor

__all__ = ["knocked_logits"]


def knocked_logits(
    model: Any,
    ids: list[int],
    blocked: Mapping[int, Collection[int]],
    layers: Collection[int],
    paths: Collection[str],
    decay: str,
) -> Tensor:
    """Logits (t, v) when, in these layers, target i reads a pass without its sources ``blocked[i]``."""
    c = model.config
    count = 0

    def mixer(hidden: Tensor, w: Mapping[str, Tensor]) -> SimpleNamespace:
        nonlocal count
        half = _mamba2 if c.model_type == "mamba2" else _mamba1
        clean = half(c, hidden, w, (), (), ())
        output = clean.clone()
        for i, sources in blocked.items():
            if count in layers:
                cut, drop = (sources if path in paths else () for path in ("conv", "ssm"))
                output[i] = half(c, hidden, w, cut, drop, sources if decay == "skip" else ())[i]
        count += 1
        return SimpleNamespace(output=output)

    return reference._model(model.state_dict(), ids, mixer, c.layer_norm_epsilon).logits


def _conv(x: Tensor, w: Mapping[str, Tensor], cut: Collection[int]) -> Tensor:
    """The convolution without the taps from ``cut`` into later tokens, and its SiLU."""
    taps = w["conv1d.weight"][:, 0]
    out = torch.zeros_like(x) + w.get("conv1d.bias", 0)
    for t in range(len(x)):
        for back in range(min(t, taps.shape[1] - 1) + 1):
            if back == 0 or t - back not in cut:
                out[t] += taps[:, -1 - back] * x[t - back]
    return reference._silu(out)


def _attend(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, drop: Collection[int], still: Collection[int]
) -> Tensor:
    """(t, h, p): alpha with the columns ``drop`` at zero, applied, and the skip; ``still`` tokens decay nothing."""
    alpha = torch.zeros(x.shape[1], len(x), len(x), dtype=torch.float64)
    for i in range(len(x)):
        for j in (j for j in range(i + 1) if j not in drop):
            steps = [k for k in range(j + 1, i + 1) if k not in still]
            kept = torch.exp(A * dt[steps].sum(0)[:, None])
            alpha[:, i, j] = dt[j] * (C[i] * kept * B[j]).sum(1)
    return torch.einsum("hts,shp->thp", alpha, x) + D[:, None] * x


def _mamba1(c: Any, hidden: Tensor, w: Mapping[str, Tensor], cut: Any, drop: Any, still: Any) -> Tensor:
    e, n = w["A_log"].shape
    rank = w["dt_proj.weight"].shape[1]
    x, z = reference._linear(hidden, w["in_proj.weight"], w.get("in_proj.bias")).split([e, e], dim=1)
    u = _conv(x, w, cut)
    low, B, C = reference._linear(u, w["x_proj.weight"]).split([rank, n, n], dim=1)
    if c.model_type == "falcon_mamba":
        low, B, C = (reference._rms(v, c.mixer_rms_eps) for v in (low, B, C))
    dt = reference._softplus(reference._linear(low, w["dt_proj.weight"], w["dt_proj.bias"]))
    B, C = (v[:, None].repeat(1, e, 1) for v in (B, C))
    y = _attend(u[..., None], dt, -torch.exp(w["A_log"]), B, C, w["D"], drop, still)[..., 0]
    return reference._linear(y * reference._silu(z), w["out_proj.weight"], w.get("out_proj.bias"))


def _mamba2(c: Any, hidden: Tensor, w: Mapping[str, Tensor], cut: Any, drop: Any, still: Any) -> Tensor:
    e, heads, groups, n = w["out_proj.weight"].shape[1], c.num_heads, c.n_groups, c.state_size
    projected = reference._linear(hidden, w["in_proj.weight"], w.get("in_proj.bias"))
    z, xBC, dt = projected.split([e, e + 2 * groups * n, heads], dim=1)
    x, B, C = _conv(xBC, w, cut).split([e, groups * n, groups * n], dim=1)
    dt = reference._softplus(dt + w["dt_bias"]).clamp(*(float(v) for v in c.time_step_limit))
    B, C = (v.reshape(len(v), groups, n).repeat_interleave(heads // groups, 1) for v in (B, C))
    y = _attend(x.reshape(len(x), heads, -1), dt, -torch.exp(w["A_log"])[:, None], B, C, w["D"], drop, still)
    gated = y.reshape(len(y), e) * reference._silu(z)
    width = e // (groups if GROUPED_NORM else 1)
    normed = torch.cat([reference._rms(part, c.layer_norm_epsilon) for part in gated.split(width, dim=1)], dim=1)
    return reference._linear(normed * w["norm.weight"], w["out_proj.weight"], w.get("out_proj.bias"))
