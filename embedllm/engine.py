"""One step: plan, forward, sample, commit, emit; and what happens when one of them fails.

Owns the requests that are in the engine and everything said about them. Single-threaded: whoever calls it is the only
one. Knows no threads, no channels, no model internals. Invariant: every request that `submit` took gets exactly one
`Ended`, and a fault in one request changes no other request's tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from array import array
from collections.abc import Callable, Iterable

from embedllm import events, resizing
from embedllm.config import Limits
from embedllm.deadlines import Deadlines
from embedllm.errors import DeadlineExceeded, EngineDead, QueueFull, RequestCancelled, RequestFailed
from embedllm.events import Recorder
from embedllm.faults import StepAbandoned, StepStopped, contain, let_go
from embedllm.flight import Flight
from embedllm.invariants import check
from embedllm.live import Live, Sample
from embedllm.metrics import Metrics, Stats, snapshot
from embedllm.outputs import NOTHING, FinishReason, TokenLogprobs
from embedllm.pace import Pace
from embedllm.pins import Pins
from embedllm.plan_types import Entry, Plan
from embedllm.readout import Reading, Readout
from embedllm.recording import Recorders, record_plan
from embedllm.request import Request, StepOutput, Update
from embedllm.runner import ModelOutput
from embedllm.scheduler import Progress, Scheduler
from embedllm.tokenizer import TokenizerProtocol

MAX_FAILURES_IN_A_ROW = 8  # entries that fail alone with no success between: then it is seen whether anything works
MAX_IDLE_STEPS = 3  # steps with work and nothing to run

log = logging.getLogger("embedllm")

Run = Callable[[Plan, Callable[[], None]], ModelOutput]


class Engine:
    """Requests in, StepOutputs out.

    `runner(plan, between_layers)` gives a ModelOutput; what else `runner.Runner` has is used where it is there.
    `tokenizer` may be None: text is then empty. `depth`: steps in flight at most, by default the runner's; above 1 the
    next one is launched before the last one is read. `debug` recounts everything after each step. Another thread may
    read `last_beat`, the monotonic time of the latest sign of life, set `stop_asked`, which ends a step between two
    layers, and add to `cancel_asked` ids of requests, which end one that nobody else is part of; `cancel` ends them.
    """

    def __init__(
        self,
        runner: Run,
        limits: Limits,
        *,
        tokenizer: TokenizerProtocol | None = None,
        eos_ids: Iterable[int] = (),
        clock: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
        depth: int | None = None,
        debug: bool = False,
    ) -> None:
        self.scheduler = Scheduler(limits)
        self.pins = Pins(self.scheduler)
        self.metrics = Metrics()
        self.recorder: Recorder | None = None
        self._recorders: list[Recorder] = []
        self._run = runner
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        depth = getattr(runner, "depth", 1) if depth is None else depth
        self._readout = Readout(limits, self._eos_ids, runner, depth > 1)
        self._flight = Flight(depth, self._launch, self._commit, lambda p: self.scheduler.rollback(p), self._note_fault)
        self._clock, self._debug, self._pace = clock, debug, pace
        if pace is not None:
            self.scheduler.budget = pace.budget
        self._ids = itertools.count()
        self._live: dict[int, Live] = {}
        self._samples: dict[int, Sample] = {}  # by sequence id
        self._deadlines = Deadlines(self._live)
        self._output = StepOutput()
        self._failures_in_a_row = self._start_overs_in_a_row = self._idle_steps = 0
        self._dead: EngineDead | None = None  # what the next step raises
        self.last_beat = clock()
        self.steps_left: int | None = None  # how many more are planned before it pauses; None: all
        self.stop_asked = False
        self.cancel_asked: set[int] = set()

    @property
    def limits(self) -> Limits:
        return self.scheduler.limits

    # ---- requests ---------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return (self.scheduler.has_work and self.steps_left != 0) or bool(self._flight) or bool(self._output.ended)

    @property
    def next_deadline(self) -> float | None:
        """When the next live request expires (monotonic seconds)."""
        return self._deadlines.next

    def submit(self, request: Request) -> None:
        """Take a validated request. What cannot be taken (no grammar, a pin came since) ends with the error."""
        live = self._live[request.id] = Live(request)
        try:
            if len(self._live) > self.limits.max_queued + self.limits.max_num_seqs:
                raise QueueFull(f"{self.limits.max_queued} requests wait already; wait for some to finish")
            self.limits.check_fits(len(request.prompt), request.max_tokens, self.scheduler.num_pinned)
            stepwise = self._readout.is_stepwise(request.params)
            live.add_samples(self._ids, self._eos_ids, self._tokenizer, stepwise)
            if request.params.deadline is not None:
                self._deadlines.add(request.submitted + request.params.deadline, request.id)
        except Exception as error:
            self._end(live, error)
            return
        first = live.samples[0].sequence
        first.forks = [sample.sequence for sample in live.samples[1:]]
        self._samples.update((sample.sequence.id, sample) for sample in live.samples)
        self.metrics.prompt_tokens += len(request.prompt)
        self.scheduler.add(first)

    def cancel(self, request_id: int) -> None:
        """End a request in any state; its blocks are back when this returns. Unknown and ended ids are ignored."""
        self.cancel_asked.discard(request_id)  # also of a request that never came
        live = self._live.get(request_id)
        if live is not None:
            self._end(live, RequestCancelled(f"request {request_id} was cancelled"), "cancelled")

    def park(self, request_id: int) -> None:
        """Set a request aside without blocks until `resume`: nobody reads it."""
        for sample in getattr(self._live.get(request_id), "samples", ()):
            self.scheduler.park(sample.sequence)

    def resume(self, request_id: int) -> None:
        for sample in getattr(self._live.get(request_id), "samples", ()):
            self.scheduler.resume(sample.sequence)

    def end_all(self, error: BaseException) -> StepOutput:
        """End every request with this error, the first cause."""
        for live in list(self._live.values()):
            self._end(live, error)
        self._flight.clear()
        return self._take_output()

    def resize(self, limits: Limits) -> None:
        """See `resizing`. Everybody's KV is computed again."""
        try:
            resizing.resize(limits, self.scheduler, self._flight, getattr(self._run, "resize", None), self._succeed)
        except EngineDead as dead:
            self._dead = dead
            raise

    def close(self) -> None:
        """Drop the model and its memory. Every request was ended before."""
        getattr(self._run, "close", lambda: None)()
        del self._run, self._readout

    # ---- the step ---------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Run one step and return what it has to say. Raises only EngineDead, or StepStopped if that was asked for."""
        if self._dead is not None:
            raise self._dead
        try:
            self._expire()
            plan = self._plan()
            if self._flight.depth == 1:
                self._run_alone(plan)
            elif not self._flight.advance(plan):
                self._run_alone(self._plan())
            if self._debug:
                check(self.scheduler, self.pins.references)
        except EngineDead:
            raise
        except Exception as error:
            self.start_over(error)
        return self._take_output()

    def _run_alone(self, plan: Plan | None) -> None:
        """Run a step to its end; what fails is tried again, then in parts."""
        if plan is None:
            return
        began = self._clock()
        for part, reading in contain(plan, self._forward_and_sample, self._is_wanted, self._blame):
            self._commit(part, reading)
        if self._pace is not None:
            self.scheduler.budget = self._pace.observe(plan.num_tokens, self._clock() - began)

    def _launch(self, plan: Plan) -> Callable[[], Reading]:
        """Queue a step on the device; what is returned waits for it."""
        return self._readout.launch(plan, self._run(plan, lambda: self._beat(plan)), self._samples)

    def _note_fault(self, error: BaseException) -> None:
        if not isinstance(error, StepAbandoned):
            self.metrics.num_step_faults += 1
            log.warning("a step in flight failed; what it was to compute is run alone: %r", error, exc_info=error)
        let_go(error)

    def _commit(self, plan: Plan, reading: Reading) -> None:
        self._failures_in_a_row = 0
        for sequence_id, error in reading.failures.items():
            self._fail(sequence_id, error)
        for progress in self.scheduler.commit(plan, reading.tokens):
            self._emit(progress, reading.logprobs.get(progress.sequence.id))
        self._start_overs_in_a_row = 0

    def _plan(self) -> Plan | None:
        plan = self.scheduler.plan() if self.steps_left != 0 else None
        if plan is None:
            idle = self.scheduler.has_work and self.steps_left != 0 and not self._flight
            self._idle_steps = self._idle_steps + 1 if idle else 0
            if self._idle_steps >= MAX_IDLE_STEPS:
                raise RuntimeError(f"{len(self.scheduler.sequences)} sequences wait and none can run")
            return None
        if self.steps_left is not None:
            self.steps_left -= 1
        self._idle_steps = 0
        self.metrics.num_steps += 1
        now = self._clock()
        for entry in plan.entries:
            live = self._samples[entry.sequence_id].live
            live.scheduled = live.scheduled or now
        if self.recorder is not None:
            record_plan(self.recorder, plan, now)
        return plan

    def _forward_and_sample(self, plan: Plan) -> Reading:
        """The part of a step that may fail and be run again: it changes nothing but KV and the sampler's rows."""
        try:
            return self._launch(plan)()
        except (StepAbandoned, StepStopped):
            raise
        except BaseException:
            self.metrics.num_step_faults += 1
            raise

    def _beat(self, plan: Plan) -> None:
        """Between two layers: a sign of life, and the place to leave a step that nobody waits for."""
        self.last_beat = self._clock()
        if self.stop_asked:
            raise StepStopped
        if self.cancel_asked:
            ids = {self._samples[entry.sequence_id].live.request.id for entry in plan.entries}
            if ids <= self.cancel_asked:
                for request_id in ids:
                    self.cancel(request_id)
                raise StepAbandoned

    def _is_wanted(self, entry: Entry) -> bool:
        return entry.sequence_id in self._samples

    def _blame(self, entry: Entry, error: BaseException) -> None:
        """This entry fails even alone: its request ends. If nothing succeeds any more, it is not the requests."""
        self._fail(entry.sequence_id, error)
        self._failures_in_a_row += 1
        if self._failures_in_a_row % MAX_FAILURES_IN_A_ROW == 0 and not self._works():
            raise EngineDead(f"{self._failures_in_a_row} requests in a row failed alone: {error!r}") from error

    def _works(self) -> bool:
        """Whether a step of one token, nobody's, runs."""
        block = self.scheduler.pool.allocate()  # there is one: a request has just failed
        try:
            self._run(Plan(0, [Entry(-1, 0, 0, 0, [0], 0, 0, array("i", [block]))]), lambda: None)
        except Exception:
            return False
        finally:
            self.scheduler.pool.release([block])
        return True

    def start_over(self, cause: Exception) -> None:
        """Policy itself failed, so nothing it believes is trusted: a new scheduler recomputes everyone's KV.

        Tokens nobody was told of are dropped and drawn again, the same ones. Who only watched is sent away: it may be
        the one who failed; `start_over` is the last event it hears. Twice in a row is the end, EngineDead.
        """
        let_go(cause)
        self._start_overs_in_a_row += 1
        if self._start_overs_in_a_row > 1:
            raise EngineDead(f"policy failed twice in a row: {cause!r}") from cause
        log.error("policy failed; every KV block is recomputed", exc_info=cause)
        self.metrics.num_step_faults += 1
        for recorder in self._recorders:
            with contextlib.suppress(Exception):
                recorder.append((events.START_OVER,))
        self._set_recorders([])
        self._flight.clear()
        for sample in self._samples.values():
            del sample.sequence.tokens[sample.sequence.num_prompt + sample.num_emitted :]
            sample.sequence.finish_reason, sample.sequence.stop_reason = None, None
        self._succeed(self.limits)

    def _succeed(self, limits: Limits) -> None:
        """From here on another scheduler plans, in which nothing is computed yet, and nothing pinned."""
        self.scheduler = self.scheduler.successor(limits)
        self.pins.forget(self.scheduler)
        resizing.begin_again(self.scheduler, [sample.sequence for sample in self._samples.values()])

    # ---- what is said about a request -------------------------------------------------------------------------

    def _emit(self, progress: Progress, logprobs: TokenLogprobs | None) -> None:
        """Turn new tokens into text; a stop string found here ends the sample."""
        sequence = progress.sequence
        sample = self._samples.get(sequence.id)
        if sample is None:
            return
        live = sample.live
        try:
            piece = sample.say(progress.tokens)
        except BaseException as error:  # a tokenizer of the caller's
            self._fail(sequence.id, error)
            return
        if piece.stop is not None:  # it comes before the token or the length that ended the sequence too
            self.scheduler.finish(sequence, "stop", piece.stop)
            sequence.finish_reason, sequence.stop_reason = "stop", piece.stop
        tokens = progress.tokens[: piece.num_tokens]
        live.first_token = live.first_token or self._clock()
        live.num_output += len(tokens)
        sample.num_emitted += len(tokens)
        self.metrics.generation_tokens += len(tokens)
        update = Update(live.request.id, sample.index, piece.said, tokens, [logprobs] if logprobs is not None else None)
        self._output.updates.append(update)
        if sequence.finish_reason is not None:
            sequence.finish_reason = sample.ending
            update.finish_reason, update.stop_reason = sequence.finish_reason, sequence.stop_reason
            del self._samples[sequence.id]
            self._readout.forget(sequence.id)
            live.num_open -= 1
            if live.num_open == 0:
                self._end(live, None)

    def _fail(self, sequence_id: int, cause: BaseException) -> None:
        """End the request this sequence belongs to; what it put into the prefix cache may be wrong and is taken out."""
        sample = self._samples.get(sequence_id)
        if sample is None:
            return
        let_go(cause)
        live = sample.live
        known = isinstance(cause, RequestFailed)  # it says what happened, and its cause is the first one
        error = RequestFailed(f"request {live.request.id} failed: {str(cause) if known else repr(cause)}")
        error.__cause__ = cause.__cause__ if known else cause
        num_found = live.samples[0].sequence.num_cached // self.limits.block_size  # blocks it took from the cache
        for sample in live.samples:
            self.scheduler.pool.forget(sample.sequence.blocks[num_found:])
        self._end(live, error)

    def _end(self, live: Live, error: BaseException | None, reason: FinishReason = "error") -> None:
        """Say the last word about a request, then drop everything it holds."""
        request, now = live.request, self._clock()
        self.cancel_asked.discard(request.id)
        if self._live.pop(request.id, None) is None:
            return
        if error is None:
            reason = live.samples[0].sequence.finish_reason or "stop"
        timing = live.timing(now)
        self.metrics.observe_request(timing, live.num_output, reason)
        open_samples = [sample for sample in live.samples if self._samples.pop(sample.sequence.id, None) is not None]
        self._output.updates += [Update(request.id, s.index, NOTHING, [], None, reason) for s in open_samples]
        self._output.ended.append(live.ended(timing, error))
        for sample in open_samples:
            self._readout.forget(sample.sequence.id)
            self.scheduler.finish(sample.sequence, reason)

    def _expire(self) -> None:
        for request_id in self._deadlines.expired(self._clock()):
            live = self._live[request_id]
            seconds = live.request.params.deadline
            self._end(live, DeadlineExceeded(f"request {request_id} missed its deadline of {seconds} s"))

    def _take_output(self) -> StepOutput:
        output, self._output = self._output, StepOutput()
        return output

    # ---- look -------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A snapshot of everything counted."""
        return snapshot(self.scheduler, self.metrics)

    def request_of(self, sequence_id: int) -> int | None:
        sample = self._samples.get(sequence_id)
        return sample.live.request.id if sample is not None else None

    def attach(self, recorder: Recorder) -> None:
        """Record every event from now on, beside whatever else records."""
        self._set_recorders([*self._recorders, recorder])

    def detach(self, recorder: Recorder) -> None:
        self._set_recorders([member for member in self._recorders if member is not recorder])

    def _set_recorders(self, members: list[Recorder]) -> None:
        self._recorders = members
        self.recorder = None if not members else members[0] if len(members) == 1 else Recorders(members)
        self.scheduler.recorder = self.scheduler.pool.recorder = self.recorder
