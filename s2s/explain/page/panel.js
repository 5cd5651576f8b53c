// Beside the picture: what happens now, its equation, and the symbols with their shapes and values.

const ROW = 64; // units in a row of a long vector

// All values of a symbol as a picture one can walk along: a slider whose value is told in words.
function valuesOf(of, hooks) {
  const rows = of.rows, length = rows[0].length, many = rows.length > 1;
  const scale = of.scale ?? largest(rows.flatMap((values) => Array.from(values)));
  const across = many ? length : Math.min(ROW, length), down = many ? rows.length : Math.ceil(length / ROW);
  const size = across * down === length || many ? rows.length * length : length;
  const canvas = html("canvas", {
    class: "values", tabindex: 0, role: "slider", "aria-label": `${spoken(of.mark)}: ${of.name}`, "aria-valuemin": 1, "aria-valuemax": size, "aria-valuenow": 1,
  });
  const at = (place) => (many ? rows[Math.floor(place / length)][place % length] : rows[0][place]);
  const text = (place) => (many
    ? say("unit_at", { what: `${spoken({ ...of.mark, sub: Math.floor(place / length) + 1 })}`, k: (place % length) + 1, value: number(at(place)) })
    : say("unit_of", { k: place + 1, n: length, value: number(at(place)) }));
  let chosen = 0, lit = false;
  function choose(place, loud = true) {
    chosen = Math.min(size - 1, Math.max(0, place));
    canvas.setAttribute("aria-valuenow", chosen + 1);
    canvas.setAttribute("aria-valuetext", text(chosen));
    if (loud) { lit = true; hooks.read(`${spoken(of.mark)} · ${text(chosen)}`); }
    canvas.paint();
  }
  canvas.paint = () => {
    const box = canvas.getBoundingClientRect();
    if (!box.width) return;
    const ratio = window.devicePixelRatio || 1, style = getComputedStyle(canvas);
    const high = many ? Math.max(4, Math.min(14, 150 / down)) : 13;
    const wide = Math.min(box.width, across * 16);
    canvas.style.height = `${high * down}px`;
    canvas.width = Math.round(box.width * ratio);
    canvas.height = Math.round(high * down * ratio);
    const ink = canvas.getContext("2d");
    ink.scale(ratio, ratio);
    const cell = wide / across;
    canvas.cell = [cell, high];
    for (let place = 0; place < size; place++) {
      const value = at(place), strength = Math.min(1, Math.abs(value) / scale), x = (place % across) * cell, top = Math.floor(place / across) * high;
      ink.globalAlpha = 1;
      ink.fillStyle = style.getPropertyValue("--zero");
      ink.fillRect(x, top, cell + 0.3, high - 1);
      ink.globalAlpha = 0.06 + 0.94 * strength;
      ink.fillStyle = style.getPropertyValue(value < 0 ? "--negative" : "--positive");
      ink.fillRect(x, top, cell > 3 ? cell - 0.5 : cell + 0.2, high - 1);
      if (value < 0 && strength > 0.12 && cell > 4 && high > 7) {
        ink.globalAlpha = 0.85;
        ink.fillStyle = style.getPropertyValue("--zero");
        ink.fillRect(x + cell * 0.28, top + high / 2 - 1, cell * 0.44, 1);
      }
    }
    if (lit) {
      ink.globalAlpha = 1;
      ink.strokeStyle = style.getPropertyValue("--ink");
      ink.lineWidth = 1.5;
      ink.strokeRect((chosen % across) * cell + 0.75, Math.floor(chosen / across) * high + 0.75, Math.max(2, cell - 1.5), high - 2);
    }
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect(), [cell, high] = canvas.cell ?? [1, 1];
    const column = Math.floor((event.clientX - box.left) / cell), line = Math.floor((event.clientY - box.top) / high);
    const place = line * across + column;
    return column >= 0 && column < across && place < size ? place : null;
  };
  canvas.addEventListener("pointermove", (event) => { const place = under(event); if (place !== null) choose(place); });
  canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) { lit = false; canvas.paint(); } });
  canvas.addEventListener("focus", () => choose(chosen));
  canvas.addEventListener("blur", () => { lit = false; canvas.paint(); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, PageDown: across, PageUp: -across }[event.key];
    if (move) choose(chosen + move);
    else if (event.key === "Home") choose(0);
    else if (event.key === "End") choose(size - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  choose(0, false);
  return canvas;
}

// One number for each source position, with its word.
function byPosition(of, model) {
  const values = of.rows[0], weights = of.scale === 1, best = strongest(values);
  const list = html("ol", { class: "positions" });
  values.forEach((value, s) => {
    list.append(html("li", { class: s === best ? "best" : null, style: weights ? { "--share": value } : null }, piece(model.source.tokens[s]), html("span", { class: "number" }, weights ? share(value) : number(value))));
  });
  return list;
}

function likeliest(step) {
  const body = html("tbody");
  const rows = step.top.some((one) => one.id === step.chosen.id) ? step.top : [...step.top, step.chosen];
  for (const one of rows) {
    body.append(html("tr", { class: one.id === step.chosen.id ? "mine" : null },
      html("td", { class: "number" }, String(one.rank + 1)), html("th", { scope: "row" }, piece(one.token)),
      html("td", { class: "bar" }, html("span", { style: { width: `${(one.prob * 100).toFixed(2)}%` } })),
      html("td", { class: "number" }, share(one.prob)), html("td", { class: "number faint" }, number(one.logit))));
  }
  return html("table", { class: "likeliest" }, html("caption", {}, say("distribution")), body);
}

// The symbols of an equation as its lines name them; asked is called with a symbol's key.
function equationLines(equation, asked) {
  const { lines, symbols } = equation;
  const set = (text) => {
    const parts = [];
    for (const part of text.split(/(\{[^}]+\})/)) {
      const key = /^\{([^}]+)\}$/.exec(part)?.[1];
      if (!key) { parts.push(upright(part)); continue; }
      const of = symbols[key];
      if (of.plain) parts.push(html("sub", {}, html("i", {}, of.plain)));
      else if (of.number) parts.push(html("span", { class: "value" }, of.number));
      else {
        const target = of.same ?? key, name = symbols[target].name;
        parts.push(html("button", { type: "button", class: "symbol", "data-symbol": target, title: name, "aria-label": `${spoken(of.mark)}: ${name}`, onclick: () => asked(target, true), onpointerenter: () => asked(target), onfocus: () => asked(target) },
          of.token !== undefined ? isolated(shown(of.token), { class: "word-in" }) : typeset(of.mark)));
      }
    }
    return parts;
  };
  return lines.map((line) => {
    const element = html("div", { class: "line" });
    for (const part of line.split(/(\[\[.*?\]\])/)) {
      const fraction = /^\[\[(.*)\|(.*)\]\]$/.exec(part);
      if (fraction) element.append(html("span", { class: "fraction" }, html("span", {}, ...set(fraction[1])), html("span", { class: "sr" }, " / "), html("span", {}, ...set(fraction[2]))));
      else element.append(...set(part));
    }
    return element;
  });
}

// Function names stand upright, learned matrices that have no numbers here in bold.
function upright(text) {
  const span = html("span", { class: "plain" });
  for (const part of text.split(/\b([UW])\b/)) span.append(/^[UW]$/.test(part) ? html("i", { class: "bold" }, part) : part);
  return span;
}

// The panel of one beat.
function fillPanel(panel, model, walk, beat, hooks, data) {
  const equation = equationOf(model, walk, beat), step = walk.steps[beat.t];
  const list = html("dl", { class: "symbols" }), entries = {};
  const used = new Set(equation.lines.join(" ").match(/\{[^}]+\}/g).map((key) => key.slice(1, -1)));
  for (const [key, of] of Object.entries(equation.symbols)) {
    if (!used.has(key) || of.plain || of.same || of.number) continue;
    const size = of.shape.length ? of.shape.map(count).join(" × ") : null;
    const entry = html("div", { class: `entry ${of.rows ? "whole" : ""}`, "data-symbol": key },
      html("dt", {}, typeset(of.mark), html("span", { class: "sr" }, spoken(of.mark))),
      html("dd", {}, html("span", { class: "what" }, of.name), size ? html("span", { class: "shape", title: say("shape") }, size) : null,
        of.text ? isolated(of.text, { class: "number" }) : null));
    if (of.rows) entry.lastChild.append(of.positions ? byPosition(of, model) : valuesOf(of, hooks));
    const real = of.shape[of.shape.length - 1];
    if (of.rows && !of.positions && of.rows[0].length < real) entry.lastChild.append(html("span", { class: "faint" }, say("stored", { n: of.rows[0].length, all: real })));
    if (!of.rows && model.gate_names.includes(key)) entry.lastChild.append(html("span", { class: "faint" }, say("gone")));
    entries[key] = entry;
    list.append(entry);
  }
  const asked = (key, go) => {
    for (const element of panel.querySelectorAll("[data-symbol]")) element.classList.toggle("lit", element.dataset.symbol === key);
    if (go && entries[key]) (entries[key].querySelector("canvas") ?? entries[key]).focus?.();
  };
  const words = beat.kind === "softmax" || beat.kind === "choose" ? likeliest(step) : null;
  panel.replaceChildren(
    html("div", { class: "equation", role: "group", "aria-label": say("equation") }, ...equationLines(equation, asked)),
    html("div", { class: "parts" }, words, html("section", { "aria-label": say("symbols") }, list)),
  );
  for (const canvas of panel.querySelectorAll("canvas")) canvas.paint();
}
