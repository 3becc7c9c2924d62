"""Names of what the engine can record about itself.

Owns the vocabulary of traces; recording itself is a list append by whoever holds a recorder. An event is a plain
tuple `(name, *ints)`. Invariant: with no recorder attached nothing is built, only one attribute is looked at.
"""

from __future__ import annotations

from typing import Protocol

Event = tuple[object, ...]

STEP = "step"  # (number, num_entries, num_tokens, microseconds of the engine's clock)
QUEUE = "queue"  # (sequence_id, num_prompt_tokens, max_tokens): it waits to run, at first or again
ADMIT = "admit"  # (sequence_id, row, num_cached_tokens)
SCHEDULE = "schedule"  # (sequence_id, start, num_tokens)
COMMIT = "commit"  # (sequence_id, num_computed, num_new_tokens)
PREEMPT = "preempt"  # (sequence_id,)
FORK = "fork"  # (parent_sequence_id, sequence_id): it runs from here on
TABLE = "table"  # (sequence_id, *blocks): these are now at the end of its block table, which is empty while it waits
TRIM = "trim"  # (sequence_id, num_blocks): its block table is cut to so many
PARK = "park"  # (sequence_id,): its reader went away for a while
FINISH = "finish"  # (sequence_id, reason)
ALLOCATE = "allocate"  # (block,)
SHARE = "share"  # (block, ref_count)
RELEASE = "release"  # (block, ref_count): referred to once less, and still by somebody
FREE = "free"  # (block,): nobody refers to it and its content is not cached
CACHE = "cache"  # (block, node): full and findable by its content
EVICT = "evict"  # (block, node)
IDLE = "idle"  # (block,): cached, nobody refers to it, may be evicted
PIN = "pin"  # (pin_id, *blocks): held until `unpin`
UNPIN = "unpin"  # (pin_id,)
COPY = "copy"  # (source, destination)
RESIZE = "resize"  # (num_blocks,): the pool has so many blocks now, and all of them are free
START_OVER = "start_over"  # (): policy failed, every block is computed again; the recording ends here


class Recorder(Protocol):
    """Anything with `append`: a list, or the ring of a trace."""

    def append(self, event: Event, /) -> None: ...
