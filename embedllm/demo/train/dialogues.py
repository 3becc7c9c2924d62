"""Synthetic chat and tool-call dialogues, drawn from a seed.

A dialogue is a few turns, plain or with tools. Every turn has a key (what it asks about, not how); one key in twelve is
held out. Invariant: a training dialogue has no held-out key, and a held-out dialogue asks only about held-out keys.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from .chatml import Message, Tool, render
from .toolbox import CALCULATORS, FAMILIES, TRAIN_ONLY, Instance
from .wordlists import BUILTINS, MODULES, PEOPLE, WORDS

HELD_OUT_ONE_IN = 12
SYSTEMS = (
    "",
    "",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are embedllm.",
)


@dataclass(frozen=True)
class Turn:
    """What the user asks and the messages that answer it."""

    kind: str
    key: str
    messages: list[Message]


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation with the tools it may use."""

    kind: str
    keys: tuple[str, ...]
    messages: list[Message]
    tools: list[Tool]

    def text(self) -> str:
        """The conversation as the model sees it."""
        return render(self.messages, self.tools)


def is_held_out(key: str) -> bool:
    """Whether a key belongs to the held-out twelfth."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def _say(kind: str, key: str, question: str, answer: str) -> Turn:
    return Turn(kind, key, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def greeting(rng: Random) -> Turn:
    person, word = rng.choice(PEOPLE), rng.choice(["Hi", "Hello", "Hey", "Good morning", "Good evening"])
    slots, question, answer = rng.choice(
        [
            (f"{person} {word}", f"{word}, I am {person}.", f"Hello {person}! How can I help you?"),
            (f"{person} {word}", f"{word}, my name is {person}.", f"Hello {person}! How can I help you?"),
            ("", f"{word}!", "Hello! How can I help you?"),
            ("", word.lower(), "Hello! How can I help you?"),
            ("", f"Thanks, {person} is happy now!", "You are welcome!"),
            ("", rng.choice(["Thanks!", "Thank you.", "thanks", "Thank you very much!"]), "You are welcome!"),
            ("", rng.choice(["Bye!", "Goodbye.", "See you!"]), "Goodbye!"),
            (
                "",
                rng.choice(["Who are you?", "What are you?"]),
                "I am a small language model that runs inside embedllm.",
            ),
            ("", rng.choice(["How are you?", "How are you today?"]), "I am fine, thank you. How can I help you?"),
        ]
    )
    return _say("greeting", f"greeting {slots}" if slots else TRAIN_ONLY, question, answer)


def module(rng: Random) -> Turn:
    wish, name = rng.choice(list(MODULES.items()))
    question = rng.choice(
        [
            f"Which module can I use to {wish}?",
            f"How do I {wish} in Python?",
            f"Which Python module helps to {wish}?",
            f"I want to {wish}. Which module is that?",
            f"What do I import to {wish}?",
        ]
    )
    return _say("module", f"module {question}", question, f"Use the {name} module: import {name}")


def builtin(rng: Random) -> Turn:
    name, does = rng.choice(list(BUILTINS.items()))
    question = rng.choice(
        [
            f"What does {name} do?",
            f"What does {name}() do in Python?",
            f"Explain {name}.",
            f"What is {name} for?",
            f"Tell me about the function {name}.",
        ]
    )
    return _say("builtin", f"builtin {question}", question, f"{name}() {does}.")


def arithmetic(rng: Random) -> Turn:
    sign = rng.choice("+-*")
    a, b = (rng.randint(1, 10), rng.randint(1, 10)) if sign == "*" else (rng.randint(0, 20), rng.randint(0, 20))
    if sign == "-" and b > a:
        a, b = b, a
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    question = rng.choice(
        [f"What is {a} {sign} {b}?", f"What is {a} {word} {b}?", f"{a} {sign} {b}", f"Compute {a} {sign} {b}."]
    )
    return _say("arithmetic", f"arithmetic {a} {sign} {b}", question, f"{a} {sign} {b} = {value}")


def strings(rng: Random) -> Turn:
    words = rng.sample(WORDS, rng.randint(2, 4))
    word = words[0]
    spelled = " ".join(words)
    question, answer = rng.choice(
        [
            (f"Write {word} in capital letters.", word.upper()),
            (f"What is the first letter of {word}?", word[0]),
            (f"Repeat the word {word} twice.", f"{word} {word}"),
            (f"Repeat after me: {spelled}", spelled),
            (f"How many words are in this: {spelled}", str(len(words))),
            (f"What is the first word of this: {spelled}", words[0]),
            (f"What is the last word of this: {spelled}", words[-1]),
            (f"Put quotes around {word}.", f'"{word}"'),
            (f"Join these with a comma: {spelled}", ", ".join(words)),
        ]
    )
    return _say("strings", f"strings {question.split(':')[0]} {spelled if ':' in question else word}", question, answer)


PLAIN: tuple[Callable[[Random], Turn], ...] = (greeting, module, builtin, arithmetic, strings)


def tool_turn(rng: Random, instance: Instance, number: int) -> Turn:
    """Question, call, result and answer."""
    use = instance.ask(rng)
    call: dict[str, Any] = {"name": instance.name, "arguments": use.arguments}
    messages: list[Message] = [
        {"role": "user", "content": use.question},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": f"call_{number}", "type": "function", "function": call}],
        },
        {"role": "tool", "content": use.result, "tool_call_id": f"call_{number}", "name": instance.name},
        {"role": "assistant", "content": use.answer},
    ]
    return Turn("tool", use.key, messages)


def _toolset(rng: Random) -> list[Instance]:
    chosen = [family(rng) for family in rng.sample(FAMILIES, rng.choice([1, 1, 2, 2, 3, 4]))]
    return list({instance.name: instance for instance in chosen}.values())


def _turn(rng: Random, instances: list[Instance], number: int) -> Turn:
    if instances and rng.random() < 0.8:
        return tool_turn(rng, rng.choice(instances), number)
    can_compute = any(instance.name in CALCULATORS for instance in instances)
    return rng.choice([family for family in PLAIN if not (can_compute and family is arithmetic)])(rng)


def dialogue(rng: Random, held_out: bool = False, max_turns: int = 4) -> Dialogue:
    """One conversation; three in five have tools."""
    system = rng.choice(SYSTEMS)
    instances = _toolset(rng) if rng.random() < 0.6 else []
    wanted = rng.randint(1, max_turns)
    turns: list[Turn] = []
    while len(turns) < wanted:
        turn = _turn(rng, instances, len(turns))
        if is_held_out(turn.key) == held_out:
            turns.append(turn)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [message for turn in turns for message in turn.messages]
    tools = [instance.schema() for instance in instances]
    return Dialogue(turns[0].kind, tuple(turn.key for turn in turns), messages, tools)


def dialogues(seed: int, count: int, held_out: bool = False, max_turns: int = 4) -> Iterator[Dialogue]:
    """A reproducible run of conversations."""
    rng = Random(f"dialogues {seed} {held_out}")
    for _ in range(count):
        yield dialogue(rng, held_out, max_turns)
