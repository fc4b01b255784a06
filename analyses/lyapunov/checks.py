"""Closed forms and literature values of Lyapunov exponents that the study is held to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ssmlens.analyses._check import Check
from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov import systems
from ssmlens.analyses.lyapunov._covariant import covariant_vectors
from ssmlens.analyses.lyapunov._dimension import kaplan_yorke
from ssmlens.analyses.lyapunov._latent import latent
from ssmlens.analyses.lyapunov._pair import two_trajectory
from ssmlens.analyses.lyapunov._spectrum import spectrum
from ssmlens.analyses.lyapunov._transient import transient_gain
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence

__all__ = ["CHECKS", "selective_stack"]

_SPROTT = "Sprott, Chaos and Time-Series Analysis (2003)"


@functools.cache
def _henon() -> Result:
    return spectrum(systems.henon, [0.1, 0.1], 20_000, control=False)


@functools.cache
def _lorenz() -> Result:
    return spectrum(systems.lorenz, [1.0, 1.0, 20.0], 15_000, dt=0.01, every=2, control=False)


@functools.cache
def _cat() -> Result:
    return spectrum(systems.cat, [0.2, 0.37], 2000, control=False)


def _part(found: Callable[[], Result], index: int, exact: float) -> Callable[[], tuple[float, float]]:
    return lambda: (float(found().value[index]), exact)


def _volume_lorenz() -> tuple[float, float]:
    """The sum of the exponents against the mean log determinant of the same orbit's Jacobians."""
    found = spectrum(systems.lorenz, [1.0, 1.0, 20.0], 100, discard=0, dt=0.01, control=False)
    x, total = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64), 0.0
    for _ in range(100):
        total += float(torch.linalg.slogdet(torch.autograd.functional.jacobian(systems.lorenz, x)).logabsdet)
        x = systems.lorenz(x)
    return found.settings["sum"], total / 100 / 0.01


def _diagonal() -> tuple[float, float]:
    """Level 0 on random steps against their mean times A."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    dt, A = draw(1, 400, 3), -(1 + 5 * draw(3, 4))
    inputs = ScanInputs(value=draw(1, 400, 3, 2), write=draw(1, 400, 1, 4), read=draw(1, 400, 1, 4), dt=dt, A=A)
    exact = torch.stack([dt[0, t, :, None] * A for t in range(400)]).sum(0) / 400
    found = latent(Recurrence(inputs)).value[0]
    return float((found - exact).abs().max()), 0.0


def selective_stack(seed: int = 0) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Callable[[Tensor], Tensor]]:
    """Two selective layers of three channels with two states, the second reading the first.

    Returns:
        The driven map of the state (12,), its first state, and the map from inputs (t, 3) to the log decays (12,) of
        each state, averaged.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    # Rates a factor of 1.5 apart: exponents that are nearly equal take much longer to come apart.
    rates = -0.1 * 1.5 ** torch.arange(12, dtype=torch.float64)[torch.randperm(12, generator=g)].view(2, 3, 2)
    weights = [(0.25 * draw(3, 3), draw(2, 3), draw(2, 3), rates[number]) for number in range(2)]

    def layer(number: int, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        W, B, C, A = weights[number]
        decay = torch.nn.functional.softplus(W @ x - 1)[:, None] * A
        h = decay.exp() * h + x[:, None] * (B @ x)[None]
        return h, torch.tanh(h @ (C @ x)) + x, decay

    def step(state: Tensor, u: Tensor) -> Tensor:
        first, out, _ = layer(0, state[:6].view(3, 2), u)
        second, _, _ = layer(1, state[6:].view(3, 2), out)
        return torch.cat([first.flatten(), second.flatten()])

    def frozen(inputs: Tensor) -> Tensor:
        state, total = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
        for u in inputs:
            _, out, one = layer(0, state[:6].view(3, 2), u)
            _, _, two = layer(1, state[6:].view(3, 2), out)
            total += torch.cat([one.flatten(), two.flatten()])
            state = step(state, u)
        return total / len(inputs)

    return step, torch.zeros(12, dtype=torch.float64), frozen


def _union() -> tuple[float, float]:
    step, start, frozen = selective_stack()
    inputs = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = spectrum(step, start, 4000, inputs=inputs, discard=0, every=2, control=False).value
    return float((found - frozen(inputs).sort(descending=True).values).abs().max()), 0.0


def _window() -> tuple[float, float]:
    """A leaky state and the window of its last three inputs: one exponent, and -inf three times, never NaN."""

    def step(x: Tensor, u: Tensor) -> Tensor:
        return torch.cat([(0.8 * x[0] + 0.1 * x[1:].sum())[None], u[None], x[1:3]])

    inputs = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = spectrum(step, torch.zeros(4), 60, inputs=inputs, every=4).value
    return float((found == -math.inf).sum()), 3.0


_NORMAL = torch.tensor([[1.2, 5.0], [0.0, 0.5]], dtype=torch.float64)


def _eigenvectors() -> tuple[float, float]:
    found = covariant_vectors(lambda x: _NORMAL @ x, [1.0, 1.0], 10, discard=60, tail=60).value
    exact = torch.tensor([[1.0, 0.0], [5 / math.hypot(5, 0.7), -0.7 / math.hypot(5, 0.7)]], dtype=torch.float64)
    return float(((found * exact).sum(-1).abs() - 1).abs().max() + (found[:, 0, 1].abs()).max()), 0.0


def _angle() -> tuple[float, float]:
    found = covariant_vectors(lambda x: _NORMAL @ x, [1.0, 1.0], 10, discard=60, tail=60)
    return float(found.columns["angle"].mean()), math.degrees(math.atan2(0.7, 5))


def _gain() -> tuple[float, float]:
    M = torch.tensor([[0.9, 5.0], [0.0, 0.8]], dtype=torch.float64)
    found = transient_gain(M, horizons=range(1, 13))
    return float(found.value.max()), 13.478


def _pair() -> tuple[float, float]:
    return float(two_trajectory(systems.henon, [0.1, 0.1], 2000).value), float(
        spectrum(systems.henon, [0.1, 0.1], 2000, control=False).value[0]
    )


def _dimension(exponents: list[float], exact: float) -> Callable[[], tuple[float, float]]:
    return lambda: (float(kaplan_yorke(exponents).value), exact)


CHECKS: tuple[Check, ...] = (
    Check(
        "lyapunov: Henon, first exponent",
        "0.41922 within 1 %",
        _part(_henon, 0, systems.HENON[0]),
        0.0042,
        False,
        _SPROTT,
    ),
    Check("lyapunov: Henon, sum", "ln 0.3", lambda: (_henon().settings["sum"], math.log(0.3)), 1e-8),
    Check(
        "lyapunov: logistic map at r = 4",
        "ln 2 within 1 %",
        lambda: (float(spectrum(systems.logistic, [0.3], 10_000, control=False).value[0]), systems.LOGISTIC),
        0.0069,
    ),
    Check("lyapunov: cat map, first exponent", "ln((3 + sqrt 5) / 2)", _part(_cat, 0, systems.CAT), 1e-6),
    Check("lyapunov: cat map, second exponent", "-ln((3 + sqrt 5) / 2)", _part(_cat, 1, -systems.CAT), 1e-6),
    Check(
        "lyapunov: Lorenz, first exponent",
        "0.9056 within 1 %",
        _part(_lorenz, 0, systems.LORENZ[0]),
        0.0091,
        False,
        _SPROTT,
    ),
    Check("lyapunov: Lorenz, second exponent", "0, along the flow", _part(_lorenz, 1, 0.0), 0.01),
    Check(
        "lyapunov: Lorenz, third exponent",
        "-14.5723 within 1 %",
        _part(_lorenz, 2, systems.LORENZ[2]),
        0.146,
        False,
        _SPROTT,
    ),
    Check("lyapunov: Lorenz, volume", "sum of exponents = mean log |det J| of the same orbit", _volume_lorenz, 1e-8),
    Check(
        "lyapunov: Lorenz, dimension",
        "2.062 by Kaplan and Yorke",
        lambda: (float(kaplan_yorke(_lorenz()).value), 2.062),
        0.005,
        source=_SPROTT,
    ),
    Check("lyapunov: frozen gates", "mean of log_decay", _diagonal, 1e-14),
    Check("lyapunov: two selective layers", "union of the mean log decays, 4000 steps", _union, 5e-3),
    Check("lyapunov: a window's exponents", "three of four are -inf, none NaN", _window, 0.0),
    Check("lyapunov: Kaplan-Yorke, Henon", "1 + .419 / 1.623", _dimension([0.419, -1.623], 1.25816), 1e-5),
    Check("lyapunov: Kaplan-Yorke, Lorenz", "2 + .906 / 14.57", _dimension([0.906, 0.0, -14.57], 2.06218), 1e-5),
    Check("lyapunov: Kaplan-Yorke, all negative", "0", _dimension([-0.1, -2.0], 0.0), 0.0),
    Check("lyapunov: Kaplan-Yorke, growing volume", "that of the state", _dimension([1.0, 0.5, -1.0], 3.0), 0.0),
    Check("lyapunov: covariant vectors", "eigenvectors of a constant Jacobian", _eigenvectors, 1e-10),
    Check("lyapunov: angle of covariant vectors", "atan(0.7 / 5) = 7.9696 degrees", _angle, 1e-8),
    Check("lyapunov: transient gain", "[[.9, 5], [0, .8]] reaches 13.478, in 6 steps", _gain, 1e-3),
    Check("lyapunov: two trajectories", "Henon by QR within 1 %", _pair, 0.0042),
)
