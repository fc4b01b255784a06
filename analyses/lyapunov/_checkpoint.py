"""A long run's tensors on the disk, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmlens.analyses import _result_io as io
from ssmlens.errors import SsmlensError, brief

__all__ = ["Checkpoint", "digest"]

FORMAT = "ssmlens orbit 1"


def digest(x: Tensor) -> str:
    """Sixteen hexadecimal digits of a tensor's shape, dtype and numbers."""
    data = f"{tuple(x.shape)} {x.dtype}".encode() + x.detach().cpu().double().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


class Checkpoint:
    """The file of one run; false without a path.

    Args:
        path: where it lies; None keeps nothing.
        settings: what the run depends on. A file of another run is refused, not continued.
        start: the state that the run starts from.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], start: Tensor) -> None:
        self.path = None if path is None else Path(path)
        self.settings = io.encode(io.plain({**settings, "start": digest(start)}))
        if self.path is not None and not self.path.absolute().parent.is_dir():
            raise SsmlensError(f"the folder {self.path.parent} does not exist: create it first")

    def __bool__(self) -> bool:
        return self.path is not None

    def restore(self, take: Callable[[dict[str, Tensor]], None]) -> None:
        """Hand over what the file holds, if there is one.

        Raises:
            SsmlensError: when it is no such file, or that of another run.
        """
        if self.path is None or not self.path.exists() or not self.path.stat().st_size:
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                found = json.loads(about.get("settings", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise SsmlensError(f"{self.path} does not hold a run that can go on: {brief(error)}") from error
        if about.get("format") != FORMAT:
            raise SsmlensError(f"{self.path} does not hold a run that can go on: choose another file")
        differing = sorted(k for k in {*found, *self.settings} if found.get(k) != self.settings.get(k))
        if differing:
            raise SsmlensError(
                f"{self.path} holds a run with other settings ({', '.join(differing)}): choose another file"
            )
        take(tensors)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Exchange the file for one with these tensors."""
        if self.path is None:
            return
        from safetensors.torch import save_file

        part = self.path.with_name(f".{self.path.name}.part")
        kept = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(kept, part, {"format": FORMAT, "settings": json.dumps(self.settings)})
        part.replace(self.path)
