"""The pool: counts, content, eviction. `pool_life` plays it against a model that remembers what every block holds."""

import random
from collections import Counter

import pytest

from embedllm import events
from embedllm.blocks import BlockPool


def cached(pool: BlockPool, *contents: list[int], root: str | None = None) -> list[int]:
    """Blocks cached one after the other, still in use."""
    blocks, node = [], root
    for tokens in contents:
        blocks.append(pool.allocate())
        node = pool.cache(blocks[-1], node, tokens)
    return blocks


def test_allocate_and_release() -> None:
    pool = BlockPool(4, 2)
    blocks = [pool.allocate() for _ in range(4)]
    assert sorted(blocks) == [0, 1, 2, 3] and pool.num_available == 0 and pool.num_used == 4
    pool.share(blocks[:1])
    pool.release(blocks)
    assert pool.num_available == 3 and pool.refs(blocks[0]) == 1
    pool.check(blocks[:1])
    pool.release(blocks[:1])
    pool.check([])


def test_find_is_an_exact_comparison_of_whole_blocks() -> None:
    pool = BlockPool(8, 2)
    blocks = cached(pool, [1, 2], [3, 4])
    assert pool.find([1, 2, 3, 4], None)[0] == blocks
    assert pool.find([1, 2, 3, 4, 5], None)[0] == blocks
    assert pool.find([1, 2, 3], None)[0] == blocks[:1]
    assert pool.find([1, 2, 9, 4], None)[0] == blocks[:1]
    assert pool.find([3, 4], None)[0] == []  # the same tokens at another place are other content
    assert pool.find([1], None)[0] == [] and pool.find([], None)[0] == []
    assert pool.find([1, 2, 3, 4], "salt")[0] == []
    assert pool.cached_tokens(blocks[1]) == (3, 4)


def test_salts_are_separate_trees() -> None:
    pool = BlockPool(8, 2)
    plain, salted = cached(pool, [1, 2]), cached(pool, [1, 2], root="a")
    assert plain != salted
    assert pool.find([1, 2], None)[0] == plain and pool.find([1, 2], "a")[0] == salted and not pool.find([1, 2], "b")[0]


def test_longest_idle_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, 1)
    old, new = cached(pool, [1], [2]), cached(pool, [8], [9])
    pool.release(old)
    pool.release(new)
    assert [pool.allocate() for _ in range(4)] == [old[1], old[0], new[1], new[0]]


def test_use_makes_young_again() -> None:
    pool = BlockPool(2, 1)
    (a,), (b,) = cached(pool, [1]), cached(pool, [2])
    pool.release([a])
    pool.release([b])
    pool.share([a])
    pool.release([a])
    assert pool.allocate() == b


def test_shared_idle_block_cannot_be_evicted() -> None:
    pool = BlockPool(2, 1)
    (a,) = cached(pool, [1])
    pool.release([a])
    assert pool.num_idle([a]) == 1 and pool.num_available == 2
    pool.share([a])
    assert pool.num_idle([a]) == 0 and pool.num_available == 1
    assert pool.allocate() != a and pool.num_available == 0


def test_equal_content_is_cached_once() -> None:
    pool = BlockPool(4, 1)
    (a,) = cached(pool, [1])
    b = pool.allocate()
    assert pool.cache(b, None, [1]) == pool.cache(a, None, [1])
    assert pool.num_cached == 1 and pool.cached_tokens(b) is None
    pool.release([a, b])
    pool.check([])
    assert pool.num_available == 4 and pool.find([1], None)[0] == [a]


def test_child_of_an_evicted_block_is_not_found_after_another_parent() -> None:
    """Node ids are never used again: not even when the parent's block gets other content."""
    pool = BlockPool(2, 1)
    parent, child = cached(pool, [1], [2])
    pool.release([parent])  # the child stays in use, held by someone else
    assert pool.allocate() == parent
    pool.cache(parent, None, [5])
    assert pool.find([5, 2], None)[0] == [parent]
    assert pool.find([1, 2], None)[0] == []
    pool.check([parent, child])


def test_reset_forgets_content_and_nothing_else() -> None:
    pool = BlockPool(4, 1)
    used, idle = cached(pool, [1]), cached(pool, [2], [3])
    pool.release(idle)
    assert pool.reset_cache() == 2
    assert pool.num_cached == 0 and not pool.find([1], None)[0] and pool.refs(used[0]) == 1
    pool.check(used)
    pool.release(used)
    assert pool.num_available == 4


def test_block_cached_after_a_parent_that_is_gone_can_be_cached_again() -> None:
    pool = BlockPool(4, 1)
    (a,) = cached(pool, [1])
    b = pool.allocate()
    pool.cache(b, 12_345, [2])  # unreachable: nobody is node 12345
    node = pool.cache(a, None, [1])
    pool.cache(b, node, [2])
    assert pool.find([1, 2], None)[0] == [a, b] and pool.num_cached == 2
    pool.check([a, b])


def test_recorder_sees_every_change() -> None:
    pool = BlockPool(1, 1)
    recorder: list[tuple[object, ...]] = []
    pool.recorder = recorder
    block = pool.allocate()
    node = pool.cache(block, None, [1])
    pool.share([block])
    pool.release([block])
    pool.release([block])
    pool.allocate()
    pool.release([block])
    assert recorder == [
        (events.ALLOCATE, block),
        (events.CACHE, block, node),
        (events.SHARE, block, 2),
        (events.RELEASE, block, 1),
        (events.IDLE, block),
        (events.EVICT, block, node),
        (events.ALLOCATE, block),
        (events.FREE, block),
    ]


def damage_references(pool: BlockPool) -> None:
    pool._refs[pool._free[0]] = 1


def damage_leak(pool: BlockPool) -> None:
    pool._free.pop()


def damage_twice_free(pool: BlockPool) -> None:
    pool._free.append(pool._free[0])


def damage_used_is_free(pool: BlockPool) -> None:
    pool._free.append(next(b for b in range(8) if pool._refs[b]))


def damage_used_is_idle(pool: BlockPool) -> None:
    pool._idle[next(b for b in range(8) if pool._refs[b])] = None


def damage_idle_is_not_cached(pool: BlockPool) -> None:
    pool._uncache(next(iter(pool._idle)))


def damage_free_is_cached(pool: BlockPool) -> None:
    pool.cache(pool._free[0], None, [77])


def damage_tree(pool: BlockPool) -> None:
    pool._block_of[(None, 78)] = 0


def damage_node(pool: BlockPool) -> None:
    pool._node_of.popitem()


@pytest.mark.parametrize("damage", [f for name, f in sorted(globals().items()) if name.startswith("damage_")])
def test_check_finds_damage(damage: object) -> None:
    pool = BlockPool(8, 1)
    used, idle = cached(pool, [1]), cached(pool, [2], [3])
    pool.release(idle)
    pool.check(used)
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check(used)


def pool_life(seed: int, num_acts: int = 300) -> Counter:
    """Random use of a pool by holders of block lists; AssertionError if a block is found by what it does not hold."""
    r = random.Random(seed)
    pool = BlockPool(r.randint(2, 12), r.choice([1, 2]))
    content: dict[int, tuple[object, ...]] = {}  # block -> everything from the root to its last token
    held: list[tuple[list[int], object, tuple[object, ...]]] = []  # blocks, node and path of their last one
    counts: Counter = Counter()
    for _ in range(num_acts):
        what = r.random()
        if what < 0.4:  # look up, hold what is found, then compute and cache one more block
            root = r.choice([None, "a"])
            tokens = [r.randrange(2) for _ in range(pool.block_size * r.randint(1, 4))]
            blocks, node = pool.find(tokens, root)
            for i, block in enumerate(blocks, 1):
                path = (root, *tokens[: i * pool.block_size])
                assert content[block] == path, f"block {block} holds {content[block]}, found as {path}"
            pool.share(blocks)
            counts["found"] += len(blocks)
            path = (root, *tokens[: len(blocks) * pool.block_size])
            if pool.num_available and len(path) <= len(tokens):
                block = pool.allocate()
                added = tokens[len(path) - 1 :][: pool.block_size]
                path = (*path, *added)
                content[block] = path
                node = pool.cache(block, node, added)
                blocks = [*blocks, block]
                counts["cached"] += 1
            held.append((blocks, node, path))
        elif what < 0.85 and held:  # give back a part, not always the tail: whoever holds it may hold any part
            blocks, node, path = held.pop(r.randrange(len(held)))
            cut = r.randint(0, len(blocks))
            pool.release(blocks[:cut])
            if blocks[cut:]:
                held.append((blocks[cut:], node, path))
        elif what < 0.98 and pool.num_available:  # plain memory
            block = pool.allocate()
            content[block] = ("other",)
            held.append(([block], None, ()))
            counts["allocated"] += 1
        elif what > 0.99:
            pool.reset_cache()
        pool.check(block for blocks, _, _ in held for block in blocks)
    for blocks, _, _ in held:
        pool.release(blocks)
    pool.check([])
    assert pool.num_available == pool.num_blocks
    return counts


def test_random_use() -> None:
    counts = sum((pool_life(seed) for seed in range(30)), Counter())
    assert min(counts["found"], counts["cached"], counts["allocated"]) > 200, counts
