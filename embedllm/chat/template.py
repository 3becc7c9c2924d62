"""Chat messages to text, by the model's Jinja template.

Owns the checks on what a template is given, and turns whatever goes wrong in it into InvalidRequest. Knows nothing of
tokens. Invariant: the template sees plain data only (copies, of the exact types str, int, float, bool, None, list and
dict) and never a value the caller holds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes

from embedllm.chat.sandbox import DEADLINE, MAX_CHARACTERS, Sandbox
from embedllm.errors import InvalidRequest, UnknownOption

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
MAX_TURNS = 10_000
MAX_SECONDS = 5.0
MAX_DEPTH = 64
_OWN = frozenset({"messages", "tools", "add_generation_prompt"})
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing


class ChatInputs(NamedTuple):
    """What a template is given, checked."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    options: dict[str, Any]


class ChatTemplate:
    """A compiled template; any thread may render with it.

    tokens: the tokenizer's named tokens, as {"bos_token": "<s>"}; templates read them as variables.
    Raises InvalidRequest if the template is not valid Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, max_seconds: float = MAX_SECONDS) -> None:
        self.source = source
        self.max_seconds = max_seconds
        self._tokens = dict(tokens or {})
        environment = Sandbox()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidRequest(f"the chat template is not valid Jinja: {error}") from error
        free = meta.find_undeclared_variables(tree)
        self.options = frozenset(free - environment.globals.keys() - _OWN - self._tokens.keys())
        self.takes_tools = "tools" in free
        self._takes_parts = any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt's text.

        messages: {"role": ..., "content": str | None | [{"type": "text", "text": ...}]} and whatever plain data the
        template knows beside (tool_calls, name, ...). tools: JSON schemas. options: variables that this template reads
        (`self.options`), as enable_thinking. Raises InvalidRequest; UnknownOption for an option it does not read.
        """
        return self.render_checked(self.check(messages, tools, options), add_generation_prompt)

    def check(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> ChatInputs:
        """Copies of what a caller handed in, as plain data. Raises InvalidRequest naming what is wrong where."""
        for name in options:
            if name not in self.options:
                raise UnknownOption.named(name, self.options, "this model's chat template")
        plain_options = {name: _plain(value, name) for name, value in options.items()}
        return ChatInputs(_messages(messages), _tools(tools), plain_options)

    def render_checked(self, inputs: ChatInputs, add_generation_prompt: bool) -> str:
        """`render` for what `check` gave."""
        messages, tools, options = inputs
        if not self._takes_parts:
            messages = [{**m, "content": _joined(m["content"])} if "content" in m else m for m in messages]
        given = {
            **self._tokens,
            "documents": None,
            **options,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": bool(add_generation_prompt),
            DEADLINE: time.monotonic() + self.max_seconds,
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(given):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise jinja2.TemplateRuntimeError(f"it writes more than {MAX_CHARACTERS:,} characters")
                pieces.append(piece)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # templates compute, so they raise anything
            raise InvalidRequest(f"the chat template failed on these messages: {error!r}") from error
        return "".join(pieces)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    *,
    tokens: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """Render messages with a template's source; see ChatTemplate, which compiles it once for many."""
    return ChatTemplate(template, tokens).render(messages, tools, add_generation_prompt, **options)


def _messages(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequest(f"messages must be a list of dicts with role and content, got {type(messages).__name__}")
    if not messages:
        raise InvalidRequest("messages is empty; a chat needs at least one message")
    if len(messages) > MAX_TURNS:
        raise InvalidRequest(f"{len(messages):,} messages; at most {MAX_TURNS:,}")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _tools(tools: object) -> list[Any] | None:
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequest(f"tools must be a list of JSON schemas (dicts), got {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequest(f"tools[{i}] must be a JSON schema (a dict), got {type(tool).__name__}")
    return [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)] or None


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be a dict with role and content, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidRequest(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}")
    if content is not None and not isinstance(content, str):
        if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
            raise InvalidRequest(f"{where}: content must be a str, None or a list of text parts, got {content!r}")
        for j, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise InvalidRequest(
                    f'{where}: content[{j}] is of type {kind!r}; only {{"type": "text", "text": "..."}} is understood'
                )
    plain: dict[str, Any] = _plain(message, where)
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    if reasoning is not None:  # whichever name the template reads
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: object, where: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)  # a subclass may bring methods along
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise InvalidRequest(f"{where} is a {type(value).__name__}; a chat template takes plain JSON data")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise InvalidRequest(f"{where} has the key {key!r}; keys are strings")
    return str(key)


def _is_content(node: nodes.Node) -> bool:
    """Whether a loop goes over a message's content: then the template takes a list of parts."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    name = node.attr if isinstance(node, nodes.Getattr) else node.name if isinstance(node, nodes.Name) else None
    return name == "content"


def _joined(content: Any) -> Any:
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content
