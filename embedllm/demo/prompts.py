"""What the demo asks the model in the box: heads of code, chat, a tool call, a shared prefix, three samples of one.

Owns the texts. Invariant: every prompt asks only what the small model was trained for, and three of them begin with the
same lines, so that the prefix cache has something to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_STACK = '''\
class Stack:
    """A last-in, first-out stack.

    Items are pushed on top and popped from the top. An empty stack is false.
    """

    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        """Put an item on top of the stack."""
        self.items.append(item)

'''
_POINT = """\
class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

"""
_QUEUE = '''\
class Queue:
    """Create a queue object with a given maximum size."""

    def __init__(self, maxsize=0):'''
_TEST = """\
class TestStack(unittest.TestCase):

    def test_push(self):"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ENDS = ("\ndef ", "\nclass ", "\n@", "\nif __name__", "\n#")  # what comes after a definition is another matter
# A small model left to its best guess repeats itself; a little chance and a penalty keep it going.
CODE = {"max_tokens": 112, "stop": list(ENDS), "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.15, "seed": 1}


@dataclass(frozen=True)
class Ask:
    """One request of the demo: a short name, the prompt as LLM.stream takes it, what to show of it, its options."""

    name: str
    prompt: str | list[dict[str, Any]]
    shown: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Any, ...] = ()


def _code(name: str, text: str, **options: Any) -> Ask:
    return Ask(name, text, text.removeprefix(_STACK), {**CODE, **options})


def _chat(name: str, question: str, *tools: Any) -> Ask:
    return Ask(name, [{"role": "user", "content": question}], question, {"max_tokens": 40, "temperature": 0.0}, tools)


def asks() -> list[Ask]:
    """The ten requests, twelve samples in all; the last two to arrive find the first's beginning in the cache."""
    return [
        _code("length", _STACK + "    def __len__(self):"),
        _code("repr", _POINT + "    def __repr__(self):"),
        _code("queue", _QUEUE),
        _chat("chat", "Which module can I use to parse JSON?"),
        _chat("tool call", "What is the weather in Paris?", WEATHER),
        _code("async", "import asyncio\n\n\nasync def main():"),
        _code("sample", "class Cache:\n    def get(self, key, default=None):", n=3, max_tokens=72),
        _code("test", _TEST),
        _code("iterate", _STACK + "    def __iter__(self):"),
        _code("pop", _STACK + "    def pop(self):"),
    ]
