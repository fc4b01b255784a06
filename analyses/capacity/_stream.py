"""A model streamed over a long text in chunks, with what each bucket of tokens showed kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.lens import Lens
from ssmlens.stepping import Chunk, State, Stepper

__all__ = ["SUB", "Stream", "stream"]

SUB = 8
"""Blocks of tokens in each bucket whose losses are kept apart, for the bootstrap."""

STATISTICS = ("mean", "variance", "rms", "median", "decay")

FORMAT = "ssmlens stream 1"


@dataclass(frozen=True)
class Stream:
    """What was seen, bucket by bucket.

    Args:
        loss: (b, buckets, SUB) summed negative log likelihoods in nats.
        restarted: like it, with a state that starts anew every ``train_length`` tokens; None when not asked for.
        count: (buckets, SUB) tokens that had a target.
        states: for each statistic a list with one (heads, buckets) for each layer, means over rows.
    """

    loss: Tensor
    restarted: Tensor | None
    count: Tensor
    states: Mapping[str, list[Tensor]]


def stream(
    lens: Lens,
    ids: Tensor,
    bucket: int,
    chunk: int,
    restart: int | None,
    resume: str | Path | None,
    progress: Progress | None,
) -> Stream:
    """Run ids (b, t) through the model with carried states.

    Args:
        lens: the model.
        ids: the text.
        bucket: tokens of one bucket.
        chunk: tokens between two entries of the ledger, a multiple of ``bucket``.
        restart: also measure the loss with a state that starts anew every so many tokens; None for not.
        resume: ledger of a run that may have been killed; its last state lies beside it.
        progress: called with tokens done and tokens there are.
    """
    net = Stepper(lens)
    length = ids.shape[1]
    settings = {
        "fingerprint": lens.fingerprint,
        "ids": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16],
        "rows": len(ids),
        "tokens": length,
        "bucket": bucket,
        "chunk": chunk,
        "restart": restart,
    }
    ledger = Ledger(resume, settings)
    path = None if resume is None else Path(f"{resume}.state")
    start, carried, fresh = _open(net, path, len(ids), len(ledger))
    for begin in range(start, length, chunk):
        stop = min(begin + chunk, length)
        part: dict[str, Any] = {}
        carried, part["loss"], part["states"] = _run(net, carried, ids, begin, stop, bucket)
        if restart is not None:
            fresh, part["restarted"] = _restarted(net, fresh, ids, begin, stop, bucket, restart)
        if str(begin) not in ledger:
            ledger.put(str(begin), part)
        # After the ledger: a run that is killed between the two does this chunk again, and its entry stands.
        if path is not None:
            _keep(path, stop, carried, fresh)
        if progress is not None:
            progress(stop, length)
    return _join(ledger, ids, bucket, chunk, restart)


def _run(
    net: Stepper, state: State, ids: Tensor, begin: int, stop: int, bucket: int
) -> tuple[State, Tensor, dict[str, list[Tensor]]]:
    """The state after these tokens, summed losses (b, buckets, SUB) and statistics (heads, buckets) of each layer."""
    seen: list[Chunk] = []
    state, logits = net.run(state, ids[:, begin:stop], chunk=stop - begin, observe=seen.append)
    assert logits is not None
    loss = _sums(_losses(logits, ids, begin, stop), bucket)
    ends = [min(x + bucket, stop - begin) - 1 for x in range(0, stop - begin, bucket)]
    each = [_statistics(inputs, ends, bucket) for inputs in seen[0].scans]
    return state, loss, {name: [x[name] for x in each] for name in STATISTICS}


def _restarted(
    net: Stepper, state: State, ids: Tensor, begin: int, stop: int, bucket: int, restart: int
) -> tuple[State, Tensor]:
    """As `_run`, the loss alone, from a state that starts anew wherever the position is a multiple of ``restart``."""
    parts, at = [], begin
    while at < stop:
        if at % restart == 0:
            state = net.initial(len(ids))
        end = min(stop, (at // restart + 1) * restart)
        state, logits = net.run(state, ids[:, at:end], chunk=end - at)
        assert logits is not None
        parts.append(_losses(logits, ids, at, end))
        at = end
    return state, _sums(torch.cat(parts, dim=1), bucket)


def _losses(logits: Tensor, ids: Tensor, begin: int, stop: int) -> Tensor:
    """(b, stop - begin) nats for the token after each position, also across the chunk's end; 0 after the last."""
    following = ids[:, begin + 1 : stop + 1].to(logits.device)
    law = logits[:, : following.shape[1]].double().log_softmax(-1)
    found = -law.gather(-1, following[..., None])[..., 0].cpu()
    return torch.nn.functional.pad(found, (0, stop - begin - found.shape[1]))


def _sums(losses: Tensor, bucket: int) -> Tensor:
    """(b, t) summed over blocks of each bucket: (b, buckets, SUB)."""
    buckets = -(-losses.shape[1] // bucket)
    padded = torch.nn.functional.pad(losses, (0, buckets * bucket - losses.shape[1]))
    each = padded.unflatten(1, (buckets, bucket))
    return torch.stack([x.sum(-1) for x in each.tensor_split(SUB, dim=-1)], dim=-1)


def _statistics(inputs: ScanInputs, ends: list[int], bucket: int) -> dict[str, Tensor]:
    """Of the states (p x n) after ``ends``, and the decay before them: (heads, buckets) each, means over rows.

    Heads of one channel (Mamba-1) make one matrix a layer.
    """
    states = scan.states(inputs, ends).double()
    logs = inputs.full_log_decay().double().mean(-1)
    if inputs.head_dim == 1:
        states, logs = states.flatten(2, 3)[:, :, None], logs.mean(-1, keepdim=True)
    flat = states.flatten(3)
    decay = torch.stack([logs[:, max(0, e + 1 - bucket) : e + 1].mean(1) for e in ends], dim=1).exp()
    # A state of one number has no variance of its own.
    variance = flat.var(-1) if flat.shape[-1] > 1 else flat[..., 0].square()
    found = {
        "mean": flat.mean(-1),
        "variance": variance,
        "rms": flat.square().mean(-1).sqrt(),
        "median": flat.median(-1).values,
        "decay": decay,
    }
    return {name: x.mean(0).mT.cpu() for name, x in found.items()}


def _join(ledger: Ledger, ids: Tensor, bucket: int, chunk: int, restart: int | None) -> Stream:
    parts = [ledger.parts[str(begin)] for begin in range(0, ids.shape[1], chunk)]

    def over(name: str) -> Tensor:
        return torch.cat([torch.tensor(x[name], dtype=torch.float64) for x in parts], dim=1)

    has_target = torch.ones(1, ids.shape[1], dtype=torch.float64)
    has_target[:, -1] = 0
    layers = len(parts[0]["states"]["mean"])
    states = {
        name: [
            torch.cat([torch.tensor(x["states"][name][k], dtype=torch.float64) for x in parts], dim=1)
            for k in range(layers)
        ]
        for name in STATISTICS
    }
    return Stream(over("loss"), None if restart is None else over("restarted"), _sums(has_target, bucket)[0], states)


def _keep(path: Path, stop: int, *states: State) -> None:
    """Both states, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {
        f"{i}.{k}.{name}": x.detach().cpu().contiguous()
        for i, state in enumerate(states)
        for k, layer in enumerate(state.layers)
        for name, x in (("h", layer.h), ("conv", layer.conv))
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, part, metadata={"format": FORMAT, "stop": str(stop)})
    part.replace(path)


def _open(net: Stepper, path: Path | None, batch: int, entries: int) -> tuple[int, State, State]:
    """Where to go on, and both states there; the start where nothing was kept."""
    from safetensors import safe_open

    from ssmlens.stepping import LayerState

    first = net.initial(batch)
    if path is None or not entries or not path.exists():
        return 0, first, first
    with safe_open(path, framework="pt") as file:
        stop = int((file.metadata() or {})["stop"])
        device = first.layers[0].h.device
        states = [
            State(
                tuple(
                    LayerState(*(file.get_tensor(f"{i}.{k}.{name}").to(device) for name in ("h", "conv")))
                    for k in range(len(first.layers))
                )
            )
            for i in range(2)
        ]
    return stop, states[0], states[1]
