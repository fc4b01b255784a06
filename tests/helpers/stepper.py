"""Mamba-1, Falcon-Mamba and Mamba-2 language models token by token in float64, with a hand in everything.

One sequence, one token at a time, all memory in plain lists: the state h and the window of the last inputs of the
convolution. Nothing of ssmlens. ``hook(name, layer, t, value)`` sees and may exchange, in this order:

residual   (d,) entering the layer; layer = number of layers is the one after the last
window     (K-1, c) the convolution's earlier inputs, as this token finds them
past       (c,) what the earlier taps add up to
state      (h, p, n) after this token, before it is read
parts      (h, p, n) what each state dimension gives to y
ssm, skip  (h, p) what is read, and D x
y          (h, p) their sum
gate       (e,) SiLU(z)
key        (e,) the input of out_proj
mixer      (d,) the mixer's output
carried    (h, p, n) the state as the next token gets it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from checkpoints import GROUPED_NORM
from torch import Tensor

__all__ = ["Record", "step_through"]

Hook = Callable[[str, int, int, Tensor], Tensor]


class Record(dict):
    """A hook that keeps everything, by (name, layer, t), and changes nothing."""

    def __call__(self, name: str, layer: int, t: int, value: Tensor) -> Tensor:
        self[name, layer, t] = value
        return value


def step_through(model: Any, ids: Sequence[int], hook: Hook | None = None) -> Tensor:
    """Logits (t, v) of a transformers model's weights."""
    hook = (lambda name, layer, t, value: value) if hook is None else hook
    c = model.config
    w = {name: x.detach().double() for name, x in model.state_dict().items()}
    embedding, count = w["backbone.embeddings.weight"], c.num_hidden_layers
    mixers = []
    for k in range(count):
        prefix = f"backbone.layers.{k}.mixer."
        own = {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
        mixers.append((_Mamba2 if c.model_type == "mamba2" else _Mamba1)(c, own, k, hook))
    logits = []
    for t, i in enumerate(ids):
        residual = embedding[i]
        for k, mixer in enumerate(mixers):
            residual = hook("residual", k, t, residual)
            normed = _rms(residual, c.layer_norm_epsilon) * w[f"backbone.layers.{k}.norm.weight"]
            residual = residual + mixer.step(t, normed)
        residual = hook("residual", count, t, residual)
        final = _rms(residual, c.layer_norm_epsilon) * w["backbone.norm_f.weight"]
        logits.append(w.get("lm_head.weight", embedding) @ final)
    return torch.stack(logits)


class _Mixer:
    def __init__(self, config: Any, w: dict[str, Tensor], layer: int, hook: Hook) -> None:
        self.c, self.w, self.layer, self.hook = config, w, layer, hook
        taps = w["conv1d.weight"]  # (c, 1, K)
        self.window = taps.new_zeros(taps.shape[2] - 1, taps.shape[0])
        self.state: Tensor | None = None

    def seen(self, name: str, t: int, value: Tensor) -> Tensor:
        return self.hook(name, self.layer, t, value)

    def convolve(self, t: int, x: Tensor) -> Tensor:
        taps = self.w["conv1d.weight"][:, 0]  # (c, K)
        window = self.seen("window", t, self.window)
        past = sum((taps[:, i] * window[i] for i in range(len(window))), torch.zeros_like(x))
        out = self.seen("past", t, past) + taps[:, -1] * x
        if "conv1d.bias" in self.w:
            out = out + self.w["conv1d.bias"]
        self.window = torch.cat([window, x[None]])[1:]
        return _silu(out)

    def recur(self, t: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """x (h, p), dt (h,), A (h, n or 1), B and C (h, n) to y (h, p) with the skip."""
        if self.state is None:
            self.state = x.new_zeros(*x.shape, B.shape[1])
        h = torch.exp(dt[:, None] * A)[:, None] * self.state + (dt[:, None] * x)[..., None] * B[:, None]
        h = self.seen("state", t, h)
        y = self.seen("ssm", t, self.seen("parts", t, h * C[:, None]).sum(-1))
        y = self.seen("y", t, y + self.seen("skip", t, self.w["D"][:, None] * x))
        self.state = self.seen("carried", t, h)
        return y

    def project(self, t: int, key: Tensor) -> Tensor:
        out = self.w["out_proj.weight"] @ self.seen("key", t, key)
        return self.seen("mixer", t, out + self.w.get("out_proj.bias", 0))


class _Mamba1(_Mixer):
    def step(self, t: int, hidden: Tensor) -> Tensor:
        w = self.w
        e, n = w["A_log"].shape
        rank = w["dt_proj.weight"].shape[1]
        x, z = (w["in_proj.weight"] @ hidden + w.get("in_proj.bias", 0)).split([e, e])
        u = self.convolve(t, x)
        low, B, C = (w["x_proj.weight"] @ u).split([rank, n, n])
        if self.c.model_type == "falcon_mamba":
            low, B, C = (_rms(v, self.c.mixer_rms_eps) for v in (low, B, C))
        dt = torch.nn.functional.softplus(w["dt_proj.weight"] @ low + w["dt_proj.bias"])
        y = self.recur(t, u[:, None], dt, -torch.exp(w["A_log"]), B.expand(e, n), C.expand(e, n))
        return self.project(t, y[:, 0] * self.seen("gate", t, _silu(z)))


class _Mamba2(_Mixer):
    def step(self, t: int, hidden: Tensor) -> Tensor:
        w, c = self.w, self.c
        heads, groups, n, e = c.num_heads, c.n_groups, c.state_size, w["out_proj.weight"].shape[1]
        z, xBC, dt = (w["in_proj.weight"] @ hidden + w.get("in_proj.bias", 0)).split([e, e + 2 * groups * n, heads])
        x, B, C = self.convolve(t, xBC).split([e, groups * n, groups * n])
        dt = torch.nn.functional.softplus(dt + w["dt_bias"]).clamp(*(float(x) for x in c.time_step_limit))
        B, C = (v.reshape(groups, n).repeat_interleave(heads // groups, 0) for v in (B, C))
        y = self.recur(t, x.reshape(heads, -1), dt, -torch.exp(w["A_log"])[:, None], B, C)
        gated = y.reshape(-1) * self.seen("gate", t, _silu(z))
        width = e // (groups if GROUPED_NORM else 1)
        normed = torch.cat([_rms(part, c.layer_norm_epsilon) for part in gated.split(width)])
        return self.project(t, normed * w["norm.weight"])


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
