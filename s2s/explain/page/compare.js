// Compare: the same sentence through two or more models, side by side, step by step.

function makeCompare(data, state) {
  const { models } = data;
  const most = Math.max(...models.map((model) => model.walks[0].steps.length));
  state.step = Math.min(state.step, most - 1);
  const section = html("section", { class: "figure compare", "aria-labelledby": "compare-title" },
    html("header", {}, html("h2", { id: "compare-title" }, say("fig_compare")), html("p", { class: "lead" }, say("compare_lead", { n: models.length }))));
  const columns = html("div", { class: "columns" });
  const number1 = html("output", {});
  const scrub = html("input", { type: "range", min: 0, max: most - 1, step: 1, value: state.step, "aria-label": say("compare_step"), oninput: () => { state.step = Number(scrub.value); paint(); } });
  const cards = models.map((model) => {
    const walk = model.walks[0], now = html("div", { class: "now" });
    const table = attends(model) ? heat(model, walk) : null;
    const card = html("article", { class: "model" },
      html("h3", {}, isolated(modelName(model, models))), html("p", { class: "faint" }, attentionName(model)),
      html("p", { class: "output" }, isolated(walk.text)),
      html("dl", { class: "facts" }, html("dt", {}, say("logp")), html("dd", { class: "number" }, nats(walk.log_prob)), html("dt", {}, say("steps")), html("dd", { class: "number" }, String(walk.steps.length))),
      now, table ? html("div", { class: "frame" }, table) : html("p", { class: "faint" }, say("matrix_none", { why: say(`why_${model.attention}`) })));
    columns.append(card);
    return { walk, now, table };
  });
  function paint() {
    number1.textContent = String(state.step + 1);
    scrub.setAttribute("aria-valuetext", String(state.step + 1));
    for (const { walk, now, table } of cards) {
      const step = walk.steps[state.step];
      now.replaceChildren(step ? likeliest({ ...step, top: step.top.slice(0, 5) }) : html("p", { class: "faint" }, say("compare_over")));
      if (table) [...table.tBodies[0].rows].forEach((line, t) => line.classList.toggle("current", t === state.step));
    }
  }
  paint();
  section.append(html("div", { class: "choosers" }, html("label", { class: "choice wide" }, html("span", {}, say("compare_step")), scrub, number1)), columns, differing(models));
  return section;
}

// The settings in which the models differ.
function differing(models) {
  const names = [...new Set(models.flatMap((model) => Object.keys(model.config ?? {})))].sort();
  const text = (model, name) => String(model.config?.[name] ?? "–");
  const apart = names.filter((name) => new Set(models.map((model) => text(model, name))).size > 1);
  if (!apart.length) return html("p", { class: "faint" }, say("compare_same"));
  return html("div", { class: "frame" }, html("table", { class: "settings" }, html("caption", {}, say("compare_differ")),
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, say("option")), ...models.map((model) => html("th", { scope: "col" }, isolated(modelName(model, models)))))),
    html("tbody", {}, ...apart.map((name) => html("tr", {}, html("th", { scope: "row" }, name), ...models.map((model) => html("td", {}, text(model, name))))))));
}

function attentionName(model) {
  if (model.attention === "none") return say("without_attention");
  if (model.attention === "fixed") return say("fixed_attention");
  return say("with_attention", { kind: model.attention });
}
