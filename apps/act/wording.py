"""The sentences beside the figures of the group Act."""

from __future__ import annotations

from ssmlens.apps.wording import Explanation

__all__ = ["BESIDE", "CONTINUED", "KNOCKOUT", "LEAK", "NEXT", "PATCH", "PINNED", "STEER"]

KNOCKOUT = Explanation(
    means=(
        "How far the next-token distribution after each token moves when the rows that were chosen cannot read the "
        "dashed tokens: KL(free || blocked) in nats. Rows before the first blocked one are the model's own."
    ),
    does_not=(
        "Blocking one path alone blocks little: what the scan cannot carry the convolution does. The table of leaks "
        "below says how much of a token's influence is left for this token and these layers."
    ),
)

NEXT = Explanation(
    means="The likeliest next tokens of either run, after the target token: untouched, and with the intervention.",
    does_not=(
        "A large change shows that the prediction depends on what was changed, here and on this text; not that the "
        "model stored the answer there, nor that nothing else carries it."
    ),
)

LEAK = Explanation(
    means=(
        "The first source is exchanged for another token, with and without each kind of knockout: the root mean square "
        "change of all later logits, blocked over free. 0 blocks everything, 1 blocks nothing."
    ),
    does_not=(
        "It is measured with one replacement token and all later rows, whatever rows are chosen above. Above 1 the "
        "knockout makes the model depend on the token more."
    ),
)

PATCH = Explanation(
    means=(
        "The corrupt text is run once for each cell, with the clean run's activation put in at that layer and token. "
        "Recovered is the share of the metric's distance between both runs that this brings back: 1 repairs all."
    ),
    does_not=(
        "A cell that repairs the run carries enough; several may, and the answer need not be computed there. Below 0 "
        "the clean activation makes it worse. Empty cells were not run."
    ),
)

PINNED = Explanation(
    means="One layer of the map along the text. A click on a token pins it; the numbers above are those of its cell.",
    does_not="Tokens without colour were not patched, which is not the same as having no effect.",
)

STEER = Explanation(
    means=(
        "The state of one layer is changed after the chosen token and the recurrence carries it on: KL(free || edited) "
        "of the next-token distribution after every token of the text."
    ),
    does_not=(
        "A state that no text would lead to may give predictions that no text would, so that an effect says what the "
        "model reads from this state, not what it uses the state for."
    ),
)

CONTINUED = Explanation(
    means="What the model writes after the text by itself, taking the likeliest token each time, free and edited.",
    does_not="One changed token changes all after it: a different ending is no measure of how large the edit was.",
)

BESIDE = {
    "map": Explanation(
        means=(
            "What each token reads through the scan of one layer, in both runs and in the same colours; the difference "
            "has its own. In the changed run this is what was really read: nothing of a blocked token, and nothing of "
            "what stood in a state that was replaced."
        ),
        does_not=(
            "What an edit or a patch puts into a state comes from no token of this text and has no column. Layers "
            "behind the change differ because their inputs do, which does not make them the place of the effect."
        ),
    ),
    "states": Explanation(
        means="Euclidean norm of the state that each token reads in one layer, all heads together, in both runs.",
        does_not="States of the same size may hold something else: a norm says how much is kept, not what.",
    ),
    "lens": Explanation(
        means=(
            "How likely the stream entering each layer already makes the followed token, through the final norm and "
            "the unembedding (logit lens); the last entry is the model's own prediction."
        ),
        does_not=(
            "Early layers are read in the last layer's basis. Where the curves part, the change has reached what this "
            "lens can read, which may be later than where it acts."
        ),
    ),
    "attribution": Explanation(
        means=(
            "Gradient of the followed token's logit times each token's embedding: by how much the logit moves, to "
            "first order, when that embedding is scaled up."
        ),
        does_not=(
            "Behind normalised layers these parts nearly cancel and do not add up to the logit. Activations that were "
            "put in count as constants, so that nothing is attributed through them."
        ),
    ),
}
