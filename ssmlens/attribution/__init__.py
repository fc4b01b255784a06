"""Which tokens a prediction rests on: maps, contributions and attributions, each with its identity and its error."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmlens.attribution._contributions import RULES, Contributions, contributions
    from ssmlens.attribution._decompose import decompose
    from ssmlens.attribution._occlusion import feature_ablation, occlusion
    from ssmlens.attribution._relevance import relevance
    from ssmlens.attribution._rollout import hidden_row, mamba_attribution, rollout
    from ssmlens.attribution._unified import UnifiedAttention, unified
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
    "UnifiedAttention": "_unified",
    "gradient_shap": "gradients",
    "gradient_x_input": "gradients",
    "hidden_row": "_rollout",
    "integrated_gradients": "gradients",
    "mamba_attribution": "_rollout",
    "occlusion": "_occlusion",
    "relevance": "_relevance",
    "residual_parts": "residuals",
    "rollout": "_rollout",
    "smoothgrad": "gradients",
    "unified": "_unified",
}

__all__ = [
    "RULES",
    "Attribution",
    "Contributions",
    "LogitParts",
    "ResidualParts",
    "UnifiedAttention",
    "contributions",
    "decompose",
    "feature_ablation",
    "gradient_shap",
    "gradient_x_input",
    "hidden_row",
    "integrated_gradients",
    "mamba_attribution",
    "occlusion",
    "relevance",
    "residual_parts",
    "rollout",
    "smoothgrad",
    "unified",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ssmlens.attribution' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ssmlens.attribution.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
