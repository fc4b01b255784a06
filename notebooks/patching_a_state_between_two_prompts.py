# %% [markdown]
# # Patching a state between two prompts
#
# All that a state space model knows of the text so far is its state: for each layer the recurrent state, and the last
# inputs of the short convolution. So take the state out of a run that was told one price, put it into a run that was
# told another, and see which one is answered.

# %%
# %matplotlib inline
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import ssmlens
from ssmlens.interventions import StateEdit, patch, steer
from ssmlens.plotting import palette
from ssmlens.zoo.questions import questions

lens = ssmlens.load("mamba2-english", dtype=torch.float64)
question = questions("mamba2-english", 4)[3]
TOLD, LAST = question.source[0], question.source[-2]
value = lens.tokenizer.decode(question.ids[TOLD : LAST + 1]).strip()
OTHER = "842"
ours = lens.tokenizer.decode(question.ids)
theirs = ours.replace(value, OTHER)
print(theirs)

# %% [markdown]
# Both texts differ in the told price alone, and have their tokens in the same places. What does each answer?


# %%
def say(text: str, edits: list[StateEdit]) -> str:
    """The next three tokens, greedily, with the state edited."""
    return steer(lens, text, edits, new_tokens=3).text[0].strip()


untouched = [StateEdit(0, -1, scale=1.0)]
a, b = lens.trace(ours).check(), lens.trace(theirs).check()
differ = [t for t, (x, y) in enumerate(zip(a.tokens[0], b.tokens[0], strict=True)) if x != y]
said_ours, said_theirs = say(ours, untouched), say(theirs, untouched)
print(f"told {value}: {said_ours!r};  told {OTHER}: {said_theirs!r};  tokens that differ: {differ}")

# %% [markdown]
# ## One state at a time
#
# Run the second text, and put in what one layer of the first run handed on after one token: its recurrent state
# (`state`) or the inputs that its convolution carries on (`conv`). 0: the answer stays; 1: the whole difference
# between the two answers' logits has come along.

# %%
firsts = (int(a.logits[0, -1].argmax()), int(b.logits[0, -1].argmax()))
LAYERS = range(len(lens.layers))
STEPS = [*range(TOLD, LAST + 4), *range(LAST + 6, len(question.ids) - 1, 8)]
recovered = {}
for kind in ("state", "conv"):
    sites = [(kind, layer, step) for layer in LAYERS for step in STEPS]
    got = patch(lens, ours, theirs, sites, "logit_difference", target=firsts, read="next")
    recovered[kind] = got.recovered[:, 0].reshape(len(LAYERS), len(STEPS))

colours = ListedColormap(palette.diverging())
figure = Figure(figsize=(8.4, 4.6), layout="constrained")
for axes, (kind, grid) in zip(figure.subplots(2, 1, sharex=True), recovered.items(), strict=True):
    image = axes.imshow(grid.numpy(), cmap=colours, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(f"{kind}: share of the answer that comes along", fontsize=9)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_yticks(LAYERS)
    axes.tick_params(labelsize=7)
axes.set_xticks(range(len(STEPS)), [f"{t} {a.tokens[0][t].strip()}" for t in STEPS], rotation=90)
figure.colorbar(image, ax=figure.axes, fraction=0.03)
figure

# %% [markdown]
# Which single state carries most of it, long after the price was told, and how much can any convolution carry by then?

# %%
far = [i for i, step in enumerate(STEPS) if step > LAST + 4]
best = int(recovered["state"][:, far].mean(1).argmax())
print(f"layer {best}'s state alone: {float(recovered['state'][best, far].mean()):.0%} on average over those steps")
print(f"any single layer's convolution: at most {float(recovered['conv'][:, far].abs().max()):.1%}")

# %% [markdown]
# ## All layers at once
#
# A site with a wide enough window patches every layer. Recurrent state alone, convolution alone, and both
# (`full_state`):

# %%
WIDE = 2 * len(lens.layers)
alone = {}
for kind in ("state", "conv", "full_state"):
    sites = [(kind, 0, step) for step in STEPS]
    got = patch(lens, ours, theirs, sites, "logit_difference", target=firsts, window=WIDE, read="next")
    alone[kind] = got.recovered[:, 0]

figure = Figure(figsize=(7.4, 3.0), layout="constrained")
axes = figure.add_subplot()
for kind, share in alone.items():
    axes.plot(STEPS, share.tolist(), marker="o", markersize=3, label=kind)
axes.axvspan(TOLD - 0.5, LAST + 0.5, color="0.9", label="the price is told")
axes.set_xlabel("token after which the state is exchanged")
axes.set_ylabel("share recovered")
axes.legend(fontsize=8)
figure

# %%
pd.DataFrame({k: x.numpy() for k, x in alone.items()}, index=pd.Index(STEPS, name="step")).describe().loc[
    ["min", "max"]
].round(4)

# %% [markdown]
# From the last token of the price on, `full_state` is a complete handover: the second run goes on exactly as the
# first one did, in every later logit, not only in its answer. The largest difference, next to that between the
# untouched runs:


# %%
def gap(logits: torch.Tensor) -> torch.Tensor:
    """Largest difference from the first run's logits behind the price."""
    return (logits - a.logits)[:, LAST + 1 :].abs().amax((1, 2))


handed = patch(lens, ours, theirs, [("full_state", 0, LAST)], gap, window=WIDE, read="next")
print(f"after the handover: {float(handed.value):.1e}; without it: {float(handed.corrupt):.1f}")

# %% [markdown]
# ## The model goes on from there
#
# `steer` edits the recurrent state and lets the model continue by itself. Exchange the state of all layers after the
# last token of the second text, and nothing else; its convolution and all its tokens still say the other price.


# %%
def mixed(share: float) -> list[StateEdit]:
    """After the last token: the second run's states, moved this share of the way to the first run's."""
    last = [len(question.ids) - 1]
    edits = []
    for layer in LAYERS:
        mine, other = (x[layer].recurrence.states(last)[:, 0] for x in (a, b))
        edits.append(StateEdit(layer, -1, set=torch.lerp(other, mine, share)))
    return edits


said = say(theirs, mixed(1.0))
print(f"the text tells {OTHER}, the state was told {value}, the model says {said!r}")

# %% [markdown]
# Between the two states the logits move step by step; the answer turns where they cross:

# %%
SPLIT = 6
shares = [i / SPLIT for i in range(SPLIT + 1)]
difference = []
for share in shares:
    logits = steer(lens, theirs, mixed(share)).logits[0, -1]
    difference.append(float(logits[firsts[0]] - logits[firsts[1]]))

figure = Figure(figsize=(6.4, 2.8), layout="constrained")
axes = figure.add_subplot()
axes.plot(shares, difference, marker="o")
axes.axhline(0, color="0.5", linewidth=0.8)
axes.set_xlabel(f"share of the state that was told {value}")
axes.set_ylabel(f"logit of {value} less {OTHER}", fontsize=8)
figure

# %%
turn = next(share for share, x in zip(shares, difference, strict=True) if x > 0)
print(f"the answer turns between {turn - 1 / SPLIT:.2f} and {turn:.2f} of the way")

# %% [markdown]
# A patch that repairs the answer says that this place carries enough, not that nothing else does: several of the states
# above may each be enough by themselves, and `docs/interventions.md` says what else the method does not show.
