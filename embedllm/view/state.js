// The engine's blocks and sequences at one moment, followed from event to event.
// Owns the codes of the wire and what each event changes; embedllm/wire.py and replay.py are the same in Python. Knows no
// page and no messages. Invariant: given every event since a keyframe, digest() equals State.digest() of the engine.

const MAX_BLOCKS = 2 ** 24; // believed of a message
// Names in the order of their codes, from 1, and how many arguments each has; -1: one and any number of blocks.
const OPS = [["step", 5], ["queue", 3], ["admit", 3], ["schedule", 3], ["commit", 3], ["preempt", 1], ["fork", 2], ["table", -1],
  ["trim", 2], ["park", 1], ["finish", 2], ["allocate", 1], ["share", 2], ["release", 2], ["free", 1], ["cache", 2],
  ["evict", 2], ["idle", 1], ["pin", -1], ["unpin", 1], ["copy", 2], ["resize", 1], ["start_over", 0]];
const OP = Object.fromEntries(OPS.map(([name], i) => [name, i + 1]));
const REASONS = ["stop", "length", "tool_calls", "cancelled", "error"];
const WAITING = 0, RUNNING = 1, PARKED = 2;
const OF_BLOCKS = new Set([OP.allocate, OP.share, OP.release, OP.free, OP.cache, OP.evict, OP.idle]);
const OF_SEQUENCES = new Set([OP.admit, OP.schedule, OP.commit, OP.preempt, OP.fork, OP.table, OP.trim, OP.park]);
const CRC_TABLE = Int32Array.from({ length: 256 }, (_, i) => {
  for (let bit = 0; bit < 8; bit++) i = i & 1 ? 0xedb88320 ^ (i >>> 1) : i >>> 1;
  return i;
});

function crc32(bytes, before = 0) {
  let crc = ~before;
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

const joined = (low, high) => (low >>> 0) + high * 2 ** 32;
const leave = (sequence, state) => Object.assign(sequence, { state, numComputed: 0, blocks: [] });

/** One moment. refs, node, since: an int32 per block; seqs: by id; pins: blocks by id; time: microseconds. */
class KVState {
  constructor(numBlocks, blockSize) {
    Object.assign(this, { step: 0, time: 0, blockSize, seqs: new Map(), pins: new Map(), ended: false, version: 0, ownersOf: null });
    this.totals = { queries: 0, hits: 0, preemptions: 0, generated: 0, finished: 0, steps: 0 };
    this.empty(numBlocks);
  }

  empty(numBlocks) {
    this.refs = new Int32Array(numBlocks);
    this.node = new Int32Array(numBlocks);
    this.since = new Int32Array(numBlocks).fill(this.step);
    this.used = this.shared = this.idle = 0; // blocks in use, of those shared; cached ones that nobody uses
  }

  get numBlocks() { return this.refs.length; }
  get free() { return this.numBlocks - this.used - this.idle; }

  /** The state of a keyframe's body, or null where its words do not add up. */
  static read(words, time) {
    const [step, blockSize, numBlocks, numSequences, numPins] = words, start = 11 + 3 * numBlocks;
    if (!(Math.min(step, numBlocks, numSequences, numPins) >= 0 && blockSize >= 1 && words.length >= start)) return null;
    const state = new KVState(0, blockSize), [queries, hits, preemptions, generated, finished, steps] = words.subarray(5, 11);
    Object.assign(state, { step, time, totals: { queries, hits, preemptions, generated, finished, steps } });
    [state.refs, state.node, state.since] = [0, 1, 2].map((i) => words.slice(11 + i * numBlocks, 11 + (i + 1) * numBlocks));
    let i = start;
    const blocksAt = (at, n) => {
      const blocks = Array.from(words.subarray(at, at + Math.max(0, n)));
      return blocks.length === n && blocks.every((block) => block >= 0 && block < numBlocks) ? blocks : null;
    };
    for (let k = 0; k < numSequences; k++) {
      const [id, stage, numPrompt, numOutput, maxTokens, numComputed, numCached, parent, times, n] = words.subarray(i, i + 10);
      const blocks = blocksAt(i + 10, n);
      if (!blocks || stage < 0 || stage > PARKED || Math.min(id, numComputed) < 0 || state.seqs.has(id)) return null;
      state.seqs.set(id, { id, state: stage, numPrompt, numOutput, maxTokens, numComputed, numCached: Math.max(0, numCached),
        isNew: numCached < 0, parent, preemptions: times, blocks });
      i += 10 + n;
    }
    for (let k = 0; k < numPins; k++) {
      const blocks = blocksAt(i + 2, words[i + 1]);
      if (!blocks) return null;
      state.pins.set(words[i], blocks);
      i += 2 + blocks.length;
    }
    for (let block = 0; block < numBlocks; block++) state.count(block, 1);
    return i === words.length ? state : null;
  }

  clone() {
    const other = Object.assign(Object.create(KVState.prototype), this);
    for (const name of ["refs", "node", "since"]) other[name] = this[name].slice();
    other.seqs = new Map(Array.from(this.seqs, ([id, sequence]) => [id, { ...sequence, blocks: sequence.blocks.slice() }]));
    other.pins = new Map(this.pins);
    other.totals = { ...this.totals };
    return other;
  }

  /** Roughly what it takes in memory. */
  get bytes() { return 12 * this.numBlocks + 400 * this.seqs.size; }

  count(block, by) {
    if (this.refs[block] > 0) {
      this.used += by;
      if (this.refs[block] > 1) this.shared += by;
    } else if (this.node[block]) this.idle += by;
  }

  refer(block, refs) {
    this.count(block, -1);
    this.refs[block] = refs;
    this.since[block] = this.step;
    this.count(block, 1);
  }

  name(block, node) {
    this.count(block, -1);
    this.node[block] = node;
    this.count(block, 1);
  }

  /** Follow one event: its code and its arguments as they travel. */
  applyEvent(op, args) { this.apply(op, [op, ...args], 0); }

  /** The same for an event whose arguments stand in `words` after index `i`; a table's number of blocks is in its head. */
  apply(op, words, i, numArgs = words.length - i - 1) {
    const a = words[i + 1], b = words[i + 2], c = words[i + 3];
    const sequence = OF_SEQUENCES.has(op) ? this.seqs.get(a) : null;
    this.version++;
    switch (op) {
      case OP.schedule: case OP.copy: return;
      case OP.commit:
        sequence.numComputed = b;
        sequence.numOutput += c;
        this.totals.generated += c;
        return;
      case OP.allocate: return this.refer(a, 1);
      case OP.share: case OP.release: return this.refer(a, b);
      case OP.free: case OP.idle: return this.refer(a, 0);
      case OP.cache: return this.name(a, b);
      case OP.evict: return this.name(a, 0);
      case OP.step:
        this.step = a;
        this.time = joined(words[i + 4], words[i + 5]);
        this.totals.steps++;
        return;
      case OP.pin: this.pins.set(a, Array.from(words.slice(i + 2, i + 1 + numArgs))); return;
      case OP.unpin: this.pins.delete(a); return;
      case OP.start_over: this.ended = true; return;
    }
    this.ownersOf = null;
    switch (op) {
      case OP.table: for (let k = 2; k <= numArgs; k++) sequence.blocks.push(words[i + k]); return;
      case OP.trim: sequence.blocks.length = Math.min(sequence.blocks.length, b); return;
      case OP.queue: return this.queue(a, b, c);
      case OP.admit: return this.admit(sequence, c);
      case OP.fork:
        this.seqs.set(b, { id: b, state: RUNNING, numPrompt: sequence.numPrompt, numOutput: 0, maxTokens: sequence.maxTokens,
          numComputed: sequence.numPrompt - 1, numCached: sequence.numPrompt - 1, isNew: false, parent: a, preemptions: 0, blocks: [] });
        return;
      case OP.preempt:
        leave(sequence, WAITING).preemptions++;
        this.totals.preemptions++;
        return;
      case OP.park: leave(sequence, PARKED); return;
      case OP.finish:
        this.seqs.delete(a);
        this.totals.finished++;
        return;
      case OP.resize:
        this.empty(a);
        this.pins = new Map();
        for (const each of this.seqs.values()) leave(each, WAITING);
    }
  }

  queue(id, numPrompt, maxTokens) {
    if (!this.seqs.has(id)) {
      this.seqs.set(id, { id, state: WAITING, numPrompt: 0, numOutput: 0, maxTokens: 0, numComputed: 0, numCached: 0, isNew: true,
        parent: -1, preemptions: 0, blocks: [] });
    }
    Object.assign(leave(this.seqs.get(id), WAITING), { numPrompt, maxTokens });
  }

  admit(sequence, numCached) {
    Object.assign(sequence, { state: RUNNING, numComputed: numCached });
    if (sequence.isNew) {
      Object.assign(sequence, { isNew: false, numCached });
      this.totals.queries += sequence.numPrompt;
      this.totals.hits += numCached;
    }
  }

  /** Per block the ids of the sequences that hold it. */
  owners() {
    if (!this.ownersOf) {
      const nobody = [];
      this.ownersOf = new Array(this.numBlocks).fill(nobody);
      for (const { id, blocks } of this.seqs.values()) {
        for (const block of blocks) {
          if (this.ownersOf[block] === nobody) this.ownersOf[block] = [id];
          else this.ownersOf[block].push(id);
        }
      }
    }
    return this.ownersOf;
  }

  /** Tokens in the i-th block of a sequence, 0..blockSize. */
  fill(id, i) {
    const sequence = this.seqs.get(id);
    return sequence ? Math.max(0, Math.min(this.blockSize, sequence.numComputed - i * this.blockSize)) : 0;
  }

  /** Shares of slots that hold no token, 0..1: of the blocks in use, and if each running sequence had all it may need in one piece. */
  waste() {
    let empty = 0, computed = 0, most = 0;
    for (const sequence of this.seqs.values()) {
      if (sequence.state !== RUNNING) continue;
      empty += Math.max(0, sequence.blocks.length * this.blockSize - sequence.numComputed);
      computed += sequence.numComputed;
      most += sequence.numPrompt + sequence.maxTokens;
    }
    return { paged: this.used ? empty / (this.used * this.blockSize) : 0, contiguous: { max: most ? 1 - computed / most : 0 } };
  }

  /** crc32 of what is exact: blocks, sequences and pins; embedllm/replay.py has the same. */
  digest() {
    const words = [this.numBlocks, this.blockSize, ...this.refs, ...this.node], byId = ([a], [b]) => a - b;
    for (const [, s] of Array.from(this.seqs).sort(byId)) {
      words.push(s.id, s.state, s.numPrompt, s.numOutput, s.numComputed, s.blocks.length, ...s.blocks);
    }
    for (const [id, blocks] of Array.from(this.pins).sort(byId)) words.push(id, blocks.length, ...blocks);
    return crc32(new Uint8Array(Int32Array.from(words).buffer));
  }
}

/** Whether these events can follow a state of `numBlocks` and the `known` sequences; brings `known` up to date. */
function canFollow(words, numBlocks, known) {
  for (let i = 0, n; i < words.length; i += 1 + n) {
    const op = words[i] & 255, arity = OPS[op - 1]?.[1], a = words[i + 1], end = i + 1 + (n = words[i] >>> 8);
    if (arity === undefined || end > words.length || (arity < 0 ? n < 1 : n !== arity)) return false;
    if (op === OP.resize && (numBlocks = a) > MAX_BLOCKS) return false;
    const from = OF_BLOCKS.has(op) || op === OP.copy ? i + 1 : op === OP.table || op === OP.pin ? i + 2 : end;
    for (let k = from; k < (OF_BLOCKS.has(op) ? from + 1 : end); k++) if (words[k] >= numBlocks) return false;
    for (let k = i + 1; k < end; k++) if (words[k] < 0 && !(op === OP.step && k === i + 4)) return false;
    if ((op === OP.cache || op === OP.evict) && !words[i + 2]) return false;
    if ((OF_SEQUENCES.has(op) && !known.has(a)) || (op === OP.finish && !REASONS[words[i + 2]])) return false;
    if (op === OP.queue) known.add(a);
    else if (op === OP.fork) known.add(words[i + 2]);
    else if (op === OP.finish) known.delete(a);
  }
  return true;
}
