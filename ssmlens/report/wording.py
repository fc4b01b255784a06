"""What the report says beside its figures: what each one means, and what it does not."""

TEXT = (
    "Each token s is shaded by the implicit attention M[t, s] of the framed token t: how much of what s wrote into "
    "the state still reaches the output at t, through the recurrence alone. <b class=pos>Orange</b> adds what s "
    "wrote, <b class=neg>blue</b> (dashed underline) subtracts it. Choose any token to make it the reader. "
    "For all layers together, each layer's row is divided by its largest magnitude before the mean is taken.",
    "M is signed and unnormalised: not a probability, not a share, and not the cause of the prediction. It leaves "
    "out the skip, the gate, the norm, the output projection and the residual stream around them. The short "
    "convolution before the scan has already mixed the last few tokens into s, so a read often lands just after the "
    "token that matters. A mean over heads lets opposite signs cancel; the norm does not.",
)

EXPLAINED = (
    "With the norms, the gates, the slopes of the activations and the scan's decays, writes and reads held at their "
    "values on this text, the network is linear in its embeddings, so the logit is a sum of one term per token and "
    "one for the additive weights, without remainder (<code>ssmlens.attribution.decompose</code>). "
    "<b class=pos>Orange</b> raises the logit, <b class=neg>blue</b> (dashed underline) lowers it.",
    "It says how this logit is put together on the paths that the text has opened, not what another text would give: "
    "opening a path, by a gate or by the choice of what to keep, is credited to nobody. What a token causes is for an "
    "intervention to show.",
)

MAP = (
    "Row t reads, column s was written. The diagonal is the token reading itself; a strong column is a token that "
    "many later ones still read; a narrow band along the diagonal is a layer that forgets at once. For every head "
    "y = M x + D x, up to rounding, and this y was compared with the model's own.",
    "Colours are per map: compare patterns between layers, not brightness. Reduced over heads, the map does not "
    "say which head reads, and for other inputs the same layer has another map: M is computed from the text.",
)

HALF_LIFE = (
    "One dot per head: after how many tokens half of a write has decayed, at the mean log-decay of this text, in the "
    "slowest of the head's states. Heads above the dashed line outlast the text: at that rate a write loses less than "
    "half from its start to its end. The bar spans the middle 80 % of heads, the tick is the median; the table adds "
    "the median over all states, and how far back the last token reads (mean distance, weighted by magnitude, mean "
    "over heads).",
    "Decay is not the whole of memory: a slow head may have nothing written into it, or never be read, and a fast one "
    "may be written again and again. The half-life depends on the text, because the model chooses its decay per "
    "token.",
)

NORMS = (
    "Length of each layer's whole state vector h[t] after token t. A curve that levels off has found a balance "
    "between writing and forgetting; one that still climbs at the end of the text has not, and on longer texts may "
    "leave the range seen in training.",
    "A large norm is not much information: what counts is what can be read back. Layers have different units, so "
    "the height of one curve over another means nothing; its shape does.",
)

ERROR = (
    "Each mixer was rebuilt from the recurrence shown here and the model's weights, and compared with the model's own "
    "scan and mixer output: largest difference over largest value. Above the tolerance the figures would "
    "describe something other than the model.",
    "A small error says that the recurrence is the model's. It does not say that a way of reading it, such as a mean "
    "over heads, is the right one for your question.",
)

PREDICTIONS = "What the model expects after the last token."
