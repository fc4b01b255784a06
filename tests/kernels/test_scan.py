"""Every implementation of the scan against the float64 loop: outputs, states, final state, every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scan_cases import DECAYS, Case, gradients, make, relative_error
from tolerances import GRAD_TOL, TOL
from torch import Tensor

from ssmlens.kernels import attention, backend, chunked_diagonal, chunked_matmul, diagonal_walk, naive, scan
from ssmlens.kernels.fused import dispatch
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

LENGTHS = (1, 63, 64, 65)
# One channel a head walks the diagonal; several go through matrix products; an erase walks token by token.
SHAPES = {
    "one channel": {"h": 4, "p": 1, "g": 1},
    "one channel, groups": {"h": 6, "p": 1, "g": 2, "n": 3, "read_groups": 3},
    "several channels": {"h": 4, "p": 3, "g": 2},
    "one state": {"h": 5, "p": 1, "g": 5, "n": 1},
}
CASES = [
    *(
        Case(t=t, decay=decay, initial=True, reset=True, **shape)
        for t in LENGTHS
        for decay in DECAYS
        for shape in SHAPES.values()
    ),
    *(
        Case(t=20, decay=decay, scale=scale, **shape)
        for decay in DECAYS
        for scale in (1e-6, 50.0)
        for shape in SHAPES.values()
    ),
    *(Case(t=33, decay=decay, initial=True, reset=reset, erase=True) for decay in DECAYS for reset in (False, True)),
    Case(t=500, h=8, p=1, g=1, n=16, decay="dt*A state", b=1),
    Case(t=500, h=4, p=8, g=1, n=16, decay="dt*A head", b=1, initial=True),
    Case(t=500, h=2, p=4, g=2, n=8, decay="log state", b=1),
]


def outputs(impl: str, at: list[int]) -> Callable[[ScanInputs], list[Tensor]]:
    return lambda x: [*scan.run(x, impl=impl), scan.states(x, at, impl=impl)]


def some_positions(t: int) -> list[int]:
    return [t - 1, 0, t // 2, 0]


def check(x: ScanInputs, dtype: torch.dtype, impl: str = "chunked") -> None:
    at = some_positions(x.length)
    true, true_gradients = gradients(x.cast(dtype).cast(torch.float64), outputs("naive", at))
    found, found_gradients = gradients(x.cast(dtype), outputs(impl, at))
    for name, a, b in zip(("y", "final", "states"), found, true, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < TOL[dtype], name
    for name, gradient in true_gradients.items():
        assert relative_error(found_gradients[name], gradient) < GRAD_TOL[dtype], f"gradient of {name}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked_is_naive(case: Case):
    for dtype in (torch.float64, torch.float32):
        check(make(case), dtype)


@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_naive_in_float32_is_naive(case: Case):
    check(make(case), torch.float32, impl="naive")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("n_chunks", [2, 5])
def test_chunks_side_by_side(decay: str, n_chunks: int, monkeypatch: pytest.MonkeyPatch):
    """What a GPU does: chunks advance together, then the carry puts them in order."""
    monkeypatch.setattr(chunked_diagonal, "_chunk_count", lambda x: min(n_chunks, x.length))
    for t in (3, 32, 47):
        check(make(Case(t=t, h=6, p=1, g=2, n=3, decay=decay, initial=True, reset=True)), torch.float64)


@pytest.mark.parametrize("decay", ["dt*A head", "log head"])
def test_carry_as_one_product(decay: str, monkeypatch: pytest.MonkeyPatch):
    """What a GPU does between the chunks of one decay per head."""
    monkeypatch.setattr(chunked_matmul, "_at_once", lambda device: True)
    for t in (1, 64, 200):
        check(make(Case(t=t, decay=decay, initial=True, reset=True)), torch.float64)


@pytest.mark.parametrize("decay", DECAYS)
def test_cache_blocks(decay: str, monkeypatch: pytest.MonkeyPatch):
    """Rows, channels and time cut into pieces far smaller than these inputs would get."""
    monkeypatch.setattr(diagonal_walk, "_CPU_STEP", 7)
    monkeypatch.setattr(diagonal_walk, "_CPU_BLOCK", 40)
    monkeypatch.setattr(diagonal_walk, "_GRAIN", 61)
    monkeypatch.setattr(chunked_matmul, "_CPU_BUDGET", 2000)
    check(make(Case(t=41, b=3, h=10, p=1, g=2, n=3, decay=decay, initial=True, reset=True)), torch.float64)
    check(make(Case(t=150, b=1, h=2, p=2, g=1, n=3, decay=decay, initial=True, reset=True)), torch.float64)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("p", [1, 3])
def test_all_states(decay: str, p: int, with_gradient: bool):
    """Many states are written step by step unless a gradient is wanted, which the caller need not switch off."""
    x = make(Case(t=70, p=p, decay=decay, initial=True, reset=True))
    before = x.initial.clone()
    true = naive.states(x)
    asked = x.replace(write=x.write.clone().requires_grad_()) if with_gradient else x
    at = [*range(60, 20, -1), 33, 2]
    every, some = scan.states(asked), scan.states(asked, at)
    assert every.requires_grad == some.requires_grad == with_gradient
    assert relative_error(every.detach(), true) < TOL[torch.float64]
    assert relative_error(some.detach(), true[:, at]) < TOL[torch.float64]
    assert torch.equal(x.initial, before)


def test_states_without_a_gradient_take_the_quick_way(monkeypatch: pytest.MonkeyPatch):
    x = make(Case(t=70, p=3, decay="dt*A head"))
    walked = []
    walk = chunked_matmul._walk
    monkeypatch.setattr(chunked_matmul, "_walk", lambda *pieces: walked.append(True) or walk(*pieces))
    scan.states(x)
    with torch.no_grad():
        scan.states(x.replace(value=x.value.clone().requires_grad_()))
    assert len(walked) == 2
    scan.states(x.replace(value=x.value.clone().requires_grad_()))
    assert len(walked) == 2


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_are_finite_differences(decay: str, p: int):
    """Independent of autograd through the loop."""
    x = make(Case(t=5, b=1, h=2, p=p, g=1, n=2, decay=decay, initial=True))
    if x.log_decay is not None:
        x = x.replace(log_decay=x.log_decay.clamp(min=-1.0))
    names = list(x.tensors())

    def function(*pieces: Tensor) -> tuple[Tensor, ...]:
        made = ScanInputs(**dict(zip(names, pieces, strict=True)))
        return (*scan.run(made), scan.states(made, [3]))

    assert torch.autograd.gradcheck(function, tuple(z.clone().requires_grad_() for z in x.tensors().values()))


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("decay", ["log head", "log state"])
def test_forgetting_everything_has_no_nan_gradient(p: int, decay: str):
    x = make(Case(t=30, p=p, decay=decay, initial=True))
    assert x.log_decay is not None
    x = x.replace(log_decay=torch.full_like(x.log_decay, -torch.inf))
    found, slopes = gradients(x, outputs("chunked", [0, 29]))
    assert all(z.isfinite().all() for z in [*found, *slopes.values()])
    assert not slopes["log_decay"].any()
    assert not slopes["initial"].any()


@pytest.mark.parametrize("decay", ["dt*A head", "dt*A state"])
@pytest.mark.parametrize("p", [1, 3])
def test_rates_at_the_end_of_the_dtype(p: int, decay: str):
    """A step of zero keeps everything, any other forgets everything, and nothing is NaN."""
    x = make(Case(t=20, p=p, decay=decay, initial=True), torch.float32)
    assert x.A is not None
    assert x.dt is not None
    x = x.replace(A=torch.full_like(x.A, torch.finfo(torch.float32).min), dt=x.dt.index_fill(1, torch.tensor([4]), 0.0))
    for found, true in zip(outputs("chunked", [4])(x), outputs("naive", [4])(x), strict=True):
        assert relative_error(found, true) < TOL[torch.float32]
    full = attention.dense(x)
    assert relative_error(full, naive.attention(x)) < TOL[torch.float32]
    assert relative_error(attention.row(x, 4), full[:, :, 4]) < TOL[torch.float32]
    assert relative_error(attention.column(x, 3), full[..., 3]) < TOL[torch.float32]


@pytest.mark.parametrize("p", [1, 3])
def test_views_are_read_as_they_are(p: int):
    x = make(Case(t=40, p=p, decay="dt*A state", initial=True))
    strided = {k: z if k == "A" else z.transpose(0, 1).contiguous().transpose(0, 1) for k, z in x.tensors().items()} | {
        "value": torch.stack([x.value, x.value], -1)[..., 0],
        "dt": x.dt.flip(1).flip(1),
    }
    y, final = scan.run(ScanInputs(**strided))
    again, last = scan.run(x)
    assert relative_error(y, again) < TOL[torch.float64]
    assert relative_error(final, last) < TOL[torch.float64]


@pytest.mark.parametrize("p", [1, 3])
def test_channels_before_time_in_memory(p: int):
    """What a causal convolution leaves behind: (b, d, t), seen as (b, t, h, p)."""
    x = make(Case(t=40, p=p, initial=True))

    def channels_first(z: Tensor) -> Tensor:
        return z.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(z.shape)

    seen = x.replace(**{k: channels_first(getattr(x, k)) for k in ("value", "write", "read")})
    assert seen.value.stride(1) == 1
    for found, true in zip(scan.run(seen), scan.run(x), strict=True):
        assert torch.equal(found, true)
    found, true = (gradients(z, outputs("chunked", [3]))[1] for z in (seen, x))
    assert all(relative_error(found[k], true[k]) < TOL[torch.float64] for k in true)


@pytest.mark.parametrize("p", [1, 3])
def test_bfloat16_is_upcast_before_anything_is_computed(p: int):
    x = make(Case(t=64, p=p, decay="dt*A head", initial=True)).cast(torch.bfloat16)
    y, final = scan.run(x)
    assert y.dtype == final.dtype == torch.float32
    for found, true in zip((y, final), naive.run(x.cast(torch.float64)), strict=True):
        assert relative_error(found, true) < TOL[torch.float32]


@pytest.mark.parametrize("p", [1, 3])
def test_autocast_does_not_reach_inside(p: int):
    x = make(Case(t=64, p=p), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = scan.run(x)
    assert torch.equal(y, scan.run(x)[0])


def test_two_runs_agree_bitwise():
    for p in (1, 3):
        x = make(Case(t=100, p=p, decay="dt*A state", initial=True), torch.float32)
        first, second = (gradients(x, outputs("chunked", [7])) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
        assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


@pytest.mark.parametrize("p", [1, 3])
def test_no_tokens(p: int):
    x = make(Case(t=0, p=p, initial=True))
    y, final = scan.run(x)
    assert y.shape == (2, 0, 4, p)
    assert torch.equal(final, x.initial)
    assert scan.states(x).shape == (2, 0, 4, p, 5)
    assert not scan.run(x.replace(initial=None))[1].any()


def test_outputs_have_the_usual_memory_order():
    for p in (1, 3):
        y, final = scan.run(make(Case(t=40, p=p, initial=True)))
        assert y.is_contiguous()
        assert final.is_contiguous()


def test_run_does_not_hold_the_states():
    """States of this recurrence would take 134 MB; no buffer of a run may exceed a tenth."""
    x = make(Case(t=4096, b=1, h=512, p=1, g=1, n=16, decay="dt*A state"), torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        scan.run(x)
    sizes = [e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0]
    assert max(sizes) < 134e6 / 10


@pytest.mark.parametrize("call", [scan.run, scan.states])
def test_unknown_implementation(call: Callable[..., object]):
    with pytest.raises(ValueError, match="impl is one of auto, naive, chunked, triton, got 'cuda'"):
        call(make(Case(t=3)), impl="cuda")


@pytest.mark.parametrize("call", [scan.run, scan.states])
def test_triton_says_what_it_lacks(call: Callable[..., object], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="impl='triton' computes in float32: float64 inputs run with impl='chunked'"):
        call(make(Case(t=3)), impl="triton")
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' needs tensors on a CUDA device"):
        call(make(Case(t=3), torch.float32), impl="triton")
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton"):
        call(make(Case(t=3), torch.float32), impl="triton")


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision is one of float32, bfloat16, got 'tf32'"):
        scan.run(make(Case(t=3)), precision="tf32")


@pytest.mark.parametrize("impl", scan.IMPLS)
def test_positions(impl: str):
    x = make(Case(t=6), torch.float32)
    every = naive.states(x)
    for at in ([], [5, 0, 5], torch.tensor([2, 1]), range(3), [-1, -6]):
        found = scan.states(x, at, impl=impl)
        assert relative_error(found, every[:, list(at)]) < TOL[torch.float32]
    with pytest.raises(ValueError, match="position 6, but the sequence has 6 tokens"):
        scan.states(x, [0, 6], impl=impl)
    with pytest.raises(ValueError, match="integers"):
        scan.states(x, [0.5], impl=impl)
