"""The largest exponent from two trajectories: for maps that can only be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov._spectrum import Inputs, drive, settle
from ssmlens.analyses.lyapunov._statistics import BLOCKS, block_means, bootstrap
from ssmlens.analyses.lyapunov._tangent import as_state, plain_step
from ssmlens.errors import SsmlensError

__all__ = ["two_trajectory"]

SEPARATION = {torch.float64: 1e-8}
"""Distance of the two trajectories by dtype, as a share of the state where it is not float64."""

NARROW = 1e-3
NOISE = 0.1
"""Share of the separation that rounding may be of, before the result says that it is not resolved."""


def two_trajectory(
    map: Callable[..., Any],
    state: Any,
    steps: int,
    d0: float | None = None,
    *,
    inputs: Inputs | None = None,
    other: Callable[..., Any] | None = None,
    discard: int | None = None,
    dt: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """The largest Lyapunov exponent from the distance of two trajectories, brought back to d0 after every step.

    The map is only run, never differentiated (Benettin et al. 1976): it may be a compiled kernel, a whole model, in
    any precision. Finite d0 is not infinitely small, and rounding adds to every distance: look at the control.

    Args:
        map: ``x -> x``, or ``(x, u) -> x`` when driven.
        state: where the orbit starts; its dtype is that of the orbit, whole numbers and lists become float64.
        steps: measured steps.
        d0: distance of the trajectories; by default 1e-8 in float64, and a thousandth of the state's norm otherwise.
        inputs: as for `spectrum`.
        other: the same map computed otherwise (another kernel, batch order or precision): the difference of the two
            is the rounding noise. By default the noise of one unit in the last place of the state.
        discard: steps before the measurement; by default as for `spectrum`.
        dt: time of one step.
        seed: of the first separation.
        progress: called with the steps done and the steps there are.

    Returns:
        Value () in nats per unit of time, with ``standard_error``, ``low`` and ``high`` (95 %, bootstrap of 20 blocks
        of time), and the control ``rounding``: the median share of the separation after a step that rounding alone
        makes. Near 0 the exponent is the map's; near 1 it is the noise's.

    Raises:
        SsmlensError: when the orbit leaves the finite numbers.
    """
    x = as_state(state)
    discard = settle(steps, inputs) if discard is None else discard
    if steps < 1 or discard < 0:
        raise SsmlensError(f"steps is at least 1 and discard at least 0, got {steps} and {discard}")
    at = drive(inputs, discard + steps)
    size = SEPARATION.get(x.dtype, NARROW * float(x.norm()) or NARROW) if d0 is None else d0
    if not size > 0:
        raise SsmlensError(f"d0 is above 0, got {d0}")
    step, again = plain_step(map, x, at(0)), None if other is None else plain_step(other, x, at(0))
    generator = torch.Generator().manual_seed(seed)
    y = x + _direction(x, generator) * size
    logs, noise = [], []
    with torch.no_grad():
        for t in range(discard + steps):
            u = at(t)
            after = step(x, u)
            away = step(y, u) - after
            distance = float(away.double().norm())
            if not bool(after.isfinite().all()) or distance != distance:
                raise SsmlensError(f"the orbit leaves the finite numbers at step {t}")
            if t >= discard:
                logs.append(distance / size)
                shaken = again(x, u) if again is not None else step(_shaken(x, generator), u)
                noise.append(float((shaken - after).double().norm()) / max(distance, 1e-300))
            x = after
            # Trajectories that met are set apart anew.
            y = x + (away * (size / distance) if distance > 0 else _direction(x, generator) * size)
            if progress is not None:
                progress(t + 1, discard + steps)
    growth = torch.tensor(logs, dtype=torch.float64).log() / dt
    means = block_means(growth, torch.ones(len(growth), dtype=torch.float64))
    error, low, high = bootstrap(means)
    rounding = float(torch.tensor(noise, dtype=torch.float64).median())
    assumes = [
        "the separation stays small enough to grow as an infinitely small one would",
        "the orbit has settled, and its average over these steps stands for the average over all time",
    ]
    if rounding > NOISE:
        assumes.append(f"NOT MET: rounding makes {rounding:.0%} of the separation, so the exponent is not resolved")
    return Result(
        name="two_trajectory",
        value=growth.mean(),
        dims=(),
        units="nats/step" if dt == 1 else "nats/time",
        columns={"standard_error": error, "low": low, "high": high},
        control={"rounding": torch.tensor(rounding, dtype=torch.float64)},
        settings={
            "study": "two_trajectory",
            "steps": steps,
            "discard": discard,
            "d0": size,
            "dt": dt,
            "seed": seed,
            "dtype": x.dtype,
            "noise": "one unit in the last place" if other is None else "the other implementation",
            "interval": f"95 %, bootstrap of {min(BLOCKS, steps)} blocks of time",
        },
        assumes=tuple(assumes),
        checked_by="Henon within 1 % of the spectrum by QR: tests/analyses/lyapunov/test_pair.py",
    )


def _direction(x: Tensor, generator: torch.Generator) -> Tensor:
    draw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (draw / draw.norm()).to(x)


def _shaken(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with every number moved by one unit in its last place, up or down."""
    sign = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
    return x * (1 + sign * torch.finfo(x.dtype).eps)
