// One cursor for several maps. Stands before heatmap.js in one module; components meet on the document, without a server.

const POINTED = "ssmlens-pointed";

// The part that one map takes in its group: what it points at the others hear, and the other way round.
class SharedCursor {
  constructor(heard) {
    this.group = null;
    this.listen = (event) => {
      const { from, group, pair } = event.detail;
      if (from !== this && group === this.group) heard(pair);
    };
  }

  // Maps of one group share their cursor; null is no group.
  join(group) {
    if (group === this.group) return;
    this.leave();
    this.group = group ?? null;
    if (this.group !== null) document.addEventListener(POINTED, this.listen);
  }

  // The pair of tokens {t, s} that is pointed at, null for none.
  tell(pair) {
    if (this.group === null) return;
    document.dispatchEvent(new CustomEvent(POINTED, { detail: { from: this, group: this.group, pair } }));
  }

  leave() {
    document.removeEventListener(POINTED, this.listen);
    this.group = null;
  }
}
