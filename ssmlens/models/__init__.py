"""One file per family of scan: the only place that knows transformers' and mamba_ssm's names.

transformers calls a module-level scan function by name from inside each mixer. A `Family` says how to read the
arguments of one such function as a `Recurrence` and how the rest of the mixer follows from its input and weights.
Families are found by the name of their scan function, so a new model type that calls a known scan costs one entry
in `SUPPORTED`.
"""

from __future__ import annotations

from ssmlens.models import mamba1, mamba2
from ssmlens.models.family import Family

__all__ = ["FAMILIES", "SUPPORTED", "Family", "supported"]

FAMILIES: dict[str, Family] = {f.scan: f for f in (mamba1.FAMILY, mamba2.FAMILY)}
"""Scan function name to family."""

SUPPORTED: dict[str, tuple[str, str, Family]] = {
    "mamba": ("transformers.models.mamba.modeling_mamba", "MambaForCausalLM", mamba1.FAMILY),
    "falcon_mamba": (
        "transformers.models.falcon_mamba.modeling_falcon_mamba",
        "FalconMambaForCausalLM",
        mamba1.FAMILY,
    ),
    "mamba2": ("transformers.models.mamba2.modeling_mamba2", "Mamba2ForCausalLM", mamba2.FAMILY),
}
"""``model_type`` of a transformers config to (module, class, family)."""


def supported() -> str:
    """The supported models in words, for error messages."""
    types = ", ".join(f"{cls} (model_type {kind!r})" for kind, (_, cls, _) in SUPPORTED.items())
    return f"{types} of transformers, and the state-spaces checkpoint format for Mamba-1 and Mamba-2"
