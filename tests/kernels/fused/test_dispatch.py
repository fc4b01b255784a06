"""`impl="triton"` through the public functions: every kind of recurrence finds its kernel and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scan_cases import DECAYS, Case, gradients, make, relative_error
from tolerances import GRAD_TOL, TOL
from torch import Tensor
from torch.autograd import forward_ad

from ssmlens.kernels import attention, backend, naive, scan
from ssmlens.kernels.fused import dispatch, selfcheck, walk
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    *(Case(t=9, h=2, p=1, g=2, n=3, decay=decay, initial=True, reset=True, b=1) for decay in DECAYS),
    *(Case(t=17, h=2, p=8, g=1, n=5, decay=decay, initial=True, reset=True, b=1) for decay in DECAYS),
    *(Case(t=7, h=2, p=2, g=1, n=3, decay=decay, b=1) for decay in DECAYS),
    *(Case(t=6, h=2, p=3, g=2, n=4, decay=decay, initial=True, erase=True, b=1) for decay in DECAYS),
]


def outputs(impl: str, at: list[int]) -> Callable[[ScanInputs], list[Tensor]]:
    return lambda x: [*scan.run(x, impl=impl), scan.states(x, at, impl=impl), scan.states(x, impl=impl)]


def there(x: ScanInputs) -> ScanInputs:
    return x.map(lambda z: z.to(DEVICE))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_is_naive(case: Case) -> None:
    at = [case.t - 1, 0, case.t // 2]
    x = make(case, torch.float32)
    true, slopes = gradients(x.cast(torch.float64), outputs("naive", at))
    found, found_slopes = gradients(there(x), lambda z: [y.cpu() for y in outputs("triton", at)(z)])
    for name, a, b in zip(("y", "final", "some states", "all states"), found, true, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < TOL[torch.float32], name
    for name, slope in slopes.items():
        assert relative_error(found_slopes[name].cpu(), slope) < GRAD_TOL[torch.float32], f"gradient of {name}"


def test_bfloat16_products_are_asked_for() -> None:
    x = make(Case(t=40, h=2, p=16, g=1, n=16, b=1), torch.float32)
    true, _ = naive.run(x.cast(torch.float64))
    exact = relative_error(scan.run(there(x), impl="triton")[0].cpu(), true)
    rounded = relative_error(scan.run(there(x), impl="triton", precision="bfloat16")[0].cpu(), true)
    assert exact < TOL[torch.float32] < rounded < TOL[torch.bfloat16]


@pytest.mark.parametrize("p", [1, 8])
def test_half_precision_and_frozen_inputs(p: int) -> None:
    x = make(Case(t=12, h=2, p=p, g=1, initial=True, b=1)).cast(torch.bfloat16)
    true, last = naive.run(x.cast(torch.float64))
    y, final = scan.run(there(x), impl="triton")
    assert relative_error(y.cpu(), true) < TOL[torch.float32]
    assert relative_error(final.cpu(), last) < TOL[torch.float32]
    moved = there(x)
    only_value = moved.replace(value=moved.value.clone().requires_grad_())
    out, _ = scan.run(only_value, impl="triton")
    (slope,) = torch.autograd.grad(out.sum(), only_value.value)
    assert slope.dtype == torch.bfloat16
    true_value = x.cast(torch.float64).value.requires_grad_()
    (true_slope,) = torch.autograd.grad(naive.run(x.cast(torch.float64).replace(value=true_value))[0].sum(), true_value)
    assert relative_error(slope.cpu(), true_slope) < TOL[torch.bfloat16]


@pytest.mark.parametrize("p", [1, 3])
def test_nothing_to_do(p: int) -> None:
    x = there(make(Case(t=0, p=p, initial=True), torch.float32))
    y, final = scan.run(x, impl="triton")
    assert y.shape == (2, 0, 4, p)
    assert torch.equal(final, x.initial)
    assert scan.states(x, impl="triton").shape == (2, 0, 4, p, 5)
    assert scan.states(there(make(Case(t=3, p=p), torch.float32)), [], impl="triton").shape == (2, 0, 4, p, 5)


def test_the_delta_rule_differentiates_twice() -> None:
    x = make(Case(t=4, h=1, p=2, g=1, n=3, erase=True, b=1), torch.float32)
    value, write = (there(x).tensors()[k].clone().requires_grad_() for k in ("value", "write"))
    y, _ = scan.run(there(x).replace(value=value, write=write), impl="triton")
    (slope,) = torch.autograd.grad(y.square().sum(), value, create_graph=True)
    (twice,) = torch.autograd.grad(slope.square().sum(), write)
    assert twice.isfinite().all()
    assert twice.any()


@pytest.mark.parametrize("case", [CASES[0], CASES[5], Case(t=6, erase=True, b=1)], ids=str)
def test_attention_through_the_public_functions(case: Case) -> None:
    x = make(case, torch.float32).replace(initial=None)
    true = naive.attention(x.cast(torch.float64))
    moved = there(x)
    tol = TOL[torch.float32]
    assert relative_error(attention.dense(moved, impl="triton").cpu(), true) < tol
    assert relative_error(attention.dense(moved, [1, 0], impl="triton").cpu(), true[:, [1, 0]]) < tol
    assert relative_error(attention.row(moved, 3, impl="triton").cpu(), true[:, :, 3]) < tol
    assert relative_error(attention.column(moved, 2, impl="triton").cpu(), true[..., 2]) < tol
    for how in attention.REDUCTIONS:
        full = {"mean": true.mean(1), "mean_abs": true.abs().mean(1), "max_abs": true.abs().amax(1)}
        expected = full.get(how, true.square().sum(1).sqrt())
        assert relative_error(attention.reduce(moved, how, impl="triton").cpu(), expected) < tol
    place = torch.arange(case.t, dtype=torch.float64)
    distance = ((place[:, None] - place) * true.abs()).sum(-1) / true.abs().sum(-1)
    assert relative_error(attention.distance(moved, impl="triton").cpu(), distance) < 4 * tol
    assert relative_error(attention.distance(moved, [2, -1], impl="triton").cpu(), distance[..., [2, -1]]) < 4 * tol


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Checks of the device that earlier tests made, and these, are forgotten."""
    caches = (selfcheck.complaint_about, selfcheck.complaint_at, backend._passed)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


SMALL = {
    selfcheck.ONE: (2, 1, 3, 3),
    selfcheck.UNITS: (2, 8, 3, 1),
    selfcheck.FEW: (2, 2, 3, 1),
    selfcheck.STATES: (2, 2, 3, 3),
    selfcheck.DELTA: (2, 2, 3, 1),
}


@pytest.fixture
def small(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks with few tokens and heads, for the interpreter."""
    monkeypatch.setattr(selfcheck, "FAMILIES", SMALL)
    monkeypatch.setattr(selfcheck, "TOKENS", 9)


def test_every_kind_of_work_passes_its_check(small: None) -> None:
    assert selfcheck.complaint(torch.device(DEVICE)) is None


def test_checks_work_beside_other_default_devices(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "FAMILIES", {selfcheck.STATES: SMALL[selfcheck.STATES]})
    with torch.device("meta"):
        assert selfcheck.complaint(torch.device(DEVICE)) is None


@pytest.mark.parametrize("p", [1, 8])
def test_states_are_handed_out_whatever_the_default_device(p: int) -> None:
    x = there(make(Case(t=5, h=2, p=p, g=1, n=3, b=1), torch.float32))
    x = x.replace(value=x.value.requires_grad_())

    def found() -> tuple[Tensor, Tensor]:
        states = scan.states(x, [3, 1], impl="triton")
        return states, *torch.autograd.grad(states.square().sum(), x.value)

    expected = found()
    with torch.device("meta"):
        assert all(torch.equal(a, b) for a, b in zip(found(), expected, strict=True))


PIECES = {
    "factored": ("A", "dt", "read", "value", "write"),
    "packed": ("A", "dt", "initial", "read", "reset", "value", "write"),
    "logs": ("log_decay", "read", "value", "write"),
    "scaled logs": ("dt", "log_decay", "read", "value", "write"),
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("family", [selfcheck.ONE, selfcheck.FEW, selfcheck.STATES, selfcheck.UNITS])
def test_a_check_runs_what_the_work_runs(family: str, pieces: tuple[str, ...], small: None) -> None:
    """A recurrence with the same pieces, of the same family, states and groups; so for every one of them."""
    check = selfcheck.Check(family, "scan", pieces, 3, shared=False)
    x = selfcheck._case_for(check)
    assert selfcheck._family(x) == family
    assert sorted(x.tensors()) == list(pieces)
    assert x.write.shape[2:] == x.read.shape[2:] == (2, 3)
    for work in ("scan", "gradients", "norms", "tiles", "reduce norm", "lines", "distance of few"):
        inside = pieces if work in selfcheck._SCANS else tuple(k for k in pieces if k != "initial")
        assert selfcheck.complaint_about(torch.device(DEVICE), check._replace(work=work, pieces=inside)) is None
        if work not in ("scan", "gradients"):
            (wanted,) = selfcheck.needed(x, work)
            assert wanted == check._replace(
                work=work, pieces=inside, states=4 if work in selfcheck._ON_MATRIX_UNITS else 0
            )


def test_contributions_of_far_sources_are_checked(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "FAMILIES", {selfcheck.ONE: (1, 1, 2, 2)})
    monkeypatch.setattr("ssmlens.kernels.contribution_tiles._CPU_ROWS", 64)
    shapes = []
    for name in ("far", "tapped"):
        right = getattr(selfcheck.contribution_kernels, name)

        def spy(parts: Any, *rest: Any, right: Any = right, name: str = name) -> Tensor:
            shapes.append((name, *right(parts, *rest).shape[1:]))
            return right(parts, *rest)

        monkeypatch.setattr(selfcheck.contribution_kernels, name, spy)
    check = selfcheck.Check(selfcheck.ONE, "contributions")
    assert selfcheck.complaint_about(torch.device(DEVICE), check) is None
    assert shapes == [("far", 64, 64), ("tapped", 64, 128)]


@pytest.mark.parametrize("sizes", [{"b": 0}, {"t": 0}, {"n": 0}, {"h": 0, "g": 1}], ids=str)
def test_nothing_to_compute_needs_no_check(sizes: dict[str, int]) -> None:
    many = {"b": 1, "t": 5, "h": 2, "p": 8, "n": 3, "g": 1} | sizes
    b, t, h, p, n, g = many.values()
    x = ScanInputs(
        torch.zeros(b, t, h, p), torch.zeros(b, t, g, n), torch.zeros(b, t, g, n), log_decay=torch.zeros(b, t, h, 1)
    )
    for work in selfcheck.WORK:
        assert selfcheck.needed(x, work) == []


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # in torch itself
def test_forward_mode_derivatives_are_refused_not_dropped() -> None:
    x = there(make(Case(t=5, h=2, p=8, g=1, n=3, b=1), torch.float32))

    def outputs(impl: str) -> Callable[[Tensor], Tensor]:
        return lambda z: scan.run(x.replace(write=z), impl=impl)[0]

    _, true = torch.func.jvp(outputs("naive"), (x.write,), (x.write,))
    _, found = torch.func.jvp(outputs("auto"), (x.write,), (x.write,))
    assert relative_error(found, true) < TOL[torch.float32]
    with pytest.raises(ValueError, match="forward-mode derivatives"):
        torch.func.jvp(outputs("triton"), (x.write,), (x.write,))
    with forward_ad.dual_level():
        both = forward_ad.make_dual(x.write, x.write)
        with pytest.raises(ValueError, match="forward-mode derivatives"):
            outputs("triton")(both)
        with pytest.raises(ValueError, match="forward-mode derivatives"):
            attention.row(x.replace(write=both), 3, impl="triton")
        assert relative_error(forward_ad.unpack_dual(outputs("auto")(both)).tangent, true) < TOL[torch.float32]
        outputs("triton")(x.write)  # nothing to drop


def test_no_memory_for_a_check_says_nothing_about_the_kernels(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selfcheck._pairs

    def full(*arguments: Any) -> list[tuple[Tensor, Tensor]]:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(selfcheck, "_pairs", full)
    check = selfcheck.Check(selfcheck.ONE, "scan")
    with pytest.raises(torch.OutOfMemoryError):
        backend._passed(torch.device(DEVICE), check)
    monkeypatch.setattr(selfcheck, "_pairs", right)
    assert backend._passed(torch.device(DEVICE), check)


def test_only_what_is_about_to_run_is_checked() -> None:
    one, many, erasing = (
        make(Case(t=3, h=2, p=p, g=1, n=4, decay=decay, erase=erase, b=1), torch.float32)
        for p, decay, erase in ((1, "dt*A state", False), (8, "dt*A head", False), (8, "dt*A head", True))
    )
    recorded = one.replace(value=one.value.clone().requires_grad_())

    def asked(*arguments: Any) -> list[str]:
        return [str(check) for check in selfcheck.needed(*arguments)]

    first = "of recurrences with one channel per head"
    assert asked(one) == [f"the outputs {first}"]
    assert asked(recorded) == [f"the outputs {first}", f"the gradients {first}"]
    assert asked(recorded, "lines") == [f"the rows of attention {first}"]
    assert asked(many) == ["2 heads of 8 channels, 4 states"]
    assert asked(many, "states") == [
        "the states of recurrences with one decay per head",
        "2 heads of 8 channels, 4 states",
    ]
    assert asked(many, "norms") == ["the norms of states of recurrences with one decay per head"]
    few = make(Case(t=3, h=2, p=4, g=1, n=4, decay="dt*A head", b=1), torch.float32)
    assert asked(few) == ["the outputs of recurrences with one decay per head of few channels"]
    assert asked(few.replace(value=few.value.clone().requires_grad_())) == asked(few)  # PyTorch's gradients
    assert asked(one, "reduce norm") == [f"the attention over heads (norm) {first}"]
    assert asked(erasing.replace(value=erasing.value.clone().requires_grad_())) == [
        "the outputs of recurrences with a delta rule"
    ]
    long = make(Case(t=1000, h=2, p=4, g=1, n=4, decay="dt*A head", b=1), torch.float32)
    assert walk.choose(long).segments > 1
    assert [check.work for check in selfcheck.needed(long)] == ["scan", "segments"]
    assert [check.work for check in selfcheck.needed(long, "norms")] == ["norms", "segments"]
    assert [check.work for check in selfcheck.needed(long, "tiles")] == ["tiles"]


@pytest.mark.parametrize("work", list(selfcheck.WORK))
def test_wrong_kernels_are_not_used(work: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    right = selfcheck._pairs
    check = selfcheck.Check(selfcheck.ONE, work)

    def nearly(*arguments: Any) -> list[tuple[Tensor, Tensor]]:
        return [(a * 1.01, b) for a, b in right(*arguments)]

    def unknown(*arguments: Any) -> list[tuple[Tensor, Tensor]]:
        return [(a * float("nan"), b) for a, b in right(*arguments)]

    def broken(*arguments: Any) -> list[tuple[Tensor, Tensor]]:
        raise ZeroDivisionError("no registers")

    for wrong, sentence in (
        (nearly, "differ from PyTorch's by 1.0e-02"),
        (unknown, "by nan"),
        (broken, "Zero.*no registers"),
    ):
        monkeypatch.setattr(selfcheck, "_pairs", wrong)
        selfcheck.complaint_about.cache_clear()
        backend._passed.cache_clear()
        with pytest.warns(RuntimeWarning, match=f"are not used on {device} for the .* with one channel.*{sentence}"):
            assert not backend._passed(device, check)
        assert not backend._passed(device, check)  # and says so once


@pytest.mark.parametrize(("decay", "gradients"), [("dt*A head", True), ("log head", False)])
def test_matrix_units_are_checked_at_each_size(
    decay: str, gradients: bool, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(Case(t=3, h=2, p=8, g=1, n=4, decay=decay, b=1), torch.float32)
    x = x.replace(value=x.value.requires_grad_(gradients))
    monkeypatch.setattr(selfcheck, "TOKENS", 5)
    device, (of,) = torch.device(DEVICE), selfcheck.needed(x)
    assert isinstance(of, selfcheck.Sizes)
    assert (of.channels, of.states, of.gradients) == (8, 4, gradients)
    assert selfcheck.complaint_at(device, of) is None
    assert selfcheck.complaint_at(device, of._replace(value=torch.bfloat16, precision="bfloat16")) is None
    handed_out = of._replace(picks=True)
    assert (handed_out,) == tuple(c for c in selfcheck.needed(x, "states") if isinstance(c, selfcheck.Sizes))
    assert selfcheck.complaint_at(device, handed_out) is None
    right_states = dispatch.states
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "states", lambda x, at: right_states(x, at) * 1.01)
        selfcheck.complaint_at.cache_clear()
        assert "differ" in str(selfcheck.complaint_at(device, handed_out))
    right = dispatch.run

    def wrong(x: ScanInputs, precision: str = "float32") -> tuple[Tensor, Tensor]:
        y, final = right(x, precision)
        return y, final * 1.01

    monkeypatch.setattr(dispatch, "run", wrong)
    selfcheck.complaint_at.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"on {device} for 2 heads of 8 channels, 4 states: .*differ"):
        assert not backend._passed(device, of)
