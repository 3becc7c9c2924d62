"""What a decoding step reads and the host need not send. See reference.prepare_decode.

Owns one launch that begins such a step, so that it can be captured and replayed: ids may come from the step before,
which the host has not read yet. Knows no sequence. Invariant: of padding nothing but its position is read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
# A step's tensors are parts of one buffer, each size with other places in it: no other code may be compiled for them.
VARYING = ["rows", "known", "positions", "tables", "out_ids", "out_slots", "out_seq_lens", "size", "table_stride"]


@triton.jit(do_not_specialize=VARYING)
def _prepare_decode(
    rows,
    known,
    last_tokens,
    positions,
    tables,
    out_ids,
    out_slots,
    out_seq_lens,
    size,
    block_size,
    table_stride,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < size
    position = tl.load(positions + entry, mask=inside, other=-1)
    real = position >= 0
    row = tl.load(rows + entry, mask=real, other=-1)
    token = tl.load(known + entry, mask=real & (row < 0), other=0)
    newest = tl.load(last_tokens + row.to(tl.int64), mask=row >= 0, other=0)
    place = tables + entry.to(tl.int64) * table_stride + position // block_size
    block = tl.load(place, mask=real, other=0)
    slot = tl.where(real, block * block_size + position % block_size, -1)
    tl.store(out_ids + entry, tl.where(row >= 0, newest, token), mask=inside)
    tl.store(out_slots + entry, slot, mask=inside)
    tl.store(out_seq_lens + entry, position + 1, mask=inside)


def prepare_decode(
    rows: Tensor,
    known: Tensor,
    last_tokens: Tensor,
    positions: Tensor,
    tables: Tensor,
    block_size: int,
    *,
    ids: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
) -> None:
    """reference.prepare_decode; all tensors are int32, and all but tables contiguous."""
    if rows.numel():
        _prepare_decode[(triton.cdiv(rows.shape[0], BLOCK),)](
            rows,
            known,
            last_tokens,
            positions,
            tables,
            ids,
            slots,
            seq_lens,
            rows.shape[0],
            block_size,
            tables.stride(0),
            BLOCK,
            num_warps=4,
        )
