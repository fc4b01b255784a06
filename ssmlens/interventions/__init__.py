"""Change something inside the model and see what follows.

`knockout` blocks tokens, `patch` carries activations from one run into another, `ablate` takes parts out, `steer`
edits the state, `logit_lens` and `tuned_lens` read the residual stream, `rome` edits a weight. An intervention that
touched nothing raises; none returns the clean run in silence, and all leave the model as they found it.
"""

from __future__ import annotations

from ssmlens.interventions._ablate import HOWS, PARTS, ablate
from ssmlens.interventions._knockout import DECAYS, PATHS, knockout
from ssmlens.interventions._metric import METRICS
from ssmlens.interventions._patch import READS, Noise, patch
from ssmlens.interventions._patching import Patching
from ssmlens.interventions._sites import KINDS, Site
from ssmlens.interventions._steer import METHODS, StateEdit, Steered, steer

__all__ = [
    "DECAYS", "HOWS", "KINDS", "METHODS", "METRICS", "PARTS", "PATHS", "READS", "Noise", "Patching", "Site",
    "StateEdit", "Steered", "ablate", "knockout", "patch", "steer",
]  # fmt: skip
