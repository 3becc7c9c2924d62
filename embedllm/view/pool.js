// The pool of blocks as a grid: one square per block, painted as a single image, with rings and signs on a layer above.
// Owns layout, the choice of each block's mark and finding the block under a point. Knows no engine and no messages.
// Invariant: everything is drawn from the state given; the canvas is never read back.

const MODES = ["state", "sequence", "prefix group", "age", "fill"];
const COLUMNS = [8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 2048,
  4096];
// CSS pixels; the margin is for rings.
const GRID_HEIGHT = 322, LARGEST_SQUARE = 32, SMALL_SQUARE = 4, GUTTER = 44, MARGIN = 3;

/** Per block how much of it is filled, 0..8: full unless a running sequence's tokens end in it or before it. */
function fillLevels(state) {
  const levels = new Uint8Array(state.numBlocks).fill(FULL);
  for (const sequence of state.seqs.values()) {
    for (let i = Math.floor(sequence.numComputed / state.blockSize); i < sequence.blocks.length; i++) {
      levels[sequence.blocks[i]] = Math.ceil(FULL * state.fill(sequence.id, i) / state.blockSize);
    }
  }
  return levels;
}

/** Per block the number of the square that shows it; what is free or only cached looks alike in every mode. */
function blockMarks(state, mode) {
  const { numBlocks, refs, node, since } = state, marks = new Uint32Array(numBlocks), levels = fillLevels(state);
  const pinned = new Uint8Array(numBlocks), owned = mode === "sequence" || mode === "prefix group";
  const owner = new Int32Array(owned ? numBlocks : 0).fill(-1);
  for (const blocks of state.pins.values()) for (const block of blocks) pinned[block] = 1;
  if (owned) {
    for (const sequence of state.seqs.values()) {
      const name = mode === "sequence" ? sequence.id : sequence.blocks[0];
      for (const block of sequence.blocks) if (owner[block] < 0 || name < owner[block]) owner[block] = name;
    }
  }
  for (let block = 0; block < numBlocks; block++) {
    const level = levels[block];
    let value;
    if (refs[block] === 0) value = node[block] ? mark(IDLE, HATCH) : mark(FREE);
    else if (mode === "age") value = mark(SCALE + 15 - Math.min(15,
      Math.round(1.7 * Math.log2(1 + Math.max(0, state.step - since[block])))));
    else if (mode === "fill") value = mark(SCALE + Math.round(level * 15 / FULL), SOLID, level);
    else if (owned) value = owner[block] < 0 ? mark(NEUTRAL, SOLID, level) : sequenceMark(owner[block], level);
    else value = mark(refs[block] > 1 ? SHARED : USED, SOLID, level);
    if (refs[block] > 1) value += TICK;
    if (pinned[block]) value += FRAME;
    marks[block] = value;
  }
  return marks;
}

/** What the squares of a mode mean: pairs of mark and words. */
function legendOf(mode) {
  const always = [[mark(FREE), "free"], [mark(IDLE, HATCH), "cached, evictable"]];
  const flags = (colour) => [[mark(colour) + TICK, "shared (corner)"], [mark(colour) + FRAME, "pinned (frame)"]];
  const scale = (...words) => words.map((word, i) => [mark(SCALE + Math.round(15 * i / (words.length - 1))), word]);
  if (mode === "state") {
    return [...always, [mark(USED), "in use"], [mark(USED, SOLID, 3), "partly filled"], [mark(SHARED) + TICK, "shared"],
      [mark(USED) + FRAME, "pinned"]];
  }
  if (mode === "age") return [...always, ...scale("1,000 steps ago", "100", "10", "this step"),
    ...flags(SCALE + 12).slice(0, 1)];
  if (mode === "fill") return [...always, ...scale("empty", "half full", "full"), ...flags(SCALE + 15).slice(0, 1)];
  const words = mode === "sequence" ? "a colour and pattern per sequence" : "a colour and pattern per shared beginning";
  return [...always, [sequenceMark(0), ""], [sequenceMark(1), ""], [sequenceMark(2), words], ...flags(HUES)];
}

class PoolGrid {
  constructor() {
    this.canvas = make("canvas", { role: "img", tabindex: "0", "aria-label": "Pool of KV blocks" });
    this.over = make("canvas", { class: "ekv-over", "aria-hidden": "true" });
    this.node = make("div", { class: "ekv-stack" }, this.canvas, this.over);
    this.says = make("span");
    this.legend = make("ul", { class: "ekv-legend" });
  }

  /** Chooses the largest square with which `numBlocks` fit `width` CSS pixels and the grid's height. */
  layout(width, numBlocks) {
    const ratio = devicePixelRatio || 1, room = Math.max(8, width - GUTTER);
    const largest = Math.floor(LARGEST_SQUARE * ratio);
    let best = null;
    for (const columns of COLUMNS) {
      const size = Math.min(largest, Math.floor(room * ratio / columns)), rows = Math.ceil(numBlocks / columns);
      if (size < 1) break;
      const fits = rows * size <= (size < SMALL_SQUARE ? 2 : 1) * GRID_HEIGHT * ratio; // small ones may go deeper
      if (!best || fits && (!best.fits || size >= best.size)) best = { columns, size, rows, fits };
      else if (!best.fits) best = { columns, size, rows, fits };
    }
    return Object.assign(this, best, { ratio, width, numBlocks, height: best.rows * best.size / ratio + 2 * MARGIN });
  }

  explain(mode, palette) {
    const signs = ["○ new", "✕ evicted", "→ copied"].map((words) => make("li", {}, words));
    this.legend.replaceChildren(...legend(palette, legendOf(mode)), ...signs);
  }

  draw(state, mode, palette, width) {
    say(this.says, `${count(state.numBlocks)} blocks of ${state.blockSize} tokens`);
    const same = this.width === width && this.numBlocks === state.numBlocks && this.ratio === (devicePixelRatio || 1);
    if (!same) this.layout(width, state.numBlocks);
    const { columns, rows, size } = this, across = columns * size;
    if (this.tiles?.size !== size || this.tiles.palette !== palette) this.tiles = new Tiles(palette, size);
    if (!this.image || this.image.width !== across || this.image.height !== rows * size) {
      this.image = new ImageData(across, rows * size);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const { tiles, pixels } = this, marks = this.marks = blockMarks(state, mode);
    let last = -1, tile = null;
    for (let block = 0; block < marks.length; block++) {
      if (marks[block] !== last) tile = tiles.get(last = marks[block]);
      let at = Math.floor(block / columns) * size * across + block % columns * size, from = 0;
      for (let y = 0; y < size; y++, at += across) for (let x = 0; x < size; x++) pixels[at + x] = tile[from++];
    }
    const context = fit(this.canvas, this.width, this.height, false);
    context.putImageData(this.image, Math.round(GUTTER * this.ratio), Math.round(MARGIN * this.ratio));
    this.#labels(context, palette);
  }

  #labels(context, palette) {
    const line = this.size / this.ratio, every = Math.max(1, Math.ceil(18 / line));
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    Object.assign(context, { fillStyle: palette.css.soft, font: SMALL, textAlign: "right", textBaseline: "middle" });
    const first = MARGIN + Math.max(4, Math.min(line - 3, 14) / 2);
    for (let row = 0; row < this.rows; row += every) {
      context.fillText(row * this.columns, GUTTER - 8, first + row * line, GUTTER - 8);
    }
  }

  /** The block at a point of the canvas in CSS pixels, or -1. */
  blockAt(x, y) {
    const side = this.size / this.ratio, [left, top] = this.#corner();
    const column = Math.floor((x - left) / side), block = Math.floor((y - top) / side) * this.columns + column;
    return column >= 0 && column < this.columns && y >= top && block < this.numBlocks ? block : -1;
  }

  // Where the squares begin, in CSS pixels that are whole pixels of the screen.
  #corner() { return [GUTTER, MARGIN].map((length) => Math.round(length * this.ratio) / this.ratio); }

  /** [left, top, side] of a block's square in CSS pixels. */
  rect(block) {
    const side = this.size / this.ratio, [left, top] = this.#corner(), row = Math.floor(block / this.columns);
    return [left + block % this.columns * side, top + row * side, this.tiles.width / this.ratio];
  }

  /** lit: blocks to ring. cursor: the block of the keyboard, or -1. signs: [name, block, target] of the step shown. */
  drawOver(palette, lit, cursor, locked, signs) {
    const context = fit(this.over, this.width, this.height);
    for (const [name, block, target] of signs) this.#sign(context, palette, name, block, target);
    for (const block of lit) this.#ring(context, block, palette.css.ink, 2, []);
    if (locked >= 0) this.#ring(context, locked, palette.css.focus, 3, []);
    if (cursor >= 0) this.#ring(context, cursor, palette.css.focus, 2, [3, 2]);
  }

  #ring(context, block, colour, width, dash) {
    const [x, y, side] = this.rect(block);
    Object.assign(context, { strokeStyle: colour, lineWidth: width });
    context.setLineDash(dash);
    context.strokeRect(x - 1, y - 1, side + 2, side + 2);
    context.setLineDash([]);
  }

  #sign(context, palette, name, block, target) {
    if (block >= this.numBlocks) return;
    const [x, y, side] = this.rect(block), middle = side / 2;
    Object.assign(context, { lineWidth: Math.max(1, Math.min(2, side / 8)), strokeStyle: palette.css.ink });
    context.beginPath();
    if (name === "allocate") context.arc(x + middle, y + middle, Math.max(1, side / 6), 0, 7);
    if (name === "evict") {
      const near = side * 0.25, far = side - near;
      context.strokeStyle = palette.css.alarm;
      for (const [from, to] of [[near, far], [far, near]]) {
        context.moveTo(x + from, y + near);
        context.lineTo(x + to, y + far);
      }
    }
    if (name === "copy" && target < this.numBlocks) {
      const [left, top] = this.rect(target), angle = Math.atan2(top - y, left - x), head = Math.max(4, side / 3);
      context.moveTo(x + middle, y + middle);
      context.lineTo(left + middle, top + middle);
      for (const turn of [2.6, -2.6]) {
        context.moveTo(left + middle, top + middle);
        context.lineTo(left + middle + head * Math.cos(angle + turn), top + middle + head * Math.sin(angle + turn));
      }
    }
    context.stroke();
  }
}
