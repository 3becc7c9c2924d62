// The look: the style sheet, the colours as numbers, and the small patterned squares every picture is made of.
// Knows nothing of engines, messages or layout. Invariant: a colour is a CSS property first and a number second, so a
// theme, a dark page or forced colours reach the canvases the same way as the text.

const STYLE = `
.ekv { --ekv-bg: var(--jp-layout-color0, var(--vscode-editor-background, #fff));
  --ekv-ink: var(--jp-ui-font-color0, var(--vscode-editor-foreground, #1b1f24));
  --ekv-used: #0072b2; --ekv-shared: #009e73; --ekv-idle: #e69f00; --ekv-pinned: #cc79a7; --ekv-alarm: #d55e00;
  --ekv-soft: color-mix(in srgb, var(--ekv-ink) 66%, var(--ekv-bg));
  --ekv-line: color-mix(in srgb, var(--ekv-ink) 16%, var(--ekv-bg));
  --ekv-panel: color-mix(in srgb, var(--ekv-ink) 3.5%, var(--ekv-bg)); --ekv-focus: #0072b2;
  box-sizing: border-box; position: relative; container-type: inline-size; background: var(--ekv-bg);
  color: var(--ekv-ink);
  font: 13px/1.45 var(--jp-ui-font-family, system-ui, -apple-system, "Segoe UI", sans-serif);
  font-variant-numeric: tabular-nums; padding: 14px 16px; border: 1px solid var(--ekv-line); border-radius: 10px;
  text-align: left; }
@media (prefers-color-scheme: dark) { .ekv {
  --ekv-bg: var(--jp-layout-color0, var(--vscode-editor-background, #15181c));
  --ekv-ink: var(--jp-ui-font-color0, var(--vscode-editor-foreground, #e8eaed)); } }
.ekv[data-dark="1"] { --ekv-used: #56b4e9; --ekv-focus: #56b4e9; color-scheme: dark; }
.ekv[data-dark="0"] { color-scheme: light; }
@media (forced-colors: active) { .ekv { --ekv-bg: Canvas; --ekv-ink: CanvasText; --ekv-used: Highlight;
  --ekv-shared: CanvasText;
  --ekv-idle: CanvasText; --ekv-pinned: LinkText; --ekv-alarm: LinkText; --ekv-soft: CanvasText; --ekv-line: GrayText;
  --ekv-panel: Canvas; --ekv-focus: Highlight; }
  .ekv button[aria-pressed="true"] { forced-color-adjust: none; background: Highlight; color: HighlightText; } }
.ekv *, .ekv *::before { box-sizing: border-box; }
.ekv [hidden] { display: none; }
.ekv-top, .ekv-row { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 12px; }
.ekv dl, .ekv dt, .ekv dd { float: none; width: auto; margin: 0; padding: 0; font-weight: inherit; } /* a host styles them */
.ekv-top { margin-bottom: 12px; }
.ekv-title { font-size: 15px; font-weight: 650; margin: 0; }
.ekv-model { color: var(--ekv-soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 36ch; }
.ekv-grow { flex: 1 1 auto; }
.ekv-badge { display: inline-flex; align-items: center; gap: 7px; min-width: 15ch; color: var(--ekv-soft);
  white-space: nowrap; }
.ekv-badge::before { content: ""; width: 9px; height: 9px; border-radius: 50%; border: 2px solid currentColor; }
.ekv-badge[data-live="1"] { color: var(--ekv-ink); }
.ekv-badge[data-live="1"]::before { background: var(--ekv-shared); border-color: var(--ekv-shared); }
.ekv button, .ekv select, .ekv input { font: inherit; color: inherit; min-height: 28px; min-width: 28px;
  border-radius: 6px; margin: 0;
  border: 1px solid var(--ekv-line); background: var(--ekv-bg); padding: 2px 9px; }
.ekv button { cursor: pointer; }
.ekv button:hover { background: color-mix(in srgb, var(--ekv-ink) 8%, var(--ekv-bg)); }
.ekv button:disabled { opacity: .45; cursor: default; }
.ekv button[aria-pressed="true"] { background: var(--ekv-ink); color: var(--ekv-bg); border-color: var(--ekv-ink); }
.ekv :focus-visible { outline: 2px solid var(--ekv-focus); outline-offset: 2px; }
.ekv-group { display: inline-flex; } .ekv-group button { border-radius: 0; margin-left: -1px; }
.ekv-group button:first-child { border-radius: 6px 0 0 6px; margin-left: 0; }
.ekv-group button:last-child { border-radius: 0 6px 6px 0; }
.ekv-note { border-left: 3px solid var(--ekv-alarm); background: var(--ekv-panel); padding: 7px 12px;
  margin: 0 0 12px; border-radius: 4px; }
.ekv .ekv-figures { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 1px; background: var(--ekv-line);
  border: 1px solid var(--ekv-line); border-radius: 8px; overflow: hidden; margin: 0 0 16px; }
.ekv-figure { background: var(--ekv-bg); padding: 8px 12px 9px; min-width: 0; }
.ekv .ekv-figure dt { color: var(--ekv-soft); font-size: 11.5px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.ekv .ekv-figure dd { margin: 1px 0 0; font-size: 17px; font-weight: 600; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.ekv-figure small { font-size: 11.5px; font-weight: 400; color: var(--ekv-soft); }
.ekv-main { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 24px; }
.ekv-panel { margin-bottom: 14px; min-width: 0; } .ekv-panel h4 { font-size: 12.5px; font-weight: 650; margin: 0;
  line-height: 28px; }
.ekv-head { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 10px; margin-bottom: 6px; }
.ekv-head span { color: var(--ekv-soft); font-size: 12px; } .ekv-head .ekv-legend { margin: 0; }
.ekv-stack { position: relative; line-height: 0; } .ekv-stack canvas { display: block; }
.ekv-over { position: absolute; left: 0; top: 0; pointer-events: none; }
.ekv-legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 9px 0 0; padding: 0; list-style: none;
  font-size: 12px; color: var(--ekv-soft); }
.ekv-legend li { display: inline-flex; align-items: center; gap: 6px; margin: 0; } .ekv-legend canvas { flex: none; }
.ekv-alarm { color: var(--ekv-alarm); }
.ekv-card { position: absolute; z-index: 3; min-width: 190px; max-width: 300px; background: var(--ekv-bg);
  border: 1px solid var(--ekv-soft); pointer-events: none;
  border-radius: 8px; padding: 8px 12px; font-size: 12px; line-height: 1.5; box-shadow: 0 4px 16px rgb(0 0 0 / .18); }
.ekv-card[data-locked="1"] { pointer-events: auto; border-width: 2px; }
.ekv .ekv-card dl { display: grid; grid-template-columns: auto 1fr; gap: 0 12px; margin: 2px 0 0; }
.ekv .ekv-card dt { color: var(--ekv-soft); }
.ekv .ekv-card dd { margin: 0; overflow-wrap: anywhere; } .ekv-card .ekv-row { margin-top: 6px; }
.ekv-text { font-family: var(--jp-code-font-family, ui-monospace, monospace); white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 6px 0 0;
  max-height: 8em; overflow: auto; background: var(--ekv-panel); padding: 4px 8px; border-radius: 4px; }
.ekv-scroll { position: relative; overflow: auto; height: 322px; border: 1px solid var(--ekv-line);
  border-radius: 8px; background: var(--ekv-bg); }
.ekv-scroll > canvas { position: sticky; left: 0; top: 0; display: block; }
.ekv-seq { position: absolute; left: 0; display: flex; align-items: center; gap: 6px; height: 30px; width: 196px;
  padding: 0 6px; white-space: nowrap; font-size: 12px; }
.ekv-seq b { min-width: 6ch; } .ekv-seq span { color: var(--ekv-soft); overflow: hidden; text-overflow: ellipsis;
  flex: 1; }
.ekv-seq button { min-height: 24px; min-width: 24px; padding: 0; line-height: 1; font-size: 12px;
  border-color: transparent; background: transparent; }
.ekv-time { position: relative; cursor: ew-resize; touch-action: none; border-radius: 6px; line-height: 0; }
.ekv-list { height: 218px; margin: 0; padding: 0; } .ekv-list button { position: absolute; left: 0; width: 100%;
  height: 26px; min-height: 26px; border: 0; border-radius: 0;
  text-align: left; padding: 0 12px; font-size: 12px; display: grid; grid-template-columns: 10ch 12ch 1fr; gap: 8px;
  align-items: center; white-space: nowrap; overflow: hidden; }
.ekv-list button:focus-visible { outline-offset: -2px; }
.ekv-list button[aria-current="true"] { background: color-mix(in srgb, var(--ekv-focus) 20%, var(--ekv-bg)); }
.ekv-list i { font-style: normal; color: var(--ekv-soft); text-align: right; } .ekv-list span { overflow: hidden;
  text-overflow: ellipsis; }
.ekv-engine { border: 1px dashed var(--ekv-line); border-radius: 8px; padding: 6px 10px; margin: 14px 0 0; }
.ekv-tour { background: var(--ekv-panel); border: 1px solid var(--ekv-line); border-radius: 8px; padding: 10px 14px;
  margin-bottom: 14px; }
.ekv-tour p { margin: 2px 0 8px; max-width: 88ch; min-height: 2.9em; }
.ekv-help { position: absolute; z-index: 5; right: 16px; top: 52px; background: var(--ekv-bg);
  border: 1px solid var(--ekv-soft); border-radius: 8px; padding: 12px 16px;
  box-shadow: 0 4px 24px rgb(0 0 0 / .25); } .ekv .ekv-help dl { display: grid; grid-template-columns: auto auto;
  gap: 3px 16px; margin: 6px 0 0; } .ekv .ekv-help dd { margin: 0; }
.ekv .ekv-help dt { font-family: var(--jp-code-font-family, ui-monospace, monospace); }
.ekv[data-closed="1"] .ekv-kernel { display: none; }
.ekv-unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
@container (max-width: 900px) { .ekv-main { grid-template-columns: minmax(0, 1fr); }
.ekv .ekv-figures { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
@container (max-width: 560px) { .ekv .ekv-figures { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
`;

const SMALL = "11px system-ui, sans-serif"; // text on the canvases
const SOLID = 0, HATCH = 1, DOTS = 2, BARS = 3;
const FULL = 8; // levels of a square's filling, 0..8
const TICK = 1 << 14, FRAME = 1 << 15;
const FREE = 0, USED = 1, SHARED = 2, IDLE = 3, PINNED = 4, NEUTRAL = 5, HUES = 8, SCALE = 32;
  // first index of each run
const HUE_DEGREES = [212, 28, 150, 325, 186, 48, 268, 2];
const SCALE_STOPS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
  // cividis

// The number of one square: colour (0..63), pattern, level, and TICK or FRAME added to it.
const mark = (colour, pattern = SOLID, level = FULL) => colour | pattern << 8 | level << 10;

/** A stable look of a sequence: 8 hues, 3 lightnesses, 3 patterns, by Fibonacci hashing, so neighbours differ most. */
function sequenceMark(id, level = FULL) {
  const hash = Math.imul(id + 1, 0x9e3779b1) >>> 0;
  return mark(HUES + (hash >>> 29) + 8 * ((hash >>> 16) % 3), [SOLID, DOTS, BARS][(hash >>> 8) % 3], level);
}

const rgb32 = ([r, g, b]) => (0xff000000 | b << 16 | g << 8 | r) >>> 0; // little-endian RGBA of ImageData
const blend = (a, b, share) => a.map((value, i) => Math.round(value + (b[i] - value) * share));

function hueToRgb(degrees, saturation, lightness) {
  const spread = saturation * Math.min(lightness, 1 - lightness);
  return [0, 8, 4].map((n) => {
    const k = (n + degrees / 30) % 12;
    return Math.round(255 * (lightness - spread * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

/** The colours of one root element: `css` strings by name, `rgb` triples by index. */
class Palette {
  static NAMES = ["bg", "ink", "soft", "line", "used", "shared", "idle", "pinned", "alarm", "focus"];

  /** Changes whenever the colours might have. */
  static keyOf(root) {
    const { backgroundColor, color } = getComputedStyle(root);
    return [backgroundColor, color, matchMedia("(forced-colors: active)").matches].join();
  }

  constructor(root, probe) {
    // Any notation a browser answers with becomes bytes, on what is behind it.
    const read = (name, behind = [255, 255, 255]) => {
      probe.style.color = `var(--ekv-${name})`;
      for (const colour of [`rgb(${behind})`, getComputedStyle(probe).color]) {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
      }
      return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    const canvas = make("canvas", { width: 1, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const bg = read("bg");
    this.dark = bg[0] * 0.3 + bg[1] * 0.59 + bg[2] * 0.11 < 128;
    root.dataset.dark = this.dark ? "1" : "0";
    this.forced = matchMedia("(forced-colors: active)").matches;
    const named = Object.fromEntries(Palette.NAMES.map((name) => [name, read(name, bg)]));
    this.css = Object.fromEntries(Object.entries(named).map(([name, value]) => [name, `rgb(${value})`]));
    const { ink, line, used, shared, idle, pinned, soft } = named;
    Object.assign(this, { bg, ink, line, frame: pinned, rgb: [ink, used, shared, idle, pinned, soft] });
    for (let i = 0; i < 24; i++) {
      const lightness = (this.dark ? [0.6, 0.46, 0.74] : [0.44, 0.6, 0.32])[i >> 3];
      this.rgb[HUES + i] = this.forced ? used : hueToRgb(HUE_DEGREES[i & 7], 0.62, lightness);
    }
    for (let i = 0; i < 16; i++) {
      const at = i / 15 * 5, low = Math.min(4, Math.floor(at));
      this.rgb[SCALE + i] = this.forced ? used : blend(SCALE_STOPS[low], SCALE_STOPS[low + 1], at - low);
    }
    this.key = Palette.keyOf(root);
  }
}

/** Squares of one size and palette as pixels: `get(mark)` gives [size * size] 32-bit colours, made once each. */
class Tiles {
  constructor(palette, size) {
    Object.assign(this, { palette, size, made: new Map() });
    this.width = size - (size >= 16 ? 3 : size >= 10 ? 2 : size >= 4 ? 1 : 0); // the rest is the gap
  }

  get(number) {
    let tile = this.made.get(number);
    if (!tile) this.made.set(number, tile = this.#paint(number));
    return tile;
  }

  #paint(number) {
    const { size, width, palette } = this, pixels = new Uint32Array(size * size);
    const colour = number & 63, pattern = number >> 8 & 3, level = number >> 10 & 15;
    const full = palette.rgb[colour], tint = blend(full, palette.bg, colour === FREE ? 0.93 : 0.76);
    const light = blend(full, palette.bg, palette.forced ? 1 : 0.45), pitch = width < 6 ? 3 : width < 12 ? 4 : 6;
    const from = width - Math.round(width * level / FULL), corner = Math.max(1, Math.round(width * 0.42));
    const border = width >= 12 ? 2 : 1, round = width >= 8;
    for (let y = 0; y < width; y++) {
      for (let x = 0; x < width; x++) {
        const edge = x < border || y < border || x >= width - border || y >= width - border;
        if (round && (x === 0 || x === width - 1) && (y === 0 || y === width - 1)) continue;
        let value = tint;
        if (colour === FREE) value = x === 0 || y === 0 || x === width - 1 || y === width - 1 ? palette.line : tint;
        else if (pattern === HATCH) value = (x + y) % pitch < (width < 3 ? 1 : pitch / 2) ? full : tint;
        else if (y >= from) {
          const spot = pattern === DOTS ? x % 4 === 1 && y % 4 === 1 : pattern === BARS && x % 4 === 1;
          value = spot && width > 5 ? light : full;
        }
        if (number & TICK && x - (width - corner) >= y) value = palette.forced ? palette.bg : palette.ink;
        if (number & FRAME && edge) value = palette.frame;
        pixels[y * size + x] = rgb32(value);
      }
    }
    return pixels;
  }
}

/** A small canvas that shows one mark as the pictures draw it; decoration beside a word. */
function swatch(palette, number) {
  const size = 16, canvas = make("canvas", { width: size, height: size, "aria-hidden": "true" });
  const tiles = new Tiles(palette, size), image = new ImageData(size, size);
  new Uint32Array(image.data.buffer).set(tiles.get(number));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Items of a legend: pairs of mark and words. */
const legend = (palette, marks) => marks.map(([number, words]) => make("li", {}, swatch(palette, number), words));

/** An element with attributes and children; strings become text nodes, so nothing of a model is ever parsed as HTML. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Sizes a canvas to `width` × `height` CSS pixels at the screen's density; gives its 2-D context, cleared. */
function fit(canvas, width, height, scaled = true) {
  const ratio = devicePixelRatio || 1, [w, h] = [width, height].map((side) => Math.max(1, Math.round(side * ratio)));
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(scaled ? ratio : 1, 0, 0, scaled ? ratio : 1, 0, 0);
  context.clearRect(0, 0, width * ratio, height * ratio);
  return context;
}

const say = (node, words) => { if (node.textContent !== words) node.textContent = words; };
const press = (node, on) => node.setAttribute("aria-pressed", String(on));
const button = (label, text, title = label) => make("button", { type: "button", "aria-label": label, title }, text);
const percent = (share, digits = 1) => Number.isFinite(share) ? `${(100 * share).toFixed(digits)} %` : "–";
const count = (value) => Number.isFinite(value) ? Math.round(value).toLocaleString("en") : "–";
function seconds(value) {
  if (!(value > 0)) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}
