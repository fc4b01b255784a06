# %% [markdown]
# # Where did the value come from?
#
# `mamba2-recall` reads pairs of a key and a value, and later answers with the value when a key comes again. The right
# answer is known, so is the place it was told. Does the implicit attention point there?

# %%
import ssmlens
from ssmlens.analyses import memory
from ssmlens.plotting import Caption, attention_map

lens = ssmlens.load("mamba2-recall")
text = "c 7 a 19 k 3 r 24 m 0 . . a . k . . . c . m . r"
trace = lens.trace(text).check()
trace

# %% [markdown]
# The reconstruction error stands beside everything below: each mixer was rebuilt from its recurrence and its weights, and held
# against the model's own numbers.

# %%
trace.reconstruction_error

# %% [markdown]
# The model's answer after the last `r`:

# %%
answer = lens.tokenizer.decode([int(trace.logits[0, -1].argmax())])
answer

# %% [markdown]
# What the last token reads, layer by layer: the mean over heads of the size of M. The convolution reaches three tokens back, so
# what was told at `r 24` may be written into the state one or two tokens later.

# %%
strongest = {}
for mixer in trace:
    row = mixer.recurrence.attention.reduce("mean_abs")[0, -1]
    strongest[mixer.layer] = [trace.tokens[0][s] for s in row[:-1].topk(3).indices.tolist()]
strongest

# %%
figure = attention_map(
    trace[1].recurrence.attention.reduce("mean_abs")[0], trace.tokens[0], Caption.of(trace, 1, "mean_abs")
)

# %% [markdown]
# How long each head holds what it was told, in tokens. Decay is not the whole of memory: a slow head may never be read.

# %%
memory.half_life(trace).table()
