"""Attention of a ragged batch with any number of queries per sequence.

A program takes BLOCK_Q consecutive queries of one sequence. The grid is the most programs that any batch of as many
tokens and sequences can need; a program finds its sequence itself, so the host need not know where sequences begin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from embedllm_kernels.triton.attention_tile import attend, load_queries, start_rows, store_result

VARYING = ["tables", "query_starts", "seq_lens", "table_stride", "sequences"]


@triton.jit
def _sequence_of(query_starts, index, sequences, BLOCK_Q: tl.constexpr):
    """The sequence of block `index`. Sequence i's blocks begin at query_starts[i] // BLOCK_Q + i, which leaves at most
    one block unused before the next sequence's."""
    low, high = index * 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(query_starts + middle).to(tl.int32) // BLOCK_Q + middle <= index
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    return low


@triton.jit(do_not_specialize=VARYING)
def _prefill(
    q, cache, tables, query_starts, seq_lens, sinks, out, sequences,
    q_token, q_head, out_token, out_head, block_stride, slot_stride, table_stride, value_column, inner, unit, v_scale,
    GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # a sequence's late queries see the most keys: they go first
    kv_head = tl.program_id(1)
    sequence = _sequence_of(query_starts, index, sequences, BLOCK_Q)
    begin = tl.load(query_starts + sequence).to(tl.int32)
    count = tl.load(query_starts + sequence + 1).to(tl.int32) - begin
    first = (index - begin // BLOCK_Q - sequence) * BLOCK_Q
    if first >= count:
        return
    last = tl.minimum(first + BLOCK_Q, count)
    context = tl.load(seq_lens + sequence).to(tl.int32) - count
    m = tl.arange(0, BLOCK_M)
    token, head = begin + first + m // GROUP, kv_head * GROUP + m % GROUP
    position = tl.minimum(context + first + m // GROUP, context + last - 1)
    queries = load_queries(q, token, head, begin + last, q_token, q_head, K_DIM, K_PAD)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    peak, total = start_rows(sinks, head, token < begin + last)
    keys = cache + kv_head * K_DIM
    values = cache + value_column + kv_head * V_DIM
    table = tables + sequence.to(tl.int64) * table_stride

    # Of the tiles left .. right - 1 that any row sees, all rows see all of full .. edge - 1.
    lowest = 0
    left = 0
    full = 0
    if WINDOW > 0:
        lowest = tl.maximum(context + first - WINDOW + 1, 0)
        left = lowest // TILE
        full = tl.cdiv(tl.maximum(context + last - WINDOW, 0), TILE)
    right = tl.cdiv(context + last, TILE)
    edge = tl.maximum((context + first + 1) // TILE, full)
    for i in range(full, edge):
        acc, peak, total = attend(
            acc, peak, total, queries, keys, values, table, i * TILE, lowest, context + last, position, block_stride,
            slot_stride, inner, unit, K_DIM, V_DIM, BLOCK_SIZE, TILE, WINDOW, CAPPED, False,
        )  # fmt: skip
    for i in range(left, right - edge + full):
        tile = tl.where(i < full, i, i + edge - full)
        acc, peak, total = attend(
            acc, peak, total, queries, keys, values, table, tile * TILE, lowest, context + last, position, block_stride,
            slot_stride, inner, unit, K_DIM, V_DIM, BLOCK_SIZE, TILE, WINDOW, CAPPED, True,
        )  # fmt: skip
    acc = acc * v_scale / total[:, None]
    store_result(out, acc, token, head, begin + last, out_token, out_head, V_DIM, V_PAD)
