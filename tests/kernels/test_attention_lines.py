"""Quantiles of distance and largest sources of rows, against the loop's matrix and in closed form."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import TOL

from ssmlens.attention import ImplicitAttention
from ssmlens.kernels import attention, attention_lines, attention_mass, naive
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = ({"h": 4, "p": 1, "g": 1, "n": 16}, {"h": 6, "p": 2, "g": 2, "n": 3, "read_groups": 3})
CASES = [
    *(Case(t=t, decay=d, reset=t % 2 == 1, initial=True, **s) for t in (1, 35) for d in DECAYS for s in SHAPES),
    *(Case(t=20, decay=decay, erase=True, reset=True) for decay in DECAYS),
]
SHARES = [0.1, 0.5, 0.9, 1.0]


@functools.cache
def truth(case: Case) -> torch.Tensor:
    return naive.attention(make(case))


def true_quantile(matrix: torch.Tensor, q: float) -> torch.Tensor:
    """By the definition, row by row and distance by distance."""
    b, h, t, _ = matrix.shape
    out = torch.full((b, h, t), torch.nan, dtype=torch.float64)
    for i in range(t):
        mass = matrix[:, :, i].abs()
        for d in range(i, -1, -1):
            enough = mass[..., i - d : i + 1].sum(-1) >= q * mass.sum(-1) * (1 - 1e-12)
            out[:, :, i][enough & (mass.sum(-1) > 0)] = d
    return out


def true_largest(matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, t, _ = matrix.shape
    values, sources = torch.zeros(b, h, t, k, dtype=matrix.dtype), torch.full((b, h, t, k), -1)
    for where in [(i, j, r) for i in range(b) for j in range(h) for r in range(t)]:
        line = matrix[where].tolist()
        order = sorted((s for s in range(t) if line[s]), key=lambda s: (-abs(line[s]), -s))[:k]
        for i, s in enumerate(order):
            values[(*where, i)], sources[(*where, i)] = line[s], s
    return values, sources


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantiles_follow_the_definition(case: Case):
    x, true = make(case), truth(case)
    expected = torch.stack([true_quantile(true, q) for q in SHARES], -1)
    assert torch.equal(attention.quantile(x, SHARES).nan_to_num(-1), expected.nan_to_num(-1))
    rows = [case.t - 1, 0, -1]
    found = attention.quantile(x, 0.5, rows)
    assert torch.equal(found.nan_to_num(-1), expected[:, :, rows, 1].nan_to_num(-1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_largest_sources(case: Case):
    x, true = make(case), truth(case)
    for k in (1, 3, case.t + 2):
        expected, where = true_largest(true, k)
        values, sources = attention.topk(x, k)
        assert sources.dtype == torch.int64
        assert torch.equal(sources, where)
        assert relative_error(values, expected) < TOL[torch.float64]
        some, places = attention.topk(x, k, [-1, 0])
        assert torch.equal(places, where[:, :, [-1, 0]])
        assert relative_error(some, expected[:, :, [-1, 0]]) < TOL[torch.float64]


def constant(decay: float, t: int, h: int = 2, dtype: torch.dtype = torch.float64) -> ScanInputs:
    """M[t, s] = decay ** (t - s)."""
    ones = torch.ones(1, t, 1, 1, dtype=dtype)
    log = torch.full((1, t, h, 1), math.log(decay), dtype=dtype)
    return ScanInputs(value=ones.expand(1, t, h, 1), write=ones, read=ones, log_decay=log)


@pytest.mark.parametrize("rows", [None, [299]])
@pytest.mark.parametrize("a", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("q", [0.3, 0.5, 0.9, 0.999])
def test_quantile_of_a_constant_decay(a: float, q: float, rows: list[int] | None):
    found = attention.quantile(constant(a, 300), q, rows)
    # 1 - a^(d + 1) of a row's mass lies within d; of a row of t + 1 sources all of it is 1 - a^(t + 1).
    t = torch.arange(300, dtype=torch.float64) if rows is None else torch.tensor(rows, dtype=torch.float64)
    exact = torch.log1p(-q * (1 - a ** (t + 1))) / math.log(a)
    expected = (exact - 1e-9).ceil() - 1
    assert torch.equal(found[0], expected.expand(2, -1))
    if a < 0.97:
        assert found[0, 0, -1] == math.ceil(math.log(1 - q) / math.log(a) - 1e-9) - 1


@pytest.mark.parametrize("rows", [None, [63, 4]])
def test_equal_sources_are_taken_from_the_nearest(rows: list[int] | None):
    x = constant(1.0, 64)
    values, sources = attention.topk(x, 5, rows)
    for i, t in enumerate(range(64) if rows is None else rows):
        expected = [s if s >= 0 else -1 for s in range(t, t - 5, -1)]
        assert sources[0, 1, i].tolist() == expected
        assert values[0, 1, i].tolist() == [float(s >= 0) for s in expected]


def test_what_a_reset_cut_off_is_no_source():
    x = make(Case(t=30, decay="dt*A state", initial=True))
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[:, 27] = True
    x = x.replace(reset=reset)
    values, sources = attention.topk(x, 6, [29])
    assert sorted(sources[0, 0, 0].tolist()) == [-1, -1, -1, 27, 28, 29]
    assert not values[..., 3:].any()
    assert attention.quantile(x, 1.0, [29]).max() <= 2


def test_rows_without_mass():
    x = make(Case(t=24, decay="dt*A state"))
    x = x.replace(dt=x.dt.clone().index_fill_(2, torch.tensor([2]), 0.0))
    for rows in (None, [23]):
        found = attention.quantile(x, [0.5, 1.0], rows)
        assert found[:, 2].isnan().all()
        assert found[:, [0, 1, 3]].isfinite().all()
        values, sources = attention.topk(x, 2, rows)
        assert (sources[:, 2] == -1).all()
        assert not values[:, 2].any()


@pytest.mark.parametrize("erase", [False, True])
def test_blocks_of_heads_and_rows_change_nothing(erase: bool, monkeypatch: pytest.MonkeyPatch):
    x = make(Case(t=33, decay="dt*A head", erase=erase))
    rows = list(range(0, 33, 2))
    whole = [attention.quantile(x, SHARES), attention.quantile(x, SHARES, rows), *attention.topk(x, 4)]
    monkeypatch.setattr(attention_mass, "_CPU_BLOCK", 64)
    small = [attention.quantile(x, SHARES), attention.quantile(x, SHARES, rows), *attention.topk(x, 4)]
    for a, b in zip(whole, small, strict=True):
        assert torch.equal(a, b) if a.dtype == torch.int64 else relative_error(b, a) < 1e-12


def test_a_sequence_without_rows():
    x = make(Case(t=12))
    assert attention.quantile(x, 0.5, []).shape == (2, 4, 0)
    assert [z.shape for z in attention.topk(x, 3, [])] == [(2, 4, 0, 3)] * 2


def test_bad_arguments():
    x = make(Case(t=12))
    for q in (0.0, 1.1, [0.5, -1.0]):
        with pytest.raises(ValueError, match="q is a share above 0"):
            attention.quantile(x, q)
    with pytest.raises(ValueError, match="k is at least 1"):
        attention.topk(x, 0)
    with pytest.raises(ValueError, match="position 12"):
        attention.topk(x, 1, [12])


def test_the_operator_has_both():
    x = make(Case(t=12))
    view = ImplicitAttention(x)
    assert torch.equal(view.quantile(0.5), attention.quantile(x, 0.5))
    assert view.quantile([0.5, 0.9], rows=[-1]).shape == (2, 4, 1, 2)
    _, sources = view.topk(3, rows=[-1, 4])
    assert torch.equal(sources, attention.topk(x, 3, [11, 4])[1])
    for call in (lambda: view.T.quantile(0.5), lambda: view.T.topk(2)):
        with pytest.raises(ValueError, match="of its transpose"):
            call()
    with pytest.raises(IndexError, match="position 12"):
        view.topk(1, rows=[12])


@pytest.mark.parametrize("scale", [0.02, 20.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_line_stops_where_everything_has_underflowed(decay: str, scale: float, monkeypatch: pytest.MonkeyPatch):
    x = make(Case(t=400, decay=decay, scale=scale, h=3, g=1, reset=True, b=1), torch.float32)
    lines = [f(x, k) for f in (attention.row, attention.column) for k in (0, 200, 399)]
    distance = attention.distance(x, [399])
    reached = []
    reach = attention_lines._reach
    monkeypatch.setattr(attention_lines, "_STRIDE", 16)
    monkeypatch.setattr(attention_lines, "_reach", lambda *a, **k: reached.append(reach(*a, **k)) or reached[-1])
    cut = [f(x, k) for f in (attention.row, attention.column) for k in (0, 200, 399)]
    for found, whole in zip(cut, lines, strict=True):
        assert relative_error(found, whole) < 1e-6
    assert relative_error(attention.distance(x, [399]), distance) < 1e-6
    if scale == 20.0:
        assert max(reached) < 300


@pytest.mark.parametrize("budget", [2**25, 700], ids=["one block", "blocks"])
def test_fused_row_blocks_say_the_same(budget: int, monkeypatch: pytest.MonkeyPatch):
    x = make(Case(t=20, decay="dt*A state", h=3, g=1, b=1), torch.float32)
    rows = [*range(0, 20, 3), 19]
    expected = [attention.quantile(x, SHARES, rows), *attention.topk(x, 3, rows)]
    monkeypatch.setattr(attention_mass, "resolve", lambda impl, x, work: "triton")
    monkeypatch.setattr(attention_mass, "_CPU_BLOCK", budget)
    monkeypatch.setattr(attention_mass, "_GPU_BLOCK", budget)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = x.map(lambda z: z.to(device))
    found = [attention.quantile(x, SHARES, rows), *attention.topk(x, 3, rows)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b) if b.dtype == torch.int64 else relative_error(a.cpu(), b) < 1e-5


@pytest.mark.parametrize("resolved", ["chunked", "triton"])
def test_no_head_has_no_lines(resolved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_mass, "resolve", lambda impl, x, work: resolved)
    directions = torch.zeros(2, 20, 1, 3)
    x = ScanInputs(torch.zeros(2, 20, 0, 4), directions, directions, log_decay=torch.zeros(2, 20, 0, 1))
    assert attention.row(x, 3).shape == attention.column(x, 3).shape == (2, 0, 20)
    assert attention.distance(x, [3]).shape == (2, 0, 1)
    assert attention.quantile(x, 0.5).shape == (2, 0, 20)
    assert attention.topk(x, 2)[1].shape == (2, 0, 20, 2)
