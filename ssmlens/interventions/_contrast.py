"""What an intervention did to the next-token distributions: one run beside another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Contrast", "contrast"]


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two runs over the same positions.

    Args:
        kl: (b, t) KL(before || after) of the next-token distributions in nats, float64, at least 0.
        before, after: (b, t, v) logits of both runs.
    """

    kl: Tensor
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)

    def table(
        self, position: int = -1, most: int = 8, decode: Callable[[Sequence[int]], str] | None = None, row: int = 0
    ) -> pd.DataFrame:
        """The likeliest next tokens of either run, likeliest before first.

        Args:
            position: after which token.
            most: how many of each run.
            decode: ids to text; without it tokens are shown by id.
            row: which prompt.

        Returns:
            One line per token: id, token, ``before`` and ``after`` (probabilities) and ``change``.
        """
        import pandas as pd

        laws = [x[row, position].double().softmax(-1).cpu() for x in (self.before, self.after)]
        ids = sorted({i for law in laws for i in law.topk(min(most, law.numel())).indices.tolist()})
        lines = []
        for i in ids:
            text = f"<{i}>"
            if decode is not None:
                # Padding rows of the vocabulary have no text.
                with contextlib.suppress(OverflowError, IndexError, TypeError, ValueError):
                    text = str(decode([i]))
            before, after = (float(law[i]) for law in laws)
            lines.append({"id": i, "token": text, "before": before, "after": after, "change": after - before})
        return pd.DataFrame(lines).sort_values("before", ascending=False, ignore_index=True)


def contrast(before: Tensor, after: Tensor) -> Contrast:
    """Hold the logits of two runs against each other.

    Args:
        before, after: (b, t, v) logits.

    Raises:
        SsmlensError: when their shapes differ.
    """
    if before.shape != after.shape or before.ndim != 3:
        raise SsmlensError(
            f"two runs have logits (b, t, v) of one shape, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    one, two = (x.detach().double().log_softmax(-1) for x in (before, after))
    # Rounding may leave a divergence of 0 just below 0.
    return Contrast((one.exp() * (one - two)).sum(-1).clamp_min(0).cpu(), before, after)
