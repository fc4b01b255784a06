"""Intervals of means over a text, whose tokens are no independent draws: the block bootstrap."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError

__all__ = ["BLOCKS", "block_sums", "ratio_interval"]

BLOCKS = 20
"""Stretches of equal length that a text is cut into; shorter texts have a block for each token."""

CHUNK = 4096
"""Ratios whose resamples are held at a time."""


def block_sums(x: Tensor, blocks: int = BLOCKS) -> Tensor:
    """Sums over consecutive stretches of the first axis, (blocks, ...), in float64.

    Args:
        x: (t, ...), one entry for each token; fewer tokens than blocks give a block for each.
        blocks: how many stretches.
    """
    k = min(blocks, x.shape[0])
    which = torch.arange(x.shape[0], device=x.device) * k // x.shape[0]
    out = torch.zeros(k, *x.shape[1:], dtype=torch.float64, device=x.device)
    return out.index_add_(0, which, x.double())


def ratio_interval(
    top: Tensor, bottom: Tensor, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Percentile interval of sum(top) / sum(bottom) when whole blocks are drawn again with replacement.

    Args:
        top: (blocks, ...) sums of the blocks, as of `block_sums`.
        bottom: (blocks, ...) that broadcasts to it, such as tokens in each block.
        level: share of the resamples inside.
        resamples: how often; more than 1 block is needed, else both ends are NaN.
        seed: of the draws.

    Returns:
        Lower and upper end, each of the shape of ``top`` without its first axis.
    """
    if not 0 < level < 1 or resamples < 1:
        raise SsmlensError(f"level lies between 0 and 1 and resamples is at least 1, got {level} and {resamples}")
    k, shape = top.shape[0], top.shape[1:]
    if k < 2:
        nothing = torch.full(shape, torch.nan, dtype=torch.float64, device=top.device)
        return nothing, nothing.clone()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(k, (resamples, k), generator=generator)
    weights = torch.nn.functional.one_hot(drawn, k).sum(1).double().to(top.device)  # (resamples, blocks)
    a = top.double().reshape(k, -1).T
    b = bottom.double().broadcast_to(top.shape).reshape(k, -1).T
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=top.device)
    parts = []
    for x, y in zip(a.split(CHUNK), b.split(CHUNK)):
        ratios = (x @ weights.T) / (y @ weights.T)  # resamples last: there a quantile is quick
        parts.append(torch.nanquantile(ratios, ends, dim=1))
    low, high = torch.cat(parts, dim=1)
    return low.reshape(shape), high.reshape(shape)
