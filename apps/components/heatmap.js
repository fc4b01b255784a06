// A causal map on a canvas, rows read and columns are read from, with the text beside it shaded by one row.
// Hover shows a value, dragging zooms, a click or Enter pins a pair of tokens.
// Together with grid.js and shared.js before it one ES module without dependencies, for two hosts: Streamlit calls the default function
// with a component, anywidget calls it without arguments and takes `render` from what it returns.

const LABEL_PX = 11;
const MAX_CELL_PX = 30;
const MAX_MAP_PX = 760;
const MIN_LABEL_STEP_PX = 12;
const TICK_GAP_PX = 5;
// Room for the upper half of the first row's label.
const TOP_PX = 7;
// A shorter drag is a click with an unsteady hand.
const DRAG_PX = 5;
const LEAST_TOKENS = 4;
const LEAP = 10;
const HINT = "Point at a cell, or use the arrow keys on the map, to read its value.";
const PIN_HINT = "A click or Enter pins the pair; dragging, + and − zoom, 0 shows all.";
const ZOOM_HINT = "Dragging, + and − zoom, 0 shows all.";
// With magnitudes themselves as opacity, all but the strongest few tokens would look white.
const SHADE_POWER = 0.5;
// Full shade would drown light letters on a dark page.
const MAX_SHADE = { light: 1, dark: 0.55 };

const views = new WeakMap();

export default function (component) {
  if (!component) return { render };
  const { data, parentElement, setTriggerValue } = component;
  let view = views.get(parentElement);
  if (!view) {
    view = new CausalMap(parentElement);
    views.set(parentElement, view);
  }
  // Triggers, not states: the same row may be picked twice with another choice in between.
  view.show(data, (name, value) => setTriggerValue(name, value));
  return () => {
    view.close();
    views.delete(parentElement);
  };
}

function render({ model, el }) {
  el.innerHTML = model.get("_frame");
  const view = new CausalMap(el);
  const tell = (name, value) => {
    if (name === "pin") model.set({ target: value[0], source: value[1] });
    else model.set(name, value);
    model.save_changes();
  };
  const draw = () => view.show({ ...model.get("data"), target: model.get("target"), source: model.get("source") }, tell);
  for (const name of ["data", "target", "source"]) model.on(`change:${name}`, draw);
  draw();
  return () => view.close();
}

class CausalMap {
  constructor(root) {
    for (const name of ["frame", "ramp", "low", "high", "unit", "readout", "who", "strip", "whole", "part"]) {
      this[name] = root.querySelector(`.${name}`);
    }
    this.canvas = root.querySelector("canvas");
    this.cursor = null;
    this.drag = null;
    this.shared = new SharedCursor((pair) => this.follow(pair));
    this.observer = new ResizeObserver(() => this.data && this.draw());
    this.observer.observe(this.frame);
    this.canvas.onpointerdown = (event) => this.press(event);
    this.canvas.onpointermove = (event) => this.hover(event);
    this.canvas.onpointerup = (event) => this.release(event);
    this.canvas.onpointerleave = () => !this.drag && this.move(null);
    this.canvas.onkeydown = (event) => this.key(event);
    this.strip.onmouseleave = () => this.move(null);
    this.whole.onclick = () => this.zoom(null);
  }

  close() {
    this.observer.disconnect();
    this.unlight();
    this.shared.leave();
  }

  show(data, tell) {
    const same = this.data && this.data.map === data.map;
    this.data = data;
    this.tell = tell;
    this.shared.join(data.group);
    this.grid = new Grid(data);
    this.row = decode(data.row, Float32Array);
    this.image = paint(this.grid, data);
    if (!same) {
      this.view = { ...this.grid.window };
      this.unlight();
    }
    this.canvas.setAttribute("aria-label", data.alt);
    const beyond = (sign) => (data.clipped ? sign : "");
    this.low.textContent = data.signed ? beyond("≤ ") + format(-data.limit) : "0";
    this.high.textContent = beyond("≥ ") + format(data.limit);
    this.unit.textContent = data.quantity;
    this.readout.textContent = this.describe(this.cursor);
    this.strip.classList.toggle("spaced", data.spaced);
    this.strip.replaceChildren(...data.text.map((token, i) => this.span(token, i)));
    const colours = data.signed ? data.colours : data.colours.slice((data.colours.length - 1) / 2);
    this.ramp.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
    this.shade();
    this.draw();
  }

  span(token, index) {
    const span = document.createElement("span");
    span.textContent = token;
    span.onmouseenter = () => index <= this.reader() && this.move(this.grid.cellOf(this.reader(), index));
    span.onclick = () => this.data.pins && this.tell("target", index);
    return span;
  }

  // The token whose row the text shows: under the cursor where every row is here, else the chosen one.
  reader() {
    return this.cursor && this.grid.factor === 1 ? this.grid.pair(this.cursor).t : this.data.target;
  }

  valueInRow(reader, s) {
    return reader === this.data.target ? this.row[s] : this.grid.at({ row: reader, column: s });
  }

  shade() {
    const { names, shades, dark, source } = this.data;
    const reader = this.reader();
    const row = Array.from({ length: reader + 1 }, (_, s) => this.valueInRow(reader, s));
    const peak = row.reduce((most, value) => Math.max(most, Math.abs(value) || 0), 0);
    const read = this.cursor ? this.grid.pair(this.cursor).s : source;
    this.who.textContent = `What token ${reader} “${names[reader]}” reads`;
    [...this.strip.children].forEach((span, i) => {
      const value = i <= reader && peak > 0 ? row[i] / peak || 0 : 0;
      const strength = Math.abs(value) ** SHADE_POWER * MAX_SHADE[dark ? "dark" : "light"];
      const colour = value < 0 ? shades.negative : shades.positive;
      span.style.background = value ? `rgb(${colour.join(" ")} / ${strength.toFixed(3)})` : "none";
      span.className = i === reader ? "reader" : i > reader ? "later" : i === read ? "source" : "";
    });
  }

  draw() {
    const { labels } = this.data;
    const { t, s, size } = this.view;
    const context = this.canvas.getContext("2d");
    const style = getComputedStyle(this.frame);
    const font = `${LABEL_PX}px ${style.fontFamily}`;
    context.font = font;
    const shown = [...labels.slice(t, t + size), ...labels.slice(s, s + size)];
    const margin = Math.ceil(Math.max(...shown.map((label) => context.measureText(label).width))) + 2 * TICK_GAP_PX;
    const room = Math.min(this.frame.clientWidth - margin - 1, MAX_MAP_PX);
    if (room <= 0) return;
    const cell = Math.min(room / size, MAX_CELL_PX);
    const side = cell * size;
    this.cell = cell;
    this.margin = margin;

    const scale = window.devicePixelRatio || 1;
    const width = margin + side + 1;
    const height = TOP_PX + side + margin + 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    context.scale(scale, scale);
    context.translate(0, TOP_PX);
    context.imageSmoothingEnabled = false;
    const { factor, window: all } = this.grid;
    const part = [(s - all.s) / factor, (t - all.t) / factor, size / factor, size / factor];
    context.drawImage(this.image, ...part, margin, 0, side, side);

    const ink = style.color;
    context.strokeStyle = ink;
    context.globalAlpha = 0.25;
    context.strokeRect(margin + 0.5, 0.5, side, side);
    context.globalAlpha = 1;
    this.drawLabels(context, font, ink);
    context.save();
    context.beginPath();
    context.rect(margin - 1, -1, side + 2, side + 2);
    context.clip();
    this.drawPinned(context, ink);
    if (this.cursor) this.drawCursor(context, ink);
    if (this.drag?.to) this.drawBrush(context, ink);
    context.restore();
    const zoomed = size < labels.length;
    this.whole.hidden = !zoomed;
    const words = `Tokens ${t} to ${t + size - 1} read from ${s} to ${s + size - 1}. `;
    const pooled = factor > 1 ? `Each cell is the largest magnitude of ${factor} × ${factor} entries. ` : "";
    this.part.textContent = (zoomed ? words : "") + pooled;
    // A canvas says nothing about its content: these tell which picture it holds, and where its cells lie.
    this.canvas.dataset.drawn = this.data.title;
    this.canvas.dataset.cells = JSON.stringify({ left: margin, top: TOP_PX, side: cell, ...this.view });
  }

  drawLabels(context, font, ink) {
    const { labels, target, source } = this.data;
    const { t, s, size } = this.view;
    const at = this.cursor ? this.grid.pair(this.cursor) : null;
    context.fillStyle = ink;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const i of this.wanted(t, [target, at?.t])) {
      context.font = i === target || i === at?.t ? `bold ${font}` : font;
      context.fillText(labels[i], this.margin - TICK_GAP_PX, (i - t + 0.5) * this.cell);
    }
    for (const i of this.wanted(s, [source, at?.s])) {
      context.save();
      context.font = i === source || i === at?.s ? `bold ${font}` : font;
      context.translate(this.margin + (i - s + 0.5) * this.cell, size * this.cell + TICK_GAP_PX);
      context.rotate(-Math.PI / 2);
      context.fillText(labels[i], 0, 0);
      context.restore();
    }
  }

  // Positions to label from `first` on: every so many, and the special ones in place of those they would overlap.
  wanted(first, specials) {
    const step = Math.max(1, Math.ceil(MIN_LABEL_STEP_PX / this.cell));
    const end = first + this.view.size;
    const found = new Set();
    for (let i = first; i < end; i += step) found.add(i);
    for (const special of specials) {
      // null >= 0 holds in this language.
      if (!Number.isInteger(special) || special < first || special >= end) continue;
      for (const i of [...found]) if (Math.abs(i - special) < step && !specials.includes(i)) found.delete(i);
      found.add(special);
    }
    return found;
  }

  drawPinned(context, ink) {
    const { target, source } = this.data;
    const { t, s } = this.view;
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    const y = (target - t) * this.cell;
    context.strokeRect(this.margin - s * this.cell, y, (target + 1) * this.cell, this.cell);
    if (source !== null && source !== undefined && source <= target) {
      const x = this.margin + (source - s) * this.cell;
      context.lineWidth = 2.5;
      context.strokeRect(x - 1, y - 1, this.cell + 2, this.cell + 2);
    }
    context.lineWidth = 1;
  }

  drawCursor(context, ink) {
    const { factor, window: all } = this.grid;
    const wide = factor * this.cell;
    const x = this.margin + (all.s + this.cursor.column * factor - this.view.s) * this.cell;
    const y = (all.t + this.cursor.row * factor - this.view.t) * this.cell;
    context.fillStyle = ink;
    context.globalAlpha = 0.12;
    context.fillRect(this.margin, y, x - this.margin, wide);
    context.fillRect(x, y + wide, wide, this.view.size * this.cell - y - wide);
    context.globalAlpha = 1;
    context.strokeStyle = ink;
    context.strokeRect(x, y, wide, wide);
  }

  drawBrush(context, ink) {
    const { from, to } = this.drag;
    context.strokeStyle = ink;
    context.setLineDash([4, 3]);
    const [x, y] = [Math.min(from.x, to.x), Math.min(from.y, to.y) - TOP_PX];
    context.strokeRect(x, y, Math.abs(to.x - from.x), Math.abs(to.y - from.y));
    context.setLineDash([]);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  // The token pair under a point, whether or not the second comes before the first; null outside the map.
  pairAt({ x, y }) {
    const { t, s, size } = this.view;
    const column = Math.floor((x - this.margin) / this.cell);
    const row = Math.floor((y - TOP_PX) / this.cell);
    return row < 0 || row >= size || column >= size ? null : { t: t + row, s: column < 0 ? -1 : s + column };
  }

  cellAt(event) {
    const at = this.pairAt(this.point(event));
    if (!at) return null;
    // A row's label stands for its diagonal cell; the future is never read.
    return this.grid.cellOf(at.t, at.s < 0 || at.s > at.t ? at.t : at.s);
  }

  press(event) {
    if (event.button !== 0) return;
    this.drag = { from: this.point(event), to: null };
    this.canvas.setPointerCapture(event.pointerId);
  }

  hover(event) {
    if (!this.drag) return this.move(this.cellAt(event));
    const to = this.point(event);
    const { from } = this.drag;
    if (Math.hypot(to.x - from.x, to.y - from.y) < DRAG_PX) return;
    this.drag.to = to;
    this.draw();
  }

  release(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    if (drag.to) this.brush(drag);
    else this.pin(this.cellAt(event));
  }

  brush({ from, to }) {
    const { t, s, size } = this.view;
    const inside = (x, low) => Math.min(Math.max(Math.floor(x / this.cell), 0), size - 1) + low;
    const rows = [from.y - TOP_PX, to.y - TOP_PX].map((y) => inside(y, t)).sort((a, b) => a - b);
    const columns = [from.x - this.margin, to.x - this.margin].map((x) => inside(x, s)).sort((a, b) => a - b);
    const wide = Math.max(rows[1] - rows[0], columns[1] - columns[0]) + 1;
    this.zoom({ t: rows[0], s: columns[0], size: wide });
  }

  // Show a square of the map, all of it for null. Where cells were pooled, the exact ones are asked for.
  zoom(wanted) {
    const n = this.data.labels.length;
    const size = Math.min(n, Math.max(wanted?.size ?? n, LEAST_TOKENS));
    const clip = (x) => Math.min(Math.max(x, 0), n - size);
    this.view = { t: clip(wanted?.t ?? 0), s: clip(wanted?.s ?? 0), size };
    this.unlight();
    const { window: all, factor } = this.grid;
    const { t, s } = this.view;
    const here = t >= all.t && s >= all.s && t + size <= all.t + all.size && s + size <= all.s + all.size;
    if (!here || factor > 1) this.tell("window", [t, s, size]);
    // What is not here yet is drawn when it comes.
    if (!here) this.view = { ...all };
    this.draw();
  }

  // The cursor goes to a cell, and those of the linked maps to the same pair of tokens.
  move(cell) {
    if (this.place(cell)) this.shared.tell(cell && this.grid.pair(cell));
  }

  // No cursor any more, here and in the linked maps; whoever calls draws.
  unlight() {
    if (this.cursor) this.shared.tell(null);
    this.cursor = null;
  }

  // A linked map points at a pair: lit where it is shown here, nothing where it is not.
  follow(pair) {
    if (!this.data) return;
    const { t, s, size } = this.view;
    const shown = pair && pair.t >= t && pair.t < t + size && pair.s >= s && pair.s < s + size;
    this.place(shown ? this.grid.cellOf(pair.t, pair.s) : null);
  }

  // Light a cell, null for none; false where it is lit already.
  place(cell) {
    const same = cell && this.cursor && cell.row === this.cursor.row && cell.column === this.cursor.column;
    if (same || (!cell && !this.cursor)) return false;
    this.cursor = cell;
    this.readout.textContent = this.describe(cell);
    this.shade();
    this.draw();
    return true;
  }

  describe(cell) {
    const { names, quantity, pins } = this.data;
    if (!cell) return `${HINT} ${pins ? PIN_HINT : ZOOM_HINT}`;
    const { t, s } = this.grid.pair(cell);
    const { factor } = this.grid;
    const from = t === s ? "itself" : `token ${s} “${names[s]}”, ${t - s} back`;
    const pooled = factor > 1 ? `Largest of ${factor} × ${factor}: ` : "";
    return `${pooled}Token ${t} “${names[t]}” reads ${from}: ${quantity} = ${format(this.grid.at(cell))}`;
  }

  pin(cell) {
    if (!cell || !this.data.pins) return;
    const { t, s } = this.grid.pair(cell);
    this.tell("pin", [t, s]);
  }

  key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const { target, source } = this.data;
    const at = this.cursor ?? this.grid.cellOf(...this.nearest(target, source ?? target));
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") this.pin(at);
    else if (event.key === "Escape") this.move(null);
    else if (event.key === "0") this.zoom(null);
    else if (event.key === "+" || event.key === "-" || event.key === "−") this.zoomAround(at, event.key === "+" ? 0.5 : 2);
    else if (event.key in moves) {
      const [down, right] = moves[event.key].map((step) => step * (event.shiftKey ? LEAP : 1));
      this.move(this.stay({ row: at.row + down, column: at.column + right }));
    } else return;
    event.preventDefault();
  }

  // The cell kept inside what is shown, and not right of the diagonal.
  stay({ row, column }) {
    const { factor, window: all } = this.grid;
    const range = (first) => [Math.floor(first / factor), Math.ceil((first + this.view.size) / factor) - 1];
    const clip = (x, [low, high]) => Math.min(Math.max(x, low), high);
    const kept = clip(row, range(this.view.t - all.t));
    const columns = range(this.view.s - all.s);
    return { row: kept, column: clip(Math.min(column, this.grid.last(kept)), columns) };
  }

  // A pair moved inside what is shown.
  nearest(t, s) {
    const clip = (x, low) => Math.min(Math.max(x, low), low + this.view.size - 1);
    const row = clip(t, this.view.t);
    return [row, Math.min(row, clip(s, this.view.s))];
  }

  zoomAround(cell, factor) {
    const { t, s } = this.grid.pair(cell);
    const size = Math.round(this.view.size * factor);
    const half = Math.floor(size / 2);
    this.zoom({ t: t - half, s: s - half, size });
    if (this.grid.factor === 1) this.move(this.stay(this.grid.cellOf(t, s)));
  }
}
