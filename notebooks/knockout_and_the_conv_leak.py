# %% [markdown]
# # Knockout, and the leak through the convolution
#
# A knockout asks: what would the model say if later tokens could not read this one? The knockout of the literature
# drops what the token wrote into the state. In Mamba a short convolution stands before the scan, and carries every
# token into the next few, which write it again. How much gets through, and what does it take to block a token for
# good?

# %%
# %matplotlib inline
import pandas as pd
import torch
from matplotlib.figure import Figure

import ssmlens
from ssmlens.interventions import knockout, knockout_leak
from ssmlens.zoo.questions import questions

lens = ssmlens.load("mamba1-recall", dtype=torch.float64)
VALUE = 1


def prompt(value: int) -> str:
    """The text, with this value told for the key r."""
    return f"r {value} a 19 m 3 b 12 . . r"


told = lens.trace(prompt(7)).check()
tokens = told.tokens[0]


def answer(logits: torch.Tensor) -> str:
    """The next token after the prompt."""
    return lens.tokenizer.decode([int(logits[0, -1].argmax())]).strip()


print(prompt(7), "->", answer(told.logits))

# %% [markdown]
# ## Blocked, and it still answers
#
# No later token may read the value from the state, in any layer. That is the usual knockout:

# %%
later = slice(VALUE + 1, None)
blocked = knockout(lens, prompt(7), VALUE, later, paths="ssm", decay="keep")
print("scan blocked:", answer(blocked))

# %% [markdown]
# Cut the convolution's taps from that token instead, and leave the scan alone:

# %%
blocked_conv = knockout(lens, prompt(7), VALUE, later, paths="conv")
print("convolution blocked:", answer(blocked_conv))

# %% [markdown]
# ## All values, all kinds of knockout
#
# A token that is really blocked has no influence: whichever value stands there, the later logits are the same. So tell
# each of the 26 values in turn, with the same knockout. How many are still answered (an answer that is always the same
# is right once), and by how much does the largest later logit change?

# %%
SETTINGS = {
    "nothing": None,
    "scan": ("ssm", "keep"),
    "scan, decay skipped": ("ssm", "skip"),
    "convolution": ("conv", "keep"),
    "scan + convolution": (("ssm", "conv"), "keep"),
    "scan + convolution, decay skipped": (("ssm", "conv"), "skip"),
}


def run(value: int, setting: tuple | None) -> torch.Tensor:
    """Logits (1, t, v) with the value blocked."""
    if setting is None:
        return lens.trace(prompt(value), layers=[]).logits
    paths, decay = setting
    return knockout(lens, prompt(value), VALUE, later, paths=paths, decay=decay)


lines, by_token = [], {}
for name, setting in SETTINGS.items():
    logits = [run(value, setting) for value in range(26)]
    right = sum(answer(x) == str(value) for value, x in enumerate(logits))
    spread = torch.stack([(x - logits[0])[0, later].abs().amax(-1) for x in logits]).amax(0)
    by_token[name] = spread
    lines.append({"blocked": name, "answered as told": right, "largest change": float(spread.max())})
table = pd.DataFrame(lines).set_index("blocked")
table

# %% [markdown]
# The last line is the promise of `knockout`: both paths, decay skipped, every layer and every later token, and the
# change is not small, it is zero, to the last bit of float64.

# %%
exact = all(torch.equal(logits[value][0, later], logits[0][0, later]) for value in range(26))
exact

# %% [markdown]
# One line less, the scan and the convolution blocked but the decay kept, is not quite a knockout: the token still makes
# the state forget a little, by a step size that depends on the token.
#
# Here is the change at each later token. The scale is logarithmic above the dashed line and straight below, so that
# zero has a place.

# %%
figure = Figure(figsize=(7.4, 3.4), layout="constrained")
axes = figure.add_subplot()
places = range(VALUE + 1, len(tokens))
widths = dict(zip(SETTINGS, (7, 4, 1.5, 1.5, 1.5, 1.5), strict=True))  # three of the lines lie on one another
for name, spread in by_token.items():
    axes.plot(places, spread.tolist(), marker="o", markersize=3.5, linewidth=widths[name], label=name)
axes.set_yscale("symlog", linthresh=1e-4)
axes.axhline(1e-4, color="0.6", linewidth=0.7, linestyle="--")
axes.set_ylim(bottom=-2e-5)
axes.set_xticks(places, tokens[VALUE + 1 :])
axes.set_xlabel("token whose logits are read")
axes.set_ylabel("largest change of a logit")
axes.set_title("What the told value still changes when it is blocked", fontsize=10)
axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="blocked", title_fontsize=7)
figure

# %% [markdown]
# ## Where the leak goes
#
# If the convolution carries the value on, then it is the token behind the value that writes it into the state. So block
# the scan alone, once more, at each of the tokens in turn, and look at the probability of the right answer:

# %%
right_id = int(told.logits[0, -1].argmax())
chance = []
for source in range(len(tokens) - 1):
    logits = knockout(lens, prompt(7), source, slice(source + 1, None), paths="ssm")
    chance.append(float(logits[0, -1].softmax(-1)[right_id]))
pd.DataFrame({"token": tokens[:-1], "probability of 7 with its scan blocked": chance}).round(4)

# %%
writer = chance.index(min(chance))
print(f"the value {tokens[VALUE]!r} at {VALUE} is written by token {writer}, {tokens[writer]!r}")

# %% [markdown]
# ## The same in a language model
#
# `knockout_leak` does this for any prompt: it exchanges a token for another and says how much of its influence on all
# later logits is left under each knockout (1: all of it, 0: none). Here for the first token of a price that a text
# told, in the English model:

# %%
english = ssmlens.load("mamba2-english", dtype=torch.float64)
question = questions("mamba2-english", 4)[3]
source = question.source[0]
leak = knockout_leak(english, question.ids, source)
print(english.tokenizer.decode(question.ids[:source]), "|", english.tokenizer.decode([question.ids[source]]))
leak

# %% [markdown]
# So a knockout is worth as much as the paths it closes. Block both, and skip the decay where the claim is that a token
# plays no part. `docs/interventions.md` has the leak of all shipped models over several tokens.
