"""ChatML as the model was trained on it, and the Jinja template that renders the same text.

`render` is what training uses; `TEMPLATE` ships with the model. Invariant: both give the same string (tested).
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

TOOLS_HEAD = "You may call these tools, one JSON object per line:\n<tools>\n"
TOOLS_TAIL = (
    "\n</tools>\nTo call a tool, answer with its name and arguments:\n"
    '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
)

TEMPLATE = """\
{%- set ns = namespace(system='') -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] in ['system', 'developer'] -%}
    {%- set ns.system = messages[0]['content'] -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content if part['text'] is defined -%}{{- part['text'] -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if ns.system or tools -%}
    {{- '<|im_start|>system\\n' + text(ns.system) -}}
    {%- if tools -%}
        {{- ('\\n\\n' if ns.system else '') + __HEAD__ -}}
        {%- for tool in tools -%}
            {%- set f = tool['function'] if tool['function'] is defined else tool -%}
            {{- '{"name": ' + f['name']|tojson + ', "description": ' + f['description']|default('', true)|tojson -}}
            {{- ', "parameters": ' + f['parameters']|default({}, true)|tojson + '}' -}}
            {{- '' if loop.last else '\\n' -}}
        {%- endfor -%}
        {{- __TAIL__ -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + text(message['content']) -}}
    {%- if message['tool_calls'] -%}
        {%- for call in message['tool_calls'] -%}
            {%- set f = call['function'] if call['function'] is defined else call -%}
            {{- '' if loop.first and not message['content'] else '\\n' -}}
            {{- '<tool_call>\\n{"name": ' + f['name']|tojson + ', "arguments": ' -}}
            {{- f['arguments'] if f['arguments'] is string else f['arguments']|tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
TEMPLATE = TEMPLATE.replace("__HEAD__", repr(TOOLS_HEAD)).replace("__TAIL__", repr(TOOLS_TAIL))


def dumps(value: object) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def render_call(name: str, arguments: dict[str, Any]) -> str:
    """One tool call as the assistant writes it."""
    return f'<tool_call>\n{{"name": {dumps(name)}, "arguments": {dumps(arguments)}}}\n</tool_call>'


def render_tools(tools: list[Tool]) -> str:
    """The system text that lists tools."""
    lines = (
        dumps({"name": t["name"], "description": t["description"], "parameters": t["parameters"]})
        for t in (tool["function"] for tool in tools)
    )
    return TOOLS_HEAD + "\n".join(lines) + TOOLS_TAIL


def render(messages: list[Message], tools: list[Tool], add_generation_prompt: bool = False) -> str:
    """The text of a conversation; tool calls are `{"function": {"name", "arguments": dict}}`."""
    out = []
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    else:
        system = ""
    listed = render_tools(tools) if tools else ""
    if system or listed:
        joint = "\n\n" if system and listed else ""
        out.append(f"<|im_start|>system\n{system}{joint}{listed}<|im_end|>\n")
    for message in messages:
        calls = [render_call(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        body = "\n".join(part for part in (message["content"], *calls) if part)
        out.append(f"<|im_start|>{message['role']}\n{body}<|im_end|>\n")
    return "".join(out) + ("<|im_start|>assistant\n" if add_generation_prompt else "")
