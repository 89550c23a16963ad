// Errors by layer and width, as colours on a logarithmic scale.

import { element, onResize, placed, pointIn } from "./dom.js";
import { general, nameText } from "./format.js";

/** What can be drawn: errors, and what quantizing a layer is predicted to cost. */
export function heatmapNames(table) {
  return [...table.metrics.map((name) => [`error:${name}`, `${name} error`]), ...Object.keys(table.costs).filter((name) => !table.metrics.includes(name)).map((name) => [`cost:${name}`, `predicted ${name}`])];
}

/** The middles of as many layers as there is room to number. */
function ticksOf(count, width) {
  const step = Math.max(1, d3.tickStep(0, count, Math.max(2, width / 50)));
  return Array.from({ length: Math.floor((count - 1) / step) + 1 }, (_, i) => Math.round(i * step) + 0.5);
}

/** Draws the heat map into a node. select(place): called with the layer that is clicked. */
export function makeHeatmap(page, node, select) {
  const { table, tip, layers } = page;
  let chart = null;

  function rows() {
    const [kind, name] = [page.heat.slice(0, page.heat.indexOf(":")), page.heat.slice(page.heat.indexOf(":") + 1)];
    return (kind === "error" ? table.errors : table.costs)[name];
  }

  function draw() {
    const own = rows();
    const flat = table.bits.flatMap((_, column) => layers.map((layer, place) => own[place][column]));
    const known = flat.filter((value) => value > 0 && Number.isFinite(value));
    if (!known.length) {
      node.replaceChildren(element("p", { class: "empty" }, "All of these are 0: the layers are exact at every width."));
      return;
    }
    const width = Math.max(280, node.clientWidth);
    const [low, high] = d3.extent(known);
    const positions = table.bits.map((_, column) => column + 0.5);
    chart = Plot.plot({
      width, height: 34 + 22 * table.bits.length + 36, className: "plot", marginLeft: 40, marginRight: 8, marginTop: 8, marginBottom: 34,
      x: { domain: [0, layers.length], label: "layers, in the network's order", ticks: ticksOf(layers.length, width), tickFormat: (v) => String(Math.ceil(v)) },
      y: { domain: [table.bits.length, 0], label: "bits", ticks: positions, tickFormat: (v) => String(table.bits[Math.floor(v)]) },
      color: { type: "log", scheme: "viridis", reverse: true, domain: low < high ? [low, high] : [low / 2, low * 2], legend: true, label: page.heatLabel, tickFormat: (v) => general(v, 2), marginLeft: 12, marginRight: 24, width: Math.min(340, width - 20), height: 44, ticks: low < high ? [0, 1, 2, 3].map((k) => low * (high / low) ** (k / 3)) : [low], className: "ramp" },
      marks: [Plot.raster(flat.map((v) => (v > 0 ? v : NaN)), { width: layers.length, height: table.bits.length, x1: 0, y1: 0, x2: layers.length, y2: table.bits.length, imageRendering: "pixelated" })],
    });
    const svg = placed(chart, node);
    svg.setAttribute("aria-hidden", "true");
    svg.addEventListener("pointermove", (event) => hover(svg, event));
    svg.addEventListener("pointerleave", tip.hide);
    svg.addEventListener("click", (event) => {
      const [place] = at(svg, event);
      if (place !== null) select(place);
    });
  }

  function at(svg, event) {
    const [px, py] = pointIn(svg, event);
    const place = Math.floor(chart.scale("x").invert(px));
    const column = Math.floor(chart.scale("y").invert(py));
    return place >= 0 && place < layers.length && column >= 0 && column < table.bits.length ? [place, column] : [null, null];
  }

  function hover(svg, event) {
    const [place, column] = at(svg, event);
    if (place === null) tip.hide();
    else tip.show(event, [nameText(layers[place].name), `${table.bits[column]} bits: ${page.heatLabel} ${general(rows()[place][column])}`]);
  }

  onResize(node, draw);
  return { draw };
}
