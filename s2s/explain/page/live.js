// A page that a server fills: a sentence is typed, its translation follows, and the figures on request.

const ASKED = {
  en: { label: "A sentence for the model", show: "Show how", beam: "Beam", busy: "…", failed: "No answer: {why}" },
  zh: { label: "给模型的句子", show: "展示过程", beam: "束宽", busy: "…", failed: "没有结果：{why}" },
};
const PAUSE = 250; // ms without a key before a translation is asked for

function makeAsk() {
  const words = () => ASKED[language] ?? ASKED.en;
  const label = html("label", { for: "ask-text" });
  const text = html("textarea", { id: "ask-text", rows: "2", dir: "auto", maxlength: "20000", autocomplete: "off", spellcheck: "false" });
  const beamLabel = html("label", { for: "ask-beam" });
  const beam = html("select", { id: "ask-beam" }, ...[1, 2, 3, 5, 8, 10].map((width) => html("option", { value: String(width) }, String(width))));
  const button = html("button", { type: "submit" });
  const told = html("p", { class: "sentence target", role: "status", "aria-live": "polite", dir: "auto" });
  const form = html("form", { class: "ask" }, label, text, html("div", { class: "ask-row" }, beamLabel, beam, button), told);
  let asked = 0, waiting = null;

  async function ask(path) {
    const mine = ++asked;
    const body = { text: text.value, beam: Number(beam.value) };
    if (!body.text.trim()) {
      told.textContent = "";
      return null;
    }
    told.textContent = words().busy;
    try {
      const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
      const found = await answer.json();
      if (mine !== asked) return null; // Something newer is on its way.
      if (!answer.ok) throw new Error(found.error.message);
      return found;
    } catch (error) {
      if (mine === asked) told.textContent = words().failed.replace("{why}", error.message);
      return null;
    }
  }

  async function translate() {
    const found = await ask("v1/translate");
    if (found) told.textContent = found.translations[0].hypotheses[0]?.text ?? "";
  }

  async function explain() {
    clearTimeout(waiting);
    const found = await ask("v1/explain");
    if (!found) return;
    told.textContent = "";
    window.s2s.show(found);
  }

  function say() {
    label.textContent = words().label;
    beamLabel.textContent = words().beam;
    button.textContent = words().show;
  }

  text.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(translate, PAUSE);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    explain();
  });
  new MutationObserver(say).observe(document.documentElement, { attributes: true, attributeFilter: ["lang"] });
  say();
  // The model's own beam, and none that the server refuses.
  fetch("v1/model").then((answer) => answer.json()).then((about) => {
    for (const option of [...beam.options]) if (Number(option.value) > about.limits.beam) option.remove();
    if (![...beam.options].some((option) => Number(option.value) === about.beam)) beam.append(html("option", { value: String(about.beam) }, String(about.beam)));
    beam.value = String(about.beam);
  });
  return form;
}

page.before(makeAsk());
