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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from embedllm.choice import Choice, Sampled, entries_of
from embedllm.errors import RequestFailed
from embedllm.ops import on_gpu
from embedllm.outputs import Logprob, TokenLogprobs
from embedllm.params import SamplingParams
from embedllm.transfer import upload
from embedllm_kernels import sampling as ops

SLOW_PROCESSOR = 1.0  # seconds: logged
STUCK_PROCESSOR = 10.0  # seconds: its request fails
DRAW = 0  # purpose of a key: choosing a token; others are for verification of drafts

log = logging.getLogger("embedllm")


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
        self._filtered = [False] * max_num_seqs
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
        self._filtered[row] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0

    def release(self, row: int) -> None:
        """Forget a row's sequence."""
        self._rows[row] = None

    def sample(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int] | None = None) -> Sampled:
        """Choose the next token of each row, and wait for it. See `launch`."""
        return self.launch(logits, rows, positions).read()

    def launch(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int] | None = None) -> Choice:
        """Choose the next token of each row where the logits are.

        logits: [n, V] float32 of the model, not written. rows: [n] bound rows. positions: [n], of the tokens to choose,
        None for the lengths of the rows' live lists; those before them need not be known yet, except where penalties,
        bad words or a processor look at them. All-greedy rows with nothing else asked cost one argmax.
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} rows of {self.vocab_size} ids")
        choice = Choice(*ops.argmax_rows(logits))
        states = [self._state(row) for row in rows]
        at = [len(state.tokens) for state in states] if positions is None else positions
        keys = {
            i: state.key(position) for i, (state, position) in enumerate(zip(states, at, strict=True)) if state.draws
        }
        self._draw(
            choice.ids, logits, choice.best, [(i, i, rows[i], key) for i, key in keys.items() if not states[i].edits]
        )
        edited = [i for i, state in enumerate(states) if state.edits]
        if edited:
            work = logits[upload(torch.tensor(edited), logits.device)]
            for i, error in self._edit(work, [states[i] for i in edited], [at[i] for i in edited]):
                choice.failures[edited[i]] = error
            ids, best = ops.argmax_rows(work)
            choice.edited = edited, best
            choice.ids[upload(torch.tensor(edited), logits.device)] = ids
            self._draw(choice.ids, work, best, [(n, i, rows[i], keys[i]) for n, i in enumerate(edited) if i in keys])
        self._log(choice, logits, states)
        return choice.send()

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        if state is None:
            raise ValueError(f"row {row} is not bound")
        return state

    def _edit(self, work: Tensor, states: list[_Row], positions: list[int]) -> Iterator[tuple[int, RequestFailed]]:
        """Change the rows' logits in place; yields those whose processor failed."""
        self._penalise(work, states)
        for i, (line, state, position) in enumerate(zip(work, states, positions, strict=True)):
            state.edit(line, position)
            try:
                state.process(line)
            except RequestFailed as error:
                yield i, error

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
            pairs = (upload(torch.cat(part), device) for part in (places, ids, times))
            ops.penalise(work, *pairs, *upload(torch.cat(factors), device).unbind(1))

    def _draw(self, chosen: Tensor, source: Tensor, best: Tensor, draws: list[tuple[int, int, int, int]]) -> None:
        """For each (place, i, row, key), draw `chosen[i]` from `source[place]`. best: largest logit of each place."""
        device = source.device
        for kind in (False, True):
            some = [each for each in draws if self._filtered[each[2]] is kind]
            if not some:
                continue
            places, indices, rows, keys = map(list, zip(*some, strict=True))
            row = torch.tensor(rows)
            states = self._temperature, self._top_k, self._top_p, self._min_p
            limits = [upload(state[row], device) for state in states]
            words = upload(ops.key_words(keys), device)
            where = upload(torch.tensor(places), device)
            lines = source if len(some) == len(source) else source[where]
            if on_gpu(device):
                ids = _draw_on_gpu(lines, limits, words, kind)
            elif kind:
                ids = ops.draw_filtered(lines, best[where], limits[0], words, *limits[1:])
            else:
                if self._mixed_ids is None:
                    self._mixed_ids = ops.mix_ids(torch.arange(self.vocab_size))
                ids = ops.draw(lines, best[where], limits[0], words, self._mixed_ids)
            chosen[upload(torch.tensor(indices), device)] = ids

    def _log(self, choice: Choice, logits: Tensor, states: list[_Row]) -> None:
        """Log-probabilities of the rows that want them, in groups that want as many."""
        groups: dict[int, list[int]] = {}
        for i, state in enumerate(states):
            if state.params.logprobs is not None:
                groups.setdefault(state.params.logprobs, []).append(i)
        for k, group in groups.items():
            where = upload(torch.tensor(group), logits.device)
            choice.logprobs.append((group, ops.logprobs(logits[where], choice.ids[where], k)))

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
        found = ops.logprobs(logits, chosen, k)
        entries = entries_of(next_tokens, found)
        for token, entry in zip(next_tokens, entries, strict=True):
            if token >= size:
                entry[0] = Logprob(token, -math.inf, size + 1)
        return entries


def _draw_on_gpu(logits: Tensor, limits: list[Tensor], words: Tensor, filtered: bool) -> Tensor:
    from embedllm_kernels.triton.sampling import sample

    temperature, top_k, top_p, min_p = limits
    ids, _ = sample(logits, temperature.float(), top_k.int(), top_p.float(), min_p.float(), words, filtered=filtered)
    return ids


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

    def key(self, position: int) -> int:
        """The 64-bit key of the draw at a position."""
        return ops.fold(self._stream, position)

    def edit(self, line: Tensor, position: int) -> None:
        """Bias and masks, in place on this row's [V] copy. position: of the token to choose."""
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
        if self._ends is not None and position - self.num_prompt < self.params.min_tokens:
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
