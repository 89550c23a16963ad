// Elements by what they are and hold. Texts are always texts, whatever is in them.

const SVG = "http://www.w3.org/2000/svg";

/** An element; attributes that begin with "on" are listeners, and children texts or elements. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}

/** Draw a node's elements anew, and leave the keyboard on the button that is where the one was that had it. */
export function keepingFocus(node, redraw) {
  const buttons = () => [...node.querySelectorAll("button")];
  const place = buttons().indexOf(document.activeElement);
  redraw();
  if (place >= 0) buttons()[place]?.focus();
}

/** A chart without the library's own style element, which the page's policy forbids; the page's style has its rules. */
export function placed(chart, node) {
  for (const style of chart.querySelectorAll("style")) style.remove();
  node.replaceChildren(chart);
  return chart.tagName === "svg" ? chart : chart.querySelector(":scope > svg:last-of-type");
}

/** One box that says what is under the pointer. */
export function makeTip() {
  const box = element("div", { class: "tip", role: "status", hidden: true });
  document.body.append(box);
  return {
    show(event, lines) {
      box.replaceChildren(...lines.map((line, i) => element(i ? "div" : "strong", {}, line)));
      box.hidden = false;
      const { clientX, clientY } = event;
      const left = Math.min(clientX + 14, window.innerWidth - box.offsetWidth - 8);
      const below = clientY + 18 + box.offsetHeight < window.innerHeight;
      box.style.left = `${Math.max(8, left)}px`;
      box.style.top = `${below ? clientY + 16 : Math.max(8, clientY - box.offsetHeight - 12)}px`;
    },
    hide() {
      box.hidden = true;
    },
  };
}

/** Where in an SVG an event is. */
export function pointIn(svg, event) {
  const box = svg.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

export function svgElement(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Call when a node's width has changed. */
export function onResize(node, call) {
  let width = node.clientWidth;
  new ResizeObserver(() => {
    if (node.clientWidth === width || !node.clientWidth) return;
    width = node.clientWidth;
    requestAnimationFrame(call);
  }).observe(node);
}
