"""From what a caller hands in to token ids.

Owns the forms a prompt may take and the refusal of everything else. Knows no engine. Invariant: what it returns is a
non-empty list of plain ints below the model's number of input ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedllm.errors import InvalidRequest
from embedllm.outputs import Parser
from embedllm.params import SamplingParams
from embedllm.structured_output import StructuredOutput
from embedllm.tokenizer import TokenizerProtocol

if TYPE_CHECKING:
    from embedllm.chat import Chat
    from embedllm.structured.backend import Vocabulary

Message = dict[str, Any]
Prompt = str | list[int] | list[Message]


def is_chat(prompt: Any) -> bool:
    """Whether this is one list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], dict)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prompt, and what it asks of its answer.

    tokens: the prompt. structured: the shape of the answer. parser: makes one Parser per sample; None where the answer
    is nothing but text. skip_special_tokens: False where the parser's markers are special tokens.
    """

    tokens: list[int]
    structured: StructuredOutput | None = None
    parser: Callable[[], Parser] | None = None
    skip_special_tokens: bool = True


class PromptEncoder:
    """Strings, token ids or chat messages to token ids, for one model."""

    def __init__(self, codec: TokenizerProtocol | None, num_input_ids: int, model_type: str = "") -> None:
        self._codec = codec
        self._model_type = model_type
        self._num_input_ids = num_input_ids

    @property
    def has_no_text(self) -> bool:
        return self._codec is None

    @property
    def text(self) -> TokenizerProtocol:
        """The tokenizer; InvalidRequest where the model has none."""
        if self._codec is None:
            raise InvalidRequest("this model has no tokenizer: pass token ids, or tokenizer= when loading")
        return self._codec

    @functools.cached_property
    def _chat(self) -> Chat:
        from embedllm.chat import Chat  # jinja2 loads when somebody chats

        return Chat(self.text, model_type=self._model_type)

    def vocabulary(self, width: int, eos_ids: tuple[int, ...]) -> Vocabulary:
        """The tokens that shapes are made of, for logits of this width."""
        from embedllm.structured.vocabulary import vocabulary_of

        return vocabulary_of(self.text, width, eos_ids, self._chat.keep)

    def prepare(self, prompt: Any, structured: StructuredOutput | None, chat: Mapping[str, Any]) -> Prepared:
        """One prompt to token ids, with what follows for its answer. chat: keywords that only messages take."""
        if is_chat(prompt):
            options = {"options" if name == "chat_template_kwargs" else name: value for name, value in chat.items()}
            prepared = self._chat.prepare(list(prompt), structured=structured, **options)
            self.check_ids(prepared.tokens)
            return prepared
        if chat:
            raise InvalidRequest(f"{next(iter(chat))} needs chat messages as the prompt")
        return Prepared(self.encode(prompt), structured)

    def encode(self, prompt: Any, tools: Any = None) -> list[int]:
        """One prompt to token ids."""
        if tools is not None or is_chat(prompt):
            return self.prepare(prompt, None, {"tools": tools} if tools is not None else {}).tokens
        if isinstance(prompt, str):
            tokens = self.text.encode(prompt) if prompt else []
        elif isinstance(prompt, (list, tuple)):
            tokens = list(prompt)
        else:
            raise InvalidRequest(
                f"a prompt is a string, a list of token ids or a list of messages, not {type(prompt).__name__}"
            )
        if not tokens:
            raise InvalidRequest("the prompt is empty")
        return self.check_ids(tokens)

    def check_ids(self, ids: list[Any]) -> list[int]:
        """The same list, if every member is a plain int in range."""
        for token in ids:
            if isinstance(token, (str, list, tuple)):
                raise InvalidRequest("this takes one prompt, and a list of prompts was given; generate() takes lists")
            if type(token) is not int:
                raise InvalidRequest(f"token ids must be plain integers, got {token!r} ({type(token).__name__})")
            if not 0 <= token < self._num_input_ids:
                raise InvalidRequest(
                    f"token id {token} is out of range: the model has ids 0 to {self._num_input_ids - 1}"
                )
        return ids

    def bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """params.bad_words as ids: each word as it is tokenized alone and after a space."""
        spellings = [text for word in params.bad_words for text in (word, " " + word.lstrip())]
        return tuple(dict.fromkeys(tuple(self.text.encode(text, add_special_tokens=False)) for text in spellings))
