// From what is set on the page to a plan: choices, sizes, the guard's word, and the command that makes it.

import { budgetProblem, budgetWithin, wholeProblem } from "./budget.js";
import { pythonFloat, shellQuoted } from "./format.js";
import { makeGuard } from "./guard.js";
import { mixquant, mixquantLacks, mixquantSettings } from "./mixquant.js";
import { planJson, PythonFloat } from "./plan_json.js";
import { ptilmpq, ptilmpqLacks } from "./ptilmpq.js";
import { checkPossible, planBits } from "./sizes.js";

export const COUNTED = { codes: "average_bits", total: "total_average_bits" };
const CANDIDATES = { mixquant: "2,3,4,5,6,7,8", budget: "1,2,3,4,5,6,7,8" };

/** A pattern that names this layer alone. */
function patternOf(table, place) {
  return table.patterns[place] ?? table.layers[place].name;
}

function command(table, allocator, options) {
  return ["mpq", "plan", table.file, "-a", allocator, ...options, "-o", "plan.json"].map(shellQuoted).join(" ");
}

function widthsOption(allocator, bits) {
  return bits.join(",") === CANDIDATES[allocator] ? [] : ["--bits", bits.join(",")];
}

const PLANNERS = {
  mixquant(table, state) {
    const settings = { ...mixquantSettings(table), qem: state.qem, metric: state.metric };
    const { qem, metric, bits, baseline } = settings;
    return {
      choices: mixquant(table, settings),
      record: { name: "mixquant", parameters: { qem: new PythonFloat(qem), metric, bits, baseline } },
      command: command(table, "mixquant", [
        "--qem", pythonFloat(qem), ...(metric === "relative" ? [] : ["--metric", metric]), ...widthsOption("mixquant", bits),
        ...(baseline === 8 ? [] : ["--baseline", String(baseline)]),
      ]),
    };
  },
  ptilmpq(table, state) {
    const settings = {
      alpha: state.alpha, beta_important: state.betaImportant, beta_other: state.betaOther,
      important_bits: [state.middle + 1, state.middle], other_bits: [state.middle, state.middle - 1],
    };
    const floats = ["alpha", "beta_important", "beta_other"].map((name) => [name, new PythonFloat(settings[name])]);
    const usual = state.middle === 4 ? [] : ["--important-bits", settings.important_bits.join(","), "--other-bits", settings.other_bits.join(",")];
    return {
      choices: ptilmpq(table, settings),
      record: { name: "ptilmpq", parameters: { ...settings, ...Object.fromEntries(floats) } },
      command: command(table, "ptilmpq", [
        "--alpha", pythonFloat(settings.alpha), "--beta-important", pythonFloat(settings.beta_important),
        "--beta-other", pythonFloat(settings.beta_other), ...usual,
      ]),
    };
  },
  budget(table, state, problem) {
    const found = budgetWithin(problem, state.budget * table.numel);
    const name = COUNTED[state.counted];
    if (found === null) {
      const least = problem.size / Math.max(1, table.numel);
      throw new Error(`${name}: ${state.budget} cannot be reached: the least is ${least.toFixed(3)} bits a weight`);
    }
    const pins = [...state.pins].flatMap(([place, bits]) => ["--pin", `${patternOf(table, place)}=${bits}`]);
    return {
      choices: found.choices,
      record: null,
      found,
      command: command(table, "budget", [
        `--${name.replaceAll("_", "-")}`, pythonFloat(state.budget), "--no-parts", ...widthsOption("budget", table.bits),
        ...(state.sensitivity === "mse" ? [] : ["--sensitivity", state.sensitivity]), ...pins,
      ]),
    };
  },
};

/** Why the table cannot be planned by an allocator; null where it can. */
export function lacks(table, allocator) {
  return { mixquant: mixquantLacks, ptilmpq: ptilmpqLacks, budget: () => null }[allocator](table);
}

/** A function from settings to a plan, or to {error}. */
export function makePlanner(table) {
  const guard = makeGuard(table);
  let key = null;
  let problem = null;
  const problemOf = (state) => {
    if (!state.pins.size) return wholeProblem(table, state.sensitivity, state.counted);
    const now = JSON.stringify([state.sensitivity, state.counted, [...state.pins]]);
    if (now !== key) {
      problem = budgetProblem(table, { sensitivity: state.sensitivity, bits: table.bits, pins: state.pins, counted: state.counted });
      key = now;
    }
    return problem;
  };
  return (state) => {
    const missing = lacks(table, state.allocator);
    if (missing !== null) return { allocator: state.allocator, error: missing };
    try {
      const made = PLANNERS[state.allocator](table, state, state.allocator === "budget" ? problemOf(state) : null);
      checkPossible(table, made.choices);
      const bits = planBits(table, made.choices);
      return { allocator: state.allocator, ...made, bits, guard: guard(made.choices, bits.total) };
    } catch (error) {
      return { allocator: state.allocator, error: error.message };
    }
  };
}

/** The file of a plan that the library would write the same; null for others. */
export function fileOf(table, plan) {
  return plan.record ? planJson(table, plan.record, plan.choices) : null;
}
