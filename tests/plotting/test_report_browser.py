"""The report in a real browser: nothing is requested, nothing fails, hands and keys read out the trace's numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens import report

TEXT = "The red box is K7.\n\n<b>The</b> red box is"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        shutil.which("chromium") is None and not os.environ.get("CI"), reason="no Chromium on this machine"
    ),
]

# A process of its own: playwright's event loop and pytest's warnings-as-errors do not go together.
DRIVER = Path(__file__).with_name("drive_report.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the driver saw, and the trace it was drawn from."""
    import json

    trace = ssmlens.load(tiny_mamba2(), tokenizer=tiny_tokenizer()).trace(TEXT)
    path = report.write(tmp_path_factory.mktemp("report") / "report.html", report.build(trace))
    done = subprocess.run([sys.executable, str(DRIVER), str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), trace


def value(trace, layer, how, t, s):
    return float(trace[layer].recurrence.attention.reduce(how)[0, t, s])


def test_only_the_file_itself_is_requested(seen):
    assert len(seen[0]["requests"]) == 1
    assert seen[0]["errors"] == []


def test_the_page_opens_at_the_last_token(seen):
    first = seen[0]["first"]
    last = len(seen[1].tokens[0]) - 1
    assert first["reader"].startswith(f"{last} ")
    assert first["framed"] == [last]
    assert first["scroll"] <= first["width"], "no horizontal scrolling at 1280 px"


def test_choosing_a_layer_and_a_token_shows_their_value(seen):
    state, trace = seen
    shown = float(state["chosen"]["value"])
    assert shown == pytest.approx(value(trace, 1, "mean", 20, 4), rel=6e-3)
    assert state["chosen"]["framed"] == [20]
    assert state["chosen"]["later"] == len(trace.tokens[0]) - 21
    assert state["chosen"]["distance"] == "16 tokens back"
    assert state["chosen"]["pressed"] == ["1"]


def test_the_keyboard_moves_the_cursor_of_the_map(seen):
    state, trace = seen
    assert float(state["keys"]["value"]) == pytest.approx(value(trace, 1, "mean", 21, 3), rel=6e-3)
    assert state["keys"]["framed"] == [21], "Enter makes the row the reader"


def test_the_norm_keeps_no_sign(seen):
    state, trace = seen
    assert float(state["norm"]["value"]) == pytest.approx(value(trace, 1, "norm", 21, 3), rel=6e-3)
    assert state["norm"]["low"] == "0"
    assert state["norm"]["negative"] == 0


def test_the_map_draws_zero_neutral_and_follows_the_theme(seen):
    light, dark = seen[0]["blank"]["light"], seen[0]["blank"]["dark"]
    assert light == [0xED, 0xED, 0xED]
    assert dark == [0x26, 0x28, 0x2C]


def test_the_norm_chart_reads_out_values(seen):
    state, trace = seen
    last = trace[0].recurrence.states(at=[-1]).double().norm()
    assert f"layer 0 {float(last):.3g}" in state["chart"]
