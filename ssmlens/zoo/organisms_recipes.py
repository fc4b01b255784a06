"""What each organism is: a small model that has learned one task of `ssmlens.tasks`, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ssmlens.tasks import MQAR, Copy, Lorenz, Parity, Passkey, Task, TokenTask

from .recipes import COMMON, HEADS

__all__ = ["ORGANISMS", "Organism", "Stage", "organism"]

SMOKE_STEPS = 3


@dataclass(frozen=True)
class Stage:
    """A stretch of training: ``steps`` batches of ``rows`` rows, of the tasks in turn."""

    tasks: tuple[Task, ...]
    rows: int
    steps: int


@dataclass(frozen=True)
class Organism:
    """One organism.

    name: of its folder; topic: what it shows ("recall", "passkey", "copy", "parity", "forecast"); kind: "mamba2",
    "sign-counter" or "forecaster"; config: of the model; stages: of training, one after the other under one schedule;
    rate: peak learning rate; others: rates tried besides, for the learning-rate window; start: organism whose weights
    it goes on from, of whose states the strongest are kept where this one has fewer; jitter: size of noise on a
    forecaster's inputs.
    """

    name: str
    topic: str
    kind: str
    config: dict[str, Any]
    stages: tuple[Stage, ...]
    rate: float
    others: tuple[float, ...] = ()
    start: str | None = None
    jitter: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def task(self) -> Task:
        """A task that it is trained on, for its vocabulary."""
        return self.stages[-1].tasks[0]

    def at(self, step: int) -> tuple[Task, int]:
        """Task and rows of a step."""
        for stage in self.stages:
            if step < stage.steps:
                return stage.tasks[step % len(stage.tasks)], stage.rows
            step -= stage.steps
        raise IndexError(f"{self.name} has {self.steps} steps")

    def smoke(self) -> Organism:
        """The same with a few steps of a few rows."""
        stages = tuple(replace(s, rows=2, steps=SMOKE_STEPS) for s in self.stages)
        return replace(self, stages=stages, start=None, others=self.others[:1])


def _mamba2(task: TokenTask, n: int, d: int = 64, layers: int = 2) -> dict[str, Any]:
    """A Mamba-2 of the size of the shipped recall model, with state size n."""
    size = {"hidden_size": d, "num_hidden_layers": layers, "state_size": n, "num_heads": d // 16, "head_dim": 32}
    return COMMON | HEADS | {"vocab_size": task.n_tokens, "initializer_range": 0.06} | size


# Short rows first: there the binding of values to keys is found soonest; then loads that a small state cannot hold.
LOADED = Stage(tuple(MQAR(64, k) for k in (4, 8, 16)), 32, 800)
RECALL = (Stage(tuple(MQAR(32, k) for k in (2, 4, 8)), 64, 600), LOADED)
SHORT, LONG = 48, 512
PASSKEY = Stage((Passkey(24), Passkey(32), Passkey(SHORT)), 64, 1800)
LONGER = (
    Stage((Passkey(SHORT), Passkey(96), Passkey(192)), 24, 300),
    Stage((Passkey(96), Passkey(256), Passkey(LONG)), 10, 400),
)
COPY = (
    Stage(tuple(Copy(n) for n in (2, 4, 8)), 64, 500),
    Stage(tuple(Copy(n) for n in (2, 4, 8, 12, 16)), 64, 1500),
)
PARITY = (Stage(tuple(Parity(length=t) for t in (4, 8, 12, 16)), 64, 1500),)
LORENZ = (
    Stage((Lorenz(length=48, burn=0), Lorenz(length=48, burn=20), Lorenz(length=48)), 32, 2500),
)  # fmt: skip


_BASE = Organism("organism-recall-base", "recall", "mamba2", _mamba2(MQAR(), 16), RECALL, 5e-3, others=(1e-3, 2e-2))


def _recall(n: int) -> Organism:
    """Goes on from the base with its strongest n states: from nothing a small state may never find the binding."""
    plan = replace(_BASE, name=f"organism-recall-n{n}", config=_mamba2(MQAR(), n), others=(), start=_BASE.name)
    return replace(plan, stages=(replace(LOADED, steps=500),))


def _sign(name: str, low: float) -> Organism:
    config = {"tokens": 2, "channels": 16, "low": low, "hidden": 32}
    return Organism(name, "parity", "sign-counter", config, PARITY, 1e-2, weight_decay=3.0)


_SHORT = Organism("organism-passkey-short", "passkey", "mamba2", _mamba2(Passkey(), 16), (PASSKEY,), 5e-3)

ORGANISMS: dict[str, Organism] = {
    plan.name: plan
    for plan in (
        _BASE,
        _recall(2),
        _recall(4),
        _recall(8),
        _recall(16),
        _sign("organism-parity-signed", -1.0),
        _sign("organism-parity-positive", 0.0),
        Organism("organism-parity-mamba2", "parity", "mamba2", _mamba2(Parity(), 8, d=32), PARITY, 5e-3),
        _SHORT,
        replace(_SHORT, name="organism-passkey-long", stages=LONGER, rate=2e-3, start=_SHORT.name),
        Organism("organism-copy", "copy", "mamba2", _mamba2(Copy(), 16), COPY, 5e-3),
        Organism(
            "organism-lorenz", "forecast", "forecaster",
            {"series": 3, "d": 32, "layers": 2, "channels": 32, "n": 4, "slowest": 0.6},
            LORENZ, 5e-3, jitter=0.02, weight_decay=0.0,
        ),
    )
}  # fmt: skip


def organism(name: str) -> Organism:
    """The recipe of an organism.

    Raises:
        KeyError: for a name that is none of them.
    """
    if name not in ORGANISMS:
        raise KeyError(f"no organism {name!r}: they are {', '.join(ORGANISMS)}")
    return ORGANISMS[name]
