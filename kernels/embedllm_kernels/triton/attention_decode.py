"""Attention of few queries per sequence, its keys split over several programs, and the merge of the splits.

Knows attention_tile's state of a row; owns its form in memory between the two kernels: sums [tokens · heads, splits,
v_dim] and stats [tokens · heads, splits, 2] = (peak, total), float32. Invariant: a split without keys of its sequence
exits at once and writes nothing, and the merge does not read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from embedllm_kernels.triton.attention_tile import LOWEST, attend, load_queries, start_rows, store_result

# Of one step's tensors, and changing from step to step: no other code may be compiled for them.
VARYING = ["tables", "query_starts", "seq_lens", "table_stride", "stats", "splits"]


@triton.jit
def _tiles(length, count, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """(lowest visible key, first tile, number of tiles) of the last `count` positions of a sequence."""
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - count - WINDOW + 1, 0)
    first = lowest // TILE
    return lowest, first, tl.cdiv(length, TILE) - first


@triton.jit(do_not_specialize=VARYING)
def _decode(
    q, cache, tables, query_starts, seq_lens, sinks, out, sums, stats,
    q_token, q_head, out_token, out_head, block_stride, slot_stride, table_stride, value_column, inner, unit, v_scale,
    GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    DIRECT: tl.constexpr,  # the only split: writes the result
    BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(query_starts + sequence).to(tl.int32)
    count = tl.load(query_starts + sequence + 1).to(tl.int32) - begin
    length = tl.load(seq_lens + sequence).to(tl.int32)
    lowest, tile, tiles = _tiles(length, count, TILE, WINDOW)
    share = tl.cdiv(tiles, tl.num_programs(2))
    if (count <= 0) | (split * share >= tiles):
        return
    m = tl.arange(0, BLOCK_M)
    token, head = begin + m // GROUP, kv_head * GROUP + m % GROUP
    position = tl.minimum(length - count + m // GROUP, length - 1)
    queries = load_queries(q, token, head, begin + count, q_token, q_head, K_DIM, K_PAD)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    inside = token < begin + count
    peak, total = start_rows(sinks, head, token < begin + tl.where(split == 0, count, 0))
    keys = cache + kv_head * K_DIM
    values = cache + value_column + kv_head * V_DIM
    table = tables + sequence.to(tl.int64) * table_stride
    for i in range(tile + split * share, tile + tl.minimum((split + 1) * share, tiles)):
        acc, peak, total = attend(
            acc, peak, total, queries, keys, values, table, i * TILE, lowest, length, position, block_stride,
            slot_stride, inner, unit, K_DIM, V_DIM, BLOCK_SIZE, TILE, WINDOW, CAPPED, True,
        )  # fmt: skip
    acc = acc * v_scale
    if DIRECT:
        acc = acc / total[:, None]
        store_result(out, acc, token, head, begin + count, out_token, out_head, V_DIM, V_PAD)
    else:
        heads, splits = tl.num_programs(1) * GROUP, tl.num_programs(2)
        row = (token.to(tl.int64) * heads + head) * splits + split
        column = tl.arange(0, V_PAD)
        tl.store(sums + row[:, None] * V_DIM + column[None, :], acc, mask=inside[:, None] & (column < V_DIM)[None, :])
        tl.store(stats + row * 2, peak, mask=inside)
        tl.store(stats + row * 2 + 1, total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _merge(
    sums,
    stats,
    query_starts,
    seq_lens,
    out,
    splits,
    out_token,
    out_head,
    QUERIES: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    sequence, query, head = tl.program_id(0) // QUERIES, tl.program_id(0) % QUERIES, tl.program_id(1)
    begin = tl.load(query_starts + sequence).to(tl.int32)
    count = tl.load(query_starts + sequence + 1).to(tl.int32) - begin
    if query >= count:
        return
    length = tl.load(seq_lens + sequence).to(tl.int32)
    _, _, tiles = _tiles(length, count, TILE, WINDOW)
    used = tl.cdiv(tiles, tl.cdiv(tiles, splits))
    token = (begin + query).to(tl.int64)
    split, column = tl.arange(0, SPLITS_PAD), tl.arange(0, V_PAD)
    row = (token * tl.num_programs(1) + head) * splits + split
    peak = tl.load(stats + row * 2, mask=split < used, other=LOWEST)
    total = tl.load(stats + row * 2 + 1, mask=split < used, other=0.0)
    mask = (split < used)[:, None] & (column < V_DIM)[None, :]
    acc = tl.load(sums + row[:, None] * V_DIM + column[None, :], mask=mask, other=0.0)
    weight = tl.exp2(peak - tl.max(peak, 0))
    result = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + token * out_token + head * out_head + column, result.to(out.dtype.element_ty), mask=column < V_DIM)
