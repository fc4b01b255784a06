"""The one table of tolerances, each with its reason. The same in CI and at a desk."""

import torch

TOL = {
    # Relative to the largest entry. float64: two ways of summing a few hundred terms of size one differ by
    # about sqrt(terms) * 2e-16, with room for exponentials of sums. float32: the same count of 6e-8.
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    # One rounding of inputs to 8 bits of mantissa; kernels upcast before they compute.
    torch.bfloat16: 1e-2,
}

# A gradient sums over every later token: one more order for each dtype.
GRAD_TOL = {torch.float64: 1e-10, torch.float32: 5e-5}

# Closed forms against float64 arithmetic.
EXACT = 1e-12

# Rebuilt against real mixer output, as `ssmlens verify` promises.
RECONSTRUCTION = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
