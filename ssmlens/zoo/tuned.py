"""Trains the tuned lens of a shipped English model: ``python -m ssmlens.zoo.tuned NAME --pack DIR``.

DIR is the folder that ``python -m ssmlens.zoo.data`` wrote. The translators go into the model's folder, the held-out
numbers into its training.json, and the card is rendered again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.loading import load

from . import names, path
from .data import Pack
from .english import Sampler
from .folder import write_json
from .loop import environment
from .model_card import write_card

__all__ = ["FILE", "held_out_windows", "train_tuned"]

FILE = "tuned_lens.safetensors"
RANK = 64
STEPS = 500
ROWS = 4
LENGTH = 128
RATE = 1e-2
SEED = 0
STORED = torch.float16


def held_out_windows(pack: Pack, count: int = 96, length: int = LENGTH) -> Tensor:
    """(count, length) ids spread evenly over every held-out document's text, groups in turn."""
    groups: dict[str, list[Tensor]] = {}
    for document in pack.held_out:
        ids = torch.from_numpy(document.ids.astype("int64"))
        groups.setdefault(document.group, []).extend(ids[: len(ids) // length * length].split(length))
    each = max(1, count // len(groups))
    chosen = []
    for cut in groups.values():
        cut = [w for w in cut if len(w) == length]
        step = max(1, len(cut) // each)
        chosen += cut[::step][:each]
    return torch.stack(chosen)


@torch.no_grad()
def _held_out(lens: Any, windows: Tensor, translators: Any) -> dict[str, list[float]]:
    """Mean KL(final || lens) in nats of every layer, for both lenses."""
    from ssmlens.interventions import logit_lens, tuned_lens

    sums: dict[str, Tensor] = {}
    layers = range(len(lens.layers))
    for rows in windows.split(8):
        trace = lens.trace(rows, layers=())
        for name, reading in (
            ("logit_lens", logit_lens(trace, layers)),
            ("tuned_lens", tuned_lens(trace, translators, layers)),
        ):
            sums[name] = sums.get(name, torch.zeros(len(layers))) + reading.mean_kl.cpu() * len(rows)
    return {name: [round(float(x), 4) for x in total / len(windows)] for name, total in sums.items()}


def train_tuned(
    name: str, pack: Pack, steps: int = STEPS, folder: Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Train, store and measure the translators of a model.

    Args:
        name: a shipped model.
        pack: the packed text that it was trained on.
        steps: of the optimiser.
        folder: where the file, training.json and the card are; the model's own folder by default.
        device: where it is trained and measured.

    Returns:
        what goes into training.json under "tuned_lens": settings, seconds, and held-out KL per layer in nats of the
        stored maps (``tuned_lens``) and without any (``logit_lens``).
    """
    from ssmlens.interventions import Translators, train_translators

    folder = folder or path(name)
    lens = load(name, device=device)
    sampler = Sampler(pack, torch.device("cpu"), LENGTH - 1, SEED)
    start = time.monotonic()
    found = train_translators(
        lens, sampler.draw(min(steps * ROWS, 4000)), rank=RANK, steps=steps, rows=ROWS, rate=RATE, watched=16, seed=SEED
    )
    seconds = round(time.monotonic() - start, 1)
    found.save(folder / FILE, STORED)
    windows = held_out_windows(pack)
    result = {
        **found.settings,
        "seconds": seconds,
        "environment": environment(torch.device(device)),
        "dtype": str(STORED).removeprefix("torch."),
        "held_out_tokens": windows.numel(),
        **_held_out(lens, windows, Translators.load(folder / FILE)),
    }
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    write_json(folder / "training.json", {**log, "tuned_lens": result})
    write_card(folder)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ssmlens.zoo.tuned", description="Train a model's tuned lens.")
    parser.add_argument("name", choices=[n for n in names() if n.endswith("-english")])
    parser.add_argument("--pack", required=True, help="folder that python -m ssmlens.zoo.data wrote")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the optimiser")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(train_tuned(options.name, Pack.load(options.pack), options.steps, device=options.device)))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
