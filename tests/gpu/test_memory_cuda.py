"""The memory study on a CUDA device equals that on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import ssmlens
from ssmlens import zoo
from ssmlens.analyses import memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OF_TRACE: dict[str, Callable[..., memory.Result]] = {
    "summary": memory.summary,
    "timescale_spectrum": partial(memory.timescale_spectrum, windows=2),
    "channel_class": memory.channel_class,
    "fidelity": partial(memory.fidelity, lags=[0, 1, 4], rank=16, repeats=50),
    "output": partial(memory.fidelity, lags=[0, 1], features="output", rank=16, repeats=50),
    "cross_layer_fidelity": partial(memory.cross_layer_fidelity, lags=[1, 2], rank=16, repeats=50),
    "transport": partial(memory.transport, lags=[0, 1, 4], reads=8, repeats=50),
    "recall_by_age": partial(memory.recall_by_age, lags=[0, 1, 2, 4], rank=16),
}
OF_LENS: dict[str, Callable[..., memory.Result]] = {
    "effective_remembrance": partial(memory.effective_remembrance, kept=[1, 8, 40]),
    "influence": lambda lens, ids: memory.influence(lens, ids[0], probes=2),
    "state_stream": partial(memory.state_stream, train_length=16, bucket=8),
    "clipped": partial(memory.state_stream, train_length=16, bucket=8, clip=0.05, forget=1.5),
}
OF_LAYER: dict[str, Callable[..., memory.Result]] = {
    "window_by_difference": partial(memory.window_by_difference, width=5, at=[3, -1]),
    "norm_clip": partial(memory.norm_clip, limit=0.05),
}


def same(cuda: memory.Result, cpu: memory.Result) -> None:
    torch.testing.assert_close(cuda.value, cpu.value, rtol=1e-6, atol=1e-8, equal_nan=True)
    for name, x in cpu.control.items():
        torch.testing.assert_close(cuda.control[name], x, rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_the_same_on_both(name: str) -> None:
    assert name in zoo.names()
    ids = torch.randint(1, 54, (10, 40), generator=torch.Generator().manual_seed(0))
    lenses: list[Any] = [ssmlens.load(name, device=device, dtype=torch.float64) for device in ("cuda", "cpu")]
    traces = [lens.trace(ids) for lens in lenses]
    for study in OF_TRACE.values():
        same(*(study(trace) for trace in traces))
    for study in OF_LENS.values():
        same(*(study(lens, ids) for lens in lenses))
    for study in OF_LAYER.values():
        same(*(study(trace[1]) for trace in traces))
    same(*(memory.answers_by_age(lens, ids, ids.roll(3, 1)) for lens in lenses))
