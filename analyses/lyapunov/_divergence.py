"""Generation with drawn tokens: do two runs that share their chance stay together?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov._checkpoint import Checkpoint, digest
from ssmlens.analyses.lyapunov._model import NO_CACHE, Model, Prompt
from ssmlens.analyses.lyapunov._statistics import bootstrap
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens
from ssmlens.stepping import State

__all__ = ["divergence"]

NOISE = 100.0
"""How far above that of rounding a KL has to be to tell of the disturbance."""

SAVE_EVERY = 50
"""Tokens between two checkpoints."""


def divergence(
    lens: Lens,
    prompt: Prompt,
    steps: int = 200,
    *,
    pairs: int = 16,
    size: float = 1e-2,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """How fast pairs of generations part that differ by a small disturbance of the state and share all chance.

    Both runs of a pair draw their tokens with the same Gumbel noise, so that they draw the same token unless the
    disturbance has moved the logits far enough. A third run of each pair is not disturbed but computed in another
    order, row by row instead of in a batch: what it does is rounding alone.

    Args:
        lens: the model.
        prompt: the text that all runs continue.
        steps: tokens drawn.
        pairs: pairs with noise of their own.
        size: of the disturbance, as a share of the norm of each layer's state and of each window, in a random
            direction.
        temperature: of the draws.
        dtype: of the model.
        seed: of disturbance and noise.
        resume: a file that keeps the run.
        progress: called with the tokens done and the tokens there are.

    Returns:
        Value (step,): the share of pairs whose tokens differ at that step, with ``low`` and ``high`` (95 %, bootstrap
        over pairs), the columns ``parted``: the share that has differed at any step so far, ``kl``: the median over
        the pairs of KL(undisturbed || disturbed) of the next token in nats, and ``rate``: the slope of log KL per
        token over the steps at which no pair has parted and KL stands above that of rounding (NaN for fewer than
        three). Controls ``rounding`` and ``rounding_kl``: the same of the undisturbed run in another order.

    Raises:
        SsmlensError: for sizes or temperatures that are not above 0.
    """
    for name, given in (("size", size), ("temperature", temperature)):
        if not 0 < given < math.inf:
            raise SsmlensError(f"{name} is above 0, got {given}")
    if steps < 1 or pairs < 1:
        raise SsmlensError(f"steps and pairs are at least 1, got {steps} and {pairs}")
    model = Model.of(lens, prompt, dtype)
    settings = {"study": "divergence", **model.settings(), "ids": digest(model.ids)}
    settings |= {"steps": steps, "pairs": pairs, "size": size, "temperature": temperature, "seed": seed}
    run = _Run(model, pairs, size, temperature, seed)
    file = Checkpoint(resume, settings, model.ids)
    file.restore(run.restore)
    with torch.no_grad():
        while len(run.differ) < steps:
            run.step()
            done = len(run.differ)
            if file and (done % SAVE_EVERY == 0 or done == steps):
                file.save(run.tensors())
            if progress is not None:
                progress(done, steps)
    return _result(torch.stack(run.differ), torch.stack(run.kl), settings)


class _Run:
    """Three generations of every pair: undisturbed, disturbed, and undisturbed in another order."""

    def __init__(self, model: Model, pairs: int, size: float, temperature: float, seed: int) -> None:
        self.model, self.pairs, self.temperature, self.seed = model, pairs, temperature, seed
        self.differ: list[Tensor] = []
        self.kl: list[Tensor] = []
        with torch.no_grad():
            state, logits = model.net.run(model.net.initial(), model.ids, logits="last")
        assert logits is not None
        plain = state.map(lambda x: x.expand(pairs, *x.shape[1:]).clone())
        generator = torch.Generator().manual_seed(seed)
        self.states = [plain, plain.map(lambda x: _disturbed(x, size, generator)), plain]
        self.logits = [logits.expand(pairs, -1).clone() for _ in range(3)]

    def step(self) -> None:
        """Draw a token in every run, compare, and go on."""
        noise = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + len(self.differ))
        uniform = torch.rand(self.logits[0].shape, generator=noise, dtype=torch.float64)
        gumbel = -(-uniform.clamp(min=1e-300).log()).log()
        drawn = [(x.double().cpu() / self.temperature + gumbel).argmax(1) for x in self.logits]
        self.differ.append(torch.stack([drawn[i] != drawn[0] for i in (1, 2)]).double())
        for i in (0, 1):
            self.states[i], self.logits[i] = self.model.net.step(self.states[i], drawn[i])
        self.states[2], self.logits[2] = self._one_by_one(self.states[2], drawn[2])
        laws = [torch.log_softmax(x.double().cpu() / self.temperature, dim=1) for x in self.logits]
        self.kl.append(torch.stack([_kl(laws[0], laws[i]) for i in (1, 2)]))

    def _one_by_one(self, state: State, ids: Tensor) -> tuple[State, Tensor]:
        flat = state.flatten()
        alone = [self.model.like.unflatten(flat[i : i + 1]) for i in range(self.pairs)]
        rows = [self.model.net.step(own, ids[i : i + 1]) for i, own in enumerate(alone)]
        flat = torch.cat([after.flatten() for after, _ in rows])
        return self.model.like.unflatten(flat), torch.cat([logits for _, logits in rows])

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"state{i}": x.flatten() for i, x in enumerate(self.states)}
        kept |= {f"logits{i}": x for i, x in enumerate(self.logits)}
        return kept | {"differ": torch.stack(self.differ), "kl": torch.stack(self.kl)}

    def restore(self, kept: dict[str, Tensor]) -> None:
        device = self.model.ids.device
        self.states = [self.model.like.unflatten(kept[f"state{i}"].to(device)) for i in range(3)]
        self.logits = [kept[f"logits{i}"].to(device) for i in range(3)]
        self.differ, self.kl = list(kept["differ"]), list(kept["kl"])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) (b,) of log laws (b, v), also where it is far below the rounding of either.

    The sum of p (e^d - 1 - d) with d = q - p has no negative term, as both laws sum to one.
    """
    d = q - p
    each = torch.where(d.abs() < 1e-4, d * d * (0.5 + d / 6), torch.expm1(d) - d)
    # A token that p rules out counts with all of q.
    return torch.where(p > -math.inf, p.exp() * each, q.exp()).sum(1)


def _disturbed(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Each row moved by ``size`` times its norm in a random direction."""
    if not x[0].numel():
        return x
    draw = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    norms = [v.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1)) for v in (x, draw)]
    return x + draw * (size * norms[0] / norms[1])


def _result(differ: Tensor, kl: Tensor, settings: dict[str, object]) -> Result:
    """From what differed (steps, 2, pairs) and KL (steps, 2, pairs)."""
    parted = differ.cummax(0).values.mean(2)
    _, low, high = bootstrap(differ[:, 0].T)
    median = kl.median(2).values
    return Result(
        name="divergence",
        value=differ[:, 0].mean(1),
        dims=("step",),
        units="share of pairs",
        coords={"step": list(range(1, len(differ) + 1))},
        columns={"low": low, "high": high, "parted": parted[:, 0], "kl": median[:, 0], "rate": _rate(kl, differ)},
        control={"rounding": differ[:, 1].mean(1), "rounding_kl": median[:, 1], "rounding_parted": parted[:, 1]},
        settings={**settings, "interval": "95 %, bootstrap over pairs"},
        assumes=(
            "the noise of a draw is shared, which is one of many ways to couple two random generations",
            "after the first different token the two runs read different texts: from there on the share of differing "
            "tokens measures how alike such texts are, not how a small disturbance grows",
            NO_CACHE,
        ),
        checked_by="an undisturbed pair never parts in float64: tests/analyses/lyapunov/test_divergence.py",
    )


def _rate(kl: Tensor, differ: Tensor) -> Tensor:
    """Slope of the mean log KL per step, while no pair has parted and every KL is well above rounding."""
    quiet = (differ[:, 0] > 0).any(1) | (kl[:, 0] <= NOISE * kl[:, 1]).any(1) | (kl[:, 0] <= 0).any(1)
    together = int((quiet.cumsum(0) == 0).sum())
    if together < 3:
        return torch.tensor(math.nan, dtype=torch.float64)
    logs = kl[:together, 0].log().mean(1)
    t = torch.arange(together, dtype=torch.float64)
    t = t - t.mean()
    return (t * (logs - logs.mean())).sum() / (t * t).sum()
