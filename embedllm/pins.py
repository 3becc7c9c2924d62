"""Blocks that are kept in the prefix cache because somebody asked for it.

Owns which pin holds which blocks, and the limits on how many there may be. Knows no text. Invariant: pins never take
more than half the pool, nor so much that an admitted request could no longer run.
"""

from __future__ import annotations

import itertools

from embedllm import events
from embedllm.errors import InvalidRequest
from embedllm.scheduler import Scheduler


class Pins:
    """The pins of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._ids = itertools.count(1)
        self.held: dict[int, list[int]] = {}  # pin id -> blocks, each with one reference

    @property
    def references(self) -> list[int]:
        """Every pinned block, once per pin."""
        return [block for blocks in self.held.values() for block in blocks]

    def check(self, tokens: list[int], salt: str | None) -> None:
        """Raises InvalidRequest if the full blocks of these tokens could not be pinned now."""
        limits = self._scheduler.limits
        if not limits.prefix_caching:
            raise InvalidRequest(
                "nothing can be pinned without the prefix cache; open the LLM with prefix_caching=True"
            )
        num_full = len(tokens) // limits.block_size
        if num_full == 0:
            raise InvalidRequest(
                f"{len(tokens)} tokens fill no block of {limits.block_size}, and only full blocks are shared: pin more"
            )
        held = set(self.references)
        num_new = num_full - len(held.intersection(self._find(tokens, salt)))
        pinned = len(held) + num_new
        if pinned > limits.num_blocks // 2:
            raise InvalidRequest(
                f"{len(tokens)} tokens would bring pins to {pinned} of {limits.num_blocks} blocks; at most half may be"
            )
        unfinished = self._scheduler.sequences.values()
        largest = max((limits.blocks_for(sequence.max_slots) for sequence in unfinished), default=0)
        if largest > limits.num_blocks - pinned:
            raise InvalidRequest(
                f"an admitted request may need {largest} blocks and this pin would leave {limits.num_blocks - pinned}; "
                "pin after it has finished, or give the cache more memory"
            )

    def add(self, tokens: list[int], salt: str | None) -> tuple[int, int]:
        """Hold the cached full blocks of these tokens; returns the pin's id and how many blocks it holds.

        The id is 0, and nothing is held, if not all of them are cached (any more). Raises InvalidRequest as `check`.
        """
        self.check(tokens, salt)
        blocks = self._find(tokens, salt)
        if len(blocks) < len(tokens) // self._scheduler.limits.block_size:
            return 0, 0
        self._scheduler.pool.share(blocks)
        pin_id = next(self._ids)
        self.held[pin_id] = blocks
        if self._scheduler.recorder is not None:
            self._scheduler.recorder.append((events.PIN, pin_id, *blocks))
        self._count()
        return pin_id, len(blocks)

    def remove(self, pin_id: int) -> None:
        """Let a pin's blocks go; one that is gone already is ignored."""
        blocks = self.held.pop(pin_id, [])
        if blocks and self._scheduler.recorder is not None:
            self._scheduler.recorder.append((events.UNPIN, pin_id))
        self._scheduler.pool.release(blocks)
        self._count()

    def forget(self, scheduler: Scheduler) -> None:
        """A new scheduler knows none of them."""
        self.held.clear()
        self._scheduler = scheduler

    def _find(self, tokens: list[int], salt: str | None) -> list[int]:
        return self._scheduler.pool.find(tokens, salt)[0]

    def _count(self) -> None:
        self._scheduler.num_pinned = len(set(self.references))
