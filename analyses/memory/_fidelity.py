"""Memory fidelity: how well a layer's state still tells the token of k steps ago."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory._assumes import FIDELITY_CONTESTED, LINEAR_PROBE, ONE_LEAKY_UNIT, TEACHER_FORCED
from ssmlens.analyses.memory._features import whiten
from ssmlens.analyses.memory._material import Material, checked_lags, gather
from ssmlens.analyses.memory._probe import Decoder
from ssmlens.analyses.memory._split import Split, bootstrap_weights, interval, split

__all__ = ["fidelity", "ratios", "truth_of"]

SPAN = 0.1
"""Net fidelity that a lag needs to count for the span."""

SHUFFLES = 4
"""Orders of the targets that the chance level is the mean of."""


def fidelity(
    source: Any,
    targets: Any = None,
    lags: Sequence[int] | None = None,
    *,
    features: str = "state",
    layers: Iterable[int] | None = None,
    rank: int = 256,
    unit_norm: bool | None = None,
    held_out: float = 0.25,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Memory fidelity of each layer (ETMF): how much of the token k steps ago a linear probe reads from the state.

    The published metric (MemMamba, 2025) has no code and no chance level. This is our reading of it: features
    z[t], the whitened principal components of the states, a ridge decoder of the target at t - k for each lag k,
    and its agreement with the truth on held-out tokens, against two controls.

    Args:
        source: states (t, n), or (b, t, n) for several sequences; a recurrence, a mixer's trace or a trace; or a
            lens, with a prompt or prompts in place of ``targets``.
        targets: (t, d), (b, t, d) or (t,), what token t brought and later states are asked for; whole numbers (t,)
            are classes. By default the token embeddings of a trace, a mixer's inputs, and a recurrence's values.
        lags: steps back; by default log-spaced up to an eighth of the longest sequence, 256 at most.
        features: "state" h, "output" y without the skip, or "residual", the stream before each layer.
        layers: of a trace, only these.
        rank: most principal components; ``explained`` is their share of the variance.
        unit_norm: centre the targets and give each length 1, so that frequent tokens with large embeddings do not
            decide. By default for token embeddings only.
        held_out: share of the tokens, or from 8 sequences on of the sequences, that judges and is not fitted on.
        repeats: of the bootstrap over held-out units.
        confidence: of the intervals.
        seed: of the split, the shuffled controls, the random directions of large states, and the bootstrap.
        resume: file that keeps finished layers; an interrupted run goes on from it.
        progress: called with the layers done and all layers.

    Returns:
        Result with axes (layer, lag), without ``layer`` for one layer or plain states. The value is R2 over the
        held-out tokens, 1 where the state tells the target exactly, 0 where no better than its mean and below 0
        where worse, between ``low`` and ``high``. ``cosine`` is E[cos(predicted, true)], and ``net``, between
        ``net_low`` and ``net_high``, is (cosine - c) / (1 - c) with c the larger of the two controls'; at lag 0 the
        shuffled one alone. ``etmf`` is the mean of ``net`` over the lags from 1 on, with ``etmf_low`` and
        ``etmf_high``, and ``span`` the largest lag with net above 0.1 (0 where there is none). ``net_r2``, ``etmf_r2``
        and ``span_r2`` are the same of R2, and the ones to trust where a single target is most of the text: its
        direction then decides the cosine.

        Controls: ``chance`` and ``cosine_chance``, the same with targets in random order; ``current`` and
        ``cosine_current``, the target predicted from the target at t alone, which is how far neighbouring tokens
        tell of each other.

    Raises:
        ValueError: for shapes that do not fit, lags that do not exist, too few tokens, or NaN.
        ReconstructionError: when a trace does not describe its model.
    """
    _check(rank=rank, repeats=repeats)
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence lies between 0 and 1, got {confidence}")
    material = gather(source, targets, features)
    chosen = _chosen(material, layers)
    steps = checked_lags(lags, material.lengths)
    unit = material.tokens if unit_norm is None else bool(unit_norm)
    parts = split(material.lengths, steps[-1], held_out, seed)
    settings: dict[str, Any] = {
        "lags": steps,
        "features": features,
        "rank": rank,
        "unit_norm": unit,
        "held_out": held_out,
        "seed": seed,
    }
    # Ledgers are kept from one machine to another, so what names the material is left to its digests and the model's.
    own = {k: material.settings[k] for k in ("states", "targets", "fingerprint") if k in material.settings}
    ledger = Ledger(resume, {"study": "memory.fidelity", **own, **settings})
    truth = truth_of(material, parts, unit)
    controls = ledger.get("controls", lambda: _controls(truth, parts, steps, rank, seed))
    found = []
    for done, layer in enumerate(chosen):
        blocks = material.layers[layer]
        found.append(ledger.get(f"layer {layer}", partial(_layer, blocks, truth, parts, steps, rank, seed)))
        if progress is not None:
            progress(done + 1, len(chosen))
    weights = bootstrap_weights(parts.units, repeats, seed)
    numbers = [_statistics(part, controls, steps, weights, confidence) for part in found]
    drawn = f"{confidence:.0%} percentile bootstrap over {parts.units} held-out {parts.unit}, {repeats} repeats"
    settings |= {"held_out_tokens": len(parts.test), "fitted_tokens": len(parts.fit), "interval": drawn}
    settings["contested"] = FIDELITY_CONTESTED
    return _result(material, chosen, steps, numbers, settings)


def _layer(blocks: Any, truth: Tensor, parts: Split, lags: list[int], rank: int, seed: int) -> dict[str, Any]:
    """Sums over held-out units of one layer: by lag, and with the targets in random order."""
    white = whiten(blocks, parts.mask((truth.shape[0], truth.shape[1])), rank, seed)
    decoder = Decoder(white, parts)
    judged = [decoder.judge(*_targets(truth, parts, k)).numbers() for k in lags]
    chance = []
    g = torch.Generator().manual_seed(seed + 1)
    fit, test = _targets(truth, parts, 0)
    for _ in range(SHUFFLES):
        orders = (torch.randperm(len(x), generator=g) for x in (fit, test))
        chance.append(decoder.judge(*(x[order] for x, order in zip((fit, test), orders))).numbers())
    about = {"explained": white.explained, "features": white.z.shape[-1], "width": white.width}
    return {"lags": judged, "chance": chance, **about}


def _controls(truth: Tensor, parts: Split, lags: list[int], rank: int, seed: int) -> list[Any]:
    """The same sums with the target at t itself as the only feature."""
    mask = parts.mask((truth.shape[0], truth.shape[1]))
    white = whiten(lambda: iter([(slice(0, truth.shape[1]), truth)]), mask, max(rank, truth.shape[-1]), seed)
    decoder = Decoder(white, parts)
    return [decoder.judge(*_targets(truth, parts, k)).numbers() for k in lags]


def _targets(truth: Tensor, parts: Split, lag: int) -> tuple[Tensor, Tensor]:
    """What stood ``lag`` steps before the fitted (m, d) and the held-out (m', d) tokens."""
    fit, test = (truth[x[:, 0], x[:, 1] - lag] for x in (parts.fit, parts.test))
    return fit, test


def truth_of(material: Material, parts: Split, unit: bool) -> Tensor:
    """The targets (b, t, d), with ``unit`` around their mean over the fitted tokens and each of length 1."""
    fitted = material.targets[parts.fit[:, 0], parts.fit[:, 1]]
    if bool((fitted == fitted[0]).all()):
        raise ValueError("the targets do not vary over the tokens that are fitted on: there is nothing to read back")
    if not unit:
        return material.targets
    x = material.targets - fitted.mean(0)
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, x / size, 0.0)


def _statistics(
    part: Mapping[str, Any], controls: list[Any], lags: list[int], weights: Tensor, confidence: float
) -> dict[str, Tensor]:
    """R2, cosine and net fidelity by lag (k,), with intervals from the (repeats, units) weights."""
    own, current = (torch.tensor(x, dtype=torch.float64) for x in (part["lags"], controls))
    chance = torch.tensor(part["chance"], dtype=torch.float64)
    later = torch.tensor(lags) > 0
    everything = torch.ones_like(weights[:1])

    def measures(drawn: Tensor) -> tuple[Tensor, ...]:
        r2, cosine = ratios(own, drawn)
        chance_r2, chance_cosine = (x.mean(-1, keepdim=True) for x in ratios(chance, drawn))
        r2_now, cosine_now = ratios(current, drawn)
        least = torch.where(later, torch.maximum(chance_cosine, cosine_now), chance_cosine)
        # A target that its neighbour tells exactly leaves nothing to gain.
        net = torch.where(least < 1 - 1e-9, (cosine - least) / (1 - least), torch.nan)
        known = torch.where(later, torch.maximum(chance_r2, r2_now), chance_r2)
        net_r2 = torch.where(known < 1 - 1e-9, (r2 - known) / (1 - known), torch.nan)
        return r2, cosine, net, net_r2, chance_r2.expand_as(r2), chance_cosine.expand_as(r2), r2_now, cosine_now

    names = ("value", "cosine", "net", "net_r2", "chance", "cosine_chance", "current", "cosine_current")
    out = {name: x[0] for name, x in zip(names, measures(everything))}
    drawn = measures(weights)
    for name, x in zip(("", "cosine_", "net_", "net_r2_"), drawn):
        out[f"{name}low"], out[f"{name}high"] = interval(x, confidence)
    for name, ending, samples in (("net", "", drawn[2]), ("net_r2", "_r2", drawn[3])):
        out[f"etmf{ending}"] = out[name][later].nanmean()[None]
        ends = interval(samples[:, later].nanmean(1), confidence)
        out[f"etmf{ending}_low"], out[f"etmf{ending}_high"] = (x[None] for x in ends)
        spans = [k for k, x in zip(lags, out[name].tolist()) if k and x > SPAN]
        out[f"span{ending}"] = torch.tensor([float(max(spans, default=0))], dtype=torch.float64)
    out["explained"] = torch.tensor([part["explained"]], dtype=torch.float64)
    return out


def ratios(sums: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """R2 and mean cosine, (repeats, k), of sums (k, 4, units) with the units weighted by (repeats, units)."""
    error, total, cosine, count = (drawn @ sums[:, i].mT for i in range(4))
    r2 = torch.where(total > 0, 1 - error / total, torch.nan)
    return r2, cosine / count


def _chosen(material: Material, layers: Iterable[int] | None) -> list[int | None]:
    there = list(material.layers)
    if layers is None:
        return there
    wanted = sorted({int(k) for k in layers})
    missing = [k for k in wanted if k not in there]
    if missing or not wanted:
        known = ", ".join(str(k) for k in there if k is not None) or "none: there is only one, without a number"
        raise ValueError(f"layer {missing[0] if missing else 'none'} was not traced: the layers are {known}")
    return list(wanted)


def _check(**numbers: int) -> None:
    for name, x in numbers.items():
        if int(x) != x or x < 1:
            raise ValueError(f"{name} is a whole number above 0, got {x}")


def _result(
    material: Material,
    chosen: list[int | None],
    lags: list[int],
    numbers: list[dict[str, Tensor]],
    settings: Mapping[str, Any],
) -> Result:
    named = [k for k in chosen if k is not None]
    stacked = material.stacked and bool(named)
    joined = {name: torch.stack([x[name] for x in numbers]) for name in numbers[0]}
    if not stacked:
        joined = {name: x[0] for name, x in joined.items()}
    coords: dict[str, Sequence[Any]] = {"lag": lags}
    if named:
        coords["layer"] = named
    control = ("chance", "current", "cosine_chance", "cosine_current")
    value = joined.pop("value")
    return Result(
        name="fidelity",
        value=value,
        dims=("layer", "lag") if stacked else ("lag",),
        units="1",
        coords=coords,
        columns={k: x for k, x in joined.items() if k not in control},
        control={k: x for k, x in joined.items() if k in control},
        settings={**material.settings, **settings},
        assumes=(LINEAR_PROBE, TEACHER_FORCED) if material.tokens else (LINEAR_PROBE,),
        checked_by=ONE_LEAKY_UNIT,
    )
