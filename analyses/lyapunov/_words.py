"""What each level says, and what it does not."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["READING", "Reading"]


@dataclass(frozen=True)
class Reading:
    """One level in words.

    Args:
        question: what the level asks.
        says: what its number implies.
        silent: what it does not imply, however often that is read into it.
    """

    question: str
    says: str
    silent: str


READING: dict[str, Reading] = {
    "latent": Reading(
        question="With its gates frozen, how fast does each state forget?",
        says="an exponent of -0.01 per token is a state that keeps 1/e of a write for 100 tokens",
        silent="stability of the model: it is at most 0 for every recurrence with decays at most 1, trained or not, "
        "and holds neither the layers' effect on each other nor feedback nor rounding",
    ),
    "stack": Reading(
        question="With its text given, do small perturbations of the whole state die?",
        says="negative: two runs that read the same text forget a small difference of their states",
        silent="anything new in the limit: layers only act upwards, so that it tends to the latent exponents; nor how "
        "large a perturbation becomes first, nor what happens once the model reads its own output",
    ),
    "gain": Reading(
        question="How large can a perturbation become before it dies?",
        says="a gain of 100 is a direction in which an error is 100 times larger some tokens later, though every "
        "exponent is negative",
        silent="that such a direction is met: random perturbations and rounding mostly miss it; the number "
        "depends on the units of the state",
    ),
    "closed": Reading(
        question="Fed with its own expectation, does the model forget a small perturbation?",
        says="positive: generation of this smooth kind is sensitive to its past, and nearby runs part exponentially; "
        "negative: they merge",
        silent="how drawn or greedy text behaves, where the output is rounded to a token at every step",
    ),
    "divergence": Reading(
        question="Do two generations that share all chance draw the same tokens after a small disturbance?",
        says="the share of pairs that part, and how fast the next-token laws drift before",
        silent="an exponent: a disturbance that moves no token dies as with a given text, and one that does leaves two "
        "different texts",
    ),
}
"""By level: what it asks, says and does not say."""
