"""When a clock has run down by half: from every token, as quantiles, and from a few tokens of a long text."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmlens.analyses._layers import block_entries
from ssmlens.analyses.memory import _clock as clock
from ssmlens.recurrence import Recurrence

__all__ = ["crossing_quantiles", "crossings"]

WINDOW = 64
"""Steps that the first window of a search takes; each one after it takes twice as many."""


def crossings(rec: Recurrence, kind: str, at: Tensor, interpolate: bool) -> Tensor:
    """Half-lives of the tokens ``at`` (b, k), counted in each row, as (b, k, h, n or 1); NaN where at is -1.

    In a long text the search walks away from few tokens in growing windows and drops what has ended, so that a
    half-life costs its own length and not that of the text.
    """
    rows = []
    for b in range(rec.batch):
        known = at[b].cpu() >= 0
        part, chosen = _row(rec, b), at[b].to(rec.device).clamp(min=0)
        near = WINDOW * len(chosen) < part.length
        states = clock.states_per_head(part)
        length = WINDOW * len(chosen) if near else part.length
        per_head = length * (1 if part.A is not None else states) + len(chosen) * states

        def block(heads: slice, part: Recurrence = part, chosen: Tensor = chosen, near: bool = near) -> Tensor:
            if near:
                search = _Search(clock.Steps.of(part, heads), kind, chosen, interpolate, block_entries(part))
                return search.run()[None]
            return _clocked(clock.Clock.of(part, heads), kind, chosen, interpolate)

        found = clock.blocks(part, block, per_head)[0]
        rows.append(found.movedim(-1, 0).where(known[:, None, None], torch.nan))
    return torch.stack(rows)


def crossing_quantiles(
    rec: Recurrence, kind: str, quantiles: tuple[float, ...], interpolate: bool
) -> tuple[Tensor, Tensor]:
    """Quantiles over the real tokens of each row, (b, h, n or 1, q), and the share that ended in the text.

    A quantile is the smallest half-life that at least this share of the tokens does not exceed, so that it is
    one of them, or inf. Batch rows are sorted on their own: they differ in length.
    """
    values, reached = [], []
    for b in range(rec.batch):
        part = _row(rec, b)
        tokens = torch.arange(part.length, device=part.device)

        def block(heads: slice, part: Recurrence = part, tokens: Tensor = tokens) -> Tensor:
            picks = [clock.order_index(q, part.length) for q in quantiles]
            found = []
            # A long text has too many half-lives for all states of even one head at a time.
            for some in clock.Clock.of(part, heads).states(max(1, block_entries(part) // part.length)):
                times = _clocked(some, kind, tokens, interpolate)[0]
                share = times.isfinite().double().mean(-1, keepdim=True)
                found.append(torch.cat([_ordered(times, picks, whole=not interpolate), share], -1))
            return torch.cat(found, 1)[None]

        both = clock.blocks(part, block, per_head=part.length * clock.states_per_head(part))[0]
        values.append(both[..., :-1])
        reached.append(both[..., -1:])
    return torch.stack(values), torch.stack(reached)


def _clocked(some: clock.Clock, kind: str, at: Tensor, interpolate: bool) -> Tensor:
    search = some.forward if kind == "forward" else some.backward
    return search(at, interpolate)


class _Search:
    """The half-lives of a few tokens of one row, for some heads, from clocks that start at these tokens.

    Args:
        steps: of the row.
        kind: "forward" or "backward".
        at: (k,) tokens.
        interpolate: as for `ssmlens.analyses.memory.half_life`.
        entries: of the largest temporary tensor.
    """

    def __init__(self, steps: clock.Steps, kind: str, at: Tensor, interpolate: bool, entries: int) -> None:
        self.steps, self.kind, self.at, self.interpolate, self.entries = steps, kind, at, interpolate, entries
        self.length = steps.real.shape[1]
        self.room = self.length - 1 - at if kind == "forward" else at  # (k,) steps to the end of the row
        self.target = clock.LN2 / steps.rate  # (h, n)
        states = 1 if steps.factorised else self.target.shape[1]
        self.reached = self.target.new_zeros(len(at), len(self.target), states)  # the clocks after the last window
        self.found = self.target.new_full((len(at), *self.target.shape), torch.inf)
        self.pending = (self.room > 0)[:, None, None] & self.target.isfinite()

    def run(self) -> Tensor:
        """Half-lives (h, n or 1, k)."""
        seen, width = 0, WINDOW
        while True:
            tokens, heads = (self.pending.any(2).any(axis).nonzero()[:, 0] for axis in (1, 0))
            if not len(tokens):
                break
            if seen * len(tokens) > self.length:
                self._whole(tokens, heads)
                break
            width = max(1, min(width, self.entries // (len(tokens) * len(heads) * self.reached.shape[2])))
            self._window(tokens, heads, seen, width)
            seen, width = seen + width, 2 * width
        return self.found.permute(1, 2, 0)

    def _window(self, tokens: Tensor, heads: Tensor, seen: int, width: int) -> None:
        """Search ``width`` steps, ``seen`` steps away from the tokens."""
        part = (tokens[:, None], heads)
        away = torch.arange(seen + 1, seen + width + 1, device=self.at.device)
        at = self.at[tokens, None]
        # Forward the first step is that of the next token, backward that of the token itself.
        index = at + away if self.kind == "forward" else at + 1 - away
        steps = self.steps.windows(index.clamp(0, self.length - 1), away <= self.room[tokens, None], heads)
        before = self.reached[part][..., None]
        ticks = torch.cat([before, before + steps.ticks().cumsum(-1)], -1)
        some = clock.Clock(ticks, steps.rate)
        target = self.target[heads][..., None].expand(len(tokens), -1, -1, 1)
        step = some.search(target * (1 - clock.TIE), right=False).clamp(min=1)
        pending = self.pending[part]
        hit = pending & (step[..., 0] <= width)
        lives = (step + seen).double()
        if self.interpolate:
            step = step.clamp(max=width)
            late, early = some.take(step), some.take(step - 1)
            lives = lives - ((late - target) / (late - early)).nan_to_num(0.0).clamp(0, 1)
        self.found[part] = lives[..., 0].where(hit, self.found[part])
        self.pending[part] = pending & ~hit & (self.room[tokens] > seen + width)[:, None, None]
        self.reached[part] = ticks[..., -1]

    def _whole(self, tokens: Tensor, heads: Tensor) -> None:
        """Search the whole row: beyond its length, many windows cost more than one clock."""
        per_head = self.length * self.reached.shape[2] + len(tokens) * self.target.shape[1]
        for some in heads.split(max(1, self.entries // per_head)):
            part = (tokens[:, None], some)
            lives = _clocked(self.steps.heads(some).clock(), self.kind, self.at[tokens], self.interpolate)
            self.found[part] = lives[0].movedim(-1, 0).where(self.pending[part], self.found[part])


def _ordered(times: Tensor, picks: list[int], whole: bool) -> Tensor:
    """The entries ``picks`` of each sorted row of times (h, n, t), inf last."""
    if not whole:
        return times.sort(-1).values[..., picks]
    # Whole numbers below the length of the text: sorting int16 takes a tenth of the time of float64, and what
    # does not fit into it is counted, which is as quick.
    never = times.shape[-1]
    times = times.where(times.isfinite(), never)
    if never < torch.iinfo(torch.int16).max:
        order = times.short().sort(-1).values[..., picks].double()
    else:
        rows = times.flatten(0, 1).long()
        place = rows + torch.arange(len(rows), device=rows.device)[:, None] * (never + 1)
        below = place.flatten().bincount(minlength=len(rows) * (never + 1)).view(len(rows), -1).cumsum(-1)
        wanted = torch.tensor(picks, device=rows.device).expand(len(rows), -1).contiguous()
        order = torch.searchsorted(below, wanted, right=True).view(*times.shape[:2], -1).double()
    return order.where(order < never, torch.inf)


def _row(rec: Recurrence, b: int) -> Recurrence:
    """One batch row without its padding."""
    length = int(rec.real_lengths[b])
    if length == 0:
        raise ValueError(f"batch row {b} holds no real token: memory needs at least one")
    cut = {k: x if k == "A" else x[b : b + 1] for k, x in rec.inputs.tensors().items()}
    return Recurrence(rec.inputs.replace(**cut).slice(0, length))
