"""The shape of an answer in which tools may be called, as a structural tag.

Owns what each choice of tools lets a model write, and how a shape goes on after reasoning. Knows no grammar backend: it
speaks xgrammar's format of structural tags. Invariant: whatever text matches, the family's parser reads back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embedllm.chat.families import Family, Reasoning
from embedllm.chat.tools import Choice
from embedllm.errors import InvalidRequest
from embedllm.structured_output import StructuredOutput

Format = dict[str, Any]
ANY_OBJECT: Mapping[str, Any] = {"type": "object", "additionalProperties": True}
_XML_STYLES = ("qwen_xml", "glm_xml")  # the format's own names; every other family's arguments are JSON


def constrain(
    family: Family,
    tools: Sequence[Mapping[str, Any]],
    choice: Choice,
    answer: Format | None,
    check: Callable[[Format], None],
) -> Format:
    """What may be written with these tools.

    auto: free text, in which a call that is begun is well-formed and of a known tool; with an `answer`, calls or that
    answer. required: calls only. check raises InvalidRequest for a format that cannot be compiled: a tool whose
    parameters are refused may be called with any arguments where calls are optional, else it is an error.
    """
    tags = [_tag(family, tool, choice, check) for tool in tools if tool["function"]["name"] in choice.names]
    calls: Format = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": family.separator,
        "at_least_one": True,
        "stop_after_first": choice.single,
    }
    if family.open:
        tags = [{"type": "tag", "begin": family.open, "content": calls, "end": family.close}]
        calls = tags[0]
    if choice.mode == "required":
        return calls
    if answer is not None:
        return _any(calls, sequence(literal(family.lead), answer))
    if family.whole:  # an answer that does not begin as a call is free
        return _any(calls, literal(""), sequence({"type": "regex", "pattern": r"[^{]"}, {"type": "any_text"}))
    trigger = family.begins[0] if tags[0]["begin"].startswith(family.begins[0]) else family.open
    return {
        "type": "triggered_tags",
        "triggers": [trigger],
        "tags": tags,
        "at_least_one": False,
        "stop_after_first": choice.single,
    }


def _tag(family: Family, tool: Mapping[str, Any], choice: Choice, check: Callable[[Format], None]) -> Format:
    name, parameters = tool["function"]["name"], tool["function"]["parameters"]
    style = family.style if family.style in _XML_STYLES else "json"
    content: Format = {"type": "json_schema", "json_schema": parameters, "style": style}
    tag = {"type": "tag", "begin": family.head % name, "content": content, "end": family.tail}
    try:
        check(tag)
    except InvalidRequest as error:
        if choice.mode == "required":
            raise InvalidRequest(f"the parameters of the tool {name!r} cannot be enforced: {error}") from error
        anything = {"type": "any_text"} if style != "json" else {**content, "json_schema": ANY_OBJECT}
        return {**tag, "content": anything}
    return tag


def after_reasoning(reasoning: Reasoning, opened: bool, then: Format) -> Format:
    """Reasoning, which the prompt has opened or which the model may open or leave out, and then this."""
    gap = {"type": "regex", "pattern": reasoning.gap}
    thought = {"type": "tag", "content": {"type": "any_text"}, "end": reasoning.close}
    if opened:
        return sequence({**thought, "begin": ""}, gap, then)
    before = {"type": "regex", "pattern": r"\n?"}  # GLM begins on a new line
    whole = sequence(before, {**thought, "begin": reasoning.open}, gap)
    return sequence({"type": "optional", "content": whole}, then)


def format_of(asked: StructuredOutput) -> Format:
    """A caller's shape as a part of a structural tag. Raises InvalidRequest for a grammar, which cannot be one."""
    if asked.kind == "json_schema":
        from embedllm.structured.lower import schema_of

        return {"type": "json_schema", "json_schema": schema_of(asked.json_schema)[0]}
    if asked.kind == "json_object":
        return {"type": "json_schema", "json_schema": ANY_OBJECT}
    if asked.kind == "regex":
        return {"type": "regex", "pattern": asked.regex}
    if asked.choice is not None:
        return _any(*map(literal, asked.choice))
    if asked.structural_tag is not None and "format" in asked.structural_tag:
        return dict(asked.structural_tag["format"])
    raise InvalidRequest(
        f"{asked.kind} cannot stand beside tools or after reasoning in this form; use json_schema, json_object, regex "
        "or choice, or switch reasoning off with chat_template_kwargs"
    )


def literal(text: str) -> Format:
    return {"type": "const_string", "value": text}


def sequence(*elements: Format) -> Format:
    """One after the other; empty literals are left out."""
    kept = [each for each in elements if each != literal("")]
    return kept[0] if len(kept) == 1 else {"type": "sequence", "elements": kept}


def _any(*elements: Format) -> Format:
    return {"type": "or", "elements": list(elements)}
