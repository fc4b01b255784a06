# %% [markdown]
# # Where did the value come from?
#
# `mamba1-recall` reads pairs of a key and a value, and later answers with the value when a key comes again. The right
# answer is known, so is the place it was told. Does the implicit attention point there?

# %%
# ruff: noqa: B018 -- a cell ends with what it shows
import ssmlens
from ssmlens.analyses import memory
from ssmlens.plotting import Caption, attention_map

lens = ssmlens.load("mamba1-recall")
text = "t 23 b 25 n 11 o 2 t . o . b . n"
trace = lens.trace(text).check()
trace

# %% [markdown]
# The reconstruction error stands beside everything below: each mixer was rebuilt from its recurrence and its weights,
# and held against the model's own numbers.

# %%
trace.reconstruction_error

# %% [markdown]
# The model's answer after the last `n`:

# %%
answer = lens.tokenizer.decode([int(trace.logits[0, -1].argmax())])
answer

# %% [markdown]
# What an asked key reads: a row of M in layer 1, of one head of those that the model's card names. The convolution lets
# the token after a value see both key and value, so a pair is written there: the row of `n` should be largest at the
# `o` behind `n 11`. The first token is left out, since no value has been told by then. Here are the two tokens before
# the strongest source of each asked key:

# %%
LAYER, HEAD = 1, 91
tokens = trace.tokens[0]
attention = trace[LAYER].recurrence.attention.dense(HEAD)[0, 0]
strongest = {}
for asked in range(8, len(tokens), 2):
    source = int(attention[asked, 1 : asked + 1].argmax()) + 1
    strongest[tokens[asked]] = tokens[source - 2 : source]
strongest

# %%
figure = attention_map(attention, tokens, Caption.of(trace, LAYER, f"head {HEAD}"))

# %% [markdown]
# One head and the sign matter: a common summary, the mean over all heads of the size of M, has its largest weight on
# the asking token itself.

# %%
blurred = trace[LAYER].recurrence.attention.reduce("mean_abs")[0, -1]
int(blurred.argmax()), len(tokens) - 1

# %% [markdown]
# How long each head holds what it was told, in tokens. Decay is not the whole of memory: a slow head may never be read.

# %%
memory.half_life(trace).table()
