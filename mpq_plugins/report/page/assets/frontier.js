// Size against error or score: every allocator's plans, and the one that the page has.

import { element, onResize, placed, pointIn, svgElement } from "./dom.js";
import { bytesText, general, tickText } from "./format.js";
import { uniformCost, uniformPoints } from "./guard.js";

/** The measures of size and of goodness that the points have. */
export function measuresOf(doc) {
  const sizes = { total: "in total", codes: "weights only" };
  if (doc.points.some((point) => point.file_bytes !== null)) sizes.file = "file";
  const scores = [...new Set(doc.points.flatMap((point) => Object.keys(point.scores)))];
  const judged = doc.table && doc.table.judge && doc.points.some((point) => point.cost !== null);
  const values = { ...Object.fromEntries(scores.map((name) => [`score:${name}`, name])), ...(judged ? { cost: `predicted ${doc.table.judge}`, ratio: `predicted ${doc.table.judge}, uniform widths being 1` } : {}) };
  return { sizes, values };
}

function sizeOf(point, measure) {
  if (measure === "file") return point.file_bytes;
  return (measure === "codes" ? point.weights_only_bits : point.total_bits) / 8;
}

/** A cost, or its share of what uniform widths of that size cost; below the smallest of these there is none. */
function judged(page, measure, cost, bits) {
  if (measure === "cost" || cost === null) return cost;
  page.uniform ??= uniformPoints(page.table);
  const uniform = uniformCost(page.uniform, bits);
  return uniform === null || uniform <= 0 ? null : cost / uniform;
}

function valueOf(page, point, measure) {
  return measure === "cost" || measure === "ratio" ? judged(page, measure, point.cost, point.total_bits) : point.scores[measure.slice(6)] ?? null;
}

/** Draws the frontier into a node. choose(place): called with the point that is chosen. */
export function makeFrontier(page, node, choose) {
  const { doc, tip } = page;
  const series = [...new Set(doc.points.map((point) => point.series))];
  const colour = (name) => `var(--s${series.indexOf(name) % 8})`;
  const view = { hidden: new Set(), zoom: null, chart: null, shown: [], plan: null };
  const coarse = window.matchMedia("(pointer: coarse)").matches;

  function points(hidden) {
    const { size, value } = page.measures;
    return doc.points
      .map((point, place) => ({ point, place, x: sizeOf(point, size), y: valueOf(page, point, value) }))
      .filter(({ point, x, y }) => x > 0 && y !== null && Number.isFinite(y) && (value !== "cost" || y > 0) && !hidden.has(point.series));
  }

  function curve() {
    const { size, value } = page.measures;
    if (!page.curve || size === "file" || (value !== "cost" && !(value === "ratio" && size === "total"))) return [];
    return page.curve(size).map(([bits, cost]) => ({ x: bits / 8, y: judged(page, value, cost, bits) })).filter(({ y }) => y !== null && y > 0);
  }

  function draw() {
    view.shown = points(view.hidden);
    const width = Math.max(280, node.clientWidth);
    const log = page.measures.value === "cost";
    if (!view.shown.length) {
      const why = points(new Set()).length ? "Every series is hidden. Their names below show them again." : "No plan has both of these measures. Choose another size or value.";
      node.replaceChildren(element("p", { class: "empty" }, why));
      view.chart = null;
      return;
    }
    const lines = d3.group(view.shown, ({ point }) => point.series);
    const [xs, ys] = [d3.extent(view.shown, (one) => one.x), d3.extent(view.shown, (one) => one.y)];
    const pad = log ? 1.15 : 0;
    const domains = view.zoom ?? {
      x: [xs[0] * 0.96, xs[1] * 1.03],
      y: log ? [ys[0] / pad, ys[1] * pad] : [ys[0] - (ys[1] - ys[0]) * 0.05 || ys[0] - 1, ys[1] + (ys[1] - ys[0]) * 0.05 || ys[1] + 1],
    };
    const chart = Plot.plot({
      width, height: width < 480 ? 300 : 360, marginLeft: 58, marginRight: 16, marginBottom: 40, className: "plot",
      x: { domain: domains.x, label: `size, ${doc.sizes[page.measures.size]}`, tickFormat: bytesText, ticks: width / 110, grid: true },
      y: { domain: domains.y, type: log ? "log" : "linear", label: page.measures.label, tickFormat: tickText, ticks: log ? 5 : 7, grid: true },
      marks: [
        Plot.line(curve(), { x: "x", y: "y", stroke: "var(--faint)", strokeWidth: 6, strokeLinecap: "round", clip: true }),
        ...[...lines].map(([name, own]) => Plot.line(own, { x: "x", y: "y", sort: "x", stroke: colour(name), strokeWidth: 1.5, clip: true })),
        ...[...lines].map(([name, own]) => Plot.dot(own, { x: "x", y: "y", r: 4, fill: colour(name), stroke: "var(--panel)", strokeWidth: 1, clip: true })),
      ],
    });
    view.chart = chart;
    const svg = placed(chart, node);
    svg.setAttribute("aria-hidden", "true");
    if (!coarse) addBrush(svg);
    svg.addEventListener("pointermove", (event) => hover(svg, event));
    svg.addEventListener("pointerleave", tip.hide);
    if (coarse) svg.addEventListener("click", (event) => chooseAt(svg, event));
    mark();
  }

  function near(svg, event) {
    const [px, py] = pointIn(svg, event);
    const [x, y] = [view.chart.scale("x"), view.chart.scale("y")];
    let best = null;
    let least = 30;
    for (const one of view.shown) {
      const distance = Math.hypot(x.apply(one.x) - px, y.apply(one.y) - py);
      if (distance < least) [best, least] = [one, distance];
    }
    return best;
  }

  function hover(svg, event) {
    const one = near(svg, event);
    svg.classList.toggle("on", one !== null);
    if (one === null) tip.hide();
    else tip.show(event, linesOf(one.point));
  }

  function linesOf(point) {
    return [
      `${point.series}${point.label ? `, ${point.label}` : ""}`,
      `${bytesText(Math.ceil(point.total_bits / 8))} in total, ${bytesText(Math.ceil(point.weights_only_bits / 8))} weights only${point.file_bytes === null ? "" : `, ${bytesText(point.file_bytes)} file`}`,
      ...(point.cost === null ? [] : [`predicted ${doc.table?.judge ?? "cost"} ${general(point.cost)}`]),
      ...Object.entries(point.scores).map(([name, value]) => `${name} ${general(value, 5)}${point.rounding ? `, ${point.rounding}` : ""}`),
      ...(point.pareto ? ["no other plan here is as small and as good"] : []),
    ];
  }

  function chooseAt(svg, event) {
    const one = near(svg, event);
    if (one !== null) choose(one.place);
  }

  function addBrush(svg) {
    const [width, height] = [Number(svg.getAttribute("width")), Number(svg.getAttribute("height"))];
    const layer = svgElement("g", { class: "brush" });
    svg.append(layer);
    const brush = d3.brush().extent([[58, 20], [width - 16, height - 40]]).on("end", (event) => {
      if (!event.sourceEvent) return;
      if (!event.selection) {
        chooseAt(svg, event.sourceEvent);
        return;
      }
      const [[x0, y0], [x1, y1]] = event.selection;
      const [x, y] = [view.chart.scale("x"), view.chart.scale("y")];
      view.zoom = { x: [x.invert(x0), x.invert(x1)], y: [y.invert(y1), y.invert(y0)] };
      page.zoomed(true);
      draw();
    });
    d3.select(layer).call(brush);
  }

  /** A ring around the plan that the page shows. */
  function mark() {
    node.querySelector(".mark")?.remove();
    if (!view.chart || !view.plan) return;
    const { size, value } = page.measures;
    const at = view.plan.point
      ? [sizeOf(view.plan.point, size), valueOf(page, view.plan.point, value)]
      : [size === "file" || !view.plan.bits ? null : view.plan.bits[size === "codes" ? "codes" : "total"] / 8, value.startsWith("score:") || !view.plan.bits ? null : judged(page, value, view.plan.guard?.cost ?? null, view.plan.bits.total)];
    if (at[0] === null || at[1] === null || at[1] === undefined) return;
    const [x, y] = [view.chart.scale("x").apply(at[0]), view.chart.scale("y").apply(at[1])];
    if (!Number.isFinite(x) || !Number.isFinite(y)) return;
    const svg = node.querySelector("svg");
    if (x < 50 || x > svg.getAttribute("width") - 8 || y < 8 || y > svg.getAttribute("height") - 36) return;
    svg.append(svgElement("circle", { class: "mark", cx: x, cy: y, r: 8 }));
  }

  onResize(node, draw);
  node.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !view.shown.length) return;
    event.preventDefault();
    const order = [...view.shown].sort((a, b) => a.x - b.x);
    const now = order.findIndex((one) => one.place === page.point);
    const next = order[Math.max(0, Math.min(order.length - 1, now < 0 ? 0 : now + step))];
    choose(next.place);
  });
  return {
    draw,
    series: series.map((name) => ({ name, colour: `s${series.indexOf(name) % 8}` })),
    toggle(name) {
      if (!view.hidden.delete(name)) view.hidden.add(name);
      draw();
      return !view.hidden.has(name);
    },
    reset() {
      view.zoom = null;
      page.zoomed(false);
      draw();
    },
    update(plan) {
      view.plan = plan;
      mark();
    },
  };
}
