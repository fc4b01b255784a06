"""The numbers of a report, taken from a trace once. Everything here is plain numpy and text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssmlens.errors import SsmlensError
from ssmlens.report.explained import Explained, explain

if TYPE_CHECKING:
    from ssmlens.lens import Lens
    from ssmlens.recurrence import Recurrence
    from ssmlens.trace import MixerTrace, Trace

__all__ = [
    "ALL",
    "REDUCTIONS",
    "LayerNumbers",
    "Numbers",
    "Prediction",
    "combine",
    "measure",
    "predictions",
    "state_norms",
]

Array = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

REDUCTIONS = ("mean", "norm")
"""Reductions over heads that a report shows: one with sign, and one in which nothing cancels."""

ALL = "all"
"""Name of the map that combines every layer."""

_BLOCK_NUMBERS = 16_000_000
_DENSE_NUMBERS = 64_000_000
_TOP = 10


@dataclass(frozen=True)
class LayerNumbers:
    """One layer.

    Args:
        layer: its index.
        family: "mamba1", "mamba2", ...
        n_heads, head_dim, d_state: sizes of its state.
        error: reconstruction error.
        maps: reduction -> (t, s) implicit attention reduced over heads.
        half_life: (h,) half-life in tokens of the slowest state of each head; inf without decay.
        median_half_life: median over all heads and states.
        mean_distance: (h,) mean distance of what the last token reads, in tokens; NaN where it reads nothing.
        norms: (t,) Euclidean norm of the whole state after each token.
    """

    layer: int
    family: str
    n_heads: int
    head_dim: int
    d_state: int
    error: float
    maps: dict[str, Array]
    half_life: Array
    median_half_life: float
    mean_distance: Array
    norms: Array


@dataclass(frozen=True)
class Prediction:
    """One candidate for the next token: its id, its text and its probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Numbers:
    """Everything a report shows about one text.

    Args:
        tokens: (t,) text of each token.
        ids: (t,) their ids.
        layers: the layers with a recurrence, in order.
        n_layers: number of layers of the model, those without a recurrence included.
        combined: reduction -> (t, s) map of all layers together, see `combine`.
        predictions: likeliest next tokens.
        tolerance: what reconstruction errors are judged by.
        settings: the trace's settings.
        explained: the likeliest token's logit taken apart; None where that was not possible or not asked for.
    """

    tokens: list[str]
    ids: list[int]
    layers: tuple[LayerNumbers, ...]
    n_layers: int
    combined: dict[str, Array]
    predictions: tuple[Prediction, ...]
    tolerance: float
    settings: dict[str, Any]
    explained: Explained | None = None

    @property
    def worst_error(self) -> float:
        """The largest reconstruction error; NaN when any is."""
        errors = [layer.error for layer in self.layers]
        return float("nan") if any(e != e for e in errors) else max(errors)

    @property
    def verified(self) -> bool:
        """True when every layer was rebuilt within the tolerance."""
        return all(layer.error <= self.tolerance for layer in self.layers)


def measure(
    trace: Trace,
    *,
    row: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
    progress: Progress | None = None,
    lens: Lens | None = None,
) -> Numbers:
    """Take the numbers of one row of a trace.

    Args:
        trace: what `Lens.trace` returned.
        row: which prompt of the batch.
        decode: ids to text, for the predicted tokens; without it they are shown by id.
        progress: called with (what is done, steps done, steps in all).
        lens: the traced model, for the section that takes a prediction apart.

    Raises:
        SsmlensError: when the row does not exist or no layer was traced.
    """
    if not 0 <= row < len(trace.tokens):
        raise SsmlensError(f"row {row} does not exist: this trace has rows 0 to {len(trace.tokens) - 1}")
    if not len(trace):
        raise SsmlensError("this trace holds no recurrence: trace at least one layer that has one")
    tell = progress or (lambda what, done, total: None)
    total = len(trace) + 1
    layers = []
    for i, mixer in enumerate(trace):
        tell(f"layer {mixer.layer}", i, total)
        layers.append(_layer(mixer, row, len(trace.tokens[row])))
    tell("predictions", total - 1, total)
    ids = trace.ids[row, : len(trace.tokens[row])].tolist()
    numbers = Numbers(
        tokens=list(trace.tokens[row]),
        ids=ids,
        layers=tuple(layers),
        n_layers=len(trace.layers),
        combined={how: combine([layer.maps[how] for layer in layers]) for how in REDUCTIONS},
        predictions=predictions(trace, row, decode),
        tolerance=trace.tolerance,
        settings=dict(trace.settings),
        explained=None if lens is None else explain(lens, ids, decode),
    )
    tell("done", total, total)
    return numbers


def combine(maps: Sequence[Array]) -> Array:
    """One map for several layers: each row divided by its largest magnitude, then the mean over the layers.

    Layers write at very different scales; without the division the loudest one would be all there is to see.
    A row of zeros stays zero.
    """
    total = np.zeros_like(maps[0])
    for matrix in maps:
        peak = np.abs(matrix).max(axis=1, keepdims=True)
        total += np.divide(matrix, peak, out=np.zeros_like(matrix), where=peak > 0)
    return total / len(maps)


def state_norms(recurrence: Recurrence) -> Array:
    """Euclidean norm of the whole state, all heads and channels, after each token: (b, t). In blocks of time."""
    import torch

    from ssmlens.kernels import scan

    inputs = recurrence.inputs
    each = inputs.batch * inputs.n_heads * inputs.head_dim * inputs.d_state
    step = max(1, _BLOCK_NUMBERS // max(each, 1))
    carried, norms = inputs.initial, []
    for start in range(0, inputs.length, step):
        part = inputs.slice(start, min(start + step, inputs.length)).replace(initial=carried)
        states = scan.states(part)  # (b, l, h, p, n)
        carried = states[:, -1]
        norms.append(torch.linalg.vector_norm(states.flatten(2), dim=-1, dtype=torch.float64))
    return torch.cat(norms, dim=1).cpu().numpy()


def _layer(mixer: MixerTrace, row: int, length: int) -> LayerNumbers:
    from ssmlens.analyses import memory

    rec = mixer.recurrence[row : row + 1, :length]
    maps = _maps(rec)
    lives = _numpy(memory.half_life(rec).value)[0].reshape(rec.n_heads, -1)  # (h, n), (h, 1) where states share it
    return LayerNumbers(
        layer=mixer.layer,
        family=mixer.family,
        n_heads=rec.n_heads,
        head_dim=rec.head_dim,
        d_state=rec.d_state,
        error=mixer.reconstruction_error,
        maps=maps,
        half_life=lives.max(axis=1),
        median_half_life=float(np.quantile(lives, 0.5, method="lower")),
        mean_distance=_numpy(rec.attention.distance(rows=[length - 1])[0, :, 0]),
        norms=state_norms(rec)[0],
    )


def _maps(rec: Recurrence) -> dict[str, Array]:
    """Every reduction of the implicit attention, (t, s); the matrices of short texts are computed once for all."""
    attention = rec.attention
    _, heads, rows, columns = attention.shape
    if heads * rows * columns > _DENSE_NUMBERS:
        return {how: _numpy(attention.reduce(how)[0]) for how in REDUCTIONS}
    full = attention.dense()[0]
    return {"mean": _numpy(full.mean(dim=0)), "norm": _numpy(full.norm(dim=0))}


def predictions(
    trace: Trace,
    row: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
    most: int = _TOP,
    position: int = -1,
) -> tuple[Prediction, ...]:
    """The likeliest tokens after one position of a row, its last by default, likeliest first."""
    length = int(trace.lengths[row])
    if not -length <= position < length:
        raise SsmlensError(f"position {position} is outside the {length} tokens of this prompt")
    last = trace.logits[row, position % length].double().softmax(dim=-1)
    best = last.topk(min(most, last.numel()))
    found = []
    for probability, token in zip(best.values.tolist(), best.indices.tolist()):
        text = f"<{token}>"
        if decode is not None:
            # Padding rows of the vocabulary have no text.
            with contextlib.suppress(OverflowError, IndexError, TypeError, ValueError):
                text = str(decode([token]))
        found.append(Prediction(token, text, probability))
    return tuple(found)


def _numpy(x: Any) -> Array:
    out: Array = x.detach().double().cpu().numpy()
    return out
