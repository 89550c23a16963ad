// Numbers and names as Python and the library write them.

/** A double as Python's repr has it: 2.0, 1e-05, 1e+16. */
export function pythonFloat(value) {
  if (Object.is(value, -0)) return "-0.0";
  const [digits, exponent] = value.toExponential().split("e");
  const power = Number(exponent);
  if (value === 0 || (power >= -4 && power < 16)) return Number.isInteger(value) ? `${value}.0` : String(value);
  return digits + pythonPower(power);
}

/** A number to so many digits, as Python's %.4g has it. */
export function general(value, digits = 4) {
  if (!Number.isFinite(value)) return value > 0 ? "inf" : value < 0 ? "-inf" : "nan";
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  const power = Number(exponent);
  const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (power < -4 || power >= digits) return bare(mantissa) + pythonPower(power);
  return bare(value.toFixed(digits - 1 - power));
}

function pythonPower(power) {
  return `e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
}

/** A number on an axis: 1000 and 0.05, and powers of ten where these are long. */
export function tickText(value) {
  const size = Math.abs(value);
  return size === 0 || (size >= 1e-3 && size < 1e6) ? String(Number(value.toPrecision(4))) : general(value, 3);
}

/** 1.07 MB, in decimal units. */
export function bytesText(count) {
  let value = count;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000 || unit === "GB") return unit === "B" ? `${count} B` : `${value.toFixed(2)} ${unit}`;
    value /= 1000;
  }
  return "";
}

const GROUPED = new Intl.NumberFormat("en-US");

export function grouped(count) {
  return GROUPED.format(count);
}

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;
}

/** A word as a POSIX shell takes it, as Python's shlex.quote writes it. */
export function shellQuoted(word) {
  if (word && !/[^A-Za-z0-9_@%+=:,./-]/.test(word)) return word;
  return `'${word.replaceAll("'", "'\"'\"'")}'`;
}

/** A width in words: 4 bits, float16. */
export function widthText(bits) {
  return bits >= 16 ? `float${bits}` : String(bits);
}

/** A layer's choice in words: 5, 3x12 8x4, 1.25 coded. */
export function choiceText(choice) {
  if (typeof choice === "number") return widthText(choice);
  if (choice.coded !== undefined) return `${choice.coded.toFixed(2)} coded`;
  return choice.parts.map(([bits, count]) => `${widthText(bits)}x${count}`).join(" ");
}
