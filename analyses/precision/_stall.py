"""What rounding does to a state that nothing is written to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.precision._formats import Format, format_of, rounded
from ssmlens.errors import SsmlensError

__all__ = ["stall", "stalled_share"]

COPIES = 256
"""Copies of the state whose mean stands for stochastic rounding."""

STARTS = 32
"""Significands that a state starts from besides 1."""


def stall(
    decays: float | Sequence[float] | Tensor, dtype: str | torch.dtype | Format = "bfloat16", *,
    limit: int = 20_000, seed: int = 0,
) -> Result:  # fmt: skip
    """Half-life of a state that decays in a number format, nothing being written: h <- round(a * h).

    In exact arithmetic every decay below 1 forgets. Rounded to nearest, h stays where it is as soon as h * (1 - a) is
    less than half a unit in its last place: at once where 1 - a < 2^-(p+1), and before the next power of two where
    1 - a < 2^-p, for p digits of significand (8 in bfloat16, 11 in float16, 24 in float32). With 2^-(p+1) <= 1 - a the
    state still falls somewhere in each binade.

    Args:
        decays: numbers a in (0, 1), or one.
        dtype: format of the state, see `FORMATS`.
        limit: steps after which a state that neither halved nor stopped is given up (NaN).
        seed: of stochastic rounding.

    Returns:
        Tokens until a state that started at 1 is at most 1/2, by decay; infinite where it stops before. Columns:
        ``floor``, the share of the start at which it stops (0 where it does not before ``limit``), and
        ``half_life_shortest`` and ``_longest`` over 32 starts between 1 and 2. Control: ``exact``, ln 2 / -ln a, and
        ``stochastic``, the half-life of the mean of 256 copies rounded stochastically.

    Raises:
        SsmlensError: for decays outside (0, 1), or an unknown format.
    """
    a = torch.as_tensor(decays, dtype=torch.float64).reshape(-1)
    if not len(a) or not bool(((a > 0) & (a < 1)).all()):
        raise SsmlensError("decays are numbers between 0 and 1, and at least one")
    if limit < 1:
        raise SsmlensError(f"limit is at least 1, got {limit}")
    to = format_of(dtype)
    starts = rounded(torch.exp2(torch.arange(STARTS, dtype=torch.float64) / STARTS), to)
    lives, floors = _nearest(a[:, None], starts, to, limit)
    return Result(
        name="half_life",
        value=lives[:, 0],
        dims=("decay",),
        units="tokens",
        coords={"decay": a.tolist()},
        columns={"floor": floors[:, 0], "half_life_shortest": lives.amin(1), "half_life_longest": lives.amax(1)},
        control={"exact": -math.log(2) / a.log(), "stochastic": _stochastic(a, to, limit, seed)},
        settings={"dtype": to.name, "limit": limit, "starts": STARTS, "copies": COPIES, "seed": seed},
        assumes=("Nothing is written: a state that is driven is rounded to a different neighbour at every token.",),
        checked_by="stall law 1 - a < 2^-(p+1); tests/analyses/precision/test_stall.py",
    )


def stalled_share(a: float, dtype: str | torch.dtype | Format = "bfloat16") -> float:
    """Share of a binade's numbers h in [1, 2) with round(a * h) = h: 1 below the stall law, 0 from 2^-p on.

    Args:
        a: decay.
        dtype: format of the state.
    """
    to = format_of(dtype)
    if to.digits > 16:
        raise SsmlensError(f"{to.name} has too many numbers in a binade to try each: choose a shorter format")
    h = 1 + torch.arange(2 ** (to.digits - 1), dtype=torch.float64) / 2 ** (to.digits - 1)
    return float((rounded(a * h, to) == h).double().mean())


def _nearest(a: Tensor, starts: Tensor, to: Format, limit: int) -> tuple[Tensor, Tensor]:
    """Half-lives and floors, (decay, start)."""
    start = starts.expand(len(a), -1)
    h, lives = start.clone(), torch.full(start.shape, torch.nan, dtype=torch.float64)
    floors = torch.zeros_like(lives)
    for t in range(1, limit + 1):
        after = rounded(a * h, to)
        lives = torch.where(lives.isnan() & (after <= start / 2), float(t), lives)
        stopped = after == h
        floors = torch.where(stopped, after / start, floors)
        h = after
        if bool(stopped.all()):
            break
    return torch.where(lives.isnan() & (floors > 0), math.inf, lives), floors


def _stochastic(a: Tensor, to: Format, limit: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    h = torch.ones(len(a), COPIES, dtype=torch.float64)
    lives = torch.full((len(a),), torch.nan, dtype=torch.float64)
    for t in range(1, limit + 1):
        h = rounded(a[:, None] * h, to, "stochastic", generator)
        lives = torch.where(lives.isnan() & (h.mean(1) <= 0.5), float(t), lives)
        if not bool(lives.isnan().any()):
            break
    return lives
