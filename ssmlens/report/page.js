"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const n = data.tokens.length, factor = data.factor, cells = Math.ceil(n / factor);
  const exact = factor === 1;
  const state = { layer: data.layers[0].key, how: data.reductions[0], reader: n - 1, t: n - 1, s: n - 1, print: false };
  const darkQuery = matchMedia("(prefers-color-scheme: dark)");

  // Numbers. A map travels as the float16 lower triangle of map / peak, row after row.
  const half = (h) => {
    const sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, m = h & 1023;
    return e ? sign * 2 ** (e - 25) * (1024 + m) : sign * m * 2 ** -24;
  };
  const decoded = new Map();
  const numbers = (packed) => {
    if (!decoded.has(packed)) {
      const bytes = Uint8Array.from(atob(packed.f16), (c) => c.charCodeAt(0));
      const words = new Uint16Array(bytes.buffer);
      decoded.set(packed, Float64Array.from(words, (w) => half(w) * packed.peak));
    }
    return decoded.get(packed);
  };
  const layerOf = (key) => data.layers.find((l) => l.key === key);
  const packedMap = (key = state.layer, how = state.how) => layerOf(key).maps[how];
  const cell = (map, i, j) => (j > i ? NaN : map[(i * (i + 1)) / 2 + j]);
  const rowOf = (t) => {
    if (!exact) return numbers(layerOf(state.layer).last[state.how]);
    const map = numbers(packedMap());
    return map.subarray((t * (t + 1)) / 2, ((t + 1) * (t + 2)) / 2);
  };
  const signed = () => !data.unsigned.includes(state.how);
  const show = (v) => (Number.isNaN(v) ? "none" : v === 0 ? "0" : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e4 ? v.toPrecision(3) : v.toExponential(2));
  const unit = () => (state.layer === "all" ? " relative" : "");

  // Colours.
  const theme = () => (darkQuery.matches && !state.print ? data.ramps.dark : data.ramps.light);
  const ramp = () => (signed() ? theme().signed : theme().magnitude);
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const paint = (canvas, key, how) => {
    const packed = packedMap(key, how), map = numbers(packed);
    const colours = ramp().map(rgb), last = colours.length - 1, empty = rgb(theme().missing);
    canvas.width = canvas.height = cells;
    const image = new ImageData(cells, cells);
    for (let i = 0, k = 0; i < cells; i++)
      for (let j = 0; j < cells; j++, k += 4) {
        const v = cell(map, i, j);
        const part = signed() ? (v / packed.limit + 1) / 2 : v / packed.limit;
        const c = Number.isNaN(v) ? empty : colours[Math.round(Math.min(1, Math.max(0, part)) * last)];
        image.data[k] = c[0]; image.data[k + 1] = c[1]; image.data[k + 2] = c[2]; image.data[k + 3] = 255;
      }
    canvas.getContext("2d").putImageData(image, 0, 0);
  };

  // The text.
  const spans = [...document.querySelectorAll(".tok")];
  const paintText = () => {
    const row = rowOf(state.reader);
    // The token's own entry would drown the rest: shading is relative to the earlier tokens.
    let peak = state.reader ? 0 : Math.abs(row[0]);
    for (let i = 0; i < state.reader; i++) peak = Math.max(peak, Math.abs(row[i]));
    spans.forEach((span, i) => {
      const v = i <= state.reader && peak ? Math.max(-1, Math.min(1, row[i] / peak)) : 0;
      span.style.setProperty("--v", Math.abs(v) ** data.power);
      span.classList.toggle("p", v > 0);
      span.classList.toggle("n", v < 0);
      span.classList.toggle("later", i > state.reader);
      span.classList.toggle("reader", i === state.reader);
    });
    $("who-reads").textContent = state.reader === n - 1 ? "its last token" : `token ${state.reader}`;
    $("reader").textContent = `${state.reader} “${data.labels[state.reader]}”`;
    $("textscale").textContent = `full at ${show(peak)}${unit()}, the largest magnitude among earlier tokens`;
  };

  // The map, its labels and its crosshair.
  const big = $("map"), over = $("cursor"), margin = 0.14;
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4].find((k) => n / k <= 44) || 1e5;
  const geometry = () => {
    // Paper has no size yet when the browser asks for it: draw large and let the canvas scale.
    const side = state.print ? 900 : over.clientWidth, ratio = state.print ? 2 : window.devicePixelRatio || 1, left = side * margin;
    return { side, ratio, left, size: side - left, unit: (side - left) / cells };
  };
  const source = document.createElement("canvas");
  const paintMap = () => {
    paint(source, state.layer, state.how);
    const g = geometry(), ink = state.print ? "#1c1d1f" : getComputedStyle(document.body).color;
    big.width = big.height = Math.round(g.side * g.ratio);
    const c = big.getContext("2d");
    c.scale(g.ratio, g.ratio);
    c.imageSmoothingEnabled = false;
    c.drawImage(source, g.left, 0, g.size, g.size);
    c.fillStyle = ink;
    const letters = Math.max(7, Math.min(11, g.unit * step * 0.9));
    c.font = `${letters}px ${getComputedStyle($("readout")).getPropertyValue("--mono")}`;
    c.textBaseline = "middle";
    c.globalAlpha = 0.8;
    for (let i = 0; i < n; i += step) {
      const at = (i / factor + 0.5) * g.unit, text = data.labels[i].length > 11 ? data.labels[i].slice(0, 10) + "…" : data.labels[i];
      c.textAlign = "right";
      c.fillText(text, g.left - 5, Math.max(at, letters / 2));
      c.save();
      c.translate(g.left + at, g.size + 5);
      c.rotate(-Math.PI / 2);
      c.fillText(text, 0, 0);
      c.restore();
    }
    const packed = packedMap();
    $("rule").textContent = (state.layer === "all" ? data.relative + "; " : "") + packed.rule + (exact ? "" : `; ${data.pooled}`);
    $("low").textContent = signed() ? show(-packed.limit) : "0";
    $("high").textContent = show(packed.limit);
    const bar = $("ramp"), colours = ramp();
    bar.width = colours.length;
    bar.height = 1;
    colours.forEach((colour, i) => {
      const pen = bar.getContext("2d");
      pen.fillStyle = colour;
      pen.fillRect(i, 0, 1, 1);
    });
    big.setAttribute("aria-label", `Implicit attention map, ${layerOf(state.layer).name}, ${data.words[state.how]}: ${n} by ${n} tokens. The table below lists its strongest entries.`);
    drawCursor();
  };
  const drawCursor = () => {
    const g = geometry();
    over.width = over.height = Math.round(g.side * g.ratio);
    const c = over.getContext("2d");
    c.scale(g.ratio, g.ratio);
    c.strokeStyle = getComputedStyle(document.body).color;
    c.lineWidth = 1;
    const y = (Math.floor(state.t / factor) + 0.5) * g.unit, x = g.left + (Math.floor(state.s / factor) + 0.5) * g.unit;
    c.globalAlpha = 0.55;
    c.beginPath();
    c.moveTo(g.left, y); c.lineTo(g.left + g.size, y);
    c.moveTo(x, 0); c.lineTo(x, g.size);
    c.stroke();
    c.globalAlpha = 1;
    c.strokeRect(x - Math.max(g.unit, 4) / 2 - 1, y - Math.max(g.unit, 4) / 2 - 1, Math.max(g.unit, 4) + 2, Math.max(g.unit, 4) + 2);
  };
  const around = (node, at, before, after) => {
    const space = data.apart ? " " : "";
    const from = Math.max(0, at - before), to = Math.min(n, at + after + 1);
    const mark = document.createElement("mark");
    mark.textContent = data.labels[at];
    node.replaceChildren((from ? "…" : "") + data.labels.slice(from, at).map((x) => x + space).join(""), mark, data.labels.slice(at + 1, to).map((x) => space + x).join("") + (to < n ? "…" : ""));
  };
  const valueAt = (t, s) => (exact || t !== n - 1 ? cell(numbers(packedMap()), Math.floor(t / factor), Math.floor(s / factor)) : rowOf(t)[s]);
  const describe = () => {
    const v = valueAt(state.t, state.s);
    around($("who"), state.t, 7, 0);
    around($("what"), state.s, 4, 4);
    $("distance").textContent = state.s > state.t ? "later than the reader: nothing to read" : state.s === state.t ? "0: the token itself" : `${state.t - state.s} tokens back`;
    $("value").textContent = show(v) + (Number.isNaN(v) ? "" : unit());
    spans.forEach((span, i) => span.classList.toggle("cursor", i === state.s));
    $("readout").replaceChildren();
    const b = document.createElement("b");
    b.textContent = data.labels[state.s];
    $("readout").append(`${state.s} `, b, state.s > state.t ? ": later than the reader" : `, ${state.t - state.s} tokens before the reader: ${show(v)}${unit()}`);
  };
  const point = (t, s) => {
    state.t = Math.min(n - 1, Math.max(0, t));
    state.s = Math.min(n - 1, Math.max(0, s));
    drawCursor();
    describe();
  };
  const read = (t) => {
    if (!exact) return;
    state.reader = t;
    paintText();
    point(t, Math.min(state.s, t));
  };

  // Small multiples.
  const thumbs = [...document.querySelectorAll(".thumbs button")];
  const paintThumbs = () => thumbs.forEach((b) => {
    paint(b.querySelector("canvas"), b.dataset.layer, state.how);
    b.setAttribute("aria-pressed", String(b.dataset.layer === state.layer));
  });
  const tables = [...document.querySelectorAll("[data-table]")];
  const redraw = () => {
    paintText();
    paintMap();
    paintThumbs();
    describe();
    tables.forEach((x) => (x.hidden = x.dataset.table !== state.layer));
  };
  const choose = (layer) => {
    state.layer = $("layer").value = layer;
    redraw();
  };

  // Hands: mouse, touch and keys.
  $("layer").addEventListener("change", (e) => choose(e.target.value));
  $("how").addEventListener("change", (e) => { state.how = e.target.value; redraw(); });
  $("last").addEventListener("click", () => read(n - 1));
  thumbs.forEach((b) => b.addEventListener("click", () => choose(b.dataset.layer)));
  const tokenOf = (e) => { const span = e.target.closest(".tok"); return span ? Number(span.dataset.i) : null; };
  const text = $("tokens");
  text.addEventListener("pointerover", (e) => { const i = tokenOf(e); if (i !== null) point(state.reader, i); });
  text.addEventListener("click", (e) => { const i = tokenOf(e); if (i !== null) read(i); });
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  text.addEventListener("keydown", (e) => {
    if (e.key === "Enter" || e.key === " ") read(state.s);
    else if (e.key === "Home") point(state.reader, 0);
    else if (e.key === "End") point(state.reader, n - 1);
    else if (moves[e.key]) point(state.reader, state.s + moves[e.key][0] * 10 + moves[e.key][1]);
    else return;
    e.preventDefault();
  });
  const cellAt = (e) => {
    const g = geometry(), box = over.getBoundingClientRect();
    const s = Math.floor((e.clientX - box.left - g.left) / g.unit) * factor, t = Math.floor((e.clientY - box.top) / g.unit) * factor;
    return s >= 0 && t >= 0 && s < n && t < n ? [t, s] : null;
  };
  over.addEventListener("pointermove", (e) => { const at = cellAt(e); if (at) point(...at); });
  over.addEventListener("click", (e) => { const at = cellAt(e); if (at) { point(...at); read(at[0]); } });
  over.addEventListener("keydown", (e) => {
    const far = e.shiftKey ? 10 : 1;
    if (e.key === "Enter" || e.key === " ") read(state.t);
    else if (moves[e.key]) point(state.t + moves[e.key][0] * far * factor, state.s + moves[e.key][1] * far * factor);
    else return;
    e.preventDefault();
  });
  const chart = document.querySelector("#norms svg");
  if (chart) {
    let at = n - 1;
    const cursor = chart.querySelector(".cursor"), left = Number(chart.dataset.left), right = Number(chart.dataset.right);
    const tell = (i) => {
      at = Math.min(n - 1, Math.max(0, i));
      const x = n > 1 ? left + ((right - left) * at) / (n - 1) : (left + right) / 2;
      cursor.setAttribute("d", `M${x.toFixed(1)} 18V340`);
      const values = data.norms.map(([name, curve]) => `${name} ${show(curve[at])}`).join(" · ");
      const b = document.createElement("b");
      b.textContent = data.labels[at];
      $("normvalue").replaceChildren(`after ${at} `, b, `: ${values}`);
    };
    chart.addEventListener("pointermove", (e) => {
      const box = chart.getBoundingClientRect(), x = ((e.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      tell(Math.round(((x - left) / (right - left)) * (n - 1)));
    });
    chart.addEventListener("keydown", (e) => { if (moves[e.key]) { tell(at + moves[e.key][1]); e.preventDefault(); } });
  }
  darkQuery.addEventListener("change", redraw);
  addEventListener("beforeprint", () => { state.print = true; redraw(); });
  addEventListener("afterprint", () => { state.print = false; redraw(); });
  addEventListener("resize", () => { if (!state.print) paintMap(); });
  if (!exact) $("last").disabled = true;
  redraw();
})();
