// Arrays, numbers and tokens: from what the data holds to what can be drawn and read.

const decoded = new WeakMap();

// A stored array {shape, f32 | f16} as {shape, flat, rows}; decoded once.
function array(stored) {
  if (!stored) return null;
  let known = decoded.get(stored);
  if (!known) {
    const raw = atob(stored.f32 ?? stored.f16);
    const bytes = Uint8Array.from(raw, (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const half = stored.f32 === undefined;
    const flat = new Float64Array(bytes.length / (half ? 2 : 4));
    for (let i = 0; i < flat.length; i++) flat[i] = half ? fromHalf(view.getUint16(2 * i, true)) : view.getFloat32(4 * i, true);
    const width = stored.shape[stored.shape.length - 1];
    const rows = [];
    for (let at = 0; at < flat.length; at += width || 1) rows.push(flat.subarray(at, at + width));
    known = { shape: stored.shape, flat, rows };
    decoded.set(stored, known);
  }
  return known;
}

// One vector of a stored array.
function row(stored, index = 0) {
  const known = array(stored);
  return known ? known.rows[index] : null;
}

// An IEEE half.
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * 2 ** -24 * fraction;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * 2 ** (exponent - 25) * (1024 + fraction);
}

// Numbers are shown with four significant digits, or fewer where fewer are kept.
let keptDigits = 6;

function number(value, wanted = 4) {
  if (!Number.isFinite(value)) return String(value).replace("-", "−");
  if (value === 0) return "0";
  const digits = Math.min(wanted, keptDigits), size = Math.abs(value);
  const text = size >= 1e-4 && size < 1e6 ? Number(value.toPrecision(digits)).toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size)))) : value.toExponential(digits - 1);
  return text.replaceAll("-", "−");
}

// Probabilities and weights: three decimals.
function share(value) {
  return value > 0 && value < 0.0005 ? "<0.001" : value.toFixed(3);
}

// Log-probabilities and search scores.
function nats(value, decimals = 3) {
  const text = value.toFixed(decimals);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

function count(value) {
  return String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

// A token as a label: what cannot be seen, or would turn its surroundings, is shown by its number.
function shown(token) {
  const unseen = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]/gu;
  const text = String(token).replace(unseen, (letter) => `⟨${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  return text.replaceAll(" ", "␣") || "∅";
}

// A token inside a sentence of ours: set apart, so that its direction stays its own.
function quoted(token) {
  return `“\u2068${shown(token)}\u2069”`;
}

const SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉";
function subscript(text) {
  return String(text).replace(/\d/g, (digit) => SUBSCRIPTS[digit]);
}

function strongest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// The units whose values differ most between rows, in their order: those worth showing where few fit.
function liveliest(rows, wanted, from = 0, to = rows[0].length) {
  const spread = [];
  for (let unit = from; unit < to; unit++) {
    let sum = 0, squares = 0;
    for (const values of rows) { sum += values[unit]; squares += values[unit] ** 2; }
    spread.push([squares / rows.length - (sum / rows.length) ** 2, unit]);
  }
  spread.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  return spread.slice(0, wanted).map((pair) => pair[1]).sort((a, b) => a - b);
}

// The encoder's arrays of one layer and direction; null where there is none.
function encoderLayer(model, layer, direction) {
  return model.encoder.layers.find((one) => one.layer === layer && one.direction === direction) ?? null;
}

// The decoder's state before a step, of one layer: {state, cell?}.
function before(model, walk, t, layer) {
  return t > 0 ? walk.steps[t - 1].layers[layer] : model.hand_over.states[layer];
}

function attends(model) {
  return model.attention !== "none" && model.attention !== "fixed";
}

function walkName(walk) {
  return say(`walk_${walk.name}`);
}

// Two work directories may bear the same name.
function modelName(model, models) {
  const twins = models.filter((other) => other.name === model.name).length > 1;
  return twins ? `${model.name} (${model.workdir})` : model.name;
}
