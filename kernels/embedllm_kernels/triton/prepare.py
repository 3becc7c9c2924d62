"""A decode step's inputs from what the device knows of each row, so that a step can be queued before the tokens of the
one before it have reached the host.

Owns the kernels that read and advance that state: per row of the batch's state the newest token, and the position
whose KV is computed next. Knows no sequence. Invariant: an entry that is padding (row -1) reads and writes no row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


# The number of entries and where in a packed buffer they lie change from step to step.
@triton.jit(do_not_specialize=["rows", "out_ids", "out_positions", "out_slots", "out_seq_lens", "size"])
def _prepare_decode(
    rows,
    last_tokens,
    positions_by_row,
    tables_by_row,
    out_ids,
    out_positions,
    out_slots,
    out_seq_lens,
    size,
    block_size,
    max_blocks,
    table_stride,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < size
    row = tl.load(rows + entry, mask=inside, other=-1).to(tl.int64)
    position = tl.load(positions_by_row + row, mask=row >= 0, other=0)
    real = (row >= 0) & (position // block_size < max_blocks)
    position = tl.where(real, position, 0)
    block = tl.load(tables_by_row + row * table_stride + position // block_size, mask=real, other=0).to(tl.int64)
    slot = tl.where(real, block * block_size + position % block_size, -1)
    token = tl.load(last_tokens + row, mask=real, other=0)
    tl.store(out_ids + entry, token, mask=inside)
    tl.store(out_positions + entry, position, mask=inside)
    tl.store(out_slots + entry, slot.to(out_slots.dtype.element_ty), mask=inside)
    tl.store(out_seq_lens + entry, tl.where(real, position + 1, 0), mask=inside)


@triton.jit(do_not_specialize=["sampled", "rows", "size"])
def _scatter_tokens(sampled, rows, last_tokens, positions_by_row, size, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + entry, mask=entry < size, other=-1).to(tl.int64)
    real = row >= 0
    token = tl.load(sampled + entry, mask=real, other=0)
    tl.store(last_tokens + row, token.to(last_tokens.dtype.element_ty), mask=real)
    position = tl.load(positions_by_row + row, mask=real, other=0)
    tl.store(positions_by_row + row, position + 1, mask=real)


def prepare_decode(
    rows: Tensor,
    last_tokens: Tensor,
    positions_by_row: Tensor,
    tables_by_row: Tensor,
    block_size: int,
    out_ids: Tensor,
    out_positions: Tensor,
    out_slots: Tensor,
    out_seq_lens: Tensor,
) -> None:
    """What a step reads that computes one token of each entry. Writes to the `out_` arguments, [entries] each.

    rows [entries]: the row of each entry, -1 for padding. last_tokens, positions_by_row [rows]: the token to compute
    and its position. tables_by_row [rows, max_blocks]: block ids.
    Entry i gets its token, its position, slot = block · block_size + offset, and the length position + 1. Padding gets
    token 0, position 0, slot -1 and length 0; so does a position past the end of its row's table.
    """
    if rows.numel():
        _prepare_decode[(triton.cdiv(rows.shape[0], BLOCK),)](
            rows,
            last_tokens,
            positions_by_row,
            tables_by_row,
            out_ids,
            out_positions,
            out_slots,
            out_seq_lens,
            rows.shape[0],
            block_size,
            tables_by_row.shape[1],
            tables_by_row.stride(0),
            BLOCK,
            num_warps=4,
        )


def scatter_tokens(sampled: Tensor, rows: Tensor, last_tokens: Tensor, positions_by_row: Tensor) -> None:
    """Make sampled[i] the newest token of row rows[i], and advance the row by one position; row -1 is skipped.

    sampled, rows [entries], no row twice; last_tokens, positions_by_row [rows], both written.
    """
    if rows.numel():
        _scatter_tokens[(triton.cdiv(rows.shape[0], BLOCK),)](
            sampled, rows, last_tokens, positions_by_row, rows.shape[0], BLOCK, num_warps=4
        )
