"""Small chat templates in the style of each family: how turns, tools, calls, results and reasoning are written.

And what a model of each family writes to make calls, in words of its own: the table of families is not asked.
"""

import json
from typing import Any

Call = tuple[str, dict[str, Any]]

_TURNS = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
    {%- for call in message.tool_calls or [] -%}
        CALL
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}END{%- endif -%}
"""
_TOOLS = "{%- if tools -%}{{- '<tools>' + tools | tojson + '</tools>\\n' -}}{%- endif -%}\n"
_JSON = """{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
        {{- call.function.arguments | tojson + '}\\n</tool_call>' -}}"""
_SYSTEM_FIRST = """\
{%- for message in messages -%}
    {%- if message.role == 'system' and not loop.first -%}{{- raise_exception('system must be first') -}}{%- endif -%}
{%- endfor -%}
"""


def _chatml(call: str, end: str = "", tools: str = _TOOLS) -> str:
    return tools + _TURNS.replace("CALL", call).replace("END", end)


TEMPLATES = {
    "hermes": _chatml(_JSON),
    "qwen3": _chatml(
        _JSON,
        "{%- if enable_thinking is defined and enable_thinking is false -%}"
        "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}",
    ),
    "smollm3": _chatml(
        _JSON,
        "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n' -}}{%- endif -%}",
        "{%- if xml_tools -%}{{- '<tools>' + xml_tools | tojson + '</tools>\\n' -}}{%- endif -%}",
    ),
    "qwen3-coder": _chatml(
        """{{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' -}}
        {%- for key, value in call.function.arguments | items -%}
            {{- '<parameter=' + key + '>\\n' ~ value ~ '\\n</parameter>\\n' -}}
        {%- endfor -%}
        {{- '</function>\\n</tool_call>' -}}"""
    ),
    "glm": _chatml(
        """{{- '\\n<tool_call>' + call.function.name -}}
        {%- for key, value in call.function.arguments.items() -%}
            {{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' ~ value ~ '</arg_value>' -}}
        {%- endfor -%}
        {{- '\\n</tool_call>' -}}""",
        "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>\\n' -}}{%- endif -%}",
    ),
    "llama": """\
{{- bos_token -}}
{%- if custom_tools is defined -%}{%- set tools = custom_tools -%}{%- endif -%}
{%- if tools -%}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' -}}
    {{- tools | tojson -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
    {%- if message.tool_calls -%}
        {%- if message.tool_calls | length != 1 -%}{{- raise_exception('only single tool-calls!') -}}{%- endif -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
    {%- else -%}{{- message.content -}}{%- endif -%}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
""",
    "mistral-list": """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if loop.last and tools -%}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
        {{- '[INST] ' + message.content + '[/INST]' -}}
    {%- elif message.tool_calls -%}
        {{- '[TOOL_CALLS] [' -}}
        {%- for call in message.tool_calls -%}
            {%- if call.id is not string or call.id | length != 9 -%}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
            {%- endif -%}
            {{- call.function | tojson ~ call.id ~ (', ' if not loop.last else ']') -}}
        {%- endfor -%}{{- eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS] ' + message.content + message.tool_call_id + '[/TOOL_RESULTS]' -}}
    {%- elif message.role == 'assistant' -%}{{- message.content + eos_token -}}
    {%- elif not loop.first -%}{{- raise_exception('roles') -}}
    {%- else -%}{{- message.content -}}{%- endif -%}
{%- endfor -%}
""",
    "mistral": """\
{{- bos_token -}}
{%- if tools -%}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- '[INST]' + message.content + '[/INST]' -}}
    {%- elif message.tool_calls -%}
        {%- for call in message.tool_calls -%}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson -}}
        {%- endfor -%}{{- eos_token -}}
    {%- else -%}{{- message.content + eos_token -}}{%- endif -%}
{%- endfor -%}
""",
    "granite": """\
{%- if tools -%}
    {{- 'When a tool is required, respond with <|tool_call|> and a JSON list.\\n' + tools | tojson -}}
{%- endif -%}
"""
    + _chatml("{{- '<|tool_call|>' + [call.function] | tojson -}}", tools=""),
    "phi": """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none -%}
        {{- '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' -}}
    {%- else -%}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""",
    "deepseek-r1": _chatml(
        "{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name -}}"  # noqa: RUF001
        "{{- '\\n```json\\n' + call.function.arguments | tojson + '\\n```<｜tool▁call▁end｜>' -}}",  # noqa: RUF001
        "{{- '<think>\\n' -}}",
    ),
    "deepseek": _chatml(
        "{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' -}}"  # noqa: RUF001
        "{{- call.function.arguments | tojson + '<｜tool▁call▁end｜><｜tool▁calls▁end｜>' -}}",  # noqa: RUF001
        "{%- if thinking -%}{{- '<think>' -}}{%- else -%}{{- '</think>' -}}{%- endif -%}",
    ),
    "harmony": """\
{%- if tools -%}{{- '<|start|>developer<|message|>' + tools | tojson + '<|end|>' -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message.tool_calls -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- '<|start|>assistant<|channel|>commentary to=functions.' + call.name -}}
        {{- ' <|constrain|>json<|message|>' + call.arguments | tojson + '<|call|>' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' -}}
    {%- else -%}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
""",
    "gemma": """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' -}}
    {{- (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
""",
}


def written(name: str, calls: list[Call]) -> str:
    """What a model of this family writes to make these calls; its own words, not the table's."""
    dumped = [(tool, json.dumps(arguments, ensure_ascii=False)) for tool, arguments in calls]
    objects = [f'{{"name": "{tool}", "arguments": {text}}}' for tool, text in dumped]
    xml = [[(k, v if isinstance(v, str) else json.dumps(v)) for k, v in args.items()] for _, args in calls]
    both = list(zip((tool for tool, _ in calls), xml, strict=True))
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
        case "qwen_xml":
            values = ["".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in pairs) for pairs in xml]
            names = [tool for tool, _ in calls]
            whole = [f"<function={tool}>\n{text}</function>" for tool, text in zip(names, values, strict=True)]
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in whole)
        case "glm":
            keys = [
                (tool, "".join(f"\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>" for k, v in p))
                for tool, p in both
            ]
            return "\n".join(f"<tool_call>{tool}{text}\n</tool_call>" for tool, text in keys)
        case "llama":
            return "; ".join(f'{{"name": "{tool}", "parameters": {text}}}' for tool, text in dumped)
        case "mistral_list":
            return f"[TOOL_CALLS] [{', '.join(objects)}]"
        case "mistral":
            return "".join(f"[TOOL_CALLS]{tool}[ARGS]{text}" for tool, text in dumped)
        case "granite":
            return f"<|tool_call|>[{', '.join(objects)}]"
        case "phi":
            return f"<|tool_call|>[{', '.join(objects)}]<|/tool_call|>"
        case "deepseek_r1":
            begin, end = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
            parts = "\n".join(f"{begin}{tool}\n```json\n{text}\n```{end}" for tool, text in dumped)
            return f"<｜tool▁calls▁begin｜>{parts}<｜tool▁calls▁end｜>"  # noqa: RUF001
        case "deepseek":
            begin, sep, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
            parts = "".join(f"{begin}{tool}{sep}{text}{end}" for tool, text in dumped)
            return f"<｜tool▁calls▁begin｜>{parts}<｜tool▁calls▁end｜>"  # noqa: RUF001
        case "harmony":
            head = "<|channel|>commentary to=functions."
            each = [f"{head}{tool} <|constrain|>json<|message|>{text}<|call|>" for tool, text in dumped]
            return "<|start|>assistant".join(each)
    raise AssertionError(name)
