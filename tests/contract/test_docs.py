"""The examples in docstrings and in the README run as printed."""

from __future__ import annotations

import doctest
import importlib
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"ssmlens": "ssmlens", "ssmlens.kernels": "kernels", "ssmlens.analyses": "analyses"}


def with_examples() -> list[str]:
    """Dotted names of the modules that hold a doctest."""
    names = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join((package, *(p for p in parts if p != "__init__"))))
    return names


@pytest.mark.parametrize("name", with_examples())
def test_docstring_examples(name: str) -> None:
    # By full name: by path, doctest would import a second copy of the mapped packages.
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One namespace, top to bottom, as a reader would type it.
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert code
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in code:
            exec(compile(block, "README.md", "exec"), namespace)


def test_readme_commands_exist() -> None:
    from typer.main import get_command

    from ssmlens.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"^\s*ssmlens (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE))
    assert used
    assert used <= known


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "kernels").glob("*.md"), *(ROOT / "analyses").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
