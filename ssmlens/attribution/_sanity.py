"""Checks of a method beyond orders of tokens: infidelity, sensitivity, and what random weights do to its scores."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmlens.attribution._baselines import Baseline
from ssmlens.attribution._common import Prompt
from ssmlens.attribution._forward import Network
from ssmlens.attribution._methods import one_method
from ssmlens.attribution._perturb import Masked
from ssmlens.attribution.result import Attribution
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens
from ssmlens.loading import load

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GROUPS", "Randomisation", "infidelity", "randomisation", "sensitivity"]

GROUPS = {
    "decay": ("A_log", "dt_bias", "dt_proj.bias"),
    "routing": ("x_proj", "dt_proj.weight"),
    "convolution": ("conv1d",),
    "projections": ("in_proj", "out_proj"),
    "embedding": ("embed",),
}
"""Parameter groups by parts of their names. In Mamba-2 the step size, write and read directions come out of in_proj."""


def infidelity(
    lens: Lens, attribution: Attribution, baseline: Baseline = "zero", samples: int = 64, seed: int = 0
) -> Tensor:
    """How far scores are from predicting what happens when random sets of tokens are taken away, (b,).

    ``E_I[(sum of scores over I - (f(x) - f(x without I)))^2]`` with f the logit, each token in I with probability 1/2
    (Yeh et al. 2019; captum's ``infidelity`` with binary masks over tokens). 0 for an additive f and its own terms.
    Only methods whose scores are in logits are meant.

    Args:
        lens, attribution: the model and what explained it.
        baseline: what stands in for a token.
        samples, seed: of the random sets.
    """
    from captum.metrics import infidelity as measured

    if attribution.ids is None:
        raise SsmlensError("this attribution does not hold its token ids, which infidelity needs")
    network, found = Network(lens), []
    generator = torch.Generator().manual_seed(seed)
    for i, stop in enumerate((attribution.position + 1).tolist()):
        x = network.embed(attribution.ids[i : i + 1, :stop])[0]
        masked = Masked.of(network, x, int(attribution.target[i]), baseline, "logit")
        drawn = torch.rand(samples, stop, generator=generator) < 0.5

        def perturb(keep: Tensor, drawn: Tensor = drawn) -> tuple[Tensor, Tensor]:
            gone = drawn.to(keep)
            return gone, keep - gone

        scores = attribution.scores[i : i + 1, :stop].to(x)
        keep = torch.ones(1, stop, dtype=x.dtype, device=x.device)
        # Samples come as one batch: captum repeats the input once for each.
        value = measured(lambda z, m=masked: m(z > 0.5), perturb, keep, scores, n_perturb_samples=samples)
        found.append(value[0])
    return torch.stack(found).double().cpu()


def sensitivity(
    lens: Lens, prompt: Prompt, method: str, radius: float = 0.02, samples: int = 10, seed: int = 0
) -> float:
    """Largest relative change of the scores when the embeddings are moved a little: captum's ``sensitivity_max``.

    ``max_delta |scores(x + delta) - scores(x)| / |scores(x)|`` over uniform delta with entries up to ``radius`` times
    the root mean square of the embeddings (Yeh et al. 2019). Only one prompt, and methods of the embeddings.

    Args:
        lens, prompt: the model and one prompt.
        method: "decompose", "relevance" or "gradient_x_input".
        radius, samples, seed: of the moves.

    Raises:
        SsmlensError: another method.
    """
    from captum.metrics import sensitivity_max

    from ssmlens.attribution._common import ask
    from ssmlens.attribution._forward import EXACT, FROZEN, LRP

    rules = {"decompose": FROZEN, "relevance": LRP, "gradient_x_input": EXACT}
    if method not in rules:
        raise SsmlensError(f"sensitivity knows {', '.join(rules)}, not {method!r}")
    question = ask(lens, prompt, None, -1, rules[method])
    if len(question.embeddings) != 1:
        raise SsmlensError("sensitivity takes one prompt at a time")
    network = question.network
    first = network.gradient(question.embeddings, question.positions, rules[method], question.target)

    def explain(moved: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:
        x = moved if isinstance(moved, Tensor) else moved[0]  # captum passes both, and wants a tuple back
        target, where = first.target.expand(len(x)), question.positions.expand(len(x))
        gradient = network.gradient(x, where, rules[method], target)
        return ((x * gradient.embeddings).sum(-1),)

    reach = radius * float(question.embeddings.square().mean().sqrt())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return float(
            sensitivity_max(explain, question.embeddings, perturb_radius=reach, n_perturb_samples=samples).max()
        )


@dataclass(frozen=True, eq=False)
class Randomisation:
    """Agreement of scores with those of a model whose weights were drawn anew, per group.

    Args:
        signed: group to Spearman's correlation of the scores.
        absolute: group to Spearman's correlation of their absolute values.
        top: group to the share of the top tenth of tokens that stays on top.
        settings: method, prompt length, seed.
    """

    signed: dict[str, float]
    absolute: dict[str, float]
    top: dict[str, float]
    settings: dict[str, Any]

    def table(self) -> pd.DataFrame:
        """One row per group."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"group": k, "spearman": self.signed[k], "spearman_abs": self.absolute[k], "top_overlap": self.top[k]}
                for k in self.signed
            ]
        )


def randomisation(
    lens: Lens, prompt: Prompt, method: str = "decompose", groups: Sequence[str] | None = None, seed: int = 0
) -> Randomisation:
    """Draw a group of weights anew, and see whether the scores notice (Adebayo et al. 2018, independent randomisation).

    Scores that stay the same describe the architecture, not what the model learnt. Weights of a group are permuted
    within each tensor, so that their distribution stays; "all" permutes every group. The target is kept.

    Args:
        lens, prompt: the model and one prompt.
        method: one of `METHODS`.
        groups: some of `GROUPS` and "all"; those that the model has when None.
        seed: of the permutation.

    Raises:
        SsmlensError: unknown method or group.
    """
    from scipy.stats import spearmanr

    run = one_method(method)
    found = run(lens, prompt)
    before = found.scores[0].double().cpu()
    top = max(1, len(before) // 10)
    signed, absolute, overlap = {}, {}, {}
    for group, model in _randomised(lens, groups, seed):
        other = load(model, device=str(lens.device), dtype=lens.dtype, tokenizer=lens.tokenizer)
        after = run(other, prompt, int(found.target[0])).scores[0].double().cpu()
        signed[group] = float(spearmanr(before, after).statistic)
        absolute[group] = float(spearmanr(before.abs(), after.abs()).statistic)
        kept = set(before.abs().topk(top).indices.tolist()) & set(after.abs().topk(top).indices.tolist())
        overlap[group] = len(kept) / top
    settings = {"model": lens.name, "method": method, "tokens": len(before), "seed": seed}
    return Randomisation(signed, absolute, overlap, settings)


def _randomised(lens: Lens, groups: Sequence[str] | None, seed: int) -> Iterator[tuple[str, Any]]:
    names = [k for k, _ in lens.model.named_parameters()]
    present = [g for g, parts in GROUPS.items() if any(p in k for p in parts for k in names)]
    for group in [*present, "all"] if groups is None else groups:
        if group != "all" and group not in present:
            raise SsmlensError(f"unknown group {group!r}: choose from {', '.join([*present, 'all'])}")
        parts = [p for g in present for p in GROUPS[g]] if group == "all" else GROUPS[group]
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(lens.model)
        with torch.no_grad():
            for k, weight in model.named_parameters():
                if any(p in k for p in parts):
                    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                    weight.copy_(weight.flatten()[order].view_as(weight))
        yield group, model
