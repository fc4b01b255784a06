"""One block of the model as a pure map: norm, mixer and the residual stream around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.kernels.inputs import ScanInputs, compute_dtype, expand_groups
from ssmlens.models import steps
from ssmlens.stepping._state import LayerState

__all__ = ["Layer", "Recur", "loop", "rms"]

Recur = Callable[[ScanInputs], tuple[Tensor, Tensor]]


def loop(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y (b, t, h, p) and the final state, token by token: every operation has a forward-mode derivative."""
    assert inputs.initial is not None
    assert inputs.dt is not None
    h, decay = inputs.initial, inputs.full_log_decay().exp()
    value = inputs.value * inputs.dt[..., None]
    write, read = (expand_groups(x, inputs.n_heads) for x in (inputs.write, inputs.read))
    outputs = []
    for t in range(inputs.length):
        h = decay[:, t, :, None] * h + value[:, t, ..., None] * write[:, t, :, None]
        outputs.append((h * read[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), h


def rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last axis, in the compute dtype."""
    x = x.to(compute_dtype(x.dtype))
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@dataclass(frozen=True, eq=False)
class Layer:
    """One block: norm, mixer and the residual stream around them."""

    family: str
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    norm: Tensor
    eps: float
    act: Callable[[Tensor], Tensor]
    rate: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", steps.rate(self.weights))

    @property
    def inner(self) -> int:
        return self.weights["out_proj.weight"].shape[1]

    def initial(self, batch: int) -> LayerState:
        taps, heads = self.weights["conv1d.weight"], len(self.rate)
        n = self.config["d_state"] if self.family == "mamba2" else self.rate.shape[1]
        return LayerState(
            self.rate.new_zeros(batch, heads, self.inner // heads, n),
            taps.new_zeros(batch, taps.shape[0], taps.shape[2] - 1),
        )

    def __call__(self, x: Tensor, state: LayerState, recur: Recur) -> tuple[Tensor, LayerState, ScanInputs]:
        """The residual stream (b, t, d) after this layer, what it carries on, and its recurrence."""
        inputs, z, window = self.before(x, state)
        y, h = recur(inputs)
        return self.after(x, y, inputs.value, z), LayerState(h, window), inputs

    def before(self, x: Tensor, state: LayerState) -> tuple[ScanInputs, Tensor, Tensor]:
        """From the residual stream (b, t, d) to the recurrence, the gate z (b, t, e) and the next window."""
        hidden = rms(x, self.eps).to(self.norm.dtype) * self.norm
        z, before, low = steps.split(self.family, self._linear("in_proj", hidden), self.weights)
        activated, window = self._convolve(before, state.conv)
        return self._route(activated, low, state.h), z, window

    def after(self, x: Tensor, y: Tensor, value: Tensor, z: Tensor) -> Tensor:
        """The residual stream (b, t, d) after this layer, from the recurrence's y and value (b, t, h, p)."""
        y = y + value * self.weights["D"].to(y.dtype)[:, None]
        y = y.flatten(-2) * F.silu(z.to(y.dtype))
        if self.family == "mamba2":
            grouped = y.unflatten(-1, (-1, self.config["norm_group"]))
            y = rms(grouped, self.config["norm_eps"]).flatten(-2).to(z.dtype) * self.weights["norm.weight"]
        return x + self._linear("out_proj", y.to(z.dtype))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _convolve(self, before: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution of (b, t, c) after the window (b, c, k - 1), activated, and the next window."""
        out, tail = steps.causal(before, window.transpose(1, 2), self.weights["conv1d.weight"][:, 0])
        bias = self.weights.get("conv1d.bias")
        return self.act(out if bias is None else out + bias), tail.transpose(1, 2).contiguous()

    def _route(self, activated: Tensor, low: Tensor | None, h: Tensor) -> ScanInputs:
        """What the scan writes, keeps and reads, in the compute dtype."""
        w, wide = self.weights, self.rate.dtype
        if self.family == "mamba1":
            n = self.rate.shape[1]
            parts = list(F.linear(activated, w["x_proj.weight"]).split([w["dt_proj.weight"].shape[1], n, n], dim=-1))
            if "bcdt_rms_eps" in self.config:
                parts = [rms(x, self.config["bcdt_rms_eps"]).to(x.dtype) for x in parts]
            raw = F.linear(parts[0], w["dt_proj.weight"]).to(wide) + w["dt_proj.bias"].to(wide)
            value, write, read, dt = activated[..., None], parts[1][:, :, None], parts[2][:, :, None], F.softplus(raw)
        else:
            assert low is not None
            groups, shared = self.config["n_groups"], self.config["n_groups"] * self.config["d_state"]
            value, write, read = activated.split([self.inner, shared, shared], dim=-1)
            value = value.unflatten(-1, (len(self.rate), -1))
            write, read = (x.unflatten(-1, (groups, -1)) for x in (write, read))
            dt = F.softplus(low.to(wide) + w["dt_bias"].to(wide)).clamp(*self.config["dt_limit"])
        value, write, read = (x.to(wide) for x in (value, write, read))
        return ScanInputs(value=value, write=write, read=read, dt=dt, A=self.rate, initial=h)
