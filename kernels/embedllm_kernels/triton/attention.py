"""Ragged paged attention. See reference.paged_attention.

Owns the choice between two forms. Decode: few queries per sequence, all in one tile; where sequences are too few to
fill the GPU, their keys are split over several programs whose results a second kernel merges. Prefill: any number of
queries. Invariant: the host waits for nothing on the device, and the grids depend on shapes and hints only, so that a
call can be captured in a CUDA graph and replayed with other tables and lengths.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from embedllm_kernels.triton.attention_decode import _decode, _merge
from embedllm_kernels.triton.attention_prefill import _prefill
from embedllm_kernels.triton.tuning import LEAST, Launch, launch_for

LOG2_E = 1.4426950408889634
MAX_DECODE_ROWS = 64  # query tokens · heads per KV head; more rows than that are the prefill form's
MAX_SPLITS = 64
PROGRAMS_PER_SM = 3  # that the decode form aims at
SPLIT_KEYS = 64  # the fewest keys that are worth a split of their own
FLOAT8_SINCE = (8, 9)  # the first compute capability that converts float8_e4m3fn


def split_count(num_sequences: int, num_kv_heads: int, num_sms: int, max_keys: int) -> int:
    """How many splits fill the GPU with the decode form: a power of two, so that few kernels are compiled.

    max_keys: the most keys that a sequence's queries see, max_seq_len or less where there is a window.
    """
    wanted = min(PROGRAMS_PER_SM * num_sms // max(1, num_sequences * num_kv_heads), max_keys // SPLIT_KEYS, MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def workspace_size(
    *,
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    v_dim: int,
    max_query_len: int,
    max_seq_len: int,
    device: torch.device,
    num_splits: int | None = None,
) -> int:
    """How many float32 values paged_attention needs, with any window: none where it splits nothing."""
    if _form(max_query_len, num_heads // num_kv_heads) == "prefill":
        return 0
    if num_splits is None:
        num_splits = split_count(num_sequences, num_kv_heads, _num_sms(device), max_seq_len)
    return _split_values(num_tokens, num_heads, v_dim, num_splits)


def paged_attention(
    q: Tensor,
    cache: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    max_query_len: int,
    max_seq_len: int,
    workspace: Tensor | None = None,
    num_splits: int | None = None,
    form: str | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """reference.paged_attention; the last dimensions of q, cache and out are contiguous, scale and k_scale positive.

    max_query_len: no sequence has more queries (they would be left out); the decode form needs it. max_seq_len: about
    the longest sequence, for the number of splits only; num_splits overrides it. workspace: workspace_size(...) float32
    values in a row, or more; made here where it is missing. form and launch override the choice by shape and the table
    in tuning. query_starts[0] is 0. Rows of `out` that belong to no sequence are not written.
    """
    tokens, heads, k_dim = q.shape
    v_dim = cache.shape[2] // num_kv_heads - k_dim
    scale *= k_scale
    if scale <= 0 or q.stride(2) != 1 or cache.stride(2) != 1:
        raise ValueError("scale must be positive, and the last dimensions of q and cache contiguous")
    out = torch.empty((tokens, heads, v_dim), dtype=q.dtype, device=q.device) if out is None else out
    group, sequences = heads // num_kv_heads, seq_lens.shape[0]
    if not tokens or not sequences:
        return out
    form = form or _form(max_query_len, group)
    k_pad, v_pad = max(LEAST, triton.next_power_of_2(k_dim)), max(LEAST, triton.next_power_of_2(v_dim))
    launch = launch or _launch(form, q, cache, max(k_pad, v_pad))
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1), cache.stride(0), cache.stride(1))
    logits = (scale, scale * LOG2_E) if softcap is None else (scale / softcap, softcap * LOG2_E)
    head = (*strides, tables.stride(0), num_kv_heads * k_dim, *logits, v_scale)
    constants = (group, k_dim, v_dim, k_pad, v_pad, cache.shape[1], window or 0, softcap is not None)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    inputs = (q, _readable(cache), tables, query_starts, seq_lens, sinks, out)
    if form == "prefill":
        block_m = max(launch.block_m, triton.next_power_of_2(group))
        grid = (tokens // (block_m // group) + sequences, num_kv_heads)
        _prefill[grid](*inputs, sequences, *head, *constants, block_m, launch.tile, **options)
        return out

    if num_splits is None:
        seen = max_seq_len if window is None else min(max_seq_len, window + max_query_len)
        num_splits = split_count(sequences, num_kv_heads, _num_sms(q.device), seen)
    block_m = max(launch.block_m, triton.next_power_of_2(max_query_len * group))
    sums, stats = _parts(workspace, out, num_splits)
    _decode[(sequences, num_kv_heads, num_splits)](
        *inputs, sums, stats, *head, *constants, num_splits == 1, block_m, launch.tile, **options
    )
    if num_splits > 1:
        _merge[(sequences * max_query_len, heads)](
            sums, stats, query_starts, seq_lens, out, num_splits, out.stride(0), out.stride(1), max_query_len,
            v_dim, v_pad, window or 0, launch.tile, triton.next_power_of_2(num_splits), num_warps=4,
        )  # fmt: skip
    return out


def _form(max_query_len: int, group: int) -> str:
    """One query per sequence is a decode however many heads share a KV head."""
    return "decode" if max_query_len == 1 or max_query_len * group <= MAX_DECODE_ROWS else "prefill"


def _split_values(tokens: int, heads: int, v_dim: int, num_splits: int) -> int:
    return 0 if num_splits == 1 else tokens * heads * num_splits * (v_dim + 2)


def _parts(workspace: Tensor | None, out: Tensor, num_splits: int) -> tuple[Tensor | None, Tensor | None]:
    """The workspace as the splits' (sums, stats); neither where there is one split."""
    tokens, heads, v_dim = out.shape
    size = _split_values(tokens, heads, v_dim, num_splits)
    if not size:
        return None, None
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=out.device)
    elif workspace.numel() < size or workspace.dtype is not torch.float32:
        raise ValueError(f"the workspace has {workspace.numel()} {workspace.dtype}; {size} float32 are needed")
    first = tokens * heads * num_splits * v_dim
    return workspace[:first], workspace[first:size]


def _is_float8(cache: Tensor) -> bool:
    return cache.dtype == torch.float8_e4m3fn


def _launch(form: str, q: Tensor, cache: Tensor, dim: int) -> Launch:
    return launch_for(form, _capability(q.device), dim, q.element_size(), _is_float8(cache))


def _readable(cache: Tensor) -> Tensor:
    """The cache, as bytes where it is float8 and the GPU has no instruction that converts that."""
    return cache.view(torch.uint8) if _is_float8(cache) and _capability(cache.device) < FLOAT8_SINCE else cache


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _num_sms(device: torch.device) -> int:
    """The processors of a GPU; 0 elsewhere, so that nothing is split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
