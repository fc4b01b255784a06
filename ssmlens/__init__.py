"""See what a state space model remembers: states, implicit attention and memory, with the error beside every figure.

>>> import ssmlens
>>> lens = ssmlens.load("mamba1-recall")  # doctest: +SKIP
>>> trace = lens.trace("...")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ssmlens.attention import ImplicitAttention
    from ssmlens.kernels.inputs import ScanInputs
    from ssmlens.lens import Lens
    from ssmlens.loading import load
    from ssmlens.recurrence import Recurrence
    from ssmlens.trace import LayerInfo, MixerTrace, Trace

# torch alone takes a second to import, so each name brings its module on first use.
_HOME = {
    "ImplicitAttention": "ssmlens.attention",
    "LayerInfo": "ssmlens.trace",
    "Lens": "ssmlens.lens",
    "MixerTrace": "ssmlens.trace",
    "Recurrence": "ssmlens.recurrence",
    "ScanInputs": "ssmlens.kernels.inputs",
    "Trace": "ssmlens.trace",
    "load": "ssmlens.loading",
}

__all__ = [
    "ImplicitAttention",
    "LayerInfo",
    "Lens",
    "MixerTrace",
    "Recurrence",
    "ScanInputs",
    "Trace",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in ("analyses", "apps", "attribution", "errors", "interventions", "kernels", "models", "plotting", "zoo"):
        value = importlib.import_module(f"ssmlens.{name}")
    else:
        raise AttributeError(f"module 'ssmlens' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
