"""Token ids to text as they come, and the stop strings in it.

Owns one sequence's decoding state. Knows tokens and text only, nothing of the engine. Text once handed out is never
taken back. Invariant: the pieces, joined, are the decoded output ids, cut at the stop; nothing of the prompt shows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from embedllm.outputs import NOTHING, Parser, Said

if TYPE_CHECKING:
    from embedllm.params import SamplingParams
    from embedllm.tokenizer import TokenizerProtocol

UNFINISHED = "\ufffd"  # what a decoder makes of half a character
MAX_HELD = 8  # tokens kept back for an incomplete character, which has at most 4 bytes
MAX_RUN = 16  # <0xNN> tokens kept back: one bad byte among them changes how all are read


class Piece(NamedTuple):
    """What a step of tokens gave: what it says, how many of the tokens count, the stop string that was hit."""

    said: Said
    num_tokens: int
    stop: str | None = None


class TextStream:
    """Incremental decoding of one output.

    decode: ids to text, for any window of ids. fast: makes a `tokenizers` DecodeStream for a context of ids; it
    decodes most tokens in a microsecond, and windows are decoded only when it says nothing for long or gives up.
    silent: ids without text. byte_of: the bytes of <0xNN> tokens, of which a decoder reads a run as a whole: all of it
    is U+FFFD if it is not UTF-8. So a run is held until it ends; one longer than MAX_RUN is read in parts, and only if
    it turns bad after that does the text differ from `decode`'s.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        fast: Callable[[list[int]], Any] | None = None,
        backend: Any = None,
        *,
        silent: frozenset[int] = frozenset(),
        byte_of: Mapping[int, int] | None = None,
    ) -> None:
        self._decode = decode
        self._fast = fast
        self._backend = backend
        self._silent = silent
        self._byte_of = byte_of or {}
        self._stream = fast([]) if fast else None
        self._context: list[int] = []  # tokens whose text is out; those before no longer matter
        self._held: list[int] = []  # tokens whose text is not, or not wholly
        self._num_out = 0  # without a stream: characters of the window's text that are out
        self._run: list[int] = []  # byte tokens held
        self._run_is_cut = self._run_is_bad = False

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        if token in self._silent:
            return ""
        if token in self._byte_of:
            self._run.append(token)
            return self._cut_run() if self._run_is_bad or len(self._run) >= MAX_RUN else ""
        if self._run or self._run_is_cut:
            return self._end_run() + self._add([token])
        return self._add([token])

    def finish(self) -> str:
        """The rest: an incomplete character becomes U+FFFD here and nowhere else."""
        return self._end_run() + self._flush()

    def _flush(self) -> str:
        if not self._held:
            return ""
        before = self._num_out if self._stream is None else len(self._decode(self._context))
        text = self._decode(self._context + self._held)[before:]
        self._context, self._held = self._context + self._held, []
        return text

    def _end_run(self) -> str:
        """The text of what is left of a run that is over."""
        run, self._run = self._run, []
        if not self._run_is_cut:
            return self._add(run) if run else ""
        # What follows must not join bytes that are out already: as if one bad byte, itself out, came before it.
        self._run_is_cut = self._run_is_bad = False
        self._stream, self._context, self._held, self._num_out = None, [], [next(iter(self._byte_of))], 1
        data = bytes(self._byte_of[i] for i in run)
        return data.decode() if _complete_part(data) == len(data) else UNFINISHED * len(data)

    def _cut_run(self) -> str:
        """The complete part of a run too long to be held; from here on it is read by itself, not by `decode`."""
        text = self._flush()
        data = bytes(self._byte_of[i] for i in self._run)
        size = None if self._run_is_bad else _complete_part(data)
        if size is None:  # nothing that comes can make the run valid
            self._run_is_bad, size = True, len(data)
            text += UNFINISHED * size
        elif self._context or self._run_is_cut:
            text += data[:size].decode()
        else:  # the beginning of the output, from which some decoders strip a space
            text += self._decode(self._run[:size])
        self._run, self._run_is_cut = self._run[size:], True
        return text

    def _add(self, tokens: list[int]) -> str:
        """The text of these tokens, or of those held and these, as far as it is final."""
        if self._stream is not None:
            with contextlib.suppress(Exception):  # it gives up where text is no extension of what it said before
                piece = self._stream.step(self._backend, tokens)
                if piece is not None:
                    self._context, self._held = self._held + tokens, []
                    return str(piece)
                if not self._byte_of and len(self._held) + len(tokens) < MAX_HELD:
                    self._held += tokens
                    return ""
            self._stream = None
            self._num_out = len(self._decode(self._context)) if self._context else 0
        self._held += tokens
        return self._add_by_window()

    def _add_by_window(self) -> str:
        """Decode the window of tokens that still matter. All its text is final but a last U+FFFD, and with <0xNN>
        tokens, whose runs come here whole, that too.
        """
        window = self._context + self._held
        text = self._decode(window)
        final = bool(self._byte_of) or not text.endswith(UNFINISHED)
        end = len(text) if final else len(text) - 1
        piece = text[self._num_out : end]
        self._num_out = max(self._num_out, end)
        if final:  # between characters: what follows needs a left neighbour, and no more
            self._context, self._held = window[-1:] if self._byte_of else window[-MAX_HELD:], []
            known = self._decode(self._context)
            self._num_out = len(known)
            if self._fast is not None and not known.endswith(UNFINISHED):
                self._stream = self._fast(self._context)
        elif len(window) > 4 * MAX_HELD:  # whatever the last U+FFFD is, it began within the last 3 tokens
            self._context, self._held = [], window[-4:]
            self._num_out = len(self._decode(self._held)) - 1
        return piece


def _complete_part(data: bytes) -> int | None:
    """Length of `data` less an incomplete character at its end; None if it is not UTF-8 whatever follows."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start if error.reason == "unexpected end of data" else None
    return len(data)


class Detokenizer:
    """One sequence's text.

    tokenizer: None gives no text. prompt_ids: not used for text, because an output is decoded by itself: a character
    that began in the prompt shows as U+FFFD. params: stop, min_tokens, include_stop_str_in_output, skip_special_tokens.
    parser: tells the text from reasoning and tool calls, in which nothing is a stop string; None: all is text.
    """

    def __init__(
        self,
        tokenizer: TokenizerProtocol | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        parser: Parser | None = None,
    ) -> None:
        self._parser = parser
        self._stream = tokenizer.decode_stream(params.skip_special_tokens) if tokenizer is not None else None
        self._stops: tuple[str, ...] = tuple(params.stop)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._keep_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._pending = ""  # decoded, and the beginning of a stop string
        self._ended = False

    def step(self, tokens: Sequence[int], ended_by_token: bool = False) -> Piece:
        """Take one step's tokens, one or more.

        ended_by_token: the last of them is the EOS or stop token that ends the sequence; it has no text. A stop string
        completed before it comes first. After a stop nothing more is taken.
        """
        if self._stream is None or self._ended:
            return Piece(NOTHING, 0 if self._ended else len(tokens))
        said = []
        for number, token in enumerate(tokens, start=1):
            self._num_tokens += 1
            if ended_by_token and number == len(tokens):
                break
            new = self._stream.push(token)
            if not new:
                continue
            told = Said(new) if self._parser is None else self._parser.feed(new)
            text, stop = self._scan(told.text)
            if stop is not None:
                self._ended = True
                said.append(Said(text, told.reasoning))
                return Piece(functools.reduce(Said.then, said), number, stop)
            said.append(told._replace(text=text))
        return Piece(functools.reduce(Said.then, said, NOTHING), len(tokens))

    def finish(self) -> Said:
        """Whatever is still held back, once the sequence has ended; cut if a stop string is completed by it."""
        if self._stream is None or self._ended:
            return NOTHING
        self._ended = True
        rest = self._stream.finish()
        told = Said(rest) if self._parser is None else self._parser.feed(rest).then(self._parser.finish())
        text, _ = self._scan(told.text)
        return told._replace(text=text + self._pending)

    def _scan(self, new: str) -> tuple[str, str | None]:
        """What of the pending text and `new` can be handed out, and the stop string it contains.

        Of several, the one that ends first counts, then the longest: the same whatever the tokens are.
        """
        text = self._pending + new
        if not self._stops:
            return text, None
        if self._num_tokens <= self._min_tokens:  # text of the first min_tokens tokens is no part of a stop string
            return text, None
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            end, start, stop = min(hits)
            self._pending = ""
            return text[: end if self._keep_stop else start], stop
        held = self._held_from(text)
        self._pending = text[held:]
        return text[:held], None

    def _held_from(self, text: str) -> int:
        """Where the longest suffix of the text begins that is the beginning of a stop string."""
        for start, char in enumerate(text):
            if char in self._firsts and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
