"""Fused rows, columns and distances against the loop's matrix in float64, and in closed form at a length."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import TOL

from ssmlens.kernels import naive
from ssmlens.kernels.fused import lines
from ssmlens.kernels.fused.lines import Tuning
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = TOL[torch.float32]

SHAPES = (
    {"h": 6, "p": 1, "g": 1, "n": 16},
    {"h": 6, "p": 2, "g": 2, "n": 3, "read_groups": 3},
    {"h": 5, "p": 1, "g": 5, "n": 1},
    {"h": 6, "p": 1, "g": 2, "n": 9, "read_groups": 1},
)
CASES = [
    *(Case(t=37, decay=d, reset=i % 2 == 0, b=1, **s) for i, s in enumerate(SHAPES) for d in DECAYS),
    *(Case(t=1, decay=d, b=1, **SHAPES[0]) for d in DECAYS),
    *(Case(t=t, decay="dt*A state", b=1, **SHAPES[0]) for t in (63, 64, 65)),
    *(Case(t=20, decay=decay, scale=scale, b=1, **SHAPES[0]) for decay in DECAYS for scale in (1e-6, 50.0)),
]
# Several blocks of tokens and of heads even where the case is small.
SMALL = Tuning(tokens=16, heads=4, channels=64)


@functools.cache
def truth(case: Case) -> torch.Tensor:
    """The loop's matrix for inputs that float32 holds exactly."""
    return naive.attention(make(case, torch.float32).cast(torch.float64))


def on_device(x: ScanInputs) -> ScanInputs:
    return x.map(lambda z: z.to(DEVICE))


def true_distance(matrix: torch.Tensor, t: int) -> torch.Tensor:
    mass = matrix[:, :, t].abs()
    return (mass @ (t - torch.arange(mass.shape[-1], dtype=mass.dtype))) / mass.sum(-1)


@pytest.mark.parametrize(
    ("case", "tuning"), [(case, None) for case in CASES] + [(case, SMALL) for case in CASES[:16]], ids=str
)
def test_lines_equal_the_loops_matrix(case: Case, tuning: Tuning | None):
    x, true = on_device(make(case, torch.float32)), truth(case)
    for at in [case.t // 2] if tuning else [0, case.t - 1]:
        row, column = lines.row(x, at, tuning).cpu(), lines.column(x, at, tuning).cpu()
        assert row.dtype == column.dtype == torch.float32
        assert relative_error(row, true[:, :, at]) < TOLERANCE
        assert relative_error(column, true[..., at]) < TOLERANCE
        assert not row[..., at + 1 :].any()
        assert not column[..., :at].any()


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_distances_of_chosen_rows(case: Case):
    x, true = on_device(make(case, torch.float32)), truth(case)
    rows = [case.t - 1, 0, case.t // 2]
    expected = torch.stack([true_distance(true, t) for t in rows], -1)
    # A ratio of two sums over the row, each with the error of its entries.
    assert relative_error(lines.distance(x, rows, SMALL).cpu(), expected) < 4 * TOLERANCE
    assert lines.distance(x, []).shape == (case.b, case.h, 0)


def test_a_row_without_mass_has_no_distance():
    x = make(Case(t=20, decay="dt*A state", h=4, g=1), torch.float32)
    x = x.replace(dt=x.dt.clone().index_fill_(2, torch.tensor([1]), 0.0))
    found = lines.distance(on_device(x), [19], SMALL).cpu()
    assert found[:, 1].isnan().all()
    assert found[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_inputs_lose_nothing_more(decay: str, dtype: torch.dtype):
    x = make(Case(t=21, decay=decay, reset=True), torch.float32).map(
        lambda z: z.to(dtype) if z.is_floating_point() else z
    )
    true = naive.attention(x.cast(torch.float64))
    assert relative_error(lines.row(on_device(x), 20, SMALL).cpu(), true[:, :, 20]) < TOLERANCE
    assert relative_error(lines.column(on_device(x), 2, SMALL).cpu(), true[..., 2]) < TOLERANCE


@pytest.mark.parametrize("decay", ["dt*A state", "log state"])
def test_strided_inputs(decay: str):
    x = make(Case(t=33, decay=decay), torch.float32)

    def spread(z: torch.Tensor) -> torch.Tensor:
        if not z.is_floating_point() or z.ndim < 3:
            return z
        # Time last in memory, and every other element.
        wide = torch.full((*z.shape[:1], *z.shape[2:], 2 * z.shape[1]), torch.nan, dtype=z.dtype)
        wide[..., ::2] = z.movedim(1, -1)
        return wide.to(DEVICE)[..., ::2].movedim(-1, 1)

    true = naive.attention(x.cast(torch.float64))
    strided = on_device(x).map(spread)
    assert relative_error(lines.row(strided, 32, SMALL).cpu(), true[:, :, 32]) < TOLERANCE
    assert relative_error(lines.column(strided, 5, SMALL).cpu(), true[..., 5]) < TOLERANCE


@pytest.mark.parametrize("decay", DECAYS)
def test_a_huge_step_leaves_its_neighbours_their_digits(decay: str):
    x = make(Case(t=40, decay=decay, scale=1e-3), torch.float32)
    name = "dt" if decay.startswith("dt") else "log_decay"
    steps = getattr(x, name).clone()
    steps[:, 20] = 1e30 if name == "dt" else -1e30
    x = x.replace(**{name: steps, **({"reset": torch.zeros(2, 40, dtype=torch.bool)} if decay == "dt*A head" else {})})
    # Only what comes after the huge step: before it dt is a source, and a huge one.
    true = naive.attention(x.cast(torch.float64))
    row, column = lines.row(on_device(x), 39, SMALL).cpu(), lines.column(on_device(x), 21, SMALL).cpu()
    assert relative_error(row[..., 21:], true[:, :, 39, 21:]) < TOLERANCE
    assert relative_error(column, true[..., 21]) < TOLERANCE
    assert not row[..., :20].any()


# The interpreter computes with numpy, which warns of a product that becomes minus infinity: here it is meant to.
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
def test_no_decay_times_an_endless_step_is_no_nan():
    x = make(Case(t=24, decay="dt*A state", h=4, g=1, n=4), torch.float32)
    A = x.A.clone()
    A[:, 0] = 0.0
    A[:, 1] = -3e38
    dt = x.dt.clone()
    dt[:, 7] = 0.0
    dt[:, 11] = 3e38
    dt[:, 12] = 3e38
    found = lines.row(on_device(x.replace(A=A, dt=dt)), 23, SMALL).cpu()
    assert not found.isnan().any()
    true = naive.attention(x.replace(A=A, dt=dt).cast(torch.float64))[:, :, 23]
    assert relative_error(found[..., 13:], true[..., 13:]) < TOLERANCE
    assert relative_error(found[..., :11], true[..., :11]) < TOLERANCE


@pytest.mark.parametrize("decay", ["dt*A state", "dt*A head", "log state"])
def test_a_long_line_of_a_constant_decay_is_geometric(decay: str):
    t, half = 1000, 50.0
    x = make(Case(t=t, h=3, g=1, n=3, b=1, p=1, decay=decay), torch.float32)
    log = -math.log(2) / half
    # Every state decays the same, by half in 50 tokens, and adds its third: M[t, s] = 2^-((t - s) / 50).
    ones = {"write": torch.ones_like(x.write), "read": torch.ones_like(x.read) / 3}
    if x.dt is not None:
        x = x.replace(dt=torch.ones_like(x.dt), A=torch.full_like(x.A, log), **ones)
    else:
        x = x.replace(log_decay=torch.full_like(x.log_decay, log), **ones)
    age = torch.arange(t, dtype=torch.float64)
    tuning = Tuning(tokens=128, heads=4)
    row, column = lines.row(on_device(x), 700, tuning).cpu(), lines.column(on_device(x), 300, tuning).cpu()
    assert relative_error(row, (-(700 - age).clamp(min=0) / half).exp2().where(age <= 700, 0.0).expand(1, 3, t)) < 1e-6
    assert (
        relative_error(column, (-(age - 300).clamp(min=0) / half).exp2().where(age >= 300, 0.0).expand(1, 3, t)) < 1e-6
    )
    a = 2 ** (-1 / half)
    # The mean of a geometric distribution; 999 tokens are 20 half-lives, so the rest is 1e-6 of it.
    assert lines.distance(on_device(x), [999], tuning).cpu() == pytest.approx(
        torch.full((1, 3, 1), a / (1 - a)), rel=3e-5
    )


def test_underflowed_blocks_are_exact_zeros():
    x = on_device(make(Case(t=200, decay="dt*A state", scale=50.0, h=4, g=1), torch.float32))
    row = lines.row(x, 199, SMALL).cpu()
    assert not row[..., :150].any()
    assert row[..., -1].all()
