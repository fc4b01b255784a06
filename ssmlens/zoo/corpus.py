"""The training text: reading it, naming its documents, and the split that holds whole documents out.

A text directory holds ``narrative``, ``facts`` and ``technical`` as ``.txt`` or ``.txt.xz``. Three newlines
separate documents, two separate paragraphs. The facts part carries one long document of template
questions; it is sampled as a part of its own.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FILES", "WEIGHTS", "Document", "hold_out", "read_parts", "synthetic_text"]

FILES = ("narrative", "facts", "technical")

# Sampling weight of each part of the text; half of the facts are questions with answers.
WEIGHTS = {"narrative": 0.60, "facts": 0.125, "questions": 0.125, "technical": 0.15}

N_ADDRESSES = 10
N_COUNTRIES = 20


@dataclass(frozen=True)
class Document:
    """One held-out document: the group it is reported under, its title and its text."""

    group: str
    title: str
    text: str


def read_parts(directory: str | Path) -> dict[str, list[str]]:
    """The documents of each part of the text.

    Args:
        directory: holds ``narrative``, ``facts`` and ``technical``, each as .txt or .txt.xz (UTF-8).

    Returns:
        documents by part: narrative, facts, questions, technical, in the order of the files.

    Raises:
        FileNotFoundError: when one of the three files is missing.
    """
    parts: dict[str, list[str]] = {}
    for name in FILES:
        plain, packed = Path(directory) / f"{name}.txt", Path(directory) / f"{name}.txt.xz"
        if plain.is_file():
            text = plain.read_text(encoding="utf-8")
        elif packed.is_file():
            with lzma.open(packed, "rt", encoding="utf-8") as file:
                text = file.read()
        else:
            raise FileNotFoundError(f"{directory} has no {name}.txt or {name}.txt.xz")
        parts[name] = [document for document in text.split("\n\n\n") if document.strip()]
    parts["questions"] = [d for d in parts["facts"] if d.startswith("Question: ")]
    parts["facts"] = [d for d in parts["facts"] if not d.startswith("Question: ")]
    return {name: parts[name] for name in WEIGHTS}


def _evenly(indices: list[int], count: int, what: str) -> list[int]:
    """``count`` of the indices, evenly spaced, so that the choice spans the whole collection."""
    if len(indices) < count:
        raise ValueError(f"the text holds {len(indices)} {what}, {count} are held out")
    return [indices[(2 * i + 1) * len(indices) // (2 * count)] for i in range(count)]


def _one(documents: list[str], title: str, mark: str) -> int:
    """The one document whose first lines are a title and which mentions ``mark``."""
    found = [i for i, d in enumerate(documents) if d.lstrip()[:40].lower().startswith(title) and mark in d]
    if len(found) != 1:
        raise ValueError(f"the narrative text holds {len(found)} documents titled {title!r}, 1 is held out")
    return found[0]


def _addresses(documents: list[str]) -> list[int]:
    """The State of the Union addresses: the documents between Moby-Dick and the first play."""
    start = [i for i, d in enumerate(documents) if d.startswith("CHAPTER 1. Loomings")]
    stop = [i for i, d in enumerate(documents) if "by William Shakespeare" in d[:120]]
    if not start or not stop:
        raise ValueError("the narrative text lacks Moby-Dick or Shakespeare, which enclose the addresses")
    return list(range(start[0] + 1, stop[0]))


def hold_out(parts: dict[str, list[str]]) -> tuple[dict[str, list[str]], list[Document]]:
    """Take whole documents out of the training text: Persuasion, Macbeth, ten addresses, twenty countries.

    The addresses and countries are evenly spaced through their collections. The template questions about
    the twenty countries leave the training text as well, since they repeat what those documents say.

    Args:
        parts: documents by part, as :func:`read_parts` returns them.

    Returns:
        the remaining documents by part, and the held-out documents.

    Raises:
        ValueError: when a document to hold out is not found exactly as expected.
    """
    narrative, facts = parts["narrative"], parts["facts"]
    persuasion = _one(narrative, "persuasion", "Kellynch")
    macbeth = _one(narrative, "macbeth", "by William Shakespeare")
    addresses = _evenly(_addresses(narrative), N_ADDRESSES, "addresses")
    described = [i for i, d in enumerate(facts) if "\n\nBackground: " in d and "\n\nCapital name: " in d]
    countries = _evenly(described, N_COUNTRIES, "countries")
    names = [facts[i].split("\n", 1)[0] for i in countries]

    held = [
        Document("Persuasion", "Persuasion", narrative[persuasion]),
        Document("Macbeth", "Macbeth", narrative[macbeth]),
        *(Document("addresses", f"address {i}", narrative[i]) for i in addresses),
        *(Document("countries", name, facts[i]) for name, i in zip(names, countries)),
    ]
    endings = tuple(ending for name in names for ending in (f" {name}?", f" {name} called?"))
    gone = {persuasion, macbeth, *addresses}
    kept = dict(parts)
    kept["narrative"] = [d for i, d in enumerate(narrative) if i not in gone]
    kept["facts"] = [d for i, d in enumerate(facts) if i not in set(countries)]
    kept["questions"] = [
        "\n\n".join(line for line in d.split("\n\n") if not line.split(" Answer:")[0].endswith(endings))
        for d in parts["questions"]
    ]
    return kept, held


def synthetic_text(directory: str | Path, sentences: int = 12) -> Path:
    """Write a tiny text with the shape of the real one, for smoke runs and tests.

    Args:
        directory: is created and receives the three .txt files.
        sentences: sentences a document.

    Returns:
        the directory.
    """
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    who = ("The captain", "A sailor", "Her sister", "The king", "An old friend", "The doctor")
    does = ("walked to", "looked at", "spoke of", "came from", "returned to", "dreamt of")
    where = ("the window", "the harbour", "the house", "the garden", "the sea", "the road")

    def prose(seed: int) -> str:
        lines = [
            f"{who[(seed + i) % 6]} {does[(seed * 5 + i * i) % 6]} {where[(seed * 7 + 3 * i) % 6]}."
            for i in range(sentences)
        ]
        return "\n\n".join(" ".join(lines[i : i + 3]) for i in range(0, sentences, 3))

    play = "\n\nby William Shakespeare\n\n"
    narrative = [
        f"EMMA\n\nBy Jane Austen\n\n{prose(1)}",
        f"Persuasion\n\nby\n\nJane Austen\n\nSir Walter Elliot, of Kellynch Hall. {prose(2)}",
        f"CHAPTER 1. Loomings.\n\nCall me Ishmael. {prose(3)}",
        *(f"Fellow-Citizens of the Senate: {prose(4 + i)}" for i in range(N_ADDRESSES + 2)),
        *(f"{title}{play}{prose(30 + i)}" for i, title in enumerate(("HAMLET", "MACBETH", "OTHELLO"))),
    ]
    countries = [f"Land{chr(65 + i)}" for i in range(N_COUNTRIES + 2)]
    facts = [
        "\n\n".join(f"{w.split()[-1]} (n): {prose(i)}" for i, w in enumerate(who)),
        *(f"{c}\n\nBackground: {prose(i)}\n\nCapital name: {c}ville" for i, c in enumerate(countries)),
        "\n\n".join(
            [f"Question: What is the capital of {c}? Answer: {c}ville." for c in countries]
            + [f"Question: Who {d} {p}? Answer: {w}." for w, d in zip(who, does) for p in where]
        ),
    ]
    technical = [f"The function returns a value. {prose(50 + i)}" for i in range(4)]
    for name, documents in zip(FILES, (narrative, facts, technical)):
        (out / f"{name}.txt").write_text("\n\n\n".join(documents), encoding="utf-8")
    return out
