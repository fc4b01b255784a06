"""Whole numbers of a launch. Triton's helpers of these names serve kernels too, and a call costs them 2 us."""

from __future__ import annotations

__all__ = ["cdiv", "next_power_of_2"]


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for b > 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n >= 0; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0
