"""Tasks whose right answer is known: generators that give the same batch on any machine, with oracles and baselines.

Token tasks (no tokenizer needed) are frozen dataclasses: ``MQAR(length=64, pairs=8).batch(100, seed=0)`` is a `Batch`
of ``ids`` (b, t), ``targets`` (b, t; -100 where nothing is asked) and ``mask``. The target stands at the position
whose output has to name it. ``oracle`` finds the answers from the inputs, ``baselines`` has what predictors without
the memory reach, in closed form, ``guess`` is each of them, ``score`` the share of right answers.

Text tasks give prompts and answers; forecasting tasks give float64 series and score the error over the variance.
``make(name, ...)`` builds any of them by name, ``names()`` lists them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ssmlens.errors import SsmlensError

from ._base import IGNORE, Batch, Task, TokenTask
from ._copying import Copy, Induction, SelectiveCopy, copy_bound
from ._needles import Needles, Passkey
from ._outliers import Outliers
from ._recall import MQAR, PhonebookTokens
from ._ruler import FrequentWord, Variables
from ._series import NARMA, Forecast, Lorenz, MackeyGlass, forecast
from ._text import NeedleText, PasskeyText, PhonebookText, TextBatch, TextTask, edit_distance
from ._tracking import GroupWord, Newlines, Parity, group_table

__all__ = [
    "IGNORE", "MQAR", "NARMA", "Batch", "Copy", "Forecast", "FrequentWord", "GroupWord", "Induction", "Lorenz",
    "MackeyGlass", "NeedleText", "Needles", "Newlines", "Outliers", "Parity", "Passkey", "PasskeyText",
    "PhonebookText", "PhonebookTokens", "SelectiveCopy", "Task", "TextBatch", "TextTask", "TokenTask", "Variables",
    "copy", "copy_bound", "edit_distance", "forecast", "group_table", "group_word", "induction", "make", "mqar",
    "names", "newlines", "niah", "parity", "passkey", "phonebook", "selective_copy",
]  # fmt: skip

_TASKS: dict[str, type[Task] | type[TextTask]] = {
    task.name: task
    for task in (
        MQAR, PhonebookTokens, Passkey, Needles, Variables, FrequentWord, Copy, SelectiveCopy, Induction, Parity,
        GroupWord, Newlines, Outliers, Lorenz, MackeyGlass, NARMA, PasskeyText, NeedleText, PhonebookText,
    )
}  # fmt: skip

# Short names for the same.
mqar, copy, selective_copy, induction = MQAR, Copy, SelectiveCopy, Induction
parity, group_word, newlines = Parity, GroupWord, Newlines
passkey, niah, phonebook = Passkey, Needles, PhonebookTokens


def names() -> list[str]:
    """The names that `make` knows."""
    return list(_TASKS)


def make(name: str, **settings: Any) -> Task | TextTask:
    """A task by name.

    Args:
        name: one of `names`.
        settings: of that task.

    Raises:
        SsmlensError: for another name, or settings that do not fit together.
    """
    if name not in _TASKS:
        raise SsmlensError(f"no task {name!r}: they are {', '.join(_TASKS)}")
    try:
        return _TASKS[name](**settings)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(_TASKS[name]))  # type: ignore[arg-type]
        raise SsmlensError(f"{name} takes the settings {known}, got {', '.join(settings)}") from error
