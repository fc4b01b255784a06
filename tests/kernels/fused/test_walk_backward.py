"""Gradients of the fused diagonal walk against float64 autograd through the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_cases import DECAYS, Case, gradients, make, relative_error
from tolerances import GRAD_TOL
from torch import Tensor

from ssmlens.kernels import naive
from ssmlens.kernels.fused import walk_backward
from ssmlens.kernels.fused.walk_backward import EVERY, Plan
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = GRAD_TOL[torch.float32]
NAMES = ("y", "final", "states")
# Several heads and states in a thread, few steps in registers, many segments: every loop runs more than once.
SMALL = Plan(per_thread=2, states=2, heads=2, lanes=2, warps=1, steps=2, segment=6)

Picks = list[int] | str | None


def reference(x: ScanInputs, picks: Picks) -> list[Tensor]:
    y, final = naive.run(x)
    at = range(x.length) if picks == "all" else picks
    return [y, final] if at is None else [y, final, naive.states(x, at)]


def fused(
    x: ScanInputs, picks: Picks = None, every: int = EVERY, wanted: tuple[str, ...] = NAMES, **options: Any
) -> dict[str, Tensor]:
    """By the kernels: the gradient of the weighting that `gradients` takes, of the wanted outputs only."""
    known = x.cast(torch.float64)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(z.shape, generator=rng, dtype=torch.float64).float() for z in reference(known, picks)]
    dy, dfinal, dstates = (
        w.to(DEVICE) if w is not None and k in wanted else None for k, w in zip(NAMES, [*weights, None], strict=False)
    )
    bounds = naive.states(known, range(every - 1, x.length - 1, every)).to(DEVICE, torch.float32)
    return walk_backward.backward(x.map(lambda z: z.to(DEVICE)), dy, dfinal, dstates, picks, bounds, every, **options)


def check(x: ScanInputs, picks: Picks = None, wanted: tuple[str, ...] = NAMES, **options: Any) -> None:
    def kept(z: ScanInputs) -> list[Tensor]:
        return [out if k in wanted else 0 * out for k, out in zip(NAMES, reference(z, picks), strict=False)]

    _, true = gradients(x.cast(torch.float64), kept)
    found = fused(x, picks, wanted=wanted, **options)
    assert set(found) == set(true)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert gradient.is_contiguous()
        assert relative_error(gradient.cpu(), true[name]) < TOLERANCE, f"gradient of {name}"


@pytest.mark.parametrize(
    ("t", "decay"), [(t, decay) for t in (1, 65) for decay in DECAYS] + [(63, "log head"), (64, "dt*A state")]
)
def test_lengths(decay: str, t: int):
    flags = {"initial": t != 64, "reset": t != 64}
    check(make(Case(t=t, h=2, p=1, g=1, n=5, b=1, decay=decay, **flags), torch.float32), [t - 1, 0, 0])


def test_a_long_sequence():
    check(make(Case(t=1000, h=1, p=1, g=1, n=2, b=1, decay="dt*A state", scale=0.02), torch.float32), every=4)


@pytest.mark.parametrize(("decay", "picks"), [*zip(DECAYS, ["all", [10, 2]] * 2), ("dt*A state", "all")])
def test_groups_and_segments(decay: str, picks: Picks):
    """Blocks that end inside a group, groups of write and read that differ, and the carry over segments."""
    case = Case(t=11, h=6, p=1, g=1, n=3, read_groups=2, decay=decay, initial=True, reset=True, b=1)
    check(make(case, torch.float32), picks, cut=SMALL)


def test_several_rows_of_a_batch():
    check(make(Case(t=8, h=3, p=1, g=3, n=3, decay="dt*A state", initial=True, reset=True), torch.float32), [5, 1, 5])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("hold", [False, True])
def test_nothing_to_mask(decay: str, hold: bool):
    """Sizes that fill every tile; the states of a step in the middle of two given ones are walked to."""
    x = make(Case(t=8, h=4, p=1, g=1, n=4, b=1, decay=decay), torch.float32)
    check(x, every=4, cut=SMALL._replace(hold=hold, segment=4))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("scale", [1e-6, 50.0])
def test_slow_and_fast_decays(decay: str, scale: float):
    check(make(Case(t=12, h=3, p=1, g=1, n=4, b=1, decay=decay, scale=scale), torch.float32), [4])


@pytest.mark.parametrize(("h", "g", "n"), [(5, 5, 1), (1, 1, 1), (1, 1, 33), (40, 1, 16), (3, 1, 300)])
def test_shapes(h: int, g: int, n: int):
    check(make(Case(t=4, h=h, p=1, g=g, n=n, b=1, decay="dt*A state", initial=True), torch.float32))


@pytest.mark.parametrize("every", [1, 3, 16])
def test_any_distance_of_given_states(every: int):
    check(make(Case(t=19, h=3, p=1, g=1, n=3, b=1, decay="dt*A state", initial=True), torch.float32), every=every)


@pytest.mark.parametrize("wanted", [("y",), ("final",), ("states",)])
def test_outputs_without_a_gradient(wanted: tuple[str, ...]):
    x = make(Case(t=12, h=3, p=1, g=1, n=3, b=1, decay="dt*A head", initial=True), torch.float32)
    check(x, [5, 11], wanted, cut=SMALL)


def test_a_step_beside_a_log_decay_scales_the_write_only():
    x = make(Case(t=6, h=3, p=1, g=1, n=3, b=1, decay="log state"), torch.float32)
    check(x.replace(dt=torch.rand(1, 6, 3)), "all")


@pytest.mark.parametrize("decay", ["log head", "log state"])
def test_forgetting_everything_has_no_nan_gradient(decay: str):
    x = make(Case(t=10, h=3, p=1, g=1, n=3, b=1, decay=decay, initial=True), torch.float32)
    assert x.log_decay is not None
    found = fused(x.replace(log_decay=torch.full_like(x.log_decay, -torch.inf)), [0, 9], cut=SMALL)
    assert all(z.isfinite().all() for z in found.values())
    assert not found["log_decay"].any()
    assert not found["initial"].any()


def test_no_gradient_crosses_a_reset():
    x = make(Case(t=12, h=3, p=1, g=1, n=3, b=1, decay="log state", initial=True), torch.float32)
    found = fused(x.replace(reset=torch.arange(12).eq(7).expand(1, 12)), [11], wanted=("states",), cut=SMALL)
    assert found["log_decay"][:, 8:].any()
    for name in ("value", "write", "log_decay"):
        assert not found[name][:, :7].any(), name
    assert not found["log_decay"][:, 7].any()
    assert not found["initial"].any()


# The interpreter's numpy speaks up where a GPU rounds an exponent to -inf.
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("decay", ["dt*A head", "dt*A state"])
def test_rates_at_the_end_of_the_dtype(decay: str):
    """A step of zero keeps everything, any other forgets everything, and no gradient but that of dt overflows."""
    x = make(Case(t=12, h=3, p=1, g=1, n=3, b=1, decay=decay, initial=True), torch.float32)
    assert x.A is not None
    assert x.dt is not None
    x = x.replace(A=torch.full_like(x.A, torch.finfo(torch.float32).min), dt=x.dt.index_fill(1, torch.tensor([4]), 0.0))
    _, true = gradients(x.cast(torch.float64), lambda z: reference(z, None))
    found = fused(x, cut=SMALL)
    for name in ("value", "write", "read", "A", "initial"):
        assert relative_error(found[name].cpu(), true[name]) < TOLERANCE, name
    assert not found["dt"].isnan().any()


def test_bfloat16_is_upcast_before_anything_is_computed():
    check(make(Case(t=17, h=4, p=1, g=1, n=4, b=1, decay="dt*A state", initial=True), torch.bfloat16), [7])


def test_views_are_read_as_they_are():
    x = make(Case(t=5, h=2, p=1, g=2, n=3, decay="dt*A state", initial=True, reset=True), torch.float32)
    true = fused(x, "all", cut=SMALL)

    def channels_first(z: Tensor) -> Tensor:
        """What a causal convolution leaves behind: (b, d, t), seen as (b, t, d)."""
        return z.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(z.shape)

    seen = x.replace(
        **{k: channels_first(getattr(x, k)) for k in ("value", "write")},
        dt=torch.stack([x.dt, x.dt], -1)[..., 0],
        A=x.A.t().contiguous().t(),
        read=x.read.transpose(0, 1).contiguous().transpose(0, 1),
        reset=x.reset.t().contiguous().t(),
        initial=x.initial.transpose(0, 1).contiguous().transpose(0, 1),
    )
    found = fused(seen, "all", cut=SMALL)
    assert all(torch.equal(found[k], true[k]) for k in true)


def test_broadcast_gradients_of_the_outputs():
    """The gradient of a sum has strides of zero."""
    x = make(Case(t=9, h=3, p=1, g=1, n=3, b=1, decay="dt*A head"), torch.float32).map(lambda z: z.to(DEVICE))
    ones = torch.ones(1, device=DEVICE)
    wide = walk_backward.backward(x, ones.expand(1, 9, 3, 1), ones.expand(1, 3, 1, 3), None, None, None, 16)
    plain = walk_backward.backward(x, ones.repeat(1, 9, 3, 1), ones.repeat(1, 3, 1, 3), None, None, None, 16)
    assert all(torch.equal(wide[k], plain[k]) for k in wide)


def test_two_runs_agree_bitwise():
    x = make(Case(t=11, h=5, p=1, g=1, n=4, b=1, decay="dt*A state", initial=True), torch.float32)
    first, second = (fused(x, [3], cut=SMALL) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="one channel per head and no delta rule, got p = 3"):
        walk_backward.backward(make(Case(t=3)), None, None, None, None, None, EVERY)
    with pytest.raises(ValueError, match="one channel per head and no delta rule, got a delta rule"):
        walk_backward.backward(make(Case(t=3, p=1, erase=True)), None, None, None, None, None, EVERY)
    with pytest.raises(ValueError, match="20 tokens need 2 boundary states, got 0"):
        walk_backward.backward(make(Case(t=20, p=1)), None, None, None, None, None, 8)
