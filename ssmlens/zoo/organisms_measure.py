"""What an organism's card says: accuracy against load, length or depth; a forecaster's errors and its spectrum."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssmlens.tasks import MQAR, Batch, Copy, Lorenz, Parity, Passkey, TokenTask

from .organisms_models import Forecaster, SignCounter
from .organisms_recipes import Organism

__all__ = ["accuracy", "free_run", "loop_spectrum", "measure"]

TEST_SEED = 1_000
ROWS = 200
TOKENS = 2**14  # run together
LOADS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 31)
LOAD_LENGTH = 128
PASSKEY_LENGTHS = (24, 48, 96, 192, 384, 512, 768, 1024, 2048, 4096, 8192)
DEPTHS = (0.1, 0.5, 0.9)
COPIES = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32)
PARITY_LENGTHS = (4, 8, 12, 16, 20, 24, 32, 64, 256, 1024, 4096, 16_384)
RUNS, HORIZON = 50, 500
SPECTRUM_STEPS, SPECTRUM_K, SPECTRUM_DISCARD = 12_000, 5, 500


def _interval(share: Tensor) -> tuple[float, float]:
    """Mean of the rows' shares, and 1.96 standard errors of it."""
    spread = float(share.std()) / math.sqrt(len(share)) if len(share) > 1 else 0.0
    return round(float(share.mean()), 4), round(1.96 * spread, 4)


@torch.no_grad()
def _named(model: Any, batch: Batch) -> Tensor:
    """(b, t) tokens that a model names, run a few rows at a time."""
    rows = max(1, TOKENS // batch.ids.shape[1])
    named = []
    for ids in batch.ids.split(rows):
        logits = model(ids) if isinstance(model, SignCounter) else model(ids, use_cache=False).logits
        named.append(logits.argmax(-1))
    return torch.cat(named)


def accuracy(model: Any, task: TokenTask, rows: int = ROWS, seed: int = TEST_SEED) -> dict[str, Any]:
    """Accuracy of a model on fresh rows of a task.

    Args:
        model: in eval mode.
        task: what is asked.
        rows: rows drawn.
        seed: of the draw.

    Returns:
        ``accuracy`` over asked positions with ``margin`` (1.96 standard errors between rows), ``whole`` share of
        rows without a mistake, ``chance`` best closed-form baseline, ``rows``.
    """
    batch = task.batch(rows, seed)
    right = (_named(model, batch) == batch.targets) & batch.mask
    share = right.sum(1).double() / batch.mask.sum(1)
    mean, margin = _interval(share)
    whole = round(float((share == 1).double().mean()), 4)
    return {"accuracy": mean, "margin": margin, "whole": whole, "chance": round(task.chance, 4), "rows": rows}


def _fewer(length: int) -> int:
    """Rows for a long length: as many tokens, at most, as 64 rows of 1024."""
    return max(8, min(ROWS, 2**16 // length))


def _recall(plan: Organism, model: Any) -> dict[str, Any]:
    config, task = plan.config, plan.task
    assert isinstance(task, MQAR)
    values = len(task.answers)
    channels = config["num_heads"] * config["head_dim"]
    law = load_law(config["state_size"], channels, values)
    table = [
        {"length": LOAD_LENGTH, "pairs": k, **accuracy(model, MQAR(LOAD_LENGTH, k)), "law": share}
        for k, share in zip(LOADS, law)
    ]
    trained = [{"length": 64, "pairs": k, **accuracy(model, MQAR(64, k))} for k in (4, 8, 16)]
    # One state of N x (H P) numbers, since the heads share their keys; and K* = N H P / (2 ln V).
    return {
        "loads": table, "trained": trained, "half_load": round(_crossing(table), 2),
        "law_load": round(config["state_size"] * channels / (2 * math.log(values)), 2),
    }  # fmt: skip


def load_law(states: int, channels: int, values: int) -> list[float]:
    """Accuracy at each of LOADS of an associative memory of so many states and channels with random keys."""
    from ssmlens.analyses import capacity

    return [round(float(x), 4) for x in capacity.hebbian_load(states, channels, values, LOADS).value]


def _crossing(table: list[dict[str, Any]], level: float = 0.5) -> float:
    """Load at which the accuracy falls to a level, by straight lines between measured loads; inf when it does not."""
    for low, high in itertools.pairwise(table):
        a, b = low["accuracy"], high["accuracy"]
        if a >= level > b:
            return low["pairs"] + (a - level) / (a - b) * (high["pairs"] - low["pairs"])
    return math.inf if table[-1]["accuracy"] >= level else 0.0


def _passkey(plan: Organism, model: Any) -> dict[str, Any]:
    lengths = [{"length": t, **accuracy(model, Passkey(t), _fewer(t))} for t in PASSKEY_LENGTHS]
    depths = [
        {"length": t, "depth": d, **accuracy(model, Passkey(t, depth=d), _fewer(t))}
        for t in (192, 512, 2048)
        for d in DEPTHS
    ]
    return {"lengths": lengths, "depths": depths}


def _copy(plan: Organism, model: Any) -> dict[str, Any]:
    config = plan.config
    table = [{"count": n, "bits": round(Copy(n).bits, 1), **accuracy(model, Copy(n))} for n in COPIES]
    good = [row for row in table if row["whole"] >= 0.9]
    numbers = config["num_hidden_layers"] * config["num_heads"] * config["head_dim"] * config["state_size"]
    return {
        "counts": table, "state_numbers": numbers, "state_bits": 32 * numbers,
        "longest": good[-1]["count"] if good else 0, "effective_bits": good[-1]["bits"] if good else 0.0,
    }  # fmt: skip


def _parity(plan: Organism, model: Any) -> dict[str, Any]:
    lengths = []
    for t in PARITY_LENGTHS:
        batch = Parity(length=t).batch(_fewer(t), TEST_SEED)
        right = (_named(model, batch) == batch.targets)[:, -max(1, t // 4) :].double().mean(1)
        mean, margin = _interval(right)
        lengths.append({"length": t, "accuracy": mean, "margin": margin, "chance": 0.5, "rows": len(batch)})
    found: dict[str, Any] = {"lengths": lengths}
    if isinstance(model, SignCounter):
        found["decays"] = [[round(float(x), 5) for x in row] for row in model.decays()]
    return found


@torch.no_grad()
def free_run(model: Forecaster, task: Lorenz, runs: int = RUNS, horizon: int = HORIZON, warm: int = 50) -> Tensor:
    """How long the closed loop stays with the flow: (runs,) units of time until the error exceeds 0.4 of the spread.

    Args:
        model: a forecaster in float64.
        task: the flow.
        runs: starts on the attractor.
        horizon: samples followed at most.
        warm: samples read before.
    """
    series = replace(task, length=warm + horizon, burn=1_000).batch(runs, TEST_SEED).ids
    state = torch.stack([model.warm(row[:warm]) for row in series])
    spread = series.reshape(-1, 3).var(0).sum().sqrt()
    held = torch.full((runs,), float(horizon))
    for t in range(horizon):
        error = (state[:, :3] - series[:, warm + t]).norm(dim=1) / spread
        held = torch.where((error > 0.4) & (held == horizon), float(t), held)
        state = model.step(state)
    return held * task.interval


def loop_spectrum(model: Forecaster, task: Lorenz, steps: int = SPECTRUM_STEPS, k: int = SPECTRUM_K) -> dict[str, Any]:
    """Largest exponents of the closed loop per unit of time, with intervals, and the Kaplan-Yorke dimension.

    Args:
        model: a forecaster in float64.
        task: the flow it has learned.
        steps: of the orbit.
        k: exponents.
    """
    from ssmlens.analyses import lyapunov

    series = replace(task, length=100, burn=1_000).batch(1, TEST_SEED + 1).ids[0]
    with torch.no_grad():
        start = model.warm(series)
    found = lyapunov.spectrum(model.step, start, steps, k, discard=SPECTRUM_DISCARD, every=5, dt=task.interval)
    value = [float(x) for x in found.value]
    return {
        "exponents": [round(x, 4) for x in value],
        "standard_error": [round(float(x), 4) for x in found.columns["standard_error"]],
        "dimension": round(float(lyapunov.kaplan_yorke(value).value), 4),
        "steps": steps,
    }


def _forecast(plan: Organism, model: Any) -> dict[str, Any]:
    task = plan.task
    assert isinstance(task, Lorenz)
    exact = model.double()
    batch = replace(task, length=256, burn=1_000).batch(32, TEST_SEED)
    with torch.no_grad():
        error = task.score(exact(batch.ids)[:, 8:], _later(batch, 8))
    held = free_run(exact, task)
    mean, margin = _interval(held)
    result = {
        "error": float(f"{error:.3g}"), "persistence": round(task.persistence(batch), 5),
        "valid_time": mean, "valid_margin": margin, "interval": task.interval, "runs": len(held),
        "spectrum": loop_spectrum(exact, task),
        "flow": {"exponents": list(task.exponents), "dimension": task.dimension},
    }  # fmt: skip
    model.float()
    return result


def _later(batch: Batch, start: int) -> Batch:
    return Batch(batch.ids[:, start:], batch.targets[:, start:], batch.mask[:, start:])


def measure(plan: Organism, model: Any) -> dict[str, Any]:
    """What the card of an organism says.

    Args:
        plan: its recipe.
        model: trained, in eval mode, in float32.
    """
    by_topic = {"recall": _recall, "passkey": _passkey, "copy": _copy, "parity": _parity, "forecast": _forecast}
    return by_topic[plan.topic](plan, model)
