"""Tangents through a whole model, layer by layer: against torch's forward mode of the loop over tokens."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ssmlens
from ssmlens.analyses import lyapunov
from ssmlens.analyses.lyapunov import _stack, _through
from ssmlens.analyses.lyapunov._model import Model
from ssmlens.analyses.lyapunov._tangent import carried, load_forward_mode
from ssmlens.errors import SsmlensError

FAMILIES: dict[str, dict[str, Any]] = {
    "mamba1": {},
    "falcon": {},
    "mamba2": {"num_heads": 4, "head_dim": 6, "n_groups": 2, "time_step_limit": (0.01, 0.2)},
}


def random_ids(length: int) -> Tensor:
    return torch.randint(37, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("entries", [1, 2**20])
@pytest.mark.parametrize("length", [1, 2, 3, 11])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_forward_mode_through_the_loop(
    family: str, length: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_through, "ENTRIES", entries)
    load_forward_mode()
    lens = ssmlens.load(getattr(checkpoints, family)(**FAMILIES[family]))
    model = Model.of(lens, random_ids(length), torch.float64)
    g = torch.Generator().manual_seed(1)
    state = torch.randn(model.like.size, generator=g, dtype=torch.float64)
    tangents = torch.randn(5, model.like.size, generator=g, dtype=torch.float64)
    vectors = model.net.embed(model.ids)
    with torch.no_grad():
        exact, moved = carried(lambda x: model.forward(x[None], vectors)[0], state, tangents)
        after, found = _stack._advance(model)(state, tangents, 0, length)
    torch.testing.assert_close(after, exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
    torch.testing.assert_close(found, moved, rtol=0, atol=1e-12 * float(moved.abs().max()))


class Calls(TorchDispatchMode):
    """Counts the operations that reach torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_token_costs_two_products_and_their_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_through, "ENTRIES", 2**25)
    load_forward_mode()
    lens = ssmlens.load(checkpoints.mamba1())
    model = Model.of(lens, random_ids(40), torch.float64)
    advance, state = _stack._advance(model), model.like.flatten()[0]
    tangents = torch.eye(4, len(state), dtype=torch.float64)

    def count(tokens: int) -> Counter[str]:
        with Calls() as calls:
            advance(state, tangents, 0, tokens)
        return calls.found

    count(20)  # whatever is set up once
    more = count(40) - count(20)
    layers, tokens = 2, 20
    assert more["aten.addcmul_.default"] == 2 * layers * tokens
    assert sum(more.values()) <= 8 * layers * tokens


def test_the_number_of_tokens_between_re_orthonormalisations() -> None:
    def interval(*gates: float, steps: int = 2000, window: int | None = None) -> int:
        return _stack._interval(torch.tensor(gates, dtype=torch.float64), steps, window)

    assert interval(-0.01, -0.02) == 50
    assert interval(-0.01) == 50
    assert interval(-0.01, -0.02, steps=500) == 25
    assert interval(-0.01, -0.02, steps=40) == 10
    assert interval(0.0, -math.log(1e6) / 20.5) == 20
    assert interval(0.0, -100.0) == 1
    assert interval(-0.01, -math.inf) == interval(-math.inf, -math.inf) == 10
    assert interval(-0.01, -0.02, window=60) == 30
    assert interval(-0.01, -0.02, window=53) == 1


def test_the_default_gives_the_exponents_of_fewer_tokens_at_a_time() -> None:
    lens, ids = ssmlens.load(checkpoints.mamba2()), random_ids(500)
    found = lyapunov.stack(lens, ids, 3, discard=100, control=False)
    assert found.settings["every"] == 20
    often = lyapunov.stack(lens, ids, 3, discard=100, control=False, every=5)
    torch.testing.assert_close(found.value, often.value, rtol=0, atol=1e-13)
    windows = lyapunov.stack(lens, ids, 3, discard=100, control=False, window=50)
    assert windows.settings["every"] == 10
    torch.testing.assert_close(windows.columns["mean"], often.value, rtol=0, atol=1e-13)
    with pytest.raises(SsmlensError, match="every is at least 1, got 0"):
        lyapunov.stack(lens, ids, 3, every=0)
