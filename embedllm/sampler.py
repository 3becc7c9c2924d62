"""Logits in, one token per row out: every option of SamplingParams that changes which token is chosen.

Owns the per-row sampling state (parameters, penalty counts, draw keys), which changes only when a row is bound or its
sequence grows. Knows nothing of scheduling, blocks or text. Order: repetition, frequency and presence penalties,
logit_bias, allowed_token_ids, bad_words, min_tokens, logits_processor, temperature, top_k, top_p, min_p.
Invariant: a token depends on its own row, its own sequence and its own key only; a row that fails fails alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embedllm.errors import RequestFailed
from embedllm.outputs import Logprob, TokenLogprobs
from embedllm.params import SamplingParams
from embedllm_kernels import sampling as ops

SLOW_PROCESSOR = 1.0  # seconds: logged
STUCK_PROCESSOR = 10.0  # seconds: its request fails
DRAW = 0  # purpose of a key: choosing a token; others are for verification of drafts

log = logging.getLogger("embedllm")


@dataclass(slots=True)
class Sampled:
    """What `Sampler.sample` chose. `tokens[i]` is -1 and means nothing where `failures` has i."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    failures: dict[int, Exception] = field(default_factory=dict)


@dataclass(slots=True)
class _Step:
    """One call of `Sampler.sample`: its rows, their states, and what has been chosen so far."""

    rows: Sequence[int]
    states: list[_Row]
    tokens: list[int]
    failures: dict[int, Exception] = field(default_factory=dict)


class Sampler:
    """Chooses tokens for up to `max_num_seqs` rows of logits that are `vocab_size` wide.

    Draws use the key (seed, sample_index, position) and the Gumbel-max trick of `embedllm_kernels.sampling`: stateless,
    so neither the batch nor preemption nor a repeated step changes them.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._rows: list[_Row | None] = [None] * max_num_seqs
        self._temperature = torch.zeros(max_num_seqs, dtype=torch.float64)
        self._top_k = torch.zeros(max_num_seqs, dtype=torch.int64)
        self._top_p = torch.ones(max_num_seqs, dtype=torch.float64)
        self._min_p = torch.zeros(max_num_seqs, dtype=torch.float64)
        self._mixed_ids: Tensor | None = None  # [V] int32, made at the first unfiltered draw

    def bind(
        self,
        row: int,
        params: SamplingParams,
        tokens: list[int],
        num_prompt: int,
        seed: int,
        sample_index: int,
        eos_ids: Sequence[int] = (),
        encode_bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        """Give a row to a sequence, until it is bound again or released.

        params: resolved. tokens: the sequence's live list, prompt then output; it is read at every `sample`.
        seed: 0..2**63-1. eos_ids: not to be chosen before min_tokens, as params.stop_token_ids.
        encode_bad_words: params.bad_words as token ids; sequences that end in an id without a logit are ignored.
        Raises InvalidRequest for a token id that has no logit.
        """
        params.check_fits(self.vocab_size)
        self._rows[row] = _Row(
            params, tokens, num_prompt, seed, sample_index, eos_ids, encode_bad_words, self.vocab_size
        )
        self._temperature[row] = params.temperature
        self._top_k[row] = min(params.top_k, self.vocab_size)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p

    def release(self, row: int) -> None:
        """Forget a row's sequence."""
        self._rows[row] = None

    def sample(self, logits: Tensor, rows: Sequence[int]) -> Sampled:
        """Choose the next token of each row.

        logits: [n, V] float32 of the model, not written. rows: [n] bound rows; the position sampled is the length of
        the row's live token list. All-greedy rows with nothing else asked cost one argmax, which also sees NaN.
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} rows of {self.vocab_size} ids")
        ids, best = ops.argmax_rows(logits)
        step = _Step(rows, [self._state(row) for row in rows], ids.tolist())
        for i, value in enumerate(best.tolist()):
            if not math.isfinite(value):
                step.failures[i] = RequestFailed(f"the model's logits are not finite: the largest is {value}")
        good = [(i, state) for i, state in enumerate(step.states) if i not in step.failures]
        self._draw(step, logits, best, [(i, i) for i, state in good if state.draws and not state.edits])
        edited = [i for i, state in good if state.edits]
        if edited:
            self._sample_edited(step, logits, edited)
        logprobs = self._logprobs(step, logits)
        for i in step.failures:
            step.tokens[i] = -1
        return Sampled(step.tokens, logprobs, step.failures)

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        if state is None:
            raise ValueError(f"row {row} is not bound")
        return state

    def _sample_edited(self, step: _Step, logits: Tensor, edited: list[int]) -> None:
        """Sample the rows whose logits are changed first, on a copy of them."""
        work = logits[torch.tensor(edited, device=logits.device)]
        states = [step.states[i] for i in edited]
        self._penalise(work, states)
        for line, state, i in zip(work, states, edited, strict=True):
            state.edit(line)
            try:
                state.process(line)
            except RequestFailed as error:
                step.failures[i] = error
        ids, best = ops.argmax_rows(work)
        drawn = []
        for place, (i, token, value) in enumerate(zip(edited, ids.tolist(), best.tolist(), strict=True)):
            step.tokens[i] = token
            if i in step.failures:
                continue
            if not math.isfinite(value):
                step.failures[i] = RequestFailed(_no_choice(value))
            elif step.states[i].draws:
                drawn.append((place, i))
        self._draw(step, work, best, drawn)

    def _penalise(self, work: Tensor, states: list[_Row]) -> None:
        """Penalties of the rows that have them, as one gather and one scatter."""
        places, ids, times, factors = [], [], [], []
        for place, state in enumerate(states):
            if state.counts is not None:
                seen, count = state.counts.update(state.tokens)
                places.append(torch.full_like(seen, place))
                ids.append(seen)
                times.append(count)
                factors.append(state.penalties.expand(len(seen), 3))
        if places:
            device = work.device
            pairs = (torch.cat(part).to(device) for part in (places, ids, times))
            ops.penalise(work, *pairs, *torch.cat(factors).to(device).unbind(1))

    def _draw(self, step: _Step, source: Tensor, best: Tensor, pairs: list[tuple[int, int]]) -> None:
        """For each (place, index), draw the token of the step's row `index` from `source[place]`.

        best: the largest logit of each source row.
        """
        for filtered in (False, True):
            some = [pair for pair in pairs if step.states[pair[1]].filtered is filtered]
            if not some:
                continue
            device = source.device
            where = torch.tensor([place for place, _ in some], device=device)
            row = torch.tensor([step.rows[i] for _, i in some])
            lines = source if len(some) == len(source) else source[where]
            words = ops.key_words([step.states[i].key() for _, i in some], device)
            temperature = self._temperature[row].to(device)
            if filtered:
                limits = (limit[row].to(device) for limit in (self._top_k, self._top_p, self._min_p))
                ids = ops.draw_filtered(lines, best[where], temperature, words, *limits)
            else:
                if self._mixed_ids is None or self._mixed_ids.device != device:
                    self._mixed_ids = ops.mix_ids(torch.arange(self.vocab_size, device=device))
                ids = ops.draw(lines, best[where], temperature, words, self._mixed_ids)
            for (_, i), token in zip(some, ids.tolist(), strict=True):
                step.tokens[i] = token

    def _logprobs(self, step: _Step, logits: Tensor) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(step.states)
        groups: dict[int, list[int]] = {}
        for i, state in enumerate(step.states):
            if state.params.logprobs is not None and i not in step.failures:
                groups.setdefault(state.params.logprobs, []).append(i)
        for k, group in groups.items():
            lines = logits[torch.tensor(group, device=logits.device)]
            for i, entry in zip(group, self.prompt_logprobs(lines, [step.tokens[i] for i in group], k), strict=True):
                found[i] = entry
        return found

    def prompt_logprobs(self, logits: Tensor, next_tokens: Sequence[int], k: int) -> list[TokenLogprobs]:
        """Log-probabilities of the raw distribution: of each row's given next token, then of the k most likely.

        logits: [m, V] float32, a slice of the prompt's. next_tokens: [m]. An id is listed once: if the given one is
        among the k, it stands first only. One without a logit has -inf and comes last. Raises RequestFailed if a row is
        not finite.
        """
        if not bool(torch.isfinite(logits.amax(1)).all()):
            raise RequestFailed("the model's logits are not finite, so there are no log-probabilities")
        size = logits.shape[1]
        chosen = torch.tensor([min(token, size - 1) for token in next_tokens], dtype=torch.int64, device=logits.device)
        columns = (column.tolist() for column in ops.logprobs(logits, chosen, k))
        entries = []
        for token, logprob, rank, values, ids in zip(next_tokens, *columns, strict=True):
            ranked = enumerate(zip(ids, values, strict=True), start=1)
            rest = [Logprob(other, value, place) for place, (other, value) in ranked if other != token]
            own = Logprob(token, logprob, rank) if token < size else Logprob(token, -math.inf, size + 1)
            entries.append([own, *rest])
        return entries


def _no_choice(best: float) -> str:
    if best == -math.inf:
        return (
            "no token may be chosen: logit_bias, allowed_token_ids, bad_words, min_tokens and logits_processor "
            "together forbid every id; allow at least one"
        )
    return f"the logits to sample from are not finite after logits_processor: the largest is {best}"


class _Row:
    """One bound sequence: what is fixed while it is bound, and how to change its logits."""

    def __init__(
        self,
        params: SamplingParams,
        tokens: list[int],
        num_prompt: int,
        seed: int,
        sample_index: int,
        eos_ids: Sequence[int],
        bad_words: Sequence[Sequence[int]],
        vocab_size: int,
    ) -> None:
        self.params = params
        self.tokens = tokens
        self.num_prompt = num_prompt
        self.draws = params.temperature > 0
        self.filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self._stream = ops.fold(ops.fold(ops.fold(0, seed), sample_index), DRAW)
        factors = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self.penalties = torch.tensor([factors], dtype=torch.float32)
        penalised = factors != (1.0, 0.0, 0.0)
        self.counts = _Counts(num_prompt, factors[0] != 1.0, vocab_size) if penalised else None
        bias = params.logit_bias or {}
        self._bias = (torch.tensor(list(bias), dtype=torch.int64), torch.tensor(list(bias.values()))) if bias else None
        self._allowed = torch.tensor(params.allowed_token_ids) if params.allowed_token_ids is not None else None
        ends = sorted({i for i in (*eos_ids, *params.stop_token_ids) if i < vocab_size})
        self._ends = torch.tensor(ends) if ends and params.min_tokens else None
        # An id without a logit is never chosen, so a sequence that ends in one needs no watching. As in transformers,
        # a bad word that is exactly an EOS does not forbid EOS.
        words = [w for w in bad_words if w and w[-1] < vocab_size and not (len(w) == 1 and w[0] in eos_ids)]
        self._banned = torch.tensor(sorted({w[0] for w in words if len(w) == 1}), dtype=torch.int64)
        self._watched: dict[int, list[tuple[list[int], int]]] = {}  # by the token before the last
        for word in words:
            if len(word) > 1:
                self._watched.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))
        masked = self._bias is not None or self._allowed is not None or self._ends is not None or bool(words)
        self.edits = penalised or masked or params.logits_processor is not None

    def key(self) -> int:
        """The 64-bit key of the draw at the next position."""
        return ops.fold(self._stream, len(self.tokens))

    def edit(self, line: Tensor) -> None:
        """Bias and masks, in place on this row's [V] copy."""
        if self._bias is not None:
            ids, values = self._bias
            line[ids] += values.to(line.device)
        if self._allowed is not None:
            values = line[self._allowed]
            line.fill_(-math.inf)
            line[self._allowed] = values
        if len(self._banned):
            line[self._banned] = -math.inf
        for prefix, last in self._watched.get(self.tokens[-1], ()) if self.tokens else ():
            if self.tokens[-len(prefix) :] == prefix:
                line[last] = -math.inf
        if self._ends is not None and len(self.tokens) - self.num_prompt < self.params.min_tokens:
            line[self._ends] = -math.inf

    def process(self, line: Tensor) -> None:
        """Run the caller's logits_processor, if any, and put its answer into `line`. Raises only RequestFailed."""
        call = self.params.logits_processor
        if call is None:
            return
        prompt, output = self.tokens[: self.num_prompt], self.tokens[self.num_prompt :]
        given = line.cpu().clone()
        start = time.monotonic()
        try:
            answer = call(prompt, output, given)
        except (
            BaseException
        ) as error:  # SystemExit and KeyboardInterrupt too: they are this request's, not the engine's
            raise RequestFailed(f"logits_processor raised {error!r}") from error
        seconds = time.monotonic() - start
        if seconds > STUCK_PROCESSOR:
            raise RequestFailed(
                f"logits_processor took {seconds:.1f} s for one token; the limit is {STUCK_PROCESSOR:g} s"
            )
        if seconds > SLOW_PROCESSOR:
            log.warning("a logits_processor took %.1f s for one token; every running request waits for it", seconds)
        if not isinstance(answer, Tensor):
            raise RequestFailed(f"logits_processor must return a tensor, got {type(answer).__name__}")
        if answer.shape != line.shape or not answer.is_floating_point() or answer.layout != torch.strided:
            raise RequestFailed(
                f"logits_processor must return a dense floating-point tensor of shape {tuple(line.shape)}, "
                f"got {answer.dtype} of shape {tuple(answer.shape)}"
            )
        line.copy_(answer.detach())


class _Counts:
    """How often each id stands in the output (and, at zero, which ids stand in the prompt), kept up token by token.

    A prompt may hold ids without a logit, such as a placeholder's: they are left out.
    """

    def __init__(self, num_prompt: int, prompt_too: bool, vocab_size: int) -> None:
        self._num_prompt = num_prompt
        self._vocab_size = vocab_size
        self._start = 0 if prompt_too else num_prompt
        self._done = -1  # tokens before this are counted
        self._last = -1  # the last of them
        self._place: dict[int, int] = {}
        self._ids = torch.empty(0, dtype=torch.int64)
        self._times = torch.empty(0, dtype=torch.float32)

    def update(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """(ids, times in the output) of the live list, each id once. Counts afresh if the list went back."""
        went_back = len(tokens) < self._done or (self._done > 0 and tokens[self._done - 1] != self._last)
        if self._done < 0 or went_back:
            self._recount(tokens)
        else:
            for position in range(self._done, len(tokens)):
                self._add(tokens[position])
        self._done = len(tokens)
        self._last = tokens[-1] if tokens else -1
        size = len(self._place)
        return self._ids[:size], self._times[:size]

    def _recount(self, tokens: list[int]) -> None:
        prompt = tokens[self._start : self._num_prompt]
        counted = Counter(dict.fromkeys((token for token in prompt if token < self._vocab_size), 0))
        counted.update(tokens[self._num_prompt :])
        spare = [0] * max(64, len(counted) // 4)
        self._ids = torch.tensor([*counted, *spare], dtype=torch.int64)
        self._times = torch.tensor([*counted.values(), *spare], dtype=torch.float32)
        self._place = {token: place for place, token in enumerate(counted)}

    def _add(self, token: int) -> None:
        """Count one more output token."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
            self._times = torch.cat([self._times, torch.zeros_like(self._times)])
        self._ids[place] = token
        self._times[place] += 1
