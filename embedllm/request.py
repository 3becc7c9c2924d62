"""What was asked, and what the engine says about it while it runs.

Owns the two messages that cross the thread boundary: a Request goes in, Updates come out. Knows no tensors and no
threads. Invariant: after a request's `Ended` nothing more is said about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from embedllm.outputs import FinishReason, Parser, Said, Timing, TokenLogprobs, Usage
from embedllm.params import SamplingParams


class CompiledShape(Protocol):
    """The shape of an answer, on its way through a compiler. Once it is done, `compiled` is (grammar, vocabulary), see
    `structured.backend`, or raises why there is none.
    """

    @property
    def compiled(self) -> tuple[Any, Any]: ...

    def when_done(self, call: Callable[[], None]) -> None:
        """Call this once: now, or on some thread once it is done."""


@dataclass(frozen=True, slots=True)
class Request:
    """A validated request. `params` is resolved; `seed` is the one its draws use; `submitted` is monotonic seconds."""

    id: int
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    submitted: float
    bad_words: tuple[tuple[int, ...], ...] = ()  # as token ids
    is_chat: bool = False  # the prompt is a conversation
    shape: CompiledShape | None = None  # of params.structured
    pooling: Literal["mean", "last"] | None = None  # of the prompt's hidden states, for an embedding
    parser: Callable[[], Parser] | None = None  # makes what tells the parts of a sample's text


@dataclass(slots=True)
class Update:
    """New text and tokens of one sample; with a `finish_reason` it is the sample's last."""

    request_id: int
    index: int
    said: Said
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Ended:
    """The request is over; `error` says why if it did not finish by itself."""

    request_id: int
    usage: Usage
    timing: Timing
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: BaseException | None = None
    embedding: Any = None  # float32 [hidden] on the model's device, where `pooling` was asked for


@dataclass(slots=True)
class StepOutput:
    """Everything one step has to say, handed over at once."""

    updates: list[Update] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
