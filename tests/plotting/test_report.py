"""The report: what it says equals the trace, it loads nothing, and no text can break or hijack it."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens import report
from ssmlens.analyses import memory
from ssmlens.errors import SsmlensError
from ssmlens.report import charts
from ssmlens.report.numbers import REDUCTIONS, combine, state_norms

TEXT = "The red box is K7.\n\nThe red box is"
EVIL = "</script><script>alert(1)</script><img src=http://x.invalid/y onerror=alert(2)> &amp; 😀\x00\u202e $x \"'"
SECTIONS = ("text", "maps", "half-lives", "norms", "errors", "settings")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements by id, tags that are open at the end, attributes, and the text of each section."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.text, self.ids, self.scripts = [], [], {}, [], 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        known = dict(attrs)
        self.ids += [known["id"]] if "id" in known else []
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append((tag, known.get("id") if tag == "section" else None))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.text[name] = self.text.get(name, "") + data + " "


def page_data(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def unpack(packed, length):
    lower = np.frombuffer(base64.b64decode(packed["f16"]), dtype="<f2").astype(float) * packed["peak"]
    full = np.zeros((length, length))
    full[np.tri(length, dtype=bool)] = lower
    return full


@pytest.fixture(scope="module")
def lens():
    return ssmlens.load(tiny_mamba2(), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def trace(lens):
    return lens.trace(TEXT)


@pytest.fixture(scope="module")
def html(trace, lens):
    return report.build(trace, decode=lens.tokenizer.decode)


def test_a_lens_and_its_trace_give_the_same_page(lens, html):
    decode = lens.tokenizer.decode if lens.tokenizer is not None else None
    assert report.build(lens, TEXT) == report.build(lens.trace(TEXT), decode=decode, lens=lens)


def test_every_section_is_there_and_the_markup_is_balanced(html):
    page = Page(html)
    assert not page.open
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids)), "ids are unique"
    for name in SECTIONS:
        assert len(page.text[name]) > 80
    for name in SECTIONS[:-1]:
        assert "What it shows." in page.text[name]
        assert "What it does not." in page.text[name]


def test_the_page_loads_nothing(html):
    page = Page(html)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "poster", "data", "srcset", "background"):
            assert value.startswith(("#", "data:")), f"{tag} loads {value}"
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|importScripts|WebSocket|https?://", html)
    assert "default-src 'none'" in html


def test_maps_in_the_page_are_those_of_the_trace(html, trace):
    data = page_data(html)
    assert [layer["key"] for layer in data["layers"]] == ["all", "0", "1", "2"]
    for layer in data["layers"][1:]:
        for how in REDUCTIONS:
            ours = unpack(layer["maps"][how], len(data["tokens"]))
            theirs = trace[int(layer["key"])].recurrence.attention.reduce(how)[0].numpy()
            assert np.abs(ours - theirs).max() <= np.abs(theirs).max() * 2**-11, "one rounding to float16"


def test_all_layers_together_follow_the_stated_rule(html, trace):
    data = page_data(html)
    maps = [trace[k].recurrence.attention.reduce("mean")[0].double().numpy() for k in range(3)]
    mean = np.mean([m / np.abs(m).max(axis=1, keepdims=True) for m in maps], axis=0)
    ours = unpack(data["layers"][0]["maps"]["mean"], len(mean))
    assert np.abs(ours - mean).max() < 1e-3
    assert "divided by its largest magnitude" in data["relative"]
    assert np.array_equal(combine([np.zeros((2, 2)), np.eye(2)]), np.eye(2) / 2), "rows of zeros stay zero"


def test_the_text_is_shaded_by_the_last_row(html, trace):
    data = page_data(html)
    row = unpack(data["layers"][0]["maps"]["mean"], len(data["tokens"]))[-1]
    shades = re.findall(r'<span class="tok( [pn])?( reader)?" data-i="(\d+)"(?: style="--v:([\d.]+)")?>', html)
    assert len(shades) == len(trace.tokens[0])
    assert [i for i, (_, reader, _, _) in enumerate(shades) if reader] == [len(shades) - 1]
    expected = np.sqrt(np.minimum(np.abs(row) / np.abs(row[:-1]).max(), 1))
    for (sign, _, _, shade), value, want in zip(shades, row, expected):
        assert float(shade or 0) == pytest.approx(want, abs=2e-3)
        assert sign.strip() == ("p" if value > 0 else "n" if value < 0 else "")


def test_errors_and_verdicts_are_those_of_the_trace(html, trace):
    text = Page(html).text["errors"]
    for layer, error in trace.reconstruction_error.items():
        assert re.search(rf"layer {layer}\s.*?{re.escape(f'{error:.2e}')}\s+✓ pass", text)
    assert f"{trace.tolerance:.0e}" in text
    assert "✓ verified" in html
    assert 'role="alert"' not in html


def test_a_trace_beyond_its_tolerance_says_so_first(trace):
    from dataclasses import replace

    bad = replace(trace, mixers={**trace.mixers, 1: replace(trace[1], reconstruction_error=float("nan"))})
    html = report.build(bad)
    assert "✗ not verified" in html
    assert html.index('role="alert"') < html.index('id="text"')
    assert "✗ fail" in Page(html).text["errors"]


def test_half_lives_are_those_of_the_study(html, trace):
    text = Page(html).text["half-lives"]
    lives = memory.half_life(trace).value
    for k in range(3):
        longest = float(lives[k].max())
        assert re.search(rf"layer {k}\s[^l]*{re.escape(f'{longest:.3g}')}", text)
        distance = trace[k].recurrence.attention.distance(rows=[len(trace.tokens[0]) - 1]).mean()
        assert f"{distance:.1f} tokens back" in text


def test_state_norms_are_those_of_the_states(trace, html, monkeypatch):
    rec = trace[2].recurrence
    expected = rec.states().flatten(2).double().norm(dim=-1).numpy()
    assert np.allclose(state_norms(rec), expected, rtol=1e-6)
    monkeypatch.setattr("ssmlens.report.numbers._BLOCK_NUMBERS", 3 * rec.n_heads * rec.head_dim * rec.d_state)
    assert np.allclose(state_norms(rec), expected, rtol=1e-6), "blocks of three tokens give the same"
    assert np.allclose(page_data(html)["norms"][2][1], expected[0], rtol=1e-3)


def test_predictions_are_the_likeliest_tokens(html, trace, lens):
    text = Page(html).text["text"]
    best = trace.logits[0, -1].softmax(-1).topk(10)
    for p in best.values.tolist():
        assert f"{100 * p:.1f} %" in text
    assert ssmlens.plotting.labels.visible(lens.tokenizer.decode([int(best.indices[0])])) in text


def test_settings_and_versions_are_listed(html, trace):
    text = Page(html).text["settings"]
    for word in ("float32", trace.settings["fingerprint"], *trace.settings["versions"].values()):
        assert word in text
    assert f"ssmlens report --model Mamba2ForCausalLM --text '{TEXT}'" in text


@pytest.mark.parametrize("prompt", ["a�b", "abc", "x y\tz"])
def test_a_text_that_its_tokens_do_not_spell_is_given_as_ids(lens, prompt):
    trace = lens.trace(prompt)
    text = Page(report.build(trace)).text["settings"]
    assert f"--ids {','.join(map(str, trace.ids[0].tolist()))} " in text


def test_tokens_without_spaces_are_set_apart(lens):
    assert 'class="text apart"' in report.build(lens, "abc")
    assert 'class="text apart"' not in report.build(lens, "a bc")


def test_long_and_short_texts_take_the_same_maps(trace, monkeypatch):
    from ssmlens.report import numbers

    rec = trace[1].recurrence
    short = numbers._maps(rec)
    monkeypatch.setattr(numbers, "_DENSE_NUMBERS", 0)
    long = numbers._maps(rec)
    assert set(short) == set(long) == set(REDUCTIONS)
    for how in REDUCTIONS:
        assert np.allclose(short[how], long[how], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("title", [None, EVIL])
def test_hostile_text_stays_text(lens, title):
    html = report.build(lens, EVIL, title=title)
    page = Page(html)
    assert not page.open
    assert page.scripts == 2, "the data and the page's own"
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert not any(tag == "img" for tag, _, _ in page.attributes)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\u202e]", html.replace(json.dumps(EVIL), ""))
    assert "".join(page_data(html)["tokens"]).startswith("</script><script>")


@pytest.mark.parametrize("prompt", [[5], "a", " ", "\n\n\n", [0, 1, 255, 256, 257]])
def test_short_and_odd_prompts_make_a_page(lens, prompt):
    page = Page(report.build(lens, prompt))
    assert not page.open
    assert set(SECTIONS) <= set(page.ids)


def test_without_a_tokenizer_ids_stand_for_tokens():
    html = report.build(ssmlens.load(tiny_mamba1()), [1, 2, 3])
    assert page_data(html)["tokens"] == ["1", "2", "3"]
    assert "&lt;" in html


def test_a_row_of_a_padded_batch_is_the_page_of_its_own_prompt(lens):
    batch = lens.trace([TEXT, "short one"])
    single = page_data(report.build(lens, "short one"))
    padded = page_data(report.build(batch, row=1))
    assert padded["tokens"] == single["tokens"]
    for ours, theirs in zip(padded["layers"], single["layers"]):
        for how in REDUCTIONS:
            a, b = (unpack(x["maps"][how], len(single["tokens"])) for x in (ours, theirs))
            assert np.abs(a - b).max() <= 2e-3 * np.abs(b).max()
    with pytest.raises(SsmlensError, match="rows 0 to 1"):
        report.build(batch, row=2)


def test_long_texts_are_pooled_and_stay_small(lens):
    length = 600
    html = report.build(lens, list(np.random.default_rng(0).integers(0, 256, length).tolist()))
    data = page_data(html)
    assert data["factor"] == 3
    assert "3 x 3" in data["pooled"]
    packed = data["layers"][1]
    assert len(base64.b64decode(packed["maps"]["mean"]["f16"])) == 200 * 201
    assert len(base64.b64decode(packed["last"]["mean"]["f16"])) == 2 * length, "the last row is kept exactly"
    assert len(html) < 3_000_000


def test_what_cannot_be_shown_is_refused(lens, trace, monkeypatch):
    with pytest.raises(SsmlensError, match="a lens needs a prompt"):
        report.build(lens)
    with pytest.raises(SsmlensError, match="already has its own"):
        report.build(trace, "text")
    monkeypatch.setattr(report, "MAX_TOKENS", 10)
    with pytest.raises(SsmlensError, match="at most 10"):
        report.build(trace)


def test_progress_counts_up_to_the_end(trace):
    told = []
    report.build(trace, progress=lambda *step: told.append(step))
    done, total = [d for _, d, _ in told], {t for _, _, t in told}
    assert total == {4}
    assert done == sorted(done) == [0, 1, 2, 3, 4]


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    assert report.write(tmp_path / "a.html", "<p>é").read_text(encoding="utf-8") == "<p>é"
    with pytest.raises(OSError, match="gone"):
        report.write(tmp_path / "gone" / "a.html", "x")
    with pytest.raises(UnicodeEncodeError):
        report.write(tmp_path / "b.html", "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_charts_survive_any_numbers():
    empty, endless = np.array([np.nan]), np.array([np.inf, np.inf])
    svg = charts.strips(
        [("a", empty), ("b", endless), ("c", np.array([3.0]))],
        reference=5,
        reference_text="five",
        y_title="y",
        alt="<x>",
    )
    assert not Page(svg).open
    assert "undefined" in svg
    assert "never" in svg
    for curve in ([1.0], [0.0, 0.0], [np.nan, 1.0], [1e-9, 1e9]):
        svg = charts.lines([("a", np.array(curve))], y_title="y", x_title="x", alt="alt")
        assert not Page(svg).open
        assert "nan" not in svg


def test_strip_dots_sit_at_their_values():
    svg = charts.strips([("a", np.array([1.0, 10.0, 100.0]))], reference=10, reference_text="", y_title="", alt="")
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", svg)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    reference = float(re.search(r'class="reference" d="M\d+ ([\d.]+)', svg)[1])
    assert reference == pytest.approx(heights[1], abs=0.11)


def test_the_page_of_a_shipped_passage_needs_no_text_to_be_made_again():
    from ssmlens import zoo

    trace = ssmlens.load("mamba2-english").trace(zoo.passage("mamba2-english"), layers=[0])
    assert "ssmlens report --model mamba2-english --out report.html" in report.build(trace)
