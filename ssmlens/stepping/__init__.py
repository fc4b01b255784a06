"""The model as a pure map: (state, token) to (state, logits), from its own weights.

Everything that a Mamba model carries from token to token is in one `State`: per layer the recurrent state h and the
window of the convolution's last inputs. The map changes nothing in place, works in any floating dtype and for any
batch, and is differentiable in the state and in the input vectors, in reverse and in forward mode
(``torch.func.jvp``, ``vmap``)::

    net = Stepper(lens)
    state = net.initial(batch=2)
    state, logits = net.step(state, ids)              # ids (b,)
    state, logits = net.run(state, ids, chunk=256)    # ids (b, t), carried exactly from chunk to chunk

`Stepper.run` computes its scans with ssmlens.kernels, so that a million tokens need no more memory than a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.errors import PromptError, UnsupportedModelError
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs, compute_dtype
from ssmlens.lens import Lens
from ssmlens.models import FAMILIES
from ssmlens.stepping._layer import Layer, Recur, loop, rms
from ssmlens.stepping._state import LayerState, State

__all__ = ["Chunk", "LayerState", "State", "Stepper"]

LOGITS = ("all", "last", "none")
"""What `Stepper.run` returns of the logits."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """What `Stepper.run` hands to an observer after each chunk of time.

    Args:
        start: position of its first token.
        stop: position after its last one.
        before: the state that it started from.
        after: the state that it left.
        scans: per layer the inputs of its recurrence over these tokens, with the state before them as ``initial``:
            ``ssmlens.kernels.scan.states(scans[k], at)`` gives states inside the chunk.
        logits: (b, stop - start, v), or None where no logits were asked for.
    """

    start: int
    stop: int
    before: State
    after: State
    scans: tuple[ScanInputs, ...]
    logits: Tensor | None


class Stepper:
    """A lens's model as a map with an explicit state.

    Args:
        lens: whose layers all are Mamba-1 or Mamba-2 mixers.
        dtype: of the weights and activations; the lens's by default. Norms, recurrences and the state h are computed
            in float64 for float64 and in float32 for everything narrower, as in the released code.

    Raises:
        UnsupportedModelError: when a layer is of another kind: its memory (such as a KV cache) would be missing from
            the state.
    """

    def __init__(self, lens: Lens, dtype: torch.dtype | None = None) -> None:
        self.lens = lens
        self.dtype = lens.dtype if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype is a floating dtype, got {dtype}")
        model: Any = lens.model
        self.embedding = self._cast(model.get_input_embeddings().weight)
        self.layers = tuple(self._layer(k) for k in range(len(lens.layers)))
        final, head = model.base_model.norm_f, model.get_output_embeddings()
        self._final, self._eps = self._cast(final.weight), float(final.variance_epsilon)
        self._head = self.embedding if head.weight is model.get_input_embeddings().weight else self._cast(head.weight)
        self._head_bias = None if head.bias is None else self._cast(head.bias)

    def _cast(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype)

    def _layer(self, k: int) -> Layer:
        from transformers.activations import ACT2FN

        info = self.lens.layers[k]
        if info.kind != "ssm":
            raise UnsupportedModelError(
                f"layer {k} is no Mamba mixer but {info.kind!r}: stepping needs a model of Mamba-1 or Mamba-2 layers "
                "alone"
            )
        module: Any = self.lens.model.get_submodule(info.path)
        norm: Any = self.lens.model.get_submodule(info.path.rpartition(".")[0]).norm
        family = next(f for f in FAMILIES.values() if f.name == info.family)
        parameters, config = family.describe(module)
        if family.name == "mamba2":
            config = {**config, "dt_limit": tuple(float(x) for x in module.time_step_limit)}
        weights = {name: self._cast(x) for name, x in parameters.items()}
        return Layer(
            family.name,
            weights,
            config,
            self._cast(norm.weight),
            float(norm.variance_epsilon),
            ACT2FN[config["activation"]],
        )

    def initial(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        return State(tuple(layer.initial(batch) for layer in self.layers))

    def embed(self, ids: Tensor) -> Tensor:
        """Input vectors (..., d) of token ids (...).

        Raises:
            PromptError: for ids outside the vocabulary.
        """
        ids = torch.as_tensor(ids, device=self.embedding.device)
        if ids.is_floating_point() or (ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.embedding)):
            raise PromptError(f"token ids are whole numbers from 0 to {len(self.embedding) - 1}")
        return F.embedding(ids.long(), self.embedding)

    def logits(self, residual: Tensor) -> Tensor:
        """(..., v) from the last residual stream (..., d), in the compute dtype."""
        hidden = rms(residual, self._eps).to(self.dtype) * self._final
        return F.linear(hidden, self._head, self._head_bias).to(compute_dtype(self.dtype))

    def step(self, state: State, ids: Tensor) -> tuple[State, Tensor]:
        """One token per row: ids (b,) to the next state and logits (b, v)."""
        return self.step_vectors(state, self.embed(ids))

    def step_vectors(self, state: State, vectors: Tensor) -> tuple[State, Tensor]:
        """As `step`, from input vectors (b, d) that need be no token's."""
        state, residual = self.advance(state, vectors[:, None])
        return state, self.logits(residual[:, 0])

    def advance(self, state: State, vectors: Tensor) -> tuple[State, Tensor]:
        """Input vectors (b, t, d) to the state after them and the last residual stream (b, t, d).

        Token by token inside each layer: for a few tokens, and for derivatives. `run` is for many.
        """
        state, residual, _ = self._through(state, vectors, loop)
        return state, residual

    def scans(self, state: State, vectors: Tensor) -> tuple[ScanInputs, ...]:
        """The inputs of every layer's recurrence for input vectors (b, t, d), as `Chunk` has them."""
        return self._through(state, vectors, loop)[2]

    def _through(self, state: State, x: Tensor, recur: Recur) -> tuple[State, Tensor, tuple[ScanInputs, ...]]:
        if x.shape[0] != state.batch or len(state.layers) != len(self.layers):
            raise ValueError(
                f"a state of {state.batch} rows and {len(state.layers)} layers does not fit {x.shape[0]} rows of input "
                f"and {len(self.layers)} layers"
            )
        carried, scans = [], []
        # The residual stream is kept in the compute dtype, as the released models do.
        x = x.to(compute_dtype(self.dtype))
        for layer, own in zip(self.layers, state.layers):
            x, left, inputs = layer(x, own, recur)
            carried.append(left)
            scans.append(inputs)
        return State(tuple(carried)), x, tuple(scans)

    def run(
        self,
        state: State,
        ids: Tensor,
        *,
        chunk: int = 256,
        logits: str = "all",
        observe: Callable[[Chunk], None] | None = None,
    ) -> tuple[State, Tensor | None]:
        """Many tokens: ids (b, t) to the state after them and logits.

        Args:
            state: what was before.
            ids: (b, t) token ids, t at least 1; rows are of one length.
            chunk: tokens that go through all layers at once; the result depends on it by rounding alone.
            logits: "all" for (b, t, v), "last" for (b, v) after the last token, "none" for None. An observer sees
                those of its chunk unless they are "none".
            observe: called with each `Chunk` after it is done; the tensors are not kept here.

        Raises:
            PromptError: for an empty prompt or ids outside the vocabulary.
        """
        if logits not in LOGITS:
            raise ValueError(f"logits is one of {', '.join(LOGITS)}, got {logits!r}")
        if chunk < 1:
            raise ValueError(f"chunk is at least 1, got {chunk}")
        ids = torch.as_tensor(ids)
        if ids.ndim != 2 or not ids.shape[1]:
            raise PromptError(f"run takes ids (b, t) of at least one token, got {tuple(ids.shape)}")
        kept: list[Tensor] = []
        for start in range(0, ids.shape[1], chunk):
            stop = min(start + chunk, ids.shape[1])
            before = state
            state, residual, scans = self._through(before, self.embed(ids[:, start:stop]), scan.run)
            wanted = None if logits == "none" or (logits == "last" and observe is None) else self.logits(residual)
            if logits == "all" and wanted is not None:
                kept.append(wanted)
            if observe is not None:
                observe(Chunk(start, stop, before, state, scans, wanted))
        if logits == "none":
            return state, None
        return state, torch.cat(kept, dim=1) if kept else self.logits(residual[:, -1])
