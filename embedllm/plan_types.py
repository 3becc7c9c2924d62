"""What one step will run, as plain numbers.

Owns the shapes that cross from policy (scheduler) to numerics (runner). A plan holds no references to sequences, so
a trace or another rank can replay it. Invariant: an entry's tokens occupy positions start .. start+len(tokens)-1 and
its block table covers all of them; no two entries write the same slot.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

UNKNOWN = -1  # a token sampled by a step still in flight: the runner takes it from its own per-row state


@dataclass(slots=True)
class Entry:
    """One sequence's part of a step.

    `tokens` are the ids whose KV is computed now (UNKNOWN where the id is still on the device), the last `num_draft`
    of them guesses. Logits are wanted after the last `num_logits` tokens: 0 for a chunk that ends inside the known
    tokens, else 1 + num_draft. `wants_hidden` asks for hidden states of every token.
    """

    sequence_id: int
    epoch: int
    row: int
    start: int
    tokens: list[int]
    num_draft: int
    num_logits: int
    blocks: array[int]  # "i": block ids, one per block_size positions from position 0
    wants_hidden: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class Plan:
    """One step: block copies first, then every entry's forward."""

    number: int
    entries: list[Entry]
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source block, destination block)

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.tokens) for entry in self.entries)

    def subset(self, entries: list[Entry]) -> Plan:
        """The same step for some of its entries, with the copies that write into their blocks."""
        owned = {block for entry in entries for block in entry.blocks}
        return Plan(self.number, entries, [copy for copy in self.copies if copy[1] in owned])
