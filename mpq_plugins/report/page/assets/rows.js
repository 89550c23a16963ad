// The layers as a table: sorted by any column, and only what is seen of it is there.

import { element } from "./dom.js";
import { choiceText, general, grouped, nameText, percent } from "./format.js";
import { averageWidth } from "./sizes.js";

const ROW = 34; // pixels, as the style has it
const FIXED = new Set(["#", "layer", "weights", "shape"]); // columns that no plan changes
const HIGHEST = 460; // pixels of the box
const BEYOND = 6; // rows above and below what is seen

/** Columns: what is shown, what is sorted by, and whether it is a number. */
function columnsOf(page) {
  const { table } = page;
  const share = (layer) => page.plan?.bits?.each?.[layer.place] ?? null;
  const choice = (layer) => page.plan?.choices?.[layer.place];
  const error = (layer, name) => {
    const column = page.columnOf(choice(layer));
    return column === null ? null : table.errors[name][layer.place][column];
  };
  return [
    { name: "#", number: true, value: (layer) => layer.place, text: (layer) => String(layer.place + 1) },
    { name: "layer", value: (layer) => layer.name, text: (layer) => nameText(layer.name), wide: true },
    { name: "bits", number: true, value: (layer) => (choice(layer) === undefined ? null : averageWidth(layer, choice(layer))), text: (layer) => (choice(layer) === undefined ? "" : choiceText(choice(layer))) },
    { name: "of size", number: true, value: share, text: (layer) => (share(layer) === null ? "" : percent(share(layer) / Math.max(1, page.plan.bits.total))) },
    { name: "weights", number: true, value: (layer) => layer.numel, text: (layer) => grouped(layer.numel) },
    { name: "shape", value: (layer) => layer.shape.join("x"), text: (layer) => layer.shape.join("x") },
    ...(table ? table.metrics.slice(0, 2) : []).map((name) => ({
      name: `${name}`, number: true, value: (layer) => error(layer, name), text: (layer) => (error(layer, name) === null ? "" : general(error(layer, name))),
    })),
  ];
}

/** Draws the rows into a node. */
export function makeRows(page, node, { select, pin }) {
  const columns = columnsOf(page);
  const view = { by: 0, down: false, order: page.layers.map((_, place) => place), selected: null, every: false, top: 0 }; // top: where it is scrolled to, for asking makes the browser lay out
  const head = element("tr", {}, ...columns.map((column, place) => element("th", { scope: "col", class: column.number ? "number" : "" },
    element("button", { type: "button", onclick: () => sortBy(place) }, column.name))), ...(page.table ? [element("th", { scope: "col" }, "pin")] : []));
  const body = element("tbody");
  const table = element("table", { class: "rows", "aria-rowcount": String(page.layers.length + 1) }, element("thead", {}, head), body);
  node.replaceChildren(table);

  function sortBy(place) {
    view.down = view.by === place ? !view.down : Boolean(columns[place].number && place);
    view.by = place;
    order();
    draw();
  }

  function order() {
    const column = columns[view.by];
    const sign = view.down ? -1 : 1;
    const values = page.layers.map(column.value);
    view.order.sort((a, b) => {
      const [one, other] = [values[a], values[b]];
      if (one === null || other === null) return (one === null) - (other === null) || a - b;
      return sign * (one < other ? -1 : one > other ? 1 : 0) || a - b;
    });
    head.childNodes.forEach((cell, i) => {
      if (i === view.by) cell.setAttribute("aria-sort", view.down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
  }

  function rowOf(place, position) {
    const layer = page.layers[place];
    const chosen = place === view.selected;
    const cells = columns.map((column) => {
      const text = column.text(layer);
      if (!column.wide) return element("td", { class: column.number ? "number" : "" }, text);
      return element("td", { class: "wide" }, element("button", { type: "button", title: text, "aria-pressed": String(chosen), onclick: () => select(place) }, text));
    });
    if (page.table) cells.push(element("td", { class: "pins" }, ...pinButtons(place)));
    return element("tr", { class: chosen ? "chosen" : "", "aria-rowindex": String(position + 2) }, ...cells);
  }

  function pinButtons(place) {
    const pinned = page.state.pins.get(place);
    const own = page.plan?.choices?.[place];
    const width = pinned !== undefined && pinned < 16 ? pinned : typeof own === "number" && own < 16 ? own : null;
    const off = page.state.allocator !== "budget";
    const title = off ? "Budget alone has pins" : "";
    return [
      element("button", { type: "button", class: "small", disabled: off || width === null, title, "aria-pressed": String(pinned !== undefined && pinned < 16), "aria-label": `pin ${nameText(page.layers[place].name)}`, onclick: () => pin(place, pinned !== undefined && pinned < 16 ? null : width) }, pinned !== undefined && pinned < 16 ? `pinned ${pinned}` : "pin"),
      element("button", { type: "button", class: "small", disabled: off, title, "aria-pressed": String(pinned === 32), "aria-label": `skip ${nameText(page.layers[place].name)}`, onclick: () => pin(place, pinned === 32 ? null : 32) }, pinned === 32 ? "skipped" : "skip"),
    ];
  }

  const spacer = (rows) => element("tr", { class: "spacer", "aria-hidden": "true" }, element("td", { colspan: String(columns.length + 1) }));

  function draw() {
    const first = view.every ? 0 : Math.max(0, Math.floor(view.top / ROW) - BEYOND);
    const count = view.every ? view.order.length : Math.ceil(HIGHEST / ROW) + 2 * BEYOND;
    const shown = view.order.slice(first, first + count);
    const focused = document.activeElement?.closest?.("tbody") === body ? document.activeElement.getAttribute("aria-label") ?? document.activeElement.title : null;
    const [above, below] = [spacer(), spacer()];
    above.firstChild.style.height = `${first * ROW}px`;
    below.firstChild.style.height = `${Math.max(0, view.order.length - first - shown.length) * ROW}px`;
    body.replaceChildren(above, ...shown.map((place, i) => rowOf(place, first + i)), below);
    if (focused) [...body.querySelectorAll("button")].find((one) => (one.getAttribute("aria-label") ?? one.title) === focused)?.focus();
  }

  let waiting = false;
  node.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      view.top = node.scrollTop;
      draw();
    });
  });
  const print = (every) => {
    view.every = every && page.layers.length <= 2000;
    draw();
  };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  return {
    update() {
      if (!FIXED.has(columns[view.by].name)) order();
      draw();
    },
    select(place) {
      view.selected = place;
      draw();
    },
    sortBy,
    order: () => view.order.slice(),
  };
}
