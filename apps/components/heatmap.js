// A causal map on a canvas, rows read and columns are read from, with the text beside it shaded by one row.
// Hover shows a value, a click or Enter picks the row's token.
// One ES module without dependencies; it is handed to the browser as it stands.

const LABEL_PX = 11;
const MAX_CELL_PX = 30;
const MAX_MAP_PX = 760;
const MIN_LABEL_STEP_PX = 12;
const TICK_GAP_PX = 5;
// Room for the upper half of the first row's label.
const TOP_PX = 7;
const HINT = "Point at a cell, or use the arrow keys on the map, to read its value. A click or Enter chooses the token that reads.";
// With magnitudes themselves as opacity, all but the strongest few tokens would look white.
const SHADE_POWER = 0.5;
// Full shade would drown light letters on a dark page.
const MAX_SHADE = { light: 1, dark: 0.6 };

const views = new WeakMap();

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  let view = views.get(parentElement);
  if (!view) {
    view = new CausalMap(parentElement);
    views.set(parentElement, view);
  }
  // A trigger, not a state: the same row may be picked twice with another choice in between.
  view.show(data, (target) => setTriggerValue("target", target));
  return () => {
    view.close();
    views.delete(parentElement);
  };
}

class CausalMap {
  constructor(root) {
    this.frame = root.querySelector(".frame");
    this.canvas = root.querySelector("canvas");
    this.ramp = root.querySelector(".ramp");
    this.low = root.querySelector(".low");
    this.high = root.querySelector(".high");
    this.unit = root.querySelector(".unit");
    this.readout = root.querySelector(".readout");
    this.who = root.querySelector(".who");
    this.strip = root.querySelector(".strip");
    this.cursor = null;
    this.observer = new ResizeObserver(() => this.data && this.draw());
    this.observer.observe(this.frame);
    this.canvas.onmousemove = (event) => this.move(this.cellAt(event));
    this.canvas.onmouseleave = () => this.move(null);
    this.strip.onmouseleave = () => this.move(null);
    this.canvas.onclick = (event) => this.pick(this.cellAt(event));
    this.canvas.onkeydown = (event) => this.key(event);
  }

  close() {
    this.observer.disconnect();
  }

  show(data, onPick) {
    this.data = data;
    this.onPick = onPick;
    this.values = decodeFloats(data.values);
    this.image = paint(this.values, data);
    if (this.cursor && this.cursor.row >= data.labels.length) this.cursor = null;
    this.canvas.setAttribute("aria-label", data.alt);
    const beyond = (sign) => (data.clipped ? sign : "");
    this.low.textContent = data.signed ? beyond("≤ ") + format(-data.limit) : "0";
    this.high.textContent = beyond("≥ ") + format(data.limit);
    this.unit.textContent = data.quantity;
    this.readout.textContent = HINT;
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
    span.onmouseenter = () => index <= this.reader() && this.move({ row: this.reader(), column: index });
    span.onclick = () => this.onPick(index);
    return span;
  }

  // The token whose row the text shows: under the cursor, else the chosen one.
  reader() {
    return this.cursor ? this.cursor.row : this.data.target;
  }

  shade() {
    const { names, shades, dark } = this.data;
    const n = names.length;
    const reader = this.reader();
    const row = this.values.subarray(reader * n, reader * n + reader + 1);
    const peak = row.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    this.who.textContent = `What token ${reader} “${names[reader]}” reads`;
    [...this.strip.children].forEach((span, i) => {
      const value = i <= reader && peak > 0 ? row[i] / peak : 0;
      const strength = Math.abs(value) ** SHADE_POWER * MAX_SHADE[dark ? "dark" : "light"];
      const colour = value < 0 ? shades.negative : shades.positive;
      span.style.background = value ? `rgb(${colour.join(" ")} / ${strength.toFixed(3)})` : "none";
      span.className = i === reader ? "reader" : i > reader ? "later" : i === this.cursor?.column ? "source" : "";
    });
  }

  draw() {
    const { labels, target } = this.data;
    const n = labels.length;
    const context = this.canvas.getContext("2d");
    const style = getComputedStyle(this.frame);
    const font = `${LABEL_PX}px ${style.fontFamily}`;
    context.font = font;
    const margin = Math.ceil(Math.max(...labels.map((label) => context.measureText(label).width))) + 2 * TICK_GAP_PX;
    const room = Math.min(this.frame.clientWidth - margin - 1, MAX_MAP_PX);
    if (room <= 0) return;
    const cell = Math.min(room / n, MAX_CELL_PX);
    const side = cell * n;
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
    context.drawImage(this.image, margin, 0, side, side);

    const ink = style.color;
    context.strokeStyle = ink;
    context.globalAlpha = 0.25;
    context.strokeRect(margin + 0.5, 0.5, side, side);
    context.globalAlpha = 1;
    this.drawLabels(context, font, ink);
    if (target !== null && target !== undefined) this.outlineRow(context, target, ink);
    if (this.cursor) this.drawCursor(context, ink);
    // A canvas says nothing about its content: these tell which picture it holds, and where its cells lie.
    this.canvas.dataset.drawn = this.data.title;
    this.canvas.dataset.cells = JSON.stringify({ left: margin, top: TOP_PX, side: cell });
  }

  drawLabels(context, font, ink) {
    const { labels, target } = this.data;
    const n = labels.length;
    const step = Math.max(1, Math.ceil(MIN_LABEL_STEP_PX / this.cell));
    const wanted = new Set();
    for (let i = 0; i < n; i += step) wanted.add(i);
    const keep = (special) => {
      if (special === null || special === undefined) return;
      // A special label replaces the regular ones that it would overlap.
      for (const i of [...wanted]) if (Math.abs(i - special) < step) wanted.delete(i);
      wanted.add(special);
    };
    const rows = (keep(target), this.cursor && keep(this.cursor.row), new Set(wanted));
    wanted.clear();
    for (let i = 0; i < n; i += step) wanted.add(i);
    const columns = (this.cursor && keep(this.cursor.column), wanted);
    context.fillStyle = ink;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const i of rows) {
      context.font = i === target || i === this.cursor?.row ? `bold ${font}` : font;
      context.fillText(labels[i], this.margin - TICK_GAP_PX, (i + 0.5) * this.cell);
    }
    for (const i of columns) {
      context.save();
      context.font = i === this.cursor?.column ? `bold ${font}` : font;
      context.translate(this.margin + (i + 0.5) * this.cell, n * this.cell + TICK_GAP_PX);
      context.rotate(-Math.PI / 2);
      context.fillText(labels[i], 0, 0);
      context.restore();
    }
  }

  outlineRow(context, row, ink) {
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    context.strokeRect(this.margin, row * this.cell, (row + 1) * this.cell, this.cell);
    context.lineWidth = 1;
  }

  drawCursor(context, ink) {
    const { row, column } = this.cursor;
    const x = this.margin + column * this.cell;
    const y = row * this.cell;
    context.fillStyle = ink;
    context.globalAlpha = 0.12;
    context.fillRect(this.margin, y, x - this.margin, this.cell);
    context.fillRect(x, y + this.cell, this.cell, this.data.labels.length * this.cell - y - this.cell);
    context.globalAlpha = 1;
    context.strokeStyle = ink;
    context.strokeRect(x, y, this.cell, this.cell);
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const n = this.data.labels.length;
    const column = Math.floor((event.clientX - box.left - this.margin) / this.cell);
    const row = Math.floor((event.clientY - box.top - TOP_PX) / this.cell);
    if (row < 0 || row >= n || column >= n) return null;
    // A row's label stands for its diagonal cell; the future is never read.
    return column < 0 || column > row ? { row, column: row } : { row, column };
  }

  move(cell) {
    const same = cell && this.cursor && cell.row === this.cursor.row && cell.column === this.cursor.column;
    if (same || (!cell && !this.cursor)) return;
    this.cursor = cell;
    this.readout.textContent = cell ? this.describe(cell) : HINT;
    this.shade();
    this.draw();
  }

  describe({ row, column }) {
    const { names, quantity } = this.data;
    const value = this.values[row * names.length + column];
    const from = row === column ? "itself" : `token ${column} “${names[column]}”, ${row - column} back`;
    return `Token ${row} “${names[row]}” reads ${from}: ${quantity} = ${format(value)}`;
  }

  pick(cell) {
    if (cell) this.onPick(cell.row);
  }

  key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const last = this.data.labels.length - 1;
    const at = this.cursor ?? { row: this.data.target ?? last, column: this.data.target ?? last };
    if (event.key === "Enter" || event.key === " ") this.pick(at);
    else if (event.key === "Escape") this.move(null);
    else if (event.key in moves) {
      const [down, right] = moves[event.key];
      const row = Math.min(last, Math.max(0, at.row + down));
      this.move({ row, column: Math.min(row, Math.max(0, at.column + right)) });
    } else return;
    event.preventDefault();
  }
}

function decodeFloats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function paint(values, { labels, limit, colours }) {
  const n = labels.length;
  const image = document.createElement("canvas");
  image.width = n;
  image.height = n;
  const context = image.getContext("2d");
  const pixels = context.createImageData(n, n);
  const stops = colours.map(parseColour);
  const middle = (stops.length - 1) / 2;
  for (let row = 0; row < n; row += 1) {
    // Pixels right of the diagonal stay transparent: the future is not zero, it is never read.
    for (let column = 0; column <= row; column += 1) {
      const value = values[row * n + column];
      if (!Number.isFinite(value)) continue;
      const share = limit > 0 ? Math.max(-1, Math.min(1, value / limit)) : 0;
      const place = middle + share * middle;
      const below = Math.min(Math.floor(place), stops.length - 2);
      const mix = place - below;
      const offset = 4 * (row * n + column);
      for (let k = 0; k < 3; k += 1) {
        pixels.data[offset + k] = stops[below][k] * (1 - mix) + stops[below + 1][k] * mix;
      }
      pixels.data[offset + 3] = 255;
    }
  }
  context.putImageData(pixels, 0, 0);
  return image;
}

function parseColour(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

function format(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 0.001 && size < 10000 ? value.toPrecision(3) : value.toExponential(2);
}
