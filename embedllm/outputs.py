"""What a caller gets back: deltas while a request runs, a completion when it ends.

Owns the shapes only; knows nothing of how they are made. Invariant: the texts of a sample's deltas, joined,
equal its completion's text, and their tokens, joined, equal its tokens.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from embedllm.errors import InvalidOutput

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]


class Logprob(NamedTuple):
    """One candidate token: id, natural-log probability under the raw model distribution, rank (1 = most likely)."""

    id: int
    logprob: float
    rank: int


TokenLogprobs = list[Logprob]  # the chosen token first, then the most likely ones in order


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asks for: the tool's name, its arguments by name (plain JSON data), an id for the answer."""

    name: str
    arguments: dict[str, Any]
    id: str


class Said(NamedTuple):
    """A piece of an answer, parsed: text for the reader, reasoning before it, and tool calls that became complete."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def then(self, other: Said) -> Said:
        """This and what comes after it."""
        return Said(self.text + other.text, self.reasoning + other.reasoning, self.tool_calls + other.tool_calls)


NOTHING = Said()


class Parser(Protocol):
    """Reads one sample's raw text as it comes and tells its parts."""

    def feed(self, text: str) -> Said:
        """What this text completes."""

    def finish(self) -> Said:
        """What was held back, once the sample has ended."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new for one sample since the reader last looked.

    A slow reader gets fewer, larger deltas; none is ever taken back. Text may lag tokens (a held-back stop string
    or an incomplete character); the last delta of a sample carries its `finish_reason`.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of the request, all its samples together.

    `cached_tokens` are prompt tokens that the prefix cache served.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds on the monotonic clock: waiting, until the first token, from there to the end, all together."""

    queue: float = 0.0
    ttft: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Completion:
    """The finished answer to one prompt: sample 0's fields, and all `n` samples in `outputs`.

    `tokens` include the EOS or stop token, `text` does not. `stop_reason` is the stop string or stop token id that
    ended the sample, None for EOS and length. `tool_calls` and `reasoning` are what a conversation's answer has beside
    its text, None where there is none. `logprobs` has one entry per token of `tokens`; `prompt_logprobs` one
    per prompt token, the first being None.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    usage: Usage = field(default_factory=Usage)
    timing: Timing = field(default_factory=Timing)
    index: int = 0
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    parse: Callable[[str], Any] | None = field(default=None, repr=False, compare=False)
    siblings: tuple[Completion, ...] = field(default=(), repr=False)

    @functools.cached_property
    def parsed(self) -> Any:
        """What the text says, where JSON was asked for: an object of the type that was given as the schema, or plain
        data. None where nothing was asked for, or tools are called instead.

        Raises InvalidOutput where the text is not whole (finish_reason "length"), or where the type itself refuses it.
        """
        if self.parse is None or self.finish_reason == "tool_calls":
            return None
        if self.finish_reason != "stop":
            raise InvalidOutput(f"the answer is not whole: it ended by {self.finish_reason!r}; raise max_tokens", self)
        try:
            return self.parse(self.text)
        except Exception as error:
            raise InvalidOutput(f"the answer has the asked shape and was refused: {error}", self) from error

    @property
    def outputs(self) -> tuple[Completion, ...]:
        """All n samples, this one first."""
        return (self, *self.siblings)

    def __str__(self) -> str:
        return self.text

    def footer(self, state: str) -> str:
        """One line: calls, reasoning, tokens, how it stands, speed, when the first token came, what was cached."""
        calls = ", ".join(f"{call.name}({_arguments(call)})" for call in self.tool_calls or ())
        parts = [f"calls {calls}"] if calls else []
        if self.reasoning:
            parts.append(f"{len(self.reasoning):,} characters of reasoning")
        parts += [f"{len(self.tokens)} tokens", state]
        if self.timing.decode > 0 and len(self.tokens) > 1:
            parts.append(f"{(len(self.tokens) - 1) / self.timing.decode:.0f} tokens/s")
        if self.timing.ttft > 0:
            parts.append(f"first token after {self.timing.ttft:.2f} s")
        if self.usage.prompt_tokens:
            parts.append(f"{self.usage.cached_tokens} of {self.usage.prompt_tokens} prompt tokens cached")
        return " · ".join(parts)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's text view: one line."""
        text = self.text if len(self.text) <= 60 else f"{self.text[:59]}…"
        printer.text(f"<Completion {text!r}: {self.footer(self.finish_reason)}>")

    def _repr_html_(self) -> str:
        """Notebook view. Model output is hostile: everything is escaped."""
        parts = []
        for output in self.outputs:
            label = f"sample {output.index} · " if self.siblings else ""
            footer = label + output.footer(output.finish_reason)
            parts.append(
                f'<div><pre style="white-space:pre-wrap;margin:0">{html.escape(output.text)}</pre>'
                f'<div style="opacity:.65;font-size:85%">{html.escape(footer)}</div></div>'
            )
        return "\n".join(parts)

    def _repr_markdown_(self) -> str:
        """Markdown view: the text in a fence longer than any run of backticks inside it."""
        return "\n\n".join(_fenced(output.text) for output in self.outputs)


def _arguments(call: ToolCall) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return text if len(text) <= 120 else f"{text[:119]}…"


def _fenced(text: str) -> str:
    longest = run = 0
    for char in text:
        run = run + 1 if char == "`" else 0
        longest = max(longest, run)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
