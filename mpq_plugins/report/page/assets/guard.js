// What a plan is predicted to cost, beside uniform widths of its size in total and the best width for each layer.

import { budgetWithin, wholeProblem } from "./budget.js";
import { fixed, general } from "./format.js";
import { planBits } from "./sizes.js";

/** The judge's cost of a layer; null where the table cannot tell. */
export function layerCost(table, place, choice) {
  const columns = table.costs[table.judge];
  if (!columns) return null;
  if (typeof choice === "number") return choice >= 16 ? 0 : columns[place][table.column.get(choice)];
  if (!table.channelCosts || choice.important === undefined) return null;
  const order = table.channelOrder(place);
  const flat = table.channelCosts[place];
  const [high, low] = [flat[table.column.get(choice.high)], flat[table.column.get(choice.low)]];
  let sum = 0;
  order.forEach((channel, rank) => { sum += rank < choice.important ? high[channel] : low[channel]; });
  return sum;
}

export function planCost(table, choices) {
  let sum = 0;
  for (let place = 0; place < choices.length; place++) {
    const cost = layerCost(table, place, choices[place]);
    if (cost === null) return null;
    sum += cost;
  }
  return sum;
}

/** [size in total, cost] of each uniform plan, by size. */
export function uniformPoints(table) {
  const whole = table.bits.filter((bits) => table.possible.every((own) => own.has(bits)));
  const points = whole.map((bits) => {
    const choices = table.layers.map(() => bits);
    return [planBits(table, choices).total, planCost(table, choices)];
  });
  return points.sort((a, b) => a[0] - b[0]);
}

/** What uniform widths of that size cost, interpolated as the library does; null below the smallest. */
export function uniformCost(points, total) {
  const below = points.filter(([size]) => size <= total);
  const above = points.filter(([size]) => size > total);
  if (!below.length) return null;
  const [size, cost] = below.at(-1);
  if (!above.length || cost <= 0 || above[0][1] <= 0) return cost;
  const share = (total - size) / (above[0][0] - size);
  return Math.exp((1 - share) * Math.log(cost) + share * Math.log(above[0][1]));
}

/** Judges plans of one table; what does not depend on the plan is worked out once. */
export function makeGuard(table) {
  if (!table.judge) return () => null;
  let known = null;
  return (choices, total) => {
    const cost = planCost(table, choices);
    if (cost === null) return null;
    known ??= {
      uniform: uniformPoints(table),
      best: wholeProblem(table, table.judge, "total"),
    };
    const uniform = uniformCost(known.uniform, total);
    const best = budgetWithin(known.best, total);
    const said = [`predicted ${table.judge} at ${fixed(total / Math.max(1, table.numel), 3)} bits in total: ${general(cost)}`];
    if (uniform !== null) said.push(`uniform widths of that size ${general(uniform)}`);
    if (best !== null) said.push(`a width for each layer can reach ${general(best.cost)}`);
    const worse = uniform !== null && cost > 1.001 * uniform && best !== null && cost > 1.001 * best.cost;
    return { cost, text: said.join(", "), worse };
  };
}
