// Elements: all that the page shows is made here, and text is only ever text.

const SVG = "http://www.w3.org/2000/svg";
let language = "en";

// The words for a key in the page's language.
function say(key, values = {}) {
  const text = WORDS[language][key] ?? WORDS.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children) if (child !== null && child !== undefined && child !== false) element.append(child);
  return element;
}

function html(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// A text from data: set apart and in its own direction.
function isolated(text, attributes = {}) {
  return html("bdi", { dir: "auto", ...attributes }, text);
}

// A token: the mark of a word's beginning is paler than its letters.
function piece(token, attributes = {}) {
  const text = shown(token);
  return isolated("", { class: "piece", title: text, ...attributes }).appendChild(pieceText(text, "span")).parentNode;
}

function pieceText(text, tag) {
  const part = tag === "tspan" ? svg : html;
  const marked = /^[▁_](?=.)/u.exec(text);
  const fragment = document.createDocumentFragment();
  if (marked) fragment.append(part(tag, { class: "mark" }, marked[0]));
  fragment.append(marked ? text.slice(1) : text);
  const holder = part(tag, {});
  holder.append(fragment);
  return holder;
}

// How wide a text is, in letters of the Latin alphabet, roughly.
function breadth(text) {
  let sum = 0;
  for (const letter of text) sum += /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\u{1f300}-\u{3ffff}]/u.test(letter) ? 1.75 : /[iljtf.,:;'!|▁_ ]/.test(letter) ? 0.62 : 1;
  return sum;
}

// A token inside a picture, cut to the room there is; the whole of it is its title.
function pictured(token, x, y, room, attributes = {}) {
  const whole = shown(token);
  let text = whole;
  const size = attributes.class?.includes("written") ? 8.2 : 7.4;
  if (breadth(text) * size > room) {
    const letters = [...text];
    while (letters.length > 1 && (breadth(letters.join("")) + 0.8) * size > room) letters.pop();
    text = letters.join("") + "…";
  }
  const element = svg("text", { x, y, "text-anchor": "middle", ...attributes, class: `piece ${attributes.class ?? ""}` });
  element.append(pieceText(text, "tspan"));
  if (text !== whole) element.append(svg("title", {}, whole));
  return element;
}

const CELL = 5;

// A vector as a strip of cells, upright: colour by value; a negative one bears a dash as well.
function strip(values, units, x, y, options = {}) {
  const { width = 18, cell = CELL, scale = 1, what = "" } = options;
  const group = svg("g", { class: `strip ${options.class ?? ""}` });
  group.append(svg("rect", { class: "ground", x, y, width, height: units.length * cell }));
  units.forEach((unit, place) => {
    const value = values[unit], size = Math.min(1, Math.abs(value) / scale);
    const top = y + place * cell;
    group.append(svg("rect", {
      class: `cell ${value < 0 ? "negative" : "positive"}`, x, y: top, width, height: cell, "fill-opacity": (0.06 + 0.94 * size).toFixed(3),
      "data-what": what, "data-unit": unit + 1, "data-value": number(value),
    }));
    if (value < 0 && size > 0.12) {
      group.append(svg("line", { class: "dash", x1: x + width * 0.3, x2: x + width * 0.7, y1: top + cell / 2, y2: top + cell / 2 }));
    }
  });
  group.append(svg("rect", { class: "edge", x, y, width, height: units.length * cell, rx: 1.5 }));
  return group;
}

// A place where a vector will stand.
function outline(units, x, y, width = 18, cell = CELL) {
  return svg("rect", { class: "outline", x, y, width, height: units * cell, rx: 1.5 });
}

const still = window.matchMedia("(prefers-reduced-motion: reduce)");

// Moves an element in from elsewhere; where motion is not wanted it is simply there.
function fly(element, dx, dy, time = 420) {
  if (still.matches || !element) return;
  element.animate(
    [{ transform: `translate(${dx}px, ${dy}px)`, opacity: 0.15 }, { transform: "translate(0, 0)", opacity: 1 }],
    { duration: time, easing: "cubic-bezier(.25,.7,.3,1)" },
  );
}

// Draws a line from its beginning to its end.
function trace(path, time = 520) {
  if (still.matches) return;
  const length = path.getTotalLength();
  path.animate([{ strokeDasharray: `${length} ${length}`, strokeDashoffset: length }, { strokeDasharray: `${length} ${length}`, strokeDashoffset: 0 }], { duration: time, easing: "ease-out" });
}

// A button, a choice among several, a switch: each with its name.
function button(name, act, attributes = {}, ...children) {
  return html("button", { type: "button", onclick: act, "aria-label": children.length ? name : null, title: children.length ? name : null, ...attributes }, ...(children.length ? children : [name]));
}

function choice(name, options, chosen, act) {
  const select = html("select", { onchange: () => act(select.value) }, ...options.map(([value, text]) => html("option", { value, selected: String(value) === String(chosen) }, text)));
  return html("label", { class: "choice" }, html("span", {}, name), select);
}

function tick(name, on, act, mark = null) {
  const box = html("input", { type: "checkbox", checked: on, onchange: () => act(box.checked) });
  return html("label", { class: "tick" }, box, mark, html("span", {}, name));
}
