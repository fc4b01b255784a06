"""Contributions on real mixers: they add up to the output, and every rule does what its docstring says."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
from footprint import IDS
from tolerances import RECONSTRUCTION
from torch import Tensor

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import RULES, Contributions, contributions

EXACT = ("gate", "tangent", "none")
FAMILIES = ("mamba1", "mamba2", "falcon")
BIASES = ({}, {"use_bias": True}, {"use_conv_bias": False}, {"use_bias": True, "use_conv_bias": False})


def trace_of(family: str, ids: Any = IDS, **config: Any) -> ssmlens.Trace:
    return ssmlens.load(getattr(checkpoints, family)(**config)).trace(ids)


def residual(found: Contributions) -> float:
    """What the vectors and the bias leave of the output, relative to it."""
    whole = found.vectors().sum(2) + found.bias
    return float((whole - found.output).norm() / found.output.norm())


@pytest.mark.parametrize("config", BIASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_bias_sum_to_the_output(family: str, config: dict[str, bool]) -> None:
    for mixer in trace_of(family, **config):
        assert mixer.output.dtype == torch.float64
        for rule in EXACT:
            found = contributions(mixer, rule)
            assert residual(found) <= 1e-10
            assert found.error <= 1e-10
        silu = contributions(mixer, "silu")
        assert silu.error > 1e-3
        assert abs(residual(silu) - silu.error) <= 1e-10 * silu.error


@pytest.mark.parametrize("name", zoo.names())
def test_shipped_models_add_up(name: str) -> None:
    trace = ssmlens.load(name).trace([5, 1, 17, 9, 9, 30, 2, 11, 5, 4, 40, 3])
    for mixer in trace:
        for rule in EXACT:
            found = contributions(mixer, rule)
            assert max(residual(found), found.error) <= RECONSTRUCTION[torch.float32]
