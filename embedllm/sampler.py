"""Logits in, one token per row out: every option of SamplingParams that changes which token is chosen.

Owns the per-row sampling state (parameters, penalty counts, draw keys), which changes only when a row is bound or its
sequence grows. Knows nothing of scheduling, blocks or text. Order: what `edits` lists, then temperature, top_k, top_p,
min_p. Invariant: a token depends on its own row, its own sequence and its own key only; a row that fails fails alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedllm.choice import Choice, Sampled, entries_of
from embedllm.edits import DeviceEditor, Edit, Editor, HostEditor, penalties_of
from embedllm.errors import RequestFailed
from embedllm.ops import on_gpu
from embedllm.outputs import Logprob, TokenLogprobs
from embedllm.params import SamplingParams
from embedllm.structured.follower import Follower
from embedllm.transfer import Download, upload
from embedllm_kernels import sampling as ops

DRAW = 0  # purpose of a key: choosing a token; others are for verification of drafts


class Sampler:
    """Chooses tokens for up to `max_num_seqs` rows of logits that are `vocab_size` wide.

    Draws use the key (seed, sample_index, position) and the Gumbel-max trick of `embedllm_kernels.sampling`: stateless,
    so neither the batch nor preemption nor a repeated step changes them.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        """device: of the logits."""
        self.vocab_size = vocab_size
        self._rows: list[_Row | None] = [None] * max_num_seqs
        self._temperature = torch.zeros(max_num_seqs, dtype=torch.float64)
        self._top_k = torch.zeros(max_num_seqs, dtype=torch.int64)
        self._top_p = torch.ones(max_num_seqs, dtype=torch.float64)
        self._min_p = torch.zeros(max_num_seqs, dtype=torch.float64)
        self._filtered = [False] * max_num_seqs
        self._mixed_ids: Tensor | None = None  # [V] int32, made at the first unfiltered draw
        device = torch.device(device)
        self._host = HostEditor()
        self._editor: Editor = DeviceEditor(max_num_seqs, vocab_size, device) if on_gpu(device) else self._host

    def is_stepwise(self, params: SamplingParams) -> bool:
        """Whether each token depends on the ids before it by more than the logits: the host must know them first."""
        if params.bad_words or params.logits_processor is not None or params.structured is not None:
            return True
        return penalties_of(params) is not None and not self._editor.counts_ahead

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
        follower: Follower | None = None,
    ) -> None:
        """Give a row to a sequence, until it is bound again or released.

        params: resolved. tokens: the sequence's live list, prompt then output; it is read at every `sample`.
        seed: 0..2**63-1. eos_ids: not to be chosen before min_tokens, as params.stop_token_ids.
        encode_bad_words: params.bad_words as token ids; sequences that end in an id without a logit are ignored.
        follower: of the same live list, where the output has a shape.
        Raises InvalidRequest for a token id that has no logit.
        """
        params.check_fits(self.vocab_size)
        edit = Edit(params, tokens, num_prompt, eos_ids, encode_bad_words, self.vocab_size, follower)
        self._rows[row] = _Row(params, edit, seed, sample_index)
        self._editor.bind(row, edit)
        self._temperature[row] = params.temperature
        self._top_k[row] = min(params.top_k, self.vocab_size)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._filtered[row] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0

    def release(self, row: int) -> None:
        """Forget a row's sequence."""
        self._rows[row] = None

    def after(self, row: int, token: int) -> list[int]:
        """What must come after the token that was chosen for this row, whatever the model says; often nothing."""
        follower = self._state(row).edit.follower
        return [] if follower is None else follower.after(token)

    def sample(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int] | None = None) -> Sampled:
        """Choose the next token of each row, and wait for it. See `launch`."""
        return self.launch(logits, rows, positions).read()

    def launch(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int] | None = None) -> Choice:
        """Choose the next token of each row where the logits are.

        logits: [n, V] float32 of the model, not written. rows: [n] bound rows. positions: [n], of the tokens to choose,
        None for the lengths of the rows' live lists; those before them need not be known yet, except for rows whose
        parameters are stepwise. All-greedy rows with nothing else asked cost one argmax. Rows that need the host are
        chosen when the Choice is read, so that nobody else waits for them.
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} rows of {self.vocab_size} ids")
        states = [self._state(row) for row in rows]
        at = [len(state.tokens) for state in states] if positions is None else list(positions)
        late = [i for i, state in enumerate(states) if state.edit.needs_host]
        now = [i for i in range(len(rows)) if i not in late] if late else range(len(rows))
        choice = self._choose(logits, rows, states, at, now)
        if late:
            lines = Download([logits[upload(torch.tensor(late), logits.device)]])
            its = [rows[i] for i in late], [states[i] for i in late], [at[i] for i in late]
            choice.late = late, lambda: self._choose_late(lines.wait()[0], *its)
        return choice.send()

    def _choose(
        self, logits: Tensor, rows: Sequence[int], states: list[_Row], at: list[int], asked: Sequence[int]
    ) -> Choice:
        """A token for the `asked` of the rows; what the others get means nothing."""
        choice = Choice(*ops.argmax_rows(logits))
        keys = {i: states[i].key(at[i]) for i in asked if states[i].draws}
        edited = [i for i in asked if not states[i].edit.asks_nothing]
        plain = [(i, i, rows[i], key) for i, key in keys.items() if states[i].edit.asks_nothing]
        self._draw(choice.ids, logits, choice.best, plain)
        if edited:
            bound, edits = [rows[i] for i in edited], [states[i].edit for i in edited]
            editor = self._host if edits[0].needs_host else self._editor
            where = upload(torch.tensor(edited), logits.device)
            masks: list[NDArray[np.int32] | None] = [None] * len(edits)
            for place, i in enumerate(edited):
                try:
                    masks[place] = edits[place].mask()
                except Exception as error:
                    choice.failures[i] = error
            lines = None if len(edited) == len(logits) else where
            work = editor.apply(logits, lines, bound, edits, [at[i] for i in edited], masks)
            for place, i in enumerate(edited):
                try:
                    edits[place].process(work[place], masks[place])
                except RequestFailed as error:
                    choice.failures[i] = error
            ids, best = ops.argmax_rows(work)
            choice.edited = edited, best
            choice.ids[where] = ids
            self._draw(choice.ids, work, best, [(n, i, rows[i], keys[i]) for n, i in enumerate(edited) if i in keys])
            editor.note(bound, choice.ids[where])
        self._log(choice, logits, {i: states[i].params.logprobs for i in asked})
        return choice

    def _choose_late(self, lines: Tensor, rows: list[int], states: list[_Row], at: list[int]) -> Sampled:
        """Tokens of rows that need the host, whose logits have come there; none for those that were released since."""
        there = [i for i, state in enumerate(states) if self._rows[rows[i]] is state]
        return self._choose(lines, rows, states, at, there).send().read()

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        if state is None:
            raise ValueError(f"row {row} is not bound")
        return state

    def _draw(self, chosen: Tensor, source: Tensor, best: Tensor, draws: list[tuple[int, int, int, int]]) -> None:
        """For each (place, i, row, key), draw `chosen[i]` from `source[place]`. best: largest logit of each place."""
        device = source.device
        for kind in (False, True):
            some = [each for each in draws if self._filtered[each[2]] is kind]
            if not some:
                continue
            if on_gpu(device):
                self._draw_on_gpu(chosen, source, some, kind)
                continue
            places, indices, rows, keys = map(list, zip(*some, strict=True))
            row, where, words = torch.tensor(rows), torch.tensor(places), ops.key_words(keys)
            lines = source if len(some) == len(source) else source[where]
            temperature, first = self._temperature[row], best[where]
            if kind:
                limits = (self._top_k[row], self._top_p[row], self._min_p[row])
                ids = ops.draw_filtered(lines, first, temperature, words, *limits)
            else:
                if self._mixed_ids is None:
                    self._mixed_ids = ops.mix_ids(torch.arange(self.vocab_size))
                ids = ops.draw(lines, first, temperature, words, self._mixed_ids)
            chosen[torch.tensor(indices)] = ids

    def _draw_on_gpu(
        self, chosen: Tensor, source: Tensor, draws: list[tuple[int, int, int, int]], filtered: bool
    ) -> None:
        """The same with one upload of all that the kernels need."""
        from embedllm_kernels.triton.sampling import sample

        places, indices, rows, keys = map(list, zip(*draws, strict=True))
        row, count = torch.tensor(rows), len(draws)
        numbers = torch.empty((8, count), dtype=torch.int32)
        numbers[:2] = torch.tensor([places, indices])
        numbers[2:4] = ops.key_words(keys).t()
        numbers[4] = self._top_k[row]
        limits = (self._temperature, self._top_p, self._min_p)
        numbers[5:].view(torch.float32).copy_(torch.stack([limit[row] for limit in limits]))
        there = upload(numbers, source.device)
        temperature, top_p, min_p = there[5:].view(torch.float32).unbind()
        lines = source if count == len(source) else source[there[0].long()]
        words = there[2:4].t().contiguous()
        ids, _ = sample(lines, temperature, there[4], top_p, min_p, words, filtered=filtered)
        chosen[there[1].long()] = ids

    def _log(self, choice: Choice, logits: Tensor, asked: dict[int, int | None]) -> None:
        """Log-probabilities of the rows that want them, in groups that want as many."""
        groups: dict[int, list[int]] = {}
        for i, k in asked.items():
            if k is not None:
                groups.setdefault(k, []).append(i)
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


class _Row:
    """One bound sequence."""

    def __init__(self, params: SamplingParams, edit: Edit, seed: int, sample_index: int) -> None:
        self.params, self.edit = params, edit
        self.draws = params.temperature > 0
        self._stream = ops.fold(ops.fold(ops.fold(0, seed), sample_index), DRAW)

    @property
    def tokens(self) -> list[int]:
        return self.edit.tokens

    def key(self, position: int) -> int:
        """The 64-bit key of the draw at a position."""
        return ops.fold(self._stream, position)
