"""Which tokens a prediction rests on: maps, contributions and attributions, each with its identity and its error."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmlens.attribution._contributions import RULES, Contributions, contributions
    from ssmlens.attribution._decompose import decompose
    from ssmlens.attribution._occlusion import feature_ablation, occlusion
    from ssmlens.attribution._relevance import relevance
    from ssmlens.attribution.gradients import gradient_shap, gradient_x_input, integrated_gradients, smoothgrad
    from ssmlens.attribution.residuals import LogitParts, ResidualParts, residual_parts
    from ssmlens.attribution.result import Attribution

# Each name brings its module on first use. No module bears the name of something it exports: importing it would put
# the module in that name's place.
_HOME = {
    "RULES": "_contributions",
    "Attribution": "result",
    "Contributions": "_contributions",
    "LogitParts": "residuals",
    "ResidualParts": "residuals",
    "contributions": "_contributions",
    "decompose": "_decompose",
    "feature_ablation": "_occlusion",
    "gradient_shap": "gradients",
    "gradient_x_input": "gradients",
    "integrated_gradients": "gradients",
    "occlusion": "_occlusion",
    "relevance": "_relevance",
    "residual_parts": "residuals",
    "smoothgrad": "gradients",
}

__all__ = [
    "RULES",
    "Attribution",
    "Contributions",
    "LogitParts",
    "ResidualParts",
    "contributions",
    "decompose",
    "feature_ablation",
    "gradient_shap",
    "gradient_x_input",
    "integrated_gradients",
    "occlusion",
    "relevance",
    "residual_parts",
    "smoothgrad",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ssmlens.attribution' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ssmlens.attribution.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
