"""LangChain messages as the chat messages that the engine takes.

Owns every form a LangChain message and its content may have: text, lists of blocks in LangChain's own format and in
those of OpenAI and Anthropic, tool calls and their results. Knows no template. Invariant: nothing is dropped silently;
what a text model cannot read is refused with InvalidRequest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from embedllm.errors import InvalidRequest

Message = dict[str, Any]

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "function"),
)
_TEXT = ("text", "input_text", "output_text", "text-plain")
_CALLS = ("tool_use", "tool_call", "tool_call_chunk", "function_call")  # stand in `tool_calls` as well


def to_chat(messages: Iterable[BaseMessage]) -> list[Message]:
    """A conversation as dicts with "role" and "content". Raises InvalidRequest naming what cannot be passed on."""
    return [turn for message in messages for turn in _turns(message)]


def _turns(message: BaseMessage) -> list[Message]:
    """One message; several where a user's message answers tool calls, as Anthropic writes it."""
    if isinstance(message, AIMessage):
        return [_assistant(message)]
    turn: Message = {"role": _role(message), "content": ""}
    if message.name:
        turn["name"] = message.name
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
    turns, texts = [], []
    for block in _blocks(message.content):
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            content = "".join(_text(part) for part in _blocks(block.get("content") or ""))
            turns.append({"role": "tool", "content": content, "tool_call_id": block.get("tool_use_id", "")})
        else:
            texts.append(_text(block))
    turn["content"] = "".join(texts)
    return [*turns, turn] if texts or not turns else turns


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    if message.additional_kwargs.get("__openai_role__") == "developer":
        return "developer"
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise InvalidRequest(f"a {type(message).__name__} cannot be part of a prompt")


def _assistant(message: AIMessage) -> Message:
    texts, reasoning, calls = [], [], list(message.tool_calls)
    known = {call["id"] for call in calls}
    for block in _blocks(message.content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind in ("reasoning", "thinking") and isinstance(block, Mapping):
            reasoning.append(str(block.get(kind) or ""))
        elif kind in _CALLS and isinstance(block, Mapping):
            if (block.get("call_id") or block.get("id")) not in known:
                raise InvalidRequest(f"a {kind} block of an AIMessage is not in its tool_calls: {dict(block)!r}")
        else:
            texts.append(_text(block))
    texts += [call["args"] or "" for call in message.invalid_tool_calls]  # as the model wrote them
    turn: Message = {"role": "assistant", "content": "".join(texts)}
    thought = "".join(reasoning) or message.additional_kwargs.get("reasoning_content")
    if thought:
        turn["reasoning_content"] = thought
    if calls:
        turn["tool_calls"] = [
            {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["args"]}}
            for call in calls
        ]
    return turn


def _blocks(content: str | Sequence[Any]) -> Sequence[str | Mapping[str, Any]]:
    return [content] if isinstance(content, str) else content


def _text(block: str | Mapping[str, Any]) -> str:
    """The text of a block that is text."""
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind in _TEXT or (kind is None and "text" in block):
        text = block.get("text")
        if isinstance(text, str):
            return text
        raise InvalidRequest(f"a text block holds no text: {dict(block)!r}")
    if kind == "json":  # a tool's result as Anthropic and Bedrock write it
        return json.dumps(block.get("json"), ensure_ascii=False)
    raise InvalidRequest(f"content of type {kind!r} is not text, and the model reads text only")
