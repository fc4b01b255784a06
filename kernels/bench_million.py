"""A trace of a million tokens, and what it says about memory: ``python -m ssmlens.kernels.bench million``.

One random layer of each family in the shape of a 130M model, over random tokens of a small vocabulary. Every step is
timed once and shows the memory that it needed beyond what was there, so that what does not stream is seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["million"]

Peak = Callable[[str], AbstractContextManager[list[int]]]
"""`bench.peak_memory`: the bytes of a block at its highest point beyond those before, where known."""

Meter = Callable[[Callable[[], Any]], tuple[Any, float, int | None]]
"""Runs a call: what it returned, its seconds and its peak."""

WORDS = 256
# Heads whose half-lives are found at every token, as against at a few.
HEADS = 16


def million(tokens: int, device: str, dtype: torch.dtype, small: bool, peak: Peak) -> Iterator[dict[str, Any]]:
    """The steps of each family as rows of a table, each with a sentence of what was found.

    Args:
        tokens: length of the text.
        device: "cpu" or "cuda".
        dtype: of the model.
        small: tiny layers.
        peak: measures the memory of a step.

    Raises:
        ValueError: fewer than two tokens, or a trace that does not reproduce the model.
    """
    if tokens < 2:
        raise ValueError(f"a text of at least 2 tokens, not {tokens}")
    ids = torch.randint(WORDS, (1, tokens), generator=torch.Generator().manual_seed(0))
    on_gpu = device.startswith("cuda")

    def meter(call: Callable[[], Any]) -> tuple[Any, float, int | None]:
        with peak(device) as most:
            start = time.perf_counter()
            found = call()
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return found, seconds, most[0] if most else None

    for name, make in _models(small).items():
        torch.manual_seed(0)
        model = make().eval().to(device, dtype)
        about = {"op": f"million-{name}", "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
        highest = 0
        for step, seconds, most, found in _steps(model, ids, meter):
            yield {**about, "step": step, "seconds": seconds, "peak_bytes": most, "found": found}
            highest = max(highest, torch.cuda.max_memory_allocated() if on_gpu else 0)
        if on_gpu:
            yield {
                **about,
                "step": "highest point of the card",
                "seconds": None,
                "peak_bytes": highest,
                "found": "in all",
            }
        del model


def _models(small: bool) -> dict[str, Callable[[], torch.nn.Module]]:
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    width, states, heads = (32, 16, (8, 8)) if small else (768, 128, (24, 64))
    common = {"vocab_size": WORDS, "hidden_size": width, "num_hidden_layers": 1}
    second = {"state_size": states, "num_heads": heads[0], "head_dim": heads[1], "n_groups": 1}
    return {
        "mamba1": lambda: MambaForCausalLM(MambaConfig(**common, state_size=16)),
        "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**common, **second)),
    }


def _steps(model: torch.nn.Module, ids: Tensor, meter: Meter) -> Iterator[tuple[Any, ...]]:
    """Name of the step, its seconds and peak, and what it found."""
    from ssmlens.analyses import memory
    from ssmlens.loading import load

    length = ids.shape[1]
    lens = load(model, device=str(next(model.parameters()).device))
    trace, *cost = meter(lambda: lens.trace(ids, scan="fast").check())
    worst = max(trace.reconstruction_error.values())
    yield "trace", *cost, f"reconstruction error {worst:.1e} on the first tokens"
    rec = trace[0].recurrence
    heads = f"{rec.n_heads} heads x {rec.d_state} states"

    lives, *cost = meter(lambda: memory.half_life(trace).value)
    yield "half-life", *cost, f"{_spread(lives)} tokens over {heads}"
    at = sorted({0, length // 4, length // 2})
    lives, *cost = meter(lambda: memory.half_life(trace, "forward", at=at).value)
    reached = lives.isfinite().double().mean().item()
    yield f"half-life of {len(at)} tokens", *cost, f"{_spread(lives)} tokens, {100 * reached:.0f} % end in the text"
    few = _some_heads(rec)
    lives, *cost = meter(lambda: memory.half_life(few, "forward", quantiles=[0.5]).value)
    yield f"half-life of every token, {few.n_heads} heads", *cost, f"medians over tokens: {_spread(lives)} tokens"

    rows = sorted({length // 4, length // 2, length - 1})
    far, *cost = meter(lambda: memory.mean_distance(trace, rows=rows, quantile=None).value)
    yield (
        f"mean distance of {len(rows)} rows",
        *cost,
        f"{_spread(far[..., -1, :])} tokens back from the last, over heads",
    )
    reach, *cost = meter(lambda: memory.mean_distance(trace, quantile=0.9).columns["distance_q90"])
    yield "distance_q90 and spread of the last row", *cost, f"{_spread(reach)} tokens over heads"

    line, *cost = meter(lambda: rec.attention.row(-1))
    held = line.numel() * line.element_size()
    total = sum(part.abs().sum().item() for part in line[0].split(64))
    near = sum(part[:, -1000:].abs().sum().item() for part in line[0].split(64))
    yield (
        "last row of attention",
        *cost,
        f"{held / 1e9:.2f} GB, {100 * near / total:.1f} % of |M| in the last 1000 tokens",
    )
    del line
    (_, sources), *cost = meter(lambda: rec.attention.topk(8, rows=[-1]))
    ages = (length - 1 - sources[sources >= 0]).double()
    yield "8 largest sources of the last row", *cost, f"{_spread(ages)} tokens back"

    norms, *cost = meter(lambda: memory.state_norm(trace, reduce="pooled"))
    share = norms.columns["kept_share"][0, 0, 1:].nanmean().item()
    yield (
        "state norm of every token",
        *cost,
        (f"{norms.value[0, 0, -1].item():.3g} at the end, one token keeps {100 * share:.2f} % on average"),
    )


def _some_heads(rec: Any) -> Any:
    from ssmlens.recurrence import Recurrence

    return Recurrence(rec.inputs.select_heads(slice(0, min(HEADS, rec.n_heads))))


def _spread(x: Tensor) -> str:
    """Middle and extremes."""
    numbers = x[~x.isnan()].flatten().tolist()
    if len(numbers) == 0:
        return "no"
    return f"{statistics.median(numbers):.4g} ({min(numbers):.4g} to {max(numbers):.4g})"
