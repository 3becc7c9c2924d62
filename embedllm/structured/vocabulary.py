"""The tokens of a model as grammars see them: the bytes of each id.

Owns which ids a grammar may choose. Knows tokenizers only by the few methods it calls. Invariant: an id that has bytes
here adds exactly these bytes to an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from embedllm.errors import InvalidRequest
from embedllm.structured.backend import Vocabulary


class TextTokens(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int
    special_ids: frozenset[int]
    control_tokens: Mapping[str, int]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""

    def token_bytes(self, i: int) -> bytes:
        """The bytes of an id within a text."""


def vocabulary_of(
    tokenizer: TextTokens, width: int, eos_ids: Iterable[int], keep: frozenset[str] = frozenset()
) -> Vocabulary:
    """The vocabulary for logits of `width` ids.

    keep: texts of control tokens that a grammar may choose, as the markers of tool calls. Other control tokens, the
    `eos_ids` and ids that the tokenizer does not have get no bytes. Raises InvalidRequest if there is no EOS id.
    """
    ends = tuple(sorted({i for i in eos_ids if 0 <= i < width}))
    if not ends:
        raise InvalidRequest("the model has no end-of-sequence token, and without one no shape can come to its end")
    kept = {i: text.encode() for text, i in tokenizer.control_tokens.items() if text in keep}
    mute = {*tokenizer.special_ids, *tokenizer.control_tokens.values(), *ends} - (kept.keys() - set(ends))
    known = range(min(width, tokenizer.vocab_size))
    tokens = [b"" if i in mute else kept[i] if i in kept else tokenizer.token_bytes(i) for i in known]
    tokens += [b""] * (width - len(tokens))
    return Vocabulary(tokens, ends, lambda text: tokenizer.encode(text, add_special_tokens=False))


def whole_text(spelled: bytes) -> str:
    """The characters that are whole; "" where bytes begin within a character."""
    try:
        return spelled.decode()
    except UnicodeDecodeError as error:
        return spelled[: error.start].decode()
