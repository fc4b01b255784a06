"""Forecasting: chaotic flows whose exponents are known, a delay equation, and a driven nonlinear average.

Every step is made of additions and multiplications in float64, in a fixed order, so that series are the same to the
last bit on any machine. (A chaotic orbit would turn a difference in the last bit into another orbit.)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ssmlens.errors import SsmlensError

from ._base import Batch, Draws, Task, need

__all__ = ["NARMA", "Forecast", "Lorenz", "MackeyGlass", "forecast"]


class Forecast(Task):
    """A series whose next value is asked at every place; the score is the error relative to the variance.

    ``ids`` of a batch is (b, t, c) float64 inputs, ``targets`` (b, t, c') what comes next. ``autonomous`` says whether
    the series is its own input.
    """

    autonomous: ClassVar[bool] = True

    @property
    def baselines(self) -> dict[str, float]:
        """``mean``: the mean of the targets, whose relative error is 1 by definition."""
        return {"mean": 1.0}

    @property
    def chance(self) -> float:
        """Relative error of the mean: what an error has to stay below."""
        return 1.0

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        """The mean of the targets at every place."""
        self._known(name)
        return batch.targets.mean((0, 1), keepdim=True).expand_as(batch.targets)

    def persistence(self, batch: Batch) -> float:
        """Score of naming the value that stands there, for series that are their own input.

        2 (1 - r) for a stationary series, r its autocorrelation at one step: no closed form, so it is measured.
        """
        need(self.autonomous, f"{self.name} does not forecast its own input")
        return self.score(batch.ids, batch)

    def score(self, predicted: Tensor, batch: Batch) -> float:
        """Mean squared error over the variance of the targets, both summed over channels; 0 is exact, 1 the mean."""
        error = (predicted.double() - batch.targets)[batch.mask].square().sum(-1).mean()
        spread = batch.targets[batch.mask]
        return float(error / (spread - spread.mean(0)).square().sum(-1).mean())

    @abstractmethod
    def oracle(self, batch: Batch) -> Tensor: ...


def _numbers(inputs: np.ndarray, targets: np.ndarray, **facts: np.ndarray) -> Batch:
    mask = torch.ones(inputs.shape[:2], dtype=torch.bool)
    given = {k: torch.from_numpy(v) for k, v in facts.items()}
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), mask, given)


@dataclass(frozen=True)
class Lorenz(Forecast):
    """The Lorenz flow, all three coordinates, sampled; the next sample is asked.

    x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z, by Runge-Kutta 4 with step ``dt``, a sample every
    ``every`` steps. Values are given standardised: (x, y, z) minus ``centre``, over ``scale``.

    At the classical parameters the Lyapunov exponents are 0.9056, 0, -14.5723 per unit of time (Sprott 2003), their sum
    is -(sigma + 1 + beta) exactly, and the Kaplan-Yorke dimension is 2.062.

    Args:
        length: samples a row; the targets are the samples one later.
        dt: integration step, units of time.
        every: steps between samples.
        burn: steps thrown away before, to reach the attractor.
    """

    name: ClassVar[str] = "lorenz"
    sigma: ClassVar[float] = 10.0
    rho: ClassVar[float] = 28.0
    beta: ClassVar[float] = 8.0 / 3.0
    centre: ClassVar[tuple[float, ...]] = (0.0, 0.0, 23.5)
    scale: ClassVar[tuple[float, ...]] = (8.0, 9.0, 8.6)
    exponents: ClassVar[tuple[float, ...]] = (0.9056, 0.0, -14.5723)
    dimension: ClassVar[float] = 2.0621
    length: int = 256
    dt: float = 0.01
    every: int = 2
    burn: int = 1000

    def __post_init__(self) -> None:
        need(self.length >= 1 and self.every >= 1 and self.burn >= 0, "length and every are 1 or more, burn 0 or more")
        need(0 < self.dt <= 0.02, f"the step is above 0 and at most 0.02, got {self.dt}")

    @property
    def interval(self) -> float:
        """Units of time between samples: exponents per step are those per time times this."""
        return self.dt * self.every

    def _rate(self, state: Any) -> Any:
        x, y, z = state
        return self.sigma * (y - x), x * (self.rho - z) - y, x * y - self.beta * z

    def _substep(self, state: Any) -> Any:
        def along(rate: Any, by: float) -> Any:
            return tuple(s + by * r for s, r in zip(state, rate))

        one = self._rate(state)
        two = self._rate(along(one, 0.5 * self.dt))
        three = self._rate(along(two, 0.5 * self.dt))
        four = self._rate(along(three, self.dt))
        mean = tuple((a + 2.0 * b + 2.0 * c + d) / 6.0 for a, b, c, d in zip(one, two, three, four))
        return along(mean, self.dt)

    def step(self, sample: Tensor) -> Tensor:
        """The sample after this one, (..., 3) -> (..., 3), standardised; a map for Lyapunov spectra, differentiable."""
        centre, scale = (torch.tensor(x, dtype=sample.dtype, device=sample.device) for x in (self.centre, self.scale))
        state = tuple((sample * scale + centre).unbind(-1))
        for _ in range(self.every):
            state = self._substep(state)
        return (torch.stack(state, -1) - centre) / scale

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Rows start at random points of a box around the attractor, ``burn`` steps before."""
        start = (Draws(seed).uniform(n, 3) - 0.5) * np.array([20.0, 20.0, 20.0]) + np.array([0.0, 0.0, 25.0])
        state = tuple(start.T.copy())
        for _ in range(self.burn):
            state = self._substep(state)
        samples = np.empty((n, self.length + 1, 3))
        for t in range(self.length + 1):
            samples[:, t] = np.stack(state, 1)
            for _ in range(self.every):
                state = self._substep(state)
        samples = (samples - np.array(self.centre)) / np.array(self.scale)
        return _numbers(samples[:, :-1].copy(), samples[:, 1:].copy())

    def oracle(self, batch: Batch) -> Tensor:
        """The flow itself: a sample holds the whole state."""
        return self.step(batch.ids)

    def moments(self, batch: Batch) -> dict[str, float]:
        """Long-time averages <x x>, <x y>, <z> in the flow's own units.

        On the attractor <x x> = <x y> = beta <z> exactly, since x x / 2 and z are bounded and their mean rates vanish.
        """
        state = batch.ids.reshape(-1, 3) * torch.tensor(self.scale) + torch.tensor(self.centre)
        x, y, z = state.unbind(-1)
        return {"xx": float((x * x).mean()), "xy": float((x * y).mean()), "z": float(z.mean())}


@dataclass(frozen=True)
class MackeyGlass(Forecast):
    """The Mackey-Glass delay equation, sampled; the next sample is asked.

    x'(t) = gain x(t - tau) / (1 + x(t - tau)^10) - loss x(t), by Runge-Kutta 4 with step 0.1, the delayed value at half
    steps from the mean of its neighbours; a sample each unit of time. Mildly chaotic at tau = 17, more at 30.

    Args:
        length: samples a row; the targets are the samples one later.
        tau: delay, units of time.
        burn: units of time thrown away before.
        gain, loss: parameters; 1 is a fixed point where gain = 2 loss.
    """

    name: ClassVar[str] = "mackey_glass"
    steps_per_unit: ClassVar[int] = 10
    length: int = 256
    tau: int = 17
    burn: int = 300
    gain: float = 0.2
    loss: float = 0.1

    def __post_init__(self) -> None:
        need(self.length >= 1 and self.burn >= 0, "length is at least 1, burn at least 0")
        need(self.tau >= 1, f"the delay is at least 1 unit, got {self.tau}")

    def _feed(self, late: np.ndarray) -> np.ndarray:
        square = late * late
        eighth = square * square * square * square
        return self.gain * late / (1.0 + eighth * square)

    def _substep(self, x: np.ndarray, late: np.ndarray, later: np.ndarray) -> np.ndarray:
        """One step from x, with the delayed values at its start and end."""
        dt = 1.0 / self.steps_per_unit
        start, middle, end = self._feed(late), self._feed(0.5 * (late + later)), self._feed(later)
        one = start - self.loss * x
        two = middle - self.loss * (x + 0.5 * dt * one)
        three = middle - self.loss * (x + 0.5 * dt * two)
        four = end - self.loss * (x + dt * three)
        return x + dt * (one + 2.0 * two + 2.0 * three + four) / 6.0

    def solve(self, history: np.ndarray, units: int) -> np.ndarray:
        """Go on from a history.

        Args:
            history: (b, 10 tau + 1) values at every tenth unit up to now.
            units: of time to go on.

        Returns:
            (b, 10 tau + 1 + 10 units): the history and what follows it.
        """
        delay, held = self.tau * self.steps_per_unit, history.shape[1]
        need(held == delay + 1, f"the history has {delay + 1} values a row, got {held}")
        path = np.empty((len(history), held + units * self.steps_per_unit))
        path[:, :held] = history
        for i in range(held, path.shape[1]):
            path[:, i] = self._substep(path[:, i - 1], path[:, i - 1 - delay], path[:, i - delay])
        return path

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Rows start from a constant drawn in [0.5, 1.3]. Facts: ``path`` (b, 10 (tau + length) + 1), every tenth unit
        from ``tau`` before the first sample on."""
        start = 0.5 + 0.8 * Draws(seed).uniform(n, 1)
        delay = self.tau * self.steps_per_unit
        path = self.solve(np.repeat(start, delay + 1, 1), self.burn + self.length)
        path = path[:, self.burn * self.steps_per_unit :]
        samples = path[:, delay :: self.steps_per_unit, None]
        return _numbers(samples[:, :-1].copy(), samples[:, 1:].copy(), path=path.copy())

    def oracle(self, batch: Batch) -> Tensor:
        """The equation, solved from the history before the first sample (``facts["path"]``)."""
        delay = self.tau * self.steps_per_unit
        path = self.solve(batch.facts["path"][:, : delay + 1].numpy(), self.length)
        return torch.from_numpy(path[:, delay :: self.steps_per_unit, None][:, 1:].copy())


@dataclass(frozen=True)
class NARMA(Forecast):
    """A nonlinear average of its own past and a random input, whose value is asked.

    y(t+1) = 0.3 y(t) + 0.05 y(t) (y(t) + ... + y(t - 9)) + 1.5 u(t - 9) u(t) + 0.1 for order 10, u uniform in
    [0, 0.5]. Rows that run away (y above 1) are drawn again. Source: Atiya and Parlos 2000.

    Args:
        length: steps a row.
        order: 10, or any from 2 to 10.
        burn: steps thrown away before.
    """

    name: ClassVar[str] = "narma"
    autonomous: ClassVar[bool] = False
    length: int = 256
    order: int = 10
    burn: int = 50

    def __post_init__(self) -> None:
        need(self.length >= 1 and self.burn >= 0, "length is at least 1, burn at least 0")
        need(2 <= self.order <= 10, f"the order is 2 to 10 (larger ones run away), got {self.order}")

    def respond(self, u: np.ndarray) -> np.ndarray:
        """y(1) ... y(t) of an input (b, t), from rest; y[:, i] is y(i + 1), which u[:, i] is the last to enter."""
        k = self.order
        y = np.zeros((u.shape[0], u.shape[1] + k))
        before = np.zeros((u.shape[0], k - 1))
        padded = np.concatenate([before, u], 1)
        for t in range(u.shape[1]):
            total = np.zeros(len(u))
            for i in range(k):
                total = total + y[:, t + i]
            now = y[:, t + k - 1]
            y[:, t + k] = 0.3 * now + 0.05 * now * total + 1.5 * padded[:, t] * padded[:, t + k - 1] + 0.1
        return y[:, k:]

    def batch(self, n: int, seed: int = 0) -> Batch:
        """``ids`` (b, t, 1) is u, ``targets`` (b, t, 1) is y one step later. Facts: ``drive`` (b, burn + t), all u."""
        draws = Draws(seed)
        u = 0.5 * draws.uniform(n, self.burn + self.length)
        y = self.respond(u)
        while (wild := ~(y < 1).all(1)).any():
            u[wild] = 0.5 * draws.uniform(int(wild.sum()), self.burn + self.length)
            y[wild] = self.respond(u[wild])
        return _numbers(u[:, self.burn :, None].copy(), y[:, self.burn :, None].copy(), drive=u)

    def oracle(self, batch: Batch) -> Tensor:
        """The rule, run over all of u (``facts["drive"]``)."""
        return torch.from_numpy(self.respond(batch.facts["drive"].numpy())[:, self.burn :, None].copy())


SYSTEMS: dict[str, type[Forecast]] = {"lorenz": Lorenz, "mackey_glass": MackeyGlass, "narma": NARMA}


def forecast(system: str = "lorenz", **settings: Any) -> Forecast:
    """A forecasting task by name.

    Args:
        system: "lorenz", "mackey_glass" or "narma".
        settings: of that task.

    Raises:
        SsmlensError: for another system.
    """
    if system not in SYSTEMS:
        raise SsmlensError(f"no system {system!r}: they are {', '.join(SYSTEMS)}")
    return SYSTEMS[system](**settings)
