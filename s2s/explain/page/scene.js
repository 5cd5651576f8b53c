// The picture: source words below, their states as memory, the decoder's columns above.
//
// What stays once it was made is drawn here, and shown as far as the walk has come. What belongs
// to one step alone (gates, scores, lines, probabilities) is drawn in flow.js.

const SHOWN = 10; // units a strip shows
const WIDE = 18; // of a strip

// Where everything stands, in pixels of the picture.
function placesOf(model, walk, room) {
  const S = model.sizes.S, T = walk.steps.length;
  const depth = 1 + Math.max(...model.encoder.layers.map((one) => one.layer)), layers = walk.steps[0].layers.length;
  const tall = SHOWN * CELL, left = 72, startWidth = 46, right = 12;
  const longest = Math.max(...model.source.tokens.map((token) => breadth(shown(token)))) * 7.4 + 10;
  const longestWritten = Math.max(...walk.tokens.map((token) => breadth(shown(token)))) * 7.4 + 10;
  // What fits is spread over the room; what does not gets room enough for its words.
  const pitch = (fair, least, wanted, most) => (fair >= least ? Math.min(most, fair) : Math.max(least, Math.min(96, wanted)));
  const sourcePitch = pitch((room - left - right) / S, 44, longest, 128);
  const targetPitch = pitch((room - left - right - startWidth) / T, 54, longestWritten, 150);
  const width = Math.max(room, S * sourcePitch + left + right, T * targetPitch + startWidth + left + right);
  const sourceLeft = left + (width - left - right - S * sourcePitch) / 2;
  const targetLeft = left + (width - left - right - startWidth - T * targetPitch) / 2;
  const y = {};
  y.card = 8;
  y.word = 132;
  y.tilde = y.word + 13;
  y.state = [];
  let at = y.tilde + tall + 30;
  for (let layer = layers - 1; layer >= 0; layer--) { y.state[layer] = at; at += tall + (layer ? 56 : 0); }
  y.read = at + 56;
  y.readWord = y.read + tall + 15;
  y.bars = y.readWord + (attends(model) ? 122 : 66);
  y.memory = [];
  at = y.bars + 10;
  for (let layer = depth - 1; layer >= 0; layer--) { y.memory[layer] = at; at += tall + 56; }
  y.embedding = at;
  y.source = at + tall + 17;
  y.bottom = y.source + 16;
  return {
    S, T, depth, layers, tall, width, height: y.bottom, y, targetPitch, sourcePitch, left,
    source: (s) => sourceLeft + (s + 0.5) * sourcePitch,
    half: (s, direction) => sourceLeft + (s + 0.5) * sourcePitch + (model.bidirectional ? (direction === "forward" ? -WIDE / 2 - 1 : WIDE / 2 + 1) : 0),
    start: targetLeft + startWidth / 2,
    // In a decoder column the context stands left, the state right, what is made of both between them.
    context: (t) => targetLeft + startWidth + (t + 0.5) * targetPitch - 13,
    state: (t) => (t < 0 ? targetLeft + startWidth / 2 : targetLeft + startWidth + (t + 0.5) * targetPitch + (walk.steps[0].context ? 13 : 0)),
    column: (t) => targetLeft + startWidth + (t + 0.5) * targetPitch,
  };
}

// The units each kind of vector shows: the same ones everywhere, so that strips can be compared.
function unitsOf(model, walk) {
  const states = (key) => walk.steps.map(key);
  const forward = encoderLayer(model, 0, "forward"), Hd = row(forward.state, 0).length;
  const memory = array(model.encoder.memory).rows;
  const both = model.bidirectional
    ? [...liveliest(memory, SHOWN / 2, 0, Hd), ...liveliest(memory, SHOWN / 2, Hd)]
    : liveliest(memory, SHOWN);
  return {
    source: liveliest(array(model.encoder.embedding).rows, SHOWN),
    encoder: model.encoder.layers.map((one) => ({ ...one, units: liveliest(array(one.state).rows, SHOWN) })),
    memory: both,
    read: liveliest(states((step) => row(step.embedding)), SHOWN),
    state: walk.steps[0].layers.map((_, layer) => liveliest(states((step) => row(step.layers[layer].state)), SHOWN)),
    tilde: liveliest(states((step) => row(step.attentional)), SHOWN),
  };
}

function largest(values) {
  let most = 0;
  for (const value of values) most = Math.max(most, Math.abs(value));
  return most || 1;
}

// The scene of one walk: {element, show(beat index, moved on by one), places}.
function makeScene(model, walk, beats, room, hooks) {
  const places = placesOf(model, walk, room), units = unitsOf(model, walk), { y, S, T } = places;
  const index = new Map(beats.map((beat, place) => [beatKey(beat), place]));
  const when = (kind, at, layer = "", direction = "") => index.get([kind, layer, direction, at].join(":"));
  const picture = svg("svg", { class: "scene", viewBox: `0 0 ${places.width} ${places.height}`, width: places.width, height: places.height, role: "img", "aria-label": say("scene"), direction: "ltr" });
  picture.append(svg("defs", {}, svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 6.5, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" }, svg("path", { class: "tip", d: "M1,1 L7,4 L1,7" }))));
  const beneath = svg("g", { class: "beneath" }), lines = svg("g", { class: "flow" }), front = svg("g"), above = svg("g", { class: "flow" });
  picture.append(beneath, lines, front, above);
  const items = [];
  // One thing that appears at a beat; dx, dy: from where it flies in.
  const put = (at, element, from = null, parent = front) => { element.classList.add("item"); parent.append(element); items.push({ at, element, from }); return element; };
  const ghost = (element) => beneath.append(element);
  const arrow = (at, d, name = "") => put(at, svg("path", { class: `wire ${name}`, d, "marker-end": "url(#tip)" }), null, beneath);

  const label = (text, at) => beneath.append(svg("text", { class: "row-label", x: 8, y: at }, text));
  label(say("row_x"), y.embedding + places.tall / 2 + 4);
  label(say("row_h"), y.memory[places.depth - 1] + places.tall / 2 + 4);
  label(say("row_y"), y.read + places.tall / 2 + 4);
  label(say("row_s"), y.state[places.layers - 1] + places.tall / 2 + 4);
  label(say("row_a"), y.tilde + places.tall / 2 + 4);
  label(say("row_w"), y.word - 3);

  const embeddings = largest(array(model.encoder.embedding).flat);
  for (let s = 0; s < S; s++) {
    const x = places.source(s), sub = subscript(s + 1);
    const at = when("embed", s);
    const word = pictured(model.source.tokens[s], x, y.source, places.sourcePitch - 6, { class: model.source.unknown?.[s] ? "word unknown" : "word" });
    front.append(word);
    items.push({ word, s });
    ghost(outline(SHOWN, x - WIDE / 2, y.embedding));
    put(at, strip(row(model.encoder.embedding, s), units.source, x - WIDE / 2, y.embedding, { scale: embeddings, what: `x${sub}` }), [0, 26]);
    for (const one of units.encoder) {
      const { layer, direction } = one, hx = places.half(s, direction), top = y.memory[layer];
      const born = when("encode", s, layer, direction), forward = direction === "forward";
      const past = forward ? s - 1 : s + 1, sign = model.bidirectional ? (forward ? "→" : "←") : "";
      ghost(outline(SHOWN, hx - WIDE / 2, top));
      arrow(born, `M${layer ? x : x + (hx - x) * 0.4},${(layer ? y.memory[layer - 1] : y.embedding) - 3} L${hx},${top + places.tall + 4}`);
      if (past >= 0 && past < S) {
        const level = top + places.tall * (forward ? 0.3 : 0.7), from = places.half(past, direction);
        const gap = WIDE / 2 + 2;
        arrow(born, forward ? `M${from + gap},${level} L${hx - gap},${level}` : `M${from - gap},${level} L${hx + gap},${level}`, "along");
      }
      put(born, strip(row(one.state, s), one.units, hx - WIDE / 2, top, { what: `${sign}h${sub}` }), past >= 0 && past < S ? [forward ? -40 : 40, 0] : [0, 30]);
    }
    const frame = { x: x - (model.bidirectional ? WIDE + 5 : WIDE / 2 + 4), y: y.memory[places.depth - 1] - 4, width: (model.bidirectional ? 2 * WIDE + 10 : WIDE + 8), height: places.tall + 8, rx: 4 };
    put(index.get("memory:::"), svg("rect", { class: "remembered", ...frame }), null, beneath);
  }

  // The hand-over: from where reading ended to where writing begins.
  const bridge = index.get("bridge:::"), startX = places.start, top = y.memory[places.depth - 1] - 5;
  if (model.hand_over.kind !== "zero") {
    const bend = y.readWord + 26;
    const ends = model.bidirectional ? [places.half(S - 1, "forward"), places.half(0, "backward")] : [places.source(S - 1)];
    for (const x of ends) {
      const d = `M${x},${top} C${x},${bend - 10} ${startX},${bend + 30} ${startX},${y.state[0] + places.tall + 6}`;
      const path = put(bridge, svg("path", { class: "wire bridge", d, "marker-end": "url(#tip)" }), null, beneath);
      path.dataset.trace = "1";
    }
  }
  model.hand_over.states.forEach((state, layer) => {
    ghost(outline(SHOWN, startX - WIDE / 2, y.state[layer]));
    put(bridge, strip(row(state.state), units.state[layer], startX - WIDE / 2, y.state[layer], { what: "s₀" }), [0, 70]);
  });
  put(bridge, svg("text", { class: "symbol", x: startX, y: y.state[places.layers - 1] - 7, "text-anchor": "middle" }, "s", svg("tspan", { class: "sub", dy: 3 }, "0")));

  const readScale = largest(walk.steps.flatMap((step) => Array.from(row(step.embedding))));
  walk.steps.forEach((step, t) => {
    const x = places.state(t), cx = places.context(t), mid = places.column(t), sub = subscript(t + 1), layers = step.layers.length;
    ghost(outline(SHOWN, x - WIDE / 2, y.read));
    ghost(outline(SHOWN, mid - WIDE / 2, y.tilde));
    const reads = when("read", t);
    const previous = t ? places.column(t - 1) : x;
    put(reads, pictured(step.read.token, mid, y.readWord, places.targetPitch - 6, { class: "word read" }), t && walk.steps[t - 1].chosen.id === step.read.id ? [previous - mid, y.word - y.readWord] : null);
    put(reads, strip(row(step.embedding), units.read, x - WIDE / 2, y.read, { scale: readScale, what: `y${subscript(t)}` }), [0, 22]);
    if (model.input_feeding && t) {
      const from = places.column(t - 1) + WIDE / 2 + 3, gap = (places.state(t) + from) / 2 - 12;
      const path = arrow(reads, `M${from},${y.tilde + places.tall / 2} C${from + 26},${y.tilde + places.tall / 2} ${gap},${y.read + places.tall * 0.4} ${x - WIDE / 2 - 4},${y.read + places.tall * 0.4}`, "feed");
      path.dataset.trace = "1";
    }
    for (let layer = 0; layer < layers; layer++) {
      const born = when("state", t, layer), level = y.state[layer];
      ghost(outline(SHOWN, x - WIDE / 2, level));
      arrow(born, `M${x},${(layer ? y.state[layer - 1] : y.read) - 3} L${x},${level + places.tall + 4}`);
      const from = t ? places.state(t - 1) : startX;
      const high = level + places.tall * 0.5, over = step.context && layer === layers - 1;
      // The wire passes beneath the context's strip.
      arrow(born, over ? `M${from + WIDE / 2},${level + places.tall - 6} C${from + WIDE / 2 + 9},${level + places.tall + 13} ${x - WIDE / 2 - 12},${level + places.tall + 15} ${x - WIDE / 2 - 2},${level + places.tall - 5}` : `M${from + WIDE / 2 + 2},${high} L${x - WIDE / 2 - 3},${high}`, "along");
      put(born, strip(row(step.layers[layer].state), units.state[layer], x - WIDE / 2, level, { what: `s${sub}` }), [-44, 0]);
    }
    const level = y.state[layers - 1];
    if (step.context) {
      const at = when("context", t);
      ghost(outline(SHOWN, cx - WIDE / 2, level));
      put(at, strip(row(step.context), units.memory, cx - WIDE / 2, level, { what: `c${sub}` }), [0, 60]);
    }
    const makes = when("attentional", t);
    arrow(makes, `M${mid},${level - 7} L${mid},${y.tilde + places.tall + 4}`);
    put(makes, strip(row(step.attentional), units.tilde, mid - WIDE / 2, y.tilde, { what: `s̃${sub}` }), [0, 34]);
    const other = step.chosen.rank > 0 ? "written other" : "written";
    put(when("choose", t), pictured(step.chosen.token, mid, y.word, places.targetPitch - 6, { class: `word ${other}` }), [0, -24]);
  });

  const readCell = (event) => { const { what, unit, value } = event.target.dataset ?? {}; if (unit) hooks.read(say("unit_at", { what, unit: say("unit"), k: unit, value })); };
  picture.addEventListener("pointerover", readCell);
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect(), px = ((event.clientX - box.left) / box.width) * places.width, py = ((event.clientY - box.top) / box.height) * places.height;
    if (py < y.readWord + 8) {
      const t = Math.round((px - places.column(0)) / places.targetPitch);
      if (t >= 0 && t < T) hooks.go(when("read", t));
    } else if (py > y.memory[places.depth - 1] - 4) {
      const s = Math.round((px - places.source(0)) / places.sourcePitch);
      if (s >= 0 && s < S) hooks.go(when("embed", s));
    }
  });

  const flow = makeFlow(model, walk, places, units, lines, above);
  return {
    element: picture, places,
    show(now, forward) {
      const beat = beats[now];
      for (const item of items) {
        if (item.word) { item.word.classList.toggle("current", beat.s === item.s); continue; }
        const on = item.at <= now;
        item.element.classList.toggle("on", on);
        item.element.classList.toggle("now", item.at === now);
        if (forward && item.at === now) {
          if (item.element.dataset.trace) trace(item.element);
          else if (item.from) fly(item.element, item.from[0], item.from[1]);
        }
      }
      flow.show(beat, forward);
    },
    // Where the eye should be, for pictures wider than the screen.
    focus: (beat) => (["scores", "weights"].includes(beat.kind) ? places.source(strongest(row(walk.steps[beat.t].weights))) : beat.s !== undefined ? places.source(beat.s) : beat.t !== undefined ? places.column(beat.t) : beat.kind === "bridge" ? places.start : places.width / 2),
  };
}
