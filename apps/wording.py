"""The sentences beside the figures: what each one means, and what it does not."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ATTRIBUTION",
    "COURSE",
    "ERROR",
    "FOLLOW",
    "HALF_LIFE",
    "HOME",
    "LENS",
    "MAP",
    "PAIR",
    "ROW",
    "SIGNED",
    "STATE_NORM",
    "TUNED",
    "VIEWS",
    "WHERE",
    "Explanation",
    "sentence",
]


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

PAIR = Explanation(
    means=(
        "The source's contribution is the vector that it adds to this layer's output at the target, with the "
        "convolution, gate and projection in it. Its share is its part of the output along the output; the shares of "
        "all tokens and of the biases sum to 100 %. Each dot is one head: how much of what the source wrote is left "
        "after the decay between, and with which factor the target reads it."
    ),
    does_not=(
        "It is one layer's view with gate, decay and norm held as they are on this text. Whether the prediction would "
        "change without the source is asked by taking it away, not by reading. A share above 100 % or below 0 is no "
        "error: other tokens take it back."
    ),
)

LENS = Explanation(
    means=(
        "The stream that enters each layer, put through the model's final norm and unembedding as if no layer "
        "followed: which next token it already names, and how surely. The last line is the model's own prediction."
    ),
    does_not=(
        "Early layers need not speak the last layer's language, and where embeddings are shared with the "
        "unembedding, they mostly name the current token. That a layer names a token does not mean that later layers "
        "use it."
    ),
)

TUNED = Explanation(
    means=(
        "As the logit lens, after a trained affine map per layer that translates the stream into the last layer's "
        "language: what a linear reader can already tell of the final prediction."
    ),
    does_not=(
        "The maps were trained to predict the model's output, so that they may read what the model itself does not use."
    ),
)

FOLLOW = Explanation(
    means="The likeliest tokens of the final prediction at the target position, followed through the layers.",
    does_not="A rise at one layer says where a token becomes readable, not where it was computed.",
)

ATTRIBUTION = Explanation(
    means=(
        "How the logit of one next token is shared out over the tokens of the text. With methods whose scores sum, the "
        "steps of the waterfall lead from 0 to the logit, and the error of the sum stands below."
    ),
    does_not=(
        "Methods ask different questions and disagree; none of them says what would happen on another text. What was "
        "only needed to open a gate or to set a step size may get no score."
    ),
)

WHERE = Explanation(
    means=(
        "The logit is shared out exactly over the tokens of the text and the model's biases, with every gate, decay "
        "and norm held as it is on this text. Orange adds, blue subtracts and is underlined; the solid frame is where "
        "the prediction is read, the dashed one the largest part."
    ),
    does_not=(
        "The parts say how the number is put together, not what another text would give. Taking a token out changes "
        "gates and decays as well, which is why both are shown. Tokens that only asked the question may hold little."
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

COURSE = Explanation(
    means=(
        "What each token does to the state: how much of the state before it survives its decay, how much it writes, "
        "and how large the state is afterwards. A dip of what is kept is a token that makes the model forget."
    ),
    does_not=(
        "Sizes say nothing about content: what is written may point along what is there or against it, and a small "
        "write may matter most. All heads together hides heads that forget behind heads that keep."
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

HOME = (
    "A state space model reads a text token by token and keeps a state of fixed size. These pages show what it keeps, "
    "what it reads back and where its answers come from, and say beside each figure how exact it is. Model and text "
    "are chosen at the left and stay the same on every page."
)

ERROR = Explanation(
    means=(
        "Every layer is rebuilt from the recurrence that these pages show and compared with the model's own output for "
        "this text: each dot is the largest relative difference. Below the tolerance, the figures describe what the "
        "model computed."
    ),
    does_not=(
        "It says nothing about what the model should compute, nor whether a figure answers your question. Differences "
        "of this size are those of rounding; float64 makes them smaller."
    ),
)


def sentence(error: Exception) -> str:
    """An error as a sentence: first letter large, closed by a full stop."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
