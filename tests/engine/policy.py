"""A world in which the policy runs against an exact oracle: scheduler and pool in front of a HashLM, no tensors.

`World` is the scheduler's owner, as the engine is: it plans, runs, commits, aborts, parks, pins, drafts and fails. It
remembers what it asked for, and after every act it recounts everything and compares every sequence with the tokens
HashLM gives over a plain list. Freed and fresh blocks are filled with garbage, so a wrong read gives a wrong token.
"""

import random
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from embedllm import events
from embedllm.config import Limits
from embedllm.errors import RequestTooLong
from embedllm.events import Event
from embedllm.invariants import check, check_idle, check_plan
from embedllm.plan_types import Plan
from embedllm.recording import record_plan
from embedllm.resizing import begin_again
from embedllm.scheduler import Scheduler
from embedllm.sequence import Sequence, State
from embedllm.testing import HashLM, HashRunner

VOCAB = 97
SHARED = [(7 * i) % 89 for i in range(64)]  # what prompts begin with
DRAFTERS = ("none", "right", "wrong", "mixed", "overlong")


@dataclass
class Job:
    """One sample that was asked for, and what must come of it."""

    sequence: Sequence
    prompt: list[int]
    expected: list[int]
    flavour: int  # forks of one request continue differently, as they do with their own seeds
    cut: bool = False  # aborted or failed: a prefix of what is expected will do

    @property
    def ended(self) -> bool:
        return self.sequence.state is State.FINISHED


class FlavouredRunner(HashRunner):
    """HashLM with one hash per flavour, so that the samples of a request part at once."""

    def __init__(self, models: list[HashLM], limits: Limits) -> None:
        super().__init__(models[0], limits)
        self.models = models
        self.flavours: dict[int, int] = {}

    def choose(self, read: array, sequence_id: int | None) -> tuple[int, int]:
        model = self.models[self.flavours[sequence_id]]
        return model.pick(model.hasher(read).digest())


@dataclass
class World:
    limits: Limits
    depth: int = 1
    drafter: str = "none"
    eos_every: int = 40
    jobs: list[Job] = field(default_factory=list)
    pins: list[list[int]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.models = [HashLM(VOCAB, self.eos_every, seed=i) for i in range(3)]
        self.runner = FlavouredRunner(self.models, self.limits)
        self.scheduler = Scheduler(self.limits)
        self.scheduler.recorder = self.scheduler.pool.recorder = self
        self.flight: deque[tuple[Plan, list[list[int]]]] = deque()
        self._unchecked: list[Job] = []  # until they have ended
        self.pin_ids: list[int] = []  # beside `pins`
        self.random = random.Random(0)  # only for what a mixed drafter guesses

    # ---- what the policy says while it works ------------------------------------------------------------------

    def append(self, event: Event) -> None:
        self.runner.memory.append(event)
        name = event[0]
        self.counts[name] += 1
        if name == events.ADMIT and event[3]:
            self._check_hit(self.scheduler.sequences.get(event[1]), event[3])
        elif name == events.CACHE:
            self._check_cached(event[1])

    def _check_hit(self, sequence: Sequence, num_cached: int) -> None:
        """Whoever shares a prefix has the salt of somebody who computed it, and computes at least one token."""
        self.counts["hit"] += 1
        assert num_cached < len(sequence.tokens) and num_cached % self.limits.block_size == 0
        prefix = sequence.tokens[:num_cached]
        assert any(
            job.sequence.salt == sequence.salt and job.sequence.tokens[:num_cached] == prefix
            for job in self.jobs
            if job.sequence is not sequence or sequence.epoch
        ), f"sequence {sequence.id} found a prefix that nobody with its salt has computed"

    def _check_cached(self, block: int) -> None:
        """A findable block holds exactly the tokens it is found by, at consecutive positions."""
        tokens = self.scheduler.pool.cached_tokens(block)
        size = self.limits.block_size
        slots = self.runner.memory.pairs[block * size : (block + 1) * size]
        first = slots[0] & 0xFFFFFFFF
        assert [slot >> 32 for slot in slots] == list(tokens), f"block {block} is findable by what it does not hold"
        assert [slot & 0xFFFFFFFF for slot in slots] == list(range(first, first + size)) and first % size == 0

    # ---- requests ---------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        n: int = 1,
        priority: int = 0,
        salt: str | None = None,
        stop_ids: tuple[int, ...] = (),
        prompt_logprobs: bool = False,
        forced: bool = False,
    ) -> list[Job]:
        """Ask for n samples; refused, with nothing changed, exactly if one could not run alone."""
        limits, pinned = self.limits, self.scheduler.num_pinned
        slots = len(prompt) + max_tokens - 1
        fits = slots < limits.max_model_len and slots <= (limits.num_blocks - pinned) * limits.block_size
        try:
            limits.check_fits(len(prompt), max_tokens, pinned)
        except RequestTooLong:
            assert not fits
            self.counts["refused"] += 1
            return []
        assert fits
        new = []
        for flavour in range(n):
            sequence = Sequence(
                len(self.jobs) + flavour,
                list(prompt),
                max_tokens,
                frozenset(self.models[0].eos_ids),
                frozenset(stop_ids),
                priority,
                salt,
                prompt_logprobs and not flavour,
                is_stepwise=forced,
            )
            expected = self.models[flavour].expected(prompt, max_tokens, stop_ids=stop_ids)
            new.append(Job(sequence, prompt, expected, flavour))
            self.runner.flavours[sequence.id] = flavour
        new[0].sequence.forks = [job.sequence for job in new[1:]]
        self.jobs += new
        self._unchecked += new
        self.scheduler.add(new[0].sequence)
        self.check()
        return new

    def job(self, index: int) -> Job:
        return self.jobs[index % len(self.jobs)]

    def abort(self, job: Job) -> None:
        job.cut = job.cut or not job.ended
        self.counts["abort " + job.sequence.state.value] += 1
        self.scheduler.finish(job.sequence, "cancelled")
        self.check()

    def preempt(self, sequence: Sequence) -> None:
        """What the scheduler does when memory is short, at any other time; never to the first in order."""
        if sequence.state is State.RUNNING and sequence is not self.scheduler.running[0]:
            self.scheduler.preempt(sequence)
            self.check()

    def park(self, job: Job) -> None:
        self.counts["park " + job.sequence.state.value] += 1
        self.scheduler.park(job.sequence)
        self.check()

    def resume(self, job: Job) -> None:
        self.scheduler.resume(job.sequence)
        self.check()

    def pace(self, share: float) -> None:
        """Steps take too long, or no longer: what is handed out per step changes."""
        limits = self.limits
        if limits.chunked_prefill:
            least = limits.max_num_seqs
            self.scheduler.budget = least + int(share * (limits.max_batch_tokens - least))

    def resize(self, num_blocks: int) -> None:
        """Another pool, if whoever was admitted fits in it and nothing is pinned; everybody computes anew."""
        if self.pins or any(
            self.limits.blocks_for(s.max_slots) > num_blocks for s in self.scheduler.sequences.values()
        ):
            return
        while self.flight:
            self.commit()
        self.limits = replace(self.limits, num_blocks=num_blocks)
        self.runner.resize(num_blocks)
        self.append((events.RESIZE, num_blocks))
        sequences = list(self.scheduler.sequences.values())
        self.scheduler = self.scheduler.successor(self.limits)
        begin_again(self.scheduler, sequences)
        self.check()

    # ---- the cache --------------------------------------------------------------------------------------------

    def reset_cache(self) -> None:
        self.scheduler.pool.reset_cache()
        assert self.scheduler.pool.num_cached == 0
        self.check()

    def pin(self, job: Job, first: int = 0) -> None:
        """Hold what is cached of a sequence from a block on, if whoever was admitted still fits beside it."""
        blocks = self.scheduler.pool.find(job.sequence.tokens, job.sequence.salt)[0][first:]
        pinned = {block for pin in (*self.pins, blocks) for block in pin}
        room = self.limits.num_blocks - len(pinned)
        most = max((self.limits.blocks_for(s.max_slots) for s in self.scheduler.sequences.values()), default=0)
        if blocks and len(pinned) <= self.limits.num_blocks // 2 and most <= room:
            self.scheduler.pool.share(blocks)
            self.pins.append(blocks)
            self.scheduler.num_pinned = len(pinned)
            self.pin_ids.append(self.counts[events.PIN] + 1)
            self.append((events.PIN, self.pin_ids[-1], *blocks))
            self.check()

    def unpin(self, index: int = 0) -> None:
        if self.pins:
            index %= len(self.pins)
            self.append((events.UNPIN, self.pin_ids.pop(index)))
            self.scheduler.pool.release(self.pins.pop(index))
            self.scheduler.num_pinned = len({block for pin in self.pins for block in pin})
            self.check()

    # ---- steps ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Launch one step if there is something to run, then commit the oldest if no more may be in flight."""
        if not self.launch() or len(self.flight) >= self.depth:
            self.commit()

    def launch(self) -> bool:
        """Plan and run, if one more step may be in flight and there is something to run."""
        if len(self.flight) >= self.depth:
            return False
        self.draft()
        first = self.scheduler.running[0] if self.scheduler.running else None
        before = self.counts.copy()
        plan = self.scheduler.plan()
        admitted, preempted, evicted = (
            self.counts[name] - before[name] for name in (events.ADMIT, events.PREEMPT, events.EVICT)
        )
        assert not (admitted and preempted), "one was admitted and another preempted in one plan"
        self.counts["preempt for memory"] += preempted
        self.counts["evict for memory"] += evicted
        assert first is None or first.state is State.RUNNING, "the first in order was preempted"
        if plan is None:
            assert self.flight or not self.scheduler.has_work, "work, nothing in flight, and nothing planned"
        else:
            check_plan(plan, self.scheduler)
            record_plan(self, plan, self.counts[events.STEP] * 1e-3)
            self.counts["chunk"] += sum(1 for entry in plan.entries if not entry.num_logits)
            self.flight.append((plan, self.runner.sample(plan)))
        self.check()
        return plan is not None

    def commit(self, failing: int | None = None) -> None:
        """Commit the oldest step in flight; the entry at `failing` could not be sampled."""
        if not self.flight:
            return
        plan, sampled = self.flight.popleft()
        if failing is not None:
            self._fail(plan, failing)
        for entry, tokens in zip(plan.entries, sampled, strict=True):
            sequence = self.scheduler.sequences.get(entry.sequence_id)
            if sequence is None or sequence.epoch != entry.epoch:
                self.counts["stale"] += 1
            elif sequence.is_stepwise and tokens and not entry.num_draft:
                job = self.jobs[sequence.id]  # as where a shape leaves no choice: nothing computed what follows
                tokens += job.expected[sequence.num_output + 1 :][: self.random.randrange(4)]
                self.counts["forced"] += len(tokens) - 1
            elif entry.num_draft:
                accepted = len(tokens) - 1
                share = "all" if accepted == entry.num_draft else "some" if accepted else "none"
                self.counts[f"accepted {share}"] += 1
        before = {job.sequence.id: len(job.sequence.tokens) for job in self.jobs}
        for progress in self.scheduler.commit(plan, sampled):
            sequence = progress.sequence
            assert sequence.tokens[before[sequence.id] :] == progress.tokens and progress.tokens
        self.check()

    def _fail(self, plan: Plan, index: int) -> None:
        sequence = self.scheduler.sequences.get(plan.entries[index % len(plan.entries)].sequence_id)
        if sequence is not None:
            self.jobs[sequence.id].cut = True
            self.counts["fail"] += 1
            self.scheduler.finish(sequence, "error")

    def roll_back(self) -> None:
        """A fault: nothing in flight can be trusted."""
        while self.flight:
            self.scheduler.rollback(self.flight.pop()[0])
            self.counts["rollback"] += 1
            self.check()

    def draft(self) -> None:
        """Guess what running sequences with nothing in flight will say."""
        if self.drafter == "none":
            return
        for sequence in self.scheduler.running:
            if not sequence.num_in_flight and not sequence.draft:
                sequence.draft = self._guess(self.jobs[sequence.id])

    def _guess(self, job: Job) -> list[int]:
        done = job.sequence.num_output
        right = (job.expected + [0] * 8)[done : done + 4]
        if self.drafter == "wrong":
            return [(token + 1) % VOCAB for token in right]
        if self.drafter == "mixed":
            keep = self.random.randrange(5)
            return right[:keep] + [self.random.randrange(VOCAB) for _ in right[keep:]]
        if self.drafter == "overlong":
            return (job.expected[done:] + [0] * 40)[:40]
        return right

    def run(self) -> None:
        """Until nothing is left to do: a few steps per token at most, however small the budget."""
        for job in self.jobs:
            self.resume(job)
        most = 1_000 + 8 * sum(len(s.tokens) + s.max_tokens for s in self.scheduler.sequences.values())
        for _ in range(most):
            if not self.scheduler.sequences and not self.flight:
                break
            self.step()
        else:
            raise AssertionError(f"not idle after {most} steps: {list(self.scheduler.sequences.values())}")
        for job in self.jobs:
            assert job.ended
        while self.pins:
            self.unpin()
        check_idle(self.scheduler)
        self.reset_cache()
        assert self.scheduler.pool.num_available == self.limits.num_blocks

    # ---- the truth --------------------------------------------------------------------------------------------

    def check(self) -> None:
        check(self.scheduler, [block for pin in self.pins for block in pin])
        for job in self._unchecked[:]:
            sequence = job.sequence
            known = job.prompt + job.expected
            assert sequence.tokens == known[: len(sequence.tokens)], f"sequence {sequence.id} said something else"
            if sequence.state is State.FINISHED:
                self._unchecked.remove(job)
                if not job.cut:
                    assert len(sequence.tokens) == len(known), f"sequence {sequence.id} ended early"
                    self._check_end(sequence, known[-1])

    def _check_end(self, sequence: Sequence, last: int) -> None:
        if last in self.models[0].eos_ids:
            assert (sequence.finish_reason, sequence.stop_reason) == ("stop", None)
        elif last in sequence.stop_ids:
            assert (sequence.finish_reason, sequence.stop_reason) == ("stop", last)
        else:
            assert (sequence.finish_reason, sequence.stop_reason) == ("length", None)


def random_limits(r: random.Random) -> Limits:
    """Small and tight: preemption, eviction and chunking are the rule."""
    seqs = r.randint(1, 8)
    chunked = r.random() < 0.8
    return Limits(
        block_size=r.choice([1, 2, 4, 16]),
        num_blocks=r.choice([r.randint(3, 40), r.randint(3, 40), 150]),
        max_model_len=80,
        max_num_seqs=seqs,
        max_batch_tokens=r.randint(seqs, 64) if chunked else r.randint(80, 120),
        prefix_caching=r.random() < 0.8,
        chunked_prefill=chunked,
    )


def random_prompt(r: random.Random, longest: int = 48) -> list[int]:
    """A shared beginning, at times after another first token, and a short tail of few tokens."""
    prompt = SHARED[: r.randint(1, longest - 8)] + [r.randrange(3) for _ in range(r.randint(0, 8))]
    return [r.choice([0, 0, 90]), *prompt[1:]]


def random_add(world: World, r: random.Random) -> None:
    world.add(
        random_prompt(r),
        r.randint(1, 20),
        n=r.choice([1, 1, 2, 3]),
        priority=r.choice([0, 0, 0, -1, 1]),
        salt=r.choice([None, None, "a"]),
        stop_ids=r.choice([(), (), (5, 6, 7, 8)]),
        prompt_logprobs=r.random() < 0.1,
        forced=r.random() < 0.2,
    )


def unluckiest(sequences: list[Sequence]) -> Sequence:
    return max(sequences, key=lambda sequence: sequence.num_preemptions)


ACTS: dict[str, tuple[int, Callable[[World, random.Random, Job], object]]] = {  # how often, and what
    "step": (24, lambda world, r, job: world.step()),
    "launch": (6, lambda world, r, job: world.launch()),
    "commit": (2, lambda world, r, job: world.commit()),
    "add": (10, lambda world, r, job: random_add(world, r)),
    "abort": (2, lambda world, r, job: world.abort(job)),
    "preempt": (4, lambda world, r, job: world.preempt(unluckiest(world.scheduler.running[1:] or [job.sequence]))),
    "park": (2, lambda world, r, job: world.park(job)),
    "resume": (2, lambda world, r, job: world.resume(job)),
    "reset": (1, lambda world, r, job: world.reset_cache()),
    "pin": (2, lambda world, r, job: world.pin(job, r.choice([0, 0, 1]))),
    "unpin": (1, lambda world, r, job: world.unpin(r.randrange(8))),
    "roll back": (1, lambda world, r, job: world.roll_back()),
    "fail": (1, lambda world, r, job: world.commit(failing=r.randrange(8))),
    "resize": (1, lambda world, r, job: world.resize(r.randint(3, 60))),
    "pace": (1, lambda world, r, job: world.pace(r.random())),
    "draft": (2, lambda world, r, job: setattr(world, "drafter", r.choice(DRAFTERS))),
}
ALWAYS = ("step", "add")


def random_life(seed: int, num_acts: int = 60) -> Counter:
    """A whole world from its beginning to idle; raises AssertionError where the policy is wrong.

    Each life leaves some acts out and does others more often, so that long runs of one of them happen too.
    """
    r = random.Random(seed)
    world = World(random_limits(r), depth=1 + seed % 2, drafter=r.choice(DRAFTERS), eos_every=r.choice([0, 8, 40]))
    world.add([1], 3)
    weights = [weight * (1 if name in ALWAYS else r.choice([0, 1, 1, 3])) for name, (weight, _) in ACTS.items()]
    for name in r.choices(list(ACTS), weights, k=num_acts):
        ACTS[name][1](world, r, r.choice(world.jobs))
    world.run()
    return world.counts
