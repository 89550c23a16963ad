// The page: its document, what is set, the plan that comes of it, and the views that show it.

import { layerLines, makeBars } from "./bars.js";
import { budgetCurve, wholeProblem } from "./budget.js";
import { makeControls } from "./controls.js";
import { makeDetails } from "./details.js";
import { byId, element, makeTip } from "./dom.js";
import { bytesText, fixed, general, pythonFloat } from "./format.js";
import { makeFrontier, measuresOf } from "./frontier.js";
import { heatmapNames, makeHeatmap } from "./heatmap.js";
import { fileOf, makePlanner } from "./plan.js";
import { ptilmpqMiddles } from "./ptilmpq.js";
import { makeRows } from "./rows.js";
import { connect } from "./served.js";
import { planBits } from "./sizes.js";
import { makeSummary } from "./summary.js";
import { unpackLayers, unpackScores, unpackTable } from "./unpack.js";

const LABELS = { budget: "Budget per layer", mixquant: "MixQuant", ptilmpq: "PTILMPQ" };

function startingState(doc, table) {
  const bits = table?.bits ?? [4];
  const middles = table ? ptilmpqMiddles(table) : [];
  const metrics = ["relative", "mse", "rmse", "max_abs"].filter((name) => table?.metrics.includes(name));
  return {
    allocator: "budget", qem: 2, metric: metrics[0], alpha: 0.5, betaImportant: 0.5, betaOther: 0.5,
    middle: middles.includes(4) ? 4 : middles[0], budget: Math.min(Math.max(4, Math.min(...bits)), Math.max(...bits)),
    counted: "codes", sensitivity: doc.sensitivity, pins: new Map(),
  };
}

/** A point of the frontier as a plan: what the library decided. */
function planOfPoint(page, place) {
  const point = page.doc.points[place];
  const choices = point.layers.map((own) => (Array.isArray(own) ? { parts: own } : own));
  const each = point.sizes.length ? point.sizes : page.table ? page.sizesOf(choices) : null;
  return {
    title: `${point.series}${point.label ? `, ${point.label}` : ""}`, point, choices,
    bits: { codes: point.weights_only_bits, total: point.total_bits, each },
    guard: point.guard === null ? (point.cost === null ? null : { cost: point.cost, text: "", worse: false }) : { cost: point.cost, text: point.guard, worse: point.worse },
    foreign: !point.measured, command: point.command, record: null, file_bytes: point.file_bytes, scores: point.scores, rounding: point.rounding,
  };
}

function fillSelect(id, entries, onchange) {
  const made = byId(id);
  made.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
  made.addEventListener("change", () => onchange(made.value));
  made.closest(".choose").hidden = entries.length < 2;
}

function makePage() {
  const doc = JSON.parse(byId("data").textContent);
  const layers = unpackLayers(doc.layers);
  const table = doc.table ? unpackTable(doc.table, layers) : null;
  doc.table = table;
  for (const one of [...doc.points, ...(doc.float ? [doc.float] : [])]) one.scores = unpackScores(one.scores);
  const { sizes, values } = measuresOf(doc);
  doc.sizes = sizes;
  const value = Object.keys(values)[0];
  return {
    doc, layers, table, general, tip: makeTip(), state: startingState(doc, table), point: doc.chosen, plan: null,
    numel: layers.reduce((sum, layer) => sum + layer.numel, 0), planner: table ? makePlanner(table) : null,
    measures: { size: "total", value, label: values[value] }, values, heat: null, heatLabel: "",
    sizesOf: (choices) => planBits(table, choices).each,
    columnOf(choice) {
      const known = table && !this.plan?.foreign && typeof choice === "number";
      return known ? table.column.get(choice) ?? null : null; // of the table's errors
    },
  };
}

function run() {
  const page = makePage();
  const { doc, table } = page;
  page.layerLines = (place) => layerLines(page, place);
  const views = [];
  let selected = null;
  let waiting = null;

  function show() {
    const plan = page.point !== null ? planOfPoint(page, page.point) : { title: titleOf(page.state), ...page.planner(page.state) };
    page.plan = plan;
    draw();
  }

  function draw() {
    for (const view of views) view.update(page.plan);
    controls?.show();
    byId("unpin").hidden = !page.state.pins.size;
    byId("points").value = page.point === null ? "" : String(page.point);
  }

  /** Once a frame is enough, however often a slider says that it has moved. */
  function changeSoon(values) {
    Object.assign(page.state, values);
    page.point = null;
    waiting ??= requestAnimationFrame(() => {
      waiting = null;
      show();
    });
  }

  function change(values) {
    Object.assign(page.state, values);
    page.point = null;
    show();
  }

  function pin(place, bits) {
    if (bits === null) page.state.pins.delete(place);
    else page.state.pins.set(place, bits);
    change({ allocator: "budget" });
    select(place);
  }

  function select(place) {
    selected = place;
    for (const view of views) view.select?.(place);
  }

  function choose(place) {
    page.point = place;
    show();
  }

  const controls = table ? makeControls(page, changeSoon) : null;
  byId("controls").hidden = !table;
  byId("points").replaceChildren(
    ...(table ? [element("option", { value: "" }, "what is set here")] : []),
    ...doc.points.map((point, place) => element("option", { value: String(place) }, `${point.series}${point.label ? `, ${point.label}` : ""}`)));
  byId("points").addEventListener("change", () => {
    if (byId("points").value === "") change({});
    else choose(Number(byId("points").value));
  });
  views.push({ update: makeSummary(page) });
  views.push(showFrontier(page, choose));
  views.push(makeBars(page, byId("bars"), select));
  views.push(makeRows(page, byId("rows"), { select, pin }));
  views.push(makeDetails(page, byId("details"), pin));
  if (table) showHeatmap(page, select);
  byId("heat-section").hidden = !table;
  byId("unpin").addEventListener("click", () => {
    page.state.pins.clear();
    change({});
    byId("tab-budget").focus(); // for what had it is hidden now
  });
  byId("lacking").hidden = table !== null;
  byId("left-out").replaceChildren(...doc.left_out.map((line) => element("li", {}, line)));
  byId("left-out").hidden = !doc.left_out.length;
  connect(page, {
    show(plan) {
      page.point = null;
      page.plan = plan;
      draw();
    },
  });
  show();
  select(selected ?? 0);
  const decide = (values) => page.planner({ ...page.state, ...values });
  return { page, change, choose, pin, select, decide, file: (plan) => fileOf(table, plan), rows: views[3], format: { bytesText, fixed, general, pythonFloat } };
}

function titleOf(state) {
  const said = {
    budget: `${state.budget} bits a weight ${state.counted === "codes" ? "" : "in total"}`.trim(), mixquant: `QEM ${state.qem}`,
    ptilmpq: `alpha ${state.alpha}, betas ${state.betaImportant} and ${state.betaOther}`,
  };
  return `${LABELS[state.allocator]}, ${said[state.allocator]}`;
}

function showFrontier(page, choose) {
  const { doc, table } = page;
  const node = byId("frontier");
  if (table?.judge) {
    const made = {};
    page.curve = (counted) => (made[counted] ??= budgetCurve(wholeProblem(table, table.judge, counted)));
  }
  page.zoomed = (on) => { byId("reset").hidden = !on; };
  const lacking = !Object.keys(page.values).length;
  byId("frontier-section").hidden = lacking;
  if (lacking) return { update() {}, draw() {} };
  const frontier = makeFrontier(page, node, choose);
  fillSelect("size", Object.entries(doc.sizes), (value) => { page.measures.size = value; frontier.reset(); });
  fillSelect("value", Object.entries(page.values), (value) => { page.measures = { ...page.measures, value, label: page.values[value] }; frontier.reset(); });
  byId("reset").addEventListener("click", () => {
    frontier.reset();
    node.focus(); // for what had it is hidden now
  });
  byId("legend").replaceChildren(...frontier.series.map(({ name, colour }) => {
    const button = element("button", { type: "button", class: "key", "aria-pressed": "true", onclick: () => button.setAttribute("aria-pressed", String(frontier.toggle(name))) }, element("span", { class: `dot ${colour}` }), name);
    return button;
  }));
  frontier.draw();
  return frontier;
}

function showHeatmap(page, select) {
  const names = heatmapNames(page.table);
  [page.heat, page.heatLabel] = names[0];
  const map = makeHeatmap(page, byId("heat"), select);
  fillSelect("heat-name", names, (value) => {
    [page.heat, page.heatLabel] = names.find(([name]) => name === value);
    map.draw();
  });
  setTimeout(map.draw, 0); // below all else
}

window.mpq = run(); // for a console, and for tests
