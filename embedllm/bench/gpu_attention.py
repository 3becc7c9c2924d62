"""Paged attention by itself: decoding beside the copy bandwidth, prompts beside the matrix rate and torch's kernels.

Owns the inputs and what counts as work: of decoding the bytes of keys and values, of prompts the products under the
causal mask. Knows no engine. Invariant: every competitor gets the same queries, keys, values and lengths, in the layout
it wants.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedllm.bench.card import Line, Roof, Setup, Sizes, copies, seconds_per_call
from embedllm.bench.figures import Figure, Goal

if TYPE_CHECKING:
    from torch import Tensor

DECODE_GOAL, DECODE_GOAL_FROM = 80.0, 65_536  # per cent of the copy bandwidth, from so many tokens on


@dataclass(frozen=True)
class Sequences:
    """Sequences in a paged cache whose blocks lie in random order. q [tokens, heads, d]: their last tokens' queries.

    layers: one view [blocks, block, width] for each layer of the cache. lengths: tokens of each sequence.
    """

    q: Tensor
    layers: tuple[Tensor, ...]
    tables: Tensor
    starts: Tensor
    seq_lens: Tensor
    lengths: tuple[int, ...]
    sizes: Sizes

    @staticmethod
    def make(setup: Setup, lengths: Sequence[int], *, whole: bool, layers: int) -> Sequences:
        """whole: queries of every token, as of a prompt; else of the last one."""
        import torch

        sizes, dtype = setup.sizes, getattr(torch, setup.dtype)
        each = [-(-length // sizes.block) for length in lengths]
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(sum(each), generator=generator).int()
        tables = torch.zeros(len(lengths), max(each), dtype=torch.int32)
        for row, blocks in zip(tables, torch.split(order, each), strict=True):
            row[: len(blocks)] = blocks
        counts = torch.tensor(lengths if whole else [1] * len(lengths))
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        cache = torch.randn(sum(each), layers, sizes.block, sizes.kv_width, device=setup.device, dtype=dtype)
        return Sequences(
            q=torch.randn(int(starts[-1]), sizes.heads, sizes.head_dim, device=setup.device, dtype=dtype),
            layers=cache.unbind(1),
            tables=tables.to(setup.device),
            starts=starts.to(setup.device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=setup.device),
            lengths=tuple(lengths),
            sizes=sizes,
        )

    @property
    def num_kv_bytes(self) -> int:
        """Keys and values of all tokens in one layer."""
        return sum(self.lengths) * self.sizes.kv_width * self.q.itemsize

    @property
    def num_flops(self) -> int:
        """Of every token's queries against all tokens up to its own: two products."""
        pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        return 4 * self.sizes.heads * self.sizes.head_dim * pairs

    def paged(self, layer: int, whole: bool) -> Tensor:
        """This engine's kernel: [tokens, heads, d]."""
        from embedllm_kernels.triton.attention import paged_attention

        return paged_attention(
            *(self.q, self.layers[layer], self.tables, self.starts, self.seq_lens),
            num_kv_heads=self.sizes.kv_heads,
            scale=self.sizes.head_dim**-0.5,
            max_query_len=max(self.lengths) if whole else 1,
            max_seq_len=max(self.lengths),
        )

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all sequences one after the other, each [tokens, kv_heads, d]."""
        import torch

        parts = []
        for table, length in zip(self.tables.long(), self.lengths, strict=True):
            blocks = table[: -(-length // self.sizes.block)]
            parts.append(self.layers[0][blocks].reshape(-1, self.sizes.kv_width)[:length])
        both = torch.cat(parts).view(-1, 2, self.sizes.kv_heads, self.sizes.head_dim)
        return both[:, 0].contiguous(), both[:, 1].contiguous()


def lines(setup: Setup, roof: Roof) -> Iterator[Line]:
    """Decoding, then prompts."""
    sizes = setup.sizes
    for batch, context in sizes.decode:
        name = f"decode attention, {batch} × {context:,} tokens"
        yield name, functools.partial(decode, setup, roof, name, (context,) * batch)
    name = f"decode attention, ragged, {len(sizes.ragged)} sequences"
    yield name, functools.partial(decode, setup, roof, name, sizes.ragged)
    for length in sizes.prefill:
        yield from _prompts(setup, roof, f"prefill attention, {length:,} tokens", (length,), own_peer)
    peer = varlen_peer if setup.device != "cpu" else None  # torch has it for CUDA alone
    yield from _prompts(setup, roof, f"prefill attention, ragged, {len(sizes.ragged)} prompts", sizes.ragged, peer)


def decode(setup: Setup, roof: Roof, name: str, lengths: tuple[int, ...]) -> Figure:
    """Keys and values read per second."""
    num_bytes = sum(lengths) * setup.sizes.kv_width * 2
    work = Sequences.make(setup, lengths, whole=False, layers=copies(num_bytes, setup.device))
    calls = [functools.partial(work.paged, layer, False) for layer in range(len(work.layers))]
    seconds = seconds_per_call(calls, setup.device)
    share = work.num_kv_bytes / seconds / roof.bandwidth
    goal = Goal(DECODE_GOAL) if sum(lengths) >= DECODE_GOAL_FROM else None
    return Figure(name, 100 * share, "%", goal=goal, beside=f"of copy bandwidth, {seconds * 1e6:.1f} µs")


Peer = tuple[str, Callable[[], object]]


def own_peer(work: Sequences) -> Peer:
    """scaled_dot_product_attention on one sequence, with whatever kernel torch takes for it."""
    from torch.nn.functional import scaled_dot_product_attention

    keys, values = (part.transpose(0, 1)[None] for part in work.contiguous())
    q = work.q.transpose(0, 1)[None]
    attend = functools.partial(scaled_dot_product_attention, q, keys, values, is_causal=True, enable_gqa=True)
    return "scaled_dot_product_attention", attend


def varlen_peer(work: Sequences) -> Peer:
    """torch.nn.attention.varlen on a ragged batch; ImportError where this torch has none."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = work.contiguous()
    names, options = inspect.signature(varlen_attn).parameters, dict[str, Any]()
    # Its options are young, and differ between versions of torch.
    options |= {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    else:
        group = work.sizes.heads // work.sizes.kv_heads
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    longest = max(work.lengths)
    attend = functools.partial(varlen_attn, work.q, keys, values, work.starts, work.starts, longest, longest, **options)
    return "varlen_attn", attend


def _prompts(
    setup: Setup, roof: Roof, name: str, lengths: tuple[int, ...], peer: Callable[[Sequences], Peer] | None
) -> Iterator[Line]:
    """A line for this engine's kernel, and one for the peer's with how many times its time ours takes."""
    found: dict[str, float] = {}

    def ours() -> Figure:
        work = Sequences.make(setup, lengths, whole=True, layers=1)
        found["ours"] = seconds = seconds_per_call([functools.partial(work.paged, 0, True)], setup.device)
        rate = work.num_flops / seconds
        return Figure(
            name, rate / 1e12, "TFLOP/s", rate / roof.rate, "the matrix rate", beside=f"{seconds * 1e6:.0f} µs"
        )

    def theirs() -> Figure:
        work = Sequences.make(setup, lengths, whole=True, layers=1)
        assert peer is not None
        who, attend = peer(work)
        seconds = seconds_per_call([attend], setup.device)
        rate = work.num_flops / seconds
        beside = f"{who}, {seconds * 1e6:.0f} µs"
        if "ours" in found:
            beside += f"; ours takes {found['ours'] / seconds:.2f} × its time"
        return Figure(name + ", torch", rate / 1e12, "TFLOP/s", rate / roof.rate, "the matrix rate", beside=beside)

    yield name, ours
    if peer is not None:
        yield name + ", torch", theirs
