"""Which method to trust: every method on many prompts, next to random orders and the recency order.

Faithfulness is measured for each prompt and averaged; intervals are percentiles of a bootstrap over prompts, and the
gain over random orders is paired: both sides of a difference come from the same prompt. Where the token that the
answer comes from is known, methods are also scored on finding it: precision at 1 (is the largest score on it?) and
the area under the ROC curve (how much of everything else does it outrank?).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmlens.attribution._baselines import Baseline
from ssmlens.attribution._faithfulness import BETTER, measure
from ssmlens.attribution._forward import Network
from ssmlens.attribution._methods import METHODS, SAMPLED, chosen_methods
from ssmlens.attribution._perturb import Masked, order_of
from ssmlens.bootstrap import ratio_interval
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CONTROLS", "FINDING", "Benchmark", "Case", "bootstrap", "compare", "finding"]

FINDING = ("precision_at_1", "auc")
"""Metrics where the source is known; higher is better."""

CONTROLS = ("random", "recency")

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Case:
    """One prompt of a comparison.

    Args:
        ids: the tokens; the answer is read at the last one.
        target: id of the explained token; None for the model's top token.
        source: positions that count as the place where the answer was told; empty where it is not known. The first
            is the told value itself.
    """

    ids: list[int]
    target: int | None = None
    source: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Metrics of every method on every prompt.

    Args:
        values: (method or control, baseline, metric) to (prompts,); the baseline of `FINDING` metrics is "".
        random_orders: (baseline, metric) to (prompts,): mean over random orders, the other side of the paired gain.
        seconds: method to mean seconds for one prompt.
        settings: what was compared, and how.
    """

    values: dict[tuple[str, str, str], Tensor]
    random_orders: dict[tuple[str, str], Tensor]
    seconds: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self, seed: int = 0) -> pd.DataFrame:
        """One row per method, baseline and metric: mean with a 95 % interval, and the paired gain over random orders
        with its interval (positive is better). Prompts on which a metric is not defined are left out."""
        import pandas as pd

        rows = []
        for (method, baseline, metric), found in self.values.items():
            low, high = bootstrap(found, seed)
            row: dict[str, Any] = {
                "method": method,
                "baseline": baseline,
                "metric": metric,
                "better": BETTER.get(metric, "higher"),
            }
            row |= {"prompts": int((~found.isnan()).sum()), "mean": float(found.nanmean()), "low": low, "high": high}
            chance = self.random_orders.get((baseline, metric))
            if chance is not None:
                gain = (found - chance) * (1 if row["better"] == "higher" else -1)
                row["gain"] = float(gain.nanmean())
                row["gain_low"], row["gain_high"] = bootstrap(gain, seed)
            rows.append(row)
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write the table as .csv, .json or .parquet, or as a page's `cells` in .md.

        Raises:
            SsmlensError: another ending.
        """
        path, table = Path(path), self.table()
        if path.suffix == ".csv":
            table.to_csv(path, index=False)
        elif path.suffix == ".json":
            table.to_json(path, orient="records", indent=1)
        elif path.suffix == ".parquet":
            table.to_parquet(path)
        elif path.suffix == ".md":
            head, *lines = self.cells()
            rows = [head, ["---"] * len(head), *lines]
            path.write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")
        else:
            raise SsmlensError(f"a benchmark is saved as .csv, .json, .parquet or .md, got {path.name!r}")

    def cells(self) -> list[list[str]]:
        """The table as text: a head, then a row per method with "mean [95 % interval]" per metric and baseline."""
        table = self.table()
        columns = list(dict.fromkeys(zip(table["metric"], table["baseline"])))
        found: dict[tuple[str, tuple[str, str]], str] = {}
        for row in table.to_dict("records"):
            key = (str(row["method"]), (str(row["metric"]), str(row["baseline"])))
            found[key] = f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        head = ["method", *[f"{metric}, {baseline}" if baseline else metric for metric, baseline in columns]]
        return [
            head,
            *[[name, *[found.get((name, c), "") for c in columns]] for name in dict.fromkeys(table["method"])],
        ]


def compare(
    lens: Lens,
    cases: Sequence[Case],
    methods: Sequence[str] | str = "all",
    baselines: Sequence[Baseline] = ("zero", "drop"),
    metrics: Sequence[str] = ("flip", "insertion", "comprehensiveness", "sufficiency"),
    *,
    output: str = "probability",
    points: int | None = 10,
    random_orders: int = 20,
    samples: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Run methods over prompts and score them.

    Args:
        lens: the model.
        cases: the prompts.
        methods: names of `METHODS`, or "all".
        baselines: what stands in for a token that is taken away; every one is a row of its own.
        metrics: of `faithfulness`; empty to score only on known sources.
        output: "probability" or "logit".
        points: of a curve; None for one per token.
        random_orders: per prompt, for the control.
        samples: steps of integrated gradients, and samples of SmoothGrad and GradientSHAP; None for their own defaults.
        seed: of the random orders and random scores; prompt i draws from ``seed + i``.
        progress: called with prompts done and all.

    Raises:
        SsmlensError: no case, an unknown method or metric.
    """
    names = chosen_methods(methods)
    for name in metrics:
        if name not in BETTER:
            raise SsmlensError(f"unknown metric {name!r}: choose from {', '.join(BETTER)}")
    if not cases:
        raise SsmlensError("a comparison needs at least one prompt")
    options = {} if samples is None else {name: {word: samples} for name, word in SAMPLED.items()}
    network = Network(lens)
    values: dict[tuple[str, str, str], list[float]] = {}
    chance: dict[tuple[str, str], list[float]] = {}
    seconds = dict.fromkeys(names, 0.0)

    def note(method: str, baseline: Baseline, found: dict[str, float]) -> None:
        for metric, value in found.items():
            values.setdefault((method, str(baseline), metric), []).append(value)

    for done, case in enumerate(cases):
        generator = torch.Generator().manual_seed(seed + done)
        length, scores = len(case.ids), {}
        target = case.target
        for name in names:
            start = time.perf_counter()
            found = METHODS[name](lens, case.ids, target, **options.get(name, {}))
            seconds[name] += (time.perf_counter() - start) / len(cases)
            scores[name], target = found.scores[0].double().cpu(), int(found.target[0])
        scores["recency"] = torch.arange(length, dtype=torch.float64)
        x = network.embed(torch.tensor([case.ids]))[0]
        shuffled = [torch.randperm(length, generator=generator) for _ in range(random_orders)]
        for baseline in baselines if metrics else ():
            masked = Masked.of(network, x, int(target or 0), baseline, output)
            each = [measure(masked, order.to(x.device), metrics, points) for order in shuffled]
            mean = {metric: sum(one[metric] for one in each) / len(each) for metric in metrics}
            for metric in metrics:
                chance.setdefault((str(baseline), metric), []).append(mean[metric])
            note("random", baseline, mean)
            for name, score in scores.items():
                note(name, baseline, measure(masked, order_of(score).to(x.device), metrics, points))
        if case.source:
            draws = [finding(torch.rand(length, generator=generator), case.source) for _ in range(random_orders)]
            note("random", "", {metric: sum(d[metric] for d in draws) / len(draws) for metric in FINDING})
            for name, score in scores.items():
                note(name, "", finding(score, case.source))
        if progress is not None:
            progress(done + 1, len(cases))
    return Benchmark(
        {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()},
        {k: torch.tensor(v, dtype=torch.float64) for k, v in chance.items()},
        seconds,
        {
            "model": lens.name,
            "dtype": str(lens.dtype).removeprefix("torch."),
            "prompts": len(cases),
            "methods": names,
            "baselines": [str(b) for b in baselines],
            "output": output,
            "points": points,
            "random_orders": random_orders,
            "samples": samples,
            "seed": seed,
        },
    )


def finding(scores: Tensor, source: Sequence[int]) -> dict[str, float]:
    """Whether scores (t,) find the source: precision at 1 and the area under the ROC curve, by absolute score.

    The last token is left out: it asks, and cannot be where the answer was told.

    Args:
        scores: of every token, the asking one last.
        source: positions that count as found.
    """
    size = scores[:-1].abs().double()
    told = torch.zeros(len(size), dtype=torch.bool)
    told[[k for k in source if k < len(size)]] = True
    if not told.any() or told.all():
        return dict.fromkeys(FINDING, float("nan"))
    above = size[told][:, None] - size[~told]
    area = ((above > 0).double() + 0.5 * (above == 0)).mean()
    return {"precision_at_1": float(told[size.argmax()]), "auc": float(area)}


def bootstrap(values: Tensor, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of (k,) values, resampled `BOOTSTRAPS` times; NaN for fewer than two values."""
    known = values[~values.isnan()]
    if len(known) < 2:
        return float("nan"), float("nan")
    ends = ratio_interval(known, torch.ones_like(known), level=level, resamples=BOOTSTRAPS, seed=seed)
    return float(ends[0]), float(ends[1])
