"""How big an engine is, and how its options are spelled.

Owns the frozen numbers the scheduler works within and the parsing of memory sizes. Knows no model and no device.
Invariant: a Limits that exists can run at least one token of one sequence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from embedllm.errors import InvalidRequest, RequestTooLong

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers every plan stays within.

    block_size: tokens per KV block. num_blocks: blocks in the pool.
    max_model_len: most tokens (prompt + output) of one sequence.
    max_num_seqs: most sequences running at once, also the number of rows.
    max_batch_tokens: most tokens computed in one step.
    max_queued: most requests waiting; one more raises QueueFull.
    vocab_size: width of the logits; token ids stay below it. num_input_ids: rows of the embedding, at least that.
    """

    block_size: int = 16
    num_blocks: int = 256
    max_model_len: int = 2_048
    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    max_queued: int = 65_536
    vocab_size: int = 2**31 - 1
    num_input_ids: int = 2**31 - 1
    prefix_caching: bool = True
    chunked_prefill: bool = True

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "max_model_len", "max_num_seqs", "max_batch_tokens", "max_queued"):
            _positive(name, getattr(self, name))
        if self.max_batch_tokens < self.max_num_seqs:
            raise InvalidRequest(
                f"max_batch_tokens={self.max_batch_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "every running sequence needs one token per step; raise the first or lower the second"
            )
        if not self.chunked_prefill and self.max_batch_tokens < self.max_model_len:
            raise InvalidRequest(
                f"chunked_prefill=False needs max_batch_tokens ({self.max_batch_tokens}) of at least "
                f"max_model_len ({self.max_model_len}), because a prompt is then computed in one step"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def check_fits(self, num_prompt: int, max_tokens: int, num_pinned: int = 0) -> None:
        """Raises RequestTooLong, with the numbers, if a sequence could never run, even alone beside the pins."""
        if num_prompt + max_tokens > self.max_model_len:
            room = self.max_model_len - num_prompt
            way = f"at most {room} fit" if room > 0 else f"shorten the prompt to {self.max_model_len - 1} tokens"
            raise RequestTooLong(
                f"{num_prompt} prompt tokens + max_tokens={max_tokens} exceed max_model_len={self.max_model_len}: {way}"
            )
        needed = self.blocks_for(num_prompt + max_tokens - 1)
        if needed > self.num_blocks - num_pinned:
            pins = f", {num_pinned} of them pinned" if num_pinned else ""
            raise RequestTooLong(
                f"{num_prompt} prompt tokens + max_tokens={max_tokens} need {needed} KV blocks of {self.block_size}; "
                f"the cache has {self.num_blocks}{pins}: lower max_tokens, or give the cache more memory "
                "(kv_cache_memory=, num_kv_blocks=)"
            )


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `LLM(...)`, as given; see there."""

    dtype: str = "auto"
    device: str = "auto"
    kv_cache_memory: int | float | str = "auto"
    num_kv_blocks: int | None = None
    block_size: int = 16
    max_model_len: int | str = "auto"
    max_num_seqs: int | str = "auto"
    max_batch_tokens: int | str = "auto"
    prefix_caching: bool = True
    chunked_prefill: bool = True
    quantization: str | None = None
    speculative: Any = None
    seed: int = 0
    tokenizer: Any = "auto"
    revision: str | None = None
    token: str | bool | None = None
    trust_remote_code: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_batch_tokens"):
            if getattr(self, name) != "auto":
                _positive(name, getattr(self, name), ' or "auto"')
        _positive("block_size", self.block_size)
        if self.num_kv_blocks is not None:
            _positive("num_kv_blocks", self.num_kv_blocks)
        for name in ("prefix_caching", "chunked_prefill", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.progress is not None and not isinstance(self.progress, bool):
            raise InvalidRequest(f"progress must be True, False or None, got {self.progress!r}")
        if self.revision is not None and not isinstance(self.revision, str):
            raise InvalidRequest(f"revision must be a branch, tag or commit, got {self.revision!r}")
        for name in ("quantization", "speculative"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} is not available yet; leave it None")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise InvalidRequest(f"seed must be an integer from 0 to 2**63-1, got {self.seed!r}")
        if self.kv_cache_memory != "auto":
            parse_memory(self.kv_cache_memory, 1 << 40)  # refused here rather than after the weights are loaded


def _positive(name: str, value: object, otherwise: str = "") -> None:
    if type(value) is not int or value < 1:
        raise InvalidRequest(f"{name} must be an integer of at least 1{otherwise}, got {value!r}")


def parse_memory(value: int | float | str, free: int) -> int:
    """Bytes from an int (bytes), a float in (0, 1) (share of `free`), or a string like "4GiB", "512MB", "50%"."""
    share: float = 0
    size: float = 0
    if isinstance(value, float):
        share = value
    elif type(value) is int:
        size = value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)\s*", value)):
        if match[2] == "%":
            share = float(match[1]) / 100
        elif match[2] in _UNITS:
            size = float(match[1]) * _UNITS[match[2]]
    if 0 < share < 1:
        return int(share * free)
    if 1 <= size < float("inf"):
        return int(size)
    raise InvalidRequest(
        f"memory size {value!r} is not understood: use bytes (int), a share of free memory (float between 0 and 1), "
        'or a string such as "4GiB" or "50%"'
    )
