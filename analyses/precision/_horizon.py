"""How long each head can hold and still forget, when its state is kept in a number format."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ssmlens.analyses._layers import Layers, Source, collect
from ssmlens.analyses._result import Result
from ssmlens.analyses.precision._formats import Format, format_of
from ssmlens.analyses.precision._walk import walk
from ssmlens.bootstrap import BLOCKS, ratio_interval
from ssmlens.recurrence import Recurrence

__all__ = ["ROUNDING_NOISE", "horizon"]

ROUNDING_NOISE = math.sqrt(0.25 / (2 * math.log(2)))
"""RMS error of rounding to nearest, over 2^-p and over the RMS of what is rounded, for p digits of significand and
significands m that are spread evenly in log m: sqrt(E[1 / m^2] / 3) = 0.4247."""

RESAMPLES = 200
"""Of each head's intervals: a Mamba-1 layer has thousands of them."""

_ROUNDINGS = ("nearest", "stochastic")


def horizon(
    source: Source, dtype: str | torch.dtype | Format = "bfloat16", *, measure: bool = True, scaled: bool = False,
    seed: int = 0,
) -> Result:  # fmt: skip
    """Share of the tokens at which a head's decay is lost to rounding, and what that does to its state.

    Where 1 - a[t] < 2^-(p+1) a state that nothing is written to does not change at all (`stall`). That bites in quiet
    stretches; where text is written, the writes carry the state over the rounding, and its error is that of noise of
    2^-p a token, which a slow head sums up over its memory: 2^-p * 0.42 / sqrt(1 - a^2) for a constant decay.

    Args:
        source: a Trace, a MixerTrace or a Recurrence.
        dtype: format of the state between two tokens, see `FORMATS`; one step computes in the source's precision.
        measure: also run every recurrence with its state rounded at each token.
        scaled: with a power of two for each head before rounding, which spares short formats over- and underflow.
        seed: of stochastic rounding.

    Returns:
        The share of the real tokens with 1 - a[t] < 2^-(p+1), (layer, batch, head), with an axis ``state`` where the
        states of a head decay differently. Columns: ``slow_share`` (1 - a[t] < 2^-p), ``longest_stall`` (such tokens
        in a row, of the value's kind), ``forgetting_lost`` (the stalled tokens' share of all log decay),
        ``half_life`` (ln 2 / mean(-log_decay), tokens), ``predicted_error`` and, where measured, ``error``: RMS of
        the state's difference over the RMS of the state; ``stalled_low`` and ``_high``, ``error_low`` and ``_high``,
        95 % intervals of the block bootstrap over 20 stretches of the text. Control: ``stochastic_error``, the same
        format rounded stochastically, which cannot stall.

    Raises:
        SsmlensError: for a source or a format that cannot be used.
    """
    to, layers = format_of(dtype), collect(source)
    parts = [_measure(rec, to, measure, scaled, seed) for rec in layers]
    return layers.result(
        parts,
        ("batch", "head", "state"),
        control=("stochastic_error",),
        name="stalled_share",
        units="1",
        settings={
            "dtype_of_state": to.name,
            "stall_law": to.stalls_at_once,
            "longest_time_constant": 1 / to.stalls_at_once,
            "measured": measure,
            "scaled": scaled,
            "seed": seed,
        },
        assumes=_assumes(layers, to, measure),
        checked_by="driven state of constant decay, predicted_error; tests/analyses/precision/test_horizon.py",
    )


def _assumes(layers: Layers, to: Format, measure: bool) -> tuple[str, ...]:
    said = [
        f"The state is rounded to {to.name} between two tokens and nowhere else: kernels that keep it in float32 lose "
        "nothing of this.",
        "predicted_error takes rounding as noise without correlation from token to token, and significands as spread "
        "evenly in their logarithm; a stalled state breaks the first.",
    ]
    if measure:
        said.append("Decays, writes and reads are those of the unrounded run: what later layers make of a wrong state "
                    "is in precision.divergence.")  # fmt: skip
    if layers.has_erase:
        said.append("What a delta rule erases is not in log_decay, so its share is counted as held.")
    return tuple(said)


def _measure(rec: Recurrence, to: Format, measure: bool, scaled: bool, seed: int) -> Mapping[str, Tensor]:
    m = rec.log_decay[:, :1].shape[-1] if rec.A is None else rec.A.shape[-1]
    shape = (rec.batch, rec.n_heads, m)
    zero = torch.zeros(shape, dtype=torch.float64, device=rec.device)
    sums = dict.fromkeys(("slow", "lost", "nats", "run", "longest", "guess", "guessed"), zero)
    # One sum for each stretch of the text.
    blocks = min(BLOCKS, rec.length)
    kept = {name: zero.new_zeros(blocks, *shape) for name in ("stalled", "square", "real", *_ROUNDINGS)}
    for step in walk(rec, to, _ROUNDINGS if measure else (), scaled, seed):
        real = rec.real[:, step.t].view(-1, 1, 1).double()
        block = step.t * blocks // rec.length
        kept["stalled"][block] += _count(sums, step.log_decay.double(), to, real)
        kept["real"][block] += real
        norm = _square(step.exact, m)
        sums["guess"] = (2 * step.log_decay.double()).exp() * sums["guess"] + _noise(norm, rec, m, to, scaled)
        sums["guessed"] = sums["guessed"] + real * sums["guess"]
        kept["square"][block] += real * norm
        for how, x in zip(_ROUNDINGS, step.states):
            kept[how][block] += real * _square(x.double() - step.exact.double(), m)
    length = rec.real_lengths.view(-1, 1, 1).double()
    scale = kept["square"].sum(0).sqrt()
    low, high = ratio_interval(kept["stalled"], kept["real"], resamples=RESAMPLES)
    found = {
        "value": kept["stalled"].sum(0) / length,
        "stalled_low": low,
        "stalled_high": high,
        "slow_share": sums["slow"] / length,
        "longest_stall": sums["longest"],
        "forgetting_lost": sums["lost"] / sums["nats"],
        "half_life": math.log(2) * length / sums["nats"],
        "predicted_error": sums["guessed"].sqrt() / scale,
    }
    if measure:
        low, high = ratio_interval(kept["nearest"], kept["square"], resamples=RESAMPLES)
        found |= {"error": kept["nearest"].sum(0).sqrt() / scale, "error_low": low.sqrt(), "error_high": high.sqrt()}
        found["stochastic_error"] = kept["stochastic"].sum(0).sqrt() / scale
    return found


def _count(sums: dict[str, Tensor], log_decay: Tensor, to: Format, real: Tensor) -> Tensor:
    """Add one token's decays (b, h, m) to the sums; 1 where they stall at once."""
    gone = -torch.expm1(log_decay)
    stalled = real * (gone < to.stalls_at_once)
    nats = real * -log_decay
    sums["slow"] = sums["slow"] + real * (gone < to.stalls_soon)
    sums["nats"] = sums["nats"] + nats
    sums["lost"] = sums["lost"] + torch.where(stalled > 0, nats, 0.0)
    sums["run"] = (sums["run"] + 1) * stalled
    sums["longest"] = torch.maximum(sums["longest"], sums["run"])
    return stalled


def _noise(norm: Tensor, rec: Recurrence, m: int, to: Format, scaled: bool) -> Tensor:
    """Expected square of one rounding's error, (b, h, m), from the squared norm of the state."""
    noise = norm * (ROUNDING_NOISE * 2.0**-to.digits) ** 2
    if scaled:
        return noise
    # Below the least normal number the spacing no longer shrinks, and what is less than half of it is lost whole.
    entries = rec.head_dim * (1 if m > 1 else rec.d_state)
    spacing = 2.0 ** (to.least + 1 - to.digits)
    return torch.maximum(noise, norm.clamp(max=entries * spacing**2 / 12))


def _square(x: Tensor, m: int) -> Tensor:
    """Squared norm of a state (b, h, p, n) by what decays alike, (b, h, m)."""
    square = x.double().square().sum(2)
    return square if m > 1 else square.sum(-1, keepdim=True)
