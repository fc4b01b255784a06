"""Rank-one model editing (ROME) at a mixer's output projection.

``out_proj`` is read as a memory from keys to values. One association is exchanged: the weight becomes the closest one,
in the metric of the keys that text gives, that maps the subject's key to a value which makes the model say the target
(Meng et al. 2022; for Mamba, Sen Sharma, Atkinson and Bau 2024, who find out_proj of the middle layers to work best).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ssmlens import zoo
from ssmlens.errors import PromptError, SsmlensError
from ssmlens.interventions._forward import Changes, choose_layers, forward
from ssmlens.interventions._positions import one_position
from ssmlens.interventions._rome_task import Task, keys, out_weight
from ssmlens.interventions._train_lens import windows
from ssmlens.lens import Lens
from ssmlens.prompt import Batch, prepare

__all__ = ["RomeEdit", "rome", "second_moment"]

PASSAGE = "passages/persuasion.txt"


@dataclass(frozen=True, eq=False)
class RomeEdit:
    """A rank-one edit of one weight: ``W' = W + outer(value - W key, direction) / (direction . key)``.

    As a context manager it puts the edit into the lens's model and takes it out again, bit for bit, also after an
    exception. `copy` gives an edited model of its own.

    Args:
        lens: whose model it is about.
        layer: index of the layer.
        key: (e,) the subject's key, mean over the prefixes.
        value: (d,) what the edited weight makes of it.
        direction: (e,) the key through the inverse second moment, of norm 1.
        update: (d, e) what is added to out_proj.weight.
        losses: of the optimisation of the value, step by step.
        probability: of the target after the prompt, before and after the edit (the product over its tokens).
        settings: prompt, subject position, target ids and the optimiser's numbers.
    """

    lens: Lens = field(repr=False)
    layer: int
    key: Tensor = field(repr=False)
    value: Tensor = field(repr=False)
    direction: Tensor = field(repr=False)
    update: Tensor = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    probability: tuple[float, float]
    settings: Mapping[str, Any] = field(repr=False)
    _saved: list[Tensor] = field(default_factory=list, repr=False)

    def __enter__(self) -> Lens:
        weight = out_weight(self.lens, self.layer)
        self._saved.append(weight.detach().clone())
        _write(self.lens, weight, weight.detach() + self.update.to(weight))
        return self.lens

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _write(self.lens, out_weight(self.lens, self.layer), self._saved.pop())

    def copy(self) -> Lens:
        """A lens of an edited copy of the model; the original stays as it is."""
        other = Lens(copy.deepcopy(self.lens.model), self.lens.tokenizer, f"{self.lens.name} (edited)")
        weight = out_weight(other, self.layer)
        _write(other, weight, weight.detach() + self.update.to(weight))
        return other


def rome(
    lens: Lens,
    layer: int,
    prompt: str | Sequence[int] | Tensor,
    subject: str | int,
    target: str | int | Sequence[int],
    *,
    text: Any = None,
    moment: Tensor | None = None,
    prefixes: Sequence[Any] = (),
    steps: int = 25,
    rate: float = 0.5,
    kl_weight: float = 0.0625,
    weight_decay: float = 0.5,
    clamp: float = 4.0,
    ridge: float = 1e-3,
) -> RomeEdit:
    """Make the model go on from ``prompt`` with ``target``, by one edit of out_proj in ``layer``.

    The key is the input of out_proj at the subject's last token. The value is the present output plus a change that
    Adam finds: it makes the target likely, keeps the next-token distribution after the subject (KL), and stays small
    (weight decay, clamp). Nothing is changed until the result is used, see `RomeEdit`.

    Args:
        lens: the model.
        layer: index of a layer with a recurrence.
        prompt: one text or list of ids that ends where the target should follow.
        subject: text in the prompt whose last token holds the key, or that token's position.
        target: what should follow: a text, a token id or several.
        text: text, texts or windows of ids (n, t) that the keys' second moment is taken from; for the shipped English
            models by default pages of Persuasion.
        moment: (e, e) the second moment itself, as `second_moment` returns it.
        prefixes: texts or lists of ids put before the prompt; the key and the loss are means over the prompt alone
            and after each of them.
        steps, rate: of Adam; the rate is in units of the output's root mean square.
        kl_weight: of the divergence, from the unedited model's distribution after the subject, in the loss.
        weight_decay: times the norm of the change over the squared norm of the output it is added to.
        clamp: largest norm of the change, as a multiple of that of the output.
        ridge: added to the second moment's diagonal, as a share of its mean; keeps it invertible on little text.

    Returns:
        The `RomeEdit`.

    Raises:
        SsmlensError: for an empty target, a subject that the prompt lacks, or numbers out of range.
        LayerError: when the layer does not exist or has no recurrence.

    Source: Meng et al. 2022, Eqs. 2 and 4; Sen Sharma, Atkinson and Bau 2024.
    """
    choose_layers(lens, [layer])
    if steps < 1 or not rate > 0 or not clamp > 0 or not ridge >= 0 or kl_weight < 0 or weight_decay < 0:
        raise SsmlensError("steps, rate and clamp are above 0; kl_weight, weight_decay and ridge at least 0")
    ids = _one(lens, prompt, "prompt")
    wanted = _one(lens, [target] if isinstance(target, int) else target, "target")
    position = _position(lens, ids, subject)
    fronts = [[], *(_one(lens, p, "a prefix") for p in prefixes)]
    rows = [[*front, *ids, *wanted[:-1]] for front in fronts]
    batch = _batch(lens, rows)
    task = Task(lens, layer, batch, torch.tensor([len(f) + position for f in fronts]), len(ids), wanted, fronts)
    key, output = task.key_and_output()
    covariance = second_moment(lens, layer, _text(lens, text)) if moment is None else moment
    direction = _direction(key, covariance, ridge)
    change, losses = task.optimise(output, steps, rate, kl_weight, weight_decay, clamp)
    weight = out_weight(lens, layer).detach().to(key.dtype)
    update = torch.outer(change.to(key.dtype), direction) / (direction @ key)
    before = task.probability()
    edit = RomeEdit(
        lens=lens, layer=layer, key=key, value=weight @ key + change.to(key.dtype), direction=direction, update=update,
        losses=losses, probability=(before, float("nan")),
        settings={
            "model": lens.name, "prompt": ids, "position": position, "target": wanted, "steps": steps, "rate": rate,
            "kl_weight": kl_weight, "weight_decay": weight_decay, "clamp": clamp, "ridge": ridge,
            "prefixes": len(prefixes),
        },
    )  # fmt: skip
    with edit:
        after = task.probability()
    return replace(edit, probability=(before, after), _saved=[])


def second_moment(lens: Lens, layer: int, text: Any, *, length: int = 256) -> Tensor:
    """(e, e) mean of the outer product of out_proj's input with itself over the tokens of a text.

    Args:
        lens: the model.
        layer: index of the layer.
        text: a text, several, token ids, or windows of ids (n, t).
        length: tokens of the windows that a text is cut into.
    """
    choose_layers(lens, [layer])
    total, count = torch.zeros(()), 0
    for rows in windows(lens, text, length).split(8):
        batch = Batch(rows, torch.full((len(rows),), rows.shape[1]), [])
        with keys(lens, layer) as seen:
            forward(lens, batch, Changes())
        flat = seen[0].flatten(0, 1).to(torch.promote_types(seen[0].dtype, torch.float32))
        total = flat.T @ flat + total.to(flat)
        count += len(flat)
    return total / count


def _direction(key: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    """``C^-1 key``, of norm 1, computed in float64."""
    size = len(key)
    if tuple(covariance.shape) != (size, size):
        raise SsmlensError(f"the second moment is ({size}, {size}) for this layer, got {tuple(covariance.shape)}")
    wide = covariance.double().to(key.device)
    wide = wide + ridge * wide.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=key.device)
    try:
        found = torch.linalg.solve(wide, key.double())
    except torch.linalg.LinAlgError as error:
        raise SsmlensError("the second moment is singular: give more text or a larger ridge") from error
    return (found / found.norm()).to(key.dtype)


@torch.no_grad()
def _write(lens: Lens, weight: Tensor, new: Tensor) -> None:
    weight.copy_(new)
    vars(lens).pop("fingerprint", None)  # it is cached, and speaks of the weights


def _one(lens: Lens, what: Any, name: str) -> list[int]:
    """The token ids of one text or list."""
    batch = prepare(what, lens.tokenizer, lens.vocab_size)
    if len(batch.ids) != 1:
        raise PromptError(f"{name} is one text or one list of token ids, got {len(batch.ids)}")
    return [int(i) for i in batch.ids[0]]


def _position(lens: Lens, ids: list[int], subject: str | int) -> int:
    if not isinstance(subject, str):
        return one_position(subject, len(ids), "subject")
    if lens.tokenizer is None:
        raise PromptError("this model has no tokenizer: give the subject as a token position")
    end = lens.tokenizer.decode(ids).rfind(subject)
    if end < 0 or not subject:
        raise SsmlensError(f"the prompt does not hold the subject {subject!r}")
    end += len(subject)
    return next(i for i in range(len(ids)) if len(lens.tokenizer.decode(ids[: i + 1])) >= end)


def _batch(lens: Lens, rows: list[list[int]]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return prepare(ids, lens.tokenizer, lens.vocab_size, mask)


def _text(lens: Lens, text: Any) -> Any:
    if text is not None:
        return text
    if lens.name in zoo.names() and lens.name.endswith("-english"):
        return (zoo.path(lens.name).parents[1] / PASSAGE).read_text(encoding="utf-8")
    raise SsmlensError("text is missing: give text for the keys' second moment, or the moment itself")
