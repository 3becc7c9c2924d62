"""Who computes what in the next step, and which blocks they may write.

Owns the waiting and running sequences, the rows and the block pool. Knows plain ids and counts, no tensors, no text,
no clock. There is no prefill phase and no decode phase: a sequence has tokens it knows and tokens whose KV is
computed, and each step hands out budget so that the second catches up with the first.
Invariant: `invariants.check` holds after every call.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from embedllm import events
from embedllm.blocks import BlockPool
from embedllm.config import Limits
from embedllm.events import Recorder
from embedllm.outputs import FinishReason
from embedllm.plan_types import Entry, Plan
from embedllm.sequence import Sequence, State

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
        self.recorder: Recorder | None = None
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self.num_pinned = 0  # blocks held by pins, never available to sequences
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0  # prompt tokens found
        self._sequences: dict[int, Sequence] = {}  # everything unfinished, by id
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_plans = 0
        self._blocked: tuple[int, int] | None = None  # (head of the queue, available blocks when it did not fit)

    # ---- in and out -------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and adopt its forks. Its size was checked with `Limits.check_fits`."""
        self._sequences[sequence.id] = sequence
        for fork in sequence.forks:
            self._sequences[fork.id] = fork
            fork.state = State.UNBORN
        if self.recorder is not None:
            self.recorder.append((events.QUEUE, sequence.id, sequence.num_prompt))
        self._wait(sequence)

    def get(self, sequence_id: int) -> Sequence | None:
        """The unfinished sequence of this id."""
        return self._sequences.get(sequence_id)

    def __iter__(self) -> Iterator[Sequence]:
        """Every unfinished sequence, in order of arrival."""
        return iter(list(self._sequences.values()))

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_free_rows(self) -> int:
        return len(self._rows)

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
        del self._sequences[sequence.id]
        if self.recorder is not None:
            self.recorder.append((events.FINISH, sequence.id, reason))
        for fork in sequence.forks:  # not born yet: they go their own way
            self._wait(fork)
        sequence.forks = []

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and row; it waits to recompute them."""
        self._leave(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
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

    def recompute_all(self) -> None:
        """After a fault that may have damaged KV: tokens are the truth, every block's content is dropped."""
        for sequence in list(self.running):
            self.preempt(sequence)
        self.pool.reset_cache()

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def _leave(self, sequence: Sequence) -> None:
        """Out of its queue, with nothing held; whatever is in flight for it becomes stale."""
        if sequence.state is State.RUNNING:
            _remove(self.running, sequence)
            self._rows.append(sequence.row)
            if sequence.copy is not None:
                self.pool.release(sequence.copy[:1])
            self.pool.release(sequence.blocks)
        elif sequence.state is State.WAITING:
            _remove(self.waiting, sequence)
        elif sequence.state is State.UNBORN:
            next(s for s in self if sequence in s.forks).forks.remove(sequence)
        sequence.forget()

    # ---- first half: plan -------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can run now.

        Sequences that are one token behind come first. What is left of the budget goes in order to those catching
        up, nobody taking more than half of it while another waits, so a long prompt never stalls a short one.
        """
        limits = self.limits
        shares: dict[int, int] = {}
        behind: list[Sequence] = []
        budget = limits.max_batch_tokens
        reserved = 0  # blocks the running sequences need to hold what they already know
        for sequence in self.running:
            pending = sequence.num_pending
            if pending <= 0:
                continue
            known = sequence.num_computed + sequence.num_in_flight + pending + len(sequence.draft)
            reserved += max(0, limits.blocks_for(known) - len(sequence.blocks))
            if pending == 1 and sequence.num_output + sequence.num_sampling > 0:
                shares[sequence.id] = 1
                budget -= 1
            else:
                behind.append(sequence)
        budget = self._share_drafts(shares, budget)
        self._share_catching_up(shares, behind, budget, reserved)
        entries, copies = self._grant(shares)
        if not entries:
            return None
        self._num_plans += 1
        return Plan(self._num_plans, entries, copies)

    def _share_drafts(self, shares: dict[int, int], budget: int) -> int:
        """Let verification use spare budget: a draft is computed together with its sequence's last known token."""
        for sequence in self.running:
            if sequence.draft and sequence.id in shares and not sequence.num_sampling:
                room = sequence.max_tokens - sequence.num_output - 1
                del sequence.draft[max(0, min(room, budget)) :]
                shares[sequence.id] += len(sequence.draft)
                budget -= len(sequence.draft)
        return budget

    def _share_catching_up(self, shares: dict[int, int], behind: list[Sequence], budget: int, reserved: int) -> None:
        """Hand the rest of the budget to prompts and recomputations, admitting waiting sequences while it lasts."""
        limits = self.limits
        members = list(behind)
        i = 0
        while budget > 0:
            if i == len(members):
                sequence = self._admit(reserved)
                if sequence is None:
                    break
                reserved += limits.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
                members.append(sequence)
            sequence, i = members[i], i + 1
            pending = sequence.num_pending
            if limits.chunked_prefill:
                alone = i == len(members) and not self.waiting
                share = min(pending, budget if alone else max(budget // 2, min(limits.block_size, budget)))
            else:
                share = pending  # whole or not at all; the first may take the whole step
                if i == 1 and pending > budget:
                    budget += _postpone(shares, pending - budget)
                if pending > budget:
                    break
            shares[sequence.id] = share
            budget -= share
        for sequence in members[:i]:  # what nobody else could use
            extra = min(budget, sequence.num_pending - shares.get(sequence.id, sequence.num_pending))
            if extra > 0:
                shares[sequence.id] += extra
                budget -= extra

    def _admit(self, reserved: int) -> Sequence | None:
        """Take the first waiting sequence into running, if a row and blocks for all it knows are there.

        Beyond its own need it must leave one block for everyone running, twice that for each time it was preempted.
        """
        if not self.waiting or not self._rows:
            return None
        sequence = self.waiting[0]
        pool = self.pool
        if self._blocked is not None and self.running:
            blocked_id, available = self._blocked
            if blocked_id == sequence.id and pool.num_available <= available:
                return None
        if not self._may_enter(sequence):
            return None
        blocks, node = self._find_prefix(sequence)
        needed = self.limits.blocks_for(len(sequence.tokens)) - len(blocks) + pool.num_idle(blocks)
        headroom = len(self.running) << min(sequence.num_preemptions, MAX_PREEMPTIONS)
        if needed + reserved + headroom > pool.num_available:
            self._blocked = (sequence.id, pool.num_available)
            return None
        self._blocked = None
        del self.waiting[0]
        pool.share(blocks)
        self._enter(sequence, blocks)
        sequence.chain, sequence.num_chained = node, len(blocks)
        sequence.num_computed = len(blocks) * self.limits.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
            self.num_prefix_queries += sequence.num_prompt
            self.num_prefix_hits += sequence.num_computed
        if self.recorder is not None:
            self.recorder.append((events.ADMIT, sequence.id, sequence.row, sequence.num_computed))
        return sequence

    def _may_enter(self, sequence: Sequence) -> bool:
        """A sequence preempted often enough comes back as the first in order and stays the first until it ends."""
        if not self.running:
            return True
        first = self.running[0]
        if sequence.order < first.order:
            return first.num_preemptions < MAX_PREEMPTIONS
        return sequence.num_preemptions < MAX_PREEMPTIONS

    def _find_prefix(self, sequence: Sequence) -> tuple[list[int], int | str | None]:
        """Cached blocks for everything but the last token, whose logits are needed."""
        if not self.limits.prefix_caching or (sequence.prompt_logprobs and sequence.num_output == 0):
            return [], sequence.salt
        return self.pool.find(sequence.tokens[:-1], sequence.salt)

    def _enter(self, sequence: Sequence, blocks: list[int]) -> None:
        sequence.state = State.RUNNING
        sequence.row = self._rows.pop()
        sequence.blocks.extend(blocks)
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def _grant(self, shares: dict[int, int]) -> tuple[list[Entry], list[tuple[int, int]]]:
        """Give each share its blocks, first in order first, and write the entries down."""
        granted: dict[int, Entry] = {}
        for sequence in list(self.running):
            share = shares.get(sequence.id)
            if share is None or sequence.state is not State.RUNNING:
                continue
            start = sequence.num_computed + sequence.num_in_flight
            missing = self.limits.blocks_for(start + share) - len(sequence.blocks)
            while missing > self.pool.num_available and sequence.state is State.RUNNING:
                victim = self.running[-1]  # the last in order; the first only when it is alone
                granted.pop(victim.id, None)
                self.preempt(victim)
            if sequence.state is not State.RUNNING:
                continue
            for _ in range(missing):
                sequence.blocks.append(self.pool.allocate())
            granted[sequence.id] = sequence.entry(share)
        for entry in granted.values():
            self._launch(entry)
        copies = [
            copy
            for i, entry in granted.items()
            if entry.start == self._sequences[i].num_computed
            if (copy := self._sequences[i].copy) is not None
        ]
        return list(granted.values()), copies

    def _launch(self, entry: Entry) -> None:
        sequence = self._sequences[entry.sequence_id]
        sequence.num_in_flight += len(entry.tokens)
        if entry.num_logits:
            sequence.num_sampling += 1

    # ---- second half: commit or roll back ---------------------------------------------------------------------

    def commit(self, plan: Plan, sampled: list[list[int]]) -> list[Progress]:
        """Take the results of a plan: `sampled[i]` has 0 tokens for a chunk, else 1 + accepted drafts.

        Entries of sequences that were preempted or ended meanwhile are dropped. Full blocks become findable here and
        nowhere else.
        """
        progress = []
        for entry, tokens in zip(plan.entries, sampled, strict=True):
            sequence = self._current(entry)
            if sequence is None:
                continue
            self._land(sequence, entry)
            num_known = len(entry.tokens) - entry.num_draft
            sequence.num_computed = entry.start + num_known + max(0, len(tokens) - 1)
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
            sequence = self._current(entry)
            if sequence is not None:
                self._land(sequence, entry)
                self._trim(sequence)

    def _current(self, entry: Entry) -> Sequence | None:
        sequence = self._sequences.get(entry.sequence_id)
        return sequence if sequence is not None and sequence.epoch == entry.epoch else None

    def _land(self, sequence: Sequence, entry: Entry) -> None:
        sequence.num_in_flight -= len(entry.tokens)
        if entry.num_logits:
            sequence.num_sampling -= 1

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

    def _bear_forks(self, parent: Sequence) -> None:
        """The prompt is computed: each fork shares its blocks and recomputes only its last token.

        The block that token lies in is copied, because every fork writes there; a fork without room waits and comes
        in by the prefix cache like anyone else.
        """
        last = parent.num_prompt - 1
        num_whole, inside = divmod(last, self.limits.block_size)
        for fork in parent.forks:
            if not self._rows or self.pool.num_available <= len(self.running):
                self._wait(fork)
                continue
            whole = parent.blocks[:num_whole]
            self.pool.share(whole)
            self._enter(fork, list(whole))
            fork.num_computed = fork.num_cached = last
            if inside:
                source = parent.blocks[num_whole]
                fork.blocks.append(self.pool.allocate())
                self.pool.share([source])
                fork.copy = (source, fork.blocks[-1])
            if self.recorder is not None:
                self.recorder.append((events.FORK, parent.id, fork.id))
        parent.forks = []


def _postpone(shares: dict[int, int], num_tokens: int) -> int:
    """Take shares back, the last in order first, until this many tokens are free; returns how many are."""
    freed = 0
    while freed < num_tokens and shares:
        freed += shares.popitem()[1]
    return freed


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    """Take it out of an ordered queue."""
    i = bisect.bisect_left(queue, sequence.order, key=lambda s: s.order)
    assert queue[i] is sequence
    del queue[i]
