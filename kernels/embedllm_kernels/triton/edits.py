"""What changes logits before a token is chosen: penalties, bias and the mask of allowed ids, in one pass, in place.

Order: repetition, frequency, presence (sampling.penalise), bias, mask. Penalties and what they count lie in arrays with
one entry per state row, which outlive the step; bias and mask belong to the step and have one entry per row of logits.
Invariant: a row that asks for nothing is neither read nor written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2_048


@triton.jit
def _edit(
    logits,
    rows,
    repetition,
    frequency,
    presence,
    counts,
    prompt,
    bias_ids,
    bias,
    allowed,
    size,
    num_words,
    row_stride,
    num_biases,
    MAPPED: tl.constexpr,
    PENALTIES: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = row
    if MAPPED:
        state = tl.load(rows + row).to(tl.int64)
    penalised = False
    repeat, often, present = 1.0, 0.0, 0.0
    if PENALTIES:
        repeat = tl.load(repetition + state)
        often = tl.load(frequency + state)
        present = tl.load(presence + state)
        penalised = (repeat != 1.0) | (often != 0.0) | (present != 0.0)
    biased = False
    if BIAS:
        biased = tl.load(bias_ids + row * num_biases) >= 0
    if MASK or penalised or biased:
        first = tl.program_id(1) * BLOCK
        ids = first + tl.arange(0, BLOCK)
        inside = ids < size
        word, bit = ids // 32, ids % 32
        place = logits + row * row_stride + ids
        x = tl.load(place, mask=inside, other=0.0)
        if PENALTIES and penalised:
            count = tl.load(counts + state * size + ids, mask=inside, other=0)
            prompted = (tl.load(prompt + state * num_words + word, mask=inside, other=0) >> bit) & 1
            seen = (count > 0) | (prompted > 0)
            x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, repeat), x * repeat), x)
            x = x - often * count.to(tl.float32)
            x = tl.where(count > 0, x - present, x)
        if BIAS and biased:
            for entry in range(num_biases):
                token = tl.load(bias_ids + row * num_biases + entry)
                if (token >= first) & (token < first + BLOCK):
                    x = tl.where(ids == token, x + tl.load(bias + row * num_biases + entry), x)
        if MASK:
            may = (tl.load(allowed + row * num_words + word, mask=inside, other=0) >> bit) & 1
            x = tl.where(may > 0, x, -float("inf"))
        tl.store(place, x, mask=inside)


def apply_edits(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    penalties: tuple[Tensor, Tensor, Tensor] | None = None,
    counts: Tensor | None = None,
    prompt: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    allowed: Tensor | None = None,
) -> None:
    """Penalties, then bias, then the mask, each where given. Writes to `logits` [n, V] float32, rows of any stride.

    rows [n] of any integer type: the state row of each row of logits; None: the same one.
    penalties: repetition, frequency, presence, each [states] float32; with counts [states, V] int32, how often an id
    stands in the output, and prompt [states, ceil(V / 32)] int32, whose bit id % 32 of word id // 32 says that an id
    stands in the prompt. bias: (ids [n, m] int32, distinct, -1 after the last, values [n, m] float32).
    allowed [n, ceil(V / 32)] int32: bits as in `prompt`; an id whose bit is 0 gets -inf.
    All but `logits` are contiguous.
    """
    n, size = logits.shape
    if (penalties is None) != (counts is None) or (penalties is None) != (prompt is None):
        raise ValueError("penalties, counts and prompt come together")
    if bias is not None and not bias[0].shape[1]:
        bias = None
    if not n or (penalties is None and bias is None and allowed is None):
        return
    repetition, frequency, presence = penalties or (logits, logits, logits)
    bias_ids, values = bias or (logits, logits)
    _edit[(n, triton.cdiv(size, BLOCK))](
        logits,
        logits if rows is None else rows,
        repetition,
        frequency,
        presence,
        logits if counts is None else counts,
        logits if prompt is None else prompt,
        bias_ids,
        values,
        logits if allowed is None else allowed,
        size,
        triton.cdiv(size, 32),
        logits.stride(0),
        bias_ids.shape[1] if bias is not None else 0,
        rows is not None,
        penalties is not None,
        bias is not None,
        allowed is not None,
        BLOCK,
        num_warps=4,
    )
