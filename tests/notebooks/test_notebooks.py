"""Every notebook runs from its first cell to its last in under a minute of one core, and shows what its text says.

The .ipynb beside each source holds the same cells, with what they show.
"""

from __future__ import annotations

import ast
import importlib.util
import time
from functools import cache
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = (
    "knockout_and_the_conv_leak",
    "patching_a_state_between_two_prompts",
    "token_attribution_side_by_side",
    "where_did_the_value_come_from",
)
SECONDS = 60
BYTES = 400_000

# One worker runs a notebook for all tests of it.
notebook = {name: pytest.mark.xdist_group(name) for name in NAMES}
every = pytest.mark.parametrize("name", [pytest.param(name, marks=notebook[name]) for name in NAMES])


@cache
def run(name: str) -> dict[str, Any]:
    """What the notebook's names are bound to at its end, and ``seconds`` of processor time."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    code = compile((FOLDER / f"{name}.py").read_text(encoding="utf-8"), name, "exec")
    threads, start = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)
    try:
        exec(code, namespace)
    finally:
        torch.set_num_threads(threads)
    return {**namespace, "seconds": time.process_time() - start}


def stored(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_all_notebooks_are_tested() -> None:
    assert sorted(p.stem for p in FOLDER.glob("[!_]*.py")) == sorted(NAMES)
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@every
def test_runs_in_under_a_minute(name: str) -> None:
    assert run(name)["seconds"] < SECONDS


@every
def test_the_built_notebook_holds_the_same_cells(name: str) -> None:
    source = jupytext.read(FOLDER / f"{name}.py")
    built = stored(name)
    assert [(c.cell_type, c.source) for c in built.cells] == [(c.cell_type, c.source) for c in source.cells]


@every
def test_the_built_notebook_shows_its_results(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size <= BYTES
    built = stored(name)
    nbformat.validate(built)
    code = [c for c in built.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    for cell in code:
        last = ast.parse(cell.source.replace("%matplotlib", "# %matplotlib")).body[-1]
        kinds = {kind for output in cell.outputs for kind in output.get("data", {"stream": ""})}
        assert not any(output.output_type == "error" for output in cell.outputs)
        assert bool(kinds) == (isinstance(last, ast.Expr) or "print(" in cell.source), cell.source
        assert ("image/png" in kinds) == (ast.unparse(last) == "figure"), cell.source


def test_the_builder_refuses_what_it_cannot_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("build_notebooks", FOLDER / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    assert [path.stem for path in builder.sources()] == sorted(NAMES)
    loud = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", name="stderr", text="careful")])
    with pytest.raises(RuntimeError, match="writes to stderr: careful"):
        builder._settle(nbformat.v4.new_notebook(cells=[loud]), "loud.py")


@notebook["where_did_the_value_come_from"]
def test_the_recalled_value_is_the_one_told() -> None:
    cells = run("where_did_the_value_come_from")
    assert cells["answer"].strip() == "11"
    assert cells["strongest"] == {"t": ["t", "23"], "o": ["o", "2"], "b": ["b", "25"], "n": ["n", "11"]}
    assert int(cells["blurred"].argmax()) == len(cells["tokens"]) - 1
    assert max(cells["trace"].reconstruction_error.values()) < 1e-5


@notebook["where_did_the_value_come_from"]
def test_the_decomposition_names_the_value_and_the_knockout_key_value_and_writer() -> None:
    cells = run("where_did_the_value_come_from")
    value = cells["tokens"].index("11")
    assert cells["top"] == value
    assert cells["share"] > 0.9
    assert float(cells["found"].completeness_error[0]) < 1e-5
    assert cells["needed"] == [value - 1, value, value + 1]
    scores = cells["found"].scores[0].abs() / cells["found"].logit[0]
    assert max(float(scores[value - 1]), float(scores[value + 1])) < 0.05


@notebook["knockout_and_the_conv_leak"]
def test_a_blocked_scan_leaks_and_both_paths_without_decay_do_not() -> None:
    cells = run("knockout_and_the_conv_leak")
    assert cells["answer"](cells["told"].logits) == cells["answer"](cells["blocked"]) == "7"
    assert cells["answer"](cells["blocked_conv"]) != "7"
    table = cells["table"]
    right, change = table["answered as told"], table["largest change"]
    assert right["nothing"] >= 25
    assert right["scan"] == right["scan, decay skipped"] == right["nothing"]
    assert right["scan + convolution"] == right["scan + convolution, decay skipped"] == 1
    assert change["convolution"] > change["scan + convolution"] > 1e-3
    assert change["scan + convolution, decay skipped"] == 0.0
    assert cells["exact"] is True
    # The three lines of the figure that lie on one another.
    assert change["scan"] == pytest.approx(change["nothing"], rel=0.01)
    assert change["scan, decay skipped"] == pytest.approx(change["nothing"], rel=0.01)


@notebook["knockout_and_the_conv_leak"]
def test_the_token_behind_the_value_writes_it_and_the_language_model_leaks_too() -> None:
    cells = run("knockout_and_the_conv_leak")
    assert cells["writer"] == cells["VALUE"] + 1
    leak = cells["leak"].set_index(["paths", "decay"])["leak"]
    assert leak["ssm", "keep"] > 0.9
    assert leak["ssm", "keep"] > leak["conv", "keep"] > leak["ssm+conv", "keep"] > leak["ssm+conv", "skip"] == 0.0


@notebook["patching_a_state_between_two_prompts"]
def test_the_answer_follows_the_state() -> None:
    cells = run("patching_a_state_between_two_prompts")
    first, last = cells["TOLD"], cells["LAST"]
    assert cells["differ"] == list(range(first, last + 1))
    assert cells["said_ours"] == cells["said"] == cells["value"]
    assert cells["said_theirs"] == cells["OTHER"]
    assert float(cells["handed"].value) < 1e-10 < 1 < float(cells["handed"].corrupt)


@notebook["patching_a_state_between_two_prompts"]
def test_the_convolution_hands_over_first_and_the_state_from_then_on() -> None:
    cells = run("patching_a_state_between_two_prompts")
    alone, last = cells["alone"], cells["STEPS"].index(cells["LAST"])
    assert float(alone["conv"][0]) > 0.9 > 0.1 > float(alone["state"][0])
    assert float(alone["state"][last:].min()) > 0.9 > 0.1 > float(alone["conv"][last:].abs().max())
    torch.testing.assert_close(alone["full_state"][last:], torch.ones_like(alone["full_state"][last:]))
    assert cells["difference"] == sorted(cells["difference"])
    assert cells["difference"][0] < 0 < cells["difference"][-1]
    far = cells["recovered"]["conv"][:, cells["far"]]
    assert float(far.abs().max()) < 0.05 < 0.3 < float(cells["recovered"]["state"][cells["best"], cells["far"]].min())


@notebook["token_attribution_side_by_side"]
def test_every_method_is_asked_and_the_promised_sums_hold() -> None:
    from ssmlens.attribution import METHODS

    cells = run("token_attribution_side_by_side")
    assert list(cells["found"]) == list(METHODS)
    assert cells["answer"] == cells["right"]
    assert cells["followed"].strip() == "8"
    for name in ("decompose", "relevance"):
        assert float(cells["found"][name].completeness_error[0]) < 1e-5
    summary = cells["summary"]
    assert (summary["error"] != "").to_dict() == {
        name: not bool(each.completeness_error.isnan()) for name, each in cells["found"].items()
    }
    for name in ("hidden", "unified", "rollout"):
        assert summary["error"][name] == ""
    assert cells["value"] == float(cells["exact"].scores[0].max()) > 0.3 * cells["logit"]
    assert summary["at"]["decompose"] in cells["told"]


@notebook["token_attribution_side_by_side"]
def test_maps_do_not_know_the_target_and_controls_stand_beside_the_methods() -> None:
    cells = run("token_attribution_side_by_side")
    knows = {name for name, does in cells["knows_target"].items() if does}
    assert knows == {"decompose", "relevance"}
    precision = cells["precision"]
    assert {"random", "recency"} < set(precision.index)
    assert (precision["prompts"] == 6).all()
    assert precision["mean"]["decompose"] > precision["high"]["random"]
