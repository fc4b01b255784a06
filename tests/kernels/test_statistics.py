"""Norms of the states against the states themselves, in any blocks of time."""

from __future__ import annotations

import math

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import TOL

from ssmlens.kernels import naive, scan, statistics
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [
    *(Case(t=t, decay=d, initial=t > 1, reset=t == 30, p=p) for t in (1, 30) for d in DECAYS for p in (1, 3)),
    *(Case(t=17, decay=d, initial=True, erase=True, reset=True) for d in DECAYS),
]


def truth(x: ScanInputs) -> scan.Statistics:
    """From the loop's states; what was kept of one is the state of a token that writes nothing."""
    x = x.cast(torch.float64)
    states = naive.states(x)
    kept = []
    for t in range(x.length):
        start = x.initial if t == 0 else states[:, t - 1]
        silent = x.slice(t, t + 1).replace(initial=start)
        kept.append(naive.states(silent.replace(value=torch.zeros_like(silent.value)))[:, 0])
    return scan.Statistics(states.norm(dim=(-2, -1)), torch.stack(kept, 1).norm(dim=(-2, -1)))


@pytest.mark.parametrize("block", [None, 64], ids=["one block", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_are_those_of_the_states(
    case: Case, dtype: torch.dtype, block: int | None, monkeypatch: pytest.MonkeyPatch
):
    if block:
        monkeypatch.setattr(statistics, "_CPU_BLOCK", block)
    x = make(case, torch.float32).cast(dtype)
    expected = truth(x)
    for impl in ("auto", "naive"):
        found = scan.statistics(x, impl=impl)
        assert found.norm.dtype == found.kept.dtype == dtype
        assert relative_error(found.norm, expected.norm) < TOL[dtype]
        assert relative_error(found.kept, expected.kept) < TOL[dtype]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("p", [1, 3])
def test_fused_norms_in_blocks(decay: str, p: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "_CPU_BLOCK", 18)
    monkeypatch.setattr(statistics, "_GPU_BLOCK", 18)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = make(Case(t=10, b=1, h=2, decay=decay, initial=True, p=p), torch.float32)
    expected = truth(x)
    found = scan.statistics(x.map(lambda z: z.to(device)), impl="triton")
    assert relative_error(found.norm.cpu(), expected.norm) < TOL[torch.float32]
    assert relative_error(found.kept.cpu(), expected.kept) < TOL[torch.float32]


def test_a_constant_drive_settles_at_its_geometric_sum():
    t, a = 400, 0.95
    ones = torch.ones(1, t, 1, 1, dtype=torch.float64)
    x = ScanInputs(value=ones, write=ones, read=ones, log_decay=torch.full_like(ones, math.log(a)))
    found = scan.statistics(x)
    steps = torch.arange(1, t + 1, dtype=torch.float64)
    norm = (1 - a**steps) / (1 - a)
    assert relative_error(found.norm[0, :, 0], norm) < 1e-12
    assert relative_error(found.kept[0, 1:, 0], a * norm[:-1]) < 1e-12
    assert found.kept[0, 0, 0] == 0


def test_streamed_stretches_follow_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "_CPU_BLOCK", 300)
    x = make(Case(t=40))
    whole = scan.statistics(x)
    end = 0
    for stretch, part in scan.stream_statistics(x):
        assert stretch.start == end
        assert torch.equal(part.norm, whole.norm[:, stretch])
        end = stretch.stop
    assert end == 40


def test_nothing_to_measure():
    x = make(Case(t=5)).slice(0, 0)
    assert [z.shape for z in scan.statistics(x)] == [(2, 0, 4)] * 2
    x = make(Case(t=5))
    nothing = scan.statistics(x.replace(value=x.value[..., :0]))
    assert nothing.norm.shape == (2, 5, 4)
    assert not nothing.norm.any()


def test_unknown_implementation():
    with pytest.raises(ValueError, match="impl is one of"):
        scan.statistics(make(Case(t=5)), impl="fast")
