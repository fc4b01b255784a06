"""The scan on matrix units against the loop in float64."""

from __future__ import annotations

import pytest
import torch
from scan_cases import Case, make, relative_error
from tolerances import TOL

from ssmlens.kernels import naive
from ssmlens.kernels.fused import ssd
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32 = torch.float32

CASES = [
    (Case(t=1, initial=True), None),
    (Case(t=63, decay="log head", initial=True, b=1), None),
    (Case(t=64, h=2, reset=True, initial=True, b=1), 32),
    (Case(t=65, h=2, decay="log head", reset=True, b=1), 32),
    (Case(t=33, h=6, g=2, read_groups=3, n=7, b=1), 32),
    (Case(t=40, h=4, g=1, read_groups=4, n=16, p=16, b=1), 16),
    (Case(t=33, p=1, n=1, b=1), 16),
    (Case(t=20, h=1, g=1, p=70, n=130, b=1), 16),
    (Case(t=70, scale=1e-6, initial=True, b=1), 64),
    (Case(t=70, scale=50.0, initial=True, b=1), 64),
    (Case(t=70, scale=50.0, decay="log head", b=1), 64),
    (Case(t=1000, h=1, g=1, p=16, n=16, b=1), None),
]


def given(case: Case, dtype: torch.dtype = F32) -> tuple[ScanInputs, ScanInputs]:
    """The inputs on the device, and the same numbers in float64 for the loop."""
    x = make(case, dtype)
    return x.map(lambda z: z.to(DEVICE)), x.cast(torch.float64)


@pytest.mark.parametrize(("case", "chunk"), CASES, ids=lambda v: str(v))
def test_outputs_and_states_equal_the_loop(case: Case, chunk: int | None):
    x, true = given(case)
    picks = sorted({0, case.t // 2, case.t - 1}, reverse=True)
    found = ssd.forward(x, picks, chunk=chunk)
    y, final = naive.run(true)
    assert found.y.dtype == found.final.dtype == found.boundaries.dtype == F32
    assert relative_error(found.y.cpu(), y) < TOL[F32]
    assert relative_error(found.final.cpu(), final) < TOL[F32]
    assert relative_error(found.states.cpu(), naive.states(true, picks)) < TOL[F32]


def test_boundaries_are_the_states_entering_each_chunk():
    x, true = given(Case(t=70, h=2, initial=True, reset=True, b=1))
    found = ssd.forward(x, chunk=32)
    assert found.chunk == 32
    assert found.states is None
    assert torch.equal(found.boundaries[:, 0], x.initial)
    assert relative_error(found.boundaries[:, 1:].cpu(), naive.states(true, [31, 63])) < TOL[F32]


def test_states_in_any_order_with_repeats_and_all_of_them():
    x, true = given(Case(t=18, h=2, g=1, initial=True, b=1))
    picks = [7, 0, 17, 7]
    assert relative_error(ssd.forward(x, picks, chunk=16).states.cpu(), naive.states(true, picks)) < TOL[F32]
    assert relative_error(ssd.forward(x, "all", chunk=16).states.cpu(), naive.states(true)) < TOL[F32]
    assert ssd.forward(x, []).states.shape == (1, 0, 2, 3, 5)
    assert ssd.forward(x, [3], want_output=False).y is None


@pytest.mark.parametrize("together", [0, 2], ids=["one head", "two heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_keep_full_accuracy(dtype: torch.dtype, together: int):
    x, true = given(Case(t=40, h=4, g=2, p=16, n=16, b=1), dtype)
    found = ssd.forward(x, chunk=32, tuning={"outputs": {"together": together}})
    y, final = naive.run(true)
    assert relative_error(found.y.cpu(), y) < TOL[F32]
    assert relative_error(found.final.cpu(), final) < TOL[F32]


def test_bfloat16_on_request():
    x, true = given(Case(t=70, h=2, g=1, p=16, n=16, initial=True, b=1), torch.bfloat16)
    found = ssd.forward(x, [30], precision="bf16", out_dtype=torch.bfloat16)
    y, final = naive.run(true)
    assert found.y.dtype == found.boundaries.dtype == torch.bfloat16
    for part, truth in ((found.y, y), (found.final, final), (found.states, naive.states(true, [30]))):
        assert 1e-4 < relative_error(part.cpu(), truth) < TOL[torch.bfloat16]


def test_two_parts_are_between():
    x, true = given(Case(t=70, h=1, g=1, p=16, n=16, b=1))
    found = ssd.forward(x, tuning={"parts": 2})
    # 16 bits of each operand: twice that where both are rounded.
    assert 1e-7 < relative_error(found.y.cpu(), naive.run(true)[0]) < 4 * 2**-17


def test_a_huge_step_leaves_its_neighbours_digits():
    """Steps of 50 nats next to steps of 1e-6: a float32 sum of a chunk would lose the small ones."""
    t = 64
    log_decay = torch.full((1, t, 2, 1), -1e-6, dtype=torch.float64)
    log_decay[:, 1::4] = -90.0
    x = make(Case(t=t, h=2, g=1, decay="log head", b=1), F32).replace(log_decay=log_decay.float())
    y, final = naive.run(x.cast(torch.float64))
    found = ssd.forward(x.map(lambda z: z.to(DEVICE)), chunk=64)
    assert relative_error(found.y.cpu(), y) < TOL[F32]
    assert relative_error(found.final.cpu(), final) < TOL[F32]


def test_strided_inputs_and_steps_of_zero():
    x, _ = given(Case(t=20, h=2, g=2, initial=True))
    loose = x.replace(
        value=x.value.transpose(2, 3).contiguous().transpose(2, 3),
        write=torch.stack([x.write, x.write], 3)[:, :, :, 1],
        read=torch.cat([x.read, x.read], 1)[:, 20:],
        dt=x.dt.mT.contiguous().mT.clone(memory_format=torch.preserve_format),
        initial=x.initial.mT.contiguous().mT,
    )
    loose.dt[:, 5:9] = 0
    tight = loose.map(lambda z: z.contiguous())
    found, expected = ssd.forward(loose, chunk=16), ssd.forward(tight, chunk=16)
    assert torch.equal(found.y, expected.y)
    y, _ = naive.run(loose.map(lambda z: z.cpu()).cast(torch.float64))
    assert relative_error(found.y.cpu(), y) < TOL[F32]


def test_two_runs_agree_to_the_bit():
    x, _ = given(Case(t=40, h=2, g=2, b=1))
    first, second = ssd.forward(x, [3], chunk=32), ssd.forward(x, [3], chunk=32)
    for one, two in zip(first[:4], second[:4], strict=True):
        assert torch.equal(one, two)


def test_what_it_refuses():
    x, _ = given(Case(t=5))
    with pytest.raises(ValueError, match="precision is fp32 or bf16, got 'tf32'"):
        ssd.forward(x, precision="tf32")
    with pytest.raises(ValueError, match="chunk is a power of two from 16 to 128, got 24"):
        ssd.forward(x, chunk=24)
    for wrong in (Case(t=5, erase=True), Case(t=5, decay="log state")):
        with pytest.raises(ValueError, match="ssd runs recurrences"):
            ssd.forward(given(wrong)[0])
    with pytest.raises(ValueError, match="in float32 or narrower"):
        ssd.forward(x.cast(torch.float64))
