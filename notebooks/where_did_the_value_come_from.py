# %% [markdown]
# # Where did the value come from?
#
# `mamba1-recall` reads pairs of a key and a value, and later answers with the value when a key comes again. The right
# answer is known, so is the place it was told. Do implicit attention, decomposition and knockout all point there?

# %%
# %matplotlib inline
import torch

import ssmlens
from ssmlens.analyses import memory
from ssmlens.attribution import decompose
from ssmlens.interventions import knockout
from ssmlens.plotting import Caption, attention_map, attribution, token_row

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
answer_id = int(trace.logits[0, -1].argmax())
answer = lens.tokenizer.decode([answer_id])
answer

# %% [markdown]
# ## Where one head reads
#
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
figure

# %% [markdown]
# One head and the sign matter: a common summary, the mean over all heads of the size of M, has its largest weight on
# the asking token itself.

# %%
blurred = trace[LAYER].recurrence.attention.reduce("mean_abs")[0, -1]
int(blurred.argmax()), len(tokens) - 1

# %% [markdown]
# ## What the logit is made of
#
# No head has to be chosen: `decompose` follows the answer's logit back through both layers to the tokens. Norms,
# routing and gates are held where this prompt put them, and the terms add up to the logit.

# %%
found = decompose(lens, text)
top = int(found.scores[0].argmax())
share = float(found.scores[0, top] / found.logit[0])
print(f"token {top}, {tokens[top]!r}: {share:.0%} of the logit; error of the sum {found.completeness_error[0]:.0e}")

# %%
figure = attribution(found, answer, most=6)
figure

# %% [markdown]
# ## What happens without it
#
# Knock the tokens out, one by one. Scan and convolution are both blocked and the decay is skipped, so that a blocked
# token plays no part in any later one. What is left of the answer's probability?

# %%
chance = trace.logits[0, -1].softmax(-1)[answer_id]
left = torch.stack(
    [
        knockout(lens, text, source, slice(source + 1, None), decay="skip")[0, -1].softmax(-1)[answer_id]
        for source in range(len(tokens) - 1)
    ]
)
needed = [k for k, p in enumerate(left.tolist()) if p < 0.5]
print(f"with every token: {float(chance):.4f}")
for k in needed:
    print(f"without token {k:2d} {tokens[k]!r}: {float(left[k]):.4f}")

# %%
lost = torch.cat([chance - left, chance.new_zeros(1)])
spaced = [f"{token} " for token in tokens]
figure = token_row(lost, spaced, Caption(lens.name, reduction="probability lost"), title=f"What {answer!r} needs")
figure

# %% [markdown]
# The value itself is needed, and so is whatever the list above has beside it: the key, which says under what the
# value is filed, and the token behind, into which the convolution carries both. A decomposition credits those two
# with little: they open the path, the value flows through it.

# %%
{tokens[k]: round(float(found.scores[0, k] / found.logit[0]), 3) for k in needed}

# %% [markdown]
# ## How long is it kept?
#
# How long the state dimensions of each layer hold what they were told, in tokens. Decay is not the whole of memory: a
# slow one may never be read.

# %%
half_lives = memory.half_life(trace).table()
half_lives.groupby("layer")["half_life"].describe()[["count", "min", "50%", "max"]].round(1)
