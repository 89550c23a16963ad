// Budget per layer, by the Lagrangian: each layer goes down the lower convex hull of its costs over its sizes, the
// steepest step first. What the hulls leave out the library's exact solver may still take. In a network of few layers
// that is much, so there the best of all plans is taken in which one layer is forced to a width.

import { widthBits } from "./sizes.js";

const MOST_FORCED = 64; // layers

/** Which of these points are on their lower convex hull, by size. */
function hullOf(sizes, costs) {
  const slope = (from, to) => (costs[from] - costs[to]) / (sizes[to] - sizes[from]); // what is saved for a bit
  const hull = [];
  for (const point of bySize(sizes, costs)) {
    if (hull.length && costs[point] >= costs[hull.at(-1)]) continue;
    while (hull.length > 1 && slope(hull.at(-2), hull.at(-1)) <= slope(hull.at(-2), point)) hull.pop();
    hull.push(point);
  }
  return hull;
}

function bySize(sizes, costs) {
  const order = sizes.map((_, i) => i);
  const ascend = sizes.every((size, i) => i === 0 || sizes[i - 1] < size); // as they nearly always do
  return ascend ? order : order.sort((a, b) => sizes[a] - sizes[b] || costs[a] - costs[b]);
}

/** Steps down hulls, a column each: of large networks these are many, and objects of them would take most of the time. */
class Steps {
  constructor(most) {
    this.count = 0;
    [this.place, this.bits] = [new Uint32Array(most), new Uint8Array(most)];
    [this.size, this.saved, this.slope] = [new Float64Array(most), new Float64Array(most), new Float64Array(most)];
    this.order = []; // the steepest first
  }

  push(place, bits, size, saved) {
    const step = this.count++;
    [this.place[step], this.bits[step], this.size[step], this.saved[step]] = [place, bits, size, saved];
    this.slope[step] = saved / size;
  }

  /** By slope, and equal ones as they came: each to its rank, for browsers sort plain numbers ten times as fast. */
  sort() {
    const down = this.slope.subarray(0, this.count).map((slope) => -slope);
    const ranks = down.slice().sort();
    const taken = new Uint32Array(this.count);
    this.order = new Uint32Array(this.count);
    down.forEach((slope, step) => {
      const rank = firstNotBelow(ranks, slope);
      this.order[rank + taken[rank]++] = step;
    });
  }
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

/** Where every layer starts, and all steps. pins: place -> bits. counted: "codes" or "total". */
export function budgetProblem(table, { sensitivity, bits, pins, counted }) {
  const few = table.layers.length <= MOST_FORCED;
  const start = [];
  const steps = new Steps(table.layers.length * bits.length);
  const points = [];
  let size = 0;
  let cost = 0;
  for (const layer of table.layers) {
    const { place } = layer;
    const widths = pins.has(place) ? [pins.get(place)] : bits.filter((b) => table.possible[place].has(b));
    if (!widths.length) throw new Error(`layer ${layer.name}: has none of the candidate widths; pin it`);
    const known = table.costs[sensitivity][place];
    const sizes = widths.map((b) => widthBits(table, layer, b, counted));
    const costs = widths.map((b) => (b >= 16 ? 0 : known[table.column.get(b)]));
    if (few && widths.length > 1) points.push(...widths.map((b, i) => ({ place, bits: b, size: sizes[i], cost: costs[i] })));
    const hull = hullOf(sizes, costs);
    const first = { bits: widths[hull[0]], size: sizes[hull[0]], cost: costs[hull[0]] };
    start.push(first);
    size += first.size;
    cost += first.cost;
    for (let i = 1; i < hull.length; i++) {
      const [from, to] = [hull[i - 1], hull[i]];
      steps.push(place, widths[to], sizes[to] - sizes[from], costs[from] - costs[to]);
    }
  }
  steps.sort();
  return { start, steps, points, size, cost };
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
  for (const forced of problem.points) {
    const other = steepest(problem, most, forced);
    if (other !== null && other.cost < best.cost) best = other;
  }
  return { choices: best.choices, cost: best.cost, bound: Math.min(bound, best.cost), size: best.size };
}

/** The steepest steps that fit, one layer forced to a width where that is asked; null where it does not fit. */
function steepest({ start, steps, ...from }, most, forced) {
  const choices = start.map((point) => point.bits);
  const stopped = new Uint8Array(start.length);
  let { size, cost } = from;
  let bound = null;
  if (forced !== null) {
    size += forced.size - start[forced.place].size;
    cost += forced.cost - start[forced.place].cost;
    if (size > most) return null;
    choices[forced.place] = forced.bits;
    stopped[forced.place] = 1;
  }
  for (const step of steps.order) {
    const place = steps.place[step];
    if (stopped[place]) continue;
    if (size + steps.size[step] > most) {
      bound ??= cost - steps.slope[step] * (most - size);
      stopped[place] = 1; // its next steps begin where this one ends
      continue;
    }
    choices[place] = steps.bits[step];
    size += steps.size[step];
    cost -= steps.saved[step];
  }
  return { choices, cost, bound: bound ?? cost, size };
}

const CURVE = 400; // points, as many as can be told apart

/** Points that the steepest steps pass, for a curve: [size, cost] from the smallest up. */
export function budgetCurve({ steps, ...start }) {
  let { size, cost } = start;
  const curve = [[size, cost]];
  const every = Math.ceil(steps.count / CURVE);
  steps.order.forEach((step, i) => {
    size += steps.size[step];
    cost -= steps.saved[step];
    if (i % every === 0 || i === steps.count - 1) curve.push([size, cost]);
  });
  return curve;
}
