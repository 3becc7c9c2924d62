"""One step: plan, forward, sample, commit, detokenize; and what happens when one of them fails.

Owns the requests that are in the engine and everything said about them. Single-threaded: whoever calls it is the only
one. Knows no threads, no channels, no model internals. Invariant: every request that `submit` took gets exactly one
`Ended`, and a fault in one request changes no other request's tokens.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from embedllm.config import Limits
from embedllm.detokenizer import Detokenizer
from embedllm.errors import (
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestFailed,
)
from embedllm.events import Recorder
from embedllm.invariants import check
from embedllm.metrics import Metrics, Stats, snapshot
from embedllm.outputs import FinishReason, Timing, TokenLogprobs, Usage
from embedllm.pace import Pace
from embedllm.plan_types import Entry, Plan
from embedllm.request import Ended, Request, StepOutput, Update
from embedllm.runner import ModelOutput
from embedllm.sampler import Sampler
from embedllm.scheduler import Progress, Scheduler
from embedllm.sequence import Sequence
from embedllm.tokenizer import TokenizerProtocol
from embedllm.trace import Recorders, record_plan

MAX_FAILURES_IN_A_ROW = 8  # entries that fail alone, with no step succeeding between, mean the engine is broken
MAX_IDLE_STEPS = 3  # steps with work and nothing to run

log = logging.getLogger("embedllm")

Run = Callable[[Plan, Callable[[], None]], ModelOutput]


@dataclass(slots=True)
class _Sample:
    """One sample of a request: its sequence and its text."""

    request: _Live
    index: int
    sequence: Sequence
    detokenizer: Detokenizer
    num_emitted: int = 0  # output tokens handed on; the rest of the sequence's can be made again


@dataclass(slots=True)
class _Live:
    """A request in the engine."""

    request: Request
    samples: list[_Sample] = field(default_factory=list)
    num_open: int = 0
    scheduled: float = 0.0  # first time a step ran it
    first_token: float = 0.0
    num_output: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class StepStopped(BaseException):
    """The step was left between two layers because the engine is being closed."""


class Engine:
    """Requests in, StepOutputs out.

    `run(plan, between_layers)` gives a ModelOutput. `tokenizer` may be None: text is then empty. `debug` recounts
    everything after each step. Another thread may read `last_beat`, the monotonic time of the latest sign of life, and
    set `stop_asked`, which ends a step between two layers.
    """

    def __init__(
        self,
        run: Run,
        limits: Limits,
        *,
        tokenizer: TokenizerProtocol | None = None,
        eos_ids: Iterable[int] = (),
        logits_of: Callable[..., Any] | None = None,
        close: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
        debug: bool = False,
    ) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.metrics = Metrics()
        self.recorder: Recorder | None = None
        self._recorders: list[Recorder] = []
        self.pins: dict[int, list[int]] = {}  # pin id -> blocks it holds
        self._run = run
        self._sampler = Sampler(limits.max_num_seqs, limits.vocab_size)
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._logits_of = logits_of
        self._close = close
        self._clock = clock
        self._debug = debug
        self._pace = pace
        if pace is not None:
            self.scheduler.budget = pace.budget
        self._ids = itertools.count()
        self._pin_ids = itertools.count(1)
        self._live: dict[int, _Live] = {}
        self._samples: dict[int, _Sample] = {}  # by sequence id
        self._bound: list[tuple[int, int] | None] = [None] * limits.max_num_seqs  # row -> (sequence id, epoch)
        self._deadlines: list[tuple[float, int]] = []
        self._output = StepOutput()
        self._failures_in_a_row = 0
        self._start_overs_in_a_row = 0
        self._idle_steps = 0
        self.last_beat = clock()
        self.stop_asked = False

    # ---- requests ---------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._output.ended)

    @property
    def next_deadline(self) -> float | None:
        """When the next live request expires (monotonic seconds)."""
        while self._deadlines and self._deadlines[0][1] not in self._live:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def submit(self, request: Request) -> None:
        """Take a validated request. Never raises: what cannot be taken is ended with the error."""
        live = _Live(request)
        self._live[request.id] = live
        try:
            if len(self._live) > self.limits.max_queued + self.limits.max_num_seqs:
                raise QueueFull(f"{self.limits.max_queued} requests wait already; wait for some to finish")
            self.limits.check_fits(len(request.prompt), request.max_tokens, self.scheduler.num_pinned)
            for index in range(request.params.n):
                live.samples.append(self._new_sample(live, index))
        except Exception as error:  # a pin since validation, a broken tokenizer: this request only
            self._end(live, error)
            return
        live.num_open = len(live.samples)
        first = live.samples[0].sequence
        first.forks = [sample.sequence for sample in live.samples[1:]]
        self._samples.update((sample.sequence.id, sample) for sample in live.samples)
        self.metrics.prompt_tokens += len(request.prompt)
        if request.params.deadline is not None:
            heapq.heappush(self._deadlines, (request.submitted + request.params.deadline, request.id))
        self.scheduler.add(first)

    def _new_sample(self, live: _Live, index: int) -> _Sample:
        request, params = live.request, live.request.params
        sequence = Sequence(
            id=next(self._ids),
            tokens=list(request.prompt),
            max_tokens=request.max_tokens,
            eos_ids=frozenset() if params.ignore_eos else self._eos_ids,
            stop_ids=frozenset(params.stop_token_ids),
            priority=params.priority,
            salt=params.cache_salt,
            prompt_logprobs=params.prompt_logprobs is not None and index == 0,
        )
        return _Sample(live, index, sequence, Detokenizer(self._tokenizer, request.prompt, params))

    def cancel(self, request_id: int) -> None:
        """End a request in any state; its blocks are back when this returns. Unknown and ended ids are ignored."""
        live = self._live.get(request_id)
        if live is not None:
            self._end(live, RequestCancelled(f"request {request_id} was cancelled"), "cancelled")

    def park(self, request_id: int) -> None:
        """Set a request aside without blocks until `resume`: nobody reads it."""
        for sample in self._samples_of(request_id):
            self.scheduler.park(sample.sequence)

    def resume(self, request_id: int) -> None:
        for sample in self._samples_of(request_id):
            self.scheduler.resume(sample.sequence)

    def _samples_of(self, request_id: int) -> list[_Sample]:
        live = self._live.get(request_id)
        return live.samples if live is not None else []

    def attach(self, recorder: Recorder) -> None:
        """Record every event from now on, beside whatever else records."""
        self._set_recorders([*self._recorders, recorder])

    def detach(self, recorder: Recorder) -> None:
        self._set_recorders([member for member in self._recorders if member is not recorder])

    def _set_recorders(self, members: list[Recorder]) -> None:
        self._recorders = members
        self.recorder = None if not members else members[0] if len(members) == 1 else Recorders(members)
        self.scheduler.recorder = self.scheduler.pool.recorder = self.recorder

    # ---- pins -------------------------------------------------------------------------------------------------

    def check_pin(self, num_tokens: int) -> None:
        """Raises InvalidRequest if a prompt of this length could not be pinned now."""
        limits = self.limits
        pinned = self.scheduler.num_pinned + num_tokens // limits.block_size
        if pinned > limits.num_blocks // 2:
            raise InvalidRequest(
                f"{num_tokens} tokens would bring pins to {pinned} of {limits.num_blocks} blocks; at most half may be"
            )
        largest = max((limits.blocks_for(s.max_slots) for s in self.scheduler.sequences.values()), default=0)
        if largest > limits.num_blocks - pinned:
            raise InvalidRequest(
                f"an admitted request may need {largest} blocks and this pin would leave {limits.num_blocks - pinned}; "
                "pin after it has finished, or give the cache more memory"
            )

    def pin(self, tokens: list[int], salt: str | None) -> tuple[int, int]:
        """Hold the cached full blocks of these tokens; returns the pin's id and how many blocks it holds."""
        self.check_pin(len(tokens))
        blocks, _ = self.scheduler.pool.find(tokens, salt)
        self.scheduler.pool.share(blocks)
        pin_id = next(self._pin_ids)
        self.pins[pin_id] = blocks
        self._count_pins()
        return pin_id, len(blocks)

    def unpin(self, pin_id: int) -> None:
        self.scheduler.pool.release(self.pins.pop(pin_id, []))
        self._count_pins()

    def _count_pins(self) -> None:
        self.scheduler.num_pinned = len({block for blocks in self.pins.values() for block in blocks})

    def end_all(self, error: BaseException) -> StepOutput:
        """End every request with this error, the first cause."""
        for live in list(self._live.values()):
            self._end(live, error)
        return self._take_output()

    def close(self) -> None:
        """Drop the model and its memory. Every request was ended before."""
        if self._close is not None:
            self._close()
        del self._run, self._logits_of, self._close, self._sampler

    # ---- the step ---------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Run one step and return what it has to say. Raises only EngineDead."""
        try:
            self._expire()
            self._step()
        except EngineDead:
            raise
        except Exception as error:
            self._start_over(error)
        return self._take_output()

    def _beat(self) -> None:
        self.last_beat = self._clock()
        if self.stop_asked:
            raise StepStopped

    def _step(self) -> None:
        plan = self.scheduler.plan()
        self._idle_steps = self._idle_steps + 1 if plan is None and self.scheduler.has_work else 0
        if self._idle_steps >= MAX_IDLE_STEPS:
            raise RuntimeError(f"{len(self.scheduler.sequences)} sequences wait and none can run")
        if plan is not None:
            self.metrics.num_steps += 1
            now = self._clock()
            for entry in plan.entries:
                live = self._samples[entry.sequence_id].request
                live.scheduled = live.scheduled or now
            if self.recorder is not None:
                record_plan(self.recorder, plan)
            self._attempt(plan, retries=1)
            if self._pace is not None:
                self.scheduler.budget = self._pace.observe(plan.num_tokens, self._clock() - now)
        if self._debug:
            check(self.scheduler, (block for blocks in self.pins.values() for block in blocks))
        self._start_overs_in_a_row = 0

    def _attempt(self, plan: Plan, retries: int) -> None:
        """Forward and commit. On a fault: once more, then by halves until it is known whose fault it is.

        KV written by an attempt that failed lies past what is computed and is written again.
        """
        try:
            output = self._run(plan, self._beat)
            sampled, logprobs = self._sample(plan, output)
            self._gather_prompt_logprobs(plan, output)
        except Exception as error:
            self.metrics.num_step_faults += 1
            log.warning("step %d failed and is contained: %r", plan.number, error)
            entries = [entry for entry in plan.entries if entry.sequence_id in self._samples]
            if retries:
                self._attempt(plan.subset(entries), retries - 1)
            elif len(entries) > 1:
                middle = len(entries) // 2
                self._attempt(plan.subset(entries[:middle]), 0)
                self._attempt(plan.subset(entries[middle:]), 0)
            elif entries:
                self._blame(entries[0], error)
            return
        self._failures_in_a_row = 0
        for progress in self.scheduler.commit(plan, sampled):
            self._emit(progress, logprobs.get(progress.sequence.id))

    def _start_over(self, cause: Exception) -> None:
        """Policy itself failed, so nothing it believes is trusted: a new scheduler recomputes everyone's KV.

        Tokens nobody was told of are dropped and drawn again, the same ones. Twice in a row is the end.
        """
        self._start_overs_in_a_row += 1
        if self._start_overs_in_a_row > 1:
            raise EngineDead(f"policy failed twice in a row: {cause!r}") from cause
        log.error("policy failed; every KV block is recomputed", exc_info=cause)
        self.metrics.num_step_faults += 1
        self.pins.clear()
        self.scheduler = self.scheduler.successor()
        for sample in list(self._samples.values()):
            sequence = sample.sequence
            del sequence.tokens[sequence.num_prompt + sample.num_emitted :]
            sequence.forks, sequence.finish_reason, sequence.stop_reason = [], None, None
            sequence.forget()
            self.scheduler.add(sequence)

    def _blame(self, entry: Entry, error: Exception) -> None:
        """This entry fails even alone: its request ends. If everything fails alone, nothing works."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise EngineDead(f"{MAX_FAILURES_IN_A_ROW} requests in a row failed alone: {error!r}") from error
        self._fail(entry.sequence_id, error)

    def _sample(self, plan: Plan, output: ModelOutput) -> tuple[list[list[int]], dict[int, TokenLogprobs]]:
        """Tokens per entry, and logprobs by sequence id. A row that cannot be sampled ends its request only."""
        rows = []
        sampled_entries = []
        for entry in plan.entries:
            if entry.num_logits:
                self._bind(entry)
                rows.append(entry.row)
                sampled_entries.append(entry)
        if not rows:
            return [[] for _ in plan.entries], {}
        result = self._sampler.sample(output.logits, rows)
        for index, error in result.failures.items():
            self._fail(sampled_entries[index].sequence_id, error)
        tokens = iter(result.tokens)
        logprobs = {
            entry.sequence_id: found
            for entry, found in zip(sampled_entries, result.logprobs, strict=True)
            if found is not None
        }
        return [[next(tokens)] if entry.num_logits else [] for entry in plan.entries], logprobs

    def _bind(self, entry: Entry) -> None:
        """Tell the sampler whose row it is, once per stay in the row."""
        if self._bound[entry.row] == (entry.sequence_id, entry.epoch):
            return
        sample = self._samples[entry.sequence_id]
        request = sample.request.request
        self._sampler.bind(
            entry.row,
            request.params,
            sample.sequence.tokens,
            len(request.prompt),
            request.seed,
            sample.index,
            tuple(self._eos_ids),
            [list(word) for word in request.bad_words],
        )
        self._bound[entry.row] = (entry.sequence_id, entry.epoch)

    def _gather_prompt_logprobs(self, plan: Plan, output: ModelOutput) -> None:
        """The hidden state at position p gives the distribution of the prompt's token p + 1."""
        offset = 0
        for entry in plan.entries:
            if not entry.prompt_logprobs:
                continue
            assert output.hidden is not None and self._logits_of is not None
            sample = self._samples.get(entry.sequence_id)
            hidden = output.hidden[offset : offset + entry.num_tokens]
            offset += entry.num_tokens
            if sample is None:
                continue
            live = sample.request
            prompt, k = live.request.prompt, live.request.params.prompt_logprobs or 0
            if live.prompt_logprobs is None:
                live.prompt_logprobs = [None] * len(prompt)
            position = entry.start + 1
            for logits in self._logits_of(hidden):
                following = prompt[position : position + len(logits)]
                found = self._sampler.prompt_logprobs(logits[: len(following)], following, k)
                live.prompt_logprobs[position : position + len(following)] = found
                position += len(logits)

    # ---- what is said about a request -------------------------------------------------------------------------

    def _emit(self, progress: Progress, logprobs: TokenLogprobs | None) -> None:
        """Turn new tokens into text; a stop string found here ends the sample."""
        sequence = progress.sequence
        sample = self._samples.get(sequence.id)
        if sample is None:
            return
        live, now = sample.request, self._clock()
        try:
            by_token = sequence.finish_reason == "stop"
            piece = sample.detokenizer.step(progress.tokens, ended_by_token=by_token)
            text = piece.text
            if piece.stop is not None and not by_token:
                sequence.finish_reason = None  # a stop string comes before the length it may also have reached
                self.scheduler.finish(sequence, "stop", piece.stop)
                sequence.finish_reason, sequence.stop_reason = "stop", piece.stop
            elif sequence.finish_reason is not None:
                text += sample.detokenizer.finish()
        except Exception as error:
            self._fail(sequence.id, error)
            return
        tokens = progress.tokens[: piece.num_tokens]
        if not live.first_token:
            live.first_token = now
        live.num_output += len(tokens)
        sample.num_emitted += len(tokens)
        self.metrics.generation_tokens += len(tokens)
        update = Update(live.request.id, sample.index, text, tokens, [logprobs] if logprobs is not None else None)
        self._output.updates.append(update)
        if sequence.finish_reason is not None:
            update.finish_reason, update.stop_reason = sequence.finish_reason, sequence.stop_reason
            del self._samples[sequence.id]
            live.num_open -= 1
            if live.num_open == 0:
                self._end(live, None)

    def _fail(self, sequence_id: int, cause: BaseException) -> None:
        """End the request this sequence belongs to, with the cause attached."""
        sample = self._samples.get(sequence_id)
        if sample is not None:
            error = RequestFailed(f"request {sample.request.request.id} failed: {cause!r}")
            error.__cause__ = cause
            self._end(sample.request, error)

    def _end(self, live: _Live, error: BaseException | None, reason: FinishReason = "error") -> None:
        """Say the last word about a request and drop everything it holds."""
        request = live.request
        if self._live.pop(request.id, None) is None:
            return
        for sample in live.samples:
            if self._samples.pop(sample.sequence.id, None) is None:
                continue
            self.scheduler.finish(sample.sequence, reason)
            self._output.updates.append(Update(request.id, sample.index, "", [], None, reason))
        num_cached = live.samples[0].sequence.num_cached if live.samples else 0
        timing = self._timing(live)
        usage = Usage(len(request.prompt), num_cached, live.num_output)
        if error is None:
            reason = live.samples[0].sequence.finish_reason or "stop"
        self.metrics.observe_request(timing, live.num_output, reason)
        self._output.ended.append(Ended(request.id, usage, timing, live.prompt_logprobs, error))

    def _timing(self, live: _Live) -> Timing:
        now, start = self._clock(), live.request.submitted
        first = live.first_token or now
        return Timing(queue=(live.scheduled or now) - start, ttft=first - start, decode=now - first, total=now - start)

    def stats(self) -> Stats:
        """A snapshot of everything counted."""
        return snapshot(self.scheduler, self.metrics)

    def _expire(self) -> None:
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            live = self._live.get(request_id)
            if live is not None:
                seconds = live.request.params.deadline
                self._end(live, DeadlineExceeded(f"request {request_id} missed its deadline of {seconds} s"))

    def _take_output(self) -> StepOutput:
        output, self._output = self._output, StepOutput()
        return output
