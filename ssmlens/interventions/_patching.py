"""The result of `patch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._sites import Site

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Patching"]


@dataclass(frozen=True, eq=False)
class Patching:
    """What patching found.

    Args:
        sites: the places, in order.
        value: (site, b) metric of the corrupt run with the clean activation put in, float64.
        clean, corrupt: (b,) metric of both runs.
        clean_logits, corrupt_logits: (b, t, v) of both runs.
        metric: its name.
        target: (b,) or (b, 2) token ids that the metric is about; None where it is about none.
        tokens: the clean run's tokens, then the corrupt one's; one list per row each.
        lengths: (b,) real tokens.
        settings: model, dtype, window, read and what made the corrupt run.
    """

    sites: tuple[Site, ...]
    value: Tensor
    clean: Tensor
    corrupt: Tensor
    clean_logits: Tensor = field(repr=False)
    corrupt_logits: Tensor = field(repr=False)
    metric: str
    target: Tensor | None
    tokens: tuple[list[list[str]], list[list[str]]] = field(repr=False)
    lengths: Tensor
    settings: Mapping[str, Any]

    @property
    def effect(self) -> Tensor:
        """(site, b) metric with the site patched less that of the corrupt run (the indirect effect)."""
        return self.value - self.corrupt

    @property
    def recovered(self) -> Tensor:
        """(site, b) effect as a share of clean less corrupt: 1 repairs all; NaN where the runs do not differ."""
        gap = self.clean - self.corrupt
        return self.effect / torch.where(gap == 0, torch.nan, gap)

    def grid(self, kind: str | None = None, row: int = 0, values: Tensor | None = None) -> Tensor:
        """(layer, position) values of the single-token sites of one kind, NaN where there is no site.

        Args:
            kind: which kind; may be left out when there is one.
            row: which prompt.
            values: (site, b) what to lay out; ``value`` by default.
        """
        kinds = {s.kind for s in self.sites}
        if kind is None and len(kinds) == 1:
            kind = next(iter(kinds))
        if kind not in kinds:
            raise SsmlensError(f"no sites of kind {kind!r}: choose one of {', '.join(sorted(kinds))}")
        chosen = [(i, s) for i, s in enumerate(self.sites) if s.kind == kind and isinstance(s.position, int)]
        layers = max((s.layer for _, s in chosen), default=-1) + 1
        out = torch.full((layers, int(self.lengths[row])), torch.nan, dtype=torch.float64)
        for i, s in chosen:
            out[s.layer, s.position] = (self.value if values is None else values)[i, row]
        return out

    def table(self) -> pd.DataFrame:
        """One line per site and prompt: kind, layer, position, the tokens there, value, clean, corrupt, effect and
        recovered. The position is "all" or several for sites of more than one token."""
        import pandas as pd

        lines = []
        for i, site in enumerate(self.sites):
            for row, length in enumerate(self.lengths.tolist()):
                where, words = self._place(site, row, length)
                numbers = {n: float(getattr(self, n)[i, row]) for n in ("value", "effect", "recovered")}
                numbers |= {n: float(getattr(self, n)[row]) for n in ("clean", "corrupt")}
                place = {"kind": site.kind, "layer": site.layer, "position": where, "row": row}
                lines.append({**place, **words, **numbers})
        frame = pd.DataFrame(lines)
        frame.attrs.update({"metric": self.metric, **self.settings})
        return frame

    def _place(self, site: Site, row: int, length: int) -> tuple[int | str, dict[str, str]]:
        """The position as the table shows it, and the tokens there."""
        t, names = site.position, ("clean_token", "corrupt_token")
        if not isinstance(t, int):
            return ("all" if t is None else ",".join(map(str, t))), dict.fromkeys(names, "")
        return t % length, {name: tokens[row][t % length] for name, tokens in zip(names, self.tokens)}
