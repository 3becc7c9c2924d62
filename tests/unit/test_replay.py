"""A State that follows the events equals what scheduler, pool and pins believe, after every act of random lives."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from embedllm import events
from embedllm.replay import State
from tests.engine.policy import ACTS, ALWAYS, DRAFTERS, random_limits
from tests.notebook.recorded import WatchedWorld

NUM_LIVES, NUM_ACTS, BATCHES = 60, 60, 4
ENGINE_ONLY = {events.START_OVER}  # said by the engine, which is not part of a World


def assert_same(followed: State, truth: State, was_resized: bool) -> None:
    """Everything but what is not recorded: since, parents; what counts as a first admission after a resize."""
    assert followed.step == truth.step and followed.block_size == truth.block_size
    assert followed.refs == truth.refs and followed.node == truth.node
    assert followed.pins == truth.pins
    same = {"parent": -1, "num_cached": 0, "is_new": False} if was_resized else {"parent": -1}
    mine, theirs = (
        {s.id: replace(s, **same) for s in state.sequences.values()}  # type: ignore[arg-type]
        for state in (followed, truth)
    )
    assert mine == theirs
    assert followed.totals.preemptions == truth.totals.preemptions
    if not was_resized:
        assert (followed.totals.queries, followed.totals.hits) == (truth.totals.queries, truth.totals.hits)
    assert followed.digest() == truth.digest()


def follow_a_life(seed: int) -> Counter:
    r = random.Random(seed)
    world = WatchedWorld(random_limits(r), depth=1 + seed % 2, drafter=r.choice(DRAFTERS), eos_every=r.choice([0, 40]))
    state = world.truth()
    world.add([1], 3)
    weights = [weight * (1 if name in ALWAYS else r.choice([0, 1, 1, 3])) for name, (weight, _) in ACTS.items()]
    for name in r.choices(list(ACTS), weights, k=NUM_ACTS):
        ACTS[name][1](world, r, r.choice(world.jobs))
        state.apply(world.take())
        assert_same(state, world.truth(), world.counts[events.RESIZE] > 0)
    world.run()
    state.apply(world.take())
    assert_same(state, world.truth(), world.counts[events.RESIZE] > 0)
    return world.counts


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_followed_state_equals_the_truth_after_every_act(batch: int) -> None:
    counts: Counter = Counter()
    for seed in range(batch, NUM_LIVES, BATCHES):
        counts.update(follow_a_life(seed))
    names = {value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)}
    assert not [name for name in names - ENGINE_ONLY if not counts[name]], "something never happened"
    assert counts[events.STEP] > 250


def test_following_may_begin_in_the_middle() -> None:
    """A State copied from a running engine goes on exactly, whatever is in flight, parked, waiting or pinned."""
    for seed in range(20):
        r = random.Random(1_000 + seed)
        world = WatchedWorld(random_limits(r), depth=1 + seed % 2)
        world.add([1, 2, 3], 9)
        state = world.truth()
        for i, name in enumerate(r.choices(list(ACTS), [weight for weight, _ in ACTS.values()], k=80)):
            ACTS[name][1](world, r, r.choice(world.jobs))
            if i % 13 == 0:
                world.take()
                state = world.truth()
            state.apply(world.take())
            assert state.digest() == world.truth().digest()


def test_a_copy_is_a_moment_of_its_own() -> None:
    world = WatchedWorld(random_limits(random.Random(3)))
    world.add([1, 2, 3], 9)
    world.step()
    state = world.truth()
    copy, digest = state.copy(), state.digest()
    world.take()
    world.step()
    world.reset_cache()
    state.apply(world.take())
    assert copy.digest() == digest != state.digest()


def test_the_digest_sees_each_part() -> None:
    """A digest that left something out would prove nothing."""
    state = State(4, 16)
    state.apply([("queue", 1, 5, 7), ("allocate", 0), ("table", 1, 0), ("admit", 1, 0, 0)])
    before = {state.digest()}
    for event in [
        ("share", 0, 2),
        ("cache", 0, 9),
        ("commit", 1, 5, 0),
        ("commit", 1, 5, 1),
        ("pin", 3, 0),
        ("trim", 1, 0),
        ("park", 1),
        ("finish", 1, "stop"),
    ]:
        state.apply([event])
        assert state.digest() not in before, event
        before.add(state.digest())


def test_a_node_travels_as_31_bits_and_is_never_none() -> None:
    state = State(2, 16)
    state.apply([("cache", 0, 2**31), ("cache", 1, 2**31 + 5)])
    assert list(state.node) == [1, 5]


def test_the_recording_ends_where_the_engine_starts_over() -> None:
    state = State(2, 16)
    state.apply([("start_over",)])
    assert state.ended and state.copy().ended
