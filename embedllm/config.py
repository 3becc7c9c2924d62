"""How big an engine is: the frozen numbers the scheduler works within.

Knows no model and no device. Invariant: a Limits that exists can run at least one token of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedllm.errors import InvalidRequest, RequestTooLong


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
            check_positive(name, getattr(self, name))
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


def check_positive(name: str, value: object, otherwise: str = "") -> None:
    """Raises InvalidRequest for what is not an integer of at least 1."""
    if type(value) is not int or value < 1:
        raise InvalidRequest(f"{name} must be an integer of at least 1{otherwise}, got {value!r}")
