"""The inputs: what is refused, and views of heads and tokens."""

from __future__ import annotations

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import TOL

from ssmlens.kernels import naive
from ssmlens.kernels.inputs import ScanInputs, compute_dtype, expand_groups


def broken(**changes: torch.Tensor | None) -> ScanInputs:
    return make(Case(t=6, initial=True, reset=True)).replace(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"value": torch.zeros(2, 6, 4)}, r"value is \(b, t, h, p\), got \(2, 6, 4\)"),
        ({"write": torch.zeros(2, 6, 3, 5)}, "write is .* g dividing h=4"),
        ({"read": torch.zeros(2, 6, 2, 4)}, "read is .*n=5"),
        ({"read": torch.zeros(2, 6, 0, 5)}, "read is"),
        ({"A": None}, "give the decay once"),
        ({"log_decay": torch.zeros(2, 6, 4, 1)}, "give the decay once"),
        ({"dt": None}, "A needs dt"),
        ({"A": torch.zeros(4, 3)}, r"A is \(h=4, 1\) or \(h=4, n=5\), got \(4, 3\)"),
        ({"dt": torch.zeros(2, 6, 1)}, "dt is"),
        ({"A": None, "log_decay": torch.zeros(2, 6, 4, 2)}, "log_decay is"),
        ({"initial": torch.zeros(2, 4, 5, 3)}, "initial is"),
        ({"reset": torch.zeros(2, 6)}, "reset is a bool tensor"),
        ({"erase_read": torch.zeros(2, 6, 1, 5)}, "come together"),
    ],
)
def test_refusals(changes: dict[str, torch.Tensor | None], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        broken(**changes)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("g", [1, 2, 6])
def test_heads_run_alone(decay: str, g: int):
    x = make(Case(t=9, h=6, g=g, decay=decay, initial=True, reset=True))
    y, final = naive.run(x)
    for start, stop in ((0, 6), (0, 3), (3, 6), (1, 2), (1, 5), (2, 6)):
        part = x.select_heads(slice(start, stop))
        found, last = naive.run(part)
        assert relative_error(found, y[:, :, start:stop]) < TOL[torch.float64]
        assert relative_error(last, final[:, start:stop]) < TOL[torch.float64]
        assert part.write.shape[2] in (1, g // 2, g, stop - start)
    for heads in ([5, 0, 5], [2], [3, 4], [0, 1, 2]):
        found, last = naive.run(x.take_heads(heads))
        assert relative_error(found, y[:, :, heads]) < TOL[torch.float64]
        assert relative_error(last, final[:, heads]) < TOL[torch.float64]


def test_only_a_contiguous_range_is_selected():
    for heads in (slice(2, 2), slice(0, 4, 2)):
        with pytest.raises(ValueError, match="non-empty contiguous slice of 4 heads"):
            make(Case(t=3)).select_heads(heads)


def test_slices_are_views_and_carry_the_initial_state_only_from_the_start():
    x = make(Case(t=9, initial=True))
    part = x.slice(2, 5)
    assert part.length == 3
    assert part.initial is None
    assert part.value.data_ptr() == x.value[:, 2:].data_ptr()
    assert x.slice(0, 5).initial is x.initial


def test_dtypes():
    assert (
        compute_dtype(torch.bfloat16) == compute_dtype(torch.float16) == compute_dtype(torch.float32) == torch.float32
    )
    assert compute_dtype(torch.float64) == torch.float64
    x = make(Case(t=3, reset=True)).cast(torch.bfloat16)
    assert x.value.dtype == torch.bfloat16
    assert x.cast().A.dtype == torch.float32
    assert x.reset.dtype == torch.bool


def test_groups_expand_in_order():
    x = torch.arange(6.0).view(1, 1, 3, 2)
    assert expand_groups(x, 6)[0, 0, :, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert expand_groups(x, 3) is x
    assert expand_groups(x[:, :, :1], 5).data_ptr() == x.data_ptr()
