"""The body of a tool call, as a model wrote it, to names and arguments.

Owns the reading of whole bodies, one function per style of `families.py`. Knows no streaming. Invariant: time is linear
in the body's length, nothing in it is evaluated, and what is malformed in any way gives no call at all.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from embedllm.chat.families import Family
from embedllm.chat.tools import NAME
from embedllm.outputs import ToolCall

Schemas = Mapping[str, Mapping[str, Any]]  # a tool's name to the schema of its arguments

_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 9  # alphanumerics: what Mistral's templates demand, and no other template minds
_TYPES = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}
_MAX_REFS = 16


def read_calls(family: Family, body: str, schemas: Schemas) -> tuple[ToolCall, ...] | None:
    """The calls in what stands between a family's markers; None if it is malformed or calls a tool not in `schemas`."""
    read = {"json": _json, "named": _named, "qwen_xml": _qwen_xml, "glm_xml": _glm_xml}[family.style]
    try:
        found = list(read(family, body, schemas))
    except (ValueError, RecursionError):  # of json.loads, and raised here
        return None
    if not found or any(name not in schemas for name, _ in found):
        return None
    return tuple(ToolCall(name, arguments, new_id()) for name, arguments in found)


def new_id() -> str:
    """A fresh id for a call: nine letters and digits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH))


def _json(family: Family, body: str, schemas: Schemas) -> Iterator[tuple[str, dict[str, Any]]]:
    value = _loads(body)
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError("a call is an object with a name")
        yield call["name"], _arguments(call["arguments"] if "arguments" in call else call.get("parameters"))


def _named(family: Family, body: str, schemas: Schemas) -> Iterator[tuple[str, dict[str, Any]]]:
    header, _, rest = body.partition(family.split)
    name = NAME.match(header.strip())  # after it, harmony has a content type and Mistral a [CALL_ID]
    if name is None:
        raise ValueError("a call begins with a name")
    rest = rest.strip().removesuffix("```").strip()  # of DeepSeek R1
    yield name[0], _arguments(_loads(rest) if rest else None)


def _qwen_xml(family: Family, body: str, schemas: Schemas) -> Iterator[tuple[str, dict[str, Any]]]:
    begin, end = body.find("<function="), body.rfind("</function>")
    close = body.find(">", begin)
    if begin < 0 or not begin < close < end or body[:begin].strip() or body[end + len("</function>") :].strip():
        raise ValueError("not a function")
    name = body[begin + len("<function=") : close].strip()
    pairs = _pairs(body[close + 1 : end], "<parameter=", ">", "", "</parameter>")
    # A newline on each side of a value is the format's, not the value's.
    yield name, _cast(((key, value.removeprefix("\n").removesuffix("\n")) for key, value in pairs), schemas.get(name))


def _glm_xml(family: Family, body: str, schemas: Schemas) -> Iterator[tuple[str, dict[str, Any]]]:
    at = body.find("<arg_key>")
    name = (body if at < 0 else body[:at]).strip()
    rest = "" if at < 0 else body[at:]
    yield name, _cast(_pairs(rest, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), schemas.get(name))


def _pairs(text: str, key_open: str, key_close: str, value_open: str, value_close: str) -> Iterator[tuple[str, str]]:
    """Each key and its raw value; only whitespace may stand between them. Raises ValueError."""
    at = 0
    while (begin := text.find(key_open, at)) >= 0:
        key_end = text.find(key_close, begin)
        value = text.find(value_open, key_end + len(key_close)) if key_end >= 0 else -1
        end = text.find(value_close, value + len(value_open)) if value >= 0 else -1
        if end < 0 or text[at:begin].strip() or text[key_end + len(key_close) : value].strip():
            raise ValueError("malformed parameters")
        yield text[begin + len(key_open) : key_end].strip(), text[value + len(value_open) : end]
        at = end + len(value_close)
    if text[at:].strip():
        raise ValueError("text after the last parameter")


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _arguments(given: Any) -> dict[str, Any]:
    """Arguments by name; an object that stands in a string is read once, and nothing is no arguments."""
    if isinstance(given, str) and given.strip():
        given = _loads(given)
    if given is None or given == "":
        return {}
    if not isinstance(given, dict):
        raise ValueError("arguments are an object")
    return given


def _cast(pairs: Iterable[tuple[str, str]], schema: Mapping[str, Any] | None) -> dict[str, Any]:
    root = schema or {}
    properties = root.get("properties", {})
    return {key: cast(text, properties.get(key, {}), root) for key, text in pairs}


def cast(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """The value that a bare text has under a schema: the text itself where only a string fits, else what it is as JSON.

    A union takes the JSON value where its type is among those allowed; a string is written bare, so JSON's quotes are
    part of it. root resolves $ref.
    """
    allowed = _types(schema, root)
    if allowed == {"string"}:
        return text
    try:
        value = _loads(text.lower() if "boolean" in allowed and text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text
    fits = not allowed or any(_is(value, name) for name in allowed if name != "string")
    return value if fits else text


def _is(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        return isinstance(value, int if name == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, _TYPES.get(name, ()))


def _types(schema: Any, root: Mapping[str, Any], refs: int = 0) -> set[str]:
    """The names of the types that a schema allows; empty for any."""
    if not isinstance(schema, Mapping) or refs > _MAX_REFS:
        return set()
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: Any = root
        for part in reference[2:].split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return _types(found, root, refs + 1)
    names = schema.get("type")
    if names is not None:
        return {names} if isinstance(names, str) else set(names)
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    if values is not None:
        return {name for name in (*_TYPES, "number") for value in values if _is(value, name)}
    members = [_types(each, root, refs + 1) for key in ("anyOf", "oneOf") for each in schema.get(key, ())]
    return set().union(*members) if all(members) else set()
