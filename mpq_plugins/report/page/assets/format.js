// Numbers and names as Python and the library write them.

/** A double as Python's repr has it: 2.0, 1e-05, 1e+16. */
export function pythonFloat(value) {
  if (Object.is(value, -0)) return "-0.0";
  const [digits, exponent] = value.toExponential().split("e");
  const power = Number(exponent);
  if (value === 0 || (power >= -4 && power < 16)) return Number.isInteger(value) ? `${value}.0` : String(value);
  return digits + pythonPower(power);
}

/** A number to so many decimals, as Python's %.3f has it: what lies just between two goes to the even one. */
export function fixed(value, decimals) {
  if (!Number.isFinite(value)) return general(value);
  const exact = value.toFixed(decimals + 1);
  const between = exact.endsWith("5") && Number.isInteger(value * 2 ** (decimals + 1));
  return between && cutIsEven(exact) ? cut(exact) : value.toFixed(decimals); // which is away from 0
}

/** As toExponential, and between two as `fixed`. */
function exponential(value, decimals) {
  const exact = value.toExponential(decimals + 1);
  const [mantissa, exponent] = exact.split("e");
  const places = decimals + 1 - Number(exponent);
  const between = mantissa.endsWith("5") && (places > 0 ? Number.isInteger(value * 2 ** places) : Number(exact) === value);
  return between && cutIsEven(mantissa) ? `${cut(mantissa)}e${exponent}` : value.toExponential(decimals);
}

/** Without the last digit. */
function cut(text) {
  return text.slice(0, -1).replace(/\.$/, "");
}

function cutIsEven(text) {
  return Number(cut(text).at(-1)) % 2 === 0;
}

/** A number to so many digits, as Python's %.4g has it. */
export function general(value, digits = 4) {
  if (!Number.isFinite(value)) return value > 0 ? "inf" : value < 0 ? "-inf" : "nan";
  if (value === 0) return "0";
  const [mantissa, exponent] = exponential(value, digits - 1).split("e");
  const power = Number(exponent);
  const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (power < -4 || power >= digits) return bare(mantissa) + pythonPower(power);
  return bare(fixed(value, digits - 1 - power));
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
    if (value < 1000 || unit === "GB") return unit === "B" ? `${count} B` : `${fixed(value, 2)} ${unit}`;
    value /= 1000;
  }
  return "";
}

const GROUPED = new Intl.NumberFormat("en-US");

export function grouped(count) {
  return GROUPED.format(count);
}

export function percent(share) {
  return `${fixed(100 * share, share < 0.0995 ? 2 : 1)} %`;
}

/** A word as a POSIX shell takes it, as Python's shlex.quote writes it. */
export function shellQuoted(word) {
  if (word && !/[^A-Za-z0-9_@%+=:,./-]/.test(word)) return word;
  return `'${word.replaceAll("'", "'\"'\"'")}'`;
}

/** What a layer is called where it can be read: a module that is a layer itself has no name. */
export function nameText(name) {
  return name.trim() === "" ? "(no name)" : name;
}

/** A width in words: 4 bits, float16. */
export function widthText(bits) {
  return bits >= 16 ? `float${bits}` : String(bits);
}

/** A layer's choice in words: 5, 3x12 8x4, 1.25 coded. */
export function choiceText(choice) {
  if (typeof choice === "number") return widthText(choice);
  if (choice.coded !== undefined) return `${fixed(choice.coded, 2)} coded`;
  return choice.parts.map(([bits, count]) => `${widthText(bits)}x${count}`).join(" ");
}
