"""The comparison of a fast trace with the model's own scans: of all layers at once, and no weaker for that."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import checkpoints
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ssmlens
from ssmlens import recorder
from ssmlens.tap import tapping
from ssmlens.trace import gap, ratio, relative_error

FAMILIES = ("mamba1", "falcon", "mamba2")
IDS = torch.randint(37, (2, 50), generator=torch.Generator().manual_seed(0))


class Calls(TorchDispatchMode):
    """Counts the operations that reach torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def scan_of(lens: ssmlens.Lens) -> tuple[Any, str]:
    """The module and the name of the scan function of a model."""
    _, mixer, family = lens._mixers[0]
    return sys.modules[type(mixer).__module__], family.scan


@pytest.mark.parametrize("family", FAMILIES)
def test_more_layers_cost_few_operations_and_no_look_at_a_number(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(layers: int) -> Counter[str]:
        lens = ssmlens.load(getattr(checkpoints, family)(num_hidden_layers=layers))
        lens.trace(IDS, scan="fast")
        with Calls() as calls:
            lens.trace(IDS, scan="fast").check()
        return calls.found

    # Our own scan has counts of its own.
    monkeypatch.setattr(recorder.scan, "run", lambda inputs: (inputs.value, inputs.value[:, 0, :, :, None]))
    monkeypatch.setattr(ssmlens.Trace, "check", lambda trace: trace)
    more = count(6) - count(2)
    assert more["aten._local_scalar_dense.default"] == more["aten.nonzero.default"] == 0
    assert sum(more.values()) <= 4 * 220


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_together_and_one_by_one_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(num_hidden_layers=3))
    runs: list[int] = []
    together = recorder._together

    def watched(calls: Any) -> Any:
        runs.append(len(calls))
        return together(calls)

    monkeypatch.setattr(recorder, "_together", watched)
    trace = lens.trace(IDS, scan="fast").check()
    assert runs == [3]
    runs.clear()
    monkeypatch.setattr(recorder, "TOGETHER", 1)
    single = lens.trace(IDS, scan="fast").check()
    assert runs == [1, 1, 1]
    assert torch.equal(trace.logits, single.logits)
    assert max(trace.reconstruction_error.values()) < 1e-13
    assert max(single.reconstruction_error.values()) < 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_computes_something_else_is_found_in_its_layer(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(num_hidden_layers=3))
    module, name = scan_of(lens)
    original, wrong = getattr(module, name), float(lens._mixers[1][1].D.detach()[0])

    def other(*args: Any, D: Any = None, **kwargs: Any) -> Any:
        found = original(*args, D=D, **kwargs)
        off = 1e-6 * (D[0] == wrong)
        return (found[0] * (1 + off), *found[1:]) if isinstance(found, tuple) else found * (1 + off)

    other.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, name, other)
    errors = lens.trace(IDS, scan="fast").reconstruction_error
    assert errors[1] > 1e-8
    assert max(errors[0], errors[2]) < 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_that_takes_one_layer_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(num_hidden_layers=3))
    module, name = scan_of(lens)
    original = getattr(module, name)
    calls: list[int] = []

    def strict(*args: Any, **kwargs: Any) -> Any:
        x = kwargs.get("hidden_states", args[0] if args else None)
        x.sum().item()  # what vmap forbids
        calls.append(1)
        return original(*args, **kwargs)

    strict.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, name, strict)
    assert max(lens.trace(IDS, scan="fast").check().reconstruction_error.values()) < 1e-13
    assert len(calls) == 3


def test_another_tap_around_the_trace_is_compared_with_while_it_acts() -> None:
    lens = ssmlens.load(checkpoints.mamba1())

    def louder(call: Any) -> Any:
        found = call.run()
        return (found[0] * 1.5, *found[1:]) if isinstance(found, tuple) else found * 1.5

    with tapping(lens._mixers, louder) as tap:
        errors = lens.trace(IDS, scan="fast").reconstruction_error
        assert set(tap.fired) == {0, 1}
    assert min(errors.values()) > 0.1


def test_gaps_leave_padding_out() -> None:
    ours, theirs = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    ours[1, 2] = torch.nan
    real = torch.tensor([[True, True, True], [True, True, False]])
    assert gap(ours, theirs, real).tolist() == [1.0, 2.0]
    assert relative_error(ours, theirs, real) == 0.5
    assert relative_error(ours, theirs) != relative_error(ours, theirs)
    assert relative_error(ours[:, :0], theirs[:, :0]) == ratio(0.0, 0.0) == 0.0
    assert ratio(1.0, 0.0) == float("inf")
