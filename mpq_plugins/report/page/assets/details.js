// The layer that is selected: what is known of it, its errors, its weights with the levels that codes can have.

import { element, keepingFocus, placed } from "./dom.js";
import { choiceText, general, grouped, nameText, percent, tickText } from "./format.js";

/** The histogram of a layer's weights; levels are drawn over it where they are few enough. */
function distributionChart(own, bits, width) {
  const step = (own.high - own.low) / own.counts.length;
  const bins = own.counts.map((count, i) => ({ x1: own.low + i * step, x2: own.low + (i + 1) * step, count }));
  const levels = bits === null ? null : own.levels[String(bits)];
  return Plot.plot({
    width, height: 190, marginLeft: 52, marginRight: 8, marginBottom: 34, className: "plot",
    x: { label: "weight", tickFormat: tickText, ticks: width / 90 },
    y: { label: "weights", grid: true, ticks: 3, tickFormat: tickText },
    marks: [
      Plot.rectY(bins, { x1: "x1", x2: "x2", y1: 0, y2: "count", fill: "var(--soft)", fillOpacity: 0.65, inset: 0.3 }),
      Plot.ruleX(levels ?? [], { stroke: "var(--accent)", strokeWidth: 1, strokeOpacity: 0.8 }),
      Plot.ruleY([0], { stroke: "var(--line)" }),
    ],
  });
}

function errorsTable(page, place) {
  const { table } = page;
  const own = page.plan?.foreign ? undefined : page.plan?.choices?.[place];
  const names = [...table.metrics.map((name) => [name, table.errors[name]]), ...Object.keys(table.costs).filter((name) => !table.metrics.includes(name)).map((name) => [name, table.costs[name]])];
  const chosen = (bits) => (typeof own === "number" ? own === bits : own?.parts?.some(([width]) => width === bits) ?? false);
  return element("div", { class: "scroll" }, element("table", { class: "errors" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "bits"), ...names.map(([name]) => element("th", { scope: "col", class: "number" }, name)))),
    element("tbody", {}, ...table.bits.map((bits, column) => element("tr", { class: chosen(bits) ? "chosen" : "" }, element("th", { scope: "row" }, String(bits)), ...names.map(([, rows]) => element("td", { class: "number" }, general(rows[place][column]))))))));
}

function pinning(page, place, pin) {
  const { table, state } = page;
  const pinned = state.pins.get(place);
  const off = state.allocator !== "budget";
  const widths = table.bits.filter((bits) => table.possible[place].has(bits));
  return element("div", { class: "buttons", role: "group", "aria-label": "pin this layer" }, element("span", { class: "label" }, "pin to"),
    ...widths.map((bits) => element("button", { type: "button", class: "small", disabled: off, "aria-pressed": String(pinned === bits), onclick: () => pin(place, pinned === bits ? null : bits) }, String(bits))),
    element("button", { type: "button", class: "small", disabled: off, "aria-pressed": String(pinned === 32), onclick: () => pin(place, pinned === 32 ? null : 32) }, "skip"),
    ...(off ? [element("span", { class: "hint" }, "Budget alone has pins.")] : []));
}

/** Draws a layer into a node; pin(place, bits): called with a width, or null to unpin. */
export function makeDetails(page, node, pin) {
  let selected = null;

  function weights(layer) {
    const own = page.doc.weights[String(layer.place)];
    if (!Object.keys(page.doc.weights).length) return [element("p", { class: "empty" }, "A table holds no weights. To see how they are distributed: mpq report TABLE --model MODULE:FACTORY -o report.html")];
    if (!own) return [element("p", { class: "empty" }, "This layer has no weights.")];
    const choice = page.plan?.foreign ? undefined : page.plan?.choices?.[layer.place];
    const bits = typeof choice === "number" ? choice : choice?.parts?.[0][0] ?? null;
    const chart = element("div", { class: "chart", role: "img", "aria-label": `distribution of the weights of ${nameText(layer.name)}` });
    placed(distributionChart(own, bits, Math.max(260, node.clientWidth - 24)), chart);
    const whose = own.channel === null ? "the layer" : `output channel ${own.channel} (its norm is in the middle)`;
    const said = page.plan?.foreign ? "the plan's levels are not the table's, which has another scheme or other widths" : bits !== null && own.levels[String(bits)] ? `${own.levels[String(bits)].length} levels that ${whose} uses, at ${bits} bits` : "levels above 6 bits lie closer than can be drawn";
    return [chart, element("p", { class: "hint" }, `${said}.`)];
  }

  function draw() {
    if (selected === null) return;
    const layer = page.layers[selected];
    const choice = page.plan?.choices?.[selected];
    const each = page.plan?.bits?.each;
    const facts = [`${layer.kind}, ${layer.shape.join(" x ")}`, `${grouped(layer.numel)} weights`];
    if (choice !== undefined) facts.push(`${choiceText(choice)}${typeof choice === "number" && choice < 16 ? " bits" : ""}`);
    if (each) facts.push(`${percent(each[selected] / Math.max(1, page.plan.bits.total))} of the size`);
    node.replaceChildren(
      element("h3", {}, nameText(layer.name)), element("p", { class: "facts" }, facts.join("; ")),
      ...(layer.tied.length ? [element("p", { class: "hint" }, `also called ${layer.tied.join(", ")}`)] : []),
      ...(page.table ? [pinning(page, selected, pin), errorsTable(page, selected)] : []), ...weights(layer),
    );
  }

  return {
    update: () => keepingFocus(node, draw),
    select(place) {
      selected = place;
      keepingFocus(node, draw);
    },
  };
}
