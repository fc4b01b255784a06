# %% [markdown]
# # Which tokens does this prediction rest on?
#
# One held-out prompt, one predicted token, and every method of `ssmlens.attribution.METHODS` asked the same question.
# The prompt tells prices and later asks for one of them, so the place where the right answer was told is known.

# %%
# %matplotlib inline
from collections import Counter

import pandas as pd

import ssmlens
from ssmlens.attribution import METHODS, Case, compare
from ssmlens.plotting import attribution, methods_side_by_side, scored_text
from ssmlens.zoo.questions import questions

lens = ssmlens.load("mamba2-english")
question = questions("mamba2-english", 4)[3]
print(lens.tokenizer.decode(question.ids))

# %% [markdown]
# The model's next token, the one that was told, and the tokens that tell it (with the one behind them, in which the
# convolution may write the value):

# %%
trace = lens.trace(question.ids).check()
tokens, told = trace.tokens[0], list(question.source)
answer = lens.tokenizer.decode([int(trace.logits[0, -1].argmax())])
right = lens.tokenizer.decode([question.target])
answer, right, [tokens[k] for k in told]

# %% [markdown]
# ## Every method, the same logit
#
# Each line is one method, divided by its own largest score, so that colours say which tokens stand out and nothing
# about how much. The dotted lines mark where the answer was told.

# %%
found = {name: method(lens, question.ids, question.target) for name, method in METHODS.items()}
figure = methods_side_by_side(found, source=told)
figure

# %% [markdown]
# The same in numbers. The last token asks and cannot be where the answer was told, so it takes no part in `strongest`
# and `rank of told`, the best place that one of the telling tokens has in the order of sizes. `sum / logit` should be 1
# where a method promises a sum; `error` is how far it is off. Both are empty where nothing is promised: scores of maps
# and rollouts are weights without a unit.


# %%
def line(name: str) -> dict[str, object]:
    """What one method says of the prompt."""
    result = found[name]
    scores = result.scores[0]
    sizes = scores[:-1].abs()
    order = sizes.argsort(descending=True, stable=True).tolist()
    promises = not bool(result.completeness_error.isnan())
    return {
        "method": name,
        "strongest": tokens[order[0]],
        "at": order[0],
        "rank of told": 1 + min(order.index(k) for k in told),
        "sum / logit": f"{float((scores.sum() + result.bias[0]) / result.logit[0]):.4f}" if promises else "",
        "error": f"{float(result.completeness_error[0]):.0e}" if promises else "",
    }


summary = pd.DataFrame([line(name) for name in METHODS]).set_index("method")
summary

# %% [markdown]
# ## What they agree on
#
# How many methods have a token among their five largest, the asking one left out:

# %%
among_five = Counter(k for each in found.values() for k in each.scores[0, :-1].abs().topk(5).indices.tolist())
for k, count in among_five.most_common(6):
    print(f"{count:2d} of {len(found)}  token {k:2d} {tokens[k]!r}{'  <- tells the answer' if k in told else ''}")

# %% [markdown]
# `occlusion_drop` is no theory of the model: it takes each token out and runs the model again. Rank correlation of the
# sizes with its own, for every other method (1: same order; 0: no relation):

# %%
sizes = pd.DataFrame({name: each.scores[0, :-1].abs().double().numpy() for name, each in found.items()})
agreement = sizes.corr("spearman")["occlusion_drop"].drop("occlusion_drop").sort_values(ascending=False)
agreement.round(2).to_frame("rank correlation with occlusion_drop")

# %% [markdown]
# ## How the logit is put together
#
# `decompose` holds norms, routing and gates where this prompt has put them. What is left is a sum, so it can be drawn
# as a staircase that ends at the logit.

# %%
exact = found["decompose"]
value, logit = float(exact.scores[0, told[0]]), float(exact.logit[0])
print(f"{tokens[told[0]]!r} where it was told adds {value:+.2f} to a logit of {logit:.2f}")
figure = attribution(exact, answer, most=8)
figure

# %%
figure = scored_text(exact, answer)
figure

# %% [markdown]
# ## Is it true?
#
# Tell another price in the same place. If the prediction rests on the told value, it has to follow.

# %%
said = lens.tokenizer.decode([question.ids[k] for k in told[:-1]]).strip()
changed = lens.tokenizer.decode(question.ids).replace(said, "842")
followed = lens.tokenizer.decode([int(lens.trace(changed, layers=[]).logits[0, -1].argmax())])
print(f"told {said}: next token {answer!r}; told 842: next token {followed!r}")

# %% [markdown]
# ## Which one to trust for what
#
# A row of a map does not know what is being explained. It says how strongly the last token reads from each other one,
# and says the same whatever is predicted. Ask both kinds about another token, the runner-up:

# %%
runner_up = int(trace.logits[0, -1].topk(2).indices[1])
knows_target = {}
for name in ("decompose", "relevance", "hidden", "unified", "contributions", "rollout_alti"):
    again = METHODS[name](lens, question.ids, runner_up)
    knows_target[name] = not bool((again.scores == found[name].scores).all())
knows_target

# %% [markdown]
# So: for *what this logit is made of*, a method that promises the sum and keeps it (the column `error` above); for
# *what happens without a token*, taking it out (`occlusion`), or a knockout; for *where a layer reads*, the maps.
#
# And one prompt proves nothing: here are six more questions of the same kind, scored by whether the largest score,
# whatever its sign, lies on the telling tokens. `random` and `recency` (the nearest token is the strongest) are the
# controls, and the interval is for as few prompts as these.

# %%
more = [each for each in questions("mamba2-english", 16) if each.kind == "recall" and each.ids != question.ids][:6]
cases = [Case(each.ids, each.target, each.source) for each in more]
few = compare(lens, cases, ["decompose", "relevance", "gradient_x_input", "contributions"], metrics=())
precision = few.table().query("metric == 'precision_at_1'").set_index("method")[["prompts", "mean", "low", "high"]]
precision.round(2)

# %% [markdown]
# The comparison over all held-out prompts, every method and every control, with its intervals, is that of
# `ssmlens faithfulness --model mamba2-english --methods all`. Its tables are in `docs/faithfulness.md`, and what each
# method measures, and what it does not, in `docs/attribution.md`. Trust those before any single picture.
