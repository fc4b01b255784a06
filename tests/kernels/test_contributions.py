"""Contributions of every pair of tokens, against a reference in float64 that is written out plainly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scan_cases import Case, make, relative_error
from tolerances import TOL
from torch import Tensor

from ssmlens.kernels import contributions, naive
from ssmlens.kernels.attention_rows import rows
from ssmlens.kernels.contributions import Terms

pytestmark = pytest.mark.usefixtures("poisoned")

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
