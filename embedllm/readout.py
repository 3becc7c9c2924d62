"""From what the model says to tokens: one sampler row per running sequence, and log-probabilities of prompts.

Owns who is bound to which row of the sampler. Knows requests and logits, no policy and no text. Invariant: a row that
cannot be read fails alone; what it costs the others is nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedllm.choice import Choice, Sampled
from embedllm.config import Limits
from embedllm.live import Sample
from embedllm.outputs import TokenLogprobs
from embedllm.plan_types import Entry, Plan
from embedllm.runner import ModelOutput
from embedllm.sampler import Sampler
from embedllm.structured.follower import Follower


@dataclass(slots=True)
class Reading:
    """What a step chose: tokens per entry of its plan, log-probabilities and failures by sequence id."""

    tokens: list[list[int]]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)


class Readout:
    """Reads a runner's outputs. Where steps run `ahead`, the runner hears what was chosen before the host does."""

    def __init__(
        self,
        limits: Limits,
        eos_ids: Iterable[int],
        runner: Any,
        ahead: bool,
    ) -> None:
        self._sampler = Sampler(limits.max_num_seqs, limits.vocab_size, getattr(runner, "device", "cpu"))
        self.is_stepwise = self._sampler.is_stepwise
        self._eos_ids = tuple(eos_ids)
        self._logits_of = getattr(runner, "logits", None)
        self._remember = runner.remember if ahead else None
        self._bound: list[tuple[int, int] | None] = [None] * limits.max_num_seqs  # row -> (sequence id, epoch)
        self._rows: dict[int, int] = {}  # sequence id -> the row it was last bound to
        self._shaped: set[int] = set()  # ids of sequences whose output has a shape

    def read(self, plan: Plan, output: ModelOutput, samples: Mapping[int, Sample]) -> Reading:
        """Choose the next token of each entry that has reached its last known one. `samples` are by sequence id."""
        return self.launch(plan, output, samples)()

    def launch(self, plan: Plan, output: ModelOutput, samples: Mapping[int, Sample]) -> Callable[[], Reading]:
        """The same without waiting for the device; what is returned waits."""
        entries = [entry for entry in plan.entries if entry.num_logits]
        choice = None
        if entries:
            with self._bound_anew_after_errors():
                choice = self._choose(entries, output, samples)
        hidden = output.hidden

        def read() -> Reading:
            with self._bound_anew_after_errors():
                reading = self._read(plan, entries, choice.read()) if choice is not None else _nothing(plan)
            if hidden is not None:
                self._read_prompts(plan, hidden, samples, reading)
            return reading

        return read

    def _choose(self, entries: list[Entry], output: ModelOutput, samples: Mapping[int, Sample]) -> Choice:
        for entry in entries:
            self._bind(entry, samples[entry.sequence_id])
        rows = [entry.row for entry in entries]
        choice = self._sampler.launch(output.logits, rows, [entry.start + entry.num_tokens for entry in entries])
        if self._remember is not None:
            self._remember(rows, choice.ids)
        return choice

    @contextlib.contextmanager
    def _bound_anew_after_errors(self) -> Iterator[None]:
        """A step that fails is run again, with those after it: what the sampler counted of them is forgotten."""
        try:
            yield
        except BaseException:
            self._bound = [None] * len(self._bound)
            raise

    def _read(self, plan: Plan, entries: list[Entry], result: Sampled) -> Reading:
        tokens = iter(result.tokens)
        reading = Reading([[next(tokens)] if entry.num_logits else [] for entry in plan.entries])
        for entry, logprobs in zip(entries, result.logprobs, strict=True):
            if logprobs is not None:
                reading.logprobs[entry.sequence_id] = logprobs
        for index, error in result.failures.items():
            reading.failures[entries[index].sequence_id] = error
        for entry, chosen in zip(plan.entries, reading.tokens, strict=True):
            if chosen and entry.sequence_id in self._shaped:
                self._add_forced(entry, chosen, reading)
        return reading

    def _add_forced(self, entry: Entry, chosen: list[int], reading: Reading) -> None:
        """Tokens that a shape leaves no choice about need no step of their own, unless their log-probabilities do."""
        bound = self._bound[entry.row] == (entry.sequence_id, entry.epoch)
        if bound and entry.sequence_id not in reading.failures and entry.sequence_id not in reading.logprobs:
            try:
                chosen += self._sampler.after(entry.row, chosen[-1])
            except Exception as error:
                reading.failures[entry.sequence_id] = error

    def _bind(self, entry: Entry, sample: Sample) -> None:
        """Tell the sampler whose row it is, once per stay in the row."""
        if self._bound[entry.row] == (entry.sequence_id, entry.epoch):
            return
        request = sample.live.request
        tokens, follower = sample.sequence.tokens, None
        if request.shape is not None:
            follower = Follower(*request.shape.compiled, tokens, len(request.prompt))
            self._shaped.add(entry.sequence_id)
        self._sampler.bind(
            entry.row,
            request.params,
            tokens,
            len(request.prompt),
            request.seed,
            sample.index,
            self._eos_ids,
            [list(word) for word in request.bad_words],
            follower,
        )
        self._bound[entry.row] = (entry.sequence_id, entry.epoch)
        self._rows[entry.sequence_id] = entry.row

    def forget(self, sequence_id: int) -> None:
        """Hold nothing more of a sequence that has ended: its parameters may hold much of its caller's."""
        self._shaped.discard(sequence_id)
        row = self._rows.pop(sequence_id, None)
        bound = self._bound[row] if row is not None else None
        if row is not None and bound is not None and bound[0] == sequence_id:
            self._sampler.release(row)
            self._bound[row] = None

    def _read_prompts(self, plan: Plan, hidden: Any, samples: Mapping[int, Sample], reading: Reading) -> None:
        offset = 0
        for entry in plan.entries:
            if entry.wants_hidden:
                rows = hidden[offset : offset + entry.num_tokens]
                offset += entry.num_tokens
                sample = samples.get(entry.sequence_id)
                if sample is None:  # it ended while the step was in flight
                    continue
                try:
                    if sample.live.request.params.prompt_logprobs is not None:
                        self._read_prompt(entry, rows, sample)
                    sample.live.pool(entry.start, rows)
                except Exception as error:
                    reading.failures.setdefault(entry.sequence_id, error)

    def _read_prompt(self, entry: Entry, hidden: Any, sample: Sample) -> None:
        """The hidden state at position p gives the distribution of the prompt's token p + 1."""
        live = sample.live
        prompt, k = live.request.prompt, live.request.params.prompt_logprobs or 0
        if live.prompt_logprobs is None:
            live.prompt_logprobs = [None] * len(prompt)
        if self._logits_of is None:
            raise RuntimeError("the runner gives hidden states and no logits of them")
        position = entry.start + 1
        for logits in self._logits_of(hidden):
            following = prompt[position : position + len(logits)]
            found = self._sampler.prompt_logprobs(logits[: len(following)], following, k)
            live.prompt_logprobs[position : position + len(following)] = found
            position += len(logits)


def _nothing(plan: Plan) -> Reading:
    """A step of prompt chunks only."""
    return Reading([[] for _ in plan.entries])
