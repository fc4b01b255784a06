"""Known answers the generators are held to: chance levels in closed form, oracles, exact laws of the series."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ssmlens.analyses._check import Check

from . import (
    MQAR,
    NARMA,
    Copy,
    GroupWord,
    Lorenz,
    MackeyGlass,
    Outliers,
    Parity,
    TextTask,
    copy_bound,
    group_table,
    make,
    names,
)

__all__ = ["CHECKS"]


def oracles() -> tuple[float, float]:
    """Worst score of an oracle, over all tasks on tokens and on text, at their default settings."""
    worst = 1.0
    for name in names():
        task = make(name)
        if isinstance(task, TextTask):
            texts = task.batch(50, 1)
            worst = min(worst, task.score([task.oracle(p) for p in texts.prompts], texts))
        elif name not in ("lorenz", "mackey_glass", "narma"):
            batch = task.batch(50, 1)
            worst = min(worst, task.score(task.oracle(batch), batch))
    return worst, 1.0


def baseline(name: str, guess: str, rows: int) -> Callable[[], tuple[float, float]]:
    """Measured and closed-form score of a simple predictor."""

    def run() -> tuple[float, float]:
        task = make(name)
        assert not isinstance(task, TextTask)
        batch = task.batch(rows, 2)
        return task.score(task.guess(batch, guess, 3), batch), task.baselines[guess]

    return run


def plateau() -> tuple[float, float]:
    """Entropy in nats of the told values, each equally likely: the loss of knowing the set but not the binding."""
    task = MQAR(pairs=8)
    batch = task.batch(200, 0)
    told = batch.ids[:, 1 : 2 * task.pairs : 2]
    share = (told[:, :, None] == batch.targets[batch.mask].reshape(200, 1, -1)).double().mean(1)
    return float(-share.log().mean()), task.plateau


def parity_by_sign() -> tuple[float, float]:
    """The recurrence h = (1 - 2 x) h with h = 1 at the start: its sign is the parity, at any length."""
    task = Parity(length=20_000)
    batch = task.batch(4, 5)
    h = np.cumprod(1 - 2 * batch.ids.numpy(), 1)
    return float(((h < 0) == batch.targets.numpy()).mean()), 1.0


def a5() -> tuple[float, float]:
    """Elements of A5 that are products of commutators: all 60, since A5 is perfect."""
    table = group_table("A5")
    inverse = np.argmax(table == 0, 1)
    x, y = np.meshgrid(np.arange(60), np.arange(60))
    found = set(table[table[x, y], table[inverse[x], inverse[y]]].ravel().tolist())
    while (more := found | {int(table[a, b]) for a in found for b in found}) != found:
        found = more
    return float(len(found)), 60.0


def words_uniform() -> tuple[float, float]:
    """Share of the commonest product at the last place of S3 words."""
    last = GroupWord("S3", 20).batch(60_000, 6).targets[:, -1]
    return float(last.bincount().max() / len(last)), 1 / 6


def lorenz_moments() -> tuple[float, float]:
    """<x x> / (beta <z>) along the attractor."""
    task = Lorenz(length=5_000)
    found = task.moments(task.batch(16, 7))
    return found["xx"] / found["z"], task.beta


def lorenz_volume() -> tuple[float, float]:
    """Sum of the exponents per unit of time from the Jacobian's determinant along an orbit."""
    import torch

    task = Lorenz(length=200, dt=0.005)  # the error of the method falls with the fourth power of its step
    orbit = task.batch(1, 8).ids[0]
    orbit = orbit.requires_grad_()
    after = task.step(orbit)
    rows = [torch.autograd.grad(after[:, i].sum(), orbit, retain_graph=True)[0] for i in range(3)]
    jacobian = torch.stack(rows, 1)
    rate = torch.linalg.slogdet(jacobian).logabsdet.mean() / task.interval
    return float(rate), -(task.sigma + 1 + task.beta)


def mackey_glass_fixed_point() -> tuple[float, float]:
    """1 stays 1 where gain = 2 loss."""
    task = MackeyGlass()
    return float(task.solve(np.ones((1, 10 * task.tau + 1)), 50)[0, -1]), 1.0


def mackey_glass_decay() -> tuple[float, float]:
    """Without gain: exp(-loss t)."""
    task = MackeyGlass(gain=0.0)
    return float(task.solve(np.ones((1, 10 * task.tau + 1)), 20)[0, -1]), math.exp(-0.1 * 20)


def narma_fixed_point() -> tuple[float, float]:
    """At constant input u: the smaller root of 0.5 y^2 - 0.7 y + 1.5 u^2 + 0.1 = 0."""
    u = 0.2
    y = NARMA().respond(np.full((1, 500), u))[0, -1]
    return float(y), 0.7 - math.sqrt(0.49 - 2 * (1.5 * u * u + 0.1))


def votes() -> tuple[float, float]:
    """The vote with outliers, against its closed form."""
    task = Outliers(examples=9, share=0.4, patterns=2)
    batch = task.batch(20_000, 9)
    return task.score(task.guess(batch, "vote", 10), batch), task.baselines["vote"]


def bound() -> tuple[float, float]:
    """8 symbols of 16 kinds are 32 bits: a state of 30 bits brings back a quarter of the strings."""
    return copy_bound(30, 8, 16), 2.0 ** (30 - Copy(8, 16).bits)


# Tolerances of measured shares are four standard errors of so many independent draws.
CHECKS: tuple[Check, ...] = (
    Check("tasks: oracles", "every question can be answered from the input alone", oracles, 0.0),
    Check("tasks: MQAR, any value told", "accuracy 1 / K", baseline("mqar", "told", 2500), 0.0094),
    Check("tasks: MQAR plateau", "loss ln K when only the set of values is known", plateau, 1e-12, source="section 14"),
    Check("tasks: phonebook, any number told", "1/n + (1 - 1/n)/10", baseline("phonebook_tokens", "told", 9000), 0.014),
    Check("tasks: passkey, any digit", "1 / 10", baseline("passkey", "uniform", 4000), 0.0085),
    Check("tasks: needles, any value told", "1 / (keys values)", baseline("needles", "told", 9000), 0.018),
    Check("tasks: copy, any symbol told", "1/n + (1 - 1/n)/V", baseline("copy", "told", 2500), 0.0066),
    Check("tasks: copy bound", "2^b / V^n", bound, 1e-12, source="Jelassi et al. 2024"),
    Check("tasks: outliers, majority vote", "hypergeometric sum", votes, 0.013),
    Check("tasks: parity by a = 1 - 2 x", "sign of the product, 20,000 tokens", parity_by_sign, 0.0),
    Check("tasks: A5 is perfect", "its commutators generate all 60 elements", a5, 0.0),
    Check("tasks: S3 words are uniform", "1 / 6", words_uniform, 0.0075),
    Check("tasks: Lorenz moments", "<x x> = beta <z>", lorenz_moments, 0.01, relative=True),
    Check("tasks: Lorenz volume", "sum of exponents -(sigma + 1 + beta)", lorenz_volume, 1e-6, relative=True),
    Check("tasks: Mackey-Glass fixed point", "1 where gain = 2 loss", mackey_glass_fixed_point, 1e-12),
    Check("tasks: Mackey-Glass decay", "exp(-loss t) without gain", mackey_glass_decay, 1e-9),
    Check("tasks: NARMA fixed point", "root of a quadratic", narma_fixed_point, 1e-12),
)
