// The walk: where it stands, what moves it (buttons, slider, keys, time), and what follows it.

const SPEEDS = [0.5, 1, 2, 4];
const PACE = 1150; // milliseconds a beat lasts at speed 1
const BRISK = { embed: 0.55, encode: 0.7, read: 0.85, concat: 0.8, choose: 1.15, context: 1.35, bridge: 1.4 };
const STAND_ICONS = { first: "M6 5v14M19 5l-10 7 10 7z", back: "M17 5l-10 7 10 7z", play: "M7 4.5l13 7.5-13 7.5z", pause: "M7 5h3.4v14H7zM13.6 5H17v14h-3.4z", step: "M7 5l10 7-10 7z", last: "M18 5v14M5 5l10 7-10 7z" };

function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: STAND_ICONS[name] }));
}

// The figure with the walk of one model; `state` is kept when the page is drawn again.
function makeWalk(data, state, redraw) {
  const model = data.models[state.model], walk = model.walks[state.walk];
  const beats = beatsOf(model, walk);
  state.beat = Math.min(state.beat, beats.length - 1);
  const readout = html("p", { class: "readout", role: "status" }, say("hover"));
  const hooks = { read: (text) => { readout.textContent = text; }, go: (beat) => go(beat) };
  const caption = html("div", { class: "caption", id: "stage" });
  const name = html("strong", {}), sentence = html("span", {});
  caption.append(name, sentence);
  const panel = html("div", { class: "panel" });
  const stage = html("div", { class: "stage", tabindex: 0, role: "group", "aria-label": say("scene"), "aria-describedby": "stage" });
  const scrub = html("input", { type: "range", class: "scrub", min: 0, max: beats.length - 1, step: 1, value: state.beat, "aria-label": say("scrub"), oninput: () => go(Number(scrub.value)) });
  const counter = html("output", { class: "counter" });
  const chapters = html("div", { class: "chapters", role: "group", "aria-label": say("chapters") });
  let scene = null, timer = null, width = 0;

  const chapterStarts = new Map();
  beats.forEach((beat, at) => { if (!chapterStarts.has(beat.chapter)) chapterStarts.set(beat.chapter, at); });
  for (const [chapter, at] of chapterStarts) {
    const words = chapter === "encoder" ? say("ch_encoder") : chapter === "bridge" ? say("ch_bridge") : null;
    const label = words ?? piece(walk.tokens[chapter]);
    chapters.append(html("button", { type: "button", class: words ? "chapter" : "chapter target", "data-at": at, onclick: () => go(at) }, words ? null : html("span", { class: "ordinal" }, String(chapter + 1)), label));
  }

  const playing = () => timer !== null;
  const playButton = button(say("play"), () => (playing() ? stop() : play()), { class: "play" }, icon("play"));
  function play() {
    if (state.beat >= beats.length - 1) go(0);
    caption.setAttribute("aria-live", "off");
    timer = 0;
    markPlay();
    inSight();
    tickOn();
  }
  // The whole picture, if the window is tall enough.
  function inSight() {
    stage.scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
  }
  function tickOn() {
    const pace = (PACE * (BRISK[beats[state.beat].kind] ?? 1)) / state.speed;
    timer = setTimeout(() => {
      if (state.beat >= beats.length - 1) return stop();
      go(state.beat + 1, true);
      return tickOn();
    }, pace);
  }
  function stop() {
    clearTimeout(timer);
    timer = null;
    caption.setAttribute("aria-live", "polite");
    markPlay();
  }
  function markPlay() {
    const text = say(playing() ? "pause" : "play");
    playButton.replaceChildren(icon(playing() ? "pause" : "play"));
    playButton.setAttribute("aria-label", text);
    playButton.setAttribute("title", text);
  }

  function go(to, keepPlaying = false) {
    if (!keepPlaying && playing()) stop();
    const next = Math.max(0, Math.min(beats.length - 1, to)), forward = next === state.beat + 1;
    state.beat = next;
    show(forward);
    if (!keepPlaying) inSight();
  }

  function show(forward) {
    const beat = beats[state.beat], words = told(model, walk, beat);
    name.textContent = words.name;
    sentence.textContent = words.sentence;
    scrub.value = state.beat;
    scrub.setAttribute("aria-valuetext", `${words.name}. ${words.sentence}`);
    counter.textContent = say("beat_of", { i: state.beat + 1, n: beats.length });
    for (const chip of chapters.children) {
      const mine = chapterStarts.get(beat.chapter) === Number(chip.dataset.at);
      chip.classList.toggle("current", mine);
      chip.setAttribute("aria-current", mine ? "step" : "false");
      chip.classList.toggle("done", Number(chip.dataset.at) < state.beat);
      if (mine && chapters.scrollWidth > chapters.clientWidth) chapters.scrollLeft = chip.offsetLeft - chapters.clientWidth / 2;
    }
    fillPanel(panel, model, walk, beat, hooks, data);
    if (scene) {
      scene.show(state.beat, forward);
      follow(beat);
    }
    if (state.follow) state.follow(beat);
  }

  // A picture wider than its frame moves with the walk, the frame alone.
  function follow(beat) {
    const x = (scene.focus(beat) / scene.places.width) * stage.scrollWidth;
    if (stage.scrollWidth > stage.clientWidth + 1) stage.scrollTo({ left: x - stage.clientWidth / 2, behavior: still.matches || playing() === false ? "auto" : "smooth" });
  }

  // The picture is drawn for the room there is, again whenever that changes.
  function draw() {
    const room = stage.clientWidth;
    if (!room || room === width) return;
    width = room;
    scene = makeScene(model, walk, beats, Math.max(room, 360), hooks);
    stage.replaceChildren(scene.element);
    scene.show(state.beat, false);
    follow(beats[state.beat]);
    for (const canvas of panel.querySelectorAll("canvas")) canvas.paint();
  }
  const watcher = new ResizeObserver(draw);
  watcher.observe(stage);

  // Keys move the walk wherever they mean nothing else.
  function key(event) {
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey) return;
    const target = event.target, tag = target.tagName;
    if (["INPUT", "SELECT", "TEXTAREA", "SUMMARY"].includes(tag) || ["slider", "gridcell", "treeitem"].includes(target.getAttribute?.("role"))) return;
    if (event.key === " ") { if (tag === "BUTTON") return; playing() ? stop() : play(); }
    else if (event.key === "ArrowRight") go(state.beat + 1);
    else if (event.key === "ArrowLeft") go(state.beat - 1);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(beats.length - 1);
    else return;
    event.preventDefault();
  }
  document.addEventListener("keydown", key);

  const bar = html("div", { class: "controls", role: "group", "aria-label": say("fig_walk") },
    html("div", { class: "buttons" },
      button(say("first"), () => go(0), {}, icon("first")), button(say("back"), () => go(state.beat - 1), {}, icon("back")), playButton,
      button(say("step"), () => go(state.beat + 1), {}, icon("step")), button(say("last"), () => go(beats.length - 1), {}, icon("last"))),
    scrub, counter,
    choice(say("speed"), SPEEDS.map((speed) => [speed, `${speed} ×`]), state.speed, (speed) => { state.speed = Number(speed); }));
  const legend = html("div", { class: "legend" },
    html("span", { class: "sr" }, say("scale")),
    html("span", { class: "key" }, html("span", { class: "swatch negative", "aria-hidden": "true" }), say("negative")),
    html("span", { class: "key" }, html("span", { class: "swatch positive", "aria-hidden": "true" }), say("positive")),
    html("span", {}, say("some_units", { n: SHOWN })));
  caption.setAttribute("aria-live", "polite");
  const choosers = html("div", { class: "choosers" },
    data.models.length > 1 ? choice(say("model"), data.models.map((one, at) => [at, modelName(one, data.models)]), state.model, (at) => { Object.assign(state, { model: Number(at), walk: 0, beat: 0 }); redraw(); }) : null,
    model.walks.length > 1 ? choice(say("walked"), model.walks.map((one, at) => [at, walkName(one)]), state.walk, (at) => { Object.assign(state, { walk: Number(at), beat: 0 }); redraw(); }) : null);
  const figure = html("section", { class: "figure walk", "aria-labelledby": "walk-title", id: "walk" },
    html("header", {}, html("h2", { id: "walk-title" }, say("fig_walk")), html("p", { class: "lead" }, say("walk_lead")), choosers),
    stage, html("div", { class: "steer" }, caption, bar, chapters), html("div", { class: "notes" }, readout, legend, html("p", { class: "faint keys" }, say("keys"))), panel);
  show(false);
  return {
    element: figure, go, beats,
    goTo: (kind, t) => go(beats.findIndex((beat) => beat.kind === kind && beat.t === t)),
    repaint: () => { for (const canvas of panel.querySelectorAll("canvas")) canvas.paint(); },
    leave: () => { stop(); watcher.disconnect(); document.removeEventListener("keydown", key); },
  };
}
