"""Recordings to draw and to decode: a lively life of scheduler and pool as messages of the wire, with the truth beside.

The policy is the real one; what the sequences say comes from HashLM, so a recording needs no model and is the same on
every run.
"""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

from embedllm import wire
from embedllm.config import Limits
from embedllm.events import STEP, Event
from embedllm.metrics import Metrics
from embedllm.replay import State
from tests.engine.policy import World, random_prompt

LIVELY = Limits(block_size=4, num_blocks=64, max_model_len=96, max_num_seqs=12, max_batch_tokens=40)
RESIZED = (48, 64, 80)


@dataclass
class WatchedWorld(World):
    """A world that keeps what happened since `take`."""

    happened: list[Event] = field(default_factory=list)

    def append(self, event: Event) -> None:
        super().append(event)
        self.happened.append(event)

    def take(self) -> list[Event]:
        happened, self.happened = self.happened, []
        return happened

    @property
    def step_number(self) -> int:
        return self.scheduler.num_plans

    def truth(self) -> State:
        """What is so, copied from scheduler, pool and pins."""
        pins = SimpleNamespace(held=dict(zip(self.pin_ids, self.pins, strict=True)))
        return State.of(SimpleNamespace(scheduler=self.scheduler, metrics=Metrics(), pins=pins, last_beat=0.0))


@dataclass
class Recording:
    """`messages[0]` is a keyframe; each other one is the events of one act, after which `digests` has the truth's.

    `steps[i]` is the number of the newest step after message i. `at_step` has, for each step, the digest of what was
    so when the next one began (or at the end).
    """

    messages: list[bytes] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    at_step: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def act(world: World, r: random.Random, resizing: bool) -> None:
    """One step, and now and then something that users do."""
    scheduler = world.scheduler
    if len(scheduler.waiting) < 3 and r.random() < 0.5:
        prompt = random_prompt(r) if r.random() < 0.7 else [r.randrange(90) for _ in range(r.randint(1, 40))]
        world.add(prompt, r.randint(1, 40), n=r.choice([1, 1, 1, 2, 3]), priority=r.choice([0, 0, 0, -1]))
    elif r.random() < 0.12:
        job = r.choice([job for job in world.jobs if not job.ended] or world.jobs)
        name = r.choice(["abort", "park", "resume", "pin", "unpin", "roll back", "reset", "draft", "resize"])
        if name == "abort":
            world.abort(job)
        elif name == "park":
            world.park(job)
        elif name == "resume":
            for parked in world.jobs:
                world.resume(parked)
        elif name == "pin" and len(world.pins) < 3:
            world.pin(job)
        elif name == "unpin":
            world.unpin()
        elif name == "roll back":
            world.roll_back()
        elif name == "reset" and r.random() < 0.2:
            world.reset_cache()
        elif name == "draft":
            world.drafter = r.choice(["none", "none", "right", "mixed"])
        elif name == "resize" and resizing:
            world.resize(r.choice(RESIZED))
    world.step()


def run(seed: int, num_steps: int, limits: Limits = LIVELY, resizing: bool = True) -> Recording:
    """A life of `num_steps` steps, one message per act, with the truth after each."""
    r = random.Random(seed)
    world = WatchedWorld(limits, depth=1 + seed % 2, eos_every=40)
    world.add(random_prompt(r), 20, n=2)
    for _ in range(20):
        act(world, r, resizing)
    world.take()
    state = world.truth()
    recording = Recording([wire.encode_keyframe(state, 7)], [state.digest()], [state.step])
    last = world.step_number + num_steps
    while world.step_number < last:
        act(world, r, resizing)
        happened = world.take()
        for event in happened:
            if event[0] == STEP:
                recording.at_step[state.step] = state.digest()
            state.apply([event])
        recording.messages.append(wire.encode_events(happened, 7 + len(recording.messages), state.time))
        recording.digests.append(world.truth().digest())
        recording.steps.append(world.step_number)
    recording.at_step[state.step] = recording.digests[-1]
    recording.counts = dict(world.counts)
    return recording


def record(seed: int, num_steps: int, limits: Limits = LIVELY) -> list[bytes]:
    """A keyframe and messages of events: preemption, shared prefixes, forks, copies, eviction, pins, drafts."""
    return run(seed, num_steps, limits, resizing=False).messages
