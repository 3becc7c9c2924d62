// The parts made of words and numbers: controls, figures, one block's card, paged beside contiguous.
// Knows a state, a player and columns of the recorded steps; no messages, no keys. Invariant: every number shown comes
// from the recorded run, and every string from outside becomes a text node.

const RATE_EVERY = 250; // ms between two rates shown

/** [label, vLLM's name and meaning, value(tools) -> [large, small]] of every figure above the pictures. */
const FIGURES = [
  ["KV cache in use", "kv_cache_usage: share of the blocks that somebody uses",
    (t) => [percent(t.used / t.total), `${count(t.used)} of ${count(t.total)}`]],
  ["Cached, evictable", "num_kv_blocks_cached: blocks nobody uses whose content can still be found",
    (t) => [count(t.idle), "blocks"]],
  ["Free", "blocks without content", (t) => [count(t.free), "blocks"]],
  ["Prefix hit rate", "prefix_cache_hits / prefix_cache_queries: prompt tokens found in the cache",
    (t) => [percent(t.hits / t.queries), `of ${count(t.queries)}`]],
  ["Internal waste", "kv_cache_waste: share of the slots in use that hold no token", (t) => [percent(t.waste), ""]],
  ["Preemptions", "num_preemptions: times blocks were taken back from a running sequence",
    (t) => [count(t.preemptions), ""]],
  ["Running", "num_requests_running", (t) => [count(t.running), ""]],
  ["Waiting", "num_requests_waiting", (t) => [count(t.waiting), t.parked ? `+ ${t.parked} parked` : ""]],
  ["Prefill", "prompt_tokens per second of the last 2 s, recomputed ones included", (t) => [count(t.prefill), "tok/s"]],
  ["Decode", "generation_tokens per second of the last 2 s", (t) => [count(t.decode), "tok/s"]],
  ["TTFT p50 / p99", "time_to_first_token: the latest figures, not those of the step shown",
    (t) => [seconds(t.stats?.time_to_first_token?.p50), `/ ${seconds(t.stats?.time_to_first_token?.p99)}`]],
  ["Queue p50 / p99", "queue_time: the latest figures, not those of the step shown",
    (t) => [seconds(t.stats?.queue_time?.p50), `/ ${seconds(t.stats?.queue_time?.p99)}`]],
];

class Figures {
  constructor() {
    this.values = FIGURES.map(() => [make("span"), make("small")]);
    const figure = ([label, title], i) => make("div", { class: "ekv-figure", title }, make("dt", {}, label),
      make("dd", {}, this.values[i][0], " ", this.values[i][1]));
    this.node = make("dl", { class: "ekv-figures" }, ...FIGURES.map(figure));
  }

  draw(player, series, stats, now) {
    const { state } = player;
    if (!this.rates || this.step !== state.step && !(player.live && now - this.at < RATE_EVERY)) {
      Object.assign(this, { rates: ratesOf(player, series, state.step), step: state.step, at: now });
    }
    const numbers = this.numbers = numbersOf(state, this.rates, stats);
    FIGURES.forEach(([, , value], i) => value(numbers).forEach((text, k) => say(this.values[i][k], text)));
  }
}

/** The moment shown in one sentence, for those who do not see the pictures. */
const sentenceOf = (step, { used, total, idle, free, running, waiting }) => `Step ${step}: ${used} of ${total} blocks `
  + `in use, ${idle} cached and evictable, ${free} free; ${running} sequences running, ${waiting} waiting.`;

/** The numbers of the moment shown; rates of the two seconds before it. */
function numbersOf(state, rates, stats) {
  const { numBlocks: total, used, idle, free } = state;
  const numbers = { total, used, idle, free, running: 0, waiting: 0, parked: 0, waste: state.waste().paged, stats,
    ...state.totals, ...rates };
  for (const sequence of state.seqs.values()) numbers[STATES[sequence.state]]++;
  return numbers;
}

/** Tokens per second up to `step`: {prefill, decode}. A token computed without giving a new one counts as prefill. */
function ratesOf(player, series, step) {
  let to = series.step.length - 1;
  while (to > 0 && series.step[to] > step) to--;
  let from = to;
  while (from > 0 && series.time[to] - series.time[from - 1] <= 2e6) from--;
  const span = (series.time[to] - series.time[from]) / 1e6;
  if (!(span > 0)) return { prefill: NaN, decode: NaN };
  let scheduled = 0, fresh = 0;
  for (const { name, args } of player.events(series.step[from] + 1, series.step[to])) {
    if (name === "schedule") scheduled += args[2];
    else if (name === "commit") fresh += args[2];
  }
  return { prefill: Math.max(0, scheduled - fresh) / span, decode: fresh / span };
}

/** The same sequences twice: in blocks as they ran, and as if each had reserved its longest length in one piece. */
class Contiguous {
  constructor() {
    this.canvas = make("canvas", { role: "img", "aria-label": "Paged beside contiguous" });
    this.words = make("p", { class: "ekv-legend" });
    const explained = "the sequences of this moment: in blocks, and in one reservation each, as long as it may become";
    const title = make("h4", {}, "If it were contiguous");
    const head = make("div", { class: "ekv-head" }, title, make("span", {}, explained));
    this.node = make("section", { class: "ekv-panel", hidden: "" }, head, this.canvas, this.words);
  }

  draw(state, palette, width) {
    const rows = orderOf(state).filter((sequence) => sequence.blocks.length), high = rows.length > 24 ? 8 : 14;
    // paged, contiguous
    const lengthsOf = (row) => [row.blocks.length * state.blockSize, row.numPrompt + row.maxTokens];
    const most = Math.max(1, ...rows.flatMap(lengthsOf)), { paged, contiguous } = state.waste();
    const half = (width - 24) / 2, names = 44, scale = (half - names) / most;
    const context = fit(this.canvas, width, 24 + Math.max(1, rows.length) * (high + 3));
    Object.assign(context, { font: SMALL, textBaseline: "middle", textAlign: "left", fillStyle: palette.css.soft });
    const empties = `${percent(paged)} and ${percent(contiguous.max)}`;
    this.canvas.setAttribute("aria-label", `Paged beside contiguous: ${empties} of the slots hold no token`);
    context.fillText(`paged, as it ran: ${percent(paged)} of the slots hold no token`, names, 8);
    context.fillText(`contiguous: ${percent(contiguous.max)} would hold no token`, half + 24 + names, 8);
    const empty = hatchOf(context, palette);
    rows.forEach((row, i) => {
      const y = 22 + i * (high + 3);
      lengthsOf(row).forEach((length, side) => {
        const left = side * (half + 24) + names;
        Object.assign(context, { fillStyle: palette.css.soft, textAlign: "right" });
        if (high > 10) context.fillText(`#${row.id}`, left - 8, y + high / 2 + 0.5);
        context.fillStyle = empty;
        context.fillRect(left, y, length * scale, high);
        context.fillStyle = palette.css.used;
        context.fillRect(left, y, Math.min(row.numComputed, length) * scale, high);
        Object.assign(context, { strokeStyle: palette.css.soft, lineWidth: 1 });
        context.strokeRect(left + 0.5, y + 0.5, Math.max(1, length * scale - 1), high - 1);
      });
    });
    const reserved = rows.reduce((sum, row) => sum + Math.ceil((row.numPrompt + row.maxTokens) / state.blockSize), 0);
    const held = rows.reduce((sum, row) => sum + row.blocks.length, 0), more = reserved > state.numBlocks;
    say(this.words, `Filled: tokens. Hatched: memory held for no token. ${rows.length} sequences name ${count(held)} `
      + `blocks; contiguous they would reserve ${count(reserved)} of the pool's ${count(state.numBlocks)}`
      + `${more ? ", more than there are" : ""}, and could share none.`);
  }
}

/** What is known of one block, beside its square; locked, it stays and can ask for the block's text. */
class Card {
  /** ask: called with a block, or null where there is nobody to ask. */
  constructor(ask, unlock) {
    Object.assign(this, { title: make("strong"), rows: make("dl"),
      text: make("pre", { class: "ekv-text", hidden: "" }), block: -1, said: "" });
    const buttons = [button("unlock", "Unlock")];
    buttons[0].addEventListener("click", unlock);
    if (ask) {
      buttons.unshift(button("show the tokens of this block as text", "Show text"));
      buttons[0].classList.add("ekv-kernel");
      buttons[0].addEventListener("click", () => ask(this.block));
    }
    this.buttons = make("div", { class: "ekv-row" }, ...buttons);
    this.node = make("div", { class: "ekv-card", role: "status", "aria-live": "off", hidden: "" }, this.title,
      this.rows, this.text, this.buttons);
  }

  draw(state, block, locked, text) {
    this.node.hidden = block < 0;
    if (block < 0) return;
    this.block = block;
    this.node.dataset.locked = locked ? "1" : "0";
    this.buttons.hidden = !locked;
    this.text.hidden = !locked || text === undefined;
    say(this.text, text ?? "");
    const rows = Card.rowsOf(state, block), said = rows.join("\n") + block;
    if (said === this.said) return;
    this.said = said;
    this.title.textContent = `Block ${block}`;
    this.rows.replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }

  static rowsOf(state, block) {
    const refs = state.refs[block], cached = state.node[block] !== 0;
    const pins = [...state.pins].filter(([, blocks]) => blocks.includes(block)).map(([pin]) => pin);
    const places = state.owners()[block].map((id) => {
      const at = state.seqs.get(id).blocks.indexOf(block);
      return { id, at, fill: state.fill(id, at) };
    });
    const kind = refs > 1 ? "shared" : refs ? "in use" : cached ? "cached, evictable" : "free";
    const owners = places.slice(0, 6).map(({ id, at }) => `#${id} (its ${at})`).join(", ")
      + (places.length > 6 ? ` and ${places.length - 6} more` : "");
    const unowned = refs || cached ? state.blockSize : 0;
    const fill = places.length ? Math.max(...places.map((place) => place.fill)) : unowned;
    return [
      ["state", kind + (pins.length ? `, pinned by ${pins.join(", ")}` : "")],
      ["owners", owners || "none"],
      ["references", String(refs)],
      ["filled", `${fill} of ${state.blockSize} tokens`],
      ["findable", cached ? "yes, in the prefix cache" : "no"],
      ["changed", `in step ${count(state.since[block])}`],
    ];
  }

  /** Beside a square, [x, y, side] of `canvas`, and within `root`. */
  place([x, y, side], canvas, root) {
    const within = root.getBoundingClientRect(), box = canvas.getBoundingClientRect(), wide = this.node.offsetWidth;
    const left = box.left - within.left + x, right = left + side + 10;
    this.node.style.left = `${Math.max(4, right + wide > within.width ? left - wide - 10 : right)}px`;
    this.node.style.top = `${box.top - within.top + y + side + 6}px`;
  }
}

/** What stops the running cell, where the host lets a view do that; null elsewhere. */
function interruptOf(model) {
  try {
    const { kernel } = model.widget_manager;
    return kernel.interrupt ? () => kernel.interrupt() : null;
  } catch {
    return null;
  }
}

/** What reaches the engine itself: apart from the view's controls, and honest about answers that have to wait. */
class EngineControls {
  /** ask: called with "pause", "step" or "resume". */
  constructor(ask, model) {
    const interrupt = interruptOf(model);
    this.status = make("span", { role: "status" });
    const controls = ["pause", "step", "resume"].map((what) => [button(`engine: ${what}`, what), () => ask(what)]);
    if (interrupt) controls.push([button("stop the running cell", "Stop the cell"), interrupt]);
    for (const [node, act] of controls) node.addEventListener("click", act);
    this.node = make("div", { class: "ekv-engine ekv-row ekv-kernel", role: "group", "aria-label": "engine" },
      make("strong", {}, "engine"), ...controls.map(([node]) => node), this.status);
  }

  draw(queued, answer) { say(this.status, queued ? "queued: a cell is running" : answer); }
}

const KEYS = [["Space", "pause or play"], ["← →", "one step (Shift: ten)"], ["Home End", "beginning, newest"],
  ["[ ]", "previous, next event"], ["1 – 5", "colours"], ["arrows in the pool", "move from block to block"],
  ["Enter", "lock the block"], ["Esc", "unlock, close"], ["?", "this help"]];

const helpBox = () => make("div", { class: "ekv-help", role: "dialog", "aria-label": "Keys", hidden: "" },
  make("strong", {}, "Keys"),
  make("dl", {}, ...KEYS.flatMap(([key, does]) => [make("dt", {}, key), make("dd", {}, does)])));

/** The row above everything: which moment is shown, moving through the recording, and what else to open. */
class Controls {
  /** does: what the controls call: back, play, forward, live, tour, contiguous, help; speed(factor) and mode(index). */
  constructor(does) {
    this.badge = make("span", { class: "ekv-badge", "aria-live": "off" });
    this.model = make("span", { class: "ekv-model" });
    this.moves = { back: button("one step back", "◀"), play: button("play", "►"),
      forward: button("one step forward", "▶"), live: button("go to the newest step", "Live") };
    this.toggles = { tour: button("guided tour of this recording", "Tour"),
      contiguous: button("if it were contiguous", "Contiguous"), help: button("help: keys", "?") };
    const named = Object.entries({ ...this.moves, ...this.toggles });
    for (const [name, node] of named) node.addEventListener("click", does[name]);
    const speeds = SPEEDS.map((speed) => make("option", { value: speed }, `${speed}×`));
    this.speed = make("select", { "aria-label": "speed of the replay" }, ...speeds);
    this.speed.value = "1";
    this.speed.addEventListener("change", () => does.speed(Number(this.speed.value)));
    this.modes = MODES.map((mode, i) => button(`colour by ${mode}`, mode, `colour by ${mode} (key ${i + 1})`));
    this.modes.forEach((node, i) => node.addEventListener("click", () => does.mode(i)));
    const group = (label, nodes) =>
      make("span", { class: "ekv-group", role: "group", "aria-label": label }, ...Object.values(nodes));
    this.colours = group("Colours", this.modes);
    this.node = make("div", { class: "ekv-top" }, make("h3", { class: "ekv-title" }, "KV cache"), this.model,
      make("span", { class: "ekv-grow" }), this.badge, group("Moment shown", this.moves), this.speed,
      make("span", { class: "ekv-row" }, ...Object.values(this.toggles)));
  }

  /** open: which of tour, contiguous and help are open. */
  draw(session, replay, mode, open) {
    const { state, live } = session.player, info = session.model.get("info") ?? {}, { play } = this.moves;
    const ended = session.static ? "recorded" : session.closed ? "closed" : "";
    const running = replay.playing || live && !ended;
    const doing = replay.playing ? `replay ${replay.speed}×` : ended || (live ? "live" : "paused");
    say(this.badge, state ? `${doing}, step ${count(state.step)}` : "waiting for the engine");
    this.badge.dataset.live = state && live && !ended ? "1" : "0";
    for (const node of Object.values(this.moves)) node.disabled = !state;
    say(play, running ? "❚❚" : "►");
    play.setAttribute("aria-label", running ? "pause the view" : "play");
    play.title = running ? "pause the view (Space); the engine goes on" : "play the recording (Space)";
    press(this.moves.live, live);
    this.modes.forEach((node, i) => press(node, MODES[i] === mode));
    for (const [name, node] of Object.entries(this.toggles)) press(node, open[name]);
    say(this.model, [info.model, info.device, info.dtype].filter(Boolean).join(" · "));
  }
}
