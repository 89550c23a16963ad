// What is embedded, as the arrays that the page computes with.

function bytesOf(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Doubles to the last bit: one array, or an array a row. */
export function unpackDoubles({ shape, f64 }) {
  const flat = new Float64Array(bytesOf(f64).buffer);
  if (shape.length < 2) return flat;
  return Array.from({ length: shape[0] }, (_, row) => flat.subarray(row * shape[1], (row + 1) * shape[1]));
}

/** Permutations of 0..length-1, each entry in as many bits as length - 1 has, the highest first. */
export function unpackPermutations(text, lengths) {
  const bytes = bytesOf(text);
  let place = 0;
  return lengths.map((length) => {
    const width = length > 1 ? 32 - Math.clz32(length - 1) : 0;
    const order = new Uint32Array(length);
    for (let i = 0; i < length; i++) {
      let value = 0;
      for (let k = 0; k < width; k++, place++) value = (value << 1) | ((bytes[place >> 3] >> (7 - (place & 7))) & 1);
      order[i] = value;
    }
    return order;
  });
}

/** Scores as numbers, infinite ones among them, for which JSON has only a text. */
export function unpackScores(scores) {
  return Object.fromEntries(Object.entries(scores).map(([name, value]) => [name, Number(value)]));
}

/** The layers with what their shapes say. */
export function unpackLayers(layers) {
  return layers.map((layer, place) => {
    const numel = layer.shape.reduce((product, side) => product * side, 1);
    const channels = layer.shape[layer.channel_axis];
    return { ...layer, place, numel, channels, perChannel: Math.floor(numel / Math.max(1, channels)) };
  });
}

/** Errors as they are, or those of each layer times its weights. */
function timesOf(errors, times, layers) {
  return times === 1 ? errors : errors.map((own, place) => own.map((error) => error * layers[place].numel));
}

/** A table ready to plan from; layers as unpackLayers gives them. */
export function unpackTable(table, layers) {
  const each = (columns, unpack) => Object.fromEntries(Object.entries(columns).map(([name, one]) => [name, unpack(one)]));
  const errors = each(table.errors, unpackDoubles);
  const unpackCosts = (one) => (one.errors === undefined ? unpackDoubles(one) : timesOf(errors[one.errors], one.times, layers));
  const possible = layers.map(() => new Set(table.bits));
  for (const [place, bits] of table.impossible) possible[place].delete(bits);
  let orders = null;
  return {
    ...table,
    layers,
    numel: layers.reduce((sum, layer) => sum + layer.numel, 0),
    column: new Map(table.bits.map((bits, column) => [bits, column])),
    byWidth: new Map(table.bits.map((bits, column) => [bits, table.widths[column]])),
    errors,
    costs: each(table.costs, unpackCosts),
    importances: unpackDoubles(table.importances),
    channelCosts: table.channel_costs && table.channel_costs.map(unpackDoubles),
    possible,
    problems: new Map(), // of Budget, as they are asked for
    // Of large networks these take a moment, so they wait until they are asked for.
    channelOrder(place) {
      orders ??= unpackPermutations(table.channel_orders, layers.map((layer) => layer.channels));
      return orders[place];
    },
  };
}
