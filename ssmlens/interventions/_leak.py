"""How much of a token's influence a knockout lets through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssmlens.errors import PromptError, SsmlensError
from ssmlens.interventions._knockout import knockout
from ssmlens.interventions._positions import one_position
from ssmlens.lens import Lens
from ssmlens.prompt import prepare

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SETTINGS", "knockout_leak"]

SETTINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("ssm",), "keep"),
    (("ssm",), "skip"),
    (("conv",), "keep"),
    (("ssm", "conv"), "keep"),
    (("ssm", "conv"), "skip"),
)
"""The paths one by one and together, and what skipping the decay adds."""


def knockout_leak(
    lens: Lens,
    prompt: str | Sequence[int] | Tensor,
    sources: int | Sequence[int],
    replacement: int | None = None,
    layers: Any = None,
) -> pd.DataFrame:
    """What is left of a token's influence on all later logits when it is knocked out, for every kind of knockout.

    The token is exchanged for another, with and without the knockout. A knockout that blocks what it names leaves the
    later logits as they are.

    Args:
        lens: the model.
        prompt: one text or one list of ids.
        sources: one position, or several that are measured one by one.
        replacement: id of the token that is put in its place; by default the last token of the prompt that differs.
        layers: as in `knockout`; all by default.

    Returns:
        One line per source and setting: source, paths, decay, and ``leak``, the root mean square of the later logits'
        change with the knockout over that without. 0 blocks all, 1 blocks nothing.

    Raises:
        SsmlensError: when a source is the last token or its replacement the same token.
    """
    import pandas as pd

    batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
    if len(batch.ids) != 1:
        raise PromptError(f"the leak is measured on one prompt, got {len(batch.ids)}")
    ids: list[int] = batch.ids[0].tolist()
    lines = []
    for given in [sources] if isinstance(sources, int) else sources:
        source = one_position(given, len(ids), "sources")
        other = replacement if replacement is not None else next((i for i in ids[::-1] if i != ids[source]), None)
        if source == len(ids) - 1 or other is None or other == ids[source]:
            raise SsmlensError(f"source {source} has no later token or no other token to put in its place")
        pair = (ids, [*ids[:source], other, *ids[source + 1 :]])
        free = _change(source, *(lens.trace(x, layers=[]).logits for x in pair))
        for paths, decay in SETTINGS:
            blocked = (knockout(lens, x, source, slice(source + 1, None), layers, paths, decay) for x in pair)
            lines.append(
                {"source": source, "paths": "+".join(paths), "decay": decay, "leak": _change(source, *blocked) / free}
            )
    return pd.DataFrame(lines)


def _change(source: int, one: Tensor, two: Tensor) -> float:
    return float((one - two)[:, source + 1 :].double().pow(2).mean().sqrt())
