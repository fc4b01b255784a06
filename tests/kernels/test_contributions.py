"""Contributions of every pair of tokens, against a reference in float64 that is written out plainly."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from scan_cases import Case, make, relative_error
from tolerances import TOL
from torch import Tensor

from ssmlens.kernels import contribution_tiles, contributions, naive
from ssmlens.kernels.attention_rows import rows
from ssmlens.kernels.bench import peak_memory
from ssmlens.kernels.contributions import Terms

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    Case(1, h=3, p=1, g=1),
    Case(2, h=3, p=1, g=1, decay="dt*A state"),
    Case(37, h=4, p=1, g=2, n=3, decay="dt*A state"),
    Case(70, h=4, p=1, g=1, n=5, decay="dt*A state", scale=50.0),
    Case(70, h=4, p=1, g=2, decay="dt*A state", scale=1e-6, reset=True),
    Case(41, h=4, p=1, g=4, decay="log state", reset=True),
    Case(41, h=4, p=1, g=1, decay="log head"),
    Case(70, h=4, p=3, g=2),
    Case(70, h=4, p=3, g=2, reset=True, initial=True, scale=50.0),
    Case(41, h=4, p=2, g=1, read_groups=4, decay="log head"),
    Case(41, h=4, p=2, g=2, decay="log state"),
    Case(19, h=2, p=2, g=1, erase=True),
    Case(19, h=2, p=1, g=1, erase=True),
]


def terms_of(case: Case, dtype: torch.dtype = torch.float64, taps: int = 4, d: int = 5, skip: str = "head") -> Terms:
    rng = torch.Generator().manual_seed(7)
    e = case.h * case.p

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    shapes = {"none": None, "head": (case.h,), "channel": (case.h, case.p)}
    return Terms(
        inputs=make(case, dtype),
        sources=normal(case.b, taps, case.t, e),
        gate=normal(case.b, case.t, e),
        weight=normal(d, e),
        skip=None if shapes[skip] is None else normal(*shapes[skip]),
    )


def move(terms: Terms) -> Terms:
    """The same on the device where Triton runs."""
    changes = {f.name: z.to(DEVICE) for f in fields(terms) if isinstance(z := getattr(terms, f.name), Tensor)}
    return replace(terms, inputs=terms.inputs.map(lambda z: z.to(DEVICE)), **changes)


def reference(terms: Terms) -> Tensor:
    """T (b, t, s, d), pair by pair and tap by tap."""
    b, taps, t, e = terms.sources.shape
    M = naive.attention(terms.inputs.replace(initial=None).cast(torch.float64))  # (b, h, t, s)
    M = M.repeat_interleave(terms.inputs.head_dim, 1)  # one for each channel
    if terms.skip is not None:
        D = terms.skip.double().reshape(terms.inputs.n_heads, -1).expand(-1, terms.inputs.head_dim).reshape(e)
        M = M + D[:, None, None] * torch.eye(t, dtype=torch.float64)
    out = torch.zeros(b, t, t, len(terms.weight), dtype=torch.float64)
    for row in range(t):
        for s in range(row + 1):
            v = sum(M[:, :, row, s + k] * terms.sources[:, k, s].double() for k in range(min(taps, row - s + 1)))
            out[:, row, s] = (terms.gate[:, row].double() * v) @ terms.weight.double().T
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_everything_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    terms = terms_of(case, dtype, skip="channel" if case.g == 2 else "head")
    true = reference(terms)
    assert relative_error(contributions.vectors(terms), true) <= TOL[dtype]
    assert relative_error(contributions.norms(terms), true.norm(dim=-1)) <= TOL[dtype]
    assert relative_error(contributions.norms(terms, p=1), true.abs().sum(-1)) <= TOL[dtype]
    assert relative_error(contributions.total(terms), true.sum(2)) <= TOL[dtype]
    output = true.sum(2) + 1
    nearer = (output.abs().sum(-1)[..., None] - (output[:, :, None] - true).abs().sum(-1)).clamp(min=0)
    share = nearer / nearer.sum(-1, keepdim=True).clamp(min=1e-300)
    # A share's rounding is that of the norms, over the sum of their differences.
    wrong = (contributions.alti(terms, output.to(dtype)).double() - share).abs() * nearer.sum(-1, keepdim=True)
    assert (wrong / output.abs().sum(-1)[..., None]).max() <= 2 * TOL[dtype]


SPLIT = 3 * 2**-18
"""Three roundings of a split product, each to half a unit in 17 bits, where a few channels leave nothing to average."""


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 3, 6, 8, 10, 11)], ids=str)
def test_fused_operands(case: Case) -> None:
    terms = move(terms_of(case, torch.float32, skip="channel" if case.g == 2 else "head"))
    true = reference(terms_of(case, skip="channel" if case.g == 2 else "head")).norm(dim=-1)
    assert relative_error(contributions.norms(terms, impl="triton").cpu(), true) <= SPLIT


@pytest.mark.parametrize("scale", [1e-6, 1.0, 50.0])
def test_fused_operands_far_from_the_diagonal(scale: float) -> None:
    case = Case(140, h=4, p=1, g=2, n=3, decay="dt*A state", scale=scale, b=1)
    terms, rows = move(terms_of(case, torch.float32)), [139, *range(70, 100), 2]
    found = contributions.norms(terms, rows=rows, impl="triton").cpu()
    assert relative_error(found, reference(terms_of(case)).norm(dim=-1)[:, rows]) <= SPLIT


def test_rounding_averages_out_over_channels() -> None:
    case = Case(80, h=32, p=1, g=1, decay="dt*A state", b=1)
    rows = [*range(70, 80)]
    found = contributions.norms(move(terms_of(case, torch.float32)), rows=rows, impl="triton").cpu()
    assert relative_error(found, contributions.norms(terms_of(case), rows=rows)) <= TOL[torch.float32]


@pytest.mark.parametrize("taps", [1, 3])
def test_fused_alti_and_short_convolutions(taps: int) -> None:
    case = Case(34, h=4, p=2, g=2, b=1)
    exact = terms_of(case, taps=taps, skip="none")
    output = contributions.total(exact)
    terms = move(terms_of(case, torch.float32, taps=taps, skip="none"))
    found = contributions.alti(terms, output.float().to(DEVICE), impl="triton").cpu()
    assert (found - contributions.alti(exact, output)).abs().max() <= 1e-4
    assert not found.triu(1).any()


@pytest.mark.parametrize("bytes_", [2_000, 20_000])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[7], CASES[11]], ids=str)
def test_small_tiles_change_nothing(case: Case, bytes_: float, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = terms_of(case)
    whole = contributions.norms(terms)
    monkeypatch.setattr(contribution_tiles, "_CPU_BYTES", bytes_)
    monkeypatch.setattr(contribution_tiles, "_CPU_ROWS", 7)
    assert relative_error(contributions.norms(terms), whole) <= TOL[torch.float64]


def test_rows_are_taken_as_given() -> None:
    terms = terms_of(CASES[7])
    picked = [-1, 3, 4, 5, 3, 69, 0]
    assert relative_error(contributions.vectors(terms, [3])[:, 0], reference(terms)[:, 3]) <= TOL[torch.float64]
    assert relative_error(contributions.vectors(terms, picked), contributions.vectors(terms)[:, picked]) <= 1e-13
    output = contributions.total(terms)
    some = contributions.alti(terms, output, picked)
    assert (some - contributions.alti(terms, output)[:, picked]).abs().max() <= 1e-12
    assert contributions.norms(terms, rows=[]).shape == (2, 0, 70)


def test_a_wide_projection_keeps_its_norms() -> None:
    terms = terms_of(CASES[4], d=9)  # 9 rows, 4 channels
    assert relative_error(contributions.norms(terms), reference(terms).norm(dim=-1)) <= TOL[torch.float64]
    largest = reference(terms).abs().amax(-1)
    assert relative_error(contributions.norms(terms, p=torch.inf), largest) <= TOL[torch.float64]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_the_matrix(case: Case) -> None:
    inputs = make(case).replace(initial=None)
    true = naive.attention(inputs)
    for start, stop in ((0, case.t), (case.t - 1, case.t), (case.t // 3, case.t // 3 + 1), (case.t // 2, case.t)):
        found = rows(inputs, start, stop)
        assert relative_error(found, true[:, :, start:stop, :stop]) <= TOL[torch.float64]
        assert not found.triu(start + 1).any()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (0, 38)])
def test_rows_outside(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="are no rows of a sequence of 37 tokens"):
        rows(make(CASES[2]), start, stop)


def test_bad_arguments_say_what_is_valid() -> None:
    terms = terms_of(CASES[7])
    with pytest.raises(ValueError, match=r"p is at least 1, got 0\.5"):
        contributions.norms(terms, p=0.5)
    with pytest.raises(ValueError, match="position 70 is outside the sequence of 70 tokens"):
        contributions.norms(terms, rows=[70])
    with pytest.raises(ValueError, match=r"output is \(b=2, t=70, d=5\)"):
        contributions.alti(terms, torch.zeros(2, 70, 4))
    with pytest.raises(ValueError, match="impl is one of"):
        contributions.norms(terms, impl="cuda")
    with pytest.raises(ValueError, match="no impl='naive'"):
        contributions.norms(terms, impl="naive")
    with pytest.raises(ValueError, match="impl='triton' computes in float32"):
        contributions.norms(terms, impl="triton")
    for name, shape in (("sources", (2, 4, 70, 11)), ("gate", (2, 70, 11)), ("weight", (5, 11)), ("skip", (3,))):
        with pytest.raises(ValueError, match=f"{name} is "):
            replace(terms, **{name: torch.zeros(shape)})


def test_memory_stays_within_the_budget() -> None:
    # All pairs would be 400 MB of operand; the tile and what makes it are a fraction of that.
    case = Case(512, h=192, p=1, g=1, n=4, decay="dt*A state", b=1)
    terms = terms_of(case, torch.float32, d=64)
    contributions.norms(terms, rows=[3])
    with peak_memory("cpu") as peak:
        contributions.norms(terms)
    assert not peak or peak[0] <= 150e6
