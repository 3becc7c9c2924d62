"""Scheduler and pool under a state machine, against an exact oracle.

Hypothesis chooses what an owner of the scheduler does and turns a random subset of the rules off in each case, so long
runs of few rules appear too. After every act everything is recounted; at the end every sequence has said what HashLM
says over a plain list. EMBEDLLM_POLICY_CASES sets the number of cases.
"""

import os
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from embedllm.config import Limits
from tests.engine.policy import DRAFTERS, SHARED, World

NUM_CASES = int(os.environ.get("EMBEDLLM_POLICY_CASES", "2000"))
BATCH = min(500, NUM_CASES // 2)
MOSTLY = st.sampled_from([True, True, True, False])
INDEX = st.integers(0, 15)  # which of the jobs, rows or pins there are

HAPPENS = ["preempt for memory", "evict for memory", "hit", "chunk", "fork", "copy", "stale", "rollback"]
HAPPENS += ["accepted all", "accepted some", "accepted none", "park", "pin", "fail", "forced", "refused", "resize"]
HAPPENS += [f"abort {state}" for state in ("unborn", "waiting", "running", "parked", "finished")]


def prompt(num_shared: int, tail: int) -> list[int]:
    """A shared beginning, or one with another first token, and the digits of `tail` in base 3."""
    tokens = SHARED[:num_shared]
    tail, last = divmod(tail, 2)
    while tail or not tokens:
        tail, digit = divmod(tail, 3)
        tokens.append(digit)
    return [90, *tokens[1:]] if last else tokens


class PolicyMachine(RuleBasedStateMachine):
    depth = 1
    totals: ClassVar[Counter]

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 16]),
        num_blocks=st.integers(3, 40),
        num_seqs=st.integers(1, 8),
        budget=st.integers(1, 64),
        caching=MOSTLY,
        chunked=MOSTLY,
        drafter=st.sampled_from(DRAFTERS),
        eos_every=st.sampled_from([0, 8, 40]),
    )
    def start(
        self,
        block_size: int,
        num_blocks: int,
        num_seqs: int,
        budget: int,
        caching: bool,
        chunked: bool,
        drafter: str,
        eos_every: int,
    ) -> None:
        limits = Limits(
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=72,
            max_num_seqs=num_seqs,
            max_batch_tokens=max(budget, num_seqs) if chunked else 72 + budget,
            prefix_caching=caching,
            chunked_prefill=chunked,
        )
        self.world = World(limits, self.depth, drafter, eos_every)
        self.world.add([1], 3)

    @rule(
        num_shared=st.integers(0, 48),
        tail=st.integers(0, 3**6),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, "a"]),
        stop_ids=st.sampled_from([(), (5, 6, 7, 8)]),
        prompt_logprobs=st.booleans(),
        forced=st.booleans(),
    )
    def add(self, num_shared: int, tail: int, max_tokens: int, **options: object) -> None:
        self.world.add(prompt(num_shared, tail), max_tokens, **options)

    @rule(times=st.integers(1, 10))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.world.step()

    @rule()
    def launch(self) -> None:
        self.world.launch()

    @rule(index=INDEX, twice=st.booleans())
    def abort(self, index: int, twice: bool) -> None:
        job = self.world.job(index)
        for _ in range(1 + twice):
            self.world.abort(job)

    @rule(index=INDEX)
    def preempt(self, index: int) -> None:
        self.world.preempt(self.world.job(index).sequence)

    @rule(index=INDEX)
    def park(self, index: int) -> None:
        self.world.park(self.world.job(index))

    @rule(index=INDEX)
    def resume(self, index: int) -> None:
        self.world.resume(self.world.job(index))

    @rule()
    def reset_cache(self) -> None:
        self.world.reset_cache()

    @rule(index=INDEX, first=st.integers(0, 1))
    def pin(self, index: int, first: int) -> None:
        self.world.pin(self.world.job(index), first)

    @precondition(lambda self: self.world.pins)
    @rule(index=INDEX)
    def unpin(self, index: int) -> None:
        self.world.unpin(index)

    @precondition(lambda self: self.world.flight)
    @rule()
    def roll_back(self) -> None:
        self.world.roll_back()

    @precondition(lambda self: self.world.flight)
    @rule(index=INDEX)
    def fail_row(self, index: int) -> None:
        self.world.commit(failing=index)

    @rule(num_blocks=st.integers(3, 60))
    def resize(self, num_blocks: int) -> None:
        self.world.resize(num_blocks)

    @rule(share=st.floats(0, 1))
    def pace(self, share: float) -> None:
        self.world.pace(share)

    @rule(drafter=st.sampled_from(DRAFTERS))
    def draft(self, drafter: str) -> None:
        self.world.drafter = drafter

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run()
            self.totals.update(self.world.counts)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", range(-(-NUM_CASES // (2 * BATCH))))
@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_every_sequence_says_what_the_oracle_says(num_in_flight: int, batch: int) -> None:
    """Batches, because Hypothesis remembers every case of a run, and because they can run side by side."""

    class Machine(PolicyMachine):
        depth = num_in_flight
        totals: ClassVar[Counter] = Counter()

    seeded = seed(2 * batch + num_in_flight)(Machine)
    run_state_machine_as_test(seeded, settings=settings(max_examples=BATCH, stateful_step_count=80))
    totals = Machine.totals
    print(f"{BATCH} cases with up to {num_in_flight} steps in flight: {dict(sorted(totals.items()))}")
    assert not [name for name in HAPPENS if not totals[name]]
