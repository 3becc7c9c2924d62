"""What the demo asks the model in the box: heads of code, chat, a tool call, a shared prefix, three samples of one.

Owns the texts. Invariant: every prompt asks only what the small model was trained for, and two of them begin with the
same lines, so that the prefix cache has something to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MODULE = '''\
"""Read and write settings as text: one name and one value on each line."""

import os


class SettingsError(Exception):
    """A line of a settings file could not be understood."""


def read_lines(path):
    """Return the lines of a file without their newlines."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\\n") for line in file]


'''

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


ENDS = ("\ndef ", "\nclass ", "\n@", "\nif __name__")  # what comes after a function is another matter


@dataclass(frozen=True)
class Ask:
    """One request of the demo: a short name, the prompt as LLM.stream takes it, what to show of it, its options."""

    name: str
    prompt: str | list[dict[str, Any]]
    shown: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Any, ...] = ()


def _code(name: str, text: str, **options: Any) -> Ask:
    return Ask(
        name,
        text,
        text.removeprefix(_MODULE),
        {"max_tokens": 112, "stop": list(ENDS), **options},
    )


def _chat(name: str, question: str, **options: Any) -> Ask:
    return Ask(name, [{"role": "user", "content": question}], question, {"max_tokens": 40, **options})


def asks() -> list[Ask]:
    """The ten requests, twelve samples in all; the last two to arrive find the third's beginning in the cache."""
    return [
        _code("fibonacci", "def fibonacci(n):"),
        _code("stack", 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self):'),
        _code("parse", _MODULE + "def parse(line):"),
        _chat("chat", "Which module can I use to parse JSON?"),
        Ask(
            "tool call",
            [{"role": "user", "content": "What is the weather in Paris?"}],
            "What is the weather in Paris?",
            {"max_tokens": 40},
            (WEATHER,),
        ),
        _code("counter", "def count_words(text):\n    counts = {}\n    for word in text.split():"),
        _code("sample", "def is_prime(n):", n=3, temperature=0.7, seed=3, max_tokens=64),
        _code("test", "import unittest\n\n\nclass TestAdd(unittest.TestCase):\n\n    def test_zero(self):"),
        _code("write", _MODULE + "def write_settings(path, settings):"),
        _code("read", _MODULE + "def read_settings(path):"),
    ]
