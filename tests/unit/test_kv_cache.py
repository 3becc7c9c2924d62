"""Storage of blocks, 64-bit addressing, and how much of it there should be."""

import resource
from pathlib import Path

import pytest
import torch

from embedllm.errors import InvalidRequest, OutOfMemory
from embedllm.kv_cache import KVCache, KVGroup, auto_num_blocks
from embedllm_kernels import reference

GROUP = KVGroup(layers=3, kv_heads=2, k_dim=4, v_dim=5, dtype=torch.float32)


def test_sizes() -> None:
    assert GROUP.width == 18
    assert GROUP.bytes_per_token == 3 * 18 * 4
    assert GROUP.bytes_per_block(16) == 3 * 18 * 4 * 16
    cache = KVCache(GROUP, 7, 16)
    assert cache.num_bytes == 7 * GROUP.bytes_per_block(16)


def test_a_block_is_one_run_of_bytes_across_all_layers() -> None:
    cache = KVCache(GROUP, 5, 4)
    assert cache.blocks[2].is_contiguous()
    assert cache.blocks[2].nbytes == GROUP.bytes_per_block(4)
    cache.blocks.zero_()
    for layer in range(3):
        cache.layer(layer)[2].fill_(1.0)
    assert bool(cache.blocks[2].eq(1).all())
    assert float(cache.blocks.sum()) == 4 * 3 * 18


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_rows_are_where_the_reference_stores_them(block_size: int, test_seed: int) -> None:
    generator = torch.Generator().manual_seed(test_seed)
    cache = KVCache(GROUP, 6, block_size)
    slots = torch.randperm(6 * block_size, generator=generator)[:4].int()
    rows = torch.randn(4, 18, generator=generator)
    for layer in range(3):
        cache.blocks.zero_()
        expected = torch.zeros_like(cache.layer(layer))
        reference.kv_store(expected, rows, slots)
        cache.rows(layer).index_copy_(0, cache.row_index(slots), rows)
        assert torch.equal(cache.layer(layer), expected)
        assert float(cache.blocks.abs().sum()) == pytest.approx(float(rows.abs().sum()))


def test_copies_read_before_they_write() -> None:
    cache = KVCache(GROUP, 6, 2)
    cache.blocks.copy_(torch.arange(6.0)[:, None, None, None].expand_as(cache.blocks))
    cache.copy_blocks([(0, 1), (1, 2), (5, 4)])
    assert cache.blocks[:, 1, 0, 0].tolist() == [0, 0, 1, 3, 5, 5]
    cache.copy_blocks([])


def test_addresses_are_computed_in_64_bits() -> None:
    """An 8B model's block has 2^20 values: 32-bit arithmetic wraps at block 2,048. Memory is reserved, not touched."""
    group = KVGroup(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype=torch.bfloat16)
    assert group.bytes_per_block(16) == 2 * 2**20
    cache = KVCache(group, 4_096, 16)  # 8 GiB of addresses
    slots = torch.tensor([0, 2_047 * 16, 2_048 * 16, 4_095 * 16 + 15], dtype=torch.int32)
    index = cache.row_index(slots)
    assert index.dtype == torch.int64
    rows = torch.arange(1.0, 5.0)[:, None].expand(-1, group.width).bfloat16()
    cache.rows(31).index_copy_(0, index, rows)
    assert cache.layer(31)[4_095, 15].eq(4).all()
    assert cache.layer(31)[2_048, 0].eq(3).all()
    assert cache.layer(31).index_select(0, torch.tensor([4_095]))[0, 15].eq(4).all()
    cache.free()


def test_row_numbers_beyond_32_bits() -> None:
    """Against Python's integers, on a cache that has no memory at all."""
    group = KVGroup(layers=80, kv_heads=1, k_dim=1, v_dim=1, dtype=torch.float32)
    cache = KVCache(group, 2**27 - 1, 16, device="meta")
    slots = [0, 15, 16, 2**20 + 3, (2**27 - 1) * 16 - 1]
    expected = [slot // 16 * 80 * 16 + slot % 16 for slot in slots]
    assert expected[-1] > 2**37
    assert cache.row_index(torch.tensor(slots, dtype=torch.int32)).tolist() == expected


def test_reserving_does_not_touch_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    cache = KVCache(GROUP, 2**20, 16)  # 3.4 GB
    assert resident() - before < 50e6
    cache.free()


def test_free_gives_the_memory_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    cache = KVCache(GROUP, 2**15, 16)
    cache.blocks.fill_(1.0)  # 113 MB
    full = resident()
    cache.free()
    assert full - resident() > 100e6
    cache.free()
    with pytest.raises(IndexError):
        cache.layer(0)


def test_refusals() -> None:
    with pytest.raises(InvalidRequest, match="num_blocks=0"):
        KVCache(GROUP, 0, 16)
    with pytest.raises(InvalidRequest, match="is over 2147483647 tokens"):
        KVCache(GROUP, 2**30, 16)
    huge = KVGroup(layers=1_000, kv_heads=1_000, k_dim=1_000, v_dim=1_000, dtype=torch.float32)
    with pytest.raises(OutOfMemory, match="takes 8,000,000,000,000,000 bytes"):
        KVCache(huge, 1_000_000, 1)


def test_auto_num_blocks() -> None:
    size = GROUP.bytes_per_block(16)
    options = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 33}
    assert auto_num_blocks(GROUP, **options, free=10**12) == 4 * 3
    assert auto_num_blocks(GROUP, **options, free=size * 11) == 5
    with pytest.raises(OutOfMemory, match=f"one KV block takes {size:,} bytes"):
        auto_num_blocks(GROUP, **options, free=size)
