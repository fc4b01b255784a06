"""Logit lens and tuned lens: what the residual stream says of the next token before the last layer.

The logit lens puts the stream entering a layer through the final norm and the unembedding (nostalgebraist 2020). The
tuned lens first applies a trained affine map per layer, which takes the layers' changes of basis out of the picture
(Belrose et al. 2023; for Mamba, Paulo, Marshall and Belrose, AAAI 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens import zoo
from ssmlens.errors import CheckpointError, LayerError, MemoryLimitError, ReconstructionError, SsmlensError
from ssmlens.interventions._translators import Translators
from ssmlens.kernels.inputs import compute_dtype
from ssmlens.trace import Trace, relative_error

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LIMIT", "LensReading", "logit_lens", "tuned_lens", "unembed"]

LIMIT = 2e9
"""Bytes that a reading may take unless told otherwise."""

SHIPPED = "tuned_lens.safetensors"
"""File of the trained translators in a shipped model's folder."""


@dataclass(frozen=True, eq=False)
class LensReading:
    """Logits read off the residual stream.

    Args:
        logits: (layer, b, t, v); entry i is read from the stream entering layer ``layers[i]``.
        layers: indices; the number of layers stands for the stream after the last.
        kl: (layer, b, t) divergence KL(final || lens) in nats from the model's own next-token distribution; NaN at
            padding.
        tokens: the prompt's tokens, one list per row.
        lengths: (b,) real tokens.
        name: "logit lens" or "tuned lens".
        settings: model, dtype, and where the translators come from.
    """

    logits: Tensor = field(repr=False)
    layers: tuple[int, ...]
    kl: Tensor = field(repr=False)
    tokens: list[list[str]] = field(repr=False)
    lengths: Tensor = field(repr=False)
    name: str
    settings: Mapping[str, Any]

    @property
    def mean_kl(self) -> Tensor:
        """(layer,) mean of ``kl`` over real tokens."""
        return self.kl.flatten(1).nanmean(1)

    def table(self, row: int = 0, decode: Callable[[list[int]], str] | None = None) -> pd.DataFrame:
        """One line per layer and position: the token there, the top next token, its probability and the KL.

        Args:
            row: which prompt.
            decode: turns a list of one token id into text; without it the top token is its id.
        """
        import pandas as pd

        lines = []
        for i, layer in enumerate(self.layers):
            chance, top = self.logits[i, row].double().softmax(-1).max(-1)
            for t in range(int(self.lengths[row])):
                word = int(top[t]) if decode is None else decode([int(top[t])])
                lines.append(
                    {
                        "layer": layer,
                        "position": t,
                        "token": self.tokens[row][t],
                        "top": word,
                        "probability": float(chance[t]),
                        "kl": float(self.kl[i, row, t]),
                    }
                )
        return pd.DataFrame(lines)

    def follow(
        self,
        position: int = -1,
        tokens: Iterable[int] | None = None,
        row: int = 0,
        decode: Callable[[list[int]], str] | None = None,
        most: int = 5,
    ) -> pd.DataFrame:
        """Some next tokens from layer to layer at one position: layer, token, id, probability, rank (1 is top).

        Args:
            position: where; negative ones count from the prompt's end.
            tokens: ids to follow; by default the ``most`` likeliest ones in the last layer that was read.
            row: which prompt.
            decode: turns a list of one token id into text; without it a token is its id.
            most: how many by default.

        Raises:
            IndexError: a position outside the prompt.
        """
        import pandas as pd

        length = int(self.lengths[row])
        if not -length <= position < length:
            raise IndexError(f"position {position} is outside the {length} tokens of this prompt")
        here = self.logits[:, row, position % length].double()
        chosen = here[-1].topk(min(most, here.shape[-1])).indices.tolist() if tokens is None else list(tokens)
        chance = here.softmax(-1)
        lines = []
        for i, layer in enumerate(self.layers):
            for token in chosen:
                rank = int((here[i] > here[i, token]).sum()) + 1
                name = token if decode is None else decode([token])
                lines.append((layer, name, token, float(chance[i, token]), rank))
        return pd.DataFrame(lines, columns=["layer", "token", "id", "probability", "rank"])


def logit_lens(trace: Trace, layers: Iterable[int] | None = None, *, limit: float = LIMIT) -> LensReading:
    """The final norm and the unembedding, applied to the residual stream before every layer.

    Args:
        trace: a trace; one read from a file must have been saved with weights=True.
        layers: which streams, 0 to the number of layers; all by default. The last one gives the model's own logits.
        limit: bytes that the logits may take.

    Raises:
        LayerError: when a stream does not exist.
        MemoryLimitError: before allocating, when the logits would take more than ``limit``.
        SsmlensError: when the trace came without weights.
        ReconstructionError: when the same route does not give the model's own logits after the last layer.

    Source: nostalgebraist 2020.
    """
    return _read(trace, layers, None, limit)


def tuned_lens(
    trace: Trace,
    translators: Translators | str | Path | None = None,
    layers: Iterable[int] | None = None,
    *,
    limit: float = LIMIT,
) -> LensReading:
    """As `logit_lens`, each stream first put through its layer's trained translator.

    Args:
        trace: a trace; one read from a file must have been saved with weights=True.
        translators: what `train_translators` returned, or a file that it was saved to; by default those that ship
            with the model.
        layers: which streams; the one after the last layer needs no translator and is read as it is.
        limit: bytes that the logits may take.

    Raises:
        CheckpointError: when the model ships without translators, or the file is none.
        SsmlensError: when the translators are of another width or number of layers.
        LayerError, MemoryLimitError, ReconstructionError: as `logit_lens`.

    Source: Belrose et al. 2023; Paulo, Marshall and Belrose 2025.
    """
    if translators is None:
        translators = _shipped(str(trace.settings["model"]))
    elif not isinstance(translators, Translators):
        translators = Translators.load(translators)
    width = trace.residual(0).shape[-1]
    if translators.width != width or translators.n_layers != len(trace.layers):
        raise SsmlensError(
            f"these translators are for {translators.n_layers} layers of width {translators.width}, but the model has "
            f"{len(trace.layers)} of width {width}"
        )
    return _read(trace, layers, translators, limit)


def unembed(residual: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """The model's last steps: RMSNorm and unembedding, (..., d) to (..., v), as the model rounds them."""
    wide = residual.to(compute_dtype(residual.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + head["norm.eps"].item())
    normed = head["norm.weight"] * normed.to(residual.dtype)
    weight = head["unembedding.weight"]
    logits = F.linear(normed.to(weight.dtype), weight, head.get("unembedding.bias"))
    return logits.to(compute_dtype(logits.dtype))


def _read(trace: Trace, layers: Iterable[int] | None, translators: Translators | None, limit: float) -> LensReading:
    chosen = tuple(range(len(trace.residuals))) if layers is None else tuple(layers)
    if not chosen:
        raise LayerError("layers is empty: choose from the streams 0 to " + str(len(trace.residuals) - 1))
    if not trace.head:
        raise SsmlensError("this trace has no weights to read with: save it with trace.save(path, weights=True)")
    streams = [trace.residual(k) for k in chosen]
    size = trace.logits.numel() * trace.logits.element_size() * len(chosen)
    if size > limit:
        raise MemoryLimitError(
            f"the logits of {len(chosen)} layers would take {size / 1e9:.1f} GB, above the limit of "
            f"{limit / 1e9:.1f} GB: give fewer layers or a larger limit"
        )
    real = torch.arange(trace.ids.shape[1]) < trace.lengths[:, None]
    _check(trace, real)
    final = trace.logits.double().log_softmax(-1)
    logits, kl = [], []
    for k, stream in zip(chosen, streams):
        if translators is not None and k < translators.n_layers:
            stream = translators(stream, k)
        logits.append(unembed(stream, trace.head).to(trace.logits.dtype))
        divergence = (final.exp() * (final - logits[-1].double().log_softmax(-1))).sum(-1)
        kl.append(divergence.masked_fill(~real.to(divergence.device), torch.nan))
    settings = {k: trace.settings[k] for k in ("model", "dtype")}
    if translators is not None:
        settings["translators"] = dict(translators.settings)
    name = "logit lens" if translators is None else "tuned lens"
    return LensReading(torch.stack(logits), chosen, torch.stack(kl), trace.tokens, trace.lengths, name, settings)


def _check(trace: Trace, real: Tensor) -> None:
    """Before anything is read: the last stream has to give the model's own logits."""
    ours = unembed(trace.residuals[-1][:, :32], trace.head)
    error = relative_error(ours, trace.logits[:, :32], real[:, :32].to(ours.device))
    if not error <= trace.tolerance:
        raise ReconstructionError(
            f"the final norm and unembedding give logits that differ from the model's by {error:.1e}, so a lens would "
            "not speak for this model"
        )


def _shipped(name: str) -> Translators:
    path = zoo.path(name) / SHIPPED if name in zoo.names() else None
    if path is None or not path.is_file():
        having = [n for n in zoo.names() if (zoo.path(n) / SHIPPED).is_file()]
        raise CheckpointError(
            f"no translators ship with {name!r} (only with {', '.join(having) or 'no model'}): train some with "
            "train_translators and pass them"
        )
    return Translators.load(path)
