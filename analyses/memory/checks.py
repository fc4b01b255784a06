"""The closed forms that the memory study is held to, for ``ssmlens selfcheck`` and the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmlens.analyses import memory
from ssmlens.analyses._check import Check
from ssmlens.analyses.memory._hippo import legs, legs_reconstruct
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence

__all__ = ["CHECKS"]

SPEC = "dt * A as in Mamba (Gu and Dao 2023)"


def _constant(a: float, length: int) -> Recurrence:
    """One state with the decay a, writes and reads of 1."""
    ones = torch.ones(1, length, 1, 1, dtype=torch.float64)
    return Recurrence(ScanInputs(value=ones, write=ones, read=ones, log_decay=ones * math.log(a)))


def _selective(seed: int = 0, length: int = 64) -> Recurrence:
    """Three heads with four states each, and dt that changes from token to token."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    value, write, read = (uniform(1, length, *s) - 0.5 for s in ((3, 2), (1, 4), (1, 4)))
    return Recurrence(
        ScanInputs(value=value, write=write, read=read, dt=uniform(1, length, 3).square(), A=-uniform(3, 4) - 0.1)
    )


def _half_life() -> tuple[float, float]:
    """The time constant of dt A, at the settings of Mamba's first state."""
    dt, A = 0.01, -1.0
    ones = torch.ones(1, 1000, 1, 1, dtype=torch.float64)
    rec = Recurrence(
        ScanInputs(value=ones, write=ones, read=ones, dt=dt * ones[..., 0], A=torch.tensor([[A]]).double())
    )
    return memory.half_life(rec).value.item(), math.log(2) / (-dt * A)


def _first_half() -> tuple[float, float]:
    lives = memory.half_life(_constant(0.99, 500), "forward", at=[0], interpolate=True)
    return lives.value.item(), math.log(2) / -math.log(0.99)


def _scaled_dt() -> tuple[float, float]:
    rec = _selective()
    assert rec.inputs.dt is not None
    slow = Recurrence(rec.inputs.replace(dt=rec.inputs.dt / 16))
    return _worst(memory.half_life(slow).value / memory.half_life(rec).value, 16.0)


def _mean_distance() -> tuple[float, float]:
    return memory.mean_distance(_constant(0.98, 2500), quantile=None).value.item(), 0.98 / (1 - 0.98)


def _window() -> tuple[float, float]:
    rec = _selective()
    found = memory.window_by_difference(rec, 7, at=range(8, 64)).value
    fresh = [Recurrence(rec.inputs.slice(t - 6, t + 1)).final_state()[0] for t in range(8, 64)]
    return _worst(found[0] - torch.stack(fresh), 0.0)


def _cascade() -> tuple[float, float]:
    """Three equal layers, measured by gradients."""
    a, layers, length = 0.8, 3, 240

    def run(x: Tensor) -> Tensor:
        decay = torch.full((1, length, 1, 1), math.log(a), dtype=torch.float64)
        ones = torch.ones_like(decay)
        for _ in range(layers):
            x = Recurrence(ScanInputs(value=x[None, :, None], write=ones, read=ones, log_decay=decay)).run()[0, :, 0]
        return x

    found = memory.influence(run, torch.ones(length, dtype=torch.float64), probes=0)
    return found.columns["mean_distance"].item(), layers * a / (1 - a)


def _onset(a: float, exact: float) -> Check:
    """The table of the predicted onset for decays a after 2048 tokens of training."""

    def run() -> tuple[float, float]:
        found = memory.onset_time(_constant(a, 8), 2048).value.item()
        # The table is in whole tokens.
        return float(round(found)) if math.isfinite(found) else found, exact

    return Check(f"memory: onset of a = {a}", "ln(1 - 1.25 (1 - a^T)) / ln a, or never", run, 0.0)


def _saturation() -> tuple[float, float]:
    return memory.saturation(_constant(0.9999, 8), 2048).value.item(), -math.expm1(2048 * math.log(0.9999))


def _white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _delay_line(lag: int) -> tuple[float, float]:
    u = _white(2000, 2)
    states = torch.cat([u.roll(k, 0) for k in range(4)], 1)
    return memory.fidelity(states, u, [lag], repeats=10).value.item(), float(lag < 4)


def _leaky() -> tuple[float, float]:
    a, u = 0.9, _white(1, 20_000, 1, 1)
    ones = torch.ones_like(u)
    rec = Recurrence(ScanInputs(value=u, write=ones, read=ones, log_decay=ones * math.log(a)))
    return memory.fidelity(rec, lags=[2], repeats=10).value.item(), (1 - a * a) * a**4


def _rotation() -> tuple[float, float]:
    x = _white(1000, 5)
    return memory.cross_layer_fidelity(x, x @ torch.linalg.qr(_white(5, 5, seed=1))[0], repeats=10).value.item(), 1.0


def _projection() -> tuple[float, float]:
    x = _white(8000, 6)
    return memory.cross_layer_fidelity(x, x[:, :2], repeats=10).value.item(), 1 / 3


def _cka() -> tuple[float, float]:
    x = _white(500, 6)
    found = memory.cross_layer_fidelity(x, 3 * x @ torch.linalg.qr(_white(6, 6, seed=1))[0], repeats=10)
    return found.columns["cka"].item(), 1.0


def _legs() -> tuple[float, float]:
    """A cubic on the unit interval, from the six coefficients after 20,000 steps."""
    grid = torch.linspace(0, 1, 20_000, dtype=torch.float64)
    signal = grid**3 - grid / 2 + 0.25
    return float((legs_reconstruct(legs(signal, 6), grid) - signal).abs().max()), 0.0


def _legs_timescale() -> tuple[float, float]:
    """The coefficients of one shape, sampled twice as often."""
    slow, fast = (torch.sin(3 * torch.linspace(0, 1, n, dtype=torch.float64)) for n in (8000, 16_000))
    return _worst(legs(slow, 6) - legs(fast, 6), 0.0)


def _worst(found: Tensor, exact: float) -> tuple[float, float]:
    """The entry farthest from the exact value."""
    flat = found.reshape(-1)
    return float(flat[(flat - exact).abs().argmax()]), exact


CHECKS: tuple[Check, ...] = (
    Check("memory: half-life", "ln 2 / (-dt A)", _half_life, 1e-12, relative=True, source=SPEC),
    Check("memory: forward half-life", "ln 2 / -ln a", _first_half, 1e-10, relative=True),
    Check("memory: dt / n", "n times the half-life", _scaled_dt, 1e-12, relative=True),
    Check("memory: mean distance of a^k", "a / (1 - a)", _mean_distance, 1e-9, relative=True),
    Check("memory: window by difference", "h[t] - rho h[t-r] = a run from t-r+1", _window, 1e-12),
    Check("memory: cascade of three poles", "l a / (1 - a)", _cascade, 1e-9, relative=True),
    Check("memory: saturation", "1 - a^T", _saturation, 1e-12),
    _onset(0.999, math.inf),
    _onset(0.9995, 3230),
    _onset(0.9999, 2633),
    _onset(0.99997, 2580),
    Check("memory: delay line inside", "R2 = 1 for k < d", lambda: _delay_line(3), 1e-9),
    Check("memory: delay line beyond", "R2 = 0 for k >= d", lambda: _delay_line(4), 0.01),
    Check("memory: leaky unit", "R2 = (1 - a^2) a^(2k)", _leaky, 0.03, source="Jaeger 2001"),
    Check("memory: rotated layer", "R2 = 1", _rotation, 1e-9),
    Check("memory: projected layer", "R2 = r / d", _projection, 0.01),
    Check("memory: CKA of a rotated layer", "1", _cka, 1e-12, source="Kornblith et al. 2019"),
    Check("memory: LegS of a cubic", "reconstructs degree < N", _legs, 1e-3, source="Gu et al. 2020"),
    Check("memory: LegS in another time", "the same coefficients", _legs_timescale, 1e-3, source="Gu et al. 2020"),
)
"""All of them; together a few seconds on one core."""
