"""A request while it is in the engine.

Owns what is known of a running request beside its sequences: text state, counts, times. Knows no policy and decides
nothing. Invariant: a Live that has ended is in no index and holds no blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from embedllm.detokenizer import Detokenizer, Piece
from embedllm.outputs import Timing, TokenLogprobs, Usage
from embedllm.request import Request
from embedllm.sequence import Sequence
from embedllm.tokenizer import TokenizerProtocol


@dataclass(slots=True)
class Sample:
    """One sample of a request: its sequence and its text."""

    live: Live
    index: int
    sequence: Sequence
    detokenizer: Detokenizer
    num_emitted: int = 0  # output tokens handed on; the rest of the sequence's can be made again

    def say(self, tokens: list[int]) -> Piece:
        """The text of these tokens, and what was held back where the sequence ends with them."""
        reason = self.sequence.finish_reason
        piece = self.detokenizer.step(tokens, ended_by_token=reason == "stop")
        if reason is not None and piece.stop is None:
            piece = piece._replace(text=piece.text + self.detokenizer.finish())
        return piece


@dataclass(slots=True)
class Live:
    """A request in the engine. Times are monotonic seconds, 0.0 for what has not happened yet."""

    request: Request
    samples: list[Sample] = field(default_factory=list)
    num_open: int = 0
    scheduled: float = 0.0  # first time a step ran it
    first_token: float = 0.0
    num_output: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add_samples(
        self, ids: Iterator[int], eos_ids: frozenset[int], tokenizer: TokenizerProtocol | None, is_stepwise: bool
    ) -> None:
        """Make a sequence with its text for each sample asked for. `ids` names the sequences."""
        request, params = self.request, self.request.params
        for index in range(params.n):
            sequence = Sequence(
                id=next(ids),
                tokens=list(request.prompt),
                max_tokens=request.max_tokens,
                eos_ids=frozenset() if params.ignore_eos else eos_ids,
                stop_ids=frozenset(params.stop_token_ids),
                priority=params.priority,
                salt=params.cache_salt,
                prompt_logprobs=params.prompt_logprobs is not None and index == 0,
                is_stepwise=is_stepwise,
            )
            detokenizer = Detokenizer(tokenizer, request.prompt, params)
            self.samples.append(Sample(self, index, sequence, detokenizer))
        self.num_open = len(self.samples)

    def usage(self) -> Usage:
        num_cached = self.samples[0].sequence.num_cached if self.samples else 0
        return Usage(len(self.request.prompt), num_cached, self.num_output)

    def timing(self, now: float) -> Timing:
        start = self.request.submitted
        first = self.first_token or now
        return Timing(queue=(self.scheduled or now) - start, ttft=first - start, decode=now - first, total=now - start)
