"""Floating point formats that a state may be kept in, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError

__all__ = ["FORMATS", "ROUNDINGS", "Format", "format_of", "rounded"]

ROUNDINGS = ("nearest", "stochastic")
"""Ties of "nearest" go to the even neighbour; "stochastic" goes up with the probability that keeps the mean."""


@dataclass(frozen=True)
class Format:
    """A binary floating point format.

    Args:
        name: as torch calls it.
        digits: binary digits of the significand, the leading one included.
        least: exponent of its smallest normal number; below, numbers are spaced evenly.
        largest: its largest finite number.
        dtype: the torch dtype.
    """

    name: str
    digits: int
    least: int
    largest: float
    dtype: torch.dtype

    @property
    def stalls_at_once(self) -> float:
        """Below this 1 - a no number of the format changes when it is multiplied by a and rounded to nearest."""
        return float(2.0 ** -(self.digits + 1))

    @property
    def stalls_soon(self) -> float:
        """Below this 1 - a the product stops falling before it reaches the next power of two."""
        return float(2.0**-self.digits)


_KNOWN = (
    ("float32", 24, -126, torch.float32),
    ("bfloat16", 8, -126, torch.bfloat16),
    ("float16", 11, -14, torch.float16),
    ("float8_e4m3fn", 4, -6, torch.float8_e4m3fn),
    ("float8_e5m2", 3, -14, torch.float8_e5m2),
)

FORMATS = {
    name: Format(name, digits, least, float(torch.finfo(dtype).max), dtype) for name, digits, least, dtype in _KNOWN
}
"""Name to format."""


def format_of(dtype: str | torch.dtype | Format) -> Format:
    """The format of a name, a short name or a torch dtype.

    Raises:
        SsmlensError: for any other.
    """
    if isinstance(dtype, Format):
        return dtype
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
    name = str(dtype).removeprefix("torch.")
    found = FORMATS.get(short.get(name, name))
    if found is None:
        raise SsmlensError(f"unknown number format {name!r}: choose from {', '.join(FORMATS)}")
    return found


def rounded(
    x: Tensor, to: Format, rounding: str = "nearest", generator: torch.Generator | None = None, scaled: bool = False
) -> Tensor:
    """x with every entry rounded to a format and kept in the dtype of x; too large entries become the largest.

    Args:
        x: float32 or float64 of any shape.
        to: the format.
        rounding: one of `ROUNDINGS`.
        generator: of the draws of "stochastic", on the device of x.
        scaled: multiply the last two axes by a power of two that brings their largest entry just below the format's
            largest before rounding, and divide after it, as caches in eight bits do with a scale for each head.
    """
    scale = _scale(x, to) if scaled else None
    if scale is not None:
        x = x * scale
    if rounding == "nearest" and (x.dtype != torch.float64 or to.dtype == torch.float32):
        # torch rounds float64 to the shorter formats by way of float32, which rounds twice.
        out = x.clamp(-to.largest, to.largest).to(to.dtype).to(x.dtype)
    else:
        exponent = torch.frexp(x)[1]  # the significand lies in [1/2, 1)
        step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=to.least + 1) - to.digits)
        units = x / step
        if rounding == "nearest":
            units = units.round()
        else:
            units = (units + torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)).floor()
        out = (units * step).clamp(-to.largest, to.largest)
    return out if scale is None else out / scale


def _scale(x: Tensor, to: Format) -> Tensor:
    """The power of two for the last two axes; 1 where all is zero."""
    peak = x.abs().amax((-2, -1), keepdim=True)
    exponent = torch.floor(torch.log2(to.largest / peak.clamp(min=torch.finfo(x.dtype).tiny))).clamp(-120, 120)
    return torch.where(peak > 0, torch.exp2(exponent), torch.ones_like(peak))
