"""Tiles, lines and reductions of the implicit attention against the loop's matrix and against closed forms."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scan_cases import DECAYS, Case, gradients, make, relative_error
from tolerances import EXACT, GRAD_TOL, TOL

from ssmlens.kernels import attention, attention_lines, attention_tiles, naive
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = (
    {"h": 4, "p": 1, "g": 1, "n": 16},
    {"h": 6, "p": 2, "g": 2, "n": 3, "read_groups": 3},
    {"h": 5, "p": 1, "g": 5, "n": 1},
)
CASES = [
    *(Case(t=t, decay=d, reset=t % 2 == 1, initial=True, **s) for t in (1, 16, 35) for d in DECAYS for s in SHAPES),
    *(Case(t=36, decay=decay, scale=scale, **SHAPES[0]) for decay in DECAYS for scale in (1e-6, 50.0)),
    *(Case(t=18, decay=decay, erase=True, reset=True) for decay in DECAYS),
]


@functools.cache
def truth(case: Case) -> torch.Tensor:
    """The loop's matrix for inputs that float32 holds exactly."""
    return naive.attention(make(case, torch.float32).cast(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_view_of_the_matrix(case: Case, dtype: torch.dtype):
    x, true = make(case, torch.float32).cast(dtype), truth(case)
    tol, k = TOL[dtype], case.t // 2
    found = attention.dense(x)
    assert found.dtype == dtype
    assert not found.triu(1).any()
    assert relative_error(found, true) < tol
    assert relative_error(attention.row(x, k), true[:, :, k]) < tol
    assert relative_error(attention.row(x, -1), true[:, :, -1]) < tol
    assert relative_error(attention.column(x, k), true[..., k]) < tol
    assert not attention.row(x, k)[..., k + 1 :].any()
    assert not attention.column(x, k)[..., :k].any()
    v = torch.randn(case.b, case.t, case.h, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert relative_error(attention.apply(x, v), torch.einsum("bhts,bshp->bthp", true, v)) < tol
    assert relative_error(attention.adjoint(x, v), torch.einsum("bhts,bthp->bshp", true, v)) < tol


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_reductions_and_distances(case: Case, dtype: torch.dtype):
    x, true = make(case, torch.float32).cast(dtype), truth(case)
    expected = {
        "mean": lambda m: m.mean(1),
        "mean_abs": lambda m: m.abs().mean(1),
        "max_abs": lambda m: m.abs().amax(1),
        "norm": lambda m: m.square().sum(1).sqrt(),
    }
    for how in attention.REDUCTIONS:
        assert relative_error(attention.reduce(x, how), expected[how](true)) < TOL[dtype]
        assert relative_error(attention.reduce(x, how, [3, -4]), expected[how](true[:, [3, -4]])) < TOL[dtype]
        assert relative_error(attention.reduce(x, how, slice(1, 3)), expected[how](true[:, 1:3])) < TOL[dtype]
    place = torch.arange(case.t, dtype=torch.float64)
    distance = ((place[:, None] - place) * true.abs()).sum(-1) / true.abs().sum(-1)
    # A ratio of two sums over the row, each with the error of its entries relative to the largest of them.
    assert relative_error(attention.distance(x), distance) < 4 * TOL[dtype]
    rows = [case.t - 1, 0]
    assert relative_error(attention.distance(x, rows), distance[..., rows]) < 4 * TOL[dtype]


@pytest.mark.parametrize("heads", [[2, 0, 2], [3], slice(1, None, 2), slice(None), range(4), [-1]])
@pytest.mark.parametrize("decay", DECAYS)
def test_chosen_heads(decay: str, heads: slice | list[int]):
    x = make(Case(t=33, decay=decay))
    chosen = heads if isinstance(heads, slice) else list(heads)
    assert relative_error(attention.dense(x, heads), naive.attention(x)[:, chosen]) < TOL[torch.float64]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("g", [1, 2, 6])
def test_blocks_of_heads(decay: str, g: int, monkeypatch: pytest.MonkeyPatch):
    """Blocks far smaller than these inputs would get, cutting groups and leaving remainders."""
    x = make(Case(t=35, b=1, h=6, g=g, decay=decay, reset=True))
    true = naive.attention(x)
    for size in (1, 2, 4, 5):
        monkeypatch.setattr(attention_tiles, "_CPU_BLOCK", size * x.d_state * x.length)
        monkeypatch.setattr(attention_tiles, "_CPU_DIAGONAL", 1)
        monkeypatch.setattr(attention_lines, "_CPU_BLOCK", size * x.d_state * x.length)
        assert relative_error(attention.dense(x), true) < TOL[torch.float64]
        assert relative_error(attention.row(x, 30), true[:, :, 30]) < TOL[torch.float64]
        assert relative_error(attention.column(x, 3), true[..., 3]) < TOL[torch.float64]


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients(decay: str, erase: bool):
    x = make(Case(t=19, b=1, decay=decay, erase=erase, reset=True)).replace(initial=None)
    v = make(Case(t=19, b=1), seed=3).value

    def ours(z: ScanInputs) -> list[torch.Tensor]:
        return [attention.dense(z), attention.row(z, 17), attention.column(z, 2), attention.apply(z, v)]

    def loop(z: ScanInputs) -> list[torch.Tensor]:
        full = naive.attention(z)
        return [full, full[:, :, 17], full[..., 2], torch.einsum("bhts,bshp->bthp", full, v)]

    found, true = gradients(x, ours)[1], gradients(x, loop)[1]
    for name, gradient in true.items():
        assert relative_error(found[name], gradient) < GRAD_TOL[torch.float64], name


def test_adjoint_of_the_delta_rule_differentiates():
    x = make(Case(t=9, b=1, erase=True))
    v = make(Case(t=9, b=1), seed=3).value
    found = gradients(x, lambda z: [attention.adjoint(z, v)])[1]
    true = gradients(x, lambda z: [torch.einsum("bhts,bthp->bshp", naive.attention(z), v)])[1]
    for name, gradient in true.items():
        assert relative_error(found[name], gradient) < GRAD_TOL[torch.float64], name


def constant(t: int, a: float, dtype: torch.dtype = torch.float64) -> ScanInputs:
    one = torch.ones(1, t, 1, 1, dtype=dtype)
    return ScanInputs(value=one, write=one, read=one, log_decay=torch.full_like(one, math.log(a)))


def test_constant_decay_has_distance_a_over_one_minus_a():
    for a in (0.5, 0.9, 0.98):
        assert abs(attention.distance(constant(3000, a), [2999]).item() * (1 - a) / a - 1) < EXACT
    a, t = 0.9, 40
    powers = a ** torch.arange(t, dtype=torch.float64)
    expected = (powers * torch.arange(t)).cumsum(0) / powers.cumsum(0)
    assert relative_error(attention.distance(constant(t, a))[0, 0], expected) < EXACT


def test_a_row_of_zeros_has_no_distance():
    x = make(Case(t=20))
    x = x.replace(read=x.read * (torch.arange(20) != 4)[:, None, None])
    for rows in (None, [4]):
        found = attention.distance(x, rows)
        assert found[..., 4 if rows is None else 0].isnan().all()
    assert not attention.distance(x)[..., 5:].isnan().any()


def test_float32_entries_far_from_the_start():
    """Steps from 1e-4 to 50 nats: each entry, not only the largest, to 1e-5 in the last rows."""
    rng = torch.Generator().manual_seed(0)
    for t, whole in ((4096, False), (600, True)):
        dt = 10 ** (-4 + 5.7 * torch.rand(1, t, 2, generator=rng, dtype=torch.float64))
        one = torch.ones(1, t, 1, 3, dtype=torch.float64)
        x = ScanInputs(value=one[..., :1].expand(1, t, 2, 1), write=one, read=one, dt=dt, A=-one[0, :2, 0])
        x = x.cast(torch.float32)
        rows = [attention.dense(z)[:, :, -9:] if whole else attention.row(z, t - 1) for z in (x, x.cast(torch.float64))]
        seen = rows[1] > 1e-30
        assert seen.sum() > 9
        assert (rows[0][seen].double() / rows[1][seen] - 1).abs().max() < 1e-5


def test_reduce_never_holds_the_matrix():
    """The matrix would take 67 MB; no buffer may exceed an eighth of it."""
    x = make(Case(t=256, b=1, h=256, p=1, g=1, n=4, decay="dt*A state"), torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention.reduce(x, "mean_abs")
    assert max(e.cpu_memory_usage for e in profile.events()) < 67e6 / 8


def test_no_tokens():
    x = make(Case(t=0))
    assert attention.dense(x).shape == (2, 4, 0, 0)
    assert attention.reduce(x, "norm").shape == (2, 0, 0)
    assert attention.distance(x).shape == (2, 4, 0)
    assert attention.apply(x, x.value).shape == attention.adjoint(x, x.value).shape == x.value.shape


def test_half_precision_inputs_are_upcast():
    x = make(Case(t=40, decay="dt*A state")).cast(torch.bfloat16)
    true = naive.attention(x.cast(torch.float64))
    assert relative_error(attention.dense(x), true) < TOL[torch.float32]
    assert relative_error(attention.row(x, 39), true[:, :, 39]) < TOL[torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(attention.dense(x), true) < TOL[torch.float32]


def test_refusals():
    x = make(Case(t=6))
    with pytest.raises(ValueError, match="how is one of mean, mean_abs, max_abs, norm, got 'sum'"):
        attention.reduce(x, "sum")
    with pytest.raises(ValueError, match="head 4 does not exist: heads are 0 to 3"):
        attention.dense(x, [4])
    with pytest.raises(ValueError, match="chooses none of the 4 heads"):
        attention.reduce(x, "mean", slice(4, None))
    for call in (attention.row, attention.column):
        with pytest.raises(ValueError, match="position 6 is outside the sequence of 6 tokens"):
            call(x, 6)
    with pytest.raises(ValueError, match="position -7"):
        attention.distance(x, [-7])
    for call in (attention.apply, attention.adjoint):
        with pytest.raises(ValueError, match=r"\(b=2, t=6, h=4, p\), got \(2, 6, 4\)"):
            call(x, x.value[..., 0])
