"""The arrows of the design: which part may import which, and what a light import must not bring."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"ssmlens": "ssmlens", "ssmlens.kernels": "kernels", "ssmlens.analyses": "analyses", "ssmlens.apps": "apps"}

# Importing part -> parts of ssmlens it may import. Names are the first component below ssmlens.
CORE = {"kernels", "errors", "quiet"}
ALLOWED = {
    "kernels": {"kernels"},
    "errors": set(),
    "quiet": set(),
    "bootstrap": {"errors"},
    "attention": CORE,
    "recurrence": CORE | {"attention"},
    "models": CORE | {"models", "recurrence"},
    "trace": CORE | {"models", "recurrence", "storage"},
    "storage": CORE | {"recurrence", "trace"},
    "tap": CORE | {"models"},
    "exact": set(),
    # What a traced forward keeps of every scan, for the lens and for passes with changes.
    "recorder": CORE | {"exact", "models", "tap", "trace"},
    "prompt": {"errors"},
    "tokenizer": {"errors"},
    "lens": CORE | {"exact", "models", "prompt", "recorder", "tap", "trace"},
    "loading": CORE | {"lens", "models", "tokenizer", "zoo"},
    # The model as a map with an explicit state, from its weights.
    "stepping": CORE | {"lens", "models", "stepping"},
    # A study imports no other study, no model and no plotting.
    "analyses": CORE
    | {"analyses", "attention", "bootstrap", "lens", "prompt", "recurrence", "stepping", "tap", "tasks", "trace"},
    # Patching and steering go through the tap; the lenses read a trace, and trained ones come with shipped models.
    "interventions": CORE
    | {"interventions", "lens", "models", "prompt", "recorder", "recurrence", "tap", "trace", "zoo"},
    # Attribution recomputes the model from its weights, differentiably and piece by piece.
    "attribution": CORE
    | {"attention", "attribution", "bootstrap", "exact", "lens", "loading", "models", "prompt", "recurrence", "trace"},
    "plotting": {"analyses", "attention", "attribution", "errors", "plotting", "recurrence", "trace"},
    # Training shipped models needs the scan itself; bench times whole traces; the tuned lens comes with a model.
    "zoo": {"errors", "interventions", "kernels", "lens", "zoo", "tap", "loading", "recurrence", "tasks", "trace"},
    # Tasks know no model; organisms are trained on them.
    "tasks": {"errors", "tasks"},
    # Pages call the public library, and nothing of kernels, models or taps.
    "apps": {
        "analyses",
        "apps",
        "attribution",
        "errors",
        "interventions",
        "lens",
        "loading",
        "plotting",
        "prompt",
        "report",
        "trace",
        "zoo",
    },
}
# Files that stand outside the table, with what they may import besides.
EXTRA = {
    "ssmlens/tasks/checks.py": {"analyses"},
    # Cards of organisms hold them against the studies' laws.
    "ssmlens/zoo/organisms_measure.py": {"analyses"},
    "kernels/bench.py": {"loading", "lens", "attention", "recurrence"},
    "kernels/peers.py": {"loading", "lens"},
    "kernels/bench_million.py": {"analyses", "loading", "recurrence"},
}


def modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of every module of the package."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join((package, *(p for p in parts if p != "__init__"))), path))
    return found


def imported(name: str, path: Path) -> set[str]:
    """Dotted names of ssmlens modules that a file imports, relative imports resolved."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {n for n in names if n.split(".")[0] == "ssmlens"}


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_import_table(name: str, path: Path) -> None:
    part = name.split(".")[1] if "." in name else ""
    if part not in ALLOWED:
        pytest.skip("free to import any part") if part in ("", "cli", "report", "__main__") else pytest.fail(
            f"{name} has no row in the import table"
        )
    allowed = ALLOWED[part] | EXTRA.get(str(path.relative_to(ROOT)), set())
    used = {n.split(".")[1] for n in imported(name, path) if "." in n} - {"__version__"}
    assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_mapped_folders_are_imported_by_their_full_name(name: str, path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        tops = []
        if isinstance(node, ast.Import):
            tops = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            tops = [node.module.split(".")[0]]
        assert not set(tops) & {"kernels", "analyses", "apps"}, f"{path} must import ssmlens.{tops[0]}"


def test_package_list_equals_the_folders() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {name for name, path in modules() if path.name == "__init__.py"}
    assert sorted(declared) == sorted(on_disk)


def test_mapped_init_files_cannot_raise() -> None:
    # With the repository root on sys.path transformers imports whatever "kernels" it finds there.
    for folder in ("kernels", "analyses", "apps"):
        body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
        assert [type(node) for node in body] == [ast.Expr]


HEAVY = ("torch", "transformers", "triton", "captum", "streamlit", "matplotlib", "plotly", "pandas", "xarray", "scipy")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return done.stdout


def test_import_ssmlens_is_light() -> None:
    heavy = run(f"import sys, ssmlens; print([m for m in {HEAVY} if m in sys.modules])")
    assert heavy.strip() == "[]"


def test_loading_and_tracing_bring_no_plotting() -> None:
    absent = ("triton", "captum", "streamlit", "matplotlib", "plotly")
    heavy = run(f"import sys, ssmlens; ssmlens.load; ssmlens.Trace; print([m for m in {absent} if m in sys.modules])")
    assert heavy.strip() == "[]"


def test_import_ssmlens_is_quick() -> None:
    # The promise is 0.5 s; the interpreter's own start is not ours. The best of three leaves out a busy machine.
    def once(code: str) -> float:
        start = time.perf_counter()
        run(code)
        return time.perf_counter() - start

    assert min(once("import ssmlens") for _ in range(3)) - min(once("pass") for _ in range(3)) < 0.5


def test_public_names_exist() -> None:
    import ssmlens

    for name in ssmlens.__all__:
        assert getattr(ssmlens, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = ssmlens.nonsense


def test_no_second_copy_of_a_mapped_package() -> None:
    # `import kernels` would load the same files again under another name.
    if {"", str(ROOT)} & set(sys.path):
        pytest.skip("`python -m pytest` puts this folder on the path, where transformers looks for a package `kernels`")
    for name in ("kernels", "analyses", "apps"):
        file = getattr(sys.modules.get(name), "__file__", None)
        assert file is None or ROOT not in Path(file).parents
