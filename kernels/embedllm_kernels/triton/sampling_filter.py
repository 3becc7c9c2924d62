"""Top-k, top-p and min-p without a sort, and the draw among what they keep. See sampling.kept.

Bisection over a row's candidates finds the thresholds. Logits are compared as integers in the same order, and
probabilities are summed as integers, so the order in which the candidates were listed does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from embedllm_kernels.triton.sampling_scores import DONE, noise, ordered, relative, value_of, weight_of


@triton.jit
def list_candidates(logits, bounds, listed, values, ids, size, row_stride, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """Append the logits from the bound on, and their ids, to the row's list, in any order. Counts all of them."""
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bounds + row)
    if bound == DONE:
        return
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + offset, mask=offset < size, other=-float("inf"))
    found = (ordered(x) >= bound).to(tl.int32)
    count = tl.sum(found)
    if count > 0:
        place = tl.atomic_add(listed + row, count) + tl.cumsum(found, 0) - 1
        fits = (found > 0) & (place < CAPACITY)
        tl.store(values + row * CAPACITY + place, x, mask=fits)
        tl.store(ids + row * CAPACITY + place, offset, mask=fits)


@triton.jit
def _count_from(values, count, key, TILE: tl.constexpr):
    """How many values are at least `key`."""
    found = tl.zeros((TILE,), tl.int32)
    for start in range(0, count, TILE):
        offset = start + tl.arange(0, TILE)
        x = tl.load(values + offset, mask=offset < count, other=-float("inf"))
        found += (ordered(x) >= key).to(tl.int32)
    return tl.sum(found)


@triton.jit
def _mass_above(values, count, key, top, temperature, TILE: tl.constexpr):
    """The weight of the values above `key`."""
    found = tl.zeros((TILE,), tl.int64)
    for start in range(0, count, TILE):
        offset = start + tl.arange(0, TILE)
        x = tl.load(values + offset, mask=offset < count, other=-float("inf"))
        found += tl.where(ordered(x) > key, weight_of(x, top, temperature), 0)
    return tl.sum(found)


@triton.jit
def _ids_at(ids, offset, listed):
    """The ids of the candidates; where the whole row is searched, `listed` is 0 and the offset is the id."""
    return tl.load(ids + offset, mask=offset < listed, other=offset)


@triton.jit
def _count_ties(values, ids, count, listed, key, last, TILE: tl.constexpr):
    """How many ids up to `last` have exactly the value `key`."""
    found = tl.zeros((TILE,), tl.int32)
    for start in range(0, count, TILE):
        offset = start + tl.arange(0, TILE)
        inside = offset < count
        x = tl.load(values + offset, mask=inside, other=-float("inf"))
        found += (inside & (ordered(x) == key) & (_ids_at(ids, offset, listed) <= last)).to(tl.int32)
    return tl.sum(found)


@triton.jit
def _last_tie(values, ids, count, listed, key, allowed, size, TILE: tl.constexpr):
    """The id up to which `allowed` ids, as far as there are so many, have exactly the value `key`."""
    low, high = tl.full((), 0, tl.int32), size - 1
    if _count_ties(values, ids, count, listed, key, high, TILE) <= allowed:
        low = high
    while low < high:
        middle = (low + high) // 2
        enough = _count_ties(values, ids, count, listed, key, middle, TILE) >= allowed
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


@triton.jit
def _kept_from(values, ids, count, listed, bound, k, p, total, top, t, size, TILE: tl.constexpr):
    """(key, id): top-k and top-p keep what is above the key, and at the key the ids up to this one."""
    low, high = bound.to(tl.int64), ordered(top).to(tl.int64)
    limited = (k > 0) & (k < size)
    if limited:
        while low < high:
            middle = low + (high - low + 1) // 2
            enough = _count_from(values, count, middle, TILE) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    last = size - 1
    if p < 1.0:
        goal = p.to(tl.float64) * total.to(tl.float64) * 1099511627776.0
        if limited:
            goal = p.to(tl.float64) * _mass_above(values, count, low - 1, top, t, TILE).to(tl.float64)
        high = ordered(top).to(tl.int64)
        while low < high:
            middle = low + (high - low) // 2
            stays = _mass_above(values, count, middle, top, t, TILE).to(tl.float64) < goal
            low = tl.where(stays, low, middle + 1)
            high = tl.where(stays, middle, high)
        weight = weight_of(value_of(low.to(tl.int32)), top, t)
        if weight > 0:
            over = goal - _mass_above(values, count, low, top, t, TILE).to(tl.float64)
            # Each tied id stays where those before it have not reached the goal; the best one always stays.
            allowed = tl.ceil(over / weight.to(tl.float64))
            allowed = tl.minimum(tl.maximum(allowed, 1.0), size.to(tl.float64)).to(tl.int32)
            last = _last_tie(values, ids, count, listed, low.to(tl.int32), allowed, size, TILE)
    return low.to(tl.int32), last


@triton.jit
def draw_filtered(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    words,
    totals,
    bounds,
    counts,
    list_values,
    list_ids,
    out_ids,
    best,
    size,
    row_stride,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    """The draw of one row among what its filters keep."""
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bounds + row)
    if bound == DONE:
        return
    t, least, top = tl.load(temperature + row), tl.load(min_p + row), tl.load(best + row)
    total = tl.load(totals + row)
    count = tl.load(counts + row)
    values, ids = list_values + row * CAPACITY, list_ids + row * CAPACITY
    listed = tl.where(count > CAPACITY, 0, count)
    if count > CAPACITY:
        count = size
        values = logits + row * row_stride
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    threshold, last = _kept_from(values, ids, count, listed, bound, k, p, total, top, t, size, TILE)
    chosen_score = tl.full((TILE,), -float("inf"), tl.float32)
    chosen = tl.zeros((TILE,), tl.int32) + (size - 1)
    for start in range(0, count, TILE):
        offset = start + tl.arange(0, TILE)
        inside = offset < count
        x = tl.load(values + offset, mask=inside, other=-float("inf"))
        key, token, z = ordered(x), _ids_at(ids, offset, listed), relative(x, top, t)
        keep = inside & ((key > threshold) | ((key == threshold) & (token <= last))) & (tl.exp(z) >= least)
        score = tl.where(keep, z + noise(token, words + 2 * row), -float("inf"))
        better = (score > chosen_score) | (keep & (score == chosen_score) & (token < chosen))
        chosen_score = tl.where(better, score, chosen_score)
        chosen = tl.where(better, token, chosen)
    winner = tl.min(tl.where(chosen_score == tl.max(chosen_score), chosen, size - 1))
    tl.store(out_ids + row, winner.to(tl.int64))
