"""One token per row of logits, without a sort. See embedllm_kernels.sampling, whose draws these are.

Every row is scanned once, split over many programs: greedy rows and unfiltered draws end there. For a filtered row the
scan bounds the smallest logit that can be kept; what lies above the bound is listed and drawn from, in sampling_filter.

Invariant: a row's result depends neither on the rows beside it nor on their number. Every id is in [0, V).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedllm_kernels.triton import scratch
from embedllm_kernels.triton.sampling_filter import draw_filtered, list_candidates
from embedllm_kernels.triton.sampling_scores import DONE, LOWEST, is_filtered, noise, ordered, relative

GROUP = 64  # ids whose largest logit the scan keeps, to bound the k-th largest of all
GROUPS = 32  # groups per program of the scan
CAPACITY = 16_384  # logits listed per row; where more lie above the bound, the whole row is searched
TILE = 4_096


@triton.jit
def _scan(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    words,
    tops,
    top_ids,
    masses,
    drawn,
    maxima,
    size,
    row_stride,
    num_groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """Per part of a row: the largest logit and its id, the probability mass or the drawn id, and the groups' maxima."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = part * GROUPS + tl.arange(0, GROUPS)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None]
    inside = ids < size
    x = tl.load(logits + row * row_stride + ids, mask=inside, other=-float("inf"))
    invalid = tl.max((x != x).to(tl.int32))
    x = tl.where(x != x, -float("inf"), x)
    maximum = tl.max(x, 1)
    top = tl.max(maximum)
    place = row * tl.num_programs(1) + part
    tl.store(tops + place, tl.where(invalid > 0, float("nan"), top))
    tl.store(top_ids + place, tl.min(tl.where(inside & (x == top), ids, size - 1)))
    t = tl.load(temperature + row)
    if t > 0.0:
        z = relative(x, tl.where(tl.abs(top) < float("inf"), top, 0.0), t)
        if is_filtered(tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), size, FILTERED):
            tl.store(masses + place, tl.sum(tl.exp(z)))
            tl.store(maxima + row * num_groups + group, maximum, mask=group < num_groups)
        else:
            score = z + noise(ids, words + 2 * row)
            tl.store(drawn + place, tl.min(tl.where(inside & (score == tl.max(score)), ids, size - 1)))


@triton.jit
def _kth_largest(keys, k, highest):
    """The k-th largest of a block of keys in [LOWEST, highest]; LOWEST where there are fewer."""
    low, high = tl.full((), LOWEST, tl.int64), highest.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _settle(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    words,
    tops,
    top_ids,
    masses,
    drawn,
    maxima,
    totals,
    bounds,
    listed,
    out_ids,
    best,
    size,
    row_stride,
    num_groups,
    splits,
    SPLITS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """Merge a row's parts. Settles rows that are not filtered, and bounds what can be kept of the others."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    place, inside = row * splits + part, part < splits
    t = tl.load(temperature + row)
    values = tl.load(tops + place, mask=inside, other=-float("inf"))
    invalid = tl.max((values != values).to(tl.int32)) > 0
    values = tl.where(values != values, -float("inf"), values)
    top = tl.max(values)
    ids = tl.load(top_ids + place, mask=inside, other=0)
    tl.store(best + row, tl.where(invalid, float("nan"), top))
    tl.store(bounds + row, DONE)
    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    if invalid | (tl.abs(top) == float("inf")) | (t <= 0.0):
        tl.store(out_ids + row, tl.min(tl.where(inside & (values == top), ids, size - 1)).to(tl.int64))
    elif is_filtered(k, p, least, size, FILTERED):
        tl.store(listed + row, 0)
        mass = tl.load(masses + place, mask=inside, other=0.0)
        total = tl.sum(mass * tl.exp(relative(values, top, t)))
        tl.store(totals + row, total)
        if (k > 0) & (k < size):  # k groups reach the k-th largest maximum, so k ids do
            group = tl.arange(0, ALL_GROUPS)
            known = tl.load(maxima + row * num_groups + group, mask=group < num_groups, other=-float("inf"))
            tl.store(bounds + row, _kth_largest(ordered(known), k, ordered(top)))
        else:  # all ids below the bound together weigh less than what top-p leaves out; half of it for the rounding
            share = tl.where(p < 1.0, (1.0 - p) * total / size, least)
            bound = top + tl.log(0.5 * share) * t - 2.4e-7 * tl.abs(top)
            tl.store(bounds + row, tl.maximum(ordered(bound), LOWEST))
    else:
        ids = tl.load(drawn + place, mask=inside, other=0)
        x = tl.load(logits + row * row_stride + ids, mask=inside, other=-float("inf"))
        score = relative(x, top, t) + noise(ids, words + 2 * row)
        tl.store(out_ids + row, tl.min(tl.where(inside & (score == tl.max(score)), ids, size - 1)).to(tl.int64))


def _parts(rows: int, size: int, filtered: bool) -> list[scratch.Part]:
    splits = triton.cdiv(size, GROUP * GROUPS)
    width, groups = (CAPACITY, triton.cdiv(size, GROUP)) if filtered else (0, 0)
    return [
        ((rows, splits), torch.float32),  # largest logits, then their ids, masses, drawn ids
        ((rows, splits), torch.int32),
        ((rows, splits), torch.float32),
        ((rows, splits), torch.int32),
        ((rows, groups), torch.float32),  # the groups' maxima
        ((rows,), torch.float32),  # total masses
        ((rows,), torch.int32),  # bounds
        ((rows,), torch.int32),  # how many are listed
        ((rows, width), torch.float32),  # the lists' values and ids
        ((rows, width), torch.int32),
    ]


def workspace_size(rows: int, size: int, filtered: bool = True) -> int:
    """Bytes of scratch memory that `sample` takes for so many rows of so many logits."""
    return scratch.size(_parts(rows, size, filtered))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    words: Tensor,
    *,
    filtered: bool = True,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids [n] int64, best [n] float32): a token per row, and its largest logit, NaN if it has one.

    logits [n, V] float32, rows of any stride. temperature [n] float32, 0 = greedy: the lowest id of the largest logit.
    top_k [n] int32, 0 = all; top_p, min_p [n] float32: as sampling.kept takes them. words [n, 2] int32 of key_words.
    The id means nothing where `best` is not finite. filtered: False promises that no row asks for top-k, top-p or
    min-p. workspace: uint8 of at least `workspace_size` bytes.
    """
    rows, size = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return ids, best
    options = (temperature, top_k, top_p, min_p, words)
    parts = scratch.cut(workspace, _parts(rows, size, filtered), logits.device)
    tops, top_ids, masses, drawn, maxima, totals, bounds, listed, values, list_ids = parts
    splits, groups, stride = tops.shape[1], triton.cdiv(size, GROUP), logits.stride(0)
    found = (tops, top_ids, masses, drawn, maxima)
    _scan[(rows, splits)](logits, *options, *found, size, stride, groups, GROUP, GROUPS, filtered, num_warps=4)
    wide, all_groups = triton.next_power_of_2(splits), triton.next_power_of_2(groups)
    state = (*found, totals, bounds, listed, ids, best)
    _settle[(rows,)](logits, *options, *state, size, stride, groups, splits, wide, all_groups, filtered, num_warps=8)
    if filtered:
        block = GROUP * GROUPS
        lists = (bounds, listed, values, list_ids)
        list_candidates[(rows, splits)](logits, *lists, size, stride, CAPACITY, block, num_warps=4)
        draw_filtered[(rows,)](logits, *options, totals, *lists, ids, best, size, stride, CAPACITY, TILE, num_warps=8)
    return ids, best
