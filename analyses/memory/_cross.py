"""Fidelity across layers: how much of what one layer holds can be told from a later one at the same token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory._assumes import FIDELITY_CONTESTED, LINEAR_PROBE, PROJECTION, TEACHER_FORCED
from ssmlens.analyses.memory._features import Whitened, of_tensor, whiten
from ssmlens.analyses.memory._fidelity import ratios, truth_of
from ssmlens.analyses.memory._material import Material, as_series, digest, gather
from ssmlens.analyses.memory._probe import Decoder
from ssmlens.analyses.memory._split import Split, bootstrap_weights, interval, split
from ssmlens.lens import Lens

__all__ = ["cross_layer_fidelity", "debiased_cka"]

BYPASS = "The residual stream passes by the layers: what a later layer does not tell may still be in it."


def cross_layer_fidelity(
    source: Any,
    other: Any = None,
    *,
    features: str = "state",
    lags: Sequence[int] = (1, 2, 4, 8),
    rank: int = 128,
    held_out: float = 0.25,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """How much of what a layer holds can be read off a later layer at the same token (ECLMF).

    The published metric (MemMamba, 2025) has no code. Our reading: the R2 with which a ridge decoder on the
    features of the layer ``reader`` tells the whitened principal components of ``layer``, on held-out tokens. The
    layers are no chain that can only lose: the residual stream goes around each. Ratios above 1 are real, nothing
    is clipped, and a low value is no loss unless the ``residual`` control is low as well.

    Args:
        source: a trace, or features (t, n) or (b, t, n); or a lens, with a prompt in place of ``other``.
        other: features (t, m) or (b, t, m) that those of ``source`` are read from.
        features: "state" h, "output" y without the skip, or "residual", the stream before each layer.
        lags: for ``net_ratio``, of a trace.
        rank: most principal components of each layer, wanted and read.
        held_out, repeats, confidence, seed: as for `ssmlens.analyses.memory.fidelity`.
        resume: file that keeps finished readers; an interrupted run goes on from it.
        progress: called with the readers done and all readers.

    Returns:
        Result with axes (layer, reader), NaN unless the reader is later; for two sets of features a single number.
        The value is the held-out R2 between ``low`` and ``high``: 1 where an invertible map leads from one to the
        other, r / d where r of d equal components are left. ``cka`` is the debiased linear CKA of the held-out
        tokens. For a trace, ``net_ratio`` is the net fidelity of the reader over that of the layer, both as means over
        the lags; NaN where the layer's is below 0.02. Controls: ``chance``, the layer's components in random order,
        and for a trace ``residual``, the R2 from the residual stream that enters the reader.

    Raises:
        ValueError: for shapes that do not fit, fewer than two layers, or too few tokens.
    """
    if other is not None and not isinstance(source, Lens):
        return _pair(source, other, rank, held_out, repeats, confidence, seed)
    material = gather(source, other, features)
    names = [k for k in material.layers if k is not None]
    if len(names) < 2 or not material.tokens:
        raise ValueError("fidelity across layers needs two layers: pass a whole trace, or two sets of features")
    settings = {"features": features, "lags": list(lags), "rank": rank, "held_out": held_out, "seed": seed}
    own = {k: material.settings[k] for k in ("targets", "fingerprint") if k in material.settings}
    ledger = Ledger(resume, {"study": "memory.cross_layer_fidelity", "layers": names, **own, **settings})
    parts = split(material.lengths, max(lags, default=0), held_out, seed)
    read = _Reader(material, parts, rank, seed, list(lags))
    found = {}
    for done, reader in enumerate(names):
        found[reader] = ledger.get(f"reader {reader}", partial(read.row, reader, [k for k in names if k < reader]))
        if progress is not None:
            progress(done + 1, len(names))
    weights = bootstrap_weights(parts.units, repeats, seed)
    numbers = _table(names, found, weights, confidence)
    columns = {k: numbers[k] for k in ("low", "high", "cka", "net_ratio")}
    settings |= _about(parts, confidence, repeats)
    return Result(
        name="cross_layer_fidelity",
        value=numbers["value"],
        dims=("layer", "reader"),
        units="1",
        coords={"layer": names, "reader": names},
        columns=columns,
        control={k: numbers[k] for k in ("chance", "residual")},
        settings={**material.settings, **settings},
        assumes=(LINEAR_PROBE, BYPASS, TEACHER_FORCED),
        checked_by=PROJECTION,
    )


LEAST = 0.02
"""Net fidelity below which a layer holds nothing that a ratio could be about."""


class _Reader:
    """Decoders of each layer, made when they are first needed."""

    def __init__(self, material: Material, parts: Split, rank: int, seed: int, lags: list[int]) -> None:
        self.material, self.parts, self.lags, self.seed, self.rank = material, parts, lags, seed, rank
        self.truth = truth_of(material, parts, True)
        self.mask = parts.mask((self.truth.shape[0], self.truth.shape[1]))
        # One layer's components serve every later reader.
        self.white = cache(self._white)
        self.net = cache(self._net)

    def row(self, reader: int, layers: list[int]) -> dict[str, Any]:
        """What a reader tells of each earlier layer, and its own net fidelity by lag."""
        decoder = Decoder(self.white(reader), self.parts)
        around = Decoder(
            whiten(of_tensor(self.material.residuals[reader]), self.mask, self.rank, self.seed), self.parts
        )
        g = torch.Generator().manual_seed(self.seed + 1)
        entries = {}
        for layer in layers:
            white = self.white(layer)
            fit, test = (white.z[x[:, 0], x[:, 1]] for x in (self.parts.fit, self.parts.test))
            orders = [torch.randperm(len(x), generator=g) for x in (fit, test)]
            entries[str(layer)] = {
                "told": decoder.judge(fit, test).numbers(),
                "residual": around.judge(fit, test).numbers(),
                "chance": decoder.judge(fit[orders[0]], test[orders[1]]).numbers(),
                "cka": debiased_cka(test * white.scales, decoder.test),
                "net_ratio": _ratio(self.net(reader), self.net(layer)),
            }
        return entries

    def _white(self, layer: int) -> Whitened:
        return whiten(self.material.layers[layer], self.mask, self.rank, self.seed)

    def _net(self, layer: int | None) -> list[float]:
        """Cosine at each lag net of what the token itself tells, of one layer."""
        if layer is None:
            decoder = Decoder(whiten(of_tensor(self.truth), self.mask, self.truth.shape[-1], self.seed), self.parts)
        else:
            decoder = Decoder(self.white(layer), self.parts)
        cosines = []
        for k in self.lags:
            fit, test = (self.truth[x[:, 0], x[:, 1] - k] for x in (self.parts.fit, self.parts.test))
            sums = decoder.judge(fit, test)
            cosines.append(float(sums.cosine.sum() / sums.count.sum()))
        if layer is None:
            return cosines
        return [(x - max(c, 0.0)) / (1 - max(c, 0.0)) for x, c in zip(cosines, self.net(None))]


def _ratio(reader: list[float], layer: list[float]) -> float:
    """Of the sums over the lags: a mean of ratios would be decided by the lag with the smallest denominator."""
    return sum(reader) / sum(layer) if sum(layer) > LEAST * len(layer) else float("nan")


def _pair(wanted: Any, features: Any, rank: int, held_out: float, repeats: int, confidence: float, seed: int) -> Result:
    """R2 of one set of features, whitened, from another."""
    x, y = as_series(wanted, "the first features"), as_series(features, "the second features")
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(f"the first features have {tuple(x.shape[:2])} tokens and the second {tuple(y.shape[:2])}")
    parts = split(torch.full((len(x),), x.shape[1]), 0, held_out, seed)
    mask = parts.mask((x.shape[0], x.shape[1]))
    target = whiten(of_tensor(x), mask, rank, seed)
    decoder = Decoder(whiten(of_tensor(y), mask, rank, seed), parts)
    fit, test = (target.z[i[:, 0], i[:, 1]] for i in (parts.fit, parts.test))
    g = torch.Generator().manual_seed(seed + 1)
    mixed = [v[torch.randperm(len(v), generator=g)] for v in (fit, test)]
    weights = bootstrap_weights(parts.units, repeats, seed)
    r2, low, high = _r2(decoder.judge(fit, test).numbers(), weights, confidence)
    chance = _r2(decoder.judge(*mixed).numbers(), weights, confidence)[0]
    about = {"rank": rank, "held_out": held_out, "seed": seed, **_about(parts, confidence, repeats)}
    return Result(
        name="cross_layer_fidelity",
        value=r2,
        dims=(),
        units="1",
        columns={"low": low, "high": high, "cka": torch.tensor(debiased_cka(test * target.scales, decoder.test))},
        control={"chance": chance},
        settings={"first": digest(x), "second": digest(y), **about},
        assumes=(LINEAR_PROBE,),
        checked_by=PROJECTION,
    )


def _about(parts: Split, confidence: float, repeats: int) -> dict[str, Any]:
    drawn = f"{confidence:.0%} percentile bootstrap over {parts.units} held-out {parts.unit}, {repeats} repeats"
    about = {"held_out_tokens": len(parts.test), "fitted_tokens": len(parts.fit), "interval": drawn}
    return {**about, "contested": FIDELITY_CONTESTED}


def _r2(sums: list[list[float]], weights: Tensor, confidence: float) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.tensor([sums], dtype=torch.float64)
    value = ratios(numbers, torch.ones_like(weights[:1]))[0][0, 0]
    low, high = interval(ratios(numbers, weights)[0][:, 0], confidence)
    return value, low, high


def _table(names: list[int], found: dict[int, Any], weights: Tensor, confidence: float) -> dict[str, Tensor]:
    """(layer, reader) numbers, NaN where the reader is not later."""
    wanted = ("value", "low", "high", "cka", "net_ratio", "chance", "residual")
    out = {name: torch.full((len(names), len(names)), torch.nan, dtype=torch.float64) for name in wanted}
    for j, reader in enumerate(names):
        for i, layer in enumerate(names[:j]):
            entry = found[reader][str(layer)]
            for name, x in zip(("value", "low", "high"), _r2(entry["told"], weights, confidence)):
                out[name][i, j] = x
            for name in ("chance", "residual"):
                out[name][i, j] = _r2(entry[name], weights, confidence)[0]
            for name in ("cka", "net_ratio"):
                out[name][i, j] = entry[name]
    return out


def debiased_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of (m, n) and (m, n') from the unbiased estimate of HSIC, without any (m, m) matrix.

    About 0 for independent features however many, where plain CKA is far above (Murphy, Zylberberg and Fyshe 2024);
    1 for features that differ by a rotation and a scale.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    cross, one, other = (_hsic(a, b) for a, b in ((x, y), (x, x), (y, y)))
    size = one * other
    return float(cross / size.sqrt()) if size > 0 else float("nan")


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of HSIC with linear kernels (Song et al. 2012), diagonals left out."""
    m = len(x)
    k, l = x.square().sum(1), y.square().sum(1)  # noqa: E741
    rows_k, rows_l = x @ x.sum(0) - k, y @ y.sum(0) - l
    trace = (x.mT @ y).square().sum() - (k * l).sum()
    both = rows_k.sum() * rows_l.sum() / ((m - 1) * (m - 2))
    return (trace + both - 2 / (m - 2) * (rows_k * rows_l).sum()) / (m * (m - 3))
