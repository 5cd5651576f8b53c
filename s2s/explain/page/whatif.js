// What if: another word at one step, and the continuation that the model then writes.

function makeWhatIf(model, state) {
  if (!model.what_if || !model.what_if.length) return null;
  const walk = model.walks[0];
  const section = html("section", { class: "figure whatif", "aria-labelledby": "whatif-title" },
    html("header", {}, html("h2", { id: "whatif-title" }, say("fig_whatif")), html("p", { class: "lead" }, say("whatif_lead"))));
  const at = html("div", { class: "chips", role: "group", "aria-label": say("whatif_at") });
  const others = html("div", { class: "chips", role: "group", "aria-label": say("whatif_put") });
  const result = html("div", { class: "result", "aria-live": "polite" });
  const stored = (t) => model.what_if.filter((one) => one.walk === 0 && one.t === t);
  if (!stored(state.t).length) state.t = model.what_if[0].t;

  function chip(pressed, act, ...children) {
    return html("button", { type: "button", class: "chip", "aria-pressed": String(pressed), onclick: act }, ...children);
  }
  function paint() {
    at.replaceChildren(...walk.tokens.map((token, t) => {
      const one = chip(t === state.t, () => { state.t = t; state.other = 0; paint(); at.children[t].focus(); }, piece(token));
      one.disabled = !stored(t).length;
      return one;
    }));
    const list = stored(state.t);
    others.replaceChildren(...list.map((one, turn) => chip(turn === state.other, () => { state.other = turn; paint(); others.children[turn].focus(); }, piece(one.token.token), html("span", { class: "number" }, share(one.token.prob)))));
    result.replaceChildren(list.length ? continuation(model, walk, list[state.other] ?? list[0]) : say("whatif_none"));
  }
  paint();
  section.append(
    html("div", { class: "asked" }, html("span", { class: "label" }, say("whatif_at")), at, html("span", { class: "label" }, say("whatif_put")), others), result);
  return section;
}

function continuation(model, walk, other) {
  const less = walk.log_prob - other.log_prob;
  const difference = Math.abs(less) < 0.0005 ? say("whatif_same") : say(less > 0 ? "whatif_more" : "whatif_less", { d: Math.abs(less).toFixed(3) });
  const looking = other.steps.some((step) => step.weights);
  const body = html("tbody");
  other.steps.forEach((step, turn) => {
    const was = walk.steps[other.t + turn], s = step.weights ? strongest(row(step.weights)) : null;
    body.append(html("tr", { class: turn === 0 ? "forced" : was && was.chosen.id === step.chosen.id ? "same" : null },
      html("td", { class: "number faint" }, String(other.t + turn + 1)), html("th", { scope: "row" }, piece(step.chosen.token)),
      html("td", { class: "bar" }, html("span", { style: { width: `${(step.chosen.prob * 100).toFixed(2)}%` } })), html("td", { class: "number" }, share(step.chosen.prob)),
      looking ? html("td", {}, s === null ? "" : piece(model.source.tokens[s]), s === null ? "" : html("span", { class: "number faint" }, ` ${share(row(step.weights)[s])}`)) : null));
  });
  return html("div", {},
    html("dl", { class: "texts" },
      html("dt", {}, say("whatif_was")), html("dd", {}, isolated(walk.text), html("span", { class: "number faint" }, nats(walk.log_prob))),
      html("dt", {}, say("whatif_is")), html("dd", { class: "becomes" }, isolated(other.text), html("span", { class: "number faint" }, nats(other.log_prob)))),
    html("p", { class: "faint" }, difference),
    html("table", { class: "steps" }, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, ""), html("th", { scope: "col" }, say("word")), html("th", { scope: "col", colspan: 2 }, say("probability")), looking ? html("th", { scope: "col" }, say("looks_at")) : null)), body));
}
