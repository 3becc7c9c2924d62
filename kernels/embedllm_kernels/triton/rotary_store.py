"""Turns a step's queries and keys and puts its keys and values into the paged cache, in one pass over them.
See reference.rotary, reference.rms_norm (of each head, before it is turned) and reference.kv_store.

Knows one layer's cache. Invariants: what the cache gets is what `qkv` holds afterwards, rounded once more where the
cache's type is narrower; a token whose slot is negative is padding, for which nothing is read or written.

Each product and sum is rounded to the type of qkv, as the reference does it.

A cache of float8_e4m3fn is written as bytes whose bits are computed here: an A100 has no instruction for it. A value
beyond ±448 times the scale is bound to that, also where torch's cast makes it NaN; NaN stays NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1_024  # values of one program
NUM_WARPS = 2  # 16 values per thread


@triton.jit
def _e4m3(x):
    """The bits of float32 as float8_e4m3fn: to nearest, ties to even."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponents are biased by 127 and by 7
    # Below 2^-6 the step is 2^-9, which is the step of float32 from 2^14 on.
    small = (size + 16_384.0).to(tl.int32, bitcast=True) - 0x46800000
    magnitude = tl.where(size < 0.015625, small, normal)
    magnitude = tl.where(x == x, magnitude, 0x7F)
    return (magnitude | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _put(cache, value, scale, mask, FP8: tl.constexpr):
    """value is float32, rounded to the type of its source."""
    if FP8:
        tl.store(cache, _e4m3(tl.div_rn(value, scale)), mask=mask)
    else:
        tl.store(cache, value.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _row_of(cache, slot, block_size, block_stride, slot_stride):
    return cache + (slot // block_size).to(tl.int64) * block_stride + slot % block_size * slot_stride


@triton.jit
def _round(x, TYPE: tl.constexpr):
    return x.to(TYPE).to(tl.float32)


@triton.jit
def _normed(x, scale, q_weights, k_weights, column, inside, is_key, TYPE: tl.constexpr):
    """x · scale · weight; q_weights and k_weights [heads, 1] point to the weights of each head."""
    q = tl.load(q_weights + column, mask=inside & ~is_key, other=0.0).to(tl.float32)
    k = tl.load(k_weights + column, mask=inside & is_key, other=0.0).to(tl.float32)
    return _round(x * scale * (q + k), TYPE)


@triton.jit
def _turn(
    row, cos, sin, kv, q_weight, k_weight, eps, k_scale, head, num_heads, num_turned, q_weight_stride, k_weight_stride,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_KEPT: tl.constexpr,
):  # fmt: skip
    """Heads `head` [heads, 1], queries and then keys, of one token: turned in `row`, its keys copied to `kv`."""
    TYPE: tl.constexpr = row.dtype.element_ty
    exists, is_key = head < num_turned, head >= num_heads
    i = tl.arange(0, BLOCK_PAIRS)[None, :]
    inside = exists & (i < PAIRS)
    first = 2 * i if INTERLEAVED else i
    second = 2 * i + 1 if INTERLEAVED else i + PAIRS
    start = head * HEAD_DIM
    a = tl.load(row + start + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row + start + second, mask=inside, other=0.0).to(tl.float32)
    stored = start - num_heads * HEAD_DIM  # where in a row of the cache the head starts
    if BLOCK_KEPT:
        column = 2 * PAIRS + tl.arange(0, BLOCK_KEPT)[None, :]
        kept_inside = exists & (column < HEAD_DIM)
        kept = tl.load(row + start + column, mask=kept_inside, other=0.0).to(tl.float32)
    if q_weight is not None:
        squares = tl.sum(a * a + b * b, 1)
        if BLOCK_KEPT:
            squares += tl.sum(kept * kept, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        q_weights, k_weights = q_weight + head * q_weight_stride, k_weight + (head - num_heads) * k_weight_stride
        a = _normed(a, scale, q_weights, k_weights, first, inside, is_key, TYPE)
        b = _normed(b, scale, q_weights, k_weights, second, inside, is_key, TYPE)
        if BLOCK_KEPT:
            kept = _normed(kept, scale, q_weights, k_weights, column, kept_inside, is_key, TYPE)
            tl.store(row + start + column, kept.to(TYPE), mask=kept_inside)
    if BLOCK_KEPT:
        _put(kv + stored + column, kept, k_scale, kept_inside & is_key, FP8)
    c = _round(tl.load(cos + i, mask=i < PAIRS, other=0.0), TYPE)
    s = _round(tl.load(sin + i, mask=i < PAIRS, other=0.0), TYPE)
    turned_a = _round(_round(a * c, TYPE) - _round(b * s, TYPE), TYPE)
    turned_b = _round(_round(b * c, TYPE) + _round(a * s, TYPE), TYPE)
    tl.store(row + start + first, turned_a.to(TYPE), mask=inside)
    tl.store(row + start + second, turned_b.to(TYPE), mask=inside)
    _put(kv + stored + first, turned_a, k_scale, inside & is_key, FP8)
    _put(kv + stored + second, turned_b, k_scale, inside & is_key, FP8)


# Slots are part of a buffer that is packed anew for every step: where in it they start says nothing of the next step.
@triton.jit(do_not_specialize=["slots"])
def _rotary_store(
    qkv, cos, sin, cache, slots, q_weight, k_weight, eps, k_scale, v_scale, num_heads, num_turned, v_width, block_size,
    qkv_stride, cos_stride, sin_stride, block_stride, slot_stride, q_weight_stride, k_weight_stride,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    kv = _row_of(cache, slot, block_size, block_stride, slot_stride)
    row = qkv + token * qkv_stride
    groups = tl.cdiv(num_turned, HEADS)
    if part < groups:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        _turn(
            row, cos + token * cos_stride, sin + token * sin_stride, kv, q_weight, k_weight, eps, k_scale,
            head, num_heads, num_turned, q_weight_stride, k_weight_stride,
            HEAD_DIM, PAIRS, INTERLEAVED, FP8, BLOCK_PAIRS, BLOCK_KEPT,
        )  # fmt: skip
    else:
        column = (part - groups) * BLOCK + tl.arange(0, BLOCK)
        inside = column < v_width
        value = tl.load(row + num_turned * HEAD_DIM + column, mask=inside).to(tl.float32)
        _put(kv + (num_turned - num_heads) * HEAD_DIM + column, value, v_scale, inside, FP8)


@triton.jit(do_not_specialize=["slots"])
def _kv_store(
    cache, rows, slots, scale, width, block_size, row_stride, block_stride, slot_stride,
    FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(rows + token * row_stride + column, mask=inside).to(tl.float32)
    _put(_row_of(cache, slot, block_size, block_stride, slot_stride) + column, value, scale, inside, FP8)


def rotary_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Turn the queries and keys of `qkv` in place by reference.rotary, then store keys and values in `cache`.

    qkv [tokens, heads · k_dim + kv_heads · (k_dim + v_dim)]: query heads, key heads, value heads. cos, sin [tokens, d],
    2·d <= k_dim. cache [num_blocks, block_size, kv_heads · (k_dim + v_dim)]. slots [tokens]: block · block_size +
    offset, or negative for padding, whose row stays as it is.
    q_weight [k_dim] or [heads, k_dim], k_weight [k_dim] or [kv_heads, k_dim]: RMS norm of each head with this weight
    and eps, before it is turned.
    k_scale, v_scale: a cache of float8_e4m3fn holds keys and values divided by these.
    """
    head_dim, v_width = _widths(qkv, cache, num_heads, num_kv_heads)
    pairs = cos.shape[1]
    if cos.shape != sin.shape or 2 * pairs > head_dim or (q_weight is None) != (k_weight is None):
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} turn heads of {head_dim}; two weights or none"
        )
    _check_rows(qkv, cache, cos, sin)
    if not slots.numel():
        return
    fp8, kept = cache.dtype == torch.float8_e4m3fn, head_dim - 2 * pairs
    heads = max(1, BLOCK // triton.next_power_of_2(head_dim))  # of one program
    turned = num_heads + num_kv_heads
    _rotary_store[(slots.shape[0], triton.cdiv(turned, heads) + triton.cdiv(v_width, BLOCK))](
        qkv,
        cos,
        sin,
        cache.view(torch.uint8) if fp8 else cache,
        slots,
        q_weight,
        k_weight,
        eps,
        k_scale,
        v_scale,
        num_heads,
        turned,
        v_width,
        cache.shape[1],
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        cache.stride(0),
        cache.stride(1),
        _weight_stride(q_weight, num_heads, head_dim),
        _weight_stride(k_weight, num_kv_heads, head_dim),
        head_dim,
        pairs,
        interleaved,
        fp8,
        heads,
        triton.next_power_of_2(pairs),
        triton.next_power_of_2(kept) if kept else 0,
        BLOCK,
        num_warps=NUM_WARPS,
    )


def kv_store(cache: Tensor, rows: Tensor, slots: Tensor, *, scale: float = 1.0) -> None:
    """reference.kv_store; a negative slot is padding. A cache of float8_e4m3fn holds the rows divided by `scale`."""
    _check_rows(cache, rows)
    if rows.shape[1] != cache.shape[2]:
        raise ValueError(f"rows {list(rows.shape)} do not fit a cache of {list(cache.shape)}")
    if not slots.numel():
        return
    fp8 = cache.dtype == torch.float8_e4m3fn
    _kv_store[(slots.shape[0], triton.cdiv(rows.shape[1], BLOCK))](
        cache.view(torch.uint8) if fp8 else cache,
        rows,
        slots,
        scale,
        rows.shape[1],
        cache.shape[1],
        rows.stride(0),
        cache.stride(0),
        cache.stride(1),
        fp8,
        BLOCK,
        num_warps=NUM_WARPS,
    )


def _widths(qkv: Tensor, cache: Tensor, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """(k_dim, kv_heads · v_dim): what is left of a row of qkv without keys and values is its query heads."""
    kv_width = cache.shape[2]
    head_dim, rest = divmod(qkv.shape[1] - kv_width, num_heads)
    v_width = kv_width - num_kv_heads * head_dim
    if rest or head_dim < 1 or v_width < 0 or v_width % num_kv_heads:
        raise ValueError(f"qkv {list(qkv.shape)}, cache {list(cache.shape)}: not {num_heads} and {num_kv_heads} heads")
    return head_dim, v_width


def _weight_stride(weight: Tensor | None, heads: int, head_dim: int) -> int:
    """From one head's weights to the next's: 0 where they share them."""
    if weight is None:
        return 0
    if tuple(weight.shape) not in ((head_dim,), (heads, head_dim)) or not weight.is_contiguous():
        raise ValueError(f"weight {list(weight.shape)} is not a contiguous [{head_dim}] or [{heads}, {head_dim}]")
    return head_dim if weight.dim() == 2 else 0


def _check_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(f"the values of a row are {tensor.stride(-1)} apart, they must lie side by side")
