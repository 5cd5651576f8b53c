// The search as a tree: time goes right, the winner along the top.

function makeTree(model, marks, redraw) {
  const { beam } = model;
  const section = html("section", { class: "figure search", "aria-labelledby": "tree-title" },
    html("header", {}, html("h2", { id: "tree-title" }, say("fig_tree")), html("p", { class: "lead" }, say(beam.width > 1 ? "tree_lead" : "tree_lead_one", { K: beam.width }))));
  const readout = html("p", { class: "readout", role: "status" }, say("tree_hint"));
  const frame = html("div", { class: "frame" });
  const paint = () => frame.replaceChildren(treePicture(model, marks.pruned, (text) => { readout.textContent = text; }));
  section.append(html("div", { class: "choosers" }, tick(say("pruned"), marks.pruned, (on) => { marks.pruned = on; paint(); })), frame, readout);
  paint();
  return section;
}

function rankOf(node, leads) {
  return node.best ? 0 : node.kept || leads.has(node.id) ? 1 : 2;
}

function treePicture(model, withPruned, read) {
  const { nodes } = model.beam, byId = new Map(nodes.map((node) => [node.id, node])), children = new Map(nodes.map((node) => [node.id, []]));
  const leads = new Set(); // what leads to something kept or finished is no dead end
  for (const node of nodes) if (node.kept || node.finished) for (let up = node; up && !leads.has(up.id); up = byId.get(up.parent)) leads.add(up.id);
  for (const node of nodes) if (node.parent !== null && (withPruned || leads.has(node.id))) children.get(node.parent).push(node);
  for (const list of children.values()) list.sort((a, b) => b.best - a.best || (leads.has(b.id) && b.kept) - (leads.has(a.id) && a.kept) || b.total - a.total);
  const line = 25, place = new Map(), order = [];
  let rows = 0;
  // A step is a column: the winner on top, then what was kept beside its parent, then what was dropped.
  for (let level = [nodes[0]]; level.length; ) {
    const sorted = level.map((node, at) => [rankOf(node, leads), at, node]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((one) => one[2]);
    sorted.forEach((node, at) => { place.set(node.id, at); order.push(node); });
    rows = Math.max(rows, sorted.length);
    level = sorted.flatMap((node) => children.get(node.id));
  }
  const last = Math.max(...order.map((node) => node.t));
  const widths = Array.from({ length: last + 2 }, () => 40);
  for (const node of order) widths[node.t + 1] = Math.max(widths[node.t + 1], Math.min(140, breadth(shown(node.token.token)) * 8 + 72));
  const left = [10];
  widths.forEach((wide, at) => left.push(left[at] + wide));
  const width = left[left.length - 1] + 44, height = rows * line + 16;
  const x = (node) => left[node.t + 1], y = (node) => 20 + place.get(node.id) * line;
  const picture = svg("svg", { class: "tree", viewBox: `0 0 ${width} ${height}`, width, height, role: "tree", "aria-label": say("tree"), direction: "ltr" });
  const wires = svg("g"), groups = new Map();
  picture.append(wires);
  const textOf = (node) => {
    if (node.t < 0) return say("root");
    const tokens = [];
    for (let up = node; up && up.t >= 0; up = byId.get(up.parent)) tokens.unshift(shown(up.token.token));
    return `\u2068${tokens.join(" ")}\u2069`;
  };
  const words = (node) => say("node", { text: textOf(node), logp: nats(node.log_prob), total: nats(node.total) })
    + (node.score === undefined ? "" : say("node_score", { score: nats(node.score) })) + (node.finished ? say("node_finished") : "")
    + say(node.best ? "node_best" : node.kept ? "node_kept" : "node_pruned");
  order.forEach((node) => {
    const kind = ["best", "kept", "dropped"][rankOf(node, leads)];
    const parent = byId.get(node.parent);
    if (parent) {
      const fromX = left[parent.t + 2] - 24, toX = x(node), fromY = y(parent), toY = y(node), turn = (toX - fromX) * 0.6;
      const d = fromY === toY ? `M${fromX},${fromY} L${toX},${toY}` : `M${fromX},${fromY} C${fromX + turn},${fromY} ${toX - turn},${toY} ${toX},${toY}`;
      const wire = svg("path", { class: `branch ${kind}`, d, "stroke-width": (0.8 + 3.2 * Math.exp(node.log_prob)).toFixed(2) });
      kind === "best" ? wires.append(wire) : wires.prepend(wire);
    }
    const wide = widths[node.t + 1] - 24, group = svg("g", { class: `node ${kind} ${node.finished ? "finished" : ""}`, role: "treeitem", tabindex: node.t < 0 ? 0 : -1, "aria-level": node.t + 2, "aria-label": words(node), "data-node": node.id });
    group.append(svg("rect", { class: "node-ground", x: x(node), y: y(node) - 10, width: wide, height: 20, rx: 5 }));
    const score = node.t < 0 ? null : nats(node.score ?? node.total, 2);
    group.append(pictured(node.token.token, x(node) + 5, y(node) + 4, wide - (score ? 38 : 6), { "text-anchor": "start" }));
    if (score) group.append(svg("text", { class: "figure", x: x(node) + wide - 4, y: y(node) + 4, "text-anchor": "end" }, score));
    groups.set(node.id, group);
    picture.append(group);
  });
  const light = (id) => {
    read(words(byId.get(id)));
    for (const group of groups.values()) group.classList.remove("lit");
    for (let up = byId.get(id); up; up = byId.get(up.parent)) groups.get(up.id).classList.add("lit");
  };
  const idOf = (event) => { const group = event.target.closest("[data-node]"); return group ? Number(group.dataset.node) : null; };
  picture.addEventListener("pointerover", (event) => { const id = idOf(event); if (id !== null) light(id); });
  picture.addEventListener("focusin", (event) => { const id = idOf(event); if (id !== null) light(id); });
  picture.addEventListener("keydown", (event) => {
    const node = byId.get(idOf(event));
    if (!node) return;
    const level = order.filter((other) => other.t === node.t).sort((a, b) => place.get(a.id) - place.get(b.id)), at = level.indexOf(node);
    const next = { ArrowRight: children.get(node.id)[0], ArrowLeft: byId.get(node.parent), ArrowDown: level[at + 1], ArrowUp: level[at - 1], Home: nodes[0], End: order.find((other) => other.best && other.finished) }[event.key];
    if (!["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    if (!next) return;
    groups.get(node.id).setAttribute("tabindex", -1);
    groups.get(next.id).setAttribute("tabindex", 0);
    groups.get(next.id).focus();
  });
  return picture;
}
