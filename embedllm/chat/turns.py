"""Messages as callers hold them, rewritten for a template.

Owns three rewritings of plain messages: calls to the form that templates read, calls and results to plain text for a
template that knows no tools, and turns merged for a template that wants roles to alternate. Knows no template and no
tokens. Invariant: the caller's messages are never changed; copies are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from embedllm.errors import InvalidRequest

_KINDS = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}  # LangChain's names of roles
_PREAMBLE = """\
You may call these tools, one JSON object per line:
<tools>
%s
</tools>
To call a tool, answer with its name and arguments:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>"""

Message = dict[str, Any]


def normal_messages(messages: Any) -> Any:
    """Messages whose calls are {"id", "type": "function", "function": {"name", "arguments": dict}}.

    Takes OpenAI's calls, whose arguments are a JSON string, LangChain's {"name", "args", "id"}, and LangChain's types
    in place of roles. What is no list of dicts is given back as it is: the template's checks name what is wrong.
    """
    if not isinstance(messages, (list, tuple)):
        return messages
    return [_normal(each, f"messages[{i}]") if isinstance(each, Mapping) else each for i, each in enumerate(messages)]


def _normal(message: Mapping[str, Any], where: str) -> Message:
    changed = dict(message)
    if "role" not in message and message.get("type") in _KINDS:
        changed["role"] = _KINDS[changed.pop("type")]
    calls = message.get("tool_calls")
    if not calls:
        changed.pop("tool_calls", None)  # templates ask whether it is there
        return changed
    if not isinstance(calls, (list, tuple)):
        raise InvalidRequest(f"{where}: tool_calls must be a list of calls, got {calls!r}")
    changed["tool_calls"] = [_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)]
    return changed


def _call(call: Any, where: str) -> Message:
    if not isinstance(call, Mapping):
        raise InvalidRequest(f"{where} must be a dict, got {call!r}")
    inner = call.get("function")
    function = inner if isinstance(inner, Mapping) else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{where} has no name: a call is {{'function': {{'name': ..., 'arguments': ...}}}}")
    arguments = function.get("arguments", function.get("args"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where} ({name}): arguments are not JSON: {error}") from error
    if not isinstance(arguments, (Mapping, type(None))):
        raise InvalidRequest(f"{where} ({name}): arguments must be an object, got {arguments!r}")
    written = {"type": "function", "function": {"name": name, "arguments": dict(arguments or {})}}
    return written if call.get("id") is None else {"id": call["id"], **written}


def with_arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """The same with the arguments of calls as JSON strings, which DeepSeek's own templates join to the prompt."""

    def written(call: Message) -> Message:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [{**m, "tool_calls": [written(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The same with ids of nine letters and digits, which Mistral's templates demand; equal ids stay equal."""
    changed = []
    for message in messages:
        calls = [{**call, "id": _short(call["id"])} if "id" in call else call for call in message.get("tool_calls", ())]
        message = {**message, "tool_calls": calls} if calls else dict(message)
        if message.get("tool_call_id") is not None:
            message["tool_call_id"] = _short(message["tool_call_id"])
        changed.append(message)
    return changed


def _short(given: Any) -> str:
    text = str(given)
    fits = len(text) == 9 and text.isascii() and text.isalnum()
    return text if fits else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same with the tools as JSON in the system message's own `tools`, where Phi-4-mini's template reads them."""
    turns = list(messages) if _has_system(messages) else [{"role": "system", "content": ""}, *messages]
    functions = [tool["function"] for tool in tools]
    return [{**turns[0], "tools": json.dumps(functions, ensure_ascii=False)}, *turns[1:]]


def as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The tools in the system message, and calls and results as text, in the hermes format."""
    turns: list[Message] = []
    for message in messages:
        if message.get("role") == "tool":
            text = f"<tool_response>\n{text_of(message.get('content'))}\n</tool_response>"
            if turns and turns[-1].get("results"):
                turns[-1]["content"] += "\n" + text
            else:
                turns.append({"role": "user", "content": text, "results": True})
        elif message.get("tool_calls"):
            parts = [text_of(message.get("content")), *map(_written, message["tool_calls"])]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            turns.append({**rest, "content": "\n".join(filter(None, parts))})
        else:
            turns.append(dict(message))
    for turn in turns:
        turn.pop("results", None)
    if not tools:
        return turns
    preamble = _PREAMBLE % "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    if not _has_system(turns):
        return [{"role": "system", "content": preamble}, *turns]
    content = "\n\n".join(filter(None, (text_of(turns[0].get("content")), preamble)))
    return [{**turns[0], "content": content}, *turns[1:]]


def _has_system(turns: Sequence[Message]) -> bool:
    return bool(turns) and turns[0].get("role") in ("system", "developer")


def _written(call: Message) -> str:
    function = call["function"]
    text = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


def text_of(content: Any) -> str:
    """The text of a message's content: a string, None, or a list of text parts."""
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(part["text"] for part in content)


def merged(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one turn, and later system messages in the first one."""
    first = [message for message in messages if message.get("role") in ("system", "developer")]
    rest = [message for message in messages if message.get("role") not in ("system", "developer")]
    turns: list[Message] = []
    for message in (*first, *rest):
        before = turns[-1] if turns else None
        system = before is not None and len(turns) == 1 and bool(first) and message in first
        same = before is not None and before.get("role") == message.get("role") != "tool"
        if before is None or not (system or same):
            turns.append(dict(message))
            continue
        texts = (text_of(before.get("content")), text_of(message.get("content")))
        before["content"] = "\n\n".join(filter(None, texts))
        calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
        if calls:
            before["tool_calls"] = calls
    return turns
