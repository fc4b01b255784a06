"""Matrix products of float32 numbers on matrix units that take bfloat16.

A float32 number is the sum of three bfloat16 numbers: round it, round what is left, and the rest has eight bits
as well. A product of two sums is then a few bfloat16 products with float32 sums. The ones that can reach the last
bits are kept (3 + 3 parts: six products), and an operand that came as bfloat16 has one part and costs nothing
extra. The tf32 units would need the same time for six products (three, at half the speed), but cannot use
that, and they take operands in one order only.

Parts: 1 rounds to bfloat16 (exact for a bfloat16 tensor), 2 keeps 16 to 17 bits, 3 keeps all 24.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRET", "blocks", "dot", "parts_of"]

# Triton's interpreter has no bfloat16 arithmetic: there the parts stay float32 tensors with rounded values.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def parts_of(dtype: torch.dtype, parts: int) -> int:
    """How many parts an operand of this dtype needs where float32 ones get ``parts``."""
    return 1 if dtype == torch.bfloat16 else parts


def blocks(size: int, block: int) -> tuple[int, int]:
    """Size and number of the tiles along an axis.

    Tiles are of one size however short the axis is, because that is the code that was checked on a GPU: cut to 16 or
    32, Triton 3.6 compiled kernels for sm_90 that were wrong or read memory that was not theirs (NOTES.md).
    """
    return block, -(-size // block)


@triton.jit
def _narrow(x, INTERPRET: tl.constexpr):
    """x as bfloat16, to nearest (in the interpreter: a float32 tensor of such values)."""
    if INTERPRET:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _head(x, HALF: tl.constexpr):
    """The leading 8 bits of x in float32, cut off (HALF 0) or rounded (HALF 0x8000): cheaper than two conversions."""
    return ((x.to(tl.int32, bitcast=True) + HALF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, A: tl.constexpr, B: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b with ``A`` and ``B`` parts of the operands; small terms are added first."""
    if A > 1:
        a = a.to(tl.float32)
        a_head = _head(a, 0x8000 if A == 2 else 0)
        a_rest = a - a_head
        a = a_head
    if B > 1:
        b = b.to(tl.float32)
        b_head = _head(b, 0x8000 if B == 2 else 0)
        b_rest = b - b_head
        b = b_head
    a0 = _narrow(a, INTERPRET)
    b0 = _narrow(b, INTERPRET)
    if A > 2:
        a_mid = _head(a_rest, 0)
        acc = tl.dot(_narrow(a_rest - a_mid, INTERPRET), b0, acc)
        a_rest = a_mid
    if B > 2:
        b_mid = _head(b_rest, 0)
        acc = tl.dot(a0, _narrow(b_rest - b_mid, INTERPRET), acc)
        b_rest = b_mid
    if (A > 1 and B > 1) and (A > 2 or B > 2):
        acc = tl.dot(_narrow(a_rest, INTERPRET), _narrow(b_rest, INTERPRET), acc)
    if A > 1:
        acc = tl.dot(_narrow(a_rest, INTERPRET), b0, acc)
    if B > 1:
        acc = tl.dot(a0, _narrow(b_rest, INTERPRET), acc)
    return tl.dot(a0, b0, acc)
