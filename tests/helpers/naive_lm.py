"""Whole Mamba-1, Falcon-Mamba and Mamba-2 models as loops over time that autograd can follow, from embeddings (t, d).

For attribution: every factor that a method holds constant goes through ``hold(name, x)``, which may detach it. One
sequence at a time, nothing of ssmlens. Names of factors: "norm", "gated_norm", "conv_act", "routing", "gate",
"gate_sigmoid".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EXACT", "FROZEN", "LRP", "NORM", "Additive", "last_logits", "terms"]

EXACT: set[str] = set()
NORM = {"norm", "gated_norm"}
FROZEN = {"norm", "gated_norm", "conv_act", "routing", "gate"}
LRP = {"norm", "gated_norm", "conv_act", "routing", "half"}

Additive = dict[str, Tensor]
"""Additive parameters by full name."""


def terms(
    model: Any, ids: list[int], held: set[str], target: int | None = None, position: int = -1
) -> tuple[Tensor, float, float, int]:
    """Embedding times gradient per token (t,), parameter times gradient over the additive parameters, logit, target."""
    weights = {k: v.detach().double() for k, v in model.state_dict().items()}
    x = weights["backbone.embeddings.weight"][ids].clone().requires_grad_()
    added = {k: v.clone().requires_grad_() for k, v in weights.items() if _additive(k)}
    logits = last_logits(model, x, held, position, added)
    chosen = int(logits.argmax()) if target is None else target
    grads = torch.autograd.grad(logits[chosen], [x, *added.values()], allow_unused=True)
    bias = sum(float((v.detach() * g).sum()) for v, g in zip(added.values(), grads[1:]) if g is not None)
    return (x.detach() * grads[0]).sum(1), bias, float(logits[chosen].detach()), chosen


def _additive(name: str) -> bool:
    return name.endswith(("conv1d.bias", "in_proj.bias", "out_proj.bias"))


def last_logits(
    model: Any, x: Tensor, held: set[str] = EXACT, position: int = -1, added: Additive | None = None
) -> Tensor:
    """Logits (v,) at one position for embeddings (t, d)."""
    c = model.config
    w = {k: v.detach().double() for k, v in model.state_dict().items()} | (added or {})

    def hold(name: str, factor: Tensor) -> Tensor:
        return factor.detach() if name in held else factor

    mixer = _mamba2 if c.model_type == "mamba2" else _mamba1
    for k in range(c.num_hidden_layers):
        prefix = f"backbone.layers.{k}."
        own = {n.removeprefix(prefix + "mixer."): v for n, v in w.items() if n.startswith(prefix + "mixer.")}
        normed = _norm(x, c.layer_norm_epsilon, "norm", hold) * w[prefix + "norm.weight"]
        x = x + mixer(normed, own, c, hold, held)
    final = _norm(x[position], c.layer_norm_epsilon, "norm", hold) * w["backbone.norm_f.weight"]
    return w["lm_head.weight"] @ final


def _norm(x: Tensor, eps: float, name: str, hold: Callable[[str, Tensor], Tensor]) -> Tensor:
    return x * hold(name, 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


def _conv(x: Tensor, w: dict[str, Tensor], config: Any, hold: Callable[[str, Tensor], Tensor]) -> Tensor:
    taps, rows = w["conv1d.weight"].shape[2], []
    for t in range(len(x)):
        row = torch.zeros_like(x[0])
        for k in range(taps):
            if t - k >= 0:
                row = row + w["conv1d.weight"][:, 0, taps - 1 - k] * x[t - k]
        rows.append(row + w["conv1d.bias"] if "conv1d.bias" in w else row)
    c = torch.stack(rows)
    if config.hidden_act == "relu":
        return c * hold("conv_act", (c > 0).double())
    assert config.hidden_act == "silu"
    return c * hold("conv_act", 1 / (1 + torch.exp(-c)))


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, hold: Any) -> Tensor:
    """x (t, h, p), dt (t, h), A (h, n or 1), B and C (t, h, n), D (h,) to y (t, h, p)."""
    dt, B, C = (hold("routing", part) for part in (dt, B, C))
    state, out = torch.zeros(*x.shape[1:], B.shape[2], dtype=torch.float64), []
    for t in range(len(x)):
        decay = torch.exp(dt[t][:, None] * A)
        state = decay[:, None, :] * state + x[t][:, :, None] * (dt[t][:, None] * B[t])[:, None, :]
        out.append((state * C[t][:, None, :]).sum(2) + D[:, None] * x[t])
    return torch.stack(out)


def _gate(y: Tensor, z: Tensor, hold: Any, held: set[str]) -> Tensor:
    sigmoid = 1 / (1 + torch.exp(-z))
    if "half" in held:
        product = y * (z * sigmoid.detach())
        return 0.5 * product + 0.5 * product.detach()
    return y * hold("gate", z * sigmoid)


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def _mamba1(x: Tensor, w: dict[str, Tensor], config: Any, hold: Any, held: set[str]) -> Tensor:
    inner, n = w["A_log"].shape
    rank = w["dt_proj.weight"].shape[1]
    both = _linear(x, w, "in_proj")
    u, z = _conv(both[:, :inner], w, config, hold), both[:, inner:]
    low, B, C = (u @ w["x_proj.weight"].T).split([rank, n, n], dim=1)
    if config.model_type == "falcon_mamba":
        eps = config.mixer_rms_eps
        low, B, C = (part / torch.sqrt((part * part).mean(1, keepdim=True) + eps) for part in (low, B, C))
    dt = F.softplus(_linear(low, w, "dt_proj"))
    B, C = (part[:, None, :].expand(-1, inner, -1) for part in (B, C))
    y = _scan(u[:, :, None], dt, -torch.exp(w["A_log"]), B, C, w["D"], hold)[:, :, 0]
    return _linear(_gate(y, z, hold, held), w, "out_proj")


def _mamba2(x: Tensor, w: dict[str, Tensor], config: Any, hold: Any, held: set[str]) -> Tensor:
    heads, inner, groups, n = len(w["A_log"]), w["out_proj.weight"].shape[1], config.n_groups, config.state_size
    z, before, raw = _linear(x, w, "in_proj").split([inner, inner + 2 * groups * n, heads], dim=1)
    u, B, C = _conv(before, w, config, hold).split([inner, groups * n, groups * n], dim=1)
    dt = F.softplus(raw + w["dt_bias"]).clamp(*(float(v) for v in config.time_step_limit))
    of = [i * groups // heads for i in range(heads)]
    B, C = (part.reshape(len(x), groups, n)[:, of] for part in (B, C))
    u = u.reshape(len(x), heads, inner // heads)
    y = _scan(u, dt, -torch.exp(w["A_log"])[:, None], B, C, w["D"], hold).reshape(len(x), inner)
    gated = _gate(y, z, hold, held).reshape(len(x), groups, inner // groups)
    normed = _norm(gated, config.layer_norm_epsilon, "gated_norm", hold).reshape(len(x), inner)
    return _linear(normed * w["norm.weight"], w, "out_proj")
