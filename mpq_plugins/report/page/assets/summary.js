// What the plan comes to: its size, its bits, the guard's word, and the command that makes it.

import { byId, element } from "./dom.js";
import { bytesText, fixed, general } from "./format.js";
import { fileOf } from "./plan.js";

function tile(label, value, more = "") {
  return element("div", { class: "tile" }, element("span", { class: "label" }, label), element("span", { class: "value" }, value), ...(more ? [element("span", { class: "more" }, more)] : []));
}

/** How near the best a plan is known to be; nothing where the best may lose nothing. */
function nearText({ cost, bound }) {
  if (cost > 0 && bound <= 0) return "";
  return `within ${general(cost > bound ? 100 * (cost / bound - 1) : 0, 2)} % of the best there is`;
}

function tilesOf(page, plan) {
  const { table, state } = page;
  const { codes, total } = plan.bits;
  const numel = Math.max(1, page.numel);
  const tiles = [
    tile("in total", bytesText(Math.ceil(total / 8)), `${fixed(total / numel, 3)} bits a weight`),
    tile("weights only", bytesText(Math.ceil(codes / 8)), `${fixed(codes / numel, 3)} bits a weight`),
    tile("against float32", `${fixed((32 * numel) / Math.max(1, total), 2)}x`, "smaller"),
  ];
  if (table && table.rest_bytes !== null) tiles.push(tile("whole model", bytesText(Math.ceil(total / 8) + table.rest_bytes), `${bytesText(table.rest_bytes)} of it not planned`));
  if (plan.file_bytes) tiles.push(tile("file", bytesText(plan.file_bytes)));
  if (plan.guard?.cost !== undefined && table) tiles.push(tile(`predicted ${table.judge}`, general(plan.guard.cost), plan.found && state.sensitivity === table.judge ? nearText(plan.found) : ""));
  for (const [name, value] of Object.entries(plan.scores ?? {})) {
    const float = page.doc.float?.scores[name];
    tiles.push(tile(name, general(value, 5), float === undefined ? plan.rounding : `float ${general(float, 5)}`));
  }
  return tiles;
}

function untold(page, plan) {
  if (plan.foreign) return "The plan has another scheme, or other widths, than the table measured; mpq evaluate tells.";
  if (!page.table?.judge) return "The table has nothing that plans are compared on; measure with --metrics relative,mse.";
  return "Channels of a layer differ in width, and their errors are not in this page; mpq plan compares where they were measured.";
}

/** What a plan's own guard says, as a sentence; a warning where uniform widths win. */
function showGuard(page, plan) {
  const node = byId("guard");
  const guard = plan.guard;
  node.hidden = !page.table && !guard;
  node.classList.toggle("warning", Boolean(guard?.worse));
  node.replaceChildren(element("strong", {}, guard ? (guard.worse ? "Worse than uniform widths. " : "The guard: ") : "The guard cannot tell. "), guard ? guard.text : untold(page, plan));
}

/** Why a page that is a file has no file of a plan. */
function whyNoFile(plan) {
  if (!plan.command) return "This plan was given as a file, and no command is known to make it from this page's table.";
  return plan.point
    ? "Run the command for the file: this page has the bits of that plan, and not which channels have them."
    : "Run the command for the file: Budget's exact solver makes it, which this page does not have, and it is at least as good.";
}

function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(byId("command")); // for the reader's own keys
    button.textContent = "press Ctrl+C";
  }
  setTimeout(() => { button.textContent = "copy"; }, 1500);
}

/** Shows a plan's sums; its buttons act on the plan that is shown. */
export function makeSummary(page) {
  byId("copy").addEventListener("click", () => copy(page.plan.command, byId("copy")));
  byId("download").addEventListener("click", () => {
    const text = page.plan.json ?? fileOf(page.table, page.plan);
    if (text) download("plan.json", text);
  });
  return (plan) => {
    byId("plan-title").textContent = plan.title;
    byId("error").hidden = !plan.error;
    byId("error").textContent = plan.error ?? "";
    byId("result").hidden = Boolean(plan.error);
    if (plan.error) return;
    byId("tiles").replaceChildren(...tilesOf(page, plan));
    showGuard(page, plan);
    byId("command-box").hidden = !plan.command;
    byId("command").textContent = plan.command ?? "";
    const can = Boolean(plan.json || plan.record);
    byId("download").disabled = !can;
    byId("download-note").textContent = can ? "The file is the one that the command writes." : whyNoFile(plan);
  };
}
