"""One step of attention: a tile of queries meets a tile of keys. Shared by the decode and the prefill form.

The rows of a tile of queries are the query heads of one KV head, token after token: row m is head m % group of token
m // group. A row's state is (acc, peak, total): Σ 2^(x - peak) · value, the largest x so far, and Σ 2^(x - peak), where
x is a logit times log2(e). Invariant: a slot outside [first, end) is neither read nor looked up in the block table, so
what is in it cannot reach a result; a row that has seen no key has total 0 and a finite peak, never NaN.

A cache of float8_e4m3fn comes as float8e4nv where the GPU converts it by an instruction, else as uint8, whose bits are
put together here. Both are exact, because every value of that type is one of float16, bfloat16 and float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: LOWEST - LOWEST is 0 where -inf - -inf is NaN
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(q, token, head, count, token_stride, head_stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] of q: row m is `head[m]` of row `token[m]` of q; zeros where token[m] >= count."""
    column = tl.arange(0, PADDED)
    pointers = q + token.to(tl.int64)[:, None] * token_stride + head[:, None] * head_stride + column[None, :]
    return tl.load(pointers, mask=(token < count)[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def store_result(out, result, token, head, count, token_stride, head_stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The counterpart of load_queries."""
    column = tl.arange(0, PADDED)
    pointers = out + token.to(tl.int64)[:, None] * token_stride + head[:, None] * head_stride + column[None, :]
    mask = (token < count)[:, None] & (column < DIM)[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def start_rows(sinks, head, counted):
    """(peak, total) of rows that have seen no key, but their head's sink, if there are sinks, where `counted`."""
    peak = tl.full(head.shape, LOWEST, tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=counted, other=0.0).to(tl.float32)
        peak = tl.where(counted, tl.maximum(sink * LOG2_E, LOWEST), LOWEST)
        total = tl.where(counted, 1.0, 0.0)
    return peak, total


@triton.jit
def _from_e4m3(byte):
    """The float32 whose bits as float8_e4m3fn are `byte` (uint8): sign, 4 bits of exponent, 3 of mantissa."""
    bits = byte.to(tl.int8, bitcast=True).to(tl.int32) << 20  # where float32, with exponents 120 higher, has them
    value = (bits & -0x78100000).to(tl.float32, bitcast=True) * 1.3292279957849159e36  # 2^120, exact for subnormals
    return tl.where(tl.abs(value) > 448.0, float("nan"), value)  # 0x7F and 0xFF, which would be ±480


@triton.jit
def _load_rows(base, offset, inside, TYPE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """[keys, PADDED] of TYPE: the rows at `offset`, zeros where not `inside`."""
    column = tl.arange(0, PADDED)
    mask = inside[:, None]
    if DIM < PADDED:
        mask = mask & (column < DIM)[None, :]
    rows = tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)
    if rows.dtype == tl.uint8:
        rows = _from_e4m3(rows)
    return rows.to(TYPE)


@triton.jit
def attend(
    acc,
    peak,
    total,
    q,
    keys,  # the cache at this head's key, and at its value
    values,
    table,  # the sequence's block ids
    start,  # the tile's first key
    first,
    end,
    position,  # of each row, below end; the first keys of all rows' windows lie at `first` or above
    block_stride,
    slot_stride,
    inner,
    unit,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,  # not: every row sees every key of the tile
):
    """The rows' state after the keys start .. start + TILE - 1.

    A row's x for a key is unit · q·k or, CAPPED, unit · tanh(inner · q·k).
    """
    key = start + tl.arange(0, TILE)
    if MASKED:
        inside = (key >= first) & (key < end)
    else:
        inside = tl.full([TILE], 1, tl.int1)
    block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    offset = block * block_stride + (key % BLOCK_SIZE) * slot_stride
    k = _load_rows(keys, offset, inside, q.dtype, K_DIM, q.shape[1])
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        score = 2.0 * tl.sigmoid(2.0 * inner * score) - 1.0  # tanh
    if MASKED:
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
    v = _load_rows(values, offset, inside, q.dtype, V_DIM, acc.shape[1])
    higher = tl.maximum(peak, tl.max(score, 1) * unit)
    share = tl.exp2(score * unit - higher[:, None])
    kept = tl.exp2(peak - higher)
    acc = tl.dot(share.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return acc, higher, total * kept + tl.sum(share, 1)
