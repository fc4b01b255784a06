"""Faithfulness: does taking away what a method calls important change the model's answer, more than chance would?

With f the answer (probability or logit of the explained token) and tokens ordered by score:

==================  ===============================================================================  ======
metric              meaning                                                                          better
==================  ===============================================================================  ======
deletion            area under f while the most important tokens are taken away first (MoRF)         lower
deletion_least      the same, least important first (LeRF)                                           higher
insertion           area under f while the most important are put back first, from none              higher
comprehensiveness   f(all) - f(without the top k %), mean over k = 1, 5, 10, 20, 50                   higher
sufficiency         f(all) - f(the top k % alone), mean over the same k                              lower
flip                deletion_least - deletion, the area between the two curves                       higher
==================  ===============================================================================  ======

Areas are trapezoids over the share of tokens, 0 to 1. Deletion and insertion follow Petsiuk et al. (2018), MoRF and
LeRF Samek et al. (2017), comprehensiveness and sufficiency ERASER (DeYoung et al. 2020); flip is the Delta A^F of
MambaLRP (Jafari et al. 2024).

What stands in a taken token's place decides much, so the baseline is part of every result. Mamba has no attention
mask: a replaced token still lets states decay, a dropped one does not, and both are fair questions. Every result holds
two controls scored alike: random orders (their mean), and recency, the nearest tokens first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmlens.attribution._baselines import Baseline
from ssmlens.attribution._common import Prompt
from ssmlens.attribution._forward import Network
from ssmlens.attribution._perturb import Masked, order_of, sizes_of, subsets
from ssmlens.attribution.result import Attribution
from ssmlens.errors import PromptError, SsmlensError
from ssmlens.lens import Lens
from ssmlens.prompt import prepare

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BETTER", "METRICS", "SHARES", "Faithfulness", "curve", "faithfulness", "measure"]

BETTER = {
    "deletion": "lower",
    "deletion_least": "higher",
    "insertion": "higher",
    "comprehensiveness": "higher",
    "sufficiency": "lower",
    "flip": "higher",
}
"""Every metric, and where its good end is."""

METRICS = ("deletion", "insertion", "comprehensiveness", "sufficiency")

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of tokens over which comprehensiveness and sufficiency are averaged (ERASER's AOPC); at least one token."""


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Metrics of one attribution, and of its controls, per prompt.

    Args:
        value: metric to (b,).
        random: metric to (b, orders): the same for random orders of the tokens.
        recency: metric to (b,): the same for the nearest tokens first.
        whole: (b,) the answer to the whole prompt.
        settings: method, baseline, output, points, seed and the model's.
    """

    value: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    recency: Mapping[str, Tensor]
    whole: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)

    def gain(self, metric: str) -> Tensor:
        """(b,) how much better than the mean random order, in units of the answer; positive is better."""
        sign = 1 if BETTER[metric] == "higher" else -1
        return sign * (self.value[metric] - self.random[metric].mean(1))

    def table(self) -> pd.DataFrame:
        """One row per prompt and metric: value, mean and deviation of random orders, recency, gain over random."""
        import pandas as pd

        rows = [
            {
                "prompt": i,
                "metric": name,
                "better": BETTER[name],
                "value": float(self.value[name][i]),
                "random": float(self.random[name][i].mean()),
                "random_deviation": float(self.random[name][i].std(correction=0)),
                "recency": float(self.recency[name][i]),
                "gain": float(self.gain(name)[i]),
            }
            for i in range(len(self.whole))
            for name in self.value
        ]
        return pd.DataFrame(rows)


def faithfulness(
    lens: Lens,
    attribution: Attribution,
    metrics: Sequence[str] = METRICS,
    baseline: Baseline = "zero",
    *,
    prompt: Prompt | None = None,
    output: str = "probability",
    points: int | None = None,
    random_orders: int = 20,
    seed: int = 0,
) -> Faithfulness:
    """Score an attribution against the model, next to random orders and the recency order.

    Args:
        lens: the model that was explained.
        attribution: of any method of this package.
        metrics: some of `BETTER`.
        baseline: what takes a token's place: "zero" or "mean" embedding, a token id, or "drop" to close the gap.
        prompt: what was explained; needed where the attribution does not hold the token ids.
        output: "probability" or "logit" of the explained token.
        points: points of a curve; None for one per token.
        random_orders: how many random orders make the control.
        seed: of those orders.

    Raises:
        SsmlensError: unknown metric or output, or no random order.
        PromptError: unknown baseline, or a prompt that is not the attribution's.
    """
    for name in metrics:
        if name not in BETTER:
            raise SsmlensError(f"unknown metric {name!r}: choose from {', '.join(BETTER)}")
    if random_orders < 1:
        raise SsmlensError(f"random_orders is at least 1, got {random_orders}")
    network, ids = Network(lens), _ids(lens, attribution, prompt)
    generator = torch.Generator().manual_seed(seed)
    value: dict[str, list[float]] = {name: [] for name in metrics}
    recency: dict[str, list[float]] = {name: [] for name in metrics}
    random: dict[str, list[list[float]]] = {name: [] for name in metrics}
    whole = []
    for i, stop in enumerate((attribution.position + 1).tolist()):
        x = network.embed(ids[i : i + 1, :stop])[0]
        masked = Masked.of(network, x, int(attribution.target[i]), baseline, output)
        whole.append(float(masked(torch.ones(1, stop, dtype=torch.bool, device=x.device))))
        orders = [order_of(attribution.scores[i, :stop]), torch.arange(stop - 1, -1, -1)]
        orders += [torch.randperm(stop, generator=generator) for _ in range(random_orders)]
        found = [measure(masked, order.to(x.device), metrics, points) for order in orders]
        for name in metrics:
            value[name].append(found[0][name])
            recency[name].append(found[1][name])
            random[name].append([each[name] for each in found[2:]])
    settings = {
        "model": lens.name,
        "method": attribution.method,
        "baseline": baseline,
        "output": output,
        "points": points,
        "random_orders": random_orders,
        "seed": seed,
    }
    return Faithfulness(
        value={k: torch.tensor(v, dtype=torch.float64) for k, v in value.items()},
        random={k: torch.tensor(v, dtype=torch.float64) for k, v in random.items()},
        recency={k: torch.tensor(v, dtype=torch.float64) for k, v in recency.items()},
        whole=torch.tensor(whole, dtype=torch.float64),
        settings=settings,
    )


def measure(masked: Masked, order: Tensor, metrics: Sequence[str], points: int | None = None) -> dict[str, float]:
    """Metrics of one order of a prompt's tokens, most important first."""
    length = len(order)
    found: dict[str, float] = {}

    def most() -> float:
        return found.get("deletion", _area(curve(masked, order, "deletion", points)))

    def least() -> float:
        return found.get("deletion_least", _area(curve(masked, order.flip(0), "deletion", points)))

    for name in sorted(metrics, key=list(BETTER).index):  # flip comes last, after the areas it is made of
        if name in ("comprehensiveness", "sufficiency"):
            top = subsets(order, [max(1, round(share * length)) for share in SHARES])
            masks = torch.cat([torch.ones_like(top[:1]), ~top if name == "comprehensiveness" else top])
            answers = masked(masks).double()
            found[name] = float((answers[0] - answers[1:]).mean())
        elif name == "insertion":
            found[name] = _area(curve(masked, order, "insertion", points))
        else:
            found[name] = least() - most() if name == "flip" else most() if name == "deletion" else least()
    return found


def curve(masked: Masked, order: Tensor, which: str = "deletion", points: int | None = None) -> tuple[Tensor, Tensor]:
    """Shares of tokens (k,) taken away ("deletion") or put back ("insertion") along an order, and the answers (k,)."""
    sizes = sizes_of(len(order), points)
    chosen = subsets(order, sizes)
    answers = masked(chosen if which == "insertion" else ~chosen)
    return torch.tensor(sizes, dtype=torch.float64) / max(1, len(order)), answers.double().cpu()


def _area(points: tuple[Tensor, Tensor]) -> float:
    return float(torch.trapezoid(points[1], points[0]))


def _ids(lens: Lens, attribution: Attribution, prompt: Prompt | None) -> Tensor:
    """Token ids (b, t) of what was explained."""
    if prompt is None:
        if attribution.ids is None:
            raise PromptError("this attribution does not hold its token ids: pass prompt= as it was explained")
        return attribution.ids
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
    if batch.tokens != attribution.tokens:
        raise PromptError("the tokens of the prompt are not those of the attribution: pass it as it was explained")
    return batch.ids
