// Running text, each token shaded by its score. Hover or the arrow keys read a score; a click or Enter chooses a token.
// One ES module without dependencies; it is handed to the browser as it stands.

// With magnitudes themselves as opacity, all but the strongest few tokens would look white.
const SHADE_POWER = 0.5;
// Full shade would drown light letters on a dark page.
const MAX_SHADE = { light: 1, dark: 0.55 };
const LEAP = 10;
const STOPS = 9;
// Share of the limit from which a negative score is underlined as well: nobody sees the colour of less.
const LEAST_SHARE = 0.05;

const views = new WeakMap();

export default function ({ data, parentElement, setTriggerValue }) {
  let view = views.get(parentElement);
  if (!view) {
    view = new TokenStrip(parentElement);
    views.set(parentElement, view);
  }
  view.show(data, (name, index) => setTriggerValue(name, index));
  return () => views.delete(parentElement);
}

class TokenStrip {
  constructor(root) {
    for (const name of ["picks", "tokens", "low", "ramp", "high", "unit", "readout"]) {
      this[name] = root.querySelector(`.${name}`);
    }
    this.cursor = null;
    this.mode = null;
    this.tokens.onmouseleave = () => this.move(null);
    this.tokens.onkeydown = (event) => this.key(event);
  }

  show(data, tell) {
    this.data = data;
    this.tell = tell;
    const bytes = Uint8Array.from(atob(data.scores), (character) => character.charCodeAt(0));
    this.scores = new Float32Array(bytes.buffer);
    const { picks, text } = data;
    if (!picks.includes(this.mode)) this.mode = picks[0] ?? null;
    if (this.cursor >= text.length) this.cursor = null;
    this.drawPicks();
    this.tokens.setAttribute("aria-label", data.alt);
    this.tokens.classList.toggle("spaced", data.spaced);
    this.tokens.classList.toggle("still", picks.length === 0);
    this.tokens.replaceChildren(...text.map((token, i) => this.span(token, i)));
    this.low.textContent = data.signed ? format(-data.limit) : "0";
    this.high.textContent = format(data.limit);
    this.unit.textContent = data.quantity;
    const ends = Array.from({ length: STOPS }, (_, i) => (i / (STOPS - 1)) * (data.signed ? 2 : 1) - (data.signed ? 1 : 0));
    this.ramp.style.background = `linear-gradient(to right, ${ends.map((x) => this.shade(x)).join(", ")})`;
    this.mark();
    this.say();
    this.tokens.dataset.drawn = data.title;
  }

  drawPicks() {
    const { picks } = this.data;
    const choices = picks.length > 1 ? picks : [];
    this.picks.replaceChildren(
      ...choices.map((pick) => {
        const label = document.createElement("label");
        const input = document.createElement("input");
        input.type = "radio";
        input.name = "pick";
        input.checked = pick === this.mode;
        input.onchange = () => (this.mode = pick);
        label.append(input, `a click chooses the ${pick}`);
        return label;
      }),
    );
  }

  span(token, index) {
    const span = document.createElement("span");
    span.textContent = token;
    const share = this.data.limit > 0 ? this.scores[index] / this.data.limit : 0;
    span.style.background = this.shade(share);
    span.onmouseenter = () => this.move(index);
    span.onclick = () => this.pick(index);
    return span;
  }

  // The colour of a share of the limit, from -1 to 1.
  shade(share) {
    if (!share || !Number.isFinite(share)) return "rgb(0 0 0 / 0)";
    const { shades, dark } = this.data;
    const strength = Math.min(1, Math.abs(share)) ** SHADE_POWER * MAX_SHADE[dark ? "dark" : "light"];
    return `rgb(${(share < 0 ? shades.negative : shades.positive).join(" ")} / ${strength.toFixed(3)})`;
  }

  mark() {
    const { target, source, last, signed, limit } = this.data;
    [...this.tokens.children].forEach((span, i) => {
      const classes = [];
      if (i === target) classes.push("target");
      if (i === source) classes.push("source");
      if (last !== null && i > last) classes.push("later");
      if (i === this.cursor) classes.push("cursor");
      if (signed && this.scores[i] < -LEAST_SHARE * limit) classes.push("minus");
      span.className = classes.join(" ");
    });
  }

  move(index) {
    if (index === this.cursor) return;
    this.cursor = index;
    this.mark();
    this.say();
  }

  say() {
    const { names, details, quantity, hint } = this.data;
    const i = this.cursor;
    const more = i !== null && details ? `. ${details[i]}` : "";
    this.readout.textContent = i === null ? hint : `Token ${i} “${names[i]}”: ${quantity} = ${format(this.scores[i])}${more}`;
  }

  pick(index) {
    if (this.mode) this.tell(this.mode, index);
  }

  key(event) {
    const last = this.data.text.length - 1;
    const at = this.cursor ?? this.data.target ?? last;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -LEAP, ArrowDown: LEAP, Home: -last, End: last };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") this.pick(at);
    else if (event.key === "Escape") this.move(null);
    else if (event.key in moves) {
      this.move(Math.min(last, Math.max(0, at + moves[event.key])));
      this.tokens.children[this.cursor].scrollIntoView({ block: "nearest" });
    } else return;
    event.preventDefault();
  }
}

function format(value) {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return "not defined";
  const size = Math.abs(value);
  return size >= 0.001 && size < 10000 ? value.toPrecision(3) : value.toExponential(2);
}
