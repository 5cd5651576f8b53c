// The matrix: where each word written looked, as a table one can walk through.

function makeMatrix(model, walk, data, marks, hooks) {
  const section = html("section", { class: "figure matrix", "aria-labelledby": "matrix-title" }, html("header", {}, html("h2", { id: "matrix-title" }, say("fig_matrix"))));
  const header = section.firstChild;
  if (!attends(model)) {
    header.append(html("p", { class: "lead" }, say("matrix_none", { why: say(`why_${model.attention}`) })));
    return { element: section, follow() {} };
  }
  header.append(html("p", { class: "lead" }, say("matrix_lead")));
  const at = model.walks.indexOf(walk), gold = model.gold && model.gold.walk === at ? model.gold.links : null;
  const readout = html("p", { class: "readout", role: "status" }, say("matrix_hint"));
  const table = heat(model, walk, { gold, readout: (text) => { readout.textContent = text; }, go: hooks.go });
  const show = (name) => (on) => { marks[name] = on; table.classList.toggle(`show-${name}`, on); };
  for (const name of ["hard", "gold", "numbers"]) show(name)(marks[name]);
  const ring = (name) => html("span", { class: `mark-key ${name}`, "aria-hidden": "true" });
  const frame = html("div", { class: "frame" }, table);
  fill(section, {}, [
    html("div", { class: "choosers" }, tick(say("strongest"), marks.hard, show("hard"), ring("hard")), gold ? tick(say("gold"), marks.gold, show("gold"), ring("gold")) : null, tick(say("numbers"), marks.numbers, show("numbers"))),
    model.gold && !gold ? html("p", { class: "faint" }, say("gold_walk", { walk: walkName(model.walks[model.gold.walk]) })) : null,
    frame, readout,
  ]);
  return {
    element: section,
    follow(beat) { [...table.tBodies[0].rows].forEach((line, t) => line.classList.toggle("current", beat.t === t)); },
  };
}

// The weights as an ARIA grid: one stop for the tab key, arrows inside.
function heat(model, walk, { gold = null, readout = null, go = null } = {}) {
  const S = model.sizes.S, T = walk.steps.length;
  const linked = new Set((gold ?? []).map(([s, t]) => `${s},${t}`)), hard = new Set(walk.hard.map(([s, t]) => `${s},${t}`));
  const head = html("tr", {}, html("td", {}), ...model.source.tokens.map((token) => html("th", { scope: "col" }, html("span", {}, piece(token)))));
  const body = html("tbody");
  const cells = [];
  for (let t = 0; t < T; t++) {
    const weights = row(walk.steps[t].weights);
    const line = html("tr", {}, html("th", { scope: "row" }, piece(walk.tokens[t])));
    cells.push(Array.from(weights, (value, s) => {
      const key = `${s},${t}`, aligned = linked.has(key), peak = hard.has(key);
      const words = say("matrix_cell", { target: quoted(walk.tokens[t]), t: t + 1, source: quoted(model.source.tokens[s]), s: s + 1, value: share(value) }) + (peak ? ` · ${say("is_hard")}` : "") + (aligned ? ` · ${say("is_gold")}` : "");
      const cell = html("td", {
        class: `${value > 0.5 ? "strong" : ""} ${peak ? "hard" : ""} ${aligned ? "gold" : ""} ${value < 0.0005 ? "none" : ""}`, style: { "--share": value.toFixed(4) }, "data-s": s, "data-t": t,
        role: readout ? "gridcell" : null, tabindex: readout ? (s || t ? -1 : 0) : null, "aria-label": readout ? words : null,
      }, html("span", {}, value < 0.005 ? "·" : value > 0.995 ? "1" : value.toFixed(2).slice(1)));
      cell.words = words;
      line.append(cell);
      return cell;
    }));
    body.append(line);
  }
  const table = html("table", { class: "heat", role: readout ? "grid" : null, "aria-label": say("matrix_table"), dir: "ltr" }, html("thead", {}, head), body);
  if (!readout) return table;
  const light = (cell) => {
    readout(cell.words);
    for (const th of table.querySelectorAll("th.lit")) th.classList.remove("lit");
    head.cells[Number(cell.dataset.s) + 1].classList.add("lit");
    cell.parentNode.cells[0].classList.add("lit");
  };
  table.addEventListener("pointerover", (event) => { const cell = event.target.closest("td[data-s]"); if (cell) light(cell); });
  table.addEventListener("focusin", (event) => { const cell = event.target.closest("td[data-s]"); if (cell) light(cell); });
  table.addEventListener("click", (event) => { const cell = event.target.closest("td[data-s]"); if (cell && go) go(Number(cell.dataset.t)); });
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td[data-s]");
    if (!cell) return;
    let s = Number(cell.dataset.s), t = Number(cell.dataset.t);
    if (event.key === "ArrowRight") s++;
    else if (event.key === "ArrowLeft") s--;
    else if (event.key === "ArrowDown") t++;
    else if (event.key === "ArrowUp") t--;
    else if (event.key === "Home") s = 0;
    else if (event.key === "End") s = S - 1;
    else if (event.key === "Enter" && go) { go(t); event.preventDefault(); return; }
    else return;
    event.preventDefault();
    const next = cells[Math.max(0, Math.min(T - 1, t))][Math.max(0, Math.min(S - 1, s))];
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return table;
}
