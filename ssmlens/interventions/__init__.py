"""Change something inside the model and see what follows.

`knockout` blocks tokens, `patch` carries activations from one run into another, `ablate` takes parts out, `steer`
edits the state, `observe` shows maps, states and attributions of such a run beside those of the model's own,
`logit_lens` and `tuned_lens` read the residual stream, `rome` edits a weight. An intervention that touched nothing
raises; none returns the clean run in silence, and all leave the model as they found it.
"""

from __future__ import annotations

from ssmlens.interventions._ablate import HOWS, PARTS, ablate
from ssmlens.interventions._contrast import Contrast, contrast
from ssmlens.interventions._knockout import DECAYS, PATHS, knockout
from ssmlens.interventions._leak import knockout_leak
from ssmlens.interventions._lenses import LensReading, logit_lens, tuned_lens
from ssmlens.interventions._metric import METRICS
from ssmlens.interventions._observe import Knockout, Observed, Patch, Sides, observe
from ssmlens.interventions._patch import READS, Noise, patch
from ssmlens.interventions._patching import Patching
from ssmlens.interventions._rome import RomeEdit, rome, second_moment
from ssmlens.interventions._sites import KINDS, Site
from ssmlens.interventions._steer import METHODS, StateEdit, Steered, steer
from ssmlens.interventions._train_lens import train_translators
from ssmlens.interventions._translators import Translators

__all__ = [
    "DECAYS", "HOWS", "KINDS", "METHODS", "METRICS", "PARTS", "PATHS", "READS", "Contrast", "Knockout", "LensReading",
    "Noise", "Observed", "Patch", "Patching", "RomeEdit", "Sides", "Site", "StateEdit", "Steered", "Translators",
    "ablate", "contrast", "knockout", "knockout_leak", "logit_lens", "observe", "patch", "rome", "second_moment",
    "steer", "train_translators", "tuned_lens",
]  # fmt: skip
