"""States cut to their largest singular directions, and models that go on from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._layers import listed
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.lens import Lens
from ssmlens.quiet import quiet_transformers
from ssmlens.recurrence import Recurrence
from ssmlens.tap import ScanCall, tapping
from ssmlens.trace import Trace

__all__ = ["Truncation", "rank_grid", "rerun", "run_recurrence", "token_of"]


@dataclass(frozen=True)
class Truncation:
    """The state before a token as singular directions.

    Args:
        state: (b, h, p, n) the state itself.
        mean: like it, what is left out of the truncation; zeros, or the mean over rows.
        left, values, right: the SVD of the rest, (b, m, rows, k), (b, m, k), (b, m, k, n): one matrix for each head, or
            one for the layer.
    """

    state: Tensor
    mean: Tensor
    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, rec: Recurrence, cut: int, centred: bool, per: str) -> Truncation:
        """Of the state that the tokens before ``cut`` leave."""
        state = rec.states([cut - 1])[:, 0]
        mean = state.mean(0, keepdim=True).expand_as(state) if centred else torch.zeros_like(state)
        matrix = (state - mean).double()
        if per == "layer" or (per == "auto" and rec.head_dim == 1):
            matrix = matrix.flatten(1, 2)[:, None]
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return cls(state, mean, left, values, right)

    @property
    def rank(self) -> int:
        """The full rank, as far as shapes go."""
        return self.values.shape[-1]

    def to(self, r: int) -> Tensor:
        """The state (b, h, p, n) of rank r; itself for the full rank."""
        if r >= self.rank:
            return self.state
        short = self.left[..., :r] * self.values[..., None, :r] @ self.right[..., :r, :]
        return self.mean + short.reshape(self.state.shape).to(self.state.dtype)

    def energy(self, ranks: list[int]) -> Tensor:
        """(ranks,) mean share of the squared singular values in the first r; NaN where all states are 0."""
        squares = self.values.square()
        upto = torch.cat([torch.zeros_like(squares[..., :1]), squares.cumsum(-1)], dim=-1)
        share = upto / upto[..., -1:]
        return torch.stack([share[..., min(r, self.rank)].nanmean() for r in ranks]).cpu()


def run_recurrence(rec: Recurrence, cut: int, state: Tensor) -> Tensor:
    """Outputs (b, t, h, p) with the skip, the state before ``cut`` exchanged."""
    return rec.add_skip(_run(rec.inputs, cut, state)[0])


def rerun(lens: Lens, trace: Trace, cut: int, states: Mapping[int, Tensor], *, frozen: bool) -> Tensor:
    """Logits (b, t, v) of the model with the states of some layers before ``cut`` exchanged.

    Args:
        lens: the model.
        trace: its untouched run over all layers.
        cut: the first token that reads the new states.
        states: layer to state (b, h, p, n).
        frozen: dt, B and C of all layers stay those of the trace.
    """
    above = [k for k in trace.mixers if k > min(states)] if frozen else []
    # A trace with fast scans differs from the model's own by rounding; so do the same layers here.
    also = list(trace.mixers) if trace.settings["scan"] == "fast" else []
    layers = sorted({*states, *above, *also})
    padded = bool((trace.lengths < trace.ids.shape[1]).any())
    lengths = trace.lengths.to(lens.device) if padded else None

    def on_scan(call: ScanCall) -> Any:
        lowered = call.family.lower(call.arguments, lengths)
        rec, layer = lowered.recurrence, call.layer
        inputs = rec.inputs
        if layer in above:
            # Before the cut nothing has changed; after it, only the values may.
            inputs = trace[layer].recurrence.inputs.replace(value=inputs.value, initial=inputs.initial)
        if layer in states:
            y, final = _run(inputs, cut, states[layer])
        else:
            y, final = scan.run(inputs)
        return call.family.replace(call.arguments, lowered, rec.add_skip(y), final)

    mixers = {k: lens._mixers[k] for k in layers}
    extra = {}
    if padded:
        extra["attention_mask"] = (torch.arange(trace.ids.shape[1]) < trace.lengths.cpu()[:, None]).long()
    with tapping(mixers, on_scan), torch.no_grad(), quiet_transformers():
        modes = {m: m.training for m in lens.model.modules()}
        try:
            lens.model.eval()
            output = lens.model(
                input_ids=trace.ids.to(lens.device),
                return_dict=True,
                use_cache=False,
                **{k: x.to(lens.device) for k, x in extra.items()},
            )
        finally:
            for module, training in modes.items():
                module.training = training
    logits: Tensor = output.logits
    return logits


def _run(inputs: ScanInputs, cut: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (b, t, h, p) and the final state, the state before ``cut`` exchanged."""
    before, _ = scan.run(inputs.slice(0, cut))
    after, final = scan.run(inputs.slice(cut, inputs.length).replace(initial=state))
    return torch.cat([before, after], dim=1), final


def rank_grid(r_grid: int | Sequence[int] | None, full: int) -> list[int]:
    """Increasing ranks; by default 0, 1, 2, 3, 4, 6, 8... to the full one."""
    if r_grid is None:
        steps = [0, 1, 2, 3, 4] + [x for k in range(1, 16) for x in (3 * 2**k, 4 * 2**k)]
        return sorted({*(r for r in steps if r < full), full})
    ranks = sorted(set(listed(r_grid)))
    if not ranks or ranks[0] < 0:
        raise ValueError(f"r_grid lists ranks from 0, got {r_grid!r}")
    return ranks


def token_of(token_cut: int | None, lengths: Tensor) -> int:
    """The cut; by default half of the shortest row."""
    shortest = int(lengths.min())
    cut = shortest // 2 if token_cut is None else int(token_cut)
    if not 1 <= cut < shortest:
        raise ValueError(f"token_cut {cut} leaves no tokens on one side: the shortest row has cuts 1 to {shortest - 1}")
    return cut
