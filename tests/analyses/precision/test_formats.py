"""Rounding to short formats: against torch, against a plain search over all numbers, and its mean when stochastic."""

from __future__ import annotations

import pytest
import torch

from ssmlens.analyses import precision
from ssmlens.errors import SsmlensError

SHORT = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def all_numbers(name: str) -> torch.Tensor:
    """Every finite number of a format, ascending, in float64."""
    to = precision.FORMATS[name]
    bits = torch.arange(256, dtype=torch.uint8) if "8_" in name else torch.arange(-(2**15), 2**15).to(torch.int16)
    found = bits.view(to.dtype).double()
    return found[found.isfinite()].unique()


@pytest.mark.parametrize("name", SHORT)
def test_the_table_describes_the_format(name: str) -> None:
    to, numbers = precision.FORMATS[name], all_numbers(name)
    positive = numbers[numbers > 0]
    assert numbers[-1].item() == to.largest
    assert positive[0].item() == 2.0 ** (to.least + 1 - to.digits)
    between = numbers[(numbers >= 1) & (numbers < 2)]
    assert len(between) == 2 ** (to.digits - 1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHORT)
def test_nearest_is_the_nearest_of_all_numbers(name: str, dtype: torch.dtype, scaled: bool) -> None:
    numbers, to = all_numbers(name), precision.FORMATS[name]
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(4, 50, generator=g, dtype=torch.float64) * torch.exp2(torch.arange(-20, 20, 10))[:, None]).to(
        dtype
    )
    rounded = precision.rounded(x, to, scaled=scaled).double()
    scale = 2.0 ** torch.floor(torch.log2(to.largest / x.abs().max().double())) if scaled else 1.0
    wanted = (x.double() * scale)[..., None]
    best = (wanted - numbers).abs().min(-1).values / scale
    assert torch.equal((rounded - x.double()).abs(), best)
    assert (scaled or x.abs().max() < to.largest) or rounded.abs().max() == to.largest


@pytest.mark.parametrize("name", SHORT)
def test_ties_go_to_even_as_in_torch(name: str) -> None:
    to = precision.FORMATS[name]
    numbers = all_numbers(name)
    middles = (numbers[1:] + numbers[:-1]) / 2  # exact in float32 for all of these
    assert torch.equal(precision.rounded(middles, to), middles.float().to(to.dtype).double())
    assert torch.equal(precision.rounded(middles.float(), to).double(), middles.float().to(to.dtype).double())


def test_float64_is_rounded_once() -> None:
    """Just above a tie: by way of float32 it would become the tie, and go down to the even neighbour."""
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert x.float().bfloat16().double().item() == 1.0
    assert precision.rounded(x, precision.format_of("bfloat16")).item() == 1 + 2.0**-7


@pytest.mark.parametrize("name", SHORT)
def test_stochastic_rounding_goes_to_a_neighbour_and_keeps_the_mean(name: str) -> None:
    to, numbers = precision.FORMATS[name], all_numbers(name)
    low, high = numbers[len(numbers) // 2 + 37], numbers[len(numbers) // 2 + 38]
    x = (low + 0.3 * (high - low)).expand(20_000).clone()
    rounded = precision.rounded(x, to, "stochastic", torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {low.item(), high.item()}
    assert (rounded == high).double().mean().item() == pytest.approx(0.3, abs=0.015)


def test_what_a_format_is_called() -> None:
    assert precision.format_of("bf16") is precision.format_of(torch.bfloat16) is precision.FORMATS["bfloat16"]
    assert precision.format_of("torch.float16").stalls_at_once == 2.0**-12
    for wrong in ("int8", torch.float64, ""):
        with pytest.raises(SsmlensError, match=r"unknown number format .*: choose from float32, bfloat16, float16"):
            precision.format_of(wrong)


def test_zero_and_nan() -> None:
    x = torch.tensor([[0.0, float("nan"), -0.0, float("inf")]], dtype=torch.float64)
    for how in precision.ROUNDINGS:
        out = precision.rounded(x, precision.format_of("float16"), how)
        assert out[0, 0] == 0
        assert out[0, 1].isnan()
    assert precision.rounded(x[:, :1], precision.format_of("fp8"), scaled=True).item() == 0
