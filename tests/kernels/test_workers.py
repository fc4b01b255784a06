"""Work shared out over threads gives what one thread gives, in every mode, and leaves torch's settings alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from scan_cases import Case, make, relative_error
from tolerances import TOL

from ssmlens.kernels import attention, attention_lines, attention_tiles, workers


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    # One head a block, so that there is something to share out.
    for module in (attention_tiles, attention_lines):
        monkeypatch.setattr(module, "_CPU_BLOCK", 1)
    yield
    torch.set_num_threads(real)


def everything(x):  # type: ignore[no-untyped-def]
    found = [attention.dense(x), attention.row(x, 9), attention.column(x, 3), attention.distance(x)]
    return found + [attention.reduce(x, how) for how in attention.REDUCTIONS]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_threads_change_nothing(mode, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    x = make(Case(t=40, h=8, decay="dt*A state", reset=True))
    with mode():
        shared = everything(x)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        alone = everything(x)
    assert all(relative_error(a, b) < TOL[torch.float64] for a, b in zip(shared, alone, strict=True))
    assert torch.equal(shared[0], alone[0])


@pytest.mark.usefixtures("three_threads")
def test_items_are_split_in_order_over_threads():
    seen = []

    def work(items: range) -> list[int]:
        seen.append((threading.current_thread().name, torch.is_grad_enabled()))
        return list(items)

    parts = workers.in_parts(range(8), work)
    assert [i for part in parts for i in part] == list(range(8))
    assert sorted(map(len, parts)) == [2, 3, 3]
    assert all(name.startswith("ssmlens-kernels") and not grad for name, grad in seen)
    assert workers.in_parts(range(8), work, alone=True) == [list(range(8))]
    assert seen[-1] == (threading.current_thread().name, True)
    assert len(workers.in_parts(range(8), work, most=2)) == 2
    assert workers.in_parts([], list) == [[]]


@pytest.mark.usefixtures("three_threads")
def test_gradients_are_recorded_on_the_calling_thread():
    x = make(Case(t=12, h=6))
    x = x.replace(value=x.value.clone(), write=x.write.clone().requires_grad_())
    assert attention.dense(x).requires_grad
    with torch.no_grad():
        assert not attention.dense(x).requires_grad


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_worker_arrives():
    def work(items: range) -> None:
        raise ValueError(f"cannot do {list(items)}")

    with pytest.raises(ValueError, match="cannot do"):
        workers.in_parts(range(4), work)


def test_new_threads_keep_torchs_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "_POOLS", {})
    before, found = torch.get_num_threads(), []
    workers._pool(before)
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [before]
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("three_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_its_own_threads():
    assert workers.in_parts(range(3), list) == [[0], [1], [2]]
    child = os.fork()
    if not child:
        os._exit(0 if workers.in_parts(range(3), list) == [[0], [1], [2]] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
