// Budget per layer, by the Lagrangian: each layer goes down the lower convex hull of its costs over its sizes, the
// steepest step first. What the hulls leave out the library's exact solver may still take. In a network of few layers
// that is much, so there the best of all plans is taken in which one layer is forced to a width.

import { widthBits } from "./sizes.js";

const MOST_FORCED = 64; // layers

/** Points (bits, size, cost) of a layer on its lower convex hull, by size. */
function hullOf(points) {
  const hull = [];
  for (const point of points.sort((a, b) => a.size - b.size || a.cost - b.cost)) {
    if (hull.length && point.cost >= hull.at(-1).cost) continue;
    while (hull.length > 1 && slope(hull.at(-2), hull.at(-1)) <= slope(hull.at(-2), point)) hull.pop();
    hull.push(point);
  }
  return hull;
}

/** What is saved for a bit. */
function slope(from, to) {
  return (from.cost - to.cost) / (to.size - from.size);
}

/** A layer's widths as points, and the hull of them. */
function pointsOf(table, layer, widths, costs, counted) {
  return widths.map((b) => ({
    place: layer.place, bits: b, size: widthBits(table, layer, b, counted), cost: b >= 16 ? 0 : costs[table.column.get(b)],
  }));
}

/** Where every layer starts, and all steps, the steepest first. pins: place -> bits. counted: "codes" or "total". */
export function budgetProblem(table, { sensitivity, bits, pins, counted }) {
  const costs = table.costs[sensitivity];
  const few = table.layers.length <= MOST_FORCED;
  const start = [];
  const steps = [];
  const points = [];
  let size = 0;
  let cost = 0;
  for (const layer of table.layers) {
    const { place } = layer;
    const widths = pins.has(place) ? [pins.get(place)] : bits.filter((b) => table.possible[place].has(b));
    if (!widths.length) throw new Error(`layer ${layer.name}: has none of the candidate widths; pin it`);
    const own = pointsOf(table, layer, widths, costs[place], counted);
    if (few && own.length > 1) points.push(...own);
    const hull = hullOf(own);
    start.push(hull[0]);
    size += hull[0].size;
    cost += hull[0].cost;
    for (let i = 1; i < hull.length; i++) {
      const [from, to] = [hull[i - 1], hull[i]];
      steps.push({ place, bits: to.bits, size: to.size - from.size, saved: from.cost - to.cost, slope: slope(from, to) });
    }
  }
  return { start, steps: steepestFirst(steps), points, size, cost };
}

/** By slope, and equal ones as they come: each goes to its rank, for browsers sort plain numbers ten times as fast. */
function steepestFirst(steps) {
  const down = Float64Array.from(steps, (step) => -step.slope);
  const ranks = down.slice().sort();
  const taken = new Uint32Array(steps.length);
  const sorted = new Array(steps.length);
  steps.forEach((step, i) => {
    const rank = firstNotBelow(ranks, down[i]);
    sorted[rank + taken[rank]++] = step;
  });
  return sorted;
}

function firstNotBelow(sorted, value) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The problem of the whole table without pins, which guard, curve and planner share. */
export function wholeProblem(table, sensitivity, counted) {
  const key = JSON.stringify([sensitivity, counted]);
  if (!table.problems.has(key)) table.problems.set(key, budgetProblem(table, { sensitivity, bits: table.bits, pins: new Map(), counted }));
  return table.problems.get(key);
}

/** Choices of at most this size; their cost, and a bound that no choice of one width a layer is below. */
export function budgetWithin(problem, most) {
  if (problem.size > most) return null;
  let best = steepest(problem, most, null);
  const { bound } = best;
  for (const forced of problem.start.length <= MOST_FORCED ? problem.points : []) {
    const other = steepest(problem, most, forced);
    if (other !== null && other.cost < best.cost) best = other;
  }
  return { choices: best.choices, cost: best.cost, bound: Math.min(bound, best.cost), size: best.size };
}

/** The steepest steps that fit, one layer forced to a width where that is asked; null where it does not fit. */
function steepest(problem, most, forced) {
  const choices = problem.start.map((point) => point.bits);
  const stopped = new Set();
  let { size, cost } = problem;
  let bound = null;
  if (forced !== null) {
    const from = problem.start[forced.place];
    size += forced.size - from.size;
    cost += forced.cost - from.cost;
    if (size > most) return null;
    choices[forced.place] = forced.bits;
    stopped.add(forced.place);
  }
  for (const step of problem.steps) {
    if (stopped.has(step.place)) continue;
    if (size + step.size > most) {
      bound ??= cost - step.slope * (most - size);
      stopped.add(step.place); // its next steps begin where this one ends
      continue;
    }
    choices[step.place] = step.bits;
    size += step.size;
    cost -= step.saved;
  }
  return { choices, cost, bound: bound ?? cost, size };
}

const CURVE = 400; // points, as many as can be told apart

/** Points that the steepest steps pass, for a curve: [size, cost] from the smallest up. */
export function budgetCurve(problem) {
  let { size, cost } = problem;
  const curve = [[size, cost]];
  const every = Math.ceil(problem.steps.length / CURVE);
  problem.steps.forEach((step, i) => {
    size += step.size;
    cost -= step.saved;
    if (i % every === 0 || i === problem.steps.length - 1) curve.push([size, cost]);
  });
  return curve;
}
