// A plan's file, byte for byte as the library writes it.

import { pythonFloat } from "./format.js";
import { channelsOf } from "./ptilmpq.js";

/** A number that Python has as a float. */
export class PythonFloat {
  constructor(value) {
    this.value = value;
  }
}

/** A value that the library has written already: as a file has it, and as a checksum reads it. */
class Written {
  constructor(line, sealed) {
    this.line = line;
    this.sealed = sealed;
  }
}

const inOrder = (a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0);
const escaped = (text) => text.replace(/[\u007f-\uffff]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** As Python's json.dumps: a line of a file, or compact, in ASCII and sorted for the checksum. */
function dumps(value, sealed) {
  if (value instanceof Written) return sealed ? value.sealed : value.line;
  if (value instanceof PythonFloat) return pythonFloat(value.value);
  if (typeof value === "string") return sealed ? escaped(JSON.stringify(value)) : JSON.stringify(value);
  const [comma, colon] = sealed ? [",", ":"] : [", ", ": "];
  if (Array.isArray(value)) return `[${value.map((inner) => dumps(inner, sealed)).join(comma)}]`;
  if (value !== null && typeof value === "object") {
    const entries = Object.entries(value);
    const members = (sealed ? entries.sort(inOrder) : entries).map(([key, inner]) => dumps(key, sealed) + colon + dumps(inner, sealed));
    return `{${members.join(comma)}}`;
  }
  return JSON.stringify(value);
}

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let k = 0; k < 8; k++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** CRC-32 of an ASCII text, in eight hexadecimal digits. */
export function checksum(text) {
  let crc = 0xffffffff;
  for (let i = 0; i < text.length; i++) crc = CRC[(crc ^ text.charCodeAt(i)) & 255] ^ (crc >>> 8);
  return ((crc ^ 0xffffffff) >>> 0).toString(16).padStart(8, "0");
}

/** Channels that ascend, as 0-2,5. */
export function runsText(channels) {
  const runs = [];
  for (const channel of channels) {
    if (runs.length && runs.at(-1)[1] === channel - 1) runs.at(-1)[1] = channel;
    else runs.push([channel, channel]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(",");
}

function layerEntry(table, layer, choice) {
  const widths = typeof choice === "number"
    ? { bits: choice }
    : { parts: choice.parts.map(([bits]) => ({ bits, channels: runsText(channelsOf(table, layer.place, choice, bits)) })) };
  const scheme = table.written.schemes[table.written.scheme_of[layer.place]];
  const tied = layer.tied.length ? { tied: layer.tied } : {};
  return {
    name: layer.name, kind: layer.kind, shape: layer.shape, channel_axis: layer.channel_axis, numel: layer.numel,
    ...widths, scheme: new Written(...scheme), ...tied,
  };
}

/** The file's text. record: {name, parameters}, floats as PythonFloat. */
export function planJson(table, record, choices) {
  const head = {};
  for (const [key, line, sealed] of table.written.head) {
    head[key] = new Written(line, sealed);
    if (key === "made_with") head.allocator = record;
  }
  const layers = table.layers.map((layer) => layerEntry(table, layer, choices[layer.place]));
  head.checksum = checksum(dumps({ ...head, layers }, true));
  const lines = Object.entries(head).map(([key, value]) => `  ${dumps(key, false)}: ${dumps(value, false)},\n`).join("");
  return `{\n${lines}  "layers": [\n${layers.map((layer) => `    ${dumps(layer, false)}`).join(",\n")}\n  ]\n}\n`;
}
