// The page: its head, its figures, its language and theme; and the door for data that comes later.

const CELLS = { lstm: "LSTM", gru: "GRU", tanh: "tanh", relu: "ReLU" };
const page = document.getElementById("page");
let data = null, live = null, state = null;

// What of the reader's choices lasts while the page is drawn again.
function fresh() {
  return {
    walk: { model: 0, walk: 0, beat: 0, speed: state?.walk.speed ?? 1, follow: null },
    marks: { hard: true, gold: true, numbers: true, pruned: true, ...state?.marks },
    whatif: { t: 0, other: 0 }, compare: { step: 0 },
  };
}

// A line that says what model this is.
function makeup(model) {
  const { sizes } = model;
  return [
    say("encoder_of", { way: say(model.bidirectional ? "two_way" : "one_way"), cell: CELLS[model.cell] ?? model.cell }) + " " + say("layers", { n: sizes.encoder_layers, H: sizes.encoder_hidden }),
    say("decoder_of", { cell: CELLS[model.cell] ?? model.cell }) + " " + say("layers", { n: sizes.layers, H: sizes.H }),
    attentionName(model), model.input_feeding ? say("with_feeding") : null, say("parameters", { n: count(model.parameters) }),
  ].filter(Boolean).join(" · ");
}

function head(model, walk) {
  const themes = [["auto", say("auto")], ["light", say("light")], ["dark", say("dark")]];
  const best = model.walks[0];
  const left = (data.left_out ?? []).map((what) => say(`lo_${what}`, { n: data.units_shown }));
  return html("header", { class: "top" },
    html("a", { class: "skip", href: "#walk" }, say("skip")),
    html("div", { class: "switches" },
      choice(say("language"), Object.entries(WORDS).map(([code, words]) => [code, words.name]), language, (code) => { setLanguage(code); draw(); page.querySelector(".switches select").focus(); }),
      choice(say("theme"), themes, document.documentElement.dataset.theme ?? "auto", setTheme)),
    html("h1", {}, say("title")),
    html("div", { class: "sentences" },
      html("p", { class: "sentence source" }, isolated(data.text)),
      html("p", { class: "sentence target" }, html("span", { class: "arrow", "aria-hidden": "true" }, "→"), isolated(best.text)),
      data.reference ? html("p", { class: "sentence reference" }, html("span", { class: "label" }, say("reference")), isolated(data.reference)) : null),
    html("p", { class: "makeup" }, isolated(modelName(model, data.models), { class: "name" }), ` · ${makeup(model)}`),
    left.length ? html("p", { class: "faint" }, say("left_out", { what: left.join(", ") })) : null);
}

function setLanguage(code) {
  language = WORDS[code] ? code : "en";
  document.documentElement.lang = language === "zh" ? "zh-Hans" : language;
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  live?.repaint();
}

function draw() {
  live?.leave();
  live = null;
  if (!data || !data.models?.length) {
    page.replaceChildren(html("main", {}, html("p", { class: "lead" }, say("empty"))));
    return;
  }
  keptDigits = data.digits ?? 6;
  const model = data.models[state.walk.model], walk = model.walks[state.walk.walk];
  document.title = `${shown(data.text).replaceAll("␣", " ")} – s2s`;
  live = makeWalk(data, state.walk, () => { state.whatif = { t: 0, other: 0 }; draw(); });
  const matrix = makeMatrix(model, walk, data, state.marks, { go: (t) => live.goTo("weights", t) });
  state.walk.follow = (beat) => matrix.follow(beat);
  page.replaceChildren(
    head(model, walk),
    html("main", {}, live.element, matrix.element, makeTree(model, state.marks), makeWhatIf(model, state.whatif), data.models.length > 1 ? makeCompare(data, state.compare) : null),
    html("footer", {}, html("p", { class: "faint" }, isolated(say("foot", { version: data.version, names: data.models.map((one) => modelName(one, data.models)).join(", ") })))));
  matrix.follow(live.beats[state.walk.beat]);
}

// Shows new data; a page that a server fills calls it for every sentence.
function show(given) {
  if (given && given.format !== 1) throw new Error(`this page reads format 1, not ${given.format}`);
  data = given;
  state = fresh();
  draw();
}

window.s2s = { show };
setLanguage(document.documentElement.lang.slice(0, 2));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => live?.repaint());
show(JSON.parse(document.getElementById("s2s-data").textContent));
