// What only `mpq explore` has behind the page: the exact Budget, and evaluations.

import { byId } from "./dom.js";
import { unpackScores } from "./unpack.js";

async function ask(url, body) {
  const request = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(url, request).catch(() => null);
  if (answer === null) throw new Error("the server does not answer; start mpq explore again, and open the page that it names");
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error ?? `the server answered ${answer.status}`);
  return said;
}

/** What the server needs to make the plan that is shown. */
function requestOf(page) {
  if (page.point !== null) return { point: page.point };
  const { state, table } = page;
  const named = (place) => table.layers[place].name;
  return { ...state, pins: [...state.pins].map(([place, bits]) => [named(place), bits]), parts: byId("exact-parts").checked };
}

/** The plan that was answered, with what was asked for it: it may be asked for again, evaluated. */
function planOf(answer, request) {
  const choices = answer.layers.map((own) => (Array.isArray(own) ? { parts: own } : own));
  return {
    title: answer.title, choices, bits: { codes: answer.weights_only_bits, total: answer.total_bits, each: answer.sizes },
    guard: answer.guard === null ? null : { cost: answer.cost, text: answer.guard, worse: answer.worse }, command: answer.command, record: null, json: answer.json, request,
    scores: unpackScores(answer.scores ?? {}), rounding: answer.rounding, file_bytes: answer.file_bytes ?? null,
  };
}

/** Offer what the server does; a page that is a file offers nothing. */
export function connect(page, { show }) {
  const { served } = page.doc;
  byId("served").hidden = !served;
  if (!served) return;
  const [exact, evaluate, bar, said] = ["exact", "evaluate", "progress", "served-said"].map(byId);
  evaluate.hidden = !served.evaluates;
  byId("parts-box").hidden = !served.parts;
  async function working(what, work) {
    const focused = document.activeElement; // which being disabled would lose
    exact.disabled = evaluate.disabled = true;
    bar.hidden = false;
    bar.removeAttribute("value");
    said.textContent = what;
    const timer = setInterval(async () => {
      try {
        const { name, done, total } = await ask(`${served.base}progress`);
        if (total) [bar.max, bar.value] = [total, done];
        if (name) said.textContent = `${what}: ${name}`;
      } catch { /* the answer itself says what is wrong */ }
    }, 300);
    try {
      await work();
      said.textContent = "";
    } catch (error) {
      said.textContent = error.message;
    } finally {
      clearInterval(timer);
      bar.hidden = true;
      exact.disabled = evaluate.disabled = false;
      if (document.activeElement === document.body) focused.focus();
    }
  }

  exact.addEventListener("click", () => working("solving", async () => {
    const request = { ...requestOf({ ...page, point: null }), allocator: "budget" };
    show(planOf(await ask(`${served.base}plan`, request), request));
  }));
  evaluate.addEventListener("click", () => working("evaluating", async () => {
    const request = page.plan.request ?? requestOf(page);
    show(planOf(await ask(`${served.base}evaluate`, request), request));
  }));
}
