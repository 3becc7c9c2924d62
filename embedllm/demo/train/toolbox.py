"""Tools for the synthetic dialogues: their JSON descriptions, the questions that need them, and the answers.

Each family draws a fresh instance (names of tool and parameters vary) and can ask any number of questions of it.
Invariant: the right call and the right answer follow from the question and the tool result alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .chatml import Tool, dumps
from .wordlists import (
    CITIES,
    CURRENCIES,
    FIELDS,
    LANGUAGES,
    PEOPLE,
    SUBJECTS,
    SYMBOLS,
    TOPICS,
    VERBS,
    WEATHER,
    WORDS,
)

TRAIN_ONLY = "train only"  # key of turns that vary too little for a held-out one to be new
CALCULATORS = ("multiply", "add", "subtract")


@dataclass(frozen=True)
class Use:
    """One question that needs a tool: its key for the split, the arguments, the tool's result and the answer."""

    key: str
    question: str
    arguments: dict[str, Any]
    result: str
    answer: str


@dataclass(frozen=True)
class Instance:
    """A tool as one conversation sees it, and a way to ask for it."""

    name: str
    description: str
    parameters: dict[str, str]  # name -> JSON type
    ask: Callable[[Random], Use]

    def schema(self) -> Tool:
        """The tool in the layout of the OpenAI chat API."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def weather(rng: Random) -> Instance:
    name = rng.choice(["get_weather", "weather", "current_weather", "get_current_weather"])
    place = rng.choice(["city", "location", "place"])

    def ask(rng: Random) -> Use:
        city, sky, degrees = rng.choice(CITIES), rng.choice(WEATHER), rng.randint(-9, 38)
        question = rng.choice(
            [
                f"What is the weather in {city}?",
                f"How is the weather in {city}?",
                f"What's the weather like in {city} today?",
                f"Weather in {city}?",
                f"Tell me the weather in {city}.",
            ]
        )
        result = dumps({place: city, "sky": sky, "celsius": degrees})
        if rng.random() < 0.3:
            result = f"{sky}, {degrees} degrees"
        return Use(f"weather {city}", question, {place: city}, result, f"It is {sky} in {city}, {degrees} degrees.")

    return Instance(name, "Get the weather in a " + place + ".", {place: "string"}, ask)


def clock(rng: Random) -> Instance:
    name = rng.choice(["get_time", "local_time", "current_time", "clock"])
    place = rng.choice(["city", "location", "place"])

    def ask(rng: Random) -> Use:
        city, time = rng.choice(CITIES), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        question = rng.choice(
            [
                f"What time is it in {city}?",
                f"Tell me the time in {city}.",
                f"Time in {city}?",
                f"How late is it in {city}?",
            ]
        )
        return Use(f"clock {city}", question, {place: city}, time, f"It is {time} in {city}.")

    return Instance(name, "Get the local time in a " + place + ".", {place: "string"}, ask)


def currency(rng: Random) -> Instance:
    name = rng.choice(["convert_currency", "convert", "exchange", "currency_converter"])
    amount, source, target = rng.choice(
        [("amount", "from", "to"), ("amount", "source", "target"), ("value", "from", "to")]
    )

    def ask(rng: Random) -> Use:
        number, (a, b) = rng.randint(1, 999), rng.sample(CURRENCIES, 2)
        converted = rng.randint(1, 2000)
        question = rng.choice(
            [f"Convert {number} {a} to {b}.", f"How much is {number} {a} in {b}?", f"What are {number} {a} in {b}?"]
        )
        arguments = {amount: number, source: a, target: b}
        return Use(f"money {number} {a}", question, arguments, str(converted), f"{number} {a} are {converted} {b}.")

    kinds = {amount: "number", source: "string", target: "string"}
    return Instance(name, "Convert money from one currency to another.", kinds, ask)


def search(rng: Random) -> Instance:
    name = rng.choice(["search", "web_search", "search_web", "lookup"])
    query = rng.choice(["query", "q", "text"])

    def ask(rng: Random) -> Use:
        topic, count = rng.choice(TOPICS), rng.randint(2, 99)
        question = rng.choice(
            [
                f"Search for {topic}.",
                f"Find pages about {topic}.",
                f"Look up {topic}.",
                f"Search the web for {topic}, please.",
            ]
        )
        return Use(
            f"search {topic}", question, {query: topic}, f"{count} pages", f"I found {count} pages about {topic}."
        )

    return Instance(name, "Search the web.", {query: "string"}, ask)


def calculator(rng: Random) -> Instance:
    name = rng.choice(CALCULATORS)
    a, b = rng.choice([("a", "b"), ("x", "y"), ("first", "second")])

    def ask(rng: Random) -> Use:
        x, y = rng.randint(2, 999), rng.randint(2, 999)
        sign, value = {"multiply": ("*", x * y), "add": ("+", x + y), "subtract": ("-", x - y)}[name]
        spoken = {"multiply": f"Multiply {x} by {y}.", "add": f"Add {x} and {y}.", "subtract": f"Take {y} from {x}."}[
            name
        ]
        question = rng.choice([f"What is {x} {sign} {y}?", spoken, f"Compute {x} {sign} {y}."])
        return Use(f"calc {x} {y}", question, {a: x, b: y}, str(value), f"{x} {sign} {y} = {value}.")

    verb = {"multiply": "Multiply", "add": "Add", "subtract": "Subtract"}[name]
    return Instance(name, f"{verb} two numbers.", {a: "integer", b: "integer"}, ask)


def mail(rng: Random) -> Instance:
    name = rng.choice(["send_message", "send_email", "send", "message"])
    to, text = rng.choice([("to", "text"), ("recipient", "body"), ("to", "message")])

    def ask(rng: Random) -> Use:
        person, words = rng.choice(PEOPLE), " ".join(rng.sample(WORDS, rng.randint(1, 3)))
        question = rng.choice(
            [f'Send "{words}" to {person}.', f'Tell {person}: "{words}".', f'Send {person} the message "{words}".']
        )
        return Use(f"mail {person} {words}", question, {to: person, text: words}, "sent", f"I sent it to {person}.")

    return Instance(name, "Send a message to a person.", {to: "string", text: "string"}, ask)


def translate(rng: Random) -> Instance:
    name = rng.choice(["translate", "translate_text", "translator"])
    text, language = rng.choice([("text", "language"), ("text", "target"), ("word", "to")])

    def ask(rng: Random) -> Use:
        word, tongue = rng.choice(WORDS), rng.choice(LANGUAGES)
        result = "".join(
            rng.choice(["ka", "lo", "mi", "ren", "ta", "vu", "sel", "do"]) for _ in range(rng.randint(2, 3))
        )
        question = rng.choice(
            [f"Translate {word} to {tongue}.", f"What is {word} in {tongue}?", f"Say {word} in {tongue}."]
        )
        arguments = {text: word, language: tongue}
        return Use(f"translate {word} {tongue}", question, arguments, result, f"{word} in {tongue} is {result}.")

    return Instance(name, "Translate text to another language.", {text: "string", language: "string"}, ask)


def stocks(rng: Random) -> Instance:
    name = rng.choice(["get_stock_price", "stock_price", "quote"])
    symbol = rng.choice(["symbol", "ticker"])

    def ask(rng: Random) -> Use:
        ticker, price = rng.choice(SYMBOLS), f"{rng.randint(5, 900)}.{rng.randint(0, 99):02}"
        question = rng.choice(
            [f"What is the price of {ticker}?", f"How much is {ticker}?", f"Price of {ticker}, please."]
        )
        return Use(TRAIN_ONLY, question, {symbol: ticker}, dumps({"price": price}), f"{ticker} is at {price}.")

    return Instance(name, "Get the price of a stock.", {symbol: "string"}, ask)


def any_tool(rng: Random) -> Instance:
    """A made-up tool with one to three parameters, asked for by its name: the model must copy, not remember."""
    name = f"{rng.choice(VERBS)}_{rng.choice(SUBJECTS)}"
    if rng.random() < 0.2:
        name = f"{rng.choice(WORDS)}_{rng.choice(['function', 'tool', rng.choice(SUBJECTS)])}"
    fields = rng.sample(FIELDS, rng.randint(1, 3))
    kinds = {field: rng.choice(["string", "integer"]) for field in fields}

    def ask(rng: Random) -> Use:
        arguments: dict[str, Any] = {
            field: rng.randint(0, 999) if kind == "integer" else rng.choice(WORDS + PEOPLE)
            for field, kind in kinds.items()
        }
        spelled = " and ".join(f"{field} {value}" for field, value in arguments.items())
        question = rng.choice(
            [f"Call {name} with {spelled}.", f"Use {name} with {spelled}.", f"Please run {name} with {spelled}."]
        )
        result = rng.choice(["ok", "done", str(rng.randint(0, 999)), rng.choice(WORDS)])
        return Use(f"any {name} {spelled}", question, arguments, result, f"The result of {name} is {result}.")

    return Instance(name, f"{name.replace('_', ' ').capitalize()}.", kinds, ask)


FAMILIES = (weather, clock, currency, search, calculator, mail, translate, stocks, any_tool, any_tool, any_tool)
