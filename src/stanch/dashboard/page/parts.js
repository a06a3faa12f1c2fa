// The pieces a page is made of. Text comes in as text and nothing else: no string ever becomes HTML here, and the page's
// policy (trusted types) would not let it.

export function element(tag, { classes, text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Touches the page only where something changed: what is selected, focused or read aloud stays. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** A bar that is as long as a share, beside its figure. */
export function bar(cell, share, text) {
  let track = cell.firstElementChild;
  if (!track) {
    track = element("span", { classes: "bar", "aria-hidden": "true" }, element("span"));
    cell.append(track, element("span", { classes: "figure" }));
  }
  track.firstElementChild.style.inlineSize = `${(Math.min(1, Math.max(0, share || 0)) * 100).toFixed(1)}%`;
  write(cell.lastElementChild, text);
}

const FEW = 8;

/**
 * A table that is sorted by the buttons in its head, and keeps each row's element by its key.
 *
 * A column has `name`, `label`, `text(row)`; and, where it makes sense, `sort(row)`, `kind` ("number", "code", "wide"),
 * `hint`, and `draw(cell, row)` instead of `text`.
 */
export class Table {
  #columns;
  #key;
  #sorted;
  #down = true;
  #rows = [];
  #elements = new Map();
  #all = false;
  #body = element("tbody");
  #table;
  #empty;
  #more = element("button", { classes: "more", type: "button", hidden: "" });
  #warns;

  constructor(place, { columns, key, sorted, empty, caption, warns = () => null }) {
    this.#columns = columns;
    this.#key = key;
    this.#sorted = columns.find((column) => column.name === sorted);
    this.#warns = warns;
    const head = element("tr", {}, ...columns.map((column) => this.#head(column)));
    this.#table = element(
      "table",
      {},
      element("caption", { classes: "unseen", text: caption }),
      element("thead", {}, head),
      this.#body,
    );
    this.#empty = element("p", { classes: "empty", text: empty });
    this.#more.addEventListener("click", () => {
      this.#all = !this.#all;
      this.draw(this.#rows);
    });
    place.append(this.#table, this.#empty, this.#more);
  }

  #head(column) {
    const head = element("th", { scope: "col", classes: column.kind ?? "" });
    if (!column.sort) {
      head.textContent = column.label;
      return head;
    }
    const button = element("button", { type: "button", text: column.label });
    if (column.hint) button.title = column.hint;
    button.addEventListener("click", () => {
      this.#down = this.#sorted === column ? !this.#down : column.kind === "number";
      this.#sorted = column;
      this.draw(this.#rows);
    });
    head.append(button);
    column.head = head;
    return head;
  }

  draw(rows) {
    this.#rows = rows;
    for (const column of this.#columns) {
      const order = this.#down ? "descending" : "ascending";
      if (column.head) mark(column.head, "aria-sort", column === this.#sorted ? order : null);
    }
    const value = this.#sorted.sort;
    const sorted = rows
      .map((row) => [value(row), row])
      .sort(([one], [other]) => (one < other ? -1 : one > other ? 1 : 0) * (this.#down ? -1 : 1))
      .map(([, row]) => row);
    const shown = this.#all ? sorted : sorted.slice(0, FEW);
    const kept = new Map();
    shown.forEach((row, place) => {
      const key = this.#key(row, place);
      const line = this.#elements.get(key) ?? this.#line();
      kept.set(key, line);
      this.#fill(line, row);
      if (this.#body.children[place] !== line) this.#body.insertBefore(line, this.#body.children[place] ?? null);
    });
    for (const [key, line] of this.#elements) if (!kept.has(key)) line.remove();
    this.#elements = kept;
    mark(this.#table, "hidden", rows.length ? null : "");
    mark(this.#table, "data-all", this.#all ? "" : null);
    mark(this.#empty, "hidden", rows.length ? "" : null);
    mark(this.#more, "hidden", rows.length > FEW ? null : "");
    write(this.#more, this.#all ? `Show the first ${FEW}` : `Show all ${rows.length}`);
  }

  #line() {
    const cells = this.#columns.map((column) => {
      const cell = element("td", { classes: column.kind ?? "", "data-label": column.label });
      cell.append(element("span", { classes: "value" }));
      return cell;
    });
    return element("tr", {}, ...cells);
  }

  #fill(line, row) {
    mark(line, "data-warns", this.#warns(row));
    this.#columns.forEach((column, place) => {
      const value = line.children[place].firstElementChild;
      if (column.draw) column.draw(value, row);
      else write(value, column.text(row));
    });
  }
}
