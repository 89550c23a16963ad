// PTILMPQ (arXiv 2404.02947): important layers, and important channels inside every layer, get the higher bits.

import { general } from "./format.js";

/** ceil(fraction x count); the fraction's last bit does not make an eighth layer of seven. */
export function shareOf(fraction, count) {
  return Math.ceil(Number((fraction * count).toFixed(9)));
}

/** Why a table cannot be planned so; null where it can. */
export function ptilmpqLacks(table) {
  if (!table.parts) return `A page does not decide which channels of a layer can differ in width under the table's scheme, ${table.scheme}; mpq plan TABLE -a ptilmpq does.`;
  if (table.channel_orders === null) return "A page has no room for the order of so many channels; mpq plan decides them.";
  return ptilmpqMiddles(table).length ? null : "The table has no three widths in a row; measure with --bits 1-8.";
}

/** Widths that have both neighbours: important layers get n + 1 and n, the others n and n - 1. */
export function ptilmpqMiddles(table) {
  return table.bits.filter((b) => table.column.has(b - 1) && table.column.has(b + 1));
}

/** A layer's choice: its first `important` channels, from the most important down, are `high`. */
function split(layer, important, [high, low]) {
  const others = layer.channels - important;
  if (high === low || !others) return layer.channels ? high : 8;
  if (!important) return low;
  return { parts: [[low, others], [high, important]], important, high, low };
}

/** Refuse what would make a plan smaller as alpha rises, as the library does. */
function checkBetas(important, other) {
  if (important >= other) return;
  throw new Error(`beta_important: ${general(important, 6)} is below beta_other ${general(other, 6)}; important layers keep at least the share of important channels that others do`);
}

/** Choices by layer. Orders are the table's, as the library has them. */
export function ptilmpq(table, { alpha, beta_important, beta_other, important_bits, other_bits }) {
  checkBetas(beta_important, beta_other);
  const important = new Set(table.order.slice(0, shareOf(alpha, table.layers.length)));
  return table.layers.map((layer) => {
    const chosen = important.has(layer.place);
    const count = shareOf(chosen ? beta_important : beta_other, layer.channels);
    return split(layer, count, chosen ? important_bits : other_bits);
  });
}

/** The channels of a part, ascending. */
export function channelsOf(table, place, choice, bits) {
  const order = table.channelOrder(place);
  return (bits === choice.high ? order.slice(0, choice.important) : order.slice(choice.important)).sort();
}
