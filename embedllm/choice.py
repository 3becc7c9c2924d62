"""What a sampler chose: tokens where the logits are, and the same on the host once somebody waits for it.

Owns the way from one to the other, and which rows have nothing to choose from. Knows no parameters. Invariant: a row
that failed fails alone, and its token is -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from embedllm.errors import RequestFailed
from embedllm.outputs import Logprob, TokenLogprobs
from embedllm.transfer import Download


@dataclass(slots=True)
class Sampled:
    """What `Sampler.sample` chose. `tokens[i]` is -1 and means nothing where `failures` has i."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    failures: dict[int, Exception] = field(default_factory=dict)

    def put(self, rows: list[int], others: Sampled) -> None:
        """Take these rows from `others`, which has nothing else."""
        for place, i in enumerate(rows):
            self.tokens[i], self.logprobs[i] = others.tokens[place], others.logprobs[place]
            self.failures.pop(i, None)
            if place in others.failures:
                self.failures[i] = others.failures[place]


class Choice:
    """Tokens that were chosen where the logits are. `ids` int64 [n], there; `read` brings them to the host."""

    def __init__(self, ids: Tensor, best: Tensor) -> None:
        self.ids = ids
        self.best = best  # [n]: the largest logit, not finite where there was nothing to choose from
        self.edited: tuple[list[int], Tensor] = ([], best)  # the same after edits, and of which rows
        self.failures: dict[int, Exception] = {}
        self.logprobs: list[tuple[list[int], tuple[Tensor, ...]]] = []  # rows, and what `ops.logprobs` says of them
        self.late: tuple[list[int], Callable[[], Sampled]] | None = None  # rows that are chosen when this is read
        self._download: Download | None = None

    def send(self) -> Choice:
        """Queue the way to the host. Nothing is chosen after it."""
        self._download = Download(
            [self.ids, self.best, self.edited[1], *(t for _, found in self.logprobs for t in found)]
        )
        return self

    def read(self) -> Sampled:
        """Wait for the device. Rows without a choice are failures."""
        assert self._download is not None, "it was not sent"
        ids, first, second, *columns = self._download.wait()
        tokens, failures, edited = ids.tolist(), self.failures, self.edited[0]
        if edited:
            for i, value in zip(edited, second.tolist(), strict=True):
                if not math.isfinite(value):
                    failures.setdefault(i, RequestFailed(_no_choice(value)))
        for i, value in enumerate(first.tolist()):
            if not math.isfinite(value):
                failures[i] = RequestFailed(f"the model's logits are not finite: the largest is {value}")
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        for group, found in self.logprobs:
            its, columns = columns[: len(found)], columns[len(found) :]
            for i, entry in zip(group, entries_of([tokens[i] for i in group], its), strict=True):
                logprobs[i] = None if i in failures else entry
        for i in failures:
            tokens[i] = -1
        sampled = Sampled(tokens, logprobs, failures)
        if self.late is not None:
            sampled.put(self.late[0], self.late[1]())
        return sampled


def entries_of(tokens: Sequence[int], columns: Iterable[Tensor]) -> list[TokenLogprobs]:
    """What `ops.logprobs` found, row by row: the chosen token, then the others of the most likely."""
    entries = []
    for token, logprob, rank, values, ids in zip(tokens, *(column.tolist() for column in columns), strict=True):
        ranked = enumerate(zip(ids, values, strict=True), start=1)
        rest = [Logprob(other, value, place) for place, (other, value) in ranked if other != token]
        entries.append([Logprob(token, logprob, rank), *rest])
    return entries


def _no_choice(best: float) -> str:
    if best == -math.inf:
        return (
            "no token may be chosen: structured, logit_bias, allowed_token_ids, bad_words, min_tokens and "
            "logits_processor together forbid every id; allow at least one"
        )
    return f"the logits to sample from are not finite after logits_processor: the largest is {best}"
