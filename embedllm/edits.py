"""What changes logits before a token is chosen: what a sequence asks for, and how it is done where the logits are.

Owns that part of the per-row state. Knows nothing of choosing. Order: repetition, frequency and presence penalties,
logit_bias with the ids that may not be chosen, allowed_token_ids with what the shape allows, logits_processor, and the
shape once more. Invariant: an edit writes to its own row of a copy, never to the model's logits.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedllm.errors import RequestFailed
from embedllm.params import SamplingParams
from embedllm.structured.follower import Follower
from embedllm.transfer import upload
from embedllm_kernels import sampling as ops

SLOW_PROCESSOR = 1.0  # seconds: logged
STUCK_PROCESSOR = 10.0  # seconds: its request fails

log = logging.getLogger("embedllm")


def penalties_of(params: SamplingParams) -> tuple[float, float, float] | None:
    """(repetition, frequency, presence), None where all are neutral."""
    factors = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return None if factors == (1.0, 0.0, 0.0) else factors


def pack_ids(ids: Sequence[int], size: int) -> NDArray[np.int32]:
    """Ids below `size` as bits: int32 [ceil(size / 32)], bit id % 32 of word id // 32."""
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32, copy=False)


# The bits of each byte, lowest first, as what a logit may be at most. A tenth of what filling by a bool mask costs.
_CEILINGS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
_CEILINGS = _CEILINGS.astype(np.float32)


def keep_ids(logits: Tensor, words: NDArray[np.int32]) -> Tensor:
    """A copy of float32 [n, V], -inf where an id's bit is not set in words [n, ceil(V / 32)]; NaN stays NaN."""
    ceilings = np.take(_CEILINGS, words.astype("<i4", copy=False).view(np.uint8), axis=0).reshape(len(words), -1)
    kept = torch.from_numpy(ceilings[:, : logits.shape[1]])
    return torch.minimum(logits, kept, out=kept)


class Edit:
    """What one bound sequence asks for. `tokens` is its live list, prompt then output; `follower` its shape, if any."""

    def __init__(
        self,
        params: SamplingParams,
        tokens: list[int],
        num_prompt: int,
        eos_ids: Sequence[int],
        bad_words: Sequence[Sequence[int]],
        vocab_size: int,
        follower: Follower | None = None,
    ) -> None:
        self.tokens, self.num_prompt, self.follower = tokens, num_prompt, follower
        self.processor = params.logits_processor
        self.penalties = penalties_of(params)
        self._counts = _Counts(num_prompt, params.repetition_penalty != 1.0, vocab_size) if self.penalties else None
        ends = [i for i in (*eos_ids, *params.stop_token_ids) if i < vocab_size] if params.min_tokens else []
        self._min_tokens = params.min_tokens if ends else 0
        # An id without a logit is never chosen, so a sequence that ends in one needs no watching. As in transformers,
        # a bad word that is exactly an EOS does not forbid EOS.
        words = [w for w in bad_words if w and w[-1] < vocab_size and not (len(w) == 1 and w[0] in eos_ids)]
        self._biases = dict(params.logit_bias or {}) | {w[0]: -math.inf for w in words if len(w) == 1}
        self._early = self._biases | dict.fromkeys(ends, -math.inf)
        self._watched: dict[int, list[tuple[list[int], int]]] = {}  # by the token before the last
        for word in words:
            if len(word) > 1:
                self._watched.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))
        self.allowed: NDArray[np.int32] | None = None  # bits: id % 32 of word id // 32
        if params.allowed_token_ids is not None:
            self.allowed = pack_ids(params.allowed_token_ids, vocab_size)
        self._shaped = None if follower is None else np.zeros(-(-vocab_size // 32), np.int32)
        # The host must know the tokens so far, and see the logits, before the next one is chosen.
        self.needs_host = bool(self._watched) or self.processor is not None
        asks = self.penalties or self._early or self.needs_host or self.allowed is not None or follower is not None
        self.asks_nothing = not asks

    def mask(self) -> NDArray[np.int32] | None:
        """The ids that may be chosen now, as bits; None for all. Good until the next call. Raises RequestFailed."""
        if self.follower is None or self._shaped is None:
            return self.allowed
        self.follower.fill(self._shaped)
        if self.allowed is not None:
            self._shaped &= self.allowed
        return self._shaped

    def biases(self, position: int) -> dict[int, float]:
        """What is added to the logits of the token at `position`, by id; -inf where an id may not be chosen."""
        found = self._early if position - self.num_prompt < self._min_tokens else self._biases
        if self._watched and self.tokens:
            endings = self._watched.get(self.tokens[-1], ())
            banned = [last for prefix, last in endings if self.tokens[-len(prefix) :] == prefix]
            found = found | dict.fromkeys(banned, -math.inf) if banned else found
        return found

    def count(self) -> tuple[Tensor, Tensor] | None:
        """(ids, times in the output) of what the penalties look at, each id once; None without penalties."""
        return self._counts.update(self.tokens) if self._counts is not None else None

    def process(self, line: Tensor, mask: NDArray[np.int32] | None) -> None:
        """Run the caller's logits_processor, if any, and put its answer into `line`. Raises only RequestFailed.

        mask: what `mask()` said last; where there is a shape, the answer keeps to it.
        """
        if self.processor is None:
            return
        prompt, output = self.tokens[: self.num_prompt], self.tokens[self.num_prompt :]
        start = time.monotonic()
        try:
            answer = self.processor(prompt, output, line.clone())
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
        if self.follower is not None and mask is not None:
            line.copy_(keep_ids(line[None], mask[None])[0])


Masks = Sequence[NDArray[np.int32] | None]  # of each row, see Edit.mask


class Editor(Protocol):
    """Does what Edits ask for, for rows of logits on one device."""

    counts_ahead: bool  # penalties know of tokens that the host does not know yet

    def bind(self, row: int, edit: Edit) -> None:
        """The row is this sequence's from now on, whose tokens are all known."""

    def apply(
        self,
        logits: Tensor,
        where: Tensor | None,
        rows: Sequence[int],
        edits: Sequence[Edit],
        positions: Sequence[int],
        masks: Masks,
    ) -> Tensor:
        """A copy [n, V] of the lines `where` (int64 [n]; None: all) of logits, with penalties, biases and `masks`.

        positions: of the tokens to choose.
        """

    def note(self, rows: Sequence[int], ids: Tensor) -> None:
        """These ids int64 [n] were chosen for these rows."""


class HostEditor:
    """On the host, where the live lists say what was chosen."""

    counts_ahead = False

    def bind(self, row: int, edit: Edit) -> None:
        pass

    def apply(
        self,
        logits: Tensor,
        where: Tensor | None,
        rows: Sequence[int],
        edits: Sequence[Edit],
        positions: Sequence[int],
        masks: Masks,
    ) -> Tensor:
        found = [(place, edit.penalties, edit.count()) for place, edit in enumerate(edits)]
        seen = [(place, torch.tensor([factors]), *count) for place, factors, count in found if count and factors]
        each = [(place, *item) for place, edit in enumerate(edits) for item in edit.biases(positions[place]).items()]
        masked = [place for place, mask in enumerate(masks) if mask is not None]
        words = np.stack([mask for mask in masks if mask is not None]) if masked else None
        work = logits if where is None else logits[where]
        if words is not None and len(masked) == len(edits) and not (seen or each):
            return keep_ids(work, words)
        if where is None:
            work = work.clone()
        if seen:
            at = torch.cat([torch.full_like(ids, place) for place, _, ids, _ in seen])
            ids, times = (torch.cat(part) for part in list(zip(*seen, strict=True))[2:])
            factors = torch.cat([factor.expand(len(ids), 3) for _, factor, ids, _ in seen])
            ops.penalise(work, at, ids, times, *factors.unbind(1))
        if each:
            places, chosen, values = (torch.tensor(column) for column in zip(*each, strict=True))
            work[places, chosen] += values.to(work.dtype)
        if words is not None:
            its = torch.tensor(masked)
            work[its] = keep_ids(work[its], words)
        return work

    def note(self, rows: Sequence[int], ids: Tensor) -> None:
        pass


class DeviceEditor:
    """On a GPU, in one pass; penalties count there, so that the next step can be launched before the host knows."""

    counts_ahead = True

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._num_rows, self._size, self._device = max_num_seqs, vocab_size, device
        self._penalised: set[int] = set()  # rows
        self._factors = torch.tensor([[1.0], [0.0], [0.0]]).repeat(1, max_num_seqs).to(device)
        self._counts: Tensor | None = None  # [rows, V] int32, made when the first row is penalised
        self._prompts: Tensor | None = None  # [rows, words] int32

    def bind(self, row: int, edit: Edit) -> None:
        if edit.penalties is None or edit.needs_host:
            if row in self._penalised:
                self._penalised.remove(row)
                self._factors[:, row] = upload(torch.tensor([1.0, 0.0, 0.0]), self._device)
            return
        if self._counts is None or self._prompts is None:
            self._counts = torch.zeros((self._num_rows, self._size), dtype=torch.int32, device=self._device)
            self._prompts = torch.zeros((self._num_rows, -(-self._size // 32)), dtype=torch.int32, device=self._device)
        prompt, output = edit.tokens[: edit.num_prompt], edit.tokens[edit.num_prompt :]
        words = pack_ids([token for token in prompt if token < self._size], self._size)
        self._penalised.add(row)
        self._factors[:, row] = upload(torch.tensor(edit.penalties), self._device)
        self._prompts[row] = upload(torch.from_numpy(words), self._device)
        line = self._counts[row].zero_()
        if output:
            ids = upload(torch.tensor(output), self._device)
            line.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def apply(
        self,
        logits: Tensor,
        where: Tensor | None,
        rows: Sequence[int],
        edits: Sequence[Edit],
        positions: Sequence[int],
        masks: Masks,
    ) -> Tensor:
        from embedllm_kernels.triton.edits import apply_edits

        work = logits.clone() if where is None else logits[where]
        device, penalised = work.device, not self._penalised.isdisjoint(rows)
        each = [edit.biases(position) for edit, position in zip(edits, positions, strict=True)]
        widest = max(map(len, each))
        bias_ids, values = np.full((len(each), widest), -1, np.int32), np.zeros((len(each), widest), np.float32)
        for place, found in enumerate(each):
            bias_ids[place, : len(found)], values[place, : len(found)] = list(found), list(found.values())
        allowed = None
        if any(mask is not None for mask in masks):
            allowed = np.full((len(edits), -(-self._size // 32)), -1, np.int32)
            for place, mask in enumerate(masks):
                allowed[place] = -1 if mask is None else mask
        apply_edits(
            work,
            rows=upload(torch.tensor(rows, dtype=torch.int32), device),
            penalties=tuple(self._factors) if penalised else None,
            counts=self._counts if penalised else None,
            prompt=self._prompts if penalised else None,
            bias=(upload(torch.from_numpy(bias_ids), device), upload(torch.from_numpy(values), device)),
            allowed=None if allowed is None else upload(torch.from_numpy(allowed), device),
        )
        return work

    def note(self, rows: Sequence[int], ids: Tensor) -> None:
        places = [place for place, row in enumerate(rows) if row in self._penalised]
        if places and self._counts is not None:
            first = upload(torch.tensor([(rows[place] * self._size, place) for place in places]), ids.device)
            chosen = first[:, 0] + ids[first[:, 1]]  # int64: rows times a vocabulary pass 2^31
            self._counts.view(-1).index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))


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
