// The timeline: how the pool was divided step by step, how many sequences ran and waited, when blocks were preempted,
// evicted or copied; and the ways through it: slider, the replay's clock, the tour. Knows no engine and no messages.
// Invariant: it shows what was recorded, and changes nothing but the moment shown.

// CSS pixels
const TIME_HEIGHT = 206, CHART_TOP = 10, CHART_HEIGHT = 78, LINES_TOP = 104, LINES_HEIGHT = 32, LANES_TOP = 144;
const LANE = 14, LEFT = 62, RIGHT = 12;
const SPEEDS = [0.25, 0.5, 1, 2, 4, 8], IDLE_GAP = 5e5; // microseconds of the engine's clock
const LANES = [["preempts", "preempt", "alarm"], ["evicts", "evict", "idle"], ["copies", "copy", "pinned"]];
const AREAS = ["shared", "used", "idle"]; // stacked from the bottom; what is left is free

/** Plays the recording as it happened, times `speed`; long silences are shortened, unseen time is not made up. */
class Replay {
  constructor(player) { Object.assign(this, { player, playing: false, speed: 1, ticked: 0, credit: 0 }); }

  /** Pause, or play from the step shown; what has ended plays from the beginning once its end is shown. */
  toggle(ended) {
    const { player } = this;
    this.playing = !this.playing && (ended || !player.live);
    if (this.playing && player.state.step === player.last) player.seek(player.first);
    else if (player.live) player.seek(player.last);
    Object.assign(this, { ticked: 0, credit: 0 });
  }

  /** Goes on to what is due at `now`, in ms; at its end it joins what is live. */
  advance(now, { step, time }, ended) {
    const { player } = this, from = step.indexOf(player.state.step);
    let at = Math.max(0, from);
    this.credit += Math.min(250, this.ticked ? now - this.ticked : 0) * 1000 * this.speed;
    this.ticked = now;
    for (let gap; at + 1 < step.length && (gap = Math.min(IDLE_GAP, time[at + 1] - time[at])) <= this.credit;
      at++) this.credit -= gap;
    if (at !== from) player.seek(step[at]);
    if (at + 1 < step.length) return;
    this.playing = false;
    if (!ended) player.goLive();
  }
}

class Timeline {
  /** seek: called with a step number; changed: called when it has to be drawn again. */
  constructor(seek, changed) {
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.node = make("div", { class: "ekv-time", role: "slider", tabindex: "0", "aria-label": "Step shown",
      "aria-orientation": "horizontal" }, this.canvas);
    this.says = make("span"); // the step under the pointer, in words
    this.legend = make("ul", { class: "ekv-legend" });
    Object.assign(this, { range: [0, 1], hover: -1 });
    this.#listen(seek, changed);
  }

  #listen(seek, changed) {
    const { node } = this, stepOf = (event) => this.stepAt(event.clientX - node.getBoundingClientRect().left);
    let dragging = false;
    const point = (step) => {
      this.hover = step;
      if (dragging && step >= 0) seek(step);
      changed();
    };
    node.addEventListener("pointerdown", (event) => {
      node.setPointerCapture(event.pointerId);
      dragging = true;
      point(stepOf(event));
    });
    node.addEventListener("pointermove", (event) => point(stepOf(event)));
    node.addEventListener("pointerleave", () => point(-1));
    for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => { dragging = false; });
  }

  explain(palette) {
    const areas = [[mark(SHARED), "shared"], [mark(USED), "one user"], [mark(IDLE, HATCH), "cached, evictable"],
      [mark(FREE), "free"]], waiting = make("li", { class: "ekv-alarm" }, "┅ waiting");
    this.legend.replaceChildren(...legend(palette, areas), make("li", {}, "━ running"), waiting);
  }

  x(step) {
    const [first, last] = this.range;
    return LEFT + (step - first) / Math.max(1, last - first) * (this.width - LEFT - RIGHT);
  }

  stepAt(x) {
    const [first, last] = this.range, share = (x - LEFT) / Math.max(1, this.width - LEFT - RIGHT);
    return Math.max(first, Math.min(last, Math.round(first + share * (last - first))));
  }

  /** series: columns per step; state: the moment shown. */
  draw(series, state, first, last, palette, width) {
    Object.assign(this, { width, range: [first, last] });
    const context = fit(this.canvas, width, TIME_HEIGHT), n = series.step.length;
    Object.assign(context, { font: SMALL, textBaseline: "middle" });
    this.#frame(context, palette);
    if (n) {
      this.#areas(context, series, palette);
      this.#lines(context, series, palette);
      LANES.forEach(([name, , colour], lane) => this.#ticks(context, series, series[name], palette.css[colour], lane));
    }
    if (this.hover >= 0) this.#cursor(context, this.hover, palette.css.soft, 1, false);
    this.#cursor(context, state.step, palette.css.ink, 2, true);
    this.#describe(state, first, last);
    this.#say(series);
  }

  #say(series) {
    const i = this.hover < 0 ? -1 : series.step.findLastIndex((step) => step <= this.hover);
    if (i < 0) return say(this.says, "");
    const { step, time, tokens, running, waiting, used } = series, since = ((time[i] - time[0]) / 1e6).toFixed(2);
    say(this.says, `step ${count(step[i])} · ${since} s · ${count(tokens[i])} tokens · ${running[i]} running, `
      + `${waiting[i]} waiting · ${count(used[i])} used`);
  }

  #describe(state, first, last) {
    const running = [...state.seqs.values()].filter((sequence) => sequence.state === RUNNING).length;
    const used = percent(state.used / Math.max(1, state.numBlocks), 0);
    const values = { valuemin: first, valuemax: last, valuenow: state.step,
      valuetext: `step ${state.step} of ${last}, ${running} running, ${used} used` };
    for (const [name, value] of Object.entries(values)) this.node.setAttribute(`aria-${name}`, value);
  }

  #frame(context, palette) {
    const right = this.width - RIGHT, [first, last] = this.range;
    const rules = [0, 0.5, 1].map((share) => CHART_TOP + share * CHART_HEIGHT);
    rules.push(LINES_TOP + LINES_HEIGHT, LANES_TOP + LANES.length * LANE);
    context.fillStyle = palette.css.line;
    for (const y of rules) context.fillRect(LEFT, y, right - LEFT, 1);
    Object.assign(context, { fillStyle: palette.css.soft, textAlign: "right" });
    ["100 %", "50 %", "0 %"].forEach((text, i) => context.fillText(text, LEFT - 8, CHART_TOP + CHART_HEIGHT * i / 2));
    LANES.forEach(([, label], lane) => context.fillText(label, LEFT - 8, LANES_TOP + (lane + 0.5) * LANE));
    const power = 10 ** Math.floor(Math.log10(Math.max(1, last - first) / 4));
    const pitch = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((m) => (last - first) / m <= 8));
    context.textAlign = "center";
    for (let step = Math.ceil(first / pitch) * pitch; step <= last; step += pitch) {
      context.fillText(count(step), this.x(step), TIME_HEIGHT - 7);
    }
  }

  // Indices of the steps to draw: every one, or the last of each pixel column where there are more steps than pixels.
  #picked(series) {
    const n = series.step.length, picked = [];
    for (let i = 0, column = -1; i < n; i++) {
      const x = Math.floor(this.x(series.step[i]));
      if (x === column) picked[picked.length - 1] = i;
      else picked.push(i);
      column = x;
    }
    return picked;
  }

  // `used` counts shared blocks too, so the second area is what one sequence alone holds.
  #areas(context, series, palette) {
    const picked = this.#picked(series), { shared, used, idle, free } = series;
    const share = (blocks, i) => blocks / Math.max(1, used[i] + idle[i] + free[i]);
    const tops = { shared: (i) => share(shared[i], i), used: (i) => share(used[i], i),
      idle: (i) => share(used[i] + idle[i], i) };
    const bottom = CHART_TOP + CHART_HEIGHT, y = (part) => bottom - CHART_HEIGHT * Math.min(1, part);
    let below = () => 0;
    for (const name of AREAS) {
      const top = tops[name];
      context.beginPath();
      picked.forEach((i, k) => {
        const x = this.x(series.step[i]);
        if (k) context.lineTo(x, y(top(picked[k - 1])));
        context.lineTo(x, y(top(i)));
      });
      for (let k = picked.length - 1; k >= 0; k--) {
        const x = this.x(series.step[picked[k]]);
        context.lineTo(x, y(below(picked[k])));
        if (k) context.lineTo(x, y(below(picked[k - 1])));
      }
      context.closePath();
      const colour = palette.rgb[{ shared: SHARED, used: USED, idle: IDLE }[name]];
      context.fillStyle = `rgb(${blend(colour, palette.bg, name === "idle" ? 0.6 : 0.15)})`;
      context.fill();
      if (name === "idle") {
        context.fillStyle = hatchOf(context, palette);
        context.fill();
      }
      below = top;
    }
  }

  #lines(context, series, palette) {
    const picked = this.#picked(series);
    const most = picked.reduce((m, i) => Math.max(m, series.running[i], series.waiting[i]), 1);
    const y = (value) => LINES_TOP + LINES_HEIGHT - LINES_HEIGHT * value / most;
    for (const [name, dash, colour] of [["waiting", [3, 3], palette.css.alarm], ["running", [], palette.css.ink]]) {
      context.beginPath();
      context.setLineDash(dash);
      picked.forEach((i, k) => {
        const x = this.x(series.step[i]);
        if (k) context.lineTo(x, y(series[name][picked[k - 1]]));
        context.lineTo(x, y(series[name][i]));
      });
      Object.assign(context, { strokeStyle: colour, lineWidth: 1.75 });
      context.stroke();
    }
    Object.assign(context, { fillStyle: palette.css.soft, textAlign: "right" });
    context.setLineDash([]);
    context.fillText(most, LEFT - 8, LINES_TOP);
    context.fillText("0", LEFT - 8, LINES_TOP + LINES_HEIGHT);
  }

  #ticks(context, series, counts, colour, lane) {
    const top = LANES_TOP + lane * LANE + 2;
    context.fillStyle = colour;
    for (let i = 0, last = -1; i < counts.length; i++) {
      const x = Math.round(this.x(series.step[i]));
      if (counts[i] && x !== last) context.fillRect(last = x, top, 2, LANE - 4);
    }
  }

  #cursor(context, step, colour, width, handle) {
    const x = Math.round(this.x(step));
    context.fillStyle = colour;
    context.fillRect(x - width / 2, 2, width, TIME_HEIGHT - 20);
    if (!handle) return;
    context.beginPath();
    context.roundRect(x - 6, 0, 12, 9, 3);
    context.fill();
  }
}

function hatchOf(context, palette) {
  const tile = make("canvas", { width: 6, height: 6 }), draw = tile.getContext("2d");
  Object.assign(draw, { strokeStyle: palette.css.idle, lineWidth: 1.5 });
  draw.beginPath();
  for (const shift of [-6, 0, 6]) {
    draw.moveTo(shift, 6);
    draw.lineTo(shift + 6, 0);
  }
  draw.stroke();
  return context.createPattern(tile, "repeat");
}

// What the tour can tell, by key: a title, and words made of the event's arguments.
const STOPS = {
  admit: ["A sequence is admitted", (s) => `Sequence #${s} begins to run: there were enough blocks for its next `
    + "tokens. It gets blocks as it grows, not its longest length at once."],
  share: ["A beginning is shared", (s, row, cached) => `${cached} prompt tokens of #${s} were computed before. It `
    + "names the same physical blocks instead of computing them again; the corner marks blocks with several users."],
  prefill: ["A prompt is read in chunks", (s, start, n, prompt) => `#${s} computes ${n} of its ${prompt} prompt tokens `
    + "in this step; the rest follows, so that others do not wait for a long prompt."],
  decode: ["Decoding fills a tail", (s) => `#${s} computes one token per step. It goes into the free slots of its last `
    + "block; a new block is taken only when that one is full."],
  copy: ["A fork copies one block", (from, to) => "Two samples share all their blocks. Before one of them writes, "
    + `block ${from} is copied to block ${to}: only the partly filled last block, nothing else.`],
  evict: ["An old block is evicted", (block) => `Block ${block} was used by nobody but still findable. The pool needs `
    + "room, and the block that was used longest ago is forgotten first."],
  preempt: ["A sequence is preempted", (s) => `No block was left, so #${s} gives all of its blocks back and waits. `
    + "Nothing of its answer is lost."],
  resume: ["It comes back", (s, row, cached) => `Sequence #${s} runs again. Its tokens were never lost: only their `
    + `keys and values are computed again, and ${cached} of them were still in the prefix cache.`],
};

/** Stops of the tour found in a recording, in order of time: {step, title, text, block, sequence}; -1 is none. */
function tourStops(events) {
  const found = new Map(), prompts = new Map(), preempted = new Set();
  const grew = new Set(); // what got a block for the step that is planned
  const stop = (key, { step, args }, block = -1, sequence = args[0]) => {
    const [title, words] = STOPS[key];
    if (!found.has(key)) found.set(key, { step, title, text: words(...args, prompts.get(args[0])), block, sequence });
  };
  for (const event of events) {
    const { name, args: [a, b, c] } = event;
    if (name === "table") grew.add(a);
    else if (name === "queue") prompts.set(a, b);
    else if (name === "copy") stop("copy", event, b, -1);
    else if (name === "evict") stop("evict", event, a, -1);
    else if (name === "preempt") {
      preempted.add(a);
      stop("preempt", event);
    } else if (name === "admit") {
      if (preempted.delete(a)) stop("resume", event);
      stop("admit", event);
      if (c > 0) stop("share", event);
    } else if (name === "schedule") {
      const grown = grew.delete(a);
      if (c > 1 && b + c < prompts.get(a)) stop("prefill", event);
      if (c === 1 && !grown) stop("decode", event);
    }
  }
  return [...found.values()].sort((x, y) => x.step - y.step);
}

/** The tour: one stop after the other, with the step it tells of in sight. */
class Tour {
  constructor(seek, changed) {
    Object.assign(this, { seek, changed, stops: [], index: -1, title: make("strong"),
      text: make("p", { "aria-live": "polite" }) });
    this.back = button("previous stop", "Back");
    this.next = button("next stop", "Next");
    const close = button("close the tour", "Close");
    this.node = make("div", { class: "ekv-tour", role: "region", "aria-label": "Guided tour", hidden: "" }, this.title,
      this.text, make("div", { class: "ekv-row" }, this.back, this.next, close));
    this.back.addEventListener("click", () => this.go(this.index - 1));
    this.next.addEventListener("click", () => this.go(this.index + 1));
    close.addEventListener("click", () => this.close());
  }

  get open() { return !this.node.hidden; }

  toggle(player) {
    if (this.open) return this.close();
    this.stops = tourStops(player.events(player.first, player.last));
    this.node.hidden = false;
    this.go(0);
  }

  close() {
    this.node.hidden = true;
    this.changed();
  }

  go(index) {
    const stop = this.stops[this.index = index];
    this.title.textContent = stop ? `${index + 1} of ${this.stops.length} · ${stop.title} · step ${count(stop.step)}`
      : "Nothing to show yet";
    this.text.textContent = stop?.text
      ?? "The tour is made of what happened in this recording. Run something, then open it again.";
    this.back.disabled = index <= 0;
    this.next.disabled = index >= this.stops.length - 1;
    if (stop) this.seek(stop.step);
    this.changed();
  }

  /** The stop that tells of this step, while the tour is open. */
  at(step) { return this.open && this.stops[this.index]?.step === step ? this.stops[this.index] : null; }
}
