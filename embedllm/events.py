"""Names of what the engine can record about itself.

Owns the vocabulary of traces; recording itself is a list append by whoever holds a recorder. An event is a plain
tuple `(name, *ints)`. Invariant: with no recorder attached nothing is built, only one attribute is looked at.
"""

from __future__ import annotations

from typing import Protocol

Event = tuple[object, ...]

STEP = "step"  # (number, num_entries, num_tokens)
QUEUE = "queue"  # (sequence_id, num_prompt_tokens)
ADMIT = "admit"  # (sequence_id, row, num_cached_tokens)
SCHEDULE = "schedule"  # (sequence_id, start, num_tokens)
COMMIT = "commit"  # (sequence_id, num_computed, num_new_tokens)
PREEMPT = "preempt"  # (sequence_id,)
FORK = "fork"  # (parent_sequence_id, sequence_id)
PARK = "park"  # (sequence_id,): its reader went away for a while
FINISH = "finish"  # (sequence_id, reason)
ALLOCATE = "allocate"  # (block,)
SHARE = "share"  # (block, ref_count)
FREE = "free"  # (block,): nobody refers to it and its content is not cached
CACHE = "cache"  # (block, node): full and findable by its content
EVICT = "evict"  # (block, node)
IDLE = "idle"  # (block,): cached, nobody refers to it, may be evicted
COPY = "copy"  # (source, destination)
START_OVER = "start_over"  # (): policy failed, every block is computed again; the recording ends here


class Recorder(Protocol):
    """Anything with `append`: a list, or the ring of a trace."""

    def append(self, event: Event, /) -> None: ...
