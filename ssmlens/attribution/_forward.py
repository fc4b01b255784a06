"""The engine of every gradient method: the model from embeddings to one logit per row, and its gradient.

The forward is recomputed from the model's weights (`_mixers`), so that each factor can be made a constant without
touching the model, and is held against the model's own layers (`_check`) before anything is handed out. Long prompts
are cut into pieces of time: the first pass keeps what the mixers carry from piece to piece, the second goes back
through the pieces and recomputes each. Memory then grows with the number of pieces, not with their activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.attribution._mixers import Carry, Mixer, Rules, normalise
from ssmlens.errors import UnsupportedModelError
from ssmlens.kernels.inputs import compute_dtype
from ssmlens.lens import Lens
from ssmlens.models import FAMILIES

__all__ = ["EXACT", "FROZEN", "LRP", "Gradient", "Network", "Rules"]

EXACT = Rules()
"""The model's own gradient."""

FROZEN = Rules(norm="freeze", activation="freeze", routing="freeze", gate="freeze")
"""The network as a linear map of its embeddings: everything that multiplies is constant."""

LRP = Rules(norm="freeze", activation="freeze", routing="freeze", gate="half")
"""MambaLRP (Jafari et al. 2024): as `FROZEN`, but the gate's branch gets half of what passes the gate."""

PIECE_BYTES = 512 * 2**20
"""About what the activations of one piece of time may take."""

SHORTEST = 16
"""Tokens that a piece of time has at least."""

KEPT = 14
"""Tensors of the inner width that a layer keeps for its backward pass, about."""


@dataclass(frozen=True, eq=False)
class Gradient:
    """One target logit per row and its gradient.

    Args:
        logits: (b, v) at each row's position.
        target: (b,) token ids.
        embeddings: (b, t, d) gradient of the target logit; exactly 0 after the position.
        bias: (b,) sum over the additive parameters of parameter times gradient; 0 where it was not asked for.
    """

    logits: Tensor
    target: Tensor
    embeddings: Tensor
    bias: Tensor

    @property
    def logit(self) -> Tensor:
        """(b,) the target's."""
        return self.logits.gather(1, self.target[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class _Block:
    """One layer: its norm and its mixer."""

    weight: Tensor
    eps: float
    mixer: Mixer

    def __call__(self, x: Tensor, rules: Rules, carry: Carry) -> tuple[Tensor, Carry]:
        hidden = normalise(x, self.weight, self.eps, rules.norm == "freeze")
        out, carry = self.mixer(hidden, rules, carry)
        return x + out, carry


class Network:
    """A lens's model from embeddings to logits, in the compute dtype (float64, or else float32).

    Args:
        lens: whose layers all hold a recurrence.

    Raises:
        UnsupportedModelError: when a layer is of another kind.
    """

    def __init__(self, lens: Lens) -> None:
        self.lens = lens
        self.dtype = compute_dtype(lens.dtype)
        model: Any = lens.model
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.blocks = tuple(self._block(k) for k in range(len(lens.layers)))
        final, head = model.base_model.norm_f, model.lm_head
        self.final = (self._cast(final.weight), float(final.variance_epsilon))
        self.head = self._cast(head.weight)
        self.head_bias = None if head.bias is None else self._cast(head.bias)

    def _cast(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype)

    def _block(self, k: int) -> _Block:
        info = self.lens.layers[k]
        if info.kind != "ssm":
            raise UnsupportedModelError(
                f"layer {k} is no Mamba mixer but {info.kind!r}: attribution through all layers needs a model of "
                "Mamba-1 or Mamba-2 layers alone"
            )
        module: Any = self.lens.model.get_submodule(info.path)
        norm: Any = self.lens.model.get_submodule(info.path.rpartition(".")[0]).norm
        family = next(f for f in FAMILIES.values() if f.name == info.family)
        parameters, config = family.describe(module)
        if family.name == "mamba2":
            config = {**config, "dt_limit": tuple(float(x) for x in module.time_step_limit)}
        mixer = Mixer(family.name, {n: self._cast(x) for n, x in parameters.items()}, config)
        return _Block(self._cast(norm.weight), float(norm.variance_epsilon), mixer)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (b, t, d) of token ids (b, t), without a gradient to the table."""
        return F.embedding(ids.to(self.embedding.device), self.embedding.detach()).to(self.dtype)

    def logits(self, residual: Tensor, freeze: bool = False) -> Tensor:
        """(..., v) from the last residual stream (..., d)."""
        return F.linear(normalise(residual, *self.final, freeze), self.head, self.head_bias)

    def step(
        self, x: Tensor, carries: Sequence[Carry], rules: Rules, blocks: Sequence[_Block] | None = None
    ) -> tuple[Tensor, list[Carry]]:
        """The last residual stream (b, t, d) of one piece of time, and what goes on to the next."""
        left = []
        for block, carry in zip(self.blocks if blocks is None else blocks, carries, strict=True):
            x, carry = block(x, rules, carry)
            left.append(carry)
        return x, left

    def start(self, batch: int) -> list[Carry]:
        return [block.mixer.start(batch) for block in self.blocks]

    def piece_length(self, batch: int) -> int:
        """Tokens of one piece of time for a batch."""
        return max(SHORTEST, PIECE_BYTES // (batch * self._token_bytes()))

    def _token_bytes(self) -> int:
        """What the backward pass keeps of one token, about."""
        inner = self.blocks[0].mixer.inner if self.blocks else 1
        return max(1, len(self.blocks)) * KEPT * inner * torch.finfo(self.dtype).bits // 8

    @torch.no_grad()
    def last_logits(self, x: Tensor, positions: Tensor, rules: Rules = EXACT) -> Tensor:
        """Logits (b, v) at one position per row, from embeddings (b, t, d)."""
        return self._forward(x, positions, rules, [])

    @torch.no_grad()
    def _forward(self, x: Tensor, positions: Tensor, rules: Rules, starts: Sequence[Sequence[Carry]]) -> Tensor:
        """Logits (b, v); what each piece of time starts from goes into ``starts``, where there is room for it."""
        length = self.piece_length(len(x))
        stop = int(positions.max()) + 1
        carries = self.start(len(x))
        picked = x.new_zeros(len(x), x.shape[2])
        for i, a in enumerate(range(0, stop, length)):
            for room, carry in zip(starts[i] if starts else [], carries):
                room.tail.copy_(carry.tail)
                room.state.copy_(carry.state)
            residual, carries = self.step(x[:, a : min(a + length, stop)], carries, rules)
            rows, where = _inside(positions, a, a + length)
            picked[rows] = residual[rows, where]
        return self.logits(picked, rules.norm == "freeze")

    def gradient(
        self, x: Tensor, positions: Tensor, rules: Rules, target: Tensor | None = None, biases: bool = False
    ) -> Gradient:
        """The target logit at one position per row, and its gradient under the rules.

        Args:
            x: (b, t, d) embeddings.
            positions: (b,) where each row's logit is read.
            rules: what counts as a constant.
            target: (b,) ids; None for the largest logit of each row.
            biases: also collect the share of the additive parameters.
        """
        x = x.detach()
        most = max(1, PIECE_BYTES // (self._token_bytes() * min(x.shape[1], SHORTEST)))
        if len(x) > most:
            parts = [slice(a, a + most) for a in range(0, len(x), most)]
            return _join(
                [self.gradient(x[p], positions[p], rules, None if target is None else target[p], biases) for p in parts]
            )
        length, stop = self.piece_length(len(x)), int(positions.max()) + 1
        # One piece needs no first pass: all logits come with its gradient.
        logits, starts = None, [self.start(len(x))]
        if stop > length:
            starts = _room(starts[0], -(-stop // length))
            logits = self._forward(x, positions, rules, starts)
        gradient, share = torch.zeros_like(x), x.new_zeros(len(x))
        back: list[Tensor] = []
        while starts:
            a = (len(starts) - 1) * length
            piece, carries = x[:, a : min(a + length, stop)].requires_grad_(), _leaves(starts.pop())
            blocks, added = self._with_biases(len(x)) if biases else (self.blocks, [])
            with torch.enable_grad():
                residual, left = self.step(piece, carries, rules, blocks)
                rows, where = _inside(positions, a, a + length)
                read = self.logits(residual[rows, where], rules.norm == "freeze")
                logits = read.detach() if logits is None else logits
                target = logits.argmax(1) if target is None else target.to(logits.device)
                total = read.gather(1, target[rows, None]).sum()
            first, back, own = _backward(total, _tensors(left), back, piece, _tensors(carries), added)
            gradient[:, a : a + piece.shape[1]] = first
            for bias, g in zip(added, own):
                share += (bias.detach() * g).sum(1)
        assert logits is not None
        assert target is not None
        if biases and self.head_bias is not None:
            share += self.head_bias[target]
        return Gradient(logits, target, gradient, share)

    def _with_biases(self, batch: int) -> tuple[list[_Block], list[Tensor]]:
        """The blocks with additive parameters per row (b, c) that gradients can be taken of."""
        blocks: list[_Block] = []
        leaves: list[Tensor] = []
        for block in self.blocks:
            weights = block.mixer.weights
            own = {n: weights[n].repeat(batch, 1).requires_grad_() for n in block.mixer.bias_names}
            leaves += own.values()
            blocks.append(_Block(block.weight, block.eps, block.mixer.with_biases(own)))
        return blocks, leaves


def _backward(
    total: Tensor, left: list[Tensor], back: list[Tensor], piece: Tensor, carries: list[Tensor], added: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of ``total``, and of what is ``left`` with the gradients ``back``, for the three kinds of leaves."""
    outputs = [total, *(left if back else [])]
    used = [(o, g) for o, g in zip(outputs, [torch.ones_like(total), *back], strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in used],
        [piece, *carries, *added],
        [g for _, g in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return grads[0], list(grads[1 : 1 + len(carries)]), list(grads[1 + len(carries) :])


def _join(parts: Sequence[Gradient]) -> Gradient:
    """Gradients of parts of a batch as one."""
    return Gradient(
        torch.cat([p.logits for p in parts]),
        torch.cat([p.target for p in parts]),
        torch.cat([p.embeddings for p in parts]),
        torch.cat([p.bias for p in parts]),
    )


def _inside(positions: Tensor, a: int, z: int) -> tuple[Tensor, Tensor]:
    """The rows whose position is in [a, z), and where in it."""
    rows = ((positions >= a) & (positions < z)).nonzero()[:, 0]
    return rows, positions[rows] - a


def _tensors(carries: Sequence[Carry]) -> list[Tensor]:
    return [x for carry in carries for x in (carry.tail, carry.state)]


def _room(carries: Sequence[Carry], pieces: int) -> list[list[Carry]]:
    """Carries like these for every piece of time, to be filled.

    One tensor for all pieces: many small ones, each made between the large ones of its piece, would keep the allocator
    from giving any of that memory back (3.6 GB for 0.2 GB in use, at 16,000 tokens and 24 layers).
    """
    rooms = [(c.tail.new_empty(pieces, *c.tail.shape), c.state.new_empty(pieces, *c.state.shape)) for c in carries]
    return [[Carry(tail[i], state[i]) for tail, state in rooms] for i in range(pieces)]


def _leaves(carries: Sequence[Carry]) -> list[Carry]:
    return [Carry(carry.tail.detach().requires_grad_(), carry.state.detach().requires_grad_()) for carry in carries]
