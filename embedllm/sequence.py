"""One sample of one request while it runs.

Owns the token ids (the truth) and how much of their KV is computed (a cache). Knows no block pool and no device.
Invariant: 0 <= num_computed <= num_computed + num_in_flight <= len(tokens) + num_sampling + len(draft), and a
finished sequence holds no blocks and no row.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from embedllm.outputs import FinishReason
from embedllm.plan_types import UNKNOWN, Entry


class State(Enum):
    """Where a sequence is; exactly one at a time."""

    UNBORN = "unborn"  # a fork whose parent's prompt is not computed yet
    WAITING = "waiting"  # new or preempted: no blocks, no row
    RUNNING = "running"  # owns a row, may own blocks
    PARKED = "parked"  # its reader went away: no blocks, no row, not scheduled until resumed
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, progress and holdings of one sample.

    `tokens` is the prompt followed by the output. `eos_ids` end it with stop_reason None, `stop_ids` with the id.
    `forks` are the request's other samples, born when this one's prompt is computed.
    """

    id: int  # also the order of arrival
    tokens: list[int]
    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    salt: str | None = None
    wants_hidden: bool = False
    is_stepwise: bool = False  # its next token depends on the ids before it: never planned ahead of them
    forks: list[Sequence] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)  # guesses to verify in its next step

    num_prompt: int = field(init=False)
    order: tuple[int, int] = field(init=False)  # who goes first: lower priority value, then earlier arrival
    state: State = field(default=State.WAITING, init=False)
    epoch: int = field(default=0, init=False)  # grows when results still in flight become worthless
    row: int = field(default=-1, init=False)
    num_computed: int = field(default=0, init=False)  # committed KV, from position 0
    num_in_flight: int = field(default=0, init=False)  # tokens of plans launched and not yet committed
    num_sampling: int = field(default=0, init=False)  # plans in flight that will each add a token
    blocks: array[int] = field(default_factory=lambda: array("i"), init=False)
    copy: tuple[int, int] | None = field(default=None, init=False)  # (source, own block) to run before its first step
    chain: int | str | None = field(default=None, init=False)  # prefix-tree node of its last cached full block
    num_chained: int = field(default=0, init=False)  # full blocks already in the prefix tree
    num_cached: int = field(default=0, init=False)  # prompt tokens served by the prefix cache at first admission
    num_preemptions: int = field(default=0, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: str | int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.order = (self.priority, self.id)
        self.chain = self.salt

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV no plan computes yet: what the catch-up rule hands budget to."""
        known = len(self.tokens) + self.num_sampling
        if known - self.num_prompt >= self.max_tokens:
            return 0  # the last token's KV is never needed
        if self.is_stepwise and self.num_sampling:
            return 0
        return known - self.num_computed - self.num_in_flight

    @property
    def max_slots(self) -> int:
        """Most KV slots it can ever need: the last token's is never computed."""
        return self.num_prompt + self.max_tokens - 1

    def entry(self, num_tokens: int) -> Entry:
        """Its part of a step that computes the next `num_tokens` of known tokens and draft."""
        start = self.num_computed + self.num_in_flight
        end = start + num_tokens
        num_known = len(self.tokens) + self.num_sampling
        num_draft = max(0, end - num_known)
        tokens = self.tokens[start : end - num_draft]
        tokens.extend([UNKNOWN] * (num_tokens - num_draft - len(tokens)))
        tokens.extend(self.draft[:num_draft])
        return Entry(
            sequence_id=self.id,
            epoch=self.epoch,
            row=self.row,
            start=start,
            tokens=tokens,
            num_draft=num_draft,
            num_logits=1 + num_draft if end >= num_known else 0,
            blocks=self.blocks[:],
            wants_hidden=self.wants_hidden and start < self.num_prompt and self.num_output == 0,
        )

    def append(self, tokens: list[int]) -> list[int]:
        """Append until something ends the sequence; returns the tokens kept and marks how it ended."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if token in self.eos_ids:
                self.finish_reason = "stop"
            elif token in self.stop_ids:
                self.finish_reason, self.stop_reason = "stop", token
            elif self.num_output >= self.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return tokens[: i + 1]
        return tokens

    def forget(self) -> None:
        """Drop every claim on KV; tokens stay. Results in flight become stale."""
        self.epoch += 1
        self.row = -1
        self.num_computed = self.num_in_flight = self.num_sampling = 0
        self.blocks = array("i")
        self.copy = None
        self.chain, self.num_chained = self.salt, 0
        self.draft = []
