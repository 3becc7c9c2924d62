"""What the sampling kernels share: the order of logits, the noise of a draw, and which rows are filtered."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-2139095040)  # the smallest finite float as `ordered` gives it
DONE: tl.constexpr = tl.constexpr(2147483647)  # the bound of a row that the scan has settled


@triton.jit
def ordered(x):
    """float32 as int32 in the same order; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The inverse of `ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def noise(ids, words):
    """sampling.gumbel_noise(mix_ids(ids), words) in float32. words: a row's two words."""
    x = ids.to(tl.uint32)
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0xD35A2D97
    x ^= x >> 15
    x ^= tl.load(words).to(tl.uint32)
    x *= 0x7FEB352D
    x ^= x >> 15
    x += tl.load(words + 1).to(tl.uint32)
    x *= 0x846CA68B
    x ^= x >> 16
    x *= 0x31848BAB
    x ^= x >> 14
    u = ((x & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    u = tl.minimum(u, 0.99999994)  # 1 - 2^-24
    rest = 1.0 - u
    taken = 1.0 - rest  # u as far as it reached `rest`: log(rest) / taken is right where log(rest) · 1 is not
    small = taken == 0.0
    return -tl.log(tl.where(small, u, -tl.log(rest) * (u / tl.where(small, 1.0, taken))))


@triton.jit
def relative(x, top, temperature):
    return (x - top) / tl.maximum(temperature, 1e-30)


@triton.jit
def weight_of(x, top, temperature):
    """The probability relative to the best's, in multiples of 2^-40."""
    return (tl.exp(relative(x, top, temperature)) * 1099511627776.0).to(tl.int64)


@triton.jit
def is_filtered(top_k, top_p, min_p, size, FILTERED: tl.constexpr):
    if FILTERED:
        return ((top_k > 0) & (top_k < size)) | (top_p < 1.0) | (min_p > 0.0)
    else:
        return top_k < -1
