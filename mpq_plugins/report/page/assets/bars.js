// The plan's layers in the network's order: as wide as their weights, as high as their bits, split by their parts.

import { element, onResize, placed, pointIn, svgElement } from "./dom.js";
import { choiceText, grouped, nameText, percent } from "./format.js";
import { averageWidth } from "./sizes.js";

const MOST_DRAWN = 1500; // bars; of more layers neighbours share one
const MARGIN = { left: 40, right: 8, top: 30, bottom: 40 };

/** Where each layer begins and ends, as a share of all weights. */
function edgesOf(layers) {
  const numel = Math.max(1, layers.reduce((sum, layer) => sum + layer.numel, 0));
  let at = 0;
  return layers.map((layer) => {
    const from = at;
    at += layer.numel / numel;
    return [from, at];
  });
}

/** Rectangles of a layer: a part each, from the narrowest width up. */
function rectanglesOf(layer, choice, [from, to]) {
  if (typeof choice !== "object" || choice.parts === undefined) return [{ x1: from, x2: to, bits: averageWidth(layer, choice) }];
  let at = from;
  return choice.parts.map(([bits, count]) => {
    const x1 = at;
    at += ((to - from) * count) / Math.max(1, layer.channels);
    return { x1, x2: at, bits };
  });
}

/** Neighbours together, with the mean of their bits, where there are too many to draw. */
function together(rectangles) {
  if (rectangles.length <= MOST_DRAWN) return rectangles;
  const merged = [];
  const least = 1 / MOST_DRAWN;
  let open = null;
  for (const one of rectangles) {
    open = open === null
      ? { ...one, area: one.bits * (one.x2 - one.x1) }
      : { ...open, x2: one.x2, area: open.area + one.bits * (one.x2 - one.x1) };
    if (open.x2 - open.x1 >= least) {
      merged.push({ ...open, bits: open.area / (open.x2 - open.x1) });
      open = null;
    }
  }
  if (open !== null) merged.push({ ...open, bits: open.area / Math.max(1e-12, open.x2 - open.x1) });
  return merged;
}

export function widthColour(bits) {
  return bits > 8 ? "var(--b9)" : `var(--b${Math.max(1, Math.round(bits))})`;
}

/** Draws the bars into a node. select(place): called with the layer that is clicked. */
export function makeBars(page, node, select) {
  const { layers, tip } = page;
  const edges = edgesOf(layers);
  const ends = edges.map(([, to]) => to);
  const view = { plan: null, chart: null, selected: null, rects: [], drawn: null };

  function draw() {
    if (!view.plan || view.plan.error) {
      node.replaceChildren(element("p", { class: "empty" }, view.plan?.error ?? "No plan is chosen."));
      view.chart = null;
      return;
    }
    const rectangles = rectanglesOfPlan();
    const highest = highestOf(rectangles);
    if (moved(rectangles, highest)) return;
    view.drawn = { count: rectangles.length, highest };
    drawAnew(rectangles, highest);
  }

  function rectanglesOfPlan() {
    return together(layers.flatMap((layer, place) => rectanglesOf(layer, view.plan.choices[place], edges[place])));
  }

  function highestOf(rectangles) {
    return Math.min(32, Math.max(8, d3.max(rectangles, (one) => one.bits)));
  }

  /** Move the rectangles that are there, which a slider does many times a second; false where there are others. */
  function moved(rectangles, highest) {
    if (view.chart === null || view.drawn?.count !== rectangles.length || view.drawn.highest !== highest) return false;
    const [x, y] = [view.chart.scale("x"), view.chart.scale("y")];
    const foot = y.apply(0);
    view.rects.forEach((rect, i) => {
      const { x1, x2, bits } = rectangles[i];
      const [left, top] = [x.apply(x1), y.apply(bits)];
      rect.setAttribute("x", left);
      rect.setAttribute("width", Math.max(0, x.apply(x2) - left));
      rect.setAttribute("y", top);
      rect.setAttribute("height", Math.max(0, foot - top));
      rect.setAttribute("fill", widthColour(bits));
    });
    return true;
  }

  function drawAnew(rectangles, highest) {
    const width = Math.max(280, node.clientWidth);
    view.chart = Plot.plot({
      width, height: width < 480 ? 220 : 270, className: "plot",
      marginLeft: MARGIN.left, marginRight: MARGIN.right, marginTop: MARGIN.top, marginBottom: MARGIN.bottom,
      x: { domain: [0, 1], label: "share of all weights, in the network's order", tickFormat: (v) => `${Math.round(100 * v)} %`, ticks: width / 120, tickSize: 4 },
      y: { domain: [0, highest], label: "bits", ticks: 4, grid: true },
      marks: [
        Plot.rect(rectangles, { x1: "x1", x2: "x2", y1: 0, y2: "bits", fill: { value: (one) => widthColour(one.bits), scale: null }, stroke: "var(--panel)", strokeWidth: rectangles.length > 250 ? 0 : 0.5 }),
        Plot.ruleY([0], { stroke: "var(--line)" }),
      ],
    });
    const svg = placed(view.chart, node);
    view.rects = svg.querySelectorAll("g[aria-label='rect'] rect");
    svg.setAttribute("aria-hidden", "true");
    svg.addEventListener("pointermove", (event) => hover(svg, event));
    svg.addEventListener("pointerleave", tip.hide);
    svg.addEventListener("click", (event) => select(at(svg, event)));
    mark();
  }

  function at(svg, event) {
    const share = view.chart.scale("x").invert(pointIn(svg, event)[0]);
    return Math.max(0, Math.min(layers.length - 1, d3.bisectRight(ends, share)));
  }

  function hover(svg, event) {
    tip.show(event, page.layerLines(at(svg, event)));
  }

  function mark() {
    node.querySelector(".mark")?.remove();
    if (view.chart === null || view.selected === null) return;
    const [from, to] = edges[view.selected].map((share) => view.chart.scale("x").apply(share));
    const svg = node.querySelector("svg");
    const height = svg.getAttribute("height") - MARGIN.bottom - MARGIN.top;
    const middle = (from + to) / 2;
    const group = svgElement("g", { class: "mark" });
    group.append(svgElement("path", { class: "mark", d: `M${middle - 5} ${MARGIN.top - 10}h10l-5 8z` }));
    if (to - from > 5) group.append(svgElement("rect", { class: "mark", x: from, y: MARGIN.top, width: to - from, height }));
    svg.append(group);
  }

  onResize(node, () => {
    view.drawn = null;
    draw();
  });
  node.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (!step) return;
    event.preventDefault();
    const from = view.selected ?? (step > 0 ? -1 : layers.length);
    select(Math.max(0, Math.min(layers.length - 1, from + step)));
  });
  return {
    update(plan) {
      view.plan = plan;
      draw();
    },
    select(place) {
      view.selected = place;
      mark();
    },
  };
}

/** What a tip says of a layer under a plan. */
export function layerLines(page, place) {
  const layer = page.layers[place];
  const { plan, table } = page;
  const each = plan?.bits?.each;
  const choice = plan?.choices?.[place];
  const lines = [nameText(layer.name), `${layer.kind} ${layer.shape.join(" x ")}, ${grouped(layer.numel)} weights`];
  if (choice !== undefined) lines.push(`${choiceText(choice)}${typeof choice === "number" && choice < 16 ? " bits" : ""}${each ? `, ${percent(each[place] / Math.max(1, plan.bits.total))} of the size` : ""}`);
  const column = page.columnOf(choice);
  if (column !== null) {
    for (const name of table.metrics.slice(0, 2)) lines.push(`${name} error ${page.general(table.errors[name][place][column])}`);
  }
  return lines;
}
