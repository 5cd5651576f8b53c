// The beats of a walk: what happens after what, in the order of the equations, and how it is told.

// Every beat of a model's walk: {kind, at: where, chapter}. Without attention the beats of looking fall out.
function beatsOf(model, walk) {
  const S = model.sizes.S, beats = [];
  const directions = model.bidirectional ? ["forward", "backward"] : ["forward"];
  const depth = 1 + Math.max(...model.encoder.layers.map((one) => one.layer));
  for (let layer = 0; layer < depth; layer++) {
    for (const direction of directions) {
      for (let turn = 0; turn < S; turn++) {
        const s = direction === "forward" ? turn : S - 1 - turn;
        if (layer === 0 && direction === "forward") beats.push({ kind: "embed", s, chapter: "encoder" });
        beats.push({ kind: "encode", layer, direction, s, chapter: "encoder" });
      }
    }
  }
  beats.push({ kind: "memory", chapter: "bridge" }, { kind: "bridge", chapter: "bridge" });
  walk.steps.forEach((step, t) => {
    const add = (kind, more = {}) => beats.push({ kind, t, chapter: t, ...more });
    add("read");
    step.layers.forEach((_, layer) => add("state", { layer }));
    if (attends(model)) { add("scores"); add("weights"); }
    if (step.context) { add("context"); add("concat"); }
    add("attentional");
    add("softmax");
    add("choose");
  });
  return beats;
}

function beatKey(beat) {
  return [beat.kind, beat.layer ?? "", beat.direction ?? "", beat.s ?? beat.t ?? ""].join(":");
}

// A beat's name and the sentence that tells it.
function told(model, walk, beat) {
  const S = model.sizes.S, T = walk.steps.length, step = walk.steps[beat.t];
  const word = beat.s === undefined ? "" : quoted(model.source.tokens[beat.s]);
  const many = Math.max(...model.encoder.layers.map((one) => one.layer)) > 0;
  const layer = (number, show) => (show ? say("b_layer", { l: number + 1 }) : "");
  const read = () => {
    const said = quoted(step.read.token);
    if (model.input_feeding) return say(beat.t ? "b_read_feed" : "b_read_feed_first", { word: said });
    return say(beat.t ? "b_read" : "b_read_start", { word: said });
  };
  const most = (values) => {
    const s = strongest(values);
    return { word: quoted(model.source.tokens[s]), at: s };
  };
  const tell = {
    embed: () => [say("b_embed_name", { j: beat.s + 1, S }), say("b_embed", { word })],
    encode: () => [
      say("b_encode_name", { j: beat.s + 1, S, direction: say(beat.direction) }) + layer(beat.layer, many),
      say(model.gate_names.length ? "b_encode" : "b_encode_plain", { word }),
    ],
    memory: () => [say("b_memory_name"), say(model.bidirectional ? "b_memory_two" : "b_memory", { S, M: model.sizes.M })],
    bridge: () => [say("b_bridge_name"), say(`b_bridge_${model.hand_over.kind}`)],
    read: () => [say("b_read_name"), read() + (model.attention === "fixed" ? " " + say("b_read_fixed") : "")],
    state: () => [
      say("b_state_name") + layer(beat.layer, step.layers.length > 1),
      say("b_state") + (model.attention === "none" && beat.layer === step.layers.length - 1 ? " " + say("b_state_none") : ""),
    ],
    scores: () => {
      const { word: best, at } = most(row(step.scores));
      return [say("b_scores_name"), say("b_scores", { word: best, value: number(row(step.scores)[at]) })];
    },
    weights: () => {
      const { word: best, at } = most(row(step.weights));
      return [say("b_weights_name"), say("b_weights", { word: best, value: share(row(step.weights)[at]) })];
    },
    context: () => [say("b_context_name"), say(attends(model) ? "b_context" : "b_context_fixed")],
    concat: () => [say("b_concat_name"), say("b_concat")],
    attentional: () => [say("b_attentional_name"), say(step.context ? "b_attentional" : "b_attentional_none")],
    softmax: () => [say("b_softmax_name"), say("b_softmax", { word: quoted(step.top[0].token), value: share(step.top[0].prob) })],
    choose: () => [say("b_choose_name"), say(chosenHow(walk, beat.t), { word: quoted(step.chosen.token), value: share(step.chosen.prob), rank: step.chosen.rank + 1 })],
  };
  const [name, sentence] = tell[beat.kind]();
  return { name: beat.t === undefined ? name : say("b_of_step", { t: beat.t + 1, T }) + name, sentence };
}

function chosenHow(walk, t) {
  const { rank } = walk.steps[t].chosen;
  if (walk.name === "reference" && rank > 0) return "b_choose_true";
  if (rank > 0) return "b_choose_other";
  return t === walk.steps.length - 1 && walk.words[t] === null ? "b_choose_end" : "b_choose";
}
