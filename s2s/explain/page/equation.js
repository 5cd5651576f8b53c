// Equations: which is computed at a beat, and what each of its symbols is at this very step.
//
// A line of an equation is text with {symbols} and [[above|below]] fractions. A symbol is
// {mark, name, shape, rows?, range?}: rows are its vectors, those of a matrix one by one.

function mark(base, sub = null, over = null, bold = false) {
  return { base, sub: sub === null ? null : String(sub), over, bold };
}

// A symbol in plain text, for titles and for those who listen.
function spoken(of) {
  const base = of.over === "~" ? `${of.base}̃` : of.over ? of.over + of.base : of.base;
  return base + (of.sub ? subscript(of.sub) : "");
}

// A symbol as set in an equation.
function typeset(of) {
  const base = html("i", { class: of.bold ? "bold" : null }, of.base);
  const body = of.over ? html("span", { class: "over" }, html("span", { class: "accent" }, of.over === "~" ? "˜" : of.over), base) : base;
  return html("span", { class: "symbol-mark", "aria-hidden": "true" }, body, of.sub === null ? null : html("sub", {}, of.sub));
}

// A symbol's entry; values are vectors of equal length.
function symbol(of, name, vectors, more = {}) {
  const rows = vectors === null || vectors === undefined ? null : vectors.filter(Boolean);
  const kept = rows && rows.length ? rows : null;
  const shape = more.shape ?? (kept ? (kept.length > 1 ? [kept.length, kept[0].length] : [kept[0].length]) : []);
  return { mark: of, name, rows: kept, ...more, shape };
}

// The lines that make a state: shared by encoder and decoder.
function cellEquation(kind, shares) {
  const inside = (extra = "") => `${shares} + U {previous} + {b}${extra}`;
  return {
    lstm: [`{input}, {forget}, {output} = σ(${inside()})`, `{candidate} = tanh(${inside()})`, "{cell} = {forget} ∘ {cellprevious} + {input} ∘ {candidate}", "{state} = {output} ∘ tanh({cell})"],
    gru: [`{reset}, {update} = σ(${inside()})`, `{candidate} = tanh(${shares} + {b} + {reset} ∘ (U {previous} + {b′}))`, "{state} = (1 − {update}) ∘ {candidate} + {update} ∘ {previous}"],
    tanh: [`{state} = tanh(${inside()})`],
    relu: [`{state} = max(0, ${inside()})`],
  }[kind];
}

const GATE_LETTERS = { input: "i", forget: "f", output: "o", candidate: "g", reset: "r", update: "z" };

function gateSymbols(model, gates, index, sub, H) {
  const found = {};
  for (const name of model.gate_names) {
    const letter = model.cell === "gru" && name === "candidate" ? "n" : GATE_LETTERS[name];
    found[name] = symbol(mark(letter, sub), say(`n_${name}`), gates ? [row(gates[name], index)] : null, { shape: [H], scale: 1 });
  }
  return found;
}

// Everything of a beat's equation: {lines, symbols}.
function equationOf(model, walk, beat) {
  const { E, H, M, S } = model.sizes, Hd = model.sizes.encoder_hidden, V = model.sizes.target_vocab;
  const step = walk.steps[beat.t], t = beat.t === undefined ? null : beat.t + 1;
  const matrix = (base, shape, name = "n_W") => symbol(mark(base[0], base.slice(1) || null, null, true), say(name), null, { shape });
  const last = step ? row(step.layers[step.layers.length - 1].state) : null;
  const memory = () => symbol(mark("h", `1…${S}`), say("n_memory"), array(model.encoder.memory).rows, { shape: [S, M], scale: 1 });
  const s = () => symbol(mark("s", t), say("n_s"), [last], { shape: [H], scale: 1 });
  const c = () => symbol(mark("c", t), say(attends(model) ? "n_c" : "n_summary"), [row(step.context)], { shape: [M], scale: 1 });
  const tilde = () => symbol(mark("s", t, "~"), say("n_tilde"), [row(step.attentional)], { shape: [H], scale: 1 });
  const number1 = (of, name, text) => symbol(of, name, null, { shape: [], text });

  const make = {
    embed() {
      const j = beat.s + 1;
      return {
        lines: ["{x} = {E}[{word}]"],
        symbols: {
          x: symbol(mark("x", j), say("n_x"), [row(model.encoder.embedding, beat.s)], { shape: [E] }),
          E: symbol(mark("E", "x", null, true), say("n_E"), null, { shape: [model.sizes.source_vocab, E] }),
          word: { token: model.source.tokens[beat.s], shape: [], name: say("word"), mark: mark("w", j), text: `${shown(model.source.tokens[beat.s])} (${model.source.ids ? model.source.ids[beat.s] : beat.s})` },
        },
      };
    },
    encode() {
      const one = encoderLayer(model, beat.layer, beat.direction), backward = beat.direction === "backward";
      const j = beat.s + 1, from = backward ? beat.s + 1 : beat.s - 1, there = from >= 0 && from < S;
      const arrow = model.bidirectional ? (backward ? "←" : "→") : null;
      const zero = new Float64Array(row(one.state, 0).length);
      const shares = "{W} {in}";
      const below = beat.layer
        ? symbol(mark("h", j), say("n_below"), ["forward", "backward"].map((way) => encoderLayer(model, beat.layer - 1, way)).filter(Boolean).map((layer) => row(layer.state, beat.s)), { shape: [M], scale: 1 })
        : symbol(mark("x", j), say("n_x"), [row(model.encoder.embedding, beat.s)], { shape: [E] });
      return {
        lines: cellEquation(model.cell, shares),
        symbols: {
          in: below, previous: symbol(mark("h", there ? from + 1 : 0, arrow), say("n_prev"), [there ? row(one.state, from) : zero], { shape: [Hd], scale: 1 }),
          ...gateSymbols(model, one.gates, beat.s, j, Hd),
          ...(one.cell ? { cellprevious: symbol(mark("c", there ? from + 1 : 0, arrow), say("n_cellprev"), [there ? row(one.cell, from) : zero], { shape: [Hd] }), cell: symbol(mark("c", j, arrow), say("n_cell"), [row(one.cell, beat.s)], { shape: [Hd] }) } : {}),
          state: symbol(mark("h", j, arrow), say(backward ? "n_hb" : model.bidirectional ? "n_hf" : "n_h"), [row(one.state, beat.s)], { shape: [Hd], scale: 1 }),
          W: matrix("W", [(model.gate_names.length || 1) * Hd, beat.layer ? M : E]), b: symbol(mark("b"), say("n_b"), null, { shape: [(model.gate_names.length || 1) * Hd] }), "b′": symbol(mark("b′"), say("n_b"), null, { shape: [Hd] }),
        },
      };
    },
    memory() {
      const top = Math.max(...model.encoder.layers.map((one) => one.layer));
      const f = encoderLayer(model, top, "forward"), b = encoderLayer(model, top, "backward");
      const whole = { h: symbol(mark("h", "j"), say("n_memory"), array(model.encoder.memory).rows, { shape: [S, M], scale: 1 }) };
      if (!b) return { lines: ["{H} = [{h}]"], symbols: { ...whole, H: symbol(mark("H", null, null, true), say("n_memory"), null, { shape: [S, M] }) } };
      return {
        lines: ["{h} = [{f} ; {b}]"],
        symbols: { ...whole, f: symbol(mark("h", "j", "→"), say("n_hf"), array(f.state).rows, { shape: [S, Hd], scale: 1 }), b: symbol(mark("h", "j", "←"), say("n_hb"), array(b.state).rows, { shape: [S, Hd], scale: 1 }) },
      };
    },
    bridge() {
      const { kind, read, states } = model.hand_over, from = model.hand_over.from ?? [];
      const used = [...new Set(from.filter((layer) => layer !== null && layer !== undefined))].map((layer) => read[layer]).filter(Boolean);
      const of = (base, name, key, vectors) => symbol(mark(base, "0"), name, vectors.map((one) => one[key] && row(one[key])), { shape: states.length > 1 ? [states.length, H] : [H], scale: key === "state" ? 1 : undefined });
      const symbols = { s0: of("s", say("n_s0"), "state", states) };
      const lines = [{ dense: "{s0} = tanh({W} {h} + {b})", copy: "{s0} = {h}", zero: "{s0} = 0" }[kind]];
      if (kind !== "zero") symbols.h = symbol(mark("h", "last"), say("n_last"), used.map((one) => row(one.state)), { shape: used.length > 1 ? [used.length, M] : [M], scale: 1 });
      if (kind === "dense") Object.assign(symbols, { W: matrix("W", [H, M]), b: symbol(mark("b"), say("n_b"), null, { shape: [H] }) });
      if (states[0].cell && kind !== "zero") {
        lines.push(kind === "dense" ? "{c0} = {W′} {cl} + {b′}" : "{c0} = {cl}");
        symbols.c0 = of("c", say("n_cell"), "cell", states);
        symbols.cl = symbol(mark("c", "last"), say("n_cell"), used.map((one) => one.cell && row(one.cell)), { shape: used.length > 1 ? [used.length, M] : [M] });
        if (kind === "dense") Object.assign(symbols, { "W′": matrix("W′", [H, M]), "b′": symbol(mark("b′"), say("n_b"), null, { shape: [H] }) });
      }
      return { lines, symbols };
    },
    read() {
      const symbols = {
        y: symbol(mark("y", t - 1), say("n_y"), [row(step.embedding)], { shape: [E] }),
        E: symbol(mark("E", "y", null, true), say("n_E"), null, { shape: [V, E] }),
        word: { token: step.read.token, shape: [], name: say("word"), mark: mark("w", t - 1), text: `${shown(step.read.token)} (${step.read.id})` },
      };
      if (!model.input_feeding) return { lines: ["{y} = {E}[{word}]"], symbols };
      return { lines: ["{y} = {E}[{word}]", "[{y} ; {feed}]"], symbols: { ...symbols, feed: fedSymbol(model, walk, beat.t) } };
    },
    state() {
      const layer = step.layers[beat.layer], past = before(model, walk, beat.t, beat.layer);
      const up = step.layers.length > 1 ? `${beat.layer + 1},` : "";
      const first = beat.layer === 0, shares = ["{W} {in}"];
      const symbols = {
        in: first ? symbol(mark("y", t - 1), say("n_y"), [row(step.embedding)], { shape: [E] }) : symbol(mark("s", `${beat.layer},${t}`), say("n_below"), [row(step.layers[beat.layer - 1].state)], { shape: [H], scale: 1 }),
      };
      if (first && model.input_feeding) { shares.push("{F} {feed}"); symbols.feed = fedSymbol(model, walk, beat.t); }
      if (first && model.attention === "fixed") { shares.push("{C} {summary}"); symbols.summary = symbol(mark("c"), say("n_summary"), [row(model.encoder.summary)], { shape: [M], scale: 1 }); }
      const G = (model.gate_names.length || 1) * H;
      Object.assign(symbols, {
        previous: symbol(mark("s", up + (t - 1)), say("n_prev"), [row(past.state)], { shape: [H], scale: 1 }),
        ...gateSymbols(model, layer.gates, 0, t, H),
        ...(layer.cell ? { cellprevious: symbol(mark("c", `${up}${t - 1}`), say("n_cellprev"), [row(past.cell)], { shape: [H] }), cell: symbol(mark("c", `${up}${t}`), say("n_cell"), [row(layer.cell)], { shape: [H] }) } : {}),
        state: symbol(mark("s", up + t), say("n_s"), [row(layer.state)], { shape: [H], scale: 1 }),
        W: matrix("W", [G, first ? E : H]), F: matrix("F", [G, H]), C: matrix("C", [G, M]), b: symbol(mark("b"), say("n_b"), null, { shape: [G] }), "b′": symbol(mark("b′"), say("n_b"), null, { shape: [H] }),
      });
      return { lines: cellEquation(model.cell, shares.join(" + ")), symbols };
    },
    scores() {
      const line = { dot: "{e} = {s} · {h}", general: "{e} = {s} · {Wa} {h}", concat: "{e} = {v} · tanh({Wa} [{s} ; {h}])" }[model.attention] ?? "{e} = score({s}, {h})";
      return {
        lines: [line],
        symbols: { e: symbol(mark("e", `${t}j`), say("n_e"), [row(step.scores)], { shape: [S], positions: true }), s: s(), h: { ...memory(), mark: mark("h", "j") }, Wa: matrix("Wa", model.attention === "concat" ? [H, H + M] : [H, M]), v: symbol(mark("v"), say("n_b"), null, { shape: [H] }) },
      };
    },
    weights: () => ({
      lines: ["{a} = [[exp({e})|Σ{k} exp({e′})]]"],
      symbols: {
        a: symbol(mark("a", `${t}j`), say("n_a"), [row(step.weights)], { shape: [S], positions: true, scale: 1 }), e: symbol(mark("e", `${t}j`), say("n_e"), [row(step.scores)], { shape: [S], positions: true }),
        k: { plain: "k" }, "e′": { same: "e", mark: mark("e", `${t}k`) },
      },
    }),
    context: () => (attends(model)
      ? { lines: ["{c} = Σ{j} {a} {h}"], symbols: { c: c(), j: { plain: "j" }, a: symbol(mark("a", `${t}j`), say("n_a"), [row(step.weights)], { shape: [S], positions: true, scale: 1 }), h: { ...memory(), mark: mark("h", "j") } } }
      : { lines: ["{c} = {summary}"], symbols: { c: c(), summary: symbol(mark("h", "last"), say("n_summary"), [row(model.encoder.summary)], { shape: [M], scale: 1 }) } }),
    concat: () => ({ lines: ["[{c} ; {s}]"], symbols: { c: c(), s: s() } }),
    attentional: () => (step.context
      ? { lines: ["{tilde} = tanh({Wc} [{c} ; {s}])"], symbols: { tilde: tilde(), Wc: matrix("Wc", [H, M + H]), c: c(), s: s() } }
      : { lines: ["{tilde} = tanh({Wc} {s})"], symbols: { tilde: tilde(), Wc: matrix("Wc", [H, H]), s: s() } }),
    softmax: () => outcome(step.top[0]),
    choose: () => outcome(step.chosen),
  };

  // The softmax for one word: its logit against all.
  function outcome(word) {
    const reads = step.projected ? symbol(mark("r", t), say("n_proj"), [row(step.projected)], { shape: [E] }) : tilde();
    return {
      lines: ["{p} = softmax({Ws} {tilde} + {b})", "{p} = exp({logit} − {Z})"],
      symbols: {
        p: number1(mark("p", t), `${say("n_p")}: ${quoted(word.token)}`, share(word.prob)), Ws: matrix("Ws", [V, step.projected ? E : H]), tilde: reads, b: symbol(mark("b", "s"), say("n_b"), null, { shape: [V] }),
        logit: { number: number(word.logit) }, Z: number1(mark("Z", t), say("n_Z"), number(step.log_total)),
      },
    };
  }
  return make[beat.kind]();
}

function fedSymbol(model, walk, t) {
  const H = model.sizes.H, past = t ? row(walk.steps[t - 1].attentional) : new Float64Array(row(walk.steps[0].attentional).length);
  return symbol(mark("s", t, "~"), say("n_feed"), [past], { shape: [H], scale: 1 });
}
