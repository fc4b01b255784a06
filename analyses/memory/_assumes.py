"""Sentences that the memory numbers rest on, and the closed forms that the tests hold them to."""

from __future__ import annotations

from ssmlens.analyses._layers import Layers

__all__ = [
    "CASCADE",
    "COLLAPSE_CONTESTED",
    "CONSTANT_DECAY",
    "CONSTANT_DRIVE",
    "ENERGY_SHARE",
    "FIDELITY_CONTESTED",
    "FROZEN",
    "GEOMETRIC_KERNEL",
    "KNOWN_COLLAPSE",
    "KNOWN_ONSET",
    "KNOWN_SATURATION",
    "LINEAR_PROBE",
    "NO_FORGETTING",
    "OBSERVED",
    "ONE_LEAKY_UNIT",
    "ONE_WRITE",
    "POWER",
    "PROJECTION",
    "READING",
    "STATIONARY",
    "TEACHER_FORCED",
    "TRUNCATED",
    "WINDOW",
    "assumes",
]

FROZEN = "The decays are those of this text: they depend on it wherever the model is selective."
TRUNCATED = "The text ends: a half-life that was not reached inside it counts as infinite."
OBSERVED = "The states are those of this text, whatever was in them before it included."
STATIONARY = "The decay outside the traced text has the same mean as inside it."
DELTA_RULE = "The delta rule also erases what it overwrites; this describes the decay alone, so real memory is shorter."
READING = (
    "Reading is counted by the size of M[t, s], whatever its sign and whatever value stands at s.",
    "What the convolution mixes into a position counts as that position.",
)

LINEAR_PROBE = (
    "The probe is linear and was fitted on the other tokens: what is there in another form, or in directions of small "
    "variance, counts as not there."
)
TEACHER_FORCED = "The model reads this text and does not continue it: the numbers are those of texts like it."

FIDELITY_CONTESTED = (
    "Fidelity that falls with age is a property of any decaying recurrence; the paper that proposed ETMF and ECLMF was "
    "rejected and has no code, and neither has been shown to follow what a model does on tasks."
)
COLLAPSE_CONTESTED = (
    "That states collapse because they are too large to need forgetting rests on few points; states never visited in "
    "training, the spectrum of A and a few unsaturated heads are rival accounts."
)

_TESTS = "tests/analyses/memory"
POWER = f"constant decay a: a^(t - s) ({_TESTS}/test_retention.py::test_constant_decay)"
CONSTANT_DECAY = f"constant decay: ln 2 / -log_decay ({_TESTS}/test_half_life.py::test_constant_decay)"
GEOMETRIC_KERNEL = f"kernel a^k: a / (1 - a) ({_TESTS}/test_mean_distance.py::test_geometric_kernel)"
CONSTANT_DRIVE = f"constant drive, decay a: (1 - a^t) / (1 - a) ({_TESTS}/test_state_norm.py::test_a_constant_drive)"
KNOWN_SATURATION = f"two decays at 2048 tokens ({_TESTS}/test_saturation.py::test_known_saturation)"
KNOWN_ONSET = f"four decays at 2048 tokens ({_TESTS}/test_saturation.py::test_known_onset)"

ONE_LEAKY_UNIT = f"one leaky unit, white input: (1 - a^2) a^(2k) ({_TESTS}/test_fidelity.py::test_one_leaky_unit)"
ONE_WRITE = f"one write in an empty state: a^k and cosine 1 ({_TESTS}/test_transport.py::test_one_write)"
PROJECTION = f"r of d equal components: r / d ({_TESTS}/test_cross_layer.py::test_a_projection_tells_its_share)"
WINDOW = f"a run that begins inside the text with nothing ({_TESTS}/test_mitigate.py::test_a_window_is_a_fresh_run)"
NO_FORGETTING = f"a window of w tokens: 0 for k >= w ({_TESTS}/test_remembrance.py::test_a_sliding_window_model)"
CASCADE = f"l one-pole layers: C(k+l-1, l-1) a^k, mean l a/(1-a) ({_TESTS}/test_influence.py::test_a_cascade_of_poles)"
KNOWN_COLLAPSE = f"losses and variances with a known onset ({_TESTS}/test_stream.py::test_a_known_onset)"
ENERGY_SHARE = f"one leaky unit: (1 - a^2) a^(2k) predicted and measured ({_TESTS}/test_age.py::test_one_leaky_unit)"


def assumes(layers: Layers, *sentences: str) -> tuple[str, ...]:
    return (*sentences, DELTA_RULE) if layers.has_erase else sentences
