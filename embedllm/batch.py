"""A step as tensors: one packed int32 buffer with a named view for everything a forward reads.

Owns the order that a step's tokens run in: entries sorted by number of tokens, then length, so that those which can
share one attention call stand side by side. Knows no model and no policy. Invariant: `logit_rows` and `hidden_rows`
are in the plan's order, whatever order the tokens run in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedllm.errors import EngineError
from embedllm.plan_types import UNKNOWN, Entry, Plan
from embedllm.transfer import upload


@dataclass(frozen=True, slots=True)
class Batch:
    """What a forward reads. All tensors are int32 views of `buffer`.

    ids, positions [tokens]: input ids and their positions. padded_ids, padded_positions: the same with zeros after
    them up to a length that `round_rows` names; what is computed for the padding is dropped.
    slots [tokens]: block · block_size + offset where the token's KV goes.
    tables [entries, max_blocks]: block ids, zero where an entry has no more. query_starts [entries + 1]: first token of
    each entry. seq_lens [entries]: tokens of the sequence up to and with this step.
    logit_rows [num_logits]: tokens whose logits are wanted, in the plan's order.
    hidden_rows: tokens of the entries that want hidden states, in the plan's order; None where none did.
    starts, lengths: query_starts and seq_lens as ints.
    """

    buffer: Tensor
    padded_ids: Tensor
    padded_positions: Tensor
    slots: Tensor
    tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    logit_rows: Tensor
    hidden_rows: Tensor | None
    starts: list[int]
    lengths: list[int]
    num_tokens: int

    @property
    def ids(self) -> Tensor:
        return self.padded_ids[: self.num_tokens]

    @property
    def positions(self) -> Tensor:
        return self.padded_positions[: self.num_tokens]


def round_rows(count: int) -> int:
    """The number of rows a matrix product of `count` rows is run with: a power of two to 16, then a multiple of 16.

    Each number of rows costs about a millisecond per weight shape when it is first seen (the kernel is generated), and
    rows up to the next multiple of 16 are nearly free.
    """
    return -(-count // 16) * 16 if count > 16 else 1 << max(0, count - 1).bit_length()


def build(plan: Plan, block_size: int, device: str | torch.device = "cpu", last_tokens: Tensor | None = None) -> Batch:
    """Pack a plan. Ids that are not known on the host yet come from `last_tokens` int32 [rows], on the device."""
    entries = plan.entries
    order = sorted(range(len(entries)), key=lambda i: (len(entries[i].tokens), entries[i].start))
    ran = [entries[i] for i in order]
    wanted, hidden = _wanted_rows(plan, order)
    unknown = _unknown(ran)
    num_tokens, num_entries = plan.num_tokens, len(ran)
    padded = round_rows(num_tokens)
    max_blocks = max((len(entry.blocks) for entry in ran), default=1)
    sizes = [
        padded,
        padded,
        num_tokens,
        num_entries * max_blocks,
        num_entries + 1,
        num_entries,
        len(wanted),
        len(hidden),
        len(unknown),
        len(unknown),
    ]
    packed = np.zeros(sum(sizes), np.int32)
    views = np.split(packed, np.cumsum(sizes)[:-1])
    _fill(views, ran, block_size, max_blocks)
    views[6][:], views[7][:] = wanted, hidden
    if unknown:
        views[8][:], views[9][:] = zip(*unknown, strict=True)
    buffer = upload(torch.from_numpy(packed), device)
    parts = torch.split(buffer, sizes)
    if unknown:
        if last_tokens is None:
            raise EngineError("the plan has ids that are not known yet; this runner keeps no sampled ids of its own")
        parts[0].index_copy_(0, parts[8].long(), last_tokens.index_select(0, parts[9]))
    return Batch(
        buffer=buffer,
        padded_ids=parts[0],
        padded_positions=parts[1],
        slots=parts[2],
        tables=parts[3].view(num_entries, max_blocks),
        query_starts=parts[4],
        seq_lens=parts[5],
        logit_rows=parts[6],
        hidden_rows=parts[7] if hidden else None,
        starts=views[4].tolist(),
        lengths=views[5].tolist(),
        num_tokens=num_tokens,
    )


def _fill(views: list[NDArray[np.int32]], ran: list[Entry], block_size: int, max_blocks: int) -> None:
    """Write ids, positions, slots, tables, query starts and lengths: numpy over the step, no loop over its tokens."""
    ids, positions, slots, flat_tables, query_starts, seq_lens = views[:6]
    listed: list[int] = []
    for entry in ran:
        listed += entry.tokens
    num_tokens, num_entries = len(listed), len(ran)
    ids[:num_tokens] = listed
    counts = np.array([len(entry.tokens) for entry in ran], np.int32)
    starts = np.array([entry.start for entry in ran], np.int32)
    np.cumsum(counts, out=query_starts[1:])
    np.add(starts, counts, out=seq_lens)
    owner = np.repeat(np.arange(num_entries), counts)
    position = np.arange(num_tokens, dtype=np.int32) + (starts - query_starts[:-1])[owner]
    positions[:num_tokens] = position
    num_blocks = np.array([len(entry.blocks) for entry in ran], np.int32)
    tables = flat_tables.reshape(num_entries, max_blocks)
    tables[np.arange(max_blocks) < num_blocks[:, None]] = np.frombuffer(b"".join([e.blocks for e in ran]), np.int32)
    slots[:] = tables[owner, position // block_size] * block_size + position % block_size


def _unknown(ran: list[Entry]) -> list[tuple[int, int]]:
    """(place in the batch, row) of the ids that are not known yet; an entry has one at most, its last known token."""
    found = []
    end = 0
    for entry in ran:
        end += len(entry.tokens)
        if UNKNOWN in entry.tokens:
            found.append((end - len(entry.tokens) + entry.tokens.index(UNKNOWN), entry.row))
    return found


def _wanted_rows(plan: Plan, order: list[int]) -> tuple[list[int], list[int]]:
    """Rows of the batch whose logits are wanted, and those whose hidden states are, both in the plan's order."""
    ends = [0] * len(order)
    end = 0
    for index in order:
        end += len(plan.entries[index].tokens)
        ends[index] = end
    wanted: list[int] = []
    hidden: list[int] = []
    for end, entry in zip(ends, plan.entries, strict=True):
        if entry.num_logits == 1:
            wanted.append(end - 1)
        elif entry.num_logits:
            wanted += range(end - entry.num_logits, end)
        if entry.wants_hidden:
            hidden += range(end - len(entry.tokens), end)
    return wanted, hidden
