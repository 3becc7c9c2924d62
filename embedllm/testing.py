"""Models without weights, for tests of the engine and of programs that use it.

Owns HashLM (every token depends on every slot it reads), ScriptedModel (says what you tell it) and ByteTokenizer, and
passes on write_random_model (a known shape with random weights, for timings).
Knows the shapes of a plan, nothing of how it was made. Invariant: all are deterministic; the same prompt gives the same
tokens whatever else runs, and `HashLM.expected` says which ones without an engine.

    llm = embedllm.LLM(testing.ScriptedModel(["Hello!"]), tokenizer=testing.ByteTokenizer())
    llm.generate("anything").text   # "Hello!"
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from embedllm import events
from embedllm.config import Limits
from embedllm.errors import InvalidRequest
from embedllm.events import Event
from embedllm.models.random_model import write_random_model
from embedllm.plan_types import UNKNOWN, Entry, Plan
from embedllm.tokenizer import TokenizerProtocol

if TYPE_CHECKING:
    import torch

    from embedllm.runner import ModelOutput

__all__ = ["ByteTokenizer", "HashLM", "ScriptedModel", "write_random_model"]

_GARBAGE = -(2**62)  # nothing that is written is negative


def _mix(context: int, token: int, position: int) -> int:
    """What a slot holds besides its token: 63 bits that depend on everything up to it."""
    return (context * 0x5851F42D4C957F2D + (token << 32 | position) * 0x14057B7EF767814F + 1) % 2**63


class BlockMemory:
    """A KV cache small enough to be checked exactly: per slot a (token, position) pair and a digest of its context.

    Like keys and values, a context depends on what was read through the block table when the slot was written. This is
    a Recorder: given to `BlockPool.recorder`, it overwrites blocks as they are freed or handed out, so that whoever
    still reads one, or reads a slot before writing it, gets a wrong answer.
    """

    def __init__(self, limits: Limits) -> None:
        self.block_size = limits.block_size
        self.resize(limits.num_blocks)
        self.last = [UNKNOWN] * limits.max_num_seqs  # the newest token of each row, for steps launched ahead of it
        self._num_poisoned = 0

    def resize(self, num_blocks: int) -> None:
        """So many blocks of values that were never written."""
        self.pairs = array("q", [_GARBAGE]) * (num_blocks * self.block_size)  # token << 32 | position
        self.contexts = self.pairs[:]

    def append(self, event: Event) -> None:
        """Record an event of the pool."""
        if event[0] == events.ALLOCATE or event[0] == events.FREE:
            self.poison(event[1])  # type: ignore[arg-type]

    def poison(self, block: int) -> None:
        """Overwrite a block with values that were never written."""
        self._num_poisoned += 1
        first = block * self.block_size
        for slot in range(first, first + self.block_size):
            self.pairs[slot] = self.contexts[slot] = _GARBAGE + self._num_poisoned

    def write(self, plan: Plan) -> None:
        """Run the plan's copies, then every entry's writes."""
        size = self.block_size
        for source, destination in plan.copies:
            for slots in (self.pairs, self.contexts):
                slots[destination * size : (destination + 1) * size] = slots[source * size : (source + 1) * size]
        for entry in plan.entries:
            context, position = 0, entry.start
            if position:
                before = position - 1
                context = self.contexts[entry.blocks[before // size] * size + before % size]
            for token in entry.tokens:
                known = self.last[entry.row] if token == UNKNOWN else token
                context = _mix(context, known, position)
                slot = entry.blocks[position // size] * size + position % size
                self.pairs[slot], self.contexts[slot] = known << 32 | position, context
                position += 1

    def read(self, slots: array[int], blocks: Sequence[int], num_tokens: int) -> array[int]:
        """The first `num_tokens` of `pairs` or `contexts` behind a block table."""
        size = self.block_size
        found = array("q")
        for block in blocks[: -(-num_tokens // size)]:
            found += slots[block * size : (block + 1) * size]
        return found[:num_tokens]


class Runner(ABC):
    """Executes plans; a subclass chooses the next token from what is read through the block table."""

    def __init__(self, vocab_size: int, limits: Limits) -> None:
        self.vocab_size = vocab_size
        self.memory = BlockMemory(limits)

    def resize(self, num_blocks: int) -> None:
        """Another number of blocks, which hold garbage."""
        self.memory.resize(num_blocks)

    @property
    @abstractmethod
    def slots(self) -> array[int]:
        """What of the memory it reads: the pairs or the contexts."""

    @abstractmethod
    def choose(self, read: array[int], sequence_id: int | None) -> tuple[int, int]:
        """The best and the second best token after the slots that were read.

        The first call with a `sequence_id` sees its prompt; None asks about some position inside a prompt.
        """

    @abstractmethod
    def before_step(self) -> None:
        """Called before each step's forward; may raise."""

    def sample(self, plan: Plan) -> list[list[int]]:
        """Run a step and verify its drafts: no token for a chunk, else 1 + accepted drafts per entry."""
        self.memory.write(plan)
        return [self._verify(entry) if entry.num_logits else [] for entry in plan.entries]

    def _verify(self, entry: Entry) -> list[int]:
        end = entry.start + len(entry.tokens)
        read = self.memory.read(self.slots, entry.blocks, end)
        accepted: list[int] = []
        for num_tokens in range(end - entry.num_draft, end + 1):
            accepted.append(self.choose(read[:num_tokens], entry.sequence_id)[0])
            if num_tokens == end or accepted[-1] != entry.tokens[num_tokens - entry.start]:
                break
        self.memory.last[entry.row] = accepted[-1]
        return accepted

    def __call__(self, plan: Plan, between_layers: Callable[[], None] | None = None) -> ModelOutput:
        """Run a step: float32 logits [logit positions, vocab_size], in the order of the entries.

        Hidden states of entries that ask for prompt logprobs are the logits after each of their tokens.
        """
        import torch

        from embedllm.runner import ModelOutput

        self.before_step()
        if between_layers is not None:
            between_layers()
        self.memory.write(plan)
        rows: list[torch.Tensor] = []
        hidden: list[torch.Tensor] = []
        for entry in plan.entries:
            end = entry.start + len(entry.tokens)
            read = self.memory.read(self.slots, entry.blocks, end)
            first = end + 1 - entry.num_logits
            wanted = [self._logits(read[:n], entry.sequence_id) for n in range(first, end + 1)]
            if entry.wants_hidden:
                hidden += [self._logits(read[:n], None) for n in range(entry.start + 1, first)] + wanted
            if wanted:
                rows += wanted
                self.memory.last[entry.row] = int(wanted[-1].argmax())
        empty = torch.empty(0, self.vocab_size)
        return ModelOutput(torch.stack(rows) if rows else empty, torch.stack(hidden) if hidden else None)

    def _logits(self, read: array[int], sequence_id: int | None) -> torch.Tensor:
        import torch

        best, second = self.choose(read, sequence_id)
        logits = torch.zeros(self.vocab_size)
        logits[second], logits[best] = 50.0, 100.0  # sampling at an ordinary temperature always takes the best
        return logits

    def remember(self, rows: list[int], ids: torch.Tensor) -> None:
        """Keep what was chosen for these rows: the next step may be launched before anybody else knows."""
        for row, token in zip(rows, ids.tolist(), strict=True):
            self.memory.last[row] = token

    def logits(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits of hidden states, in pieces: here they are the same thing."""
        yield hidden


class HashLM:
    """A model whose next token is a hash of every slot it reads through the block table.

    A wrong slot, a stale block, a shifted position, a missing token or another context changes everything after it.
    The last id of the vocabulary is EOS and comes with probability 1 / `eos_every` (0: never).
    """

    def __init__(self, vocab_size: int = 97, eos_every: int = 40, seed: int = 0, max_model_len: int = 2_048) -> None:
        if vocab_size < 3:
            raise InvalidRequest(f"vocab_size={vocab_size}: HashLM needs at least 3 tokens")
        self.name = "hash-lm"
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_ids = (vocab_size - 1,)
        self.eos_every = eos_every
        self._key = seed.to_bytes(8, "little")

    def runner(self, limits: Limits) -> HashRunner:
        """Executes plans within these limits; `runner.memory` can be the pool's recorder."""
        return HashRunner(self, limits)

    def hasher(self, contexts: bytes | array[int] = b"") -> hashlib.blake2b:
        """The running hash of the contexts of all slots."""
        return hashlib.blake2b(contexts, digest_size=16, key=self._key)

    def pick(self, digest: bytes) -> tuple[int, int]:
        """The best and the second best token for a hash."""
        draw = int.from_bytes(digest, "little")
        draw, best = divmod(draw, self.vocab_size - 1)
        draw, shift = divmod(draw, self.vocab_size - 2)
        second = (best + 1 + shift) % (self.vocab_size - 1)
        ends = self.eos_every and draw % self.eos_every == 0
        return (self.eos_ids[0], best) if ends else (best, second)

    def expected(
        self, prompt: Iterable[int], max_tokens: int, *, stop_ids: Iterable[int] = (), ignore_eos: bool = False
    ) -> list[int]:
        """The output of a greedy request, in pure Python over the list of tokens."""
        ends = {*stop_ids} if ignore_eos else {*stop_ids, *self.eos_ids}
        tokens = list(prompt)
        num_prompt, context, state = len(tokens), 0, self.hasher()
        for position in range(num_prompt + max_tokens):
            if position == len(tokens):
                tokens.append(self.pick(state.digest())[0])
                if tokens[-1] in ends:
                    break
            context = _mix(context, tokens[position], position)
            state.update(array("q", [context]))
        return tokens[num_prompt:]


class HashRunner(Runner):
    """Runs a HashLM."""

    def __init__(self, model: HashLM, limits: Limits) -> None:
        super().__init__(model.vocab_size, limits)
        self._model = model

    @property
    def slots(self) -> array[int]:
        """The contexts."""
        return self.memory.contexts

    def choose(self, read: array[int], sequence_id: int | None) -> tuple[int, int]:
        """Hash everything."""
        return self._model.pick(self._model.hasher(read).digest())

    def before_step(self) -> None:
        """Nothing to wait for."""


class ScriptedModel:
    """A model that says what it is told, for tests of programs that use an LLM.

    replies: texts, given in turn to the samples in order of submission; or a function from prompt ids to reply ids.
    EOS follows each reply. delay: seconds each step takes. fail_at: numbers of the steps (from 0) that raise
    RuntimeError; the engine retries a failed step, so [3, 4] makes step 3 fail for good.
    """

    def __init__(
        self,
        replies: Sequence[str] | Callable[[list[int]], list[int]],
        tokenizer: Any = None,
        *,
        delay: float = 0.0,
        fail_at: Iterable[int] = (),
        max_model_len: int = 2_048,
    ) -> None:
        tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        if isinstance(replies, str) or (not callable(replies) and not replies):
            raise InvalidRequest(f"replies must be a list of texts or a function, got {replies!r}")
        self.name = "scripted"
        self.tokenizer = tokenizer
        self.vocab_size: int = tokenizer.vocab_size
        self.max_model_len = max_model_len
        self.eos_ids: tuple[int, ...] = tuple(tokenizer.eos_ids)
        self.delay = delay
        self.fail_at = frozenset(fail_at)
        self._reply = replies if callable(replies) else None
        self._scripts = [] if callable(replies) else [list(tokenizer.encode(text)) for text in replies]

    def runner(self, limits: Limits) -> ScriptRunner:
        """Executes plans within these limits."""
        return ScriptRunner(self, limits)

    def reply(self, sequence_id: int, prompt: list[int]) -> list[int]:
        """What this sample answers."""
        return list(self._reply(prompt)) if self._reply else self._scripts[sequence_id % len(self._scripts)]


class ScriptRunner(Runner):
    """Runs a ScriptedModel."""

    def __init__(self, model: ScriptedModel, limits: Limits) -> None:
        super().__init__(model.vocab_size, limits)
        self._model = model
        self._num_steps = 0
        self._replies: dict[int, tuple[int, list[int]]] = {}  # sequence id -> length of its prompt, its reply

    @property
    def slots(self) -> array[int]:
        """The tokens themselves."""
        return self.memory.pairs

    def choose(self, read: array[int], sequence_id: int | None) -> tuple[int, int]:
        """The reply's next token, then EOS."""
        best = self._model.eos_ids[0]
        if sequence_id is not None:
            if sequence_id not in self._replies:
                prompt = [pair >> 32 for pair in read]
                self._replies[sequence_id] = (len(prompt), self._model.reply(sequence_id, prompt))
            num_prompt, reply = self._replies[sequence_id]
            if len(read) - num_prompt < len(reply):
                best = reply[len(read) - num_prompt]
        return best, (best + 1) % self.vocab_size

    def before_step(self) -> None:
        """Take the time a step takes, or fail."""
        number, self._num_steps = self._num_steps, self._num_steps + 1
        time.sleep(self._model.delay)
        if number in self._model.fail_at:
            raise RuntimeError(f"step {number} was told to fail")


class ByteTokenizer(TokenizerProtocol):
    """One token per UTF-8 byte, and three special ones: <|im_start|> 256, <|im_end|> 257, <|endoftext|> 258 (EOS)."""

    vocab_size = 259
    eos_ids = (258,)
    special_ids = frozenset((256, 257, 258))
    control_tokens = MappingProxyType({"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258})
    chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Bytes of the text; the names of special tokens stay text."""
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode at character {error.start}") from error

    def token_bytes(self, i: int) -> bytes:
        """The byte of an id; a special token's name."""
        return bytes((i,)) if i < 256 else next(name.encode() for name, id in self.control_tokens.items() if id == i)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        special = {i: b"" if skip_special_tokens else name.encode() for name, i in self.control_tokens.items()}
        return b"".join(bytes((i,)) if i < 256 else special[i] for i in ids).decode(errors="replace")
