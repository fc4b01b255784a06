"""The parts of a model that can be taken out, and the model without some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.analyses.sensitivity._text import Text
from ssmlens.errors import LayerError, SsmlensError
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.lens import Lens
from ssmlens.stepping import Stepper

__all__ = ["KINDS", "Model", "Unit", "units_of"]

KINDS = ("block", "ssm", "head")
"""What is taken out.

block  the whole mixer: the residual stream passes it by
ssm    what is read from the state; D x stays, and so do convolution and gate
head   everything that some heads give, with their D x; in Mamba-1 a head is a channel
"""

MANY_HEADS = 64
"""Layers with more heads than this lose them in groups unless told otherwise."""

GROUPS = 16


@dataclass(frozen=True)
class Unit:
    """One part.

    Args:
        kind: one of `KINDS`.
        layer: index of the layer.
        heads: which heads, for "head".
    """

    kind: str
    layer: int
    heads: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Such as "layer 3", "layer 3 head 5" or "layer 3 heads 32-63"."""
        if not self.heads:
            return f"layer {self.layer}"
        first, last = self.heads[0], self.heads[-1]
        return f"layer {self.layer} head{f' {first}' if first == last else f's {first}-{last}'}"


def units_of(lens: Lens, kind: str, layers: Iterable[int] | None = None, group: int | None = None) -> list[Unit]:
    """All parts of a kind.

    Args:
        lens: the model.
        kind: one of `KINDS`.
        layers: where; everywhere by default.
        group: neighbouring heads that go together; by default one, and 1/16 of the heads where there are more than 64.

    Raises:
        SsmlensError: for an unknown kind or a group that is not positive.
        LayerError: for a layer that does not exist.
    """
    if kind not in KINDS:
        raise SsmlensError(f"unknown part {kind!r}: choose one of {', '.join(KINDS)}")
    if group is not None and (group < 1 or kind != "head"):
        raise SsmlensError(
            f"group is a number of heads that go together, at least 1, and goes with 'head'; got {group}"
        )
    there = [layer.index for layer in lens.layers if layer.kind == "ssm"]
    chosen = there if layers is None else sorted(set(layers))
    wrong = [k for k in chosen if k not in there]
    if wrong or not chosen:
        what = f"layer {wrong[0]} has no mixer" if wrong else "no layer was chosen"
        raise LayerError(f"{what}: choose from {', '.join(map(str, there))}")
    if kind != "head":
        return [Unit(kind, k) for k in chosen]
    found = []
    for k in chosen:
        heads = len(lens.model.get_submodule(lens.layers[k].path).D)  # type: ignore[arg-type]
        width = group or (1 if heads <= MANY_HEADS else heads // GROUPS)
        found += [Unit(kind, k, tuple(range(a, min(a + width, heads)))) for a in range(0, heads, width)]
    return found


class Model:
    """A model on one text, run again and again without some of its parts.

    Args:
        lens: the model; all its layers are mixers.
        text: what it reads.
    """

    def __init__(self, lens: Lens, text: Text) -> None:
        self.net, self.text = Stepper(lens), text
        self.state = self.net.initial(text.ids.shape[0])
        # By the layer from which the passes differ; filled by `remember`.
        self.streams: list[Tensor] = []
        self.without: tuple[Unit, ...] = ()

    @torch.no_grad()
    def remember(self, without: Sequence[Unit] = ()) -> Tensor:
        """Losses (count,) without these parts; later runs that leave out more start where they first differ."""
        self.streams, self.without = [self.net.embed(self.text.ids.to(self.net.embedding.device))], tuple(without)
        for k in range(len(self.net.layers)):
            self.streams.append(self._layer(k, self.streams[-1], self.without, "zero"))
        return self._losses(self.streams[-1])

    @torch.no_grad()
    def losses(self, more: Sequence[Unit], how: str = "zero") -> Tensor:
        """Losses (count,) without what `remember` left out and without these.

        Args:
            more: further parts.
            how: "zero" drops each of these parts; "mean" leaves their mean over the text's tokens, so that only what
                they tell apart is lost.
        """
        if not self.streams:
            self.remember()
        start = min((unit.layer for unit in more), default=len(self.net.layers))
        x = self.streams[start]
        for k in range(start, len(self.net.layers)):
            x = self._layer(k, x, (*self.without, *more), how, kept=self.without)
        return self._losses(x)

    def _losses(self, x: Tensor) -> Tensor:
        return self.text.losses(self.net.logits(x))

    def _layer(self, k: int, x: Tensor, units: Sequence[Unit], how: str, kept: Sequence[Unit] = ()) -> Tensor:
        """The residual stream after layer k; units of ``kept`` are dropped whatever ``how`` says."""
        here = [unit for unit in units if unit.layer == k]
        ways = {unit: "zero" if unit in kept else how for unit in here}
        blocks = [ways[unit] for unit in here if unit.kind == "block"]
        if "zero" in blocks:
            return x
        after, _, _ = self.net.layers[k](x, self.state.layers[k], self._recur(k, ways))
        if not blocks:
            return after
        return x + self._mean((after - x)[..., None])[..., 0]

    def _recur(self, k: int, ways: dict[Unit, str]) -> Callable[[ScanInputs], tuple[Tensor, Tensor]]:
        layer = self.net.layers[k]

        def recur(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
            y, final = scan.run(inputs)
            skip = inputs.value * layer.weights["D"].to(y.dtype)[:, None]  # added after the recurrence
            for unit, how in ways.items():
                if unit.kind == "ssm":
                    y = torch.zeros_like(y) if how == "zero" else self._mean(y)
                elif unit.kind == "head":
                    at = torch.tensor(unit.heads, device=y.device)
                    whole = (y + skip)[:, :, at]
                    put = torch.zeros_like(whole) if how == "zero" else self._mean(whole)
                    y = y.index_copy(2, at, put - skip[:, :, at])
            return y, final

        return recur

    def _mean(self, x: Tensor) -> Tensor:
        """x (b, t, ...) with every real token's entry replaced by the mean over all real tokens."""
        real = torch.arange(x.shape[1]) < self.text.lengths[:, None]
        return x[real.to(x.device)].mean(0).expand_as(x)
