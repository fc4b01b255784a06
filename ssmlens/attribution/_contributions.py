"""Contributions inside one mixer: the vector that each source token adds to each output.

Behind its convolution a mixer is linear in the scan's value once the matrix M, the gate and Mamba-2's 1/rms are held
fixed. Only the activation behind the convolution is not additive over the source tokens of its k taps, and the rule
says how it is shared out. With ``x`` the convolution's input, ``w_k`` the tap for a token k steps ago, ``b`` its bias
and ``c[r] = sum_k w_k x[r - k] + b``, token s gives to the scan's value at r = s + k:

==========  ===============================  =======================================================  ==========
rule        contribution of token s          to the bias share                                        sum
==========  ===============================  =======================================================  ==========
"gate"      ``sigmoid(c[r]) w_k x[s]``       ``sigmoid(c[r]) b``                                      exact
"tangent"   ``SiLU'(c[r]) w_k x[s]``         ``SiLU(c[r]) - SiLU'(c[r]) (c[r] - b)``                  exact
"silu"      ``SiLU(w_k x[s])``               ``SiLU(b)``                                              approximate
"none"      ``SiLU(c[s])``, all at r = s     nothing: a token owns what its convolution gathered      exact
==========  ===============================  =======================================================  ==========

"silu" is LaTIM's surrogate (Pitorro and Treviso, ACL 2025); its residual is `Contributions.error`. Of the others the
residual is rounding. For another activation, act(c) / c stands for the sigmoid.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ssmlens.attention import DENSE_LIMIT
from ssmlens.attribution._mixers import slope
from ssmlens.errors import MemoryLimitError, SsmlensError, UnsupportedModelError
from ssmlens.kernels import contributions as kernel
from ssmlens.kernels.contributions import Terms
from ssmlens.trace import MixerTrace

__all__ = ["PLACES", "RULES", "Contributions", "contributions", "gate_of"]

RULES = ("gate", "silu", "tangent", "none")
"""How `contributions` shares out the activation behind the convolution."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """``output[t] = sum_s T[t, s] + bias[t]``, up to `error`; T is never stored.

    Everything is in the compute dtype: float64 for a float64 model, else float32. Padding contributes nothing and
    receives nothing.

    Args:
        layer: index of the layer.
        rule: one of `RULES`.
        terms: the frozen mixer as plain tensors.
        output: (b, t, d) the model's own output of the mixer.
        real: (b, t) bool, False on padding.
        bias_value: (b, t, e) what no token gives to the scan's value; None for nothing.
        out_bias: (d,) of the output projection; None for none.
    """

    layer: int
    rule: str
    terms: Terms = field(repr=False)
    output: Tensor = field(repr=False)
    real: Tensor = field(repr=False)
    bias_value: Tensor | None = field(default=None, repr=False)
    out_bias: Tensor | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, t, s, d) of all vectors."""
        b, t, d = self.output.shape
        return (b, t, t, d)

    @cached_property
    def bias(self) -> Float[Tensor, "b t d"]:
        """What belongs to no token, (b, t, d): the convolution's bias, the rule's intercept, a first state, and the
        bias of the output projection."""
        x = self.terms.inputs
        with torch.no_grad():
            if self.bias_value is None and x.initial is None:
                out = torch.zeros_like(self.output)
            else:
                value = torch.zeros_like(x.value) if self.bias_value is None else self.bias_value
                out = kernel.behind(self.terms, value.view(x.value.shape), x.initial)
            if self.out_bias is not None:
                out = out + self.out_bias * self.real[..., None]
        return out

    @cached_property
    def error(self) -> float:
        """Relative residual ``|output - sum_s T - bias| / |output|`` over all real tokens, at linear cost.

        Norms are Euclidean. Rounding for the exact rules; for "silu" what its surrogate leaves out.
        """
        with torch.no_grad():
            missing = (self.output - kernel.total(self.terms) - self.bias)[self.real].norm().item()
            whole = self.output[self.real].norm().item()
        return missing if missing == 0 else missing / whole if whole else float("inf")

    def vectors(self, rows: Sequence[int] | None = None, limit: float | int = DENSE_LIMIT) -> Float[Tensor, "b k s d"]:
        """The contributions themselves, (b, len(rows) or t, s, d); exactly 0 for s > t.

        Args:
            rows: output positions, negative ones count from the end; all by default.
            limit: bytes that the result may take.

        Raises:
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
            IndexError: when a row does not exist.
        """
        b, t, s, d = self.shape
        picked = range(t) if rows is None else [self._position(row) for row in rows]
        self._check_size("vectors()", (b, len(picked), s, d), limit, "pass rows=[...] or use norm()")
        return kernel.vectors(self.terms, picked)

    def norm(self, p: float = 2, limit: float | int = DENSE_LIMIT) -> Float[Tensor, "b t s"]:
        """Norm of every contribution over the residual width, (b, t, s); exactly 0 for s > t.

        Args:
            p: order of the norm, at least 1: 2 is Euclidean, 1 the sum of absolute entries.
            limit: bytes that the result may take.

        Raises:
            SsmlensError: when p < 1.
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
        """
        if not p >= 1:
            raise SsmlensError(f"the order p of a norm is at least 1, got {p}")
        self._check_size("norm()", self.shape[:3], limit, "use vectors(rows=[...])")
        return kernel.norms(self.terms, p)

    def alti(self, limit: float | int = DENSE_LIMIT) -> Float[Tensor, "b t s"]:
        """Share of each source in how near the contributions come to the output, (b, t, s); rows sum to 1.

        ``max(0, |o[t]|_1 - |o[t] - T[t, s]|_1)``, divided by its sum over s (ALTI: Ferrando, Gallego and Costa-jussa,
        2022; on the mixer's output, without the residual stream). A row that no source brings nearer, and a padded
        row, is all zero.

        Args:
            limit: bytes that the result may take.

        Raises:
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
        """
        self._check_size("alti()", self.shape[:3], limit, "use vectors(rows=[...])")
        return kernel.alti(self.terms, self.output)

    def _position(self, row: int) -> int:
        length = self.shape[1]
        if not -length <= row < length:
            raise IndexError(f"row {row} is outside the {length} tokens of these contributions")
        return operator.index(row) % length

    def _check_size(self, call: str, shape: tuple[int, ...], limit: float | int, advice: str) -> None:
        size = self.output.element_size()
        for count in shape:
            size *= count
        if size > limit:
            raise MemoryLimitError(
                f"{call} of {' x '.join(map(str, shape))} {str(self.output.dtype).removeprefix('torch.')} needs "
                f"{size / 1e9:.1f} GB (limit {limit / 1e9:.1f} GB): {advice}"
            )

    def __repr__(self) -> str:
        b, t, d = self.output.shape
        return f"Contributions(layer={self.layer}, rule={self.rule!r}, batch={b}, {t} x {t} tokens, width {d})"


def contributions(mixer: MixerTrace, rule: str = "gate") -> Contributions:
    """What each source token adds to each output of a mixer, as vectors in the residual stream.

    ``T[t, s] = W_out (gate[t] * sum_k (M + D I)[t, s + k] f(s + k, k) x[s])`` with x the input of the mixer's
    convolution, the bias of the input projection included. Mamba-2's gated norm is held at its 1/rms.

    Args:
        mixer: one layer of a trace, with its weights.
        rule: how the activation behind the convolution is shared out: "gate", "tangent" and "none" are exact,
            "silu" is the surrogate of LaTIM; see the table above.

    Returns:
        `.vectors(rows=None)` (b, t, s, d), `.bias` (b, t, d), `.error`, `.norm(p=2)` and `.alti()` (b, t, s).

    Raises:
        SsmlensError: unknown rule, or a trace without weights.
        UnsupportedModelError: a family without a known convolution and gate, or an activation that the rule cannot
            share out.
    """
    if rule not in RULES:
        raise SsmlensError(f"unknown rule {rule!r}: choose one of {', '.join(RULES)}")
    if mixer.family not in PLACES:
        raise UnsupportedModelError(f"contributions need a mixer of {' or '.join(PLACES)}, not {mixer.family!r}")
    if not mixer.parameters:
        raise SsmlensError(
            f"layer {mixer.layer} of this trace has no weights: save it with trace.save(path, weights=True)"
        )
    rec = mixer.recurrence
    with torch.no_grad():
        gate, weights = gate_of(mixer), {k: x.detach().to(rec.dtype) for k, x in mixer.parameters.items()}
        sources, bias_value = _sources(mixer, rule)
        real = rec.real
        terms = Terms(
            inputs=rec.inputs.map(torch.detach).cast(),
            sources=sources,
            # A padded position reads nothing, around the state neither.
            gate=gate.masked_fill(~real[..., None], 0) if rec.lengths is not None else gate,
            weight=weights["out_proj.weight"],
            skip=None if rec.D is None else rec.D.detach().to(rec.dtype),
        )
        return Contributions(
            layer=mixer.layer,
            rule=rule,
            terms=terms,
            output=mixer.output.detach().to(rec.dtype),
            bias_value=bias_value,
            out_bias=weights.get("out_proj.bias"),
            real=real,
        )


PLACES = {"mamba1": 0, "mamba2": 1}
"""Where the rows of in_proj that feed the convolution's value channels start, in units of d_inner."""


def gate_of(mixer: MixerTrace) -> Tensor:
    """What the scan's output is multiplied with before the output projection, (b, t, e)."""
    gate = F.silu(mixer.gate.detach().to(mixer.recurrence.dtype))
    if mixer.family == "mamba1":
        return gate
    gated = mixer.recurrence.run().detach().flatten(2) * gate
    grouped = gated.unflatten(-1, (-1, mixer.config["norm_group"]))
    scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + mixer.config["norm_eps"])
    gate = (gate.view_as(grouped) * scale).flatten(-2)
    return gate * mixer.parameters["norm.weight"].detach().to(gate.dtype)


def _sources(mixer: MixerTrace, rule: str) -> tuple[Tensor, Tensor | None]:
    """What each token gives to the scan's value k steps later, (b, k, t, e), and what no token gives, (b, t, e)."""
    rec, dtype = mixer.recurrence, mixer.recurrence.dtype
    if rule == "none":
        return rec.value.detach().to(dtype).flatten(2)[:, None], None
    inner = rec.n_heads * rec.head_dim
    rows = slice(PLACES[mixer.family] * inner, (PLACES[mixer.family] + 1) * inner)

    def weight(name: str, rows: slice) -> Tensor | None:
        found = mixer.parameters.get(name)
        return None if found is None else found.detach()[rows].to(dtype)

    taps = weight("conv1d.weight", slice(0, inner))
    projection = weight("in_proj.weight", rows)
    assert taps is not None
    assert projection is not None
    taps = taps[:, 0].flip(-1)  # (e, k): the first tap is now
    bias = weight("conv1d.bias", slice(0, inner))
    # Time last, as the kernels take it.
    x = F.linear(mixer.input.detach().to(dtype), projection, weight("in_proj.bias", rows)).mT.contiguous()
    parts = [taps[:, k, None] * x for k in range(taps.shape[1])]
    name = mixer.config["activation"]
    if rule == "silu":
        slope(x.new_zeros(()), name)  # refuses what would let nothing contribute something
        own = None if bias is None else _activate(bias, name).expand(rec.batch, rec.length, inner)
        return torch.stack([_activate(part, name) for part in parts], 1).mT, own
    c = sum(F.pad(part, (k, 0))[..., : rec.length] for k, part in enumerate(parts))
    assert isinstance(c, Tensor)
    c = c if bias is None else c + bias[:, None]
    factor = slope(c, name) if rule == "gate" else _derivative(c, name)
    for k, part in enumerate(parts):
        part *= F.pad(factor[..., k:], (0, min(k, rec.length)))
    if rule == "tangent":
        rest = _activate(c, name) - factor * (c if bias is None else c - bias[:, None])
    elif bias is None:
        return torch.stack(parts, 1).mT, None
    else:
        rest = factor * bias[:, None]
    return torch.stack(parts, 1).mT, rest.mT


def _activate(x: Tensor, name: str) -> Tensor:
    from transformers.activations import ACT2FN

    out: Tensor = ACT2FN[name](x)
    return out


def _derivative(c: Tensor, name: str) -> Tensor:
    """act'(c), like c."""
    with torch.inference_mode(False), torch.enable_grad():
        point = c.clone().requires_grad_()
        (found,) = torch.autograd.grad(_activate(point, name).sum(), point)
    return found
