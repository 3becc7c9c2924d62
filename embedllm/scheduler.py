"""Who computes what in the next step, and which blocks they may write.

Owns the waiting and running sequences, the rows and the block pool. Knows plain ids and counts, no tensors, no text,
no clock. There is no prefill phase and no decode phase: a sequence has tokens it knows and tokens whose KV is
computed, and each step hands out budget so that the second catches up with the first.
Invariant: `invariants.check` holds after every call.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from operator import attrgetter

from embedllm import events
from embedllm.blocks import BlockPool, Node
from embedllm.config import Limits
from embedllm.events import Recorder
from embedllm.outputs import FinishReason
from embedllm.plan_types import Entry, Plan
from embedllm.sequence import Sequence, State

_BY_ORDER = attrgetter("order")
MAX_PREEMPTIONS = 4  # a sequence preempted this often comes back only when it can no longer be preempted


@dataclass(slots=True)
class Progress:
    """What a commit did to one sequence: the tokens it gained; its finish_reason tells whether it ended."""

    sequence: Sequence
    tokens: list[int]


class Scheduler:
    """Continuous batching over one block pool.

    `plan()` and `commit()` are two halves: several plans may be in flight, committed or rolled back in the order they
    were made. Order is priority, then arrival. Memory is granted to the first in order; when none is left the last in
    order is preempted (its tokens stay, its KV is recomputed later), never the first.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.budget = limits.max_batch_tokens  # tokens of the next step; may be lowered, not below max_num_seqs
        self.recorder: Recorder | None = None
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self.sequences: dict[int, Sequence] = {}  # everything unfinished, by id, in order of arrival
        self.free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self.num_pinned = 0  # blocks held by pins, never available to sequences
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0  # prompt tokens found
        self.num_plans = 0  # also the number of the newest one
        self._blocked: tuple[int, int, int] | None = None  # what the head of the queue did not fit beside

    # ---- in and out -------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and adopt its forks. Its size was checked with `Limits.check_fits`."""
        self.sequences[sequence.id] = sequence
        for fork in sequence.forks:
            self.sequences[fork.id] = fork
            fork.state = State.UNBORN
        self._wait(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a sequence in any state; its blocks are back at once. Ending a finished one does nothing."""
        if sequence.state is State.FINISHED:
            return
        self._leave(sequence)
        sequence.state = State.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        del self.sequences[sequence.id]
        if self.recorder is not None:
            self.recorder.append((events.FINISH, sequence.id, reason))
        for fork in sequence.forks:  # not born yet: they go their own way
            self._wait(fork)
        sequence.forks = []

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and row for others; it waits to recompute its KV."""
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._leave(sequence)
        if self.recorder is not None:
            self.recorder.append((events.PREEMPT, sequence.id))
        self._wait(sequence)

    def park(self, sequence: Sequence) -> None:
        """Set a waiting or running sequence aside without blocks until `resume`."""
        if sequence.state is State.WAITING or sequence.state is State.RUNNING:
            self._leave(sequence)
            sequence.state = State.PARKED
            if self.recorder is not None:
                self.recorder.append((events.PARK, sequence.id))

    def resume(self, sequence: Sequence) -> None:
        if sequence.state is State.PARKED:
            self._wait(sequence)

    def successor(self, limits: Limits) -> Scheduler:
        """An empty scheduler with other limits and this one's budget, recorder and totals; it numbers its plans on."""
        new = Scheduler(limits)
        new.budget = self.budget if limits.chunked_prefill else limits.max_batch_tokens  # whole prompts need it
        new.recorder = new.pool.recorder = self.recorder
        new.num_preemptions, new.num_prefix_queries = self.num_preemptions, self.num_prefix_queries
        new.num_prefix_hits, new.num_plans = self.num_prefix_hits, self.num_plans
        return new

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        bisect.insort(self.waiting, sequence, key=_BY_ORDER)
        if self.recorder is not None:
            self.recorder.append((events.QUEUE, sequence.id, sequence.num_prompt, sequence.max_tokens))

    def _leave(self, sequence: Sequence) -> None:
        """Out of its queue, with nothing held; whatever is in flight for it becomes stale."""
        if sequence.state is State.RUNNING:
            _remove(self.running, sequence)
            self.free_rows.append(sequence.row)
            if sequence.copy is not None:
                self.pool.release(sequence.copy[:1])
            self.pool.release(sequence.blocks)
            sequence.forget()
        elif sequence.state is State.WAITING:
            _remove(self.waiting, sequence)
        elif sequence.state is State.UNBORN:
            next(s for s in self.sequences.values() if sequence in s.forks).forks.remove(sequence)

    # ---- first half: plan -------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can run now.

        Sequences that are one token behind come first. What is left of the budget goes in order to those catching
        up, nobody taking more than half of it while another waits, so a long prompt never stalls a short one. Drafts
        are verified with what then is left of budget and memory.
        """
        blocks_for = self.limits.blocks_for
        shares: dict[Sequence, int] = {}
        behind: list[Sequence] = []
        reserved = 0  # blocks the running sequences need to hold what they already know
        for sequence in self.running:
            pending = sequence.num_pending
            if pending <= 0:
                continue
            known = len(sequence.tokens) + sequence.num_sampling
            reserved += max(0, blocks_for(known) - len(sequence.blocks))
            if pending == 1 and known > sequence.num_prompt:
                shares[sequence] = 1
            else:
                behind.append(sequence)
        budget = self.budget - len(shares)
        budget = self._share_catching_up(shares, behind, budget, reserved)
        self._grant(shares)
        self._add_drafts(shares, budget)
        return self._launch(shares) if shares else None

    def _share_catching_up(
        self, shares: dict[Sequence, int], behind: list[Sequence], budget: int, reserved: int
    ) -> int:
        """Hand the rest to those catching up, admitting while it lasts; returns what nobody could use."""
        limits = self.limits
        i = 0
        while budget > 0:
            if i == len(behind):
                sequence = self._admit(reserved)
                if sequence is None:
                    break
                reserved += limits.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
                behind.append(sequence)
            sequence, i = behind[i], i + 1
            pending = sequence.num_pending
            if limits.chunked_prefill:
                alone = i == len(behind) and not self.waiting
                share = min(pending, budget if alone else max(budget // 2, min(limits.block_size, budget)))
            else:
                share = pending  # whole or not at all; the first has the step for itself if it must
                if i == 1 and pending > budget:
                    shares.clear()
                    budget = self.budget
                if pending > budget:
                    break
            shares[sequence] = share
            budget -= share
        for sequence in behind[:i]:  # what nobody else could use
            extra = min(budget, sequence.num_pending - shares.get(sequence, sequence.num_pending))
            if extra > 0:
                shares[sequence] += extra
                budget -= extra
        return budget

    def _admit(self, reserved: int) -> Sequence | None:
        """Take the first waiting sequence into running, if a row and blocks for all it knows are there.

        Beyond its own need it must leave one block for everyone running, twice that for each time it was preempted.
        """
        if not self.waiting or not self.free_rows:
            return None
        sequence, pool = self.waiting[0], self.pool
        if self.running:
            if self._blocked == (sequence.id, pool.num_available, len(self.running)):
                return None
            if max(sequence, self.running[0], key=_BY_ORDER).num_preemptions >= MAX_PREEMPTIONS:
                return None  # whoever is not the first in order may be preempted, and that one must not be again
        blocks: list[int] = []
        node: Node = sequence.salt
        if self.limits.prefix_caching and (sequence.num_output or not sequence.wants_hidden):
            blocks, node = pool.find(sequence.tokens[:-1], sequence.salt)  # the last one's logits are needed
        needed = self.limits.blocks_for(len(sequence.tokens)) - len(blocks) + pool.num_idle(blocks)
        headroom = len(self.running) << min(sequence.num_preemptions, MAX_PREEMPTIONS)
        if needed + reserved + headroom > pool.num_available:
            self._blocked = (sequence.id, pool.num_available, len(self.running))
            return None
        del self.waiting[0]
        pool.share(blocks)
        self._enter(sequence, blocks)
        sequence.chain, sequence.num_chained = node, len(blocks)
        sequence.num_computed = len(blocks) * self.limits.block_size
        if sequence.epoch == 0:
            sequence.num_cached = sequence.num_computed
            self.num_prefix_queries += sequence.num_prompt
            self.num_prefix_hits += sequence.num_computed
        if self.recorder is not None:
            self.recorder.append((events.ADMIT, sequence.id, sequence.row, sequence.num_computed))
        return sequence

    def _enter(self, sequence: Sequence, blocks: list[int]) -> None:
        sequence.state = State.RUNNING
        sequence.row = self.free_rows.pop()
        bisect.insort(self.running, sequence, key=_BY_ORDER)
        self._extend(sequence, blocks)

    def _extend(self, sequence: Sequence, blocks: list[int]) -> None:
        sequence.blocks.extend(blocks)
        if blocks and self.recorder is not None:
            self.recorder.append((events.TABLE, sequence.id, *blocks))

    def _grant(self, shares: dict[Sequence, int]) -> None:
        """Give each share its blocks, first in order first; who is preempted loses its share."""
        for sequence in list(self.running):
            if sequence not in shares:
                continue
            end = sequence.num_computed + sequence.num_in_flight + shares[sequence]
            missing = self.limits.blocks_for(end) - len(sequence.blocks)
            while missing > self.pool.num_available and len(self.running) > 1 and sequence in shares:
                victim = self.running[-1]  # the last in order, never the first
                shares.pop(victim, None)
                self.preempt(victim)
            if missing > self.pool.num_available:
                shares.pop(sequence, None)  # alone, and what it lacks is still in flight
            elif sequence in shares:
                self._extend(sequence, [self.pool.allocate() for _ in range(missing)])

    def _add_drafts(self, shares: dict[Sequence, int], budget: int) -> None:
        """Let sequences that reach their last known token verify a draft in the same step.

        A draft takes nobody's budget and nobody's memory: what does not fit is dropped.
        """
        size = self.limits.block_size
        for sequence, share in shares.items():
            if not sequence.draft or sequence.num_sampling or share < sequence.num_pending:
                continue
            end = len(sequence.tokens)
            slots = (len(sequence.blocks) + self.pool.num_available) * size - end
            room = min(sequence.max_tokens - sequence.num_output - 1, slots, budget)
            del sequence.draft[max(0, room) :]
            end += len(sequence.draft)
            missing = self.limits.blocks_for(end) - len(sequence.blocks)
            self._extend(sequence, [self.pool.allocate() for _ in range(missing)])
            shares[sequence] += len(sequence.draft)
            budget -= len(sequence.draft)

    def _launch(self, shares: dict[Sequence, int]) -> Plan:
        """Write the plan down: from here on its tokens are in flight."""
        entries = []
        copies = []
        for sequence, share in shares.items():
            entry = sequence.entry(share)
            if sequence.copy is not None and not sequence.num_in_flight:
                copies.append(sequence.copy)
            sequence.num_in_flight += share
            if entry.num_logits:
                sequence.num_sampling += 1
            entries.append(entry)
        self.num_plans += 1
        return Plan(self.num_plans, entries, copies)

    # ---- second half: commit or roll back ---------------------------------------------------------------------

    def commit(self, plan: Plan, sampled: list[list[int]]) -> list[Progress]:
        """Take the results of a plan: `sampled[i]` has 0 tokens for a chunk, else 1 + accepted drafts.

        An entry without a draft may have more: tokens that must follow, whose KV is computed in steps to come.

        Entries of sequences that were preempted or ended meanwhile are dropped. Full blocks become findable here and
        nowhere else.
        """
        progress = []
        for entry, tokens in zip(plan.entries, sampled, strict=True):
            sequence = self._land(entry)
            if sequence is None:
                continue
            num_known = len(entry.tokens) - entry.num_draft
            num_accepted = len(tokens) - 1 if entry.num_draft and tokens else 0
            sequence.num_computed = entry.start + num_known + num_accepted
            if sequence.copy is not None:
                self.pool.release(sequence.copy[:1])
                sequence.copy = None
            kept = sequence.append(tokens)
            if self.limits.prefix_caching:
                self._cache_full_blocks(sequence)
            if tokens:
                sequence.draft = []
            if entry.num_draft:
                self._trim(sequence)
            if self.recorder is not None:
                self.recorder.append((events.COMMIT, sequence.id, sequence.num_computed, len(kept)))
            if entry.num_logits and sequence.forks:
                self._bear_forks(sequence)
            if sequence.finish_reason is not None:
                self.finish(sequence, sequence.finish_reason, sequence.stop_reason)
            if kept:
                progress.append(Progress(sequence, kept))
        return progress

    def rollback(self, plan: Plan) -> None:
        """Forget a plan that did not run; the newest in flight first. Blocks it alone needed are returned."""
        for entry in plan.entries:
            sequence = self._land(entry)
            if sequence is not None:
                self._trim(sequence)

    def _land(self, entry: Entry) -> Sequence | None:
        """The entry's sequence, with the entry no longer in flight; None if it was preempted or ended meanwhile."""
        sequence = self.sequences.get(entry.sequence_id)
        if sequence is None or sequence.epoch != entry.epoch:
            return None
        sequence.num_in_flight -= len(entry.tokens)
        if entry.num_logits:
            sequence.num_sampling -= 1
        return sequence

    def _cache_full_blocks(self, sequence: Sequence) -> None:
        size = self.limits.block_size
        num_full = min(sequence.num_computed, len(sequence.tokens)) // size
        for i in range(sequence.num_chained, num_full):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.chain = self.pool.cache(sequence.blocks[i], sequence.chain, tokens)
            sequence.num_chained = i + 1

    def _trim(self, sequence: Sequence) -> None:
        """Return the blocks past what is computed or in flight."""
        keep = self.limits.blocks_for(sequence.num_computed + sequence.num_in_flight)
        if keep < len(sequence.blocks):
            self.pool.release(sequence.blocks[keep:])
            del sequence.blocks[keep:]
            if self.recorder is not None:
                self.recorder.append((events.TRIM, sequence.id, keep))

    def _bear_forks(self, parent: Sequence) -> None:
        """The prompt is computed: each fork shares its blocks and recomputes only its last token.

        The block that token lies in is copied, because every fork writes there; a fork without room waits and comes
        in by the prefix cache like anyone else.
        """
        last = parent.num_prompt - 1
        num_whole, inside = divmod(last, self.limits.block_size)
        for fork in parent.forks:
            if not self.free_rows or self.pool.num_available <= len(self.running):
                self._wait(fork)
                continue
            if self.recorder is not None:
                self.recorder.append((events.FORK, parent.id, fork.id))
            whole = parent.blocks[:num_whole]
            self.pool.share(whole)
            self._enter(fork, list(whole))
            fork.num_computed = fork.num_cached = last
            if inside:
                source = parent.blocks[num_whole]
                self._extend(fork, [self.pool.allocate()])
                self.pool.share([source])
                fork.copy = (source, fork.blocks[-1])
        parent.forks = []


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    """Take it out of an ordered queue."""
    i = bisect.bisect_left(queue, sequence.order, key=_BY_ORDER)
    assert queue[i] is sequence
    del queue[i]
