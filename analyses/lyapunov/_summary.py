"""All levels side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov._closed import closed_loop
from ssmlens.analyses.lyapunov._divergence import divergence
from ssmlens.analyses.lyapunov._latent import latent
from ssmlens.analyses.lyapunov._model import Prompt
from ssmlens.analyses.lyapunov._stack import stack
from ssmlens.analyses.lyapunov._transient import transient_gain
from ssmlens.analyses.lyapunov._words import READING
from ssmlens.lens import Lens

__all__ = ["Budget", "summary"]

Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Budget:
    """How much of each level a summary computes.

    Args:
        k: exponents of stack and closed loop.
        steps: steps of the closed loop, and tokens drawn.
        starts: of the gain.
        horizon: the longest of the gain.
        pairs: of generations.
        temperature: of closed loop and draws.
    """

    k: int = 4
    steps: int = 200
    starts: int = 2
    horizon: int = 16
    pairs: int = 8
    temperature: float = 1.0


def summary(
    lens: Lens,
    prompt: Prompt,
    budget: Budget | None = None,
    *,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Told | None = None,
) -> Result:
    """The levels of one model on one text: the leading number of each, with its interval and its control.

    Args:
        lens: the model.
        prompt: one text or its ids.
        budget: how much of each level; small by default: about 100 core-seconds for 5 M parameters.
        seed: of everything random.
        resume: a file name that those of the levels are made from.
        progress: called with the level, and the parts of it done and there are.

    Returns:
        Value (level,): the largest exponent in nats per token for latent, stack and closed; for gain the log of the
        largest gain; for divergence the slope of log KL. Columns ``low`` and ``high`` (95 %, NaN for the gain, which
        has none), and the control: for stack and closed the frozen gates' largest exponent, for the gain 0 (a
        perturbation that only dies), for divergence NaN. What each says is in `READING`.
    """
    b = Budget() if budget is None else budget

    def part(name: str) -> dict[str, Any]:
        told = None if progress is None else lambda done, total: progress(name, done, total)
        path = None if resume is None else Path(resume).with_name(f"{Path(resume).name}.{name}")
        return {"seed": seed, "resume": path, "progress": told}

    frozen = latent(lens.trace(prompt).check())
    where = int(frozen.value.nan_to_num(nan=-math.inf).argmax())
    horizons = [2**i for i in range(b.horizon.bit_length()) if 2**i <= b.horizon]
    given = stack(lens, prompt, b.k, **part("stack"))
    gain = transient_gain(lens, prompt, horizons, starts=b.starts, **part("gain"))
    loop = closed_loop(lens, prompt, b.steps, b.k, temperatures=(b.temperature,), **part("closed"))
    drawn = divergence(lens, prompt, b.steps, pairs=b.pairs, temperature=b.temperature, **part("divergence"))
    nan = math.nan
    rows: dict[str, list[Any]] = {
        "latent": [frozen.value.flatten()[where], *(frozen.columns[c].flatten()[where] for c in ("low", "high")), nan],
        "stack": [given.value[0], given.columns["low"][0], given.columns["high"][0], given.control["frozen_gates"][0]],
        "gain": [gain.value.max().log(), nan, nan, 0.0],
        "closed": [
            loop.value[0, 0], loop.columns["low"][0, 0], loop.columns["high"][0, 0], loop.control["frozen_gates"][0, 0]
        ],
        "divergence": [drawn.columns["rate"], nan, nan, nan],
    }  # fmt: skip
    table = torch.tensor([[float(x) for x in row] for row in rows.values()], dtype=torch.float64)
    parted = float(drawn.columns["parted"][-1])
    return Result(
        name="lyapunov",
        value=table[:, 0],
        dims=("level",),
        units="nats/token (gain: nats)",
        coords={"level": list(rows)},
        columns={"low": table[:, 1], "high": table[:, 2]},
        control={"control": table[:, 3]},
        settings={
            **{name: given.settings[name] for name in ("model", "fingerprint", "tokens", "state_entries")},
            **vars(b),
            "seed": seed,
            "largest_gain": float(gain.value.max()),
            "largest_gain_horizon": gain.coords["horizon"][int(gain.value.argmax())],
            "parted": parted,
            "rounding_parted": float(drawn.control["rounding_parted"][-1]),
            "disturbance": drawn.settings["size"],
        },
        assumes=tuple(f"{name} does not say: {READING[name].silent}" for name in rows),
        checked_by="the functions of each level: tests/analyses/lyapunov/test_summary.py",
    )
