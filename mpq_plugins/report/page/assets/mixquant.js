// MixQuant (arXiv 2309.17341, Alg. 1): the fewest bits whose error stays within QEM of the baseline's.

/** What a table of these widths gives MixQuant: its usual candidates, as far as they were measured. */
export function mixquantSettings(table) {
  const bits = table.bits.filter((b) => b >= 2);
  return { qem: 2, metric: "relative", bits, baseline: table.column.has(8) ? 8 : Math.max(...table.bits) };
}

/** Why a table cannot be planned so; null where it can. */
export function mixquantLacks(table) {
  if (!["relative", "mse", "rmse", "max_abs"].some((metric) => table.metrics.includes(metric))) return "The table has no error that can be bounded; measure with --metrics relative.";
  return table.bits.some((bits) => bits >= 2) ? null : "The table has no width above 1 bit; measure with --bits 2-8.";
}

/** Widths by layer. The comparison is the library's, of the same doubles. */
export function mixquant(table, { qem, metric, bits, baseline }) {
  const columns = bits.map((b) => table.column.get(b));
  const base = table.column.get(baseline);
  return table.errors[metric].map((errors) => {
    const most = qem * errors[base];
    const found = columns.findIndex((column) => errors[column] <= most);
    return found < 0 ? baseline : bits[found];
  });
}
