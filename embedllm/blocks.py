"""The pool of KV blocks: who refers to each, which are findable by content, which go first when room is needed.

Owns ids, reference counts and the prefix tree; knows no sequences, no device, no bytes. A cached block is keyed by
its content itself, (parent node, its tokens), so a hit is an exact comparison and never a matter of hash luck.
Invariant: every block is exactly one of in use (ref > 0), idle (ref 0, cached, evictable) or free (ref 0, not cached).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from embedllm import events
from embedllm.events import Recorder

Node = int | str | None  # a tree node: ints for cached blocks; a salt (or None) is the root of its own tree


class BlockPool:
    """`num_blocks` blocks of `block_size` slots.

    Eviction takes the block that has been idle longest; sequences release their tails first, so shared heads live
    longest. Every operation is O(blocks named), none depends on the size of the pool.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.recorder: Recorder | None = None
        self._refs = array("i", bytes(4 * num_blocks))
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._block_of: dict[tuple[Node, ...], int] = {}
        self._key_of: dict[int, tuple[Node, ...]] = {}
        self._node_of: dict[int, int] = {}
        self._next_node = 0  # node ids are never used again, so a child of an evicted block cannot be found by mistake

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    @property
    def idle_blocks(self) -> list[int]:
        """Cached blocks that nobody refers to, the next to be evicted first."""
        return list(self._idle)

    def refs(self, block: int) -> int:
        return self._refs[block]

    def copy(self) -> tuple[array[int], dict[int, int]]:
        """The references of every block, and the node of every cached one."""
        return self._refs[:], dict(self._node_of)

    def allocate(self) -> int:
        """A block with one reference and undefined content. The caller checked `num_available`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._uncache(block)
        self._refs[block] = 1
        if self.recorder is not None:
            self.recorder.append((events.ALLOCATE, block))
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each; idle blocks come back into use."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
            if self.recorder is not None:
                self.recorder.append((events.SHARE, block, self._refs[block]))

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each, last block first."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._retire(block)
            elif self.recorder is not None:
                self.recorder.append((events.RELEASE, block, self._refs[block]))

    def _retire(self, block: int) -> None:
        if block in self._key_of:
            self._idle[block] = None
            name = events.IDLE
        else:
            self._free.append(block)
            name = events.FREE
        if self.recorder is not None:
            self.recorder.append((name, block))

    def find(self, tokens: Sequence[int], root: Node) -> tuple[list[int], Node]:
        """The cached blocks that hold the longest prefix of `tokens` in whole blocks, and the last one's node."""
        blocks: list[int] = []
        node = root
        size = self.block_size
        for start in range(0, len(tokens) - size + 1, size):
            block = self._block_of.get((node, *tokens[start : start + size]))
            if block is None:
                break
            blocks.append(block)
            node = self._node_of[block]
        return blocks, node

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these nobody refers to (sharing them takes from `num_available`)."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def cache(self, block: int, parent: Node, tokens: Sequence[int]) -> int:
        """Make a full, committed block findable as `tokens` after `parent`; returns its node.

        Where an equal block is cached already, that one stays the findable one and its node is returned.
        """
        key = (parent, *tokens)
        known = self._block_of.get(key)
        if known is not None:
            return self._node_of[known]
        if block in self._key_of:  # findable after a parent that is gone
            self._uncache(block)
        self._next_node += 1
        self._block_of[key] = block
        self._key_of[block] = key
        self._node_of[block] = self._next_node
        if self.recorder is not None:
            self.recorder.append((events.CACHE, block, self._next_node))
        return self._next_node

    def forget(self, blocks: Iterable[int]) -> None:
        """Make these blocks, which are in use, findable no more: their content is not to be trusted."""
        for block in blocks:
            if block in self._key_of:
                self._uncache(block)

    def reset_cache(self) -> int:
        """Forget every cached content; blocks in use stay in use. Returns how many idle blocks became free."""
        idle = list(self._idle)
        self._idle.clear()
        for block in list(self._key_of):
            self._uncache(block)
        for block in idle:
            self._retire(block)
        return len(idle)

    def _uncache(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
        node = self._node_of.pop(block)
        if self.recorder is not None:
            self.recorder.append((events.EVICT, block, node))

    def cached_tokens(self, block: int) -> tuple[Node, ...] | None:
        """The tokens a cached block is findable by, or None if it is not cached."""
        key = self._key_of.get(block)
        return key[1:] if key else None

    def check(self, references: Iterable[int]) -> None:
        """Recount everything. `references` lists every block id once per reference held. Raises AssertionError."""
        counted = array("i", bytes(4 * self.num_blocks))
        for block in references:
            counted[block] += 1
        if counted != self._refs:
            wrong = [b for b in range(self.num_blocks) if counted[b] != self._refs[b]]
            raise AssertionError(f"reference counts differ: {[(b, self._refs[b], counted[b]) for b in wrong[:8]]}")
        free, idle = set(self._free), set(self._idle)
        used = {b for b in range(self.num_blocks) if self._refs[b] > 0}
        if len(free) != len(self._free) or free & idle or (free | idle) & used:
            raise AssertionError("a block is in two places")
        if len(free) + len(idle) + len(used) != self.num_blocks:
            lost = set(range(self.num_blocks)) - free - idle - used
            raise AssertionError(f"blocks leaked: {sorted(lost)[:8]}")
        if free & self._key_of.keys() or not idle <= self._key_of.keys():
            raise AssertionError("a free block is findable, or an idle one is not")
        if {self._block_of[key]: key for key in self._block_of} != self._key_of:
            raise AssertionError("the prefix tree and the blocks disagree")
        if self._node_of.keys() != self._key_of.keys():
            raise AssertionError("a cached block has no node")
