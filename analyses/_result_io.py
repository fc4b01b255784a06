"""Results to files and back: strict JSON, CSV, parquet and safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result

WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""Numbers that strict JSON lacks, as the words they are written with."""

KEY = "ssmlens.result"
"""Where a safetensors file holds what is not a tensor."""


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape fills one of another without enlarging it."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to)))


def plain(x: Any) -> Any:
    """``x`` with tensors, dtypes, paths and tuples turned into what JSON knows."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple | set | frozenset | range):
        return [plain(v) for v in x]
    if isinstance(x, Tensor | np.ndarray | np.generic):
        return plain(x.tolist())
    return x if x is None or isinstance(x, bool | int | float | str) else str(x).removeprefix("torch.")


def encode(x: Any) -> Any:
    """``plain(x)`` with infinities and NaN written as words."""
    x = plain(x)
    if isinstance(x, dict):
        return {k: encode(v) for k, v in x.items()}
    if isinstance(x, list):
        return [encode(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"
    return x


def decode(x: Any) -> Any:
    """Nested lists and dicts of numbers with the words of `encode` turned back into floats."""
    if isinstance(x, dict):
        return {k: decode(v) for k, v in x.items()}
    return [decode(v) for v in x] if isinstance(x, list) else WORDS.get(x, x) if isinstance(x, str) else x


def to_json(result: Result) -> str:
    fields = {k: getattr(result, k) for k in ("name", "units", "dims", "coords", "settings", "assumes", "checked_by")}
    numbers = {k: getattr(result, k) for k in ("value", "columns", "control")}
    return json.dumps(encode({**fields, **numbers}), allow_nan=False)


def read(path: Path) -> dict[str, Any]:
    """The arguments of the result that a file holds."""
    try:
        fields = _read_json(path) if path.suffix == ".json" else _read_safetensors(path)
        return {**fields, "dims": tuple(fields["dims"]), "assumes": tuple(fields["assumes"])}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path.name} does not hold a result: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["value"] = torch.tensor(decode(fields["value"]), dtype=torch.float64)
    for kind in ("columns", "control"):
        fields[kind] = {k: torch.tensor(decode(x), dtype=torch.float64) for k, x in fields[kind].items()}
    return fields


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            fields = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    fields["value"] = tensors["value"]
    for kind in ("columns", "control"):
        fields[kind] = {name: tensors[f"{kind}.{name}"] for name in fields[kind]}
    return fields


def _write_json(result: Result, path: Path) -> None:
    path.write_text(to_json(result) + "\n", encoding="utf-8")


def _write_csv(result: Result, path: Path) -> None:
    result.table().to_csv(path, index=False)


def _write_parquet(result: Result, path: Path) -> None:
    result.table().to_parquet(path, index=False)


def _write_safetensors(result: Result, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"value": result.value}
    for kind in ("columns", "control"):
        tensors |= {f"{kind}.{name}": x for name, x in getattr(result, kind).items()}
    fields = {k: getattr(result, k) for k in ("name", "units", "dims", "coords", "settings", "assumes", "checked_by")}
    names = {kind: list(getattr(result, kind)) for kind in ("columns", "control")}
    # Clones: safetensors refuses tensors that share memory, as broadcast companions may.
    tensors = {k: x.clone(memory_format=torch.contiguous_format) for k, x in tensors.items()}
    save_file(tensors, path, metadata={KEY: json.dumps(encode({**fields, **names}), allow_nan=False)})


WRITERS: dict[str, Callable[[Result, Path], None]] = {
    ".json": _write_json,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".safetensors": _write_safetensors,
}


def describe(value: Tensor) -> str:
    """One line about a tensor: the number itself, or its range, median, and how many are infinite or NaN."""
    flat = value.reshape(-1)
    known = flat[~flat.isnan()].sort().values
    if known.numel() == 0:
        return "all NaN" if flat.numel() else "empty"
    if flat.numel() == 1:
        return f"{flat.item():.6g}"
    median = known[(known.numel() - 1) // 2].item()
    line = f"min {known[0].item():.4g}, median {median:.4g}, max {known[-1].item():.4g}"
    for what, count in (("infinite", int(flat.isinf().sum())), ("NaN", int(flat.isnan().sum()))):
        line += f", {count} of {flat.numel()} {what}" if count else ""
    return line
