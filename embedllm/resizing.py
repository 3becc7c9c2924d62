"""Another number of KV blocks while requests run.

Owns the order: refuse what cannot be, read what is in flight, give the old blocks back, make new ones, let everybody
compute again. Knows no requests, only sequences. Invariant: there are never two caches at once, and whatever fails, the
policy's blocks are as many as the cache's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from embedllm import events
from embedllm.config import Limits
from embedllm.errors import EngineDead, InvalidRequest
from embedllm.flight import Flight
from embedllm.scheduler import Scheduler
from embedllm.sequence import Sequence, State


def resize(
    limits: Limits,
    scheduler: Scheduler,
    flight: Flight[Any],
    remake: Callable[[int], None] | None,
    adopt: Callable[[Limits], None],
) -> None:
    """Go on with as many blocks as `limits` say. `remake(num_blocks)` frees the cache and makes another one;
    `adopt(limits)` begins a policy that knows nothing to be computed.

    Raises InvalidRequest, with nothing changed, where that cannot be; what `remake` raises, with as many blocks as
    before; EngineDead where even those are not given again.
    """
    before = scheduler.limits
    if limits == before:
        return
    if remake is None:
        raise InvalidRequest("this model's runner has no resize(num_blocks), so its KV cache stays as it is")
    if scheduler.num_pinned:
        raise InvalidRequest("pinned blocks would be lost: unpin() what llm.cache.pin() gave before resize_kv()")
    needed = max((limits.blocks_for(s.max_slots) for s in scheduler.sequences.values()), default=0)
    if needed > limits.num_blocks:
        raise InvalidRequest(
            f"a request that has not finished may need {needed} KV blocks, and there would be {limits.num_blocks}: "
            "wait for it, cancel it, or keep more blocks"
        )
    while flight:
        flight.advance(None)
    kept = before
    try:
        remake(limits.num_blocks)
        kept = limits
    except BaseException as error:
        try:
            remake(before.num_blocks)
        except BaseException as last:
            raise EngineDead(f"the KV cache could not be resized, nor made again as it was: {last!r}") from error
        raise
    finally:
        if scheduler.recorder is not None:
            scheduler.recorder.append((events.RESIZE, kept.num_blocks))
        adopt(kept)


def begin_again(scheduler: Scheduler, sequences: Iterable[Sequence]) -> None:
    """Add sequences that another scheduler had: their tokens stay, their KV is computed again."""
    for sequence in sequences:
        is_parked = sequence.state is State.PARKED
        sequence.forks = []
        sequence.forget()
        scheduler.add(sequence)
        if is_parked:
            scheduler.park(sequence)
