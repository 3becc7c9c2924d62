"""Chat messages to token ids, such that only the template writes control tokens.

Owns the guard. Before rendering, in every text the caller gave, one character of whatever looks like a control token,
or like a part of one, is replaced by a stand-in: one for one, so nothing a template computes changes. After rendering,
what still is a control token is the template's own. Knows nothing of models. Invariant: the guard's stand-ins never
reach the tokenizer; a chat in which nothing looks like a control token is encoded exactly as its rendered text.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from embedllm.chat.families import Family, Reasoning, writer_of
from embedllm.chat.prepare import prepare
from embedllm.chat.template import ChatInputs, ChatTemplate
from embedllm.chat.turns import merged
from embedllm.errors import InvalidRequest
from embedllm.prompts import Prepared
from embedllm.structured_output import StructuredOutput
from embedllm.tokenizer import TokenizerProtocol

_FIRST_STAND_IN = 0x10FE00  # the end of the last private-use plane
_RESERVED = re.compile("[\U0010fe00-\U0010ffff]")
_CUT = 3  # how many characters of a control token tell it from other text


class Chat:
    """The chat side of one tokenizer.

    templates: what the tokenizer says (a source, or sources by name), unless given. With tools, the one named tool_use
    is used if there is one, else the default. model_type: the config's, for templates that do not say how their model
    writes a tool call.
    """

    def __init__(
        self,
        tokenizer: TokenizerProtocol,
        templates: str | Mapping[str, str] | None = None,
        model_type: str = "",
    ) -> None:
        found = templates if templates is not None else tokenizer.chat_template
        self._sources = {"default": found} if isinstance(found, str) else dict(found or {})
        self._compiled: dict[str, ChatTemplate] = {}
        self.known_tools: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self.model_type = model_type
        self._tokenizer = tokenizer
        self._guard = _Guard(tokenizer.control_tokens)

    def template(self, tools: Sequence[Any] | None = None, name: str | None = None) -> ChatTemplate:
        """The template for a chat with or without tools, or the one of that name. Raises InvalidRequest if none is."""
        if name is None:
            name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            known = f"it has {', '.join(sorted(self._sources))}" if self._sources else "it has none"
            raise InvalidRequest(
                f"this model has no chat template named {name!r}: {known}; pass a prompt as text instead"
            )
        if name not in self._compiled:  # two threads may both compile it; they compile the same
            self._compiled[name] = ChatTemplate(self._sources[name], self._tokenizer.special_tokens)
        return self._compiled[name]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt as text, to look at; encoding this text would trust what stands in the messages."""
        return self.template(tools).render(messages, tools, add_generation_prompt, **options)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """The prompt as token ids. A BOS is there if the template writes one. See ChatTemplate.render for the rest."""
        return self.encode_text(messages, tools, add_generation_prompt, options)[1]

    def encode_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        options: Mapping[str, Any],
    ) -> tuple[str, list[int]]:
        """The prompt as text, which is not to be encoded, and as token ids.

        A template that refuses the messages gets them once more with neighbours of one role merged.
        """
        template, guard = self.template(tools), self._guard
        given = template.check(messages, tools, options)
        guarded = ChatInputs(*(guard.apply(part) for part in given))
        try:
            text = template.render_checked(guarded, add_generation_prompt)
        except InvalidRequest as error:
            turns = merged(guarded.messages)
            if turns == guarded.messages:
                raise
            try:
                text = template.render_checked(guarded._replace(messages=turns), add_generation_prompt)
            except InvalidRequest:
                raise error from None
        return text, self._ids(text, given, guarded)

    def _ids(self, text: str, given: ChatInputs, guarded: ChatInputs) -> list[int]:
        guard = self._guard
        pieces = guard.split(text)
        if guarded == given:
            ids = self._tokenizer.encode(text, False)
            if sum(i in guard.ids for i in ids) == sum(isinstance(piece, int) for piece in pieces):
                return ids
            # A normaliser made a control token of some look-alike in the messages.
        if any(_RESERVED.search(text) for text in _texts(given)):
            raise InvalidRequest("the messages hold a private character from U+10FE00 on; remove it")
        return self._tokenizer.encode_pieces([guard.restore(p) if isinstance(p, str) else p for p in pieces])

    def prepare(
        self,
        messages: Any,
        tools: Any = None,
        *,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        structured: StructuredOutput | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """A chat as prompt, shape of the answer and parser of the answer.

        messages: as ChatTemplate.render takes them; a call's arguments may be a JSON string, and LangChain's dicts are
        taken too. tools, tool_choice, parallel_tool_calls: see `normalise_tools` and `choose`. Where the template lists
        no tools, a system message does, and calls are text in the hermes format. options: variables of the template.

        With tools, a call that the model begins is well-formed and of an offered tool. A tool whose parameters use what
        cannot be enforced may be called with any arguments where calls are optional. structured: the shape of an answer
        that is no call; where a call is required it is not used. After reasoning, where it is on, the shape begins.

        Raises InvalidRequest; where a call is required, also for parameters that cannot be enforced.
        """
        return prepare(self, messages, tools, tool_choice, parallel_tool_calls, structured, options)

    @property
    def keep(self) -> frozenset[str]:
        """The control tokens that a grammar must be able to choose: they are markers of calls or reasoning."""
        sources = self._sources.values()
        return frozenset().union(*(self.markers(writer_of(source, self.model_type), None) for source in sources))

    def markers(self, family: Family | None, reasoning: Reasoning | None) -> frozenset[str]:
        """The control tokens among the markers of a family or of reasoning; those that end an answer are none."""
        ends = set(self._tokenizer.eos_ids)
        texts = (*(family.texts if family else ()), *(reasoning.texts if reasoning else ()))
        control = self._tokenizer.control_tokens.items()
        return frozenset(token for token, i in control if i not in ends and any(token in text for text in texts))


class _Guard:
    """Stand-ins for control tokens in untrusted text.

    A guarded text can become part of a control token only if the template itself writes more than the token's first
    _CUT characters right before it, or cuts it within them and joins what is left to another such text.
    """

    def __init__(self, control: Mapping[str, int]) -> None:
        self.ids = frozenset(control.values())
        self._control = dict(control)
        longest_first = sorted(control, key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Anywhere in a text: the first characters of a token. At its end: any beginning of one.
        heads = {token[:_CUT] for token in control}
        tails = {head[:n] for head in heads for n in range(1, len(head))}
        patterns = [re.escape(head) for head in sorted(heads)] + [re.escape(tail) + r"\s*\Z" for tail in sorted(tails)]
        self._head = re.compile("|".join(patterns) or "(?!)")
        # At its beginning: a token less its first characters. As a whole: less its first and its last.
        self._rests = tuple({token[n:] for token in control for n in range(1, _CUT + 1) if len(token) > n + 1})
        self._cores = frozenset(token[1:-1] for token in control if len(token) > 2)
        firsts = sorted({text[0] for text in (*control, *self._rests, *self._cores)})
        self._stand_in = {char: chr(_FIRST_STAND_IN + i) for i, char in enumerate(firsts)}

    def apply(self, value: Any) -> Any:
        """A copy of plain data, guarded; equal to it if nothing in it looks like a control token."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {self._text(key): self._item(key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.apply(item) for item in value]
        return value

    def _item(self, key: str, value: Any) -> Any:
        if key in ("role", "type") and isinstance(value, str):  # templates compare it, and it may be a token's core
            return self._text(value, cores=False)
        return self.apply(value)

    def _text(self, text: str, cores: bool = True) -> str:
        text = self._head.sub(lambda found: self._stand_in[found[0][0]] + found[0][1:], text)
        bare = text.lstrip()
        if bare.startswith(self._rests) or (cores and bare in self._cores):
            place = len(text) - len(bare)
            text = text[:place] + self._stand_in[bare[0]] + bare[1:]
        return text

    def restore(self, text: str) -> str:
        """Stand-ins back to what they stand for, also where a template wrote them as JSON in ASCII."""
        for char, mark in self._stand_in.items():
            text = text.replace(mark, char).replace(json.dumps(mark)[1:-1], char)
        return text

    def split(self, text: str) -> list[str | int]:
        """Rendered text as pieces: control tokens as ids, and what is between them."""
        pieces: list[str | int] = []
        end = 0
        for found in self._token.finditer(text):
            if found.start() > end:
                pieces.append(text[end : found.start()])
            pieces.append(self._control[found[0]])
            end = found.end()
        return [*pieces, text[end:]] if end < len(text) else pieces


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):  # ChatInputs is one
        for item in value:
            yield from _texts(item)
