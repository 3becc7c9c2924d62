"""From what a caller hands in to token ids.

Owns the forms a prompt may take and the refusal of everything else. Knows no engine. Invariant: what it returns is a
non-empty list of plain ints below the model's number of input ids.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from embedllm.errors import InvalidRequest
from embedllm.params import SamplingParams
from embedllm.tokenizer import TokenizerProtocol

if TYPE_CHECKING:
    from embedllm.chat import Chat

Message = dict[str, Any]
Prompt = str | list[int] | list[Message]


class PromptEncoder:
    """Strings, token ids or chat messages to token ids, for one model."""

    def __init__(self, codec: TokenizerProtocol | None, num_input_ids: int) -> None:
        self._codec = codec
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

        return Chat(self.text)

    def encode(self, prompt: Any, tools: Any = None) -> list[int]:
        """One prompt to token ids."""
        chat = isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], dict)
        if tools is not None and not chat:
            raise InvalidRequest("tools need chat messages as the prompt")
        if chat:
            tokens = self._chat.encode(list(prompt), tools)
        elif isinstance(prompt, str):
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
