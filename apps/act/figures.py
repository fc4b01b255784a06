"""What the pages of the group Act have in common: a run beside another, as panels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmlens.apps import store
from ssmlens.apps.act import wording
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.wording import Explanation
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd

    from ssmlens.interventions import Contrast

__all__ = ["course", "following"]


def course(
    reading: store.Reading,
    found: Contrast,
    *,
    name: str,
    words: str,
    call: str,
    imports: tuple[str, ...],
    explanation: Explanation,
    more: dict[str, str],
) -> Shown:
    """What the intervention changes after every token; the page has drawn it as a strip."""
    caption = Caption.of(reading.trace)

    def table() -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(
            {"position": range(len(reading.tokens)), "token": reading.tokens, "kl": found.kl[0].numpy()}
        )

    code = f'{call}\ntable = pd.DataFrame({{"token": trace.tokens[0], "kl": found.kl[0].numpy()}})'
    return Shown(
        name=name,
        title=caption.title(f"{words}: change after every token"),
        caption=caption,
        code=snippet(reading, code, (*imports, "import pandas as pd")),
        table=table,
        explanation=explanation,
        draw=False,
        more=more,
    )


def following(
    reading: store.Reading,
    found: Contrast,
    target: int,
    *,
    name: str,
    words: str,
    runs: tuple[str, str],
    call: str,
    imports: tuple[str, ...],
    more: dict[str, str],
) -> Shown:
    """The distribution after one token in both runs."""
    caption = Caption.of(reading.trace)
    table = found.table(target, decode=store.decoder(reading.lens))
    note = f"KL({runs[0]} || {runs[1]}) = {float(found.kl[0, target]):.3g} nats"

    def live() -> object:
        from ssmlens.plotting import effect_pages

        return effect_pages.distributions(table, caption, name=words, runs=runs, note=note)

    def file() -> object:
        from ssmlens.plotting import effects

        return effects.distributions(table, caption, name=words, runs=runs, note=note)

    code = (
        f"{call}\ntable = found.table({target}, decode=lens.tokenizer.decode)\n"
        f"figure = effects.distributions(table, Caption.of(trace), name={words!r}, runs={runs!r})"
    )
    return Shown(
        name=name,
        title=caption.title(words),
        caption=caption,
        code=snippet(reading, code, (*imports, "from ssmlens.plotting import Caption, effects")),
        table=lambda: table,
        live=live,
        file=file,
        explanation=wording.NEXT,
        more={**more, "divergence": note},
    )
