"use strict";
// Tables of cases: sorted by a click on a heading, filtered by a text, a page at a time.
// Rows stand in the block that a table names; a cell is a text, a number or null.

const PAGE_ROWS = 50;

class CaseRows {
  constructor(root) {
    const { columns, rows, prefix, without } = JSON.parse(document.getElementById(root.dataset.rows).textContent);
    Object.assign(this, { root, columns, rows, prefix, page: 0, column: null, rising: true });
    this.without = without && new Set(without);
    this.body = root.querySelector("tbody");
    this.filter = root.querySelector("input[type=search]");
    this.filter.addEventListener("input", () => { this.page = 0; this.show(); });
    root.querySelectorAll("th button").forEach((button, column) => {
      button.addEventListener("click", () => {
        this.rising = this.column === column ? !this.rising : true;
        this.column = column;
        this.page = 0;
        this.show();
      });
    });
    for (const button of root.querySelectorAll("button[data-turn]")) {
      button.addEventListener("click", () => { this.page += Number(button.dataset.turn); this.show(); });
    }
    this.show();
  }

  chosen() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.rows.map((row, index) => ({ row, index })).filter(({ row }) => {
      const text = row.filter((cell) => typeof cell === "string").join(" ").toLowerCase();
      return words.every((word) => this.fits(word, row, text));
    });
    if (this.column === null) return found;
    const { column, rising } = this;
    return found.sort((one, other) => {
      const [a, b] = [one.row[column], other.row[column]];
      if (a === null || b === null) return (a === null) - (b === null);  // what is undefined comes last, either way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
      return rising ? order : -order;
    });
  }

  // "dice<0.5" compares a column, any other word is looked for in the texts.
  fits(word, row, text) {
    const match = /^(.+?)(<=|>=|<|>|=)(-?[\d.]+)$/.exec(word);
    const column = match ? this.columns.findIndex(({ title }) => title.toLowerCase().replace(/\s/g, "").startsWith(match[1])) : -1;
    if (column < 0) return text.includes(word);
    const [value, limit] = [row[column], Number(match[3])];
    if (typeof value !== "number") return false;
    return { "<": value < limit, ">": value > limit, "<=": value <= limit, ">=": value >= limit, "=": value === limit }[match[2]];
  }

  show() {
    const found = this.chosen();
    const pages = Math.max(Math.ceil(found.length / PAGE_ROWS), 1);
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    const first = this.page * PAGE_ROWS;
    this.body.replaceChildren(...found.slice(first, first + PAGE_ROWS).map(({ row, index }) => this.line(row, index)));
    this.root.querySelector(".count").textContent = found.length
      ? `${first + 1} to ${Math.min(first + PAGE_ROWS, found.length)} of ${found.length}`
      : "nothing fits";
    for (const button of this.root.querySelectorAll("button[data-turn]")) {
      const to = this.page + Number(button.dataset.turn);
      button.disabled = to < 0 || to >= pages;
    }
    this.root.querySelectorAll("th").forEach((heading, column) => {
      if (column === this.column) heading.setAttribute("aria-sort", this.rising ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
    });
  }

  // Address of a case's page; "" where it has none, or a name that is no Unicode.
  link(name, index) {
    if (!this.without || this.without.has(index)) return "";
    try {
      return `${this.prefix}${encodeURIComponent(name)}.html`;
    } catch {
      return "";
    }
  }

  line(row, index) {
    const line = document.createElement("tr");
    row.forEach((cell, column) => {
      const box = document.createElement(column === 0 ? "th" : "td");
      if (column === 0) box.scope = "row";
      const text = cell === null ? "-" : String(cell);
      if (typeof cell === "number" || cell === null) box.className = "number";
      const link = column === 0 && this.link(cell, index);
      if (link) {
        const anchor = document.createElement("a");
        anchor.href = link;
        anchor.textContent = text;
        box.append(anchor);
      } else {
        box.textContent = text;
      }
      line.append(box);
    });
    return line;
  }
}

for (const root of document.querySelectorAll("[data-rows]")) new CaseRows(root);
