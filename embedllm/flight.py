"""Steps that were launched and not read yet: the device computes one while the host reads another and plans a third.

Owns their order. Knows nothing of what a step is. Invariant: steps are read, or rolled back, in the order that policy
asks for: read oldest first, rolled back newest first; after a failure nothing is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from embedllm.faults import StepStopped
from embedllm.plan_types import Plan

R = TypeVar("R")


class Flight(Generic[R]):
    """At most `depth` steps.

    `launch(plan)` queues a step and returns what waits for its result; `take(plan, result)` is given results in order;
    `rollback(plan)` forgets one that brings none; `blame(error)` hears of every failure. `take` may not fail.
    """

    def __init__(
        self,
        depth: int,
        launch: Callable[[Plan], Callable[[], R]],
        take: Callable[[Plan, R], None],
        rollback: Callable[[Plan], None],
        blame: Callable[[BaseException], None],
    ) -> None:
        self.depth = depth
        self._launch, self._take, self._rollback, self._blame = launch, take, rollback, blame
        self._steps: deque[tuple[Plan, Callable[[], R]]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Forget all steps; whoever asks has forgotten their sequences too."""
        self._steps.clear()

    def advance(self, plan: Plan | None) -> bool:
        """Launch a step, if there is one, and read the oldest where `depth` are in flight or nothing was launched.

        False after a failure: those launched before it were read, the others rolled back.
        """
        if plan is not None:
            try:
                self._steps.append((plan, self._launch(plan)))
            except StepStopped:
                raise
            except BaseException as error:  # SystemExit in a hook is that step's, not the engine's
                self._rollback(plan)
                self._blame(error)
                while self._steps and self._read_oldest():
                    pass
                return False
            if len(self._steps) < self.depth:
                return True
        return not self._steps or self._read_oldest()

    def _read_oldest(self) -> bool:
        plan, read = self._steps[0]
        try:
            result = read()
        except StepStopped:
            raise
        except BaseException as error:
            while self._steps:
                self._rollback(self._steps.pop()[0])
            self._blame(error)
            return False
        self._steps.popleft()
        self._take(plan, result)
        return True
