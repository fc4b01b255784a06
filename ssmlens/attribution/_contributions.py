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
from jaxtyping import Bool, Float
from torch import Tensor

from ssmlens.attention import DENSE_LIMIT
from ssmlens.attribution._front import PLACES, Front, activate, derivative, gate_of
from ssmlens.attribution._mixers import slope
from ssmlens.attribution._rows import rows_of
from ssmlens.errors import MemoryLimitError, SsmlensError, UnsupportedModelError
from ssmlens.kernels import contributions as kernel
from ssmlens.kernels.contributions import Terms
from ssmlens.trace import MixerTrace

__all__ = ["RULES", "Contributions", "contributions"]

RULES = ("gate", "silu", "tangent", "none")
"""How `contributions` shares out the activation behind the convolution."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """``output[t] = sum_s T[t, s] + bias[t]``, up to `error`; T is never stored.

    Everything is in the compute dtype: float64 for a float64 model, else float32. Padding contributes nothing and
    receives nothing.

    Args:
        mixer: one layer of a trace, with its weights.
        rule: one of `RULES`.
    """

    mixer: MixerTrace = field(repr=False)
    rule: str

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.mixer.layer

    @cached_property
    def output(self) -> Float[Tensor, "b t d"]:
        """The model's own output of the mixer."""
        return self.mixer.output.detach().to(self.mixer.recurrence.dtype)

    @property
    def real(self) -> Bool[Tensor, "b t"]:
        """False on padding."""
        return self.mixer.recurrence.real

    @cached_property
    def out_bias(self) -> Tensor | None:
        """(d,) of the output projection; None for none."""
        found = self.mixer.parameters.get("out_proj.bias")
        return None if found is None else found.detach().to(self.mixer.recurrence.dtype)

    @property
    def bias_value(self) -> Tensor | None:
        """(b, t, e) what no token gives to the scan's value; None for nothing."""
        return self._shares[1]

    @cached_property
    def terms(self) -> Terms:
        """The frozen mixer as plain tensors."""
        mixer, rec = self.mixer, self.mixer.recurrence
        with torch.no_grad():
            gate = gate_of(mixer)
            return Terms(
                inputs=rec.inputs.map(torch.detach).cast(),
                sources=self._shares[0],
                # A padded position reads nothing, around the state neither.
                gate=gate.masked_fill(~rec.real[..., None], 0) if rec.lengths is not None else gate,
                weight=mixer.parameters["out_proj.weight"].detach().to(rec.dtype),
                skip=None if rec.D is None else rec.D.detach().to(rec.dtype),
            )

    @cached_property
    def _shares(self) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            return _sources(self.mixer, self.rule)

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
            rows: output positions, negative ones count from the end; all by default. Few rows of a long prompt take
                little more than their result and one row of the recurrence's matrix.
            limit: bytes that the result may take.

        Raises:
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
            IndexError: when a row does not exist.
        """
        b, t, s, d = self.shape
        picked = range(t) if rows is None else [self._position(row) for row in rows]
        self._check_size("vectors()", (b, len(picked), s, d), limit, "pass rows=[...] or use norm()")
        return kernel.vectors(self.terms) if rows is None else rows_of(self.mixer, self.rule, list(picked))

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
    if rule in ("gate", "silu"):
        # Refuses an activation that would let nothing contribute something.
        slope(torch.zeros(()), mixer.config["activation"])
    return Contributions(mixer, rule)


def _sources(mixer: MixerTrace, rule: str) -> tuple[Tensor, Tensor | None]:
    """What each token gives to the scan's value k steps later, (b, k, t, e), and what no token gives, (b, t, e)."""
    rec, dtype = mixer.recurrence, mixer.recurrence.dtype
    if rule == "none":
        return rec.value.detach().to(dtype).flatten(2)[:, None], None
    front = Front(mixer)
    taps, bias, name = front.taps, front.bias, front.activation
    # Time last, as the kernels take it.
    x = front.x(0, rec.length).mT.contiguous()
    parts = [taps[:, k, None] * x for k in range(taps.shape[1])]
    if rule == "silu":
        own = None if bias is None else activate(bias, name).expand(rec.batch, rec.length, front.inner)
        return torch.stack([activate(part, name) for part in parts], 1).mT, own
    c = sum(F.pad(part, (k, 0))[..., : rec.length] for k, part in enumerate(parts))
    assert isinstance(c, Tensor)
    c = c if bias is None else c + bias[:, None]
    factor = slope(c, name) if rule == "gate" else derivative(c, name)
    for k, part in enumerate(parts):
        part *= F.pad(factor[..., k:], (0, min(k, rec.length)))
    if rule == "tangent":
        rest = activate(c, name) - factor * (c if bias is None else c - bias[:, None])
    elif bias is None:
        return torch.stack(parts, 1).mT, None
    else:
        rest = factor * bias[:, None]
    return torch.stack(parts, 1).mT, rest.mT
