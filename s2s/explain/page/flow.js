// What belongs to one step alone: gates, scores, weights, the lines of the weighted sum, the likeliest words.

const TRUNK = 18; // the width of all lines together: weights add up to one

function makeFlow(model, walk, places, units, under, over) {
  const { y, S, tall } = places;
  const reached = ["read", "state", "scores", "weights", "context", "concat", "attentional", "softmax", "choose"];

  // The gates of a state as narrow strips between what is read and the state.
  function gates(values, names, index, x, top, shownUnits, sub) {
    if (!values || !names.length) return;
    const thin = 9, cell = 3.4, wide = names.length * (thin + 2) - 2;
    const box = svg("g", { class: "gates" });
    box.append(svg("rect", { class: "gate-ground", x: x - wide / 2 - 5, y: top - 3, width: wide + 10, height: shownUnits.length * cell + 17, rx: 4 }));
    names.forEach((name, place) => {
      const left = x - wide / 2 + place * (thin + 2);
      const letter = model.cell === "gru" && name === "candidate" ? "n" : GATE_LETTERS[name];
      box.append(strip(row(values[name], index), shownUnits, left, top, { width: thin, cell, what: letter + sub }));
      box.append(svg("text", { class: "gate-name", x: left + thin / 2, y: top + shownUnits.length * cell + 10, "text-anchor": "middle" }, letter));
    });
    over.append(box);
    return box;
  }

  function encode(beat, forward) {
    const one = units.encoder.find((other) => other.layer === beat.layer && other.direction === beat.direction);
    const box = gates(one.gates, model.gate_names, beat.s, places.half(beat.s, beat.direction), y.memory[beat.layer] + tall + 5, one.units, subscript(beat.s + 1));
    if (forward) fly(box, 0, 14, 300);
  }

  function state(beat, forward) {
    const layer = walk.steps[beat.t].layers[beat.layer];
    const box = gates(layer.gates, model.gate_names, 0, places.state(beat.t), y.state[beat.layer] + tall + 5, units.state[beat.layer], subscript(beat.t + 1));
    if (forward) fly(box, 0, 14, 300);
  }

  // From the state to every position it is compared with.
  function scores(t) {
    const values = row(walk.steps[t].scores), x = places.state(t), best = strongest(values);
    for (let s = 0; s < S; s++) {
      const to = places.source(s);
      under.append(svg("path", { class: `query ${s === best ? "best" : ""}`, d: `M${x + WIDE / 2 + 3},${y.state[places.layers - 1] + tall - 4} C${x + WIDE + 22},${y.readWord + 40} ${to},${y.readWord + 30} ${to},${y.bars - 22}` }));
      over.append(svg("text", { class: `figure ${s === best ? "best" : ""}`, x: to, y: y.bars - 6, "text-anchor": "middle", "data-score": s }, number(values[s], 3)));
    }
  }

  const HIGH = 46;
  function weights(t, forward, numbers = true) {
    const values = row(walk.steps[t].weights), best = strongest(values);
    for (let s = 0; s < S; s++) {
      const x = places.source(s), high = Math.max(0.75, values[s] * HIGH);
      const bar = svg("rect", { class: "weight", x: x - 9, y: y.bars - high, width: 18, height: high, rx: 1 });
      over.append(bar);
      if (forward && !still.matches) bar.animate([{ height: "0px", y: `${y.bars}px` }, { height: `${high}px`, y: `${y.bars - high}px` }], { duration: 380, easing: "ease-out" });
      if (numbers) over.append(svg("text", { class: `figure ${s === best ? "best" : ""}`, x, y: y.bars - high - 5, "text-anchor": "middle", "data-weight": s }, share(values[s])));
    }
  }

  // Each line as wide as its weight; together they fill the trunk that the context grows on.
  function sum(t, forward) {
    const values = row(walk.steps[t].weights), cx = places.context(t);
    const top = y.state[places.layers - 1] + tall + 2, low = y.readWord + 14;
    let left = cx - TRUNK / 2;
    for (let s = 0; s < S; s++) {
      const wide = values[s] * TRUNK, x = left + wide / 2, from = places.source(s);
      left += wide;
      const start = y.bars - Math.max(0.75, values[s] * HIGH), bend = (start - low) * 0.62;
      const path = svg("path", { class: "sum", "stroke-width": Math.max(0.35, wide).toFixed(2), d: `M${from},${start} C${from},${start - bend} ${x},${low + bend} ${x},${low} L${x},${top}`, "data-weight": s });
      path.append(svg("title", {}, `${shown(model.source.tokens[s])}: ${share(values[s])}`));
      under.append(path);
      if (forward) trace(path, 620);
    }
  }

  // Context and state as one vector.
  function join(t) {
    const cx = places.context(t), x = places.state(t), level = y.state[places.layers - 1];
    under.append(svg("rect", { class: "joined", x: cx - WIDE / 2 - 5, y: level - 5, width: x - cx + WIDE + 10, height: tall + 10, rx: 5 }));
  }

  // A context that is the same at every step comes up from the summary.
  function summary(t, forward) {
    const cx = places.context(t), from = places.source(S - 1), low = y.readWord + 14;
    const path = svg("path", { class: "sum fixed", "stroke-width": 5, d: `M${from},${y.memory[places.depth - 1] - 5} C${from},${low + 14} ${cx},${low + 34} ${cx},${low} L${cx},${y.state[places.layers - 1] + tall + 2}` });
    under.append(path);
    if (forward) trace(path, 620);
  }

  // The likeliest words above the column, as bars.
  function card(t, forward, chosen) {
    const step = walk.steps[t], rows = step.top.slice(0, 5), line = 18, wide = 168;
    if (!rows.some((one) => one.id === step.chosen.id)) rows[rows.length - 1] = step.chosen;
    const left = Math.min(Math.max(places.left - 66, places.column(t) - wide / 2), places.width - wide - 6);
    const box = svg("g", { class: "card" }, svg("rect", { class: "card-ground", x: left, y: y.card, width: wide, height: rows.length * line + 10, rx: 6 }));
    rows.forEach((one, place) => {
      const top = y.card + 5 + place * line, mine = chosen && one.id === step.chosen.id;
      box.append(svg("rect", { class: `prob ${mine ? "mine" : ""}`, x: left + 78, y: top + 3.5, width: Math.max(0.6, one.prob * 48), height: line - 7, rx: 1 }));
      box.append(pictured(one.token, left + 74, top + 13, 62, { class: `option ${mine ? "mine" : ""}`, "text-anchor": "end" }));
      box.append(svg("text", { class: "figure", x: left + wide - 6, y: top + 13, "text-anchor": "end", "data-prob": place }, share(one.prob)));
    });
    over.append(box);
    if (forward) fly(box, 0, 18, 320);
  }

  return {
    show(beat, forward) {
      under.replaceChildren();
      over.replaceChildren();
      if (beat.kind === "encode") return encode(beat, forward);
      if (beat.t === undefined) return;
      const come = reached.indexOf(beat.kind), now = (kind) => beat.kind === kind && forward;
      const has = (kind) => come >= reached.indexOf(kind);
      if (beat.kind === "state") state(beat, forward);
      if (attends(model)) {
        if (beat.kind === "scores") scores(beat.t);
        if (has("weights")) weights(beat.t, now("weights"));
        if (has("context")) sum(beat.t, now("context"));
      } else if (walk.steps[0].context && has("context")) summary(beat.t, now("context"));
      if (walk.steps[0].context && has("concat")) join(beat.t);
      under.classList.toggle("past", has("concat"));
      if (has("softmax")) card(beat.t, now("softmax"), beat.kind === "choose");
    },
  };
}
