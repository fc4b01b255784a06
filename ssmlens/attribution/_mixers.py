"""The mixers of Mamba-1 and Mamba-2, computed from their weights with a choice of what counts as a constant.

Values never depend on the choice: `Rules` only says which factors are cut off from the gradient. Everything is
differentiable, runs in pieces of time (`Carry`), and can be replayed as a linear map with all its factors given
(`Factors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.errors import UnsupportedModelError
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.models import steps

__all__ = ["Carry", "Factors", "Mixer", "Rules", "normalise", "slope"]


@dataclass(frozen=True)
class Rules:
    """Which factors the gradient treats as constants.

    Args:
        norm: 1/rms of every norm, the gated one of Mamba-2 too: "exact" or "freeze".
        activation: a convolution's activation, "exact" or "freeze": then act(c) is c times the constant act(c)/c,
            which for SiLU is sigmoid(c).
        routing: the scan's decay, write and read directions and step size, "exact" or "freeze".
        gate: y * SiLU(z) as it is ("exact"), with SiLU(z) constant ("freeze"), or "half": z * sigmoid(z) with the
            sigmoid constant, and half of the gradient for each of the two factors.
    """

    norm: str = "exact"
    activation: str = "exact"
    routing: str = "exact"
    gate: str = "exact"


@dataclass(frozen=True)
class Carry:
    """What a mixer hands from one piece of time to the next.

    Args:
        tail: (b, k - 1, c) last inputs of the convolution.
        state: (b, h, p, n) of the scan.
    """

    tail: Tensor
    state: Tensor


@dataclass(frozen=True)
class Factors:
    """Everything that the frozen mixer multiplies with, so that it is linear in its input.

    Args:
        slope: (b, t, e) act(c) / c of the convolution's value channels.
        routing: dt (b, t, h), write and read (b, t, g, n), A (h, 1 or n).
        gate: (b, t, e) SiLU(z), times the norm's 1/rms and weight where there is one.
    """

    slope: Tensor
    routing: Mapping[str, Tensor]
    gate: Tensor


def normalise(x: Tensor, weight: Tensor | None, eps: float, freeze: bool) -> Tensor:
    """RMSNorm over the last axis, (..., d)."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    out = x * (scale.detach() if freeze else scale)
    return out if weight is None else weight * out


@dataclass(frozen=True, eq=False)
class Mixer:
    """One mixer in the compute dtype.

    Args:
        family: "mamba1" or "mamba2".
        weights: by name, as the family describes them.
        config: sizes and constants that go with them.
        biases: additive parameters (b, c) that stand in for those of ``weights``, as gradients are wanted per row.
    """

    family: str
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def inner(self) -> int:
        return self.weights["out_proj.weight"].shape[1]

    @property
    def bias_names(self) -> tuple[str, ...]:
        """The additive parameters that reach the output other than through the routing."""
        return tuple(n for n in ("in_proj.bias", "conv1d.bias", "out_proj.bias") if n in self.weights)

    def with_biases(self, biases: Mapping[str, Tensor]) -> Mixer:
        return replace(self, biases=biases)

    def start(self, batch: int) -> Carry:
        """What stands before the first token: nothing."""
        some, taps = self.weights["out_proj.weight"], self.weights["conv1d.weight"]
        rate = steps.rate(self.weights)
        heads, states = len(rate), self.config["d_state"] if self.family == "mamba2" else rate.shape[1]
        return Carry(
            some.new_zeros(batch, taps.shape[2] - 1, taps.shape[0]),
            some.new_zeros(batch, heads, self.inner // heads, states),
        )

    def __call__(self, hidden: Tensor, rules: Rules, carry: Carry) -> tuple[Tensor, Carry]:
        """Output (b, t, d) for the normed residual stream (b, t, d), and what goes on to the next piece of time."""
        z, before, low = steps.split(self.family, self._linear("in_proj", hidden), self.weights)
        c, tail = self._convolve(before, carry.tail)
        activated = c * self._slope(c).detach() if rules.activation == "freeze" else self._act(c)
        u, routing = self._route(activated, low)
        if rules.routing == "freeze":
            routing = {name: x.detach() for name, x in routing.items()}
        y, state = self._scan(u, routing, carry.state)
        out = self._out_norm(_gate(y, z, rules.gate), rules.norm == "freeze")
        return self._linear("out_proj", out), Carry(tail, state)

    def factors(self, hidden: Tensor) -> Factors:
        """What the frozen mixer multiplies with on a whole sequence (b, t, d)."""
        start = self.start(len(hidden))
        z, before, low = steps.split(self.family, self._linear("in_proj", hidden), self.weights)
        c, _ = self._convolve(before, start.tail)
        u, routing = self._route(self._act(c), low)
        gate = F.silu(z)
        y, _ = self._scan(u, routing, start.state)
        if self.family == "mamba2":
            gate = gate * self._scale(y * gate) * self.weights["norm.weight"]
        return Factors(self._slope(c[..., : self.inner]), routing, gate)

    def replay(self, hidden: Tensor, factors: Factors, biases: bool) -> Tensor:
        """The frozen mixer's output (s, t, d) for inputs (s, t, d), with the factors of one sequence (1, t, ...).

        Args:
            hidden: parts of the normed residual stream, one per s.
            factors: of the sequence that the parts sum to.
            biases: whether additive parameters count.
        """
        first = 0 if self.family == "mamba1" else self.inner
        rows = slice(first, first + self.inner)
        before = F.linear(hidden, self.weights["in_proj.weight"][rows])
        if biases and "in_proj.bias" in self.weights:
            before = before + self.weights["in_proj.bias"][rows]
        kernel = self.weights["conv1d.weight"][: self.inner, 0]
        c, _ = steps.causal(before, before.new_zeros(len(before), kernel.shape[1] - 1, self.inner), kernel)
        if biases and "conv1d.bias" in self.weights:
            c = c + self.weights["conv1d.bias"][: self.inner]
        parts = {n: x if n == "A" else x.expand(len(hidden), *x.shape[1:]) for n, x in factors.routing.items()}
        y, _ = self._scan(c * factors.slope, parts, None)
        out = F.linear(y * factors.gate, self.weights["out_proj.weight"])
        return out + self.weights["out_proj.bias"] if biases and "out_proj.bias" in self.weights else out

    # The steps

    def _linear(self, name: str, x: Tensor) -> Tensor:
        out = F.linear(x, self.weights[f"{name}.weight"])
        bias = self._bias(f"{name}.bias")
        return out if bias is None else out + bias

    def _bias(self, name: str) -> Tensor | None:
        own = self.biases.get(name)
        return self.weights.get(name) if own is None else own[:, None]

    def _convolve(self, before: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        c, last = steps.causal(before, tail, self.weights["conv1d.weight"][:, 0])
        bias = self._bias("conv1d.bias")
        # A clone: a view would keep the whole piece of time alive.
        return (c if bias is None else c + bias), last.clone()

    def _act(self, c: Tensor) -> Tensor:
        return _activation(self.config["activation"])(c)

    def _slope(self, c: Tensor) -> Tensor:
        return slope(c, self.config["activation"])

    def _route(self, activated: Tensor, low: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The scan's value (b, t, e), and how it is written, kept and read."""
        w, config, A = self.weights, self.config, steps.rate(self.weights)
        if self.family == "mamba1":
            rank, n = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
            parts = F.linear(activated, w["x_proj.weight"]).split([rank, n, n], dim=-1)
            if "bcdt_rms_eps" in config:
                parts = tuple(normalise(x, None, config["bcdt_rms_eps"], False) for x in parts)
            dt = F.softplus(F.linear(parts[0], w["dt_proj.weight"], w.get("dt_proj.bias")))
            return activated, {
                "dt": dt,
                "write": parts[1][:, :, None],
                "read": parts[2][:, :, None],
                "A": steps.rate(self.weights),
            }
        assert low is not None
        shared = config["n_groups"] * config["d_state"]
        u, write, read = activated.split([self.inner, shared, shared], dim=-1)
        dt = F.softplus(low + w["dt_bias"]).clamp(*config["dt_limit"])
        write, read = (x.unflatten(-1, (config["n_groups"], -1)) for x in (write, read))
        return u, {"dt": dt, "write": write, "read": read, "A": A}

    def _scan(self, u: Tensor, routing: Mapping[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scan and skip of the value (b, t, e), and the state after it."""
        value = u.unflatten(-1, (len(routing["A"]), -1))
        y, final = scan.run(ScanInputs(value=value, initial=state, **routing))
        return (y + value * self.weights["D"][:, None]).flatten(-2), final

    def _scale(self, gated: Tensor) -> Tensor:
        """1/rms of Mamba-2's gated norm, (b, t, e)."""
        grouped = gated.unflatten(-1, (-1, self.config["norm_group"]))
        scale = torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + self.config["norm_eps"])
        return scale.expand_as(grouped).flatten(-2)

    def _out_norm(self, gated: Tensor, freeze: bool) -> Tensor:
        if self.family == "mamba1":
            return gated
        scale = self._scale(gated)
        return gated * (scale.detach() if freeze else scale) * self.weights["norm.weight"]


def _gate(y: Tensor, z: Tensor, how: str) -> Tensor:
    """y * SiLU(z), (b, t, e), with the gradient that the rule says."""
    if how == "exact":
        return y * F.silu(z)
    if how == "freeze":
        return y * F.silu(z).detach()
    gate = z * torch.sigmoid(z).detach()
    # Both terms have half the value, and each the gradient of one factor only.
    return 0.5 * (y * gate.detach() + y.detach() * gate)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    act: Callable[[Tensor], Tensor] = ACT2FN[name]
    return act


def slope(c: Tensor, activation: str) -> Tensor:
    """act(c) / c, and its limit, the derivative, where c is exactly 0.

    Raises:
        UnsupportedModelError: for an activation that is not 0 at 0, which has no such factor.
    """
    if activation in ("silu", "swish"):
        return torch.sigmoid(c)
    act = _activation(activation)
    with torch.enable_grad():
        zero = c.new_zeros((), requires_grad=True)
        value = act(zero)
        if value.item() != 0:
            raise UnsupportedModelError(
                f"the activation {activation!r} of the convolution is not 0 at 0, so it is no factor times its input: "
                "this method needs silu, relu, tanh, gelu or another that is"
            )
        (limit,) = torch.autograd.grad(value, zero)
    safe = torch.where(c == 0, 1.0, c)
    return torch.where(c == 0, limit, act(c) / safe)
