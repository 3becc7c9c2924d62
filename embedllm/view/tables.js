// What stands in rows. Block tables: one row per sequence, its logical blocks from left to right with the physical ids,
// beginnings that sequences share next to each other and in one bracket. And the list of events, which also says in
// words what the pictures show. Knows no messages; cancelling and going to a step are functions that it is given.
// Invariant: only rows in sight exist as elements.

const ROW = 30, NAMES = 200, HEADER = 22; // CSS pixels
const STATES = ["waiting", "running", "parked"], RANKS = [1, 0, 2];

/** Sequences in the order shown: running, waiting, parked; those with the same first block beside each other. */
function orderOf(state) {
  const leader = new Map(), all = [...state.seqs.values()];
  for (const { id, blocks: [first] } of all) leader.set(first, Math.min(id, leader.get(first) ?? Infinity));
  const lead = (sequence) => sequence.blocks.length ? leader.get(sequence.blocks[0]) : sequence.id;
  return all.sort((a, b) => RANKS[a.state] - RANKS[b.state] || lead(a) - lead(b) || a.id - b.id);
}

/** Brackets over neighbours that share blocks: rows from..to, places start..end, ends excluded; larger ones first. */
function bracketsOf(rows, begin = 0, stop = rows.length, start = 0) {
  const found = [];
  for (let from = begin, to; from < stop; from = to) {
    const first = rows[from].blocks;
    let end = first.length;
    for (to = from + 1; to < stop && start < first.length && rows[to].blocks[start] === first[start]; to++) {
      let same = start + 1;
      while (same < end && rows[to].blocks[same] === first[same]) same++;
      end = same;
    }
    if (to > from + 1) found.push({ from, to, start, end }, ...bracketsOf(rows, from, to, end));
  }
  return found;
}

class BlockTables {
  /** cancel: called with a sequence's id, or null where there is no kernel to ask. */
  constructor(cancel) {
    this.cancel = cancel;
    this.canvas = make("canvas", { role: "img", "aria-label": "Block tables of the sequences" });
    this.layer = make("div", { style: "position:sticky;left:0;top:0;height:0;z-index:1" });
    this.inner = make("div", { style: "position:relative" }, this.layer, this.canvas);
    this.canvas.style.cssText = "position:sticky;left:0;top:0;display:block";
    this.node = make("div", { class: "ekv-scroll", tabindex: "0", role: "region",
      "aria-label": "Block tables, scrolls" }, this.inner);
    this.names = [];
    this.rows = [];
  }

  /** marks: the number of each block's square; lit: the blocks to ring. */
  draw(state, marks, palette, lit) {
    const width = this.node.clientWidth, height = this.node.clientHeight, { scrollTop, scrollLeft } = this.node;
    const rows = this.rows = orderOf(state), longest = rows.reduce((most, row) => Math.max(most, row.blocks.length), 0);
    this.cell = Math.max(26, 10 + 7 * String(Math.max(0, state.numBlocks - 1)).length);
    this.inner.style.height = `${Math.max(height, HEADER + rows.length * ROW + 4)}px`;
    this.inner.style.width = `${Math.max(width, NAMES + longest * this.cell + 12)}px`;
    const first = Math.max(0, Math.floor(scrollTop / ROW));
    const last = Math.min(rows.length, Math.ceil((scrollTop + height - HEADER) / ROW));
    this.#drawNames(first, last, scrollTop);
    const context = fit(this.canvas, width, height);
    const tiles = { palette, marks, context, scrollTop, left: NAMES - scrollLeft, width, state };
    context.save();
    context.beginPath();
    context.rect(NAMES - 4, HEADER, width, height);
    context.clip();
    for (let row = first; row < last; row++) this.#drawRow(tiles, row, lit);
    const near = bracketsOf(rows).filter(({ from, to }) => to > first && from < last);
    for (const bracket of near) this.#drawBracket(tiles, bracket);
    context.restore();
    this.#drawHeader(tiles, longest);
  }

  #drawHeader({ context, palette, left, width }, longest) {
    Object.assign(context, { fillStyle: palette.css.soft, font: SMALL, textBaseline: "middle", textAlign: "left" });
    context.fillText("sequence", 8, HEADER / 2 + 1);
    context.save();
    context.beginPath();
    context.rect(NAMES - 4, 0, width, HEADER);
    context.clip();
    context.textAlign = "center";
    for (let i = 0; i < longest; i++) context.fillText(i, left + i * this.cell + this.cell / 2 - 1, HEADER / 2 + 1);
    context.restore();
    context.fillStyle = palette.css.line;
    context.fillRect(0, HEADER, width, 1);
    context.fillRect(NAMES - 5, 0, 1, this.canvas.clientHeight);
  }

  #drawRow({ palette, marks, context, scrollTop, left, width, state }, row, lit) {
    const { blocks, id, state: status, numPrompt } = this.rows[row];
    const y = HEADER + row * ROW - scrollTop + 4, high = ROW - 9, middle = y + high / 2 + 1;
    Object.assign(context, { font: SMALL, textBaseline: "middle", textAlign: "center" });
    if (!blocks.length) {
      Object.assign(context, { fillStyle: palette.css.soft, textAlign: "left" });
      context.fillText(`${STATES[status]}: holds no blocks, ${count(numPrompt)} prompt tokens`, left + 4, middle);
      return;
    }
    const from = Math.max(0, Math.floor((NAMES - left) / this.cell));
    const to = Math.min(blocks.length, Math.ceil((width - left) / this.cell));
    for (let i = from; i < to; i++) {
      const block = blocks[i], number = marks[block], colour = palette.rgb[number & 63], x = left + i * this.cell;
      const share = Math.min(1, state.fill(id, i) / state.blockSize), wide = this.cell - 3;
      context.fillStyle = `rgb(${blend(colour, palette.bg, palette.forced ? 1 : 0.8)})`;
      context.fillRect(x, y, wide, high);
      context.fillStyle = `rgb(${blend(colour, palette.bg, palette.forced ? 0.75 : 0.35)})`;
      context.fillRect(x, y, wide * share, high);
      if (number & TICK) {
        context.fillStyle = palette.css.ink;
        context.fill(new Path2D(`M${x + wide - 7} ${y}h7v7z`));
      }
      context.fillStyle = palette.css.ink;
      context.fillText(block, x + wide / 2, middle);
      if (lit.has(block)) {
        Object.assign(context, { strokeStyle: palette.css.ink, lineWidth: 2 });
        context.strokeRect(x - 0.5, y - 0.5, wide + 1, high + 1);
      }
    }
  }

  #drawBracket({ palette, context, scrollTop, left }, { from, to, start, end }) {
    const y = HEADER + from * ROW - scrollTop + 1.5, high = (to - from) * ROW - 3;
    Object.assign(context, { strokeStyle: palette.css.shared, lineWidth: 2 });
    context.beginPath();
    context.roundRect(left + start * this.cell - 2.5, y, (end - start) * this.cell + 1, high, 5);
    context.stroke();
  }

  #drawNames(first, last, scrollTop) {
    while (this.names.length < last - first) this.#addName();
    this.names.forEach((name, i) => {
      const sequence = this.rows[first + i], shown = first + i < last;
      name.node.hidden = !shown;
      if (!shown) return;
      const { id, state, numPrompt, numOutput, maxTokens, numCached, preemptions } = sequence;
      name.id = id;
      name.node.dataset.sequence = id;
      name.node.style.top = `${HEADER + (first + i) * ROW - scrollTop}px`;
      name.label.textContent = `#${id}`;
      name.text.textContent = `${numPrompt} + ${numOutput}/${maxTokens}${state === RUNNING ? "" : ` ${STATES[state]}`}`;
      name.text.title = `${STATES[state]}: ${numPrompt} prompt tokens (${numCached} from the prefix cache), `
        + `${numOutput} of at most ${maxTokens} generated, preempted ${preemptions} times`;
      name.stop?.setAttribute("aria-label", `engine: cancel sequence ${id}`);
    });
  }

  #addName() {
    const name = { id: -1, label: make("b"), text: make("span") };
    name.node = make("div", { class: "ekv-seq" }, name.label, name.text);
    if (this.cancel) {
      name.stop = make("button", { type: "button", class: "ekv-kernel", title: "engine: cancel this sequence" }, "✕");
      name.stop.addEventListener("click", () => this.cancel(name.id));
      name.node.append(name.stop);
    }
    this.names.push(name);
    this.layer.append(name.node);
  }

  /** What lies under the pointer: {sequence, index, block}, with block -1 beside the cells, or null. */
  under(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const row = this.rows[Math.floor((y + this.node.scrollTop - HEADER) / ROW)];
    if (!row || y < HEADER) return null;
    const index = x < NAMES - 4 ? -1 : Math.floor((x - NAMES + this.node.scrollLeft) / this.cell);
    return { sequence: row.id, index, block: row.blocks[index] ?? -1 };
  }
}

const NOTABLE = new Set(["queue", "admit", "preempt", "fork", "park", "finish", "share", "evict", "copy", "pin",
  "unpin", "resize", "start_over"]);
const KINDS = {
  notable: NOTABLE, everything: null,
  sequences: new Set(["queue", "admit", "preempt", "fork", "park", "finish"]),
  blocks: new Set(["allocate", "share", "release", "free", "cache", "evict", "idle", "copy", "pin", "unpin"]),
};
const SAYS = {
  step: ([, entries, tokens]) => `${entries} sequences, ${tokens} tokens`,
  queue: ([s, prompt, most]) => `#${s} waits: ${prompt} prompt tokens, at most ${most} new`,
  admit: ([s, row, cached]) => `#${s} begins to run in row ${row}, ${cached} tokens from the prefix cache`,
  schedule: ([s, start, n]) => `#${s} computes ${n} from token ${start}`,
  commit: ([s, computed, n]) => `#${s} has ${computed} computed, ${n} new`,
  preempt: ([s]) => `#${s} gives its blocks back and is computed again later`,
  fork: ([parent, s]) => `#${parent} forks: #${s} shares its blocks`,
  table: ([s, ...blocks]) => `#${s} gets ${blocks.join(", ")}`,
  trim: ([s, n]) => `#${s} keeps ${n} blocks`,
  park: ([s]) => `#${s} is not read and gives its blocks back`,
  finish: ([s, reason]) => `#${s} ends: ${reason}`,
  allocate: ([b]) => `block ${b}`, free: ([b]) => `block ${b}`, idle: ([b]) => `block ${b} stays cached, evictable`,
  share: ([b, refs]) => `block ${b} has ${refs} users`, release: ([b, refs]) => `block ${b} has ${refs} users left`,
  cache: ([b]) => `block ${b} is full and findable`, evict: ([b]) => `block ${b} is forgotten for another use`,
  pin: ([p, ...blocks]) => `pin ${p} holds ${blocks.length} blocks`, unpin: ([p]) => `pin ${p} is gone`,
  copy: ([from, to]) => `block ${from} is copied to ${to} before it is written`,
  resize: ([n]) => `the pool has ${n} blocks now`, start_over: () => "every block is computed again",
};
const MAX_LISTED = 4000, LINE = 26; // events kept in the list; CSS pixels

/** The events of the recording, newest last; a click goes to an event's step. */
class EventList {
  constructor(jump, changed) {
    Object.assign(this, { jump, rows: [], lines: [], seen: -1, current: -1 });
    this.kind = make("select", { "aria-label": "Which events" },
      ...Object.keys(KINDS).map((name) => make("option", { value: name }, name)));
    this.search = make("input", { type: "search", placeholder: "find: #3, block 17, evict …",
      "aria-label": "Find in the events", size: "22" });
    this.inner = make("div", { role: "list", "aria-label": "Events recorded", style: "position:relative" });
    this.node = make("div", { class: "ekv-scroll ekv-list", tabindex: "-1" }, this.inner);
    this.total = make("span");
    for (const control of [this.kind, this.search]) {
      control.addEventListener("input", () => { this.seen = -1; changed(); });
    }
  }

  /** Takes in what was recorded since; all again where the beginning of the recording moved or the filter changed. */
  update(player, version) {
    if (version === this.version && this.seen >= 0) return;
    const { first, last } = player, anew = this.seen < 0 || last < this.seen || this.rows[0]?.step < first;
    const kinds = KINDS[this.kind.value], words = this.search.value.trim().toLowerCase();
    const wanted = (event) => (!kinds || kinds.has(event.name))
      && (!words || `${event.name} ${SAYS[event.name]?.(event.args) ?? ""} `.toLowerCase().includes(words));
    const from = anew ? first : this.seen, known = anew ? 0 : this.indexAt(from - 1) + 1; // the newest step goes on
    this.rows = this.rows.slice(0, known).concat(player.events(from, last).filter(wanted)).slice(-MAX_LISTED);
    Object.assign(this, { seen: last, version });
  }

  /** The index of the last row at or before `step`, or -1. */
  indexAt(step) {
    let low = 0, high = this.rows.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.rows[middle].step <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  draw(step) {
    const height = this.node.clientHeight;
    this.shown = step;
    this.inner.style.height = `${this.rows.length * LINE}px`;
    say(this.total, `${count(this.rows.length)} listed`);
    this.#follow(this.indexAt(step), height);
    const first = this.top = Math.max(0, Math.floor(this.node.scrollTop / LINE));
    const visible = Math.max(0, Math.min(this.rows.length - first, Math.ceil(height / LINE) + 1));
    const reached = this.focused >= first && this.focused < first + visible ? this.focused : first; // by Tab
    while (this.lines.length < visible) this.#addLine();
    this.lines.forEach((line, i) => {
      line.item.hidden = i >= visible;
      if (i >= visible) return;
      const event = this.rows[first + i], words = [count(event.step), event.name, SAYS[event.name]?.(event.args) ?? ""];
      line.event = event;
      line.button.style.top = `${(first + i) * LINE}px`;
      line.button.setAttribute("aria-current", String(event.step === step));
      line.button.tabIndex = first + i === reached ? 0 : -1;
      line.item.setAttribute("aria-setsize", this.rows.length);
      line.item.setAttribute("aria-posinset", first + i + 1);
      words.forEach((text, k) => say(line.button.children[k], text));
    });
  }

  // Keeps the row of the moment shown in sight, unless somebody is reading in the list.
  #follow(current, height) {
    if (current === this.current && this.count === this.rows.length) return;
    Object.assign(this, { current, count: this.rows.length });
    const top = Math.max(0, current) * LINE, { scrollTop } = this.node;
    const inSight = top >= scrollTop && top + LINE <= scrollTop + height;
    if (!inSight && !this.node.contains(document.activeElement)) this.node.scrollTop = top - height + 3 * LINE;
  }

  /** Moves the keyboard's focus from line to line. */
  move(by) {
    const from = this.lines.findIndex((line) => line.button === document.activeElement);
    this.focused = Math.max(0, Math.min(this.rows.length - 1, this.top + Math.max(0, from) + by));
    const y = this.focused * LINE, room = this.node.clientHeight - LINE;
    this.node.scrollTop = Math.max(y - room, Math.min(y, this.node.scrollTop));
    this.draw(this.shown);
    this.lines[this.focused - this.top]?.button.focus({ preventScroll: true });
  }

  #addLine() {
    const line = { button: make("button", { type: "button" }, make("i"), make("strong"), make("span")) };
    line.item = make("div", { role: "listitem" }, line.button);
    line.button.addEventListener("click", () => this.jump(line.event.step));
    this.lines.push(line);
    this.inner.append(line.item);
  }
}
