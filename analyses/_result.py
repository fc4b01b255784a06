"""What every study returns: the numbers, and everything a reader needs to doubt them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmlens.analyses import _result_io as io

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Result"]

SUFFIXES = (".json", ".csv", ".parquet", ".safetensors")
"""File types that `Result.save` writes."""

LOADABLE = (".json", ".safetensors")
"""File types that hold the whole result, so that `Result.load` can read them back."""


@dataclass(frozen=True, eq=False)
class Result:
    """A measured quantity with its axes, units, settings, control value and assumptions.

    Args:
        name: what was measured, in snake case; the column of the value in `table`.
        value: the numbers, in float64; one axis for each entry of ``dims``.
        dims: names of the axes, such as ("layer", "batch", "head").
        units: unit of the value, such as "tokens"; "1" when it has none.
        coords: labels along each axis, numbers or words; 0, 1, 2... for an axis that is not given. A name that is
            no axis and holds one label says what the whole result belongs to, such as {"layer": 3}.
        columns: companion quantities by name, each of a shape that broadcasts to ``value``.
        control: values to compare with, by name: what the quantity would be without the effect, or the horizon
            beyond which it is extrapolated. Same shapes as ``columns``.
        settings: how it was computed and from what; plain numbers, words, lists and dicts.
        assumes: sentences that have to hold for the number to mean what its name says.
        checked_by: the closed form that the tests hold this quantity to, and the test that does it.

    Raises:
        ValueError: when axes, labels and shapes do not fit together.
    """

    name: str
    value: Tensor
    dims: tuple[str, ...]
    units: str
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    assumes: tuple[str, ...] = ()
    checked_by: str = ""

    def __post_init__(self) -> None:
        value = torch.as_tensor(self.value).detach().to("cpu", torch.float64)
        if value.ndim != len(self.dims):
            raise ValueError(f"value has shape {tuple(value.shape)} but the axes are {', '.join(self.dims) or 'none'}")
        given = {k: list(v) for k, v in self.coords.items()}
        for dim, size in zip(self.dims, value.shape):
            if len(given.setdefault(dim, list(range(size)))) != size:
                raise ValueError(f"axis {dim} has {size} entries but {len(given[dim])} labels")
        for name in given.keys() - set(self.dims):
            if len(given[name]) != 1:
                raise ValueError(f"{name} is no axis of {', '.join(self.dims)}, so it takes one label")
        extra: dict[str, dict[str, Tensor]] = {"columns": {}, "control": {}}
        for kind, taken in extra.items():
            for name, x in getattr(self, kind).items():
                taken[name] = torch.as_tensor(x).detach().to("cpu", torch.float64)
                if not io.broadcasts(taken[name].shape, value.shape):
                    raise ValueError(
                        f"{name} is {tuple(taken[name].shape)}, which does not broadcast to value {tuple(value.shape)}"
                    )
        frozen = dict(value=value, dims=tuple(self.dims), coords=given, settings=io.plain(dict(self.settings)), **extra)
        for name, x in frozen.items():
            object.__setattr__(self, name, x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.value.shape)

    def __float__(self) -> float:
        """The number of a result that holds exactly one."""
        if self.value.numel() != 1:
            raise TypeError(f"{self.name} holds {self.value.numel()} numbers, not one: take them from value")
        return float(self.value)

    def table(self) -> pd.DataFrame:
        """One row per entry: the labels of its axes, the value under the result's name, companions and controls.

        ``attrs`` of the frame holds units, settings, assumptions and the check; parquet files keep it.
        """
        import numpy as np
        import pandas as pd

        labels = {k: v[0] for k, v in self.coords.items() if k not in self.dims}
        axes = [np.arange(n) for n in self.shape]
        grid = np.meshgrid(*axes, indexing="ij") if axes else []
        for dim, index in zip(self.dims, grid):
            labels[dim] = np.asarray(self.coords[dim])[index.ravel()]
        numbers = {self.name: self.value, **self.columns, **self.control}
        flat = {k: torch.broadcast_to(x, self.shape).reshape(-1).numpy() for k, x in numbers.items()}
        frame = pd.DataFrame({**labels, **flat}, index=range(self.value.numel()))
        frame.attrs.update(self.metadata())
        return frame

    def to_xarray(self) -> xr.DataArray:
        """The value with its axes named and labelled; companions and controls are coordinates beside it."""
        import xarray as xr

        coords: dict[str, Any] = {k: v if k in self.dims else v[0] for k, v in self.coords.items()}
        for name, x in {**self.columns, **self.control}.items():
            coords[name] = (self.dims, torch.broadcast_to(x, self.shape).numpy())
        attrs = {"units": self.units, "checked_by": self.checked_by, "assumes": list(self.assumes)}
        attrs["settings"] = json.dumps(io.encode(self.settings))
        return xr.DataArray(self.value.numpy(), coords=coords, dims=self.dims, name=self.name, attrs=attrs)

    def metadata(self) -> dict[str, Any]:
        """Everything but the numbers, as plain values that JSON can hold."""
        words = {"name": self.name, "units": self.units, "dims": list(self.dims), "settings": self.settings}
        return io.encode(
            {**words, "assumes": list(self.assumes), "control": sorted(self.control), "checked_by": self.checked_by}
        )

    def to_json(self) -> str:
        """The whole result as strict JSON; infinities and NaN become the words "inf", "-inf" and "nan"."""
        return io.to_json(self)

    def save(self, path: str | Path) -> Path:
        """Write the result; the suffix of ``path`` chooses the form. Returns the path.

        .json and .safetensors hold everything, and `load` reads them. .parquet and .csv hold `table`; parquet with
        units, settings and assumptions in its metadata.

        Raises:
            ValueError: for any other suffix.
            FileNotFoundError: when the folder does not exist.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"cannot save to {path.name!r}: choose a name that ends in {', '.join(SUFFIXES)}")
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder {path.parent} does not exist: create it first")
        io.WRITERS[path.suffix](self, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a result that `save` wrote as .json or .safetensors.

        Raises:
            ValueError: for another suffix, or a file that does not hold a result.
            FileNotFoundError: when there is no such file.
        """
        path = Path(path)
        if path.suffix not in LOADABLE:
            raise ValueError(f"cannot load {path.name!r}: only {' and '.join(LOADABLE)} hold a whole result")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return cls(**io.read(path))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{d}={n}" for d, n in zip(self.dims, self.shape)) or "one number"
        where = "".join(f", {k} {v[0]}" for k, v in self.coords.items() if k not in self.dims)
        lines = [f"Result {self.name} [{self.units}] ({sizes}{where})", f"  {io.describe(self.value)}"]
        for kind in ("columns", "control"):
            lines += [f"  {kind}: {', '.join(getattr(self, kind))}"] if getattr(self, kind) else []
        lines += [f"  assumes: {sentence}" for sentence in self.assumes]
        return "\n".join(lines + ([f"  checked by: {self.checked_by}"] if self.checked_by else []))
