"""A chat made ready for the engine: prompt, constraint and parser, which fit each other.

Owns the decisions: which family writes the calls, whether the template or a preamble lists the tools, whether reasoning
is on. Knows no engine. Invariant: the parser is for exactly the tools that the prompt lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedllm.chat.constrain import Format, after_reasoning, constrain, format_of, literal, sequence
from embedllm.chat.families import HERMES, Family, Reasoning, family_of, reasoning_of
from embedllm.chat.parse import CallParser
from embedllm.chat.template import ChatTemplate
from embedllm.chat.tools import Choice, choose, normalise_tools
from embedllm.chat.turns import as_text, normal_messages, with_arguments_as_text, with_short_ids, with_tools
from embedllm.errors import InvalidRequest
from embedllm.prompts import Prepared
from embedllm.structured_output import StructuredOutput

if TYPE_CHECKING:
    from embedllm.chat.encode import Chat

_DUMPED = re.compile(r"arguments\W{0,3}\s*\|\s*tojson")  # a template that takes arguments as an object
_XML_TOOLS = "xml_tools"  # what SmolLM 3 calls them


def prepare(
    chat: Chat,
    messages: Any,
    tools: Any,
    tool_choice: Any,
    parallel_tool_calls: bool | None,
    structured: StructuredOutput | None,
    options: Mapping[str, Any] | None,
) -> Prepared:
    """See Chat.prepare."""
    offered = normalise_tools(tools, chat.known_tools)
    choice = choose(tool_choice, offered, parallel_tool_calls)
    if choice.mode == "none":
        offered = []
    template = chat.template(offered)
    family = family_of(template.source, chat.model_type)
    if "single tool-call" in template.source:  # Llama 3's refuses a message with several
        choice = choice._replace(single=True)
    if options is not None and not isinstance(options, Mapping):
        raise InvalidRequest(f"chat_template_kwargs must be a dict, got {options!r}")
    variables = dict(options or {})
    turns = normal_messages(messages)
    template.check(turns, None, variables)  # what is wrong is named as the caller wrote it
    listed = None
    if family is not None and (not offered or _lists_tools(template, family)):
        turns = _native(template, family, turns, offered)
        listed = offered if template.takes_tools else None
        if offered and _XML_TOOLS in template.options:
            variables.setdefault(_XML_TOOLS, offered)
    else:
        family = replace(HERMES, reasoning=reasoning_of(template.source)) if offered else None
        if offered or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
            turns = as_text(turns, offered)
    text, tokens = chat.encode_text(turns, listed, True, variables)
    reasoning = family.reasoning if family else reasoning_of(template.source)
    end = text.rstrip()
    opened = reasoning is not None and end.endswith(reasoning.open)
    closed = reasoning is not None and end.endswith(reasoning.close)  # thinking is off
    asked = _shape(family, offered, choice, structured, None if closed else reasoning, opened)
    reads = family if family is not None and (offered or family.lead) else None
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in offered}
    make = None if reads is None and reasoning is None else lambda: CallParser(reads, schemas, reasoning, opened)
    return Prepared(tokens, asked, make, make is None or not chat.markers(reads, reasoning))


def _lists_tools(template: ChatTemplate, family: Family) -> bool:
    return template.takes_tools or _XML_TOOLS in template.options or family.name == "phi"


def _native(template: ChatTemplate, family: Family, turns: Any, tools: list[dict[str, Any]]) -> Any:
    """The messages as the templates of a family read them."""
    if family.name.startswith("mistral"):
        return with_short_ids(turns)
    if family.name.startswith("deepseek") and not _DUMPED.search(template.source):
        return with_arguments_as_text(turns)
    if family.name == "phi" and not template.takes_tools:  # Phi-4-mini's own writes contents only
        turns = as_text(turns, [])
        return with_tools(turns, tools) if tools else turns
    return turns


def _shape(
    family: Family | None,
    tools: list[dict[str, Any]],
    choice: Choice,
    structured: StructuredOutput | None,
    reasoning: Reasoning | None,
    opened: bool,
) -> StructuredOutput | None:
    if family is not None and tools:
        answer = format_of(structured) if structured is not None and choice.mode == "auto" else None
        shape = constrain(family, tools, choice, answer, _check)
    elif structured is None:
        return None
    elif reasoning is None:
        return structured
    else:
        shape = sequence(literal(family.lead if family else ""), format_of(structured))
    if reasoning is not None:
        shape = after_reasoning(reasoning, opened, shape)
    return StructuredOutput(structural_tag={"type": "structural_tag", "format": shape})


def _check(shape: Format) -> None:
    """Raises InvalidRequest if it cannot be compiled."""
    from embedllm.structured.lower import lower

    lower(StructuredOutput(structural_tag={"type": "structural_tag", "format": shape}))
