"""The sentences beside the figures: what each one means, and what it does not."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ERROR", "HALF_LIFE", "MAP", "ROW", "SIGNED", "STATE_NORM", "VIEWS", "Explanation", "sentence"]


@dataclass(frozen=True)
class Explanation:
    """Two short texts, shown beside a figure."""

    means: str
    does_not: str


VIEWS = {
    "head": "one head",
    "mean": "mean over heads",
    "mean_abs": "mean magnitude",
    "max_abs": "largest magnitude",
    "norm": "norm over heads",
}
"""What the map can show, by the name that the library gives the reduction."""

MAP = Explanation(
    means=(
        "Row t shows with which factor the values written at each earlier token enter this layer's scan output at "
        "token t: what is left of them in the state after decay, as far as token t reads it."
    ),
    does_not=(
        "It is not a probability: rows do not sum to 1. It covers the state only; the short convolution before the "
        "scan, the gate after it and the skip around it are not in the map. A large entry does not prove that the "
        "model's prediction depends on it."
    ),
)

SIGNED = {True: "Orange adds, blue subtracts.", False: "Magnitudes only: what adds looks like what subtracts."}
"""Added to what the map means, by whether it keeps signs."""

ROW = Explanation(
    means="The map's row of the chosen token: what this one token reads from itself and from each token before it.",
    does_not=(
        "Tokens without shade are not unknown to the model: other heads, other layers or the convolution may carry "
        "them."
    ),
)

HALF_LIFE = Explanation(
    means=(
        "How many tokens pass until decay has halved what a head holds, at this text's mean decay. Each dot is one "
        "head; where a head has several states, it is its slowest one. Long half-lives keep, short ones forget."
    ),
    does_not=(
        "It says how long something is kept, not what was written or whether it is ever read. A text with other "
        "tokens gives other half-lives, because the decay depends on the input."
    ),
)

STATE_NORM = Explanation(
    means=(
        "The size of the hidden state after each token. Growth means that more is written than decays; a plateau "
        "means that the two balance."
    ),
    does_not=(
        "A large state is not a full memory, and sizes of different layers cannot be compared: each layer reads "
        "its state with weights of its own scale."
    ),
)

ERROR = (
    "Every mixer is rebuilt from the recurrence shown here and compared with the model's own output for this text. "
    "The number is the largest relative difference. It says that the figures describe what the model computed; it "
    "says nothing about what the model should compute."
)


def sentence(error: Exception) -> str:
    """An error as a sentence: first letter large, closed by a full stop."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
