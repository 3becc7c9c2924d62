// The history of what was received, and the moment of it that is shown.
// Owns the reading of messages (embedllm/wire.py writes them) and what is kept of them. Knows no page and no network.
// Invariant: a message that does not add up changes nothing; after a gap nothing is taken until a keyframe comes.

const MAGIC = 0x31564b45, VERSION = 1, KEYFRAME = 0, EVENTS = 1, HEADER_WORDS = 8, LOST = 1;
const COLUMNS_OF_SERIES = ["step", "time", "running", "waiting", "free", "idle", "used", "shared", "tokens", "preempts", "evicts", "copies"];

/** A table with one row per step, in growing typed arrays. */
class Series {
  constructor() { this.resize(1024, 0); }

  resize(capacity, length) {
    const before = this.columns;
    this.columns = COLUMNS_OF_SERIES.map((name, c) => {
      const column = new (name === "time" ? Float64Array : Int32Array)(capacity);
      if (before) column.set(before[c].subarray(0, length));
      return column;
    });
    Object.assign(this, { capacity, length });
  }

  step(i) { return this.columns[0][i]; }

  /** Index of the last row whose step is at most this, or -1. */
  find(step) {
    let low = 0, high = this.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.columns[0][middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  /** Write the row of a step, which is the last one or a new one after it. */
  write(values) {
    if (!this.length || this.step(this.length - 1) < values[0]) {
      if (this.length === this.capacity) this.resize(2 * this.capacity, this.length);
      this.length++;
    }
    values.forEach((value, c) => { this.columns[c][this.length - 1] = value; });
  }

  /** Drop the rows of the steps after `from` and before `to`. */
  cut(from, to) {
    const first = this.find(from) + 1, last = Math.max(first, this.find(to - 1) + 1);
    for (const column of this.columns) column.copyWithin(first, last, this.length);
    this.length -= last - first;
  }

  get bytes() { return 4 * (COLUMNS_OF_SERIES.length + 1) * this.length; }
}

/** Apply events from word `i` on, until a step after `step` begins; where that is. */
function follow(state, words, i, step) {
  for (let n; i < words.length; i += 1 + n) {
    const op = words[i] & 255;
    n = words[i] >>> 8;
    if (op === OP.step && words[i + 1] > step) break;
    state.apply(op, words, i, n);
  }
  return i;
}

/**
 * What was received, and the moment shown. A step's moment is when the next one begins: all it planned and all that was
 * committed meanwhile. Beyond `maxBytes` or `maxSeconds` the older parts thin out to single moments, and these take a
 * quarter of the bytes at most.
 */
class Player {
  #parts = []; // {base: KVState, words: [Int32Array], bytes}: what followed a moment; one without words was thinned out
  #newest = null;
  #shown = null; // {state, step, part, array, at}: where to go on from; null while the newest moment is shown
  #series = new Series();
  #held = 0; // bytes of all parts
  #numMoments = 0; // the first parts, of which one moment is left
  #momentBytes = 0;
  #number = 0;
  #gap = false;
  #counts = { tokens: 0, preempts: 0, evicts: 0, copies: 0 }; // of the newest step

  /** partBytes: events that are replayed at most to go back to a step, where the pool is small. */
  constructor({ maxBytes = 16 * 2 ** 20, maxSeconds = 600, partBytes = 2 ** 18 } = {}) { Object.assign(this, { maxBytes, maxSeconds, partBytes }); }

  /** The moment shown; null before the first keyframe. */
  get state() { return this.#shown ? this.#shown.state : this.#newest; }
  get newest() { return this.#newest; }
  get live() { return !this.#shown; }
  get first() { return this.#series.length ? this.#series.step(0) : 0; }
  get last() { return this.#series.length ? this.#series.step(this.#series.length - 1) : 0; }
  get bytes() { return this.#held + this.#series.bytes; }

  /** Take a message: "ok"; "gap" if a keyframe is needed first; "newer" or "bad", and nothing changed. */
  push(buffer) {
    const bytes = buffer instanceof ArrayBuffer ? new Uint8Array(buffer) : new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength);
    if (bytes.length < 4 * HEADER_WORDS || bytes.length % 4) return "bad";
    const words = new Int32Array(bytes.slice().buffer), [magic, version, kind, number, numWords, low, high, flags] = words;
    if (magic !== MAGIC || version < 1) return "bad";
    if (version > VERSION) return "newer";
    const body = words.subarray(HEADER_WORDS), content = bytes.subarray(4 * HEADER_WORDS), head = bytes.slice(0, 4 * HEADER_WORDS);
    head.fill(0, 29);
    if (numWords !== body.length || (kind !== KEYFRAME && kind !== EVENTS) || (crc32(content, crc32(head)) ^ flags) & ~255) return "bad";
    return kind === KEYFRAME ? this.#keyframe(body, number, joined(low, high)) : this.#events(body, number, flags & LOST);
  }

  #keyframe(body, number, time) {
    const ahead = (number - this.#number) | 0; // numbers are counted modulo 2^32
    if (this.#newest && (ahead < 0 || (ahead === 0 && !this.#gap))) return this.#gap ? "gap" : "ok"; // older than what is known
    if (!this.#newest || this.#gap || ahead !== 1) {
      const state = KVState.read(body, time);
      if (!state) return "bad";
      if (this.#newest && state.step < this.last) this.#forget(); // steps are counted anew
      this.#newest = state;
      this.#gap = false;
      this.#begin();
      this.#write();
      this.#thin();
    }
    this.#number = number;
    return "ok";
  }

  #events(body, number, lost) {
    if (!this.#newest || this.#gap || lost || number !== ((this.#number + 1) | 0)) {
      this.#gap = true;
      return "gap";
    }
    if (!canFollow(body, this.#newest.numBlocks, new Set(this.#newest.seqs.keys()))) return "bad";
    this.#number = number;
    const state = this.#newest;
    let from = 0;
    for (let i = 0, n; i < body.length; i += 1 + n) {
      const op = body[i] & 255;
      n = body[i] >>> 8;
      if (op === OP.step) {
        this.#write();
        const part = this.#parts.at(-1);
        if (part.bytes + 4 * (i - from) > Math.max(this.partBytes, part.base.bytes)) {
          this.#keep(body.subarray(from, i));
          this.#begin();
          from = i;
        }
        this.#counts = { tokens: body[i + 3], preempts: 0, evicts: 0, copies: 0 };
      } else if (op === OP.preempt) this.#counts.preempts++;
      else if (op === OP.evict) this.#counts.evicts++;
      else if (op === OP.copy) this.#counts.copies++;
      state.apply(op, body, i, n);
    }
    this.#keep(body.subarray(from));
    this.#write();
    this.#thin();
    this.#gap = state.ended;
    return "ok";
  }

  // A part's words own their buffer, so that dropping them gives it back.
  #keep(words) {
    const part = this.#parts.at(-1);
    part.words.push(words.slice());
    part.bytes += 4 * words.length;
    this.#held += 4 * words.length;
  }

  #begin() {
    this.#parts.push({ base: this.#newest.clone(), words: [], bytes: 0 });
    this.#held += this.#newest.bytes;
  }

  #write() {
    const state = this.#newest, { tokens, preempts, evicts, copies } = this.#counts;
    let running = 0, waiting = 0;
    for (const sequence of state.seqs.values()) {
      running += sequence.state === RUNNING;
      waiting += sequence.state === WAITING;
    }
    this.#series.write([state.step, state.time, running, waiting, state.free, state.idle, state.used, state.shared, tokens, preempts, evicts, copies]);
  }

  #thin() {
    const parts = this.#parts, oldest = this.#newest.time - 1e6 * this.maxSeconds;
    for (;;) {
      const full = parts.length - this.#numMoments, tooMuch = this.bytes > this.maxBytes, part = parts[this.#numMoments];
      if (tooMuch && this.#numMoments && (full === 1 || 4 * this.#momentBytes > this.maxBytes)) {
        this.#held -= parts[0].base.bytes;
        this.#momentBytes -= parts[0].base.bytes;
        this.#numMoments--;
        parts.shift();
        this.#series.cut(-1, parts[0].base.step);
      } else if (full > 1 && (tooMuch || parts[this.#numMoments + 1].base.time < oldest)) this.#toMoment(part, parts[this.#numMoments + 1].base.step);
      else return;
    }
  }

  /** Leave of a part only the moment of its first step. */
  #toMoment(part, next) {
    const { base } = part;
    this.#held -= part.bytes + base.bytes;
    for (const words of part.words) if (follow(base, words, 0, base.step) < words.length) break;
    Object.assign(part, { words: [], bytes: 0 });
    this.#held += base.bytes;
    this.#momentBytes += base.bytes;
    this.#numMoments++;
    this.#series.cut(base.step, next);
    if (this.#shown?.part === part) this.#shown.part = null; // it stays in sight; nothing goes on from it
  }

  #forget() {
    this.#parts = [];
    this.#held = this.#numMoments = this.#momentBytes = 0;
    this.#series = new Series();
    this.#shown = null;
  }

  goLive() { this.#shown = null; }

  back() { this.#go(this.#series.find(this.state.step) - 1); }
  forward() { this.#go(this.#series.find(this.state.step) + 1); }

  /** Show the moment of a step, or of the last one before it that is kept. */
  seek(step) { this.#go(this.#series.find(step)); }

  #go(row) {
    if (!this.#series.length) return;
    const step = this.#series.step(Math.max(0, Math.min(this.#series.length - 1, row)));
    const part = this.#parts.findLast((each) => each.base.step <= step) ?? this.#parts[0];
    let at = this.#shown;
    if (!at || at.part !== part || at.state.step > step) at = { state: part.base.clone(), part, array: 0, i: 0 };
    this.#shown = at;
    for (; at.array < part.words.length; at.array++, at.i = 0) {
      at.i = follow(at.state, part.words[at.array], at.i, step);
      if (at.i < part.words[at.array].length) return;
    }
  }

  /** What happened in these steps, as far as it is kept: {step, op, args, name}; arguments as Python's events have them. */
  events(from, to) {
    const found = [];
    this.#parts.forEach(({ base, words: arrays }, p) => {
      let step = base.step;
      if (step > to || this.#parts[p + 1]?.base.step < from) return;
      for (const words of arrays) {
        for (let i = 0, n; i < words.length; i += 1 + n) {
          const op = words[i] & 255, name = OPS[op - 1][0];
          n = words[i] >>> 8;
          if (op === OP.step) step = words[i + 1];
          if (step < from || step > to) continue;
          const args = Array.from(words.subarray(i + 1, i + 1 + n));
          if (op === OP.step) args.splice(3, 2, joined(args[3], args[4]));
          else if (op === OP.finish) args[1] = REASONS[args[1]];
          found.push({ step, op, args, name });
        }
      }
    });
    return found;
  }

  /** Per step that one can go to, as columns; times in microseconds. Valid until the next message. */
  series() {
    return Object.fromEntries(COLUMNS_OF_SERIES.map((name, c) => [name, this.#series.columns[c].subarray(0, this.#series.length)]));
  }
}
