"""`Attribution`: how much each token of a prompt adds to one logit, with the error of the sum beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssmlens.errors import SsmlensError, brief

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Attribution", "completeness"]

FORMAT = "ssmlens.attribution/1"
TENSORS = ("scores", "bias", "target", "logit", "completeness_error", "position")
WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""Numbers that strict JSON lacks, as the words they are written with."""


def completeness(scores: Tensor, bias: Tensor, logit: Tensor) -> Tensor:
    """|sum of the scores + bias - logit| / |logit|, (b,), added up in float64.

    Args:
        scores: (b, s), 0 at padding.
        bias: (b,) share of the logit that no token owns.
        logit: (b,) what they should add up to.
    """
    gap = (scores.double().sum(1) + bias.double() - logit.double()).abs()
    return gap / logit.double().abs().clamp(min=1e-12)


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of tokens for one logit per prompt.

    Args:
        scores: (b, s) in units of the logit unless the method says otherwise; exactly 0 at padding and after the
            position that is explained.
        bias: (b,) share of the logit that no token owns: additive weights, or the baseline's logit. 0 where the method
            has none.
        target: (b,) token id whose logit is explained.
        logit: (b,) that logit.
        completeness_error: (b,) |sum of scores + bias - logit| / |logit|; NaN where the method makes no promise about
            the sum.
        tokens: the text of each token, one list per prompt, padding left out.
        method: name of the function that made it.
        position: (b,) index of the token at which the logit is read.
        settings: model, dtype, device and the method's options.
        ids: (b, s) token ids, 0 at padding; None where they are not known.
    """

    scores: Float[Tensor, "b s"]
    bias: Float[Tensor, " b"]
    target: Int[Tensor, " b"]
    logit: Float[Tensor, " b"]
    completeness_error: Float[Tensor, " b"]
    tokens: list[list[str]]
    method: str
    position: Int[Tensor, " b"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: Int[Tensor, "b s"] | None = None

    def __post_init__(self) -> None:
        b = len(self.tokens)
        if self.scores.ndim != 2 or len(self.scores) != b or self.scores.shape[1] < max(map(len, self.tokens)):
            raise ValueError(
                f"scores are (b={b}, s), s at least the longest prompt's length, got {tuple(self.scores.shape)}"
            )
        for name in ("bias", "target", "logit", "completeness_error", "position"):
            if tuple(getattr(self, name).shape) != (b,):
                raise ValueError(f"{name} is (b={b},), got {tuple(getattr(self, name).shape)}")
        if self.ids is not None and self.ids.shape != self.scores.shape:
            raise ValueError(f"ids are {tuple(self.scores.shape)} like the scores, got {tuple(self.ids.shape)}")

    def table(self) -> pd.DataFrame:
        """One row per real token: prompt, position, token, score, share of the logit. One more per prompt, with
        position -1 and no token, for a bias that is not 0."""
        import pandas as pd

        rows = []
        for i, tokens in enumerate(self.tokens):
            logit, bias = float(self.logit[i]), float(self.bias[i])
            found: list[tuple[int, str | None, float]] = [
                (k, token, float(self.scores[i, k])) for k, token in enumerate(tokens)
            ]
            found += [(-1, None, bias)] if bias else []
            rows += [(i, k, token, x, x / logit if logit else math.nan) for k, token, x in found]
        return pd.DataFrame(rows, columns=["prompt", "position", "token", "score", "share"])

    def strongest(self, row: int = 0) -> int:
        """Position of the token with the largest score of a prompt; a negative score is never the strongest."""
        return int(self.scores[row, : len(self.tokens[row])].argmax())

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file, dtypes kept, or strict ``.json``. No pickle.

        Raises:
            ValueError: for another ending.
        """
        path = Path(path)
        header = {"format": FORMAT, "tokens": self.tokens, "method": self.method, "settings": _plain(self.settings)}
        present = {name: getattr(self, name) for name in (*TENSORS, "ids") if getattr(self, name) is not None}
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in present.items()}
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, path, metadata={"ssmlens": json.dumps(header, allow_nan=False)})
        elif path.suffix == ".json":
            values = {name: _plain(x) for name, x in tensors.items()}
            dtype = str(self.scores.dtype).removeprefix("torch.")
            path.write_text(json.dumps({**header, "dtype": dtype, **values}, allow_nan=False) + "\n", encoding="utf-8")
        else:
            raise SsmlensError(f"an attribution is saved as .safetensors or .json, got {path.name!r}")

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read what `save` wrote.

        Raises:
            ValueError: when the file is missing, damaged or holds no attribution.
        """
        path = Path(path)
        try:
            header, tensors = _read_json(path) if path.suffix == ".json" else _read_safetensors(path)
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}")
            found: dict[str, Any] = {
                f.name: (tensors if f.name in TENSORS else header)[f.name] for f in fields(cls) if f.name != "ids"
            }
            found["ids"] = tensors.get("ids")
            return cls(**found)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise SsmlensError(f"{path.name} does not hold an attribution: {brief(error)}") from error

    def __repr__(self) -> str:
        b, s = self.scores.shape
        known = self.completeness_error[~self.completeness_error.isnan()]
        error = f"completeness error <= {float(known.max()):.1e}" if len(known) else "no promise about the sum"
        return f"Attribution({self.method}, {b} x {s} tokens, {error})"


def _plain(x: Any) -> Any:
    """``x`` as strict JSON knows it."""
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple | range):
        return [_plain(v) for v in x]
    if isinstance(x, Tensor):
        return _plain(x.tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"
    return x if x is None or isinstance(x, bool | int | float | str) else str(x).removeprefix("torch.")


def _numbers(x: Any) -> Any:
    """Nested lists with the words of `_plain` turned back into floats."""
    return [_numbers(v) for v in x] if isinstance(x, list) else WORDS[x] if isinstance(x, str) else x


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(path.read_text(encoding="utf-8"))
    dtype = getattr(torch, header["dtype"])
    kinds = {"target": torch.long, "position": torch.long, "ids": torch.long, "completeness_error": torch.float64}
    present = [name for name in (*TENSORS, "ids") if name in header or name != "ids"]
    return header, {name: torch.tensor(_numbers(header[name]), dtype=kinds.get(name, dtype)) for name in present}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ssmlens"])
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
