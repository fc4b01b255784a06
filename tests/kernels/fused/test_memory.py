"""No kernel reads or writes outside the tensors that it was given."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from memcheck import checked
from scan_cases import Case, make

from ssmlens.kernels import attention, contributions, scan
from ssmlens.kernels.contributions import Terms

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks into Triton's interpreter: needs no GPU")

F32 = torch.float32
CASES = [
    *(Case(t=37, h=3, p=1, g=1, n=5, decay=d, initial=True, reset=True, b=2) for d in ("dt*A state", "log state")),
    Case(t=20, h=3, p=1, g=3, n=16, decay="log head", b=1),
    Case(t=33, h=2, p=9, g=1, n=7, decay="dt*A head", initial=True, reset=True, b=1),
    Case(t=18, h=2, p=3, g=2, n=5, decay="log state", b=1),
    Case(t=9, h=2, p=3, g=1, n=4, decay="dt*A head", erase=True, b=1),
]


@triton.jit
def one_too_many(x_ptr, out_ptr, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out_ptr + at, tl.load(x_ptr + at + 1))


def test_the_check_sees_an_address_outside():
    x = torch.zeros(8)
    with checked() as complaints:
        one_too_many[(1,)](x, torch.empty(8), n=8)
    assert complaints == ["one_too_many: 1 of 8 addresses of a load"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scans_stay_inside(case: Case):
    x = make(case, F32)
    pieces = {k: z.requires_grad_() for k, z in x.tensors().items() if z.is_floating_point()}
    with checked() as complaints:
        y, final = scan.run(x.replace(**pieces), impl="triton")
        torch.autograd.grad(y.sum() + final.sum(), list(pieces.values()))
        with torch.no_grad():
            scan.states(x, [case.t - 1, 0, 3], impl="triton")
            scan.statistics(x, impl="triton")
    assert not complaints


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_attention_stays_inside(case: Case):
    x = make(case, F32)
    e = case.h * case.p
    ones = Terms(x, torch.ones(case.b, 3, case.t, e), torch.ones(case.b, case.t, e), torch.ones(5, e))
    with checked() as complaints:
        attention.dense(x, impl="triton")
        attention.reduce(x, "norm", impl="triton")
        attention.row(x, case.t - 1, impl="triton")
        attention.column(x, 1, impl="triton")
        attention.distance(x, impl="triton")
        contributions.norms(ones, impl="triton")
    assert not complaints
