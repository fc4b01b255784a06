// The numbers behind the map, and their colours. Stands before heatmap.js in one module.

// The numbers that are here: a square window of the map, its cells pooled by `factor`.
class Grid {
  constructor({ values, where, window, factor, triangle }) {
    const [t, s, size] = window;
    this.window = { t, s, size };
    this.factor = factor;
    this.triangle = triangle;
    this.side = Math.ceil(size / factor);
    this.values = decode(values, Float32Array);
    // Where in its block a pooled cell's value stands.
    this.where = where ? decode(where, Uint16Array) : null;
  }

  index({ row, column }) {
    return this.triangle ? (row * (row + 1)) / 2 + column : row * this.side + column;
  }

  at(cell) {
    return this.values[this.index(cell)];
  }

  // Last column of a row that holds a value.
  last(row) {
    const t = Math.min(this.window.t + (row + 1) * this.factor, this.window.t + this.window.size) - 1;
    return Math.min(this.side - 1, Math.floor((t - this.window.s) / this.factor));
  }

  cellOf(t, s) {
    return { row: Math.floor((t - this.window.t) / this.factor), column: Math.floor((s - this.window.s) / this.factor) };
  }

  // The tokens of a cell; of a pooled one, those of its largest entry.
  pair(cell) {
    const inside = this.where ? this.where[this.index(cell)] : 0;
    return {
      t: this.window.t + cell.row * this.factor + Math.floor(inside / this.factor),
      s: this.window.s + cell.column * this.factor + (inside % this.factor),
    };
  }
}

function decode(base64, Kind) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Kind(bytes.buffer);
}

function paint(grid, { limit, colours }) {
  const { side } = grid;
  const image = document.createElement("canvas");
  image.width = side;
  image.height = side;
  const context = image.getContext("2d");
  const pixels = context.createImageData(side, side);
  const stops = colours.map(parseColour);
  const middle = (stops.length - 1) / 2;
  for (let row = 0; row < side; row += 1) {
    // Pixels right of the diagonal stay transparent: the future is not zero, it is never read.
    const last = grid.last(row);
    for (let column = 0; column <= last; column += 1) {
      const value = grid.values[grid.index({ row, column })];
      if (!Number.isFinite(value)) continue;
      const share = limit > 0 ? Math.max(-1, Math.min(1, value / limit)) : 0;
      const place = middle + share * middle;
      const below = Math.min(Math.floor(place), stops.length - 2);
      const mix = place - below;
      const offset = 4 * (row * side + column);
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
