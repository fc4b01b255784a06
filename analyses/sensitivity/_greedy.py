"""Parts taken out one after another, the one that is missed least first, against the order of single removals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.sensitivity._removal import described, fingerprint
from ssmlens.analyses.sensitivity._text import Text
from ssmlens.analyses.sensitivity._units import Model, Unit, units_of
from ssmlens.bootstrap import BLOCKS, block_sums, ratio_interval
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens

__all__ = ["greedy", "rank_correlation"]

RESAMPLES = 1000


def greedy(
    lens: Lens, prompt: Any, kind: str = "block", steps: int | None = None, *, layers: Iterable[int] | None = None,
    group: int | None = None, targets: Sequence[int] | None = None, orders: int = 3, seed: int = 0,
    resume: str | Path | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Take out the part that is missed least, again and again (Mamba-Shedder, Munoz et al. 2025).

    Each step tries every part that is left beside those that are out: steps * (2 * parts - steps + 1) / 2 passes.

    Args:
        lens: a model whose layers all are mixers.
        prompt: whatever `Lens.trace` takes.
        kind, layers, group, targets: which parts and which losses, see `removal`.
        steps: how many to take out; half of them by default.
        orders: random orders of the control.
        seed: of the random orders, the bootstrap and the permutations.
        resume: file that keeps each step that is done; a run with the same settings goes on there.
        progress: called with the steps done and the steps there are.

    Returns:
        Loss in nats a token after each step, (step,), step 0 being the whole model. Columns: ``low`` and ``high``,
        95 % of the block bootstrap of the loss's change added to the whole model's loss, ``layer`` and ``head`` of
        the part of this step (-1 for none), ``rank_correlation`` (Spearman's rho of the change that each part makes
        alone with the step at which it goes; parts that stay go last) with ``rank_low`` and ``rank_high`` from
        drawing stretches of the text again. Control: ``single_order``, the loss when parts go by their single change
        instead; ``random_order``, the mean loss over random orders; ``rank_null``, the rho that 95 % of random orders
        stay below.

    Raises:
        SsmlensError: for an unknown part, a number of steps that is not there, or an empty text.
        LayerError: for a layer that does not exist.
        UnsupportedModelError: when a layer is no mixer.
    """
    units, text = units_of(lens, kind, layers, group), Text.of(lens, prompt, targets)
    steps = max(1, len(units) // 2) if steps is None else steps
    if not 1 <= steps <= len(units) or len(units) < 2 or orders < 0:
        raise SsmlensError(f"steps is from 1 to the {len(units)} parts there are, of at least two, got {steps}")
    model = Model(lens, text)
    about = {"part": kind, "group": group, "layers": sorted({u.layer for u in units}), **fingerprint(text)}
    ledger = Ledger(resume, {**text.settings, **about})
    total = steps * (2 + orders)

    def tick(done: int) -> None:
        if progress is not None:
            progress(done, total)

    base = model.remember()
    order, losses, single = _shed(model, units, steps, base, ledger, tick)
    alone = single.sum(0) / text.count
    by_single = alone.argsort(stable=True)[:steps].tolist()
    generator = torch.Generator().manual_seed(seed)
    chosen = [by_single] + [torch.randperm(len(units), generator=generator)[:steps].tolist() for _ in range(orders)]
    others = []
    for i, path in enumerate(chosen):
        key = f"order {i}" if i == 0 else f"order {i} of seed {seed}"
        others.append(_along(model, units, path, f"{key}: ", ledger, steps * (1 + i), tick))
    rank = _ranks(order, single, len(units), seed)
    low, high = _intervals(losses, base)
    gone = [Unit(kind, -1), *(units[i] for i in order)]
    columns = {name: x[:, 0] for name, x in described(gone).items()}
    mean = base.mean().reshape(1)
    return Result(
        name="loss",
        value=torch.cat([mean, torch.stack([x.mean() for x in losses])]),
        dims=("step",),
        units="nats per token",
        columns={"low": torch.cat([mean, low]), "high": torch.cat([mean, high]), **columns, **rank["columns"]},
        control={
            "single_order": torch.cat([mean, others[0]]),
            "random_order": torch.cat([mean, torch.stack(others[1:]).mean(0)])
            if orders
            else torch.full((steps + 1,), torch.nan),
            "rank_null": rank["null"],
        },
        settings={**text.settings, **about, "steps": steps, "orders": orders, "seed": seed,
                  "order": [units[i].label for i in order]},
        assumes=(
            "Greedy is no search for the best set: a pair that is only worthless together is never found.",
            "Chosen and judged on the same text, so the loss is optimistic: more so the more parts there are to choose "
            "from.",
        ),
        checked_by="each step against a search by interventions.ablate; tests/analyses/sensitivity/test_greedy.py",
    )  # fmt: skip


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's rho of two lists of numbers, ties sharing their rank; NaN when either has one value only."""
    from scipy.stats import rankdata

    x, y = (rankdata(np.asarray(v, dtype=float)) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def _shed(
    model: Model, units: Sequence[Unit], steps: int, base: Tensor, ledger: Ledger, tick: Callable[[int], None]
) -> tuple[list[int], list[Tensor], Tensor]:
    """The order, losses (count,) after each step, and block sums (blocks, parts) of each part's change alone."""
    order: list[int] = []
    losses: list[Tensor] = []
    single = torch.empty(0)
    for step in range(steps):

        def attempt(taken: tuple[int, ...] = tuple(order), first: bool = step == 0) -> dict[str, Any]:
            model.remember([units[i] for i in taken])
            left = [i for i in range(len(units)) if i not in taken]
            tried = {i: model.losses([units[i]]) for i in left}
            best = min(left, key=lambda i: (float(tried[i].mean()), i))
            found: dict[str, Any] = {"part": best, "losses": tried[best].tolist()}
            if first:
                found["single"] = torch.stack([block_sums(tried[i] - base) for i in left], dim=1).tolist()
            return found

        part = ledger.get(f"step {step}", attempt)
        order.append(int(part["part"]))
        losses.append(torch.tensor(part["losses"], dtype=torch.float64))
        if step == 0:
            single = torch.tensor(part["single"], dtype=torch.float64)
        tick(step + 1)
    return order, losses, single


def _along(
    model: Model, units: Sequence[Unit], path: Sequence[int], key: str, ledger: Ledger, before: int,
    tick: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """Mean loss after each step of a given order, (steps,)."""
    found = []
    for k in range(len(path)):

        def run(gone: Sequence[int] = tuple(path[: k + 1])) -> float:
            return float(model.remember([units[i] for i in gone]).mean())

        found.append(float(ledger.get(f"{key}{' '.join(map(str, path[: k + 1]))}", run)))
        tick(before + k + 1)
    return torch.tensor(found, dtype=torch.float64)


def _ranks(order: Sequence[int], single: Tensor, parts: int, seed: int) -> dict[str, Any]:
    """Rho of single change and greedy place, its interval over blocks, and what random orders reach."""
    place = np.full(parts, len(order))
    place[list(order)] = np.arange(len(order))
    rho = rank_correlation(single.sum(0), place)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(single), (RESAMPLES // 2, len(single)), generator=generator)
    again = [rank_correlation(single[which].sum(0), place) for which in drawn]
    low, high = np.nanquantile(again, [0.025, 0.975])
    shuffled = [
        rank_correlation(single.sum(0)[torch.randperm(parts, generator=generator)], place) for _ in range(RESAMPLES)
    ]
    named = {"rank_correlation": rho, "rank_low": low, "rank_high": high}
    columns = {k: torch.tensor([float(x)], dtype=torch.float64) for k, x in named.items()}
    return {"columns": columns, "null": torch.tensor([float(np.nanquantile(shuffled, 0.95))])}


def _intervals(losses: Sequence[Tensor], base: Tensor) -> tuple[Tensor, Tensor]:
    """Ends for each step: the whole model's loss with the interval of the change."""
    change = torch.stack([x - base for x in losses], dim=1)
    low, high = ratio_interval(block_sums(change, BLOCKS), block_sums(torch.ones(len(base), 1), BLOCKS))
    return base.mean() + low, base.mean() + high
