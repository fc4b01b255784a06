"""Trains a shipped model: ``python -m ssmlens.zoo.train NAME --text DIR``.

NAME is one of the recipes. The English models read a text directory, or a pack made from one; the recall
models generate their data. ``--minutes`` and ``--steps`` bound a run, whichever comes first: the learning
rate follows a cosine over the share of the budget that is spent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from .corpus import synthetic_text
from .data import Pack, build
from .english import STAGES, train_english
from .model_card import write_card
from .ngram import baseline
from .recall import train_recall
from .recipes import RECIPES, Recipe, recipe
from .scans import KINDS

__all__ = ["main"]

SMOKE_VOCABULARY = 320


def _pack(options: argparse.Namespace) -> Pack:
    """The packed text that the options name; a tiny made-up one for a smoke run without any."""
    if options.pack:
        return Pack.load(options.pack)
    if options.text:
        return build(options.text)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            return build(synthetic_text(folder), SMOKE_VOCABULARY, key_value_tokens=2_000)
    raise ValueError("an English model needs --text DIR or --pack DIR")


def _english(plan: Recipe, options: argparse.Namespace, out: Path, device: torch.device) -> None:
    pack = _pack(options)
    start = Path(options.start) if options.start else None
    train_english(plan, pack, out, device, options.minutes, options.scan, options.stage, start)
    measured = Path(options.pack or "") / "baseline.json"
    if options.pack and measured.is_file():
        score = json.loads(measured.read_text(encoding="utf-8"))
    else:
        score = baseline(pack)
    (out / "baseline.json").write_text(json.dumps(score, indent=1) + "\n", encoding="utf-8")


def _recall(plan: Recipe, options: argparse.Namespace, out: Path, device: torch.device) -> None:
    small = {"pool": 16, "loads": ((32, 4),), "size": 20} if options.smoke else {}
    train_recall(plan, out, device, options.minutes, options.scan, options.jobs, **small)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ssmlens.zoo.train", description="Train a shipped model.")
    parser.add_argument("name", help=", ".join(RECIPES))
    parser.add_argument("--text", help="directory with narrative, facts and technical .txt[.xz]")
    parser.add_argument("--pack", help="folder written by python -m ssmlens.zoo.data, instead of --text")
    parser.add_argument("--out", help="folder to write (default: NAME in the current folder)")
    parser.add_argument("--stage", choices=STAGES, default="both", help="of an English model (default both)")
    parser.add_argument("--from", dest="start", metavar="FOLDER", help="trained model for --stage recall")
    parser.add_argument("--minutes", type=float, help="wall-clock limit of the training loops (of each rate)")
    parser.add_argument("--steps", type=int, help="most steps")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--device", help="a torch device (default: a GPU when there is one)")
    parser.add_argument("--scan", choices=KINDS, default="auto", help="implementation of the scans")
    parser.add_argument("--jobs", type=int, default=1, help="runs of a sweep at the same time")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model, on a made-up text")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        plan = recipe(options.name)
        plan = plan.smoke() if options.smoke else plan
        plan = replace(plan, seed=options.seed, steps=options.steps or plan.steps)
        plan = replace(plan, rates=tuple(options.rates) if options.rates else plan.rates)
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        out = Path(options.out or plan.name)
        torch.set_float32_matmul_precision("high")
        (_english if plan.task == "english" else _recall)(plan, options, out, device)
        write_card(out)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        print(error.args[0] if isinstance(error, KeyError) else error, file=sys.stderr)
        return 2
    print(f"{plan.name}: written to {out}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
