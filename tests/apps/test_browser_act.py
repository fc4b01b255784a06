"""The pages that act and compare, in a real browser."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlencode

import pytest
from serving import idle

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

MODEL = "mamba1-recall"
WAIT_MS = 30_000
PROMPT = "r 7 a 19 m 3 b 12 . . r"


def address(page_url: str, path: str, **query: str) -> str:
    return f"{page_url}/{path}?{urlencode({'model': MODEL, 'text': PROMPT, **query})}"


def again(page: Any) -> None:
    """The address that the page has now, opened anew."""
    link = page.url
    page.goto("about:blank")
    page.goto(link)


@pytest.fixture(scope="module")
def lens() -> Any:
    """The model of these pages, asked directly."""
    import ssmlens

    return ssmlens.load(MODEL)


def choose(page: Any, name: str, option: str) -> None:
    """Take an option of the list with that name. A page that scrolls or redraws closes the list: it is opened again."""
    from playwright.sync_api import TimeoutError as Closed

    for patience in (2_000, 4_000, WAIT_MS):
        idle(page)
        box = page.get_by_role("combobox", name=name, exact=True)
        box.focus()
        box.press("ArrowDown")
        try:
            return page.get_by_role("option", name=option, exact=True).click(timeout=patience)
        except Closed:
            if patience == WAIT_MS:
                raise
            box.press("Escape")


def metric(page: Any, name: str) -> Any:
    """One of the large numbers."""
    return page.get_by_test_id("stMetric").filter(has_text=name).get_by_test_id("stMetricValue")


def cell(canvas: Any, t: int, s: int) -> dict[str, float]:
    """Where on the canvas the pair stands."""
    cells = json.loads(canvas.get_attribute("data-cells"))
    return {
        "x": cells["left"] + (s - cells["s"] + 0.5) * cells["side"],
        "y": cells["top"] + (t - cells["t"] + 0.5) * cells["side"],
    }


def test_pointing_at_one_map_lights_the_pair_in_the_other(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "compare", right_text="r 4 a 19 m 3"))
    maps, said = view.locator("canvas[data-drawn]"), view.locator("output.readout")
    expect(maps).to_have_count(2, timeout=WAIT_MS)
    idle(view)
    left, right = maps.nth(0), maps.nth(1)
    left.scroll_into_view_if_needed()
    left.hover(position=cell(left, 3, 1))
    expect(said.nth(0)).to_contain_text("Token 3 “19” reads token 1 “7”, 2 back")
    expect(said.nth(1)).to_contain_text("Token 3 “19” reads token 1 “4”, 2 back")
    expect(view.locator(".strip").nth(1).locator(".source")).to_have_text("4")
    # The text at the right ends before token 9.
    left.hover(position=cell(left, 9, 1))
    expect(said.nth(0)).to_contain_text("Token 9 ")
    expect(said.nth(1)).to_contain_text("Point at a cell")
    view.mouse.move(5, 5)
    expect(said.nth(0)).to_contain_text("Point at a cell")

    right.focus()
    for key in ("ArrowUp", "ArrowLeft"):
        right.press(key)
    expect(said.nth(1)).to_contain_text("Token 4 “m” reads token 3 “19”")
    expect(said.nth(0)).to_contain_text("Token 4 “m” reads token 3 “19”")
    right.press("Enter")
    expect(view.get_by_text("Left after token 4 “m”, right after token 4 “m”.")).to_be_visible(timeout=WAIT_MS)
    expect(view).to_have_url(re.compile("[?&]source=3"), timeout=WAIT_MS)
    idle(view)
    right.press("Escape")
    expect(said.nth(0)).to_contain_text("Point at a cell")
    again(view)
    expect(view.get_by_text("Left after token 4 “m”, right after token 4 “m”.")).to_be_visible(timeout=WAIT_MS)
    expect(view.locator(".strip .source")).to_have_text(["19", "19"], timeout=WAIT_MS)


def test_a_blocked_token_is_gone_from_the_map_and_the_prediction(view: Any, page_url: str, lens: Any) -> None:
    from playwright.sync_api import expect

    from ssmlens.interventions import Knockout, observe

    def divergence(sources: list[int]) -> str:
        return f"KL(free || blocked) = {float(observe(lens, PROMPT, Knockout(sources)).contrast.kl[0, -1]):.3g} nats"

    view.goto(address(page_url, "knockout", sources="3", figure_layer="1"))
    expect(view.get_by_text(divergence([3]))).to_be_visible(timeout=WAIT_MS)
    idle(view)
    view.locator(".tokens span").nth(1).click()
    expect(view.get_by_text(divergence([1, 3]))).to_be_visible(timeout=WAIT_MS)
    assert divergence([1, 3]) != divergence([3])

    said = view.locator("output.readout")
    free = view.locator("canvas[data-drawn]").first
    expect(view.locator("canvas[data-drawn]")).to_have_count(3, timeout=WAIT_MS)
    idle(view)
    free.scroll_into_view_if_needed()
    free.hover(position=cell(free, 10, 1))
    pair = "Token 10 “r” reads token 1 “7”, 9 back: M[t, s], "
    sides = observe(lens, PROMPT, Knockout([1, 3])).attention(1)
    values = [float(x[0, 10, 1]) for x in (sides.before, sides.after, sides.difference)]
    assert values[1] == 0
    maps = view.locator(".view output.readout")
    for i, (words, value) in enumerate(zip(("mean", "mean", "blocked less free, mean"), values)):
        number = "0" if value == 0 else f"{value:.3g}"
        expect(maps.nth(i)).to_contain_text(f"{pair}{words} over heads (signed) = {number}")
    expect(said.first).not_to_contain_text(pair)
    # Nothing follows a click in these maps, so none is offered.
    view.mouse.move(5, 5)
    expect(maps.first).to_have_text(re.compile(r"to read its value\. Dragging, \+ and − zoom"))
    again(view)
    expect(view.get_by_text(divergence([1, 3]))).to_be_visible(timeout=WAIT_MS)


def test_patching_reads_out_the_pinned_site(view: Any, page_url: str, lens: Any) -> None:
    from playwright.sync_api import expect

    from ssmlens.interventions import patch

    ids = lens.trace(PROMPT).ids[0].tolist()
    corrupt = [ids[0], next(i for i in ids[::-1] if i != ids[1]), *ids[2:]]
    sites = [("residual", 1, 1), ("residual", 1, 4), ("full_state", 1, 4)]
    found = patch(lens, ids, corrupt, sites, "kl")
    shares = [f"{float(x):.1%}" for x in found.recovered[:, 0]]
    assert len(set(shares)) > 1

    view.goto(address(page_url, "patch", exchanged="0 “r”"))
    expect(metric(view, "Recovered")).to_be_visible(timeout=WAIT_MS)
    choose(view, "Exchanged token", "1 “7”")
    expect(metric(view, "Corrupt")).to_have_text(f"{float(found.corrupt[0]):.3g}", timeout=WAIT_MS)
    choose(view, "Layer", "1")
    choose(view, "Pinned token", "1 “7”")
    expect(view.get_by_text("Pinned: layer 1, token 1 “7”.")).to_be_visible(timeout=WAIT_MS)
    expect(metric(view, "Recovered")).to_have_text(shares[0])
    idle(view)
    view.locator(".tokens span").nth(4).click()
    expect(view.get_by_text("Pinned: layer 1, token 4 “m”.")).to_be_visible(timeout=WAIT_MS)
    expect(metric(view, "Recovered")).to_have_text(shares[1])
    choose(view, "Patched", "full_state")
    expect(metric(view, "Recovered")).to_have_text(shares[2], timeout=WAIT_MS)
    expect(view).to_have_url(re.compile("site=full_state"), timeout=WAIT_MS)
    idle(view)
    again(view)
    expect(view.get_by_text("Pinned: layer 1, token 4 “m”.")).to_be_visible(timeout=WAIT_MS)
    expect(metric(view, "Recovered")).to_have_text(shares[2])


def test_an_edited_state_changes_the_prediction_and_its_figures(view: Any, page_url: str, lens: Any) -> None:
    from playwright.sync_api import expect

    from ssmlens.interventions import StateEdit, observe

    def divergence(edit: StateEdit) -> str:
        return f"KL(free || edited) = {float(observe(lens, PROMPT, edit).contrast.kl[0, -1]):.3g} nats"

    view.goto(address(page_url, "steer", layer="1"))
    expect(view.get_by_text(divergence(StateEdit(1, 10, scale=0.0)))).to_be_visible(timeout=WAIT_MS)
    idle(view)
    view.locator(".tokens span").nth(9).click()
    expect(view.get_by_text("State of layer 1 after token 9 “.”, all heads: times 0")).to_be_visible(timeout=WAIT_MS)
    number = view.get_by_role("spinbutton", name="Number")
    number.fill("-3")
    number.press("Enter")
    edit = StateEdit(1, 9, scale=-3.0)
    expect(view.get_by_text(divergence(edit))).to_be_visible(timeout=WAIT_MS)
    assert divergence(edit) != divergence(StateEdit(1, 9, scale=0.0))
    view.get_by_role("radio", name="State norms").click()
    expect(view.get_by_text("Euclidean norm of the state that each token reads")).to_be_visible(timeout=WAIT_MS)
    expect(view).to_have_url(re.compile("figure=State"), timeout=WAIT_MS)
    idle(view)
    again(view)
    expect(view.get_by_text("all heads: times -3")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_text(divergence(edit))).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_text("Euclidean norm of the state that each token reads")).to_be_visible(timeout=WAIT_MS)
