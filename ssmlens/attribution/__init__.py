"""Which tokens a prediction rests on: maps, contributions and attributions, each with its identity and its error."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmlens.attribution._benchmark import Benchmark, Case, compare
    from ssmlens.attribution._contributions import RULES, Contributions, contributions
    from ssmlens.attribution._decompose import decompose
    from ssmlens.attribution._faithfulness import Faithfulness, faithfulness
    from ssmlens.attribution._methods import METHODS, attribute
    from ssmlens.attribution._occlusion import feature_ablation, occlusion
    from ssmlens.attribution._pair import PairPath, pair_path
    from ssmlens.attribution._relevance import relevance
    from ssmlens.attribution._rollout import hidden_row, mamba_attribution, rollout
    from ssmlens.attribution._sanity import Randomisation, infidelity, randomisation, sensitivity
    from ssmlens.attribution._unified import UnifiedAttention, unified
    from ssmlens.attribution.gradients import gradient_shap, gradient_x_input, integrated_gradients, smoothgrad
    from ssmlens.attribution.residuals import LogitParts, ResidualParts, residual_parts
    from ssmlens.attribution.result import Attribution

# Each name brings its module on first use. No module bears the name of something it exports: importing it would put
# the module in that name's place.
_HOME = {
    "METHODS": "_methods",
    "RULES": "_contributions",
    "Attribution": "result",
    "Benchmark": "_benchmark",
    "Case": "_benchmark",
    "Contributions": "_contributions",
    "Faithfulness": "_faithfulness",
    "LogitParts": "residuals",
    "PairPath": "_pair",
    "Randomisation": "_sanity",
    "ResidualParts": "residuals",
    "UnifiedAttention": "_unified",
    "attribute": "_methods",
    "compare": "_benchmark",
    "contributions": "_contributions",
    "decompose": "_decompose",
    "faithfulness": "_faithfulness",
    "feature_ablation": "_occlusion",
    "gradient_shap": "gradients",
    "gradient_x_input": "gradients",
    "hidden_row": "_rollout",
    "infidelity": "_sanity",
    "integrated_gradients": "gradients",
    "mamba_attribution": "_rollout",
    "occlusion": "_occlusion",
    "pair_path": "_pair",
    "randomisation": "_sanity",
    "relevance": "_relevance",
    "residual_parts": "residuals",
    "rollout": "_rollout",
    "sensitivity": "_sanity",
    "smoothgrad": "gradients",
    "unified": "_unified",
}

__all__ = [
    "METHODS",
    "RULES",
    "Attribution",
    "Benchmark",
    "Case",
    "Contributions",
    "Faithfulness",
    "LogitParts",
    "PairPath",
    "Randomisation",
    "ResidualParts",
    "UnifiedAttention",
    "attribute",
    "compare",
    "contributions",
    "decompose",
    "faithfulness",
    "feature_ablation",
    "gradient_shap",
    "gradient_x_input",
    "hidden_row",
    "infidelity",
    "integrated_gradients",
    "mamba_attribution",
    "occlusion",
    "pair_path",
    "randomisation",
    "relevance",
    "residual_parts",
    "rollout",
    "sensitivity",
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
