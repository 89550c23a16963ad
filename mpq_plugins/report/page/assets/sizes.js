// What a choice takes, in bits, as the library counts it.

const FLOATS = 16; // bits from which a width is floating point, without scales

function partBits(table, layer, bits, channels) {
  const weights = channels * layer.perChannel;
  if (bits >= FLOATS) return { codes: weights * bits, beside: 0 };
  const { interval, group, layer: ofLayer } = table.byWidth.get(bits);
  const groups = layer.numel ? Math.max(1, channels * table.groups[layer.place]) : 0;
  return { codes: weights * (bits + interval), beside: groups * group + (groups ? ofLayer : 0) };
}

/** Bits of a layer of one width: of its codes, or in total. */
export function widthBits(table, layer, bits, counted) {
  if (bits >= FLOATS) return layer.numel * bits;
  const { interval, group, layer: ofLayer } = table.byWidth.get(bits);
  const codes = layer.numel * (bits + interval);
  if (counted === "codes" || !layer.numel) return codes;
  return codes + Math.max(1, layer.channels * table.groups[layer.place]) * group + ofLayer;
}

/** Bits of a layer's codes, and of everything. */
export function layerBits(table, layer, choice) {
  const parts = typeof choice === "number" ? [[choice, layer.channels]] : choice.parts;
  let codes = 0;
  let total = parts.length > 1 ? layer.channels * Math.ceil(Math.log2(parts.length)) : 0;
  for (const [bits, channels] of parts) {
    const part = partBits(table, layer, bits, channels);
    codes += part.codes;
    total += part.codes + part.beside;
  }
  return { codes, total };
}

/** The same for all layers together, with each layer's total. */
export function planBits(table, choices) {
  let codes = 0;
  let total = 0;
  const each = choices.map((choice, place) => {
    const bits = layerBits(table, table.layers[place], choice);
    codes += bits.codes;
    total += bits.total;
    return bits.total;
  });
  return { codes, total, each };
}

/** Bits a weight of a choice, for its height in a chart. */
export function averageWidth(layer, choice) {
  if (typeof choice === "number") return choice;
  if (choice.coded !== undefined) return choice.coded;
  return choice.parts.reduce((sum, [bits, count]) => sum + bits * count, 0) / Math.max(1, layer.channels);
}

/** Refuse what the scheme cannot hold, as the library does. */
export function checkPossible(table, choices) {
  choices.forEach((choice, place) => {
    if (typeof choice === "number" && choice < FLOATS && !table.possible[place].has(choice)) {
      throw new Error(`layer ${table.layers[place].name}: cannot have ${choice} bits under ${table.quantizer}; choose other widths`);
    }
  });
  return choices;
}
