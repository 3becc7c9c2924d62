// The live view of the KV cache: messages in, pictures out, controls and keys.
// Owns the life cycle: one Session (and one Player) per model, any number of views of it, each with its own elements,
// listeners and observers. Knows nothing of notebooks beyond the model it is handed. Invariant: at most one drawing per
// animation frame, of the newest state, and none while nobody can see it.

const MARKED = new Set(["allocate", "evict", "copy"]);
const CALM = "(prefers-reduced-motion: reduce)";
const MEDIA = ["(prefers-color-scheme: dark)", "(forced-colors: active)", CALM];
const ACK_EVERY = 2000, SYNC_EVERY = 1000, DESCRIBE_EVERY = 5000; // ms

const NOTICES = { newer: "This recording was made by a newer embedllm than the one that draws it.",
  bad: "A message of the recording could not be read and was left out." };

const sessions = new Set();

/** What all views of one model share: the player, what Python answered, and who is to be told of news. */
class Session {
  constructor(model) {
    Object.assign(this, { model, player: new Player(), views: new Set(), stats: null, texts: new Map(), queued: 0,
      answer: "", notice: "", version: 0, synced: 0, acked: 0, started: false, behind: false });
    const begin = () => { if (!this.started || this.behind) this.#push(model.get("keyframe")); this.tell(); };
    this.hears = { "msg:custom": (message, buffers) => this.#receive(message, buffers ?? []), "change:keyframe": begin,
      "change:info": () => this.tell(), "change:closed": () => this.tell() };
    for (const [name, does] of Object.entries(this.hears)) model.on(name, does);
    begin();
    if (!this.started) this.sync();
    sessions.add(this);
  }

  get static() { return Boolean(this.model.get("static")); }
  get closed() { return Boolean(this.model.get("closed")); }
  get ended() { return this.closed || this.static; }

  close() {
    for (const [name, does] of Object.entries(this.hears)) this.model.off(name, does);
    sessions.delete(this);
  }

  send(content) { if (!this.static) this.model.send(content); }

  ask(content) {
    this.queued++;
    this.send(content);
    this.tell();
  }

  /** The text that Python told of a block, as long as the block did not change hands since. */
  textOf(block, state) {
    const told = this.texts.get(block);
    return told && told.since === state.since[block] ? told.text : undefined;
  }

  sync() {
    const now = performance.now();
    if (this.synced && now - this.synced < SYNC_EVERY) return;
    this.synced = now;
    this.send({ t: "sync" });
  }

  tell() { for (const view of this.views) view.invalidate(); }

  #push(buffer) {
    if (!buffer?.byteLength) return;
    const answer = this.player.push(buffer);
    if (answer === "ok") {
      Object.assign(this, { started: true, behind: false, notice: "", version: this.version + 1 });
      this.number = new DataView(buffer.buffer ?? buffer, buffer.byteOffset ?? 0).getUint32(12, true);
    } else if (answer === "gap") {
      this.behind = true;
      this.sync();
    } else this.notice = NOTICES[answer];
  }

  #receive(message, buffers) {
    if (message?.t === "b") {
      for (const buffer of buffers) this.#push(buffer);
      this.#acknowledge();
    } else if (message?.t === "stats") this.stats = message;
    else if (message?.t === "done") this.#answered(message.of ?? {}, message.error);
    else if (message?.t === "text") {
      this.texts.set(message.block, { text: String(message.text), since: this.player.newest?.since[message.block] });
    }
    this.tell();
  }

  #answered(of, error) {
    if (of.t !== "text") this.queued = Math.max(0, this.queued - 1);
    if (of.t === "engine" && !error) this.answer = of.do === "resume" ? "" : "the engine is paused";
    else this.answer = error ? String(error) : "";
  }

  // Only for what somebody sees: without it the engine's side slows down by itself.
  #acknowledge() {
    const now = performance.now(), seen = [...this.views].some((view) => view.visible);
    if (this.number === undefined || !seen || this.acked && now - this.acked < ACK_EVERY) return;
    this.acked = now;
    this.send({ t: "ack", n: this.number });
  }

  /** Columns of all recorded steps, made again only when something was recorded. */
  get series() {
    if (this.seriesOf !== this.version) Object.assign(this, { seriesOf: this.version, columns: this.player.series() });
    return this.columns;
  }
}

// A host may hand out a new proxy of the same model each time; the proxies read the same `info` object.
function sessionOf(model) {
  const info = model.get("info");
  return [...sessions].find((session) => session.model === model || info && session.model.get("info") === info);
}

/** One view: its elements, what is pointed at and chosen, and when it is drawn. */
class View {
  constructor(session, el) {
    Object.assign(this, { session, player: session.player, replay: new Replay(session.player), mode: "state",
      cursor: -1, locked: -1, hover: -1, hoverSequence: -1, keyboard: false, // blocks, -1: none
      visible: false, frame: 0, frames: 0, described: 0, abort: new AbortController() });
    this.#build();
    this.#assemble();
    this.#listen();
    el.append(this.root);
    const redraw = () => this.invalidate();
    const resized = new ResizeObserver(redraw), themed = new MutationObserver(redraw);
    const seen = new IntersectionObserver((entries) => {
      this.visible = entries.at(-1).isIntersecting;
      redraw();
    });
    resized.observe(this.root);
    seen.observe(this.root);
    themed.observe(document.body, { attributes: true });
    this.observers = [resized, themed, seen];
    session.views.add(this);
  }

  destroy() {
    this.session.views.delete(this);
    this.abort.abort();
    for (const observer of this.observers) observer.disconnect();
    cancelAnimationFrame(this.frame);
    this.root.remove();
  }

  // ---- elements ----

  #build() {
    const { session } = this, seek = (step) => this.seek(step), redraw = () => this.invalidate();
    const kernel = (does) => session.static ? null : does; // what only a kernel can answer
    this.controls = new Controls({
      back: () => this.step(-1), play: () => this.togglePlay(), forward: () => this.step(1), live: () => this.goLive(),
      speed: (speed) => { this.replay.speed = speed; }, mode: (index) => this.setMode(index),
      tour: () => this.tour.toggle(this.player), contiguous: () => this.toggle(this.contiguous),
      help: () => this.toggle(this.help),
    });
    this.figures = new Figures();
    this.grid = new PoolGrid();
    this.tables = new BlockTables(kernel((id) => session.ask({ t: "cancel", sequence: id })));
    this.timeline = new Timeline(seek, redraw);
    this.events = new EventList(seek, redraw);
    this.contiguous = new Contiguous();
    this.card = new Card(kernel((block) => session.send({ t: "text", block })), () => this.lock(-1));
    this.tour = new Tour(seek, redraw);
    this.engine = kernel(new EngineControls((what) => session.ask({ t: "engine", do: what }), session.model));
    this.help = { node: helpBox() };
    this.notice = make("p", { class: "ekv-note", role: "status", hidden: "" });
    this.probe = make("span", { class: "ekv-unseen", style: "forced-color-adjust:none", "aria-hidden": "true" });
    this.description = make("span", { class: "ekv-unseen", id: `ekv-${Math.random().toString(36).slice(2)}` });
    this.grid.canvas.setAttribute("aria-describedby", this.description.id);
  }

  #assemble() {
    const { controls, grid, tables, timeline, events } = this, gap = () => make("span", { class: "ekv-grow" });
    const panel = (title, extra, ...parts) => make("section", { class: "ekv-panel" },
      make("div", { class: "ekv-head" }, make("h4", {}, title), ...extra), ...parts);
    const explained = make("span", {}, "logical blocks, left to right; prompt + generated / at most");
    this.body = make("div", {}, this.figures.node,
      make("div", { class: "ekv-main" },
        panel("Pool of blocks", [grid.says, gap(), controls.colours], grid.node, grid.legend),
        panel("Block tables", [explained], tables.node)),
      panel("Timeline", [timeline.legend, gap(), timeline.says], timeline.node), this.contiguous.node,
      panel("Events", [events.kind, events.search, events.total], events.node), this.card.node);
    this.root = make("div", { class: "ekv", role: "group", "aria-label": "KV cache", tabindex: "-1",
      "data-lm-suppress-shortcuts": "true", "data-step": "-1", "data-frames": "0" }, make("style", {}, STYLE),
    this.probe, this.description, controls.node, this.notice, this.tour.node, this.body, this.engine?.node ?? "", this.help.node);
    this.root.moment = () => this.player.state;
  }

  // ---- listeners ----

  #listen() {
    const { signal } = this.abort, { canvas } = this.grid, redraw = () => this.invalidate();
    const on = (target, names, does) => {
      for (const name of names.split(" ")) target.addEventListener(name, does, { signal });
    };
    on(canvas, "pointermove", (event) => this.#point(this.grid.blockAt(event.offsetX, event.offsetY)));
    on(canvas, "click", (event) => this.lock(this.grid.blockAt(event.offsetX, event.offsetY)));
    on(canvas, "focus blur", () => this.#set({ keyboard: canvas.matches(":focus-visible") }));
    on(this.tables.node, "pointermove", (event) => {
      const at = this.tables.under(event);
      this.#point(at?.block ?? -1, at && at.block < 0 ? at.sequence : -1);
    });
    on(this.tables.node, "click", (event) => {
      const at = this.tables.under(event);
      if (at?.block >= 0) this.lock(at.block);
    });
    for (const node of [canvas, this.tables.node]) on(node, "pointerleave", () => this.#point(-1));
    for (const node of [this.tables.node, this.events.node]) on(node, "scroll", redraw);
    on(this.root, "keydown", (event) => this.#key(event));
    on(this.root, "focusin", redraw);
    on(document, "visibilitychange", redraw);
    for (const query of MEDIA) on(matchMedia(query), "change", redraw);
  }

  #point(block, sequence = -1) {
    if (block === this.hover && sequence === this.hoverSequence) return;
    this.#set({ hover: block, hoverSequence: sequence });
  }

  #set(values) {
    Object.assign(this, values);
    this.invalidate();
  }

  // Keys with a modifier belong to the browser and the notebook, plain ones stay in the view.
  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    const { target, key } = event, typing = target.matches("input, select");
    if (key === "Tab" || typing && key !== "Escape") return;
    const action = this.#actionOf(key, target, event.shiftKey ? 10 : 1);
    if (!action || !this.session.started && key !== "Escape" && key !== "?") return;
    event.preventDefault();
    action();
  }

  #actionOf(key, target, far) {
    const { grid, events, player } = this, upward = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (target === grid.canvas) {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.columns, ArrowDown: grid.columns }[key];
      if (by) return () => this.moveCursor(by);
      if (key === "Enter") return () => this.lock(this.cursor);
    }
    if (upward && events.node.contains(target)) return () => events.move(upward);
    if (key >= "1" && key <= String(MODES.length)) return () => this.setMode(Number(key) - 1);
    if (key === " " && target.matches("button")) return null; // it presses the button
    return {
      " ": () => this.togglePlay(), ArrowLeft: () => this.step(-far), ArrowRight: () => this.step(far),
      Home: () => this.seek(player.first), End: () => this.goLive(), "[": () => this.nextEvent(-1),
      "]": () => this.nextEvent(1), Escape: () => this.escape(), "?": () => this.toggle(this.help),
    }[key];
  }

  // ---- what controls and keys do ----

  seek(step) {
    this.#move(() => this.player.seek(Math.max(this.player.first, Math.min(this.player.last, step))));
  }

  step(by) {
    if (Math.abs(by) > 1) this.seek(this.player.state.step + by);
    else this.#move(() => by < 0 ? this.player.back() : this.player.forward());
  }

  goLive() { this.#move(() => this.player.goLive()); }

  #move(how) {
    this.replay.playing = false;
    how();
    this.session.tell();
  }

  togglePlay() {
    this.replay.toggle(this.session.ended);
    this.session.tell();
  }

  toggle({ node }) {
    node.hidden = !node.hidden;
    this.invalidate();
  }

  escape() {
    if (!this.help.node.hidden) this.toggle(this.help);
    else if (this.locked >= 0) this.lock(-1);
    else this.tour.close();
  }

  setMode(index) { this.#set({ mode: MODES[index] }); }

  lock(block) { this.#set({ locked: block === this.locked ? -1 : block }); }

  moveCursor(by) {
    const next = this.cursor < 0 ? 0 : this.cursor + by, exists = next >= 0 && next < this.player.state.numBlocks;
    this.#set({ keyboard: true, cursor: exists ? next : this.cursor });
  }

  nextEvent(direction) {
    this.events.update(this.player, this.session.version);
    const { rows } = this.events, now = this.player.state.step;
    const row = direction > 0 ? rows.find((event) => event.step > now) : rows.findLast((event) => event.step < now);
    if (row) this.seek(row.step);
  }

  // ---- drawing ----

  invalidate() {
    if (this.frame || !this.visible || document.hidden) return;
    this.frame = requestAnimationFrame((now) => {
      this.frame = 0;
      if (this.visible && !document.hidden) this.draw(now);
    });
  }

  draw(now) {
    const { player, replay, session, grid, timeline } = this, began = performance.now();
    if (replay.playing) replay.advance(now, session.series, session.ended);
    this.#drawControls();
    if (!session.started) return;
    const { state } = player, { series } = session, width = grid.node.clientWidth, wide = timeline.node.clientWidth;
    for (const name of ["cursor", "locked", "hover"]) if (this[name] >= state.numBlocks) this[name] = -1;
    const palette = this.#theme(), lit = this.#lit(state), painting = performance.now();
    grid.draw(state, this.mode, palette, width);
    this.root.dataset.poolMs = performance.now() - painting;
    grid.drawOver(palette, lit, this.keyboard ? this.cursor : -1, this.locked, this.#signs(state));
    this.tables.draw(state, grid.marks, palette, lit);
    timeline.draw(series, state, player.first, player.last, palette, wide);
    if (!this.contiguous.node.hidden) this.contiguous.draw(state, palette, wide);
    this.figures.draw(player, series, session.stats, now);
    this.events.update(player, session.version);
    this.events.draw(state.step);
    this.#drawCard(state);
    this.#describe(state, now);
    Object.assign(this.root.dataset, { step: state.step, frames: ++this.frames, drawMs: performance.now() - began });
    if (replay.playing) this.invalidate();
  }

  #drawControls() {
    const { session, root } = this, { model } = session.model.get("info") ?? {};
    const open = { tour: this.tour.open, contiguous: !this.contiguous.node.hidden, help: !this.help.node.hidden };
    this.controls.draw(session, this.replay, this.mode, open);
    this.engine?.draw(session.queued, session.answer);
    root.setAttribute("aria-label", `KV cache${model ? ` of ${model}` : ""}`);
    root.dataset.closed = session.closed ? "1" : "0";
    this.notice.hidden = !session.notice;
    say(this.notice, session.notice);
    this.body.hidden = !session.started;
  }

  // The colours of now; what explains them is made again where they or their meaning changed.
  #theme() {
    const same = this.palette?.key === Palette.keyOf(this.root);
    if (!same) this.timeline.explain(this.palette = new Palette(this.root, this.probe));
    if (!same || this.explained !== this.mode) this.grid.explain(this.explained = this.mode, this.palette);
    return this.palette;
  }

  // Blocks to light: the one pointed at, all of the sequence pointed at or told of in the tour, or the locked one.
  #lit(state) {
    if (this.hover >= 0) return new Set([this.hover]);
    const told = this.tour.at(state.step), sequence = this.hoverSequence >= 0 ? this.hoverSequence : told?.sequence;
    const blocks = state.seqs.get(sequence)?.blocks ?? [this.locked, told?.block ?? -1];
    return new Set(blocks.filter((block) => block >= 0 && block < state.numBlocks));
  }

  // Signs on what changed in the step shown. Live they would flicker, so not where motion is unwelcome.
  #signs({ step }) {
    if (this.player.live && matchMedia(CALM).matches) return [];
    const changes = this.player.events(step, step).filter((event) => MARKED.has(event.name));
    return changes.map(({ name, args }) => [name, args[0], args[1]]);
  }

  #drawCard(state) {
    const block = [this.hover, this.locked, this.keyboard ? this.cursor : -1].find((one) => one >= 0) ?? -1;
    this.card.node.setAttribute("aria-live", this.keyboard ? "polite" : "off");
    this.card.draw(state, block, block === this.locked, this.session.textOf(block, state));
    if (block >= 0) this.card.place(this.grid.rect(block), this.grid.canvas, this.root);
  }

  #describe(state, now) {
    if (!this.root.contains(document.activeElement)) return;
    if (this.described && now - this.described < DESCRIBE_EVERY) return;
    this.described = now;
    this.description.textContent = sentenceOf(state.step, this.figures.numbers);
  }
}

function initialize({ model }) {
  const session = new Session(model);
  return () => session.close();
}

function render({ model, el }) {
  const known = sessionOf(model), session = known ?? new Session(model), view = new View(session, el);
  return () => {
    view.destroy();
    if (!known && !session.views.size) session.close();
  };
}

export default { initialize, render };
