"""A scripted model that answers chats as an obedient instruct model would: calls a tool it is offered, fills a schema
from the numbers and quoted words of the question, and otherwise greets.

It reads nothing but the prompt's token ids, through a template in hermes format, so whatever it answers right was
rendered right. Bytes are its tokens.
"""

import json
import re
from typing import Any

from embedllm.testing import ByteTokenizer, ScriptedModel

GREETING = "Hello, how are you doing?"
JOKE = {"setup": "Why did the cat sit on the laptop?", "punchline": "To keep an eye on the mouse."}
REPORT = {"city": "Paris", "celsius": 21}
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
TOOLS = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)


class HermesTokenizer(ByteTokenizer):
    """Bytes, and a template that lists tools as JSON and writes calls between <tool_call> tags."""

    chat_template = """
{%- if tools %}<|im_start|>system
You may call these functions:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
A call is <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>
{% endif %}{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""


def fill(schema: dict[str, Any], question: str, root: dict[str, Any] | None = None) -> Any:
    """A value of the schema: the last integer and the first quoted word of the question where they fit."""
    root = schema if root is None else root
    if "$ref" in schema:
        return fill(root["$defs"][schema["$ref"].rpartition("/")[2]], question, root)
    if "anyOf" in schema:
        return fill(schema["anyOf"][0], question, root)
    kind = schema.get("type", "string")
    if kind == "object":
        return {name: fill(one, question, root) for name, one in schema.get("properties", {}).items()}
    if kind in ("integer", "number"):
        found = re.findall(r"-?\d+", question)
        return int(found[-1]) if found else 1
    if kind == "array":
        return [fill(schema["items"], question, root)] if schema.get("minItems") else []
    if kind == "boolean":
        return True
    quoted = re.findall(r"'([^']+)'", question)
    return quoted[0] if quoted else "Pirate"


def calls(tools: list[dict[str, Any]], question: str) -> str:
    """A call of each of them."""
    asked = [(tool["name"], fill(tool.get("parameters", {"type": "object"}), question)) for tool in tools]
    bodies = [json.dumps({"name": name, "arguments": given}, ensure_ascii=False) for name, given in asked]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def answer(prompt: str) -> str:
    """What is said after the rendered prompt."""
    turns = TURN.findall(prompt)
    if not turns:
        return GREETING  # a plain prompt
    *said, _ = turns  # the last one is the answer's own
    listed = TOOLS.search(prompt)
    tools = [json.loads(line)["function"] for line in listed[1].splitlines()] if listed else []
    role = said[-1][0]
    question = next((text for role, text in reversed(said) if role == "user"), "")
    thinking = "<think>\n" if turns[-1][1].startswith("<think>") else ""
    thought = "The user wants an answer.\n</think>\n\n" if thinking else ""
    reports = [tool for tool in tools if tool["name"] == "Report"]
    if role == "tool" and "report" in question:
        return thought + (calls(reports, question) if reports else json.dumps(REPORT))
    if tools and role != "tool":
        return thought + calls([tool for tool in tools if tool["name"] in question] or tools[:1], question)
    if "joke" in question:
        return thought + json.dumps(JOKE)
    return thought + GREETING


def model(tokenizer: ByteTokenizer | None = None, delay: float = 0.0) -> ScriptedModel:
    """The scripted model; with a plain ByteTokenizer it knows no tools and no reasoning. delay: seconds of a step."""
    tokenizer = HermesTokenizer() if tokenizer is None else tokenizer

    def reply(prompt: list[int]) -> list[int]:
        return tokenizer.encode(answer(tokenizer.decode(prompt, skip_special_tokens=False)))

    return ScriptedModel(reply, tokenizer, delay=delay, max_model_len=16_384)
