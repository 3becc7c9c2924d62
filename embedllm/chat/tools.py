"""Tools as callers hand them in, and what they ask of them, in one form each.

Owns the checks and the forms: OpenAI function dicts, and a Choice. Knows no template and no grammar. Invariant: what
`normalise_tools` gives is plain JSON data with unique names, and every `parameters` is the schema of an object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from types import FunctionType
from typing import Any, Literal, NamedTuple

from embedllm.errors import InvalidRequest

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_TOOLS = 512
_MODES: Mapping[object, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "none": "none",
    "required": "required",
    "any": "required",
}


class Choice(NamedTuple):
    """What is asked of the tools: whether a call may or must come, and the names of those that may be called."""

    mode: Literal["auto", "none", "required"]
    names: tuple[str, ...] = ()
    single: bool = False  # at most one call


def normalise_tools(tools: Any, known: MutableMapping[Any, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """[{"type": "function", "function": {"name", "description", "parameters"}}] of what LangChain and OpenAI take.

    A tool is such a dict, its inner dict, {"name", "description", "input_schema"}, a JSON schema with a title, a Python
    function with type hints and a docstring, a pydantic class, a TypedDict or a LangChain tool. None is no tool.
    known: what functions and classes were read as before, which takes ten milliseconds each; it grows.
    Raises InvalidRequest naming the tool that has no usable name or no object schema, or comes twice.
    """
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequest(f"tools must be a list of tools, got {type(tools).__name__}")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools):,} tools; at most {MAX_TOOLS}")
    found: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = _checked(_function(tool, f"tools[{i}]", {} if known is None else known), f"tools[{i}]")
        if function["name"] in found:
            raise InvalidRequest(f"tools[{i}] is the second one named {function['name']!r}; names must be unique")
        found[function["name"]] = {"type": "function", "function": function}
    return list(found.values())


def choose(tool_choice: Any, tools: Sequence[Mapping[str, Any]], parallel_tool_calls: bool | None = None) -> Choice:
    """The normal form of a tool_choice for tools that `normalise_tools` gave.

    None and "auto" leave it to the model; "none" leaves tools out; "required", "any" and True ask for a call; a name,
    or {"type": "function", "function": {"name": ...}}, asks for one call of that tool (a tool that is named like one
    of those words is asked for by the dict). parallel_tool_calls=False is at
    most one call. Raises InvalidRequest for anything else, an unknown name, or a choice where there are no tools.
    """
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise InvalidRequest(f"parallel_tool_calls must be True or False, got {parallel_tool_calls!r}")
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if tool_choice.get("type") != "function" or not isinstance(name, str):
            raise InvalidRequest(
                f'tool_choice must be {{"type": "function", "function": {{"name": ...}}}}, got {dict(tool_choice)!r}'
            )
    elif tool_choice is not None and tool_choice is not True and not isinstance(tool_choice, str):
        raise InvalidRequest(f"tool_choice must be 'auto', 'none', 'required' or a tool's name, got {tool_choice!r}")
    else:
        name = None
    names = tuple(tool["function"]["name"] for tool in tools)
    if not names:
        if tool_choice not in (None, "none"):
            raise InvalidRequest(f"tool_choice={tool_choice!r} without tools; pass tools=[...] too")
        return Choice("none")
    single = parallel_tool_calls is False
    if tool_choice is None or tool_choice is True:
        return Choice("required" if tool_choice else "auto", names, single)
    if name is None and tool_choice in _MODES:
        mode = _MODES[tool_choice]
        return Choice("none") if mode == "none" else Choice(mode, names, single)
    name = name or tool_choice
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidRequest(f"tool_choice names {name!r}, and the tools are {', '.join(names)}{hint}")
    return Choice("required", (name,), True)


def _function(tool: Any, where: str, known: MutableMapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """{"name", "description", "parameters"} of one tool, not yet checked."""
    is_code = isinstance(tool, (FunctionType, type))
    if is_code and tool in known:
        return known[tool]
    if isinstance(tool, Mapping) and "input_schema" in tool:
        return {**tool, "parameters": tool["input_schema"]}
    if isinstance(tool, Mapping) and tool.get("type") == "function" and isinstance(tool.get("function"), Mapping):
        return dict(tool["function"])
    if isinstance(tool, Mapping) and "name" in tool:
        return dict(tool)
    from langchain_core.utils.function_calling import convert_to_openai_tool

    try:
        found: dict[str, Any] = convert_to_openai_tool(tool)["function"]
    except Exception as error:  # whatever its many readers raise
        raise InvalidRequest(
            f"{where} is no tool: {error}; pass an OpenAI function dict, a function with type hints, a pydantic class, "
            "a TypedDict or a LangChain tool"
        ) from error
    if is_code:
        known[tool] = found
    return found


def _checked(function: dict[str, Any], where: str) -> dict[str, Any]:
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidRequest(f"{where} has the name {name!r}; a name is 1 to 64 of A-Z a-z 0-9 _ . -")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{where} ({name}): description must be a str, got {type(description).__name__}")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest(f"{where} ({name}): parameters must be a JSON schema (a dict), got {parameters!r}")
    if parameters.get("type", "object") != "object" or not isinstance(parameters.get("properties", {}), Mapping):
        raise InvalidRequest(
            f'{where} ({name}): parameters must be the schema of an object, {{"type": "object", "properties": ...}}'
        )
    try:
        plain = json.loads(json.dumps(parameters, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} ({name}): parameters are not JSON: {error}") from error
    whole = {"type": "object", "properties": {}, **plain}
    return {"name": name, "description": description or "", "parameters": whole}
