"""What the engine itself says to whoever records: what a step will run, to one recorder or to several.

Knows nobody who records. Invariant: it is called only while somebody does.
"""

from __future__ import annotations

from collections.abc import Sequence

from embedllm import events
from embedllm.events import Event, Recorder
from embedllm.plan_types import Plan


def record_plan(recorder: Recorder, plan: Plan, now: float) -> None:
    """Write down what a step will run. now: seconds of the engine's clock."""
    recorder.append((events.STEP, plan.number, len(plan.entries), plan.num_tokens, int(now * 1e6)))
    for source, destination in plan.copies:
        recorder.append((events.COPY, source, destination))
    for entry in plan.entries:
        recorder.append((events.SCHEDULE, entry.sequence_id, entry.start, entry.num_tokens))


class Recorders:
    """Several recorders as one."""

    def __init__(self, members: Sequence[Recorder]) -> None:
        self.members = tuple(members)

    def append(self, event: Event) -> None:
        for member in self.members:
            member.append(event)
