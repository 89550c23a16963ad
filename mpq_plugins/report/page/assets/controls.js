// What can be set: the allocator, its sliders, what is kept low.

import { byId, element } from "./dom.js";
import { lacks } from "./plan.js";
import { ptilmpqMiddles } from "./ptilmpq.js";

const ALLOCATORS = [["budget", "Budget"], ["mixquant", "MixQuant"], ["ptilmpq", "PTILMPQ"]];

/** A slider and a number that say the same; log: whether the slider's steps are ratios. */
function slider({ id, label, low, high, step, log, get, set }) {
  const to = (value) => (log ? Math.log(value) : value);
  const from = (place) => (log ? Math.exp(place) : place);
  const digits = step < 0.01 ? 3 : 2;
  const range = element("input", {
    type: "range", id, min: to(low), max: to(high), step: log ? (to(high) - to(low)) / 400 : step,
    oninput: () => set(Number(from(Number(range.value)).toFixed(digits))),
  });
  const number = element("input", {
    type: "number", id: `${id}-number`, min: low, max: high, step: "any", "aria-label": `${label}, exactly`, title: `${low} to ${high}`,
    onchange: () => {
      const value = Number(number.value);
      if (number.value !== "" && value >= low && value <= high) set(value);
      else number.value = get();
    },
  });
  return {
    node: element("div", { class: "slider" }, element("label", { for: id }, label), range, number),
    show() {
      range.value = to(get());
      range.setAttribute("aria-valuetext", String(get())); // of a slider of ratios its own value says nothing
      number.value = get();
    },
  };
}

function choice(label, id, options, get, set) {
  const made = element("select", { id, onchange: () => set(made.value) }, ...options.map(([value, text]) => element("option", { value }, text)));
  return { node: element("div", { class: "slider" }, element("label", { for: id }, label), made), show: () => { made.value = String(get()); } };
}

function panels(page, change) {
  const { table, state } = page;
  const bind = (name) => ({ get: () => state[name], set: (value) => change({ [name]: value }) });
  const metrics = ["relative", "mse", "rmse", "max_abs"].filter((name) => table.metrics.includes(name));
  const [least, most] = [Math.min(...table.bits), Math.max(...table.bits)];
  return {
    budget: {
      note: "One width a layer, by the Lagrangian over convex hulls. The library's Budget is exact, and may split layers into channels: copy the command to run it.",
      controls: [
        slider({ id: "budget", label: "bits a weight", low: least, high: most, step: 0.01, ...bind("budget") }),
        choice("counted", "counted", [["codes", "codes alone"], ["total", "in total"]], () => state.counted, bind("counted").set),
        choice("keep low", "sensitivity", Object.keys(table.costs).filter((name) => !name.includes("*") || name === table.judge).map((name) => [name, name]), () => state.sensitivity, bind("sensitivity").set),
      ],
    },
    mixquant: {
      note: "Each layer gets the fewest bits whose error is at most QEM times that at the baseline, exactly as mpq plan decides.",
      controls: [
        slider({ id: "qem", label: "QEM", low: 0.5, high: 200, step: 0.001, log: true, ...bind("qem") }),
        choice("error", "metric", metrics.map((name) => [name, name]), () => state.metric, bind("metric").set),
      ],
    },
    ptilmpq: {
      note: "Important layers, and important channels in every layer, get one bit more, exactly as mpq plan decides.",
      controls: [
        slider({ id: "alpha", label: "alpha: important layers", low: 0, high: 1, step: 0.01, ...bind("alpha") }),
        slider({ id: "beta-important", label: "beta in important layers", low: 0, high: 1, step: 0.01, ...bind("betaImportant") }),
        slider({ id: "beta-other", label: "beta in the others", low: 0, high: 1, step: 0.01, ...bind("betaOther") }),
        choice("widths", "middle", ptilmpqMiddles(table).map((n) => [String(n), `${n + 1},${n} and ${n},${n - 1}`]), () => state.middle, (value) => change({ middle: Number(value) })),
      ],
    },
  };
}

/** Makes the controls; change(values): called with what is set. */
export function makeControls(page, change) {
  const { table, state } = page;
  const all = panels(page, change);
  const tabs = ALLOCATORS.map(([name, text]) => element("button", { type: "button", id: `tab-${name}`, onclick: () => change({ allocator: name }) }, text));
  byId("tabs").replaceChildren(...tabs);
  const bodies = ALLOCATORS.map(([name]) => {
    const missing = lacks(table, name);
    const inside = missing === null ? all[name].controls.map((one) => one.node) : [element("p", { class: "empty" }, missing)];
    return element("div", { class: "panel", id: `panel-${name}` }, ...inside, element("p", { class: "hint" }, all[name].note));
  });
  byId("panels").replaceChildren(...bodies);
  return {
    show() {
      ALLOCATORS.forEach(([name], i) => {
        const on = page.point === null && state.allocator === name;
        tabs[i].setAttribute("aria-pressed", String(on));
        bodies[i].hidden = state.allocator !== name;
        if (lacks(table, name) === null) for (const one of all[name].controls) one.show();
      });
    },
  };
}
