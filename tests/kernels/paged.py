"""Random ragged batches over block tables, with NaN wherever no token was written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ragged:
    """A cache whose unwritten slots are NaN, and queries of several sequences over it."""

    q: Tensor
    cache: Tensor
    tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    num_kv_heads: int
    keys: list[Tensor]  # per sequence [length, kv_heads, k_dim]
    values: list[Tensor]


def draw(
    seed: int,
    spans: list[tuple[int, int]],  # (sequence length, number of queries)
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
) -> Ragged:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_heads, num_kv_heads = heads
    width = num_kv_heads * sum(dims)
    needed = [-(-length // block_size) for length, _ in spans]
    num_blocks = sum(needed) + 3
    # One layer of several: its blocks are not contiguous with each other.
    cache = torch.full((num_blocks, layers, block_size, width), torch.nan, dtype=dtype)[:, layers // 2]
    order = torch.randperm(num_blocks, generator=generator)
    tables = torch.zeros((len(spans), max(needed)), dtype=torch.int32)
    keys, values, used = [], [], 0
    for i, (length, _) in enumerate(spans):
        blocks = order[used : used + needed[i]]
        used += needed[i]
        tables[i, : needed[i]] = blocks
        keys.append(normal(length, num_kv_heads, dims[0]))
        values.append(normal(length, num_kv_heads, dims[1]))
        rows = torch.cat((keys[i].flatten(1), values[i].flatten(1)), 1)
        for position in range(length):
            cache[blocks[position // block_size], position % block_size] = rows[position]
    queries = [count for _, count in spans]
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([length for length, _ in spans], dtype=torch.int32)
    q = normal(sum(queries), num_heads, dims[0])
    return Ragged(q, cache, tables, starts, lengths, num_kv_heads, keys, values)


# Mixed steps: decodes of many lengths, chunks from the start and from the middle, drafts of a few tokens.
MIXES = {
    "one token": [(1, 1)],
    "decodes": [(1, 1), (4, 1), (5, 1), (17, 1), (33, 1)],
    "equal decodes": [(16, 1)] * 5,
    "whole prompts": [(1, 1), (3, 3), (9, 9), (21, 21)],
    "chunks": [(5, 2), (13, 7), (30, 11), (31, 31)],
    "drafts": [(9, 4), (10, 4), (25, 4), (40, 4)],
    "everything": [(3, 1), (70, 1), (12, 4), (20, 4), (8, 8), (35, 19)],
}
