"""Held-out evaluation of an exported model: bits per byte, functions that parse, chat and tool calls.

Reads only packages and dialogue keys that training never saw. Every figure is greedy and seeded, so it can be repeated.
"""

from __future__ import annotations

import ast
import json
import math
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from .chatml import Message, render
from .corpus import Source
from .dialogues import Dialogue, dialogues
from .model import BoxModel, KVCache
from .tokens import END_OF_TEXT, TURN_END

CONTEXT_LINES = 8
BODY_TOKENS = 96


@torch.no_grad()
def bits_per_byte(model: BoxModel, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Total bits of texts over their total bytes; windows of the full context that move by half of it."""
    window = model.config.context
    end = tokenizer.token_to_id(END_OF_TEXT)
    device = next(model.parameters()).device
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor([end, *tokenizer.encode(text).ids], device=device)
        num_bytes += len(text.encode())
        scored = 0
        for start in range(0, len(ids) - 1, window // 2):
            chunk = ids[start : start + window + 1]
            hidden, _ = model.hidden(chunk[None, :-1])
            fresh = len(chunk) - 1 - (scored - start)  # targets that no earlier window has scored
            logits = model.logits(hidden[0, -fresh:])
            nats += torch.nn.functional.cross_entropy(logits, chunk[-fresh:], reduction="sum").item()
            scored = start + len(chunk) - 1
            if scored == len(ids) - 1:
                break
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def greedy(model: BoxModel, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> str:
    """Greedy continuation up to an end token, decoded with control tokens left out."""
    stops = {tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)}
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)[:, -(model.config.context - max_tokens) :]
    out: list[int] = []
    past: KVCache | None = None
    while len(out) < max_tokens:
        hidden, past = model.hidden(ids, past)
        token = int(model.logits(hidden[0, -1]).argmax())
        if token in stops:
            break
        out.append(token)
        ids = torch.tensor([[token]], device=device)
    return str(tokenizer.decode(out))


@dataclass(frozen=True)
class Head:
    """A function of a held-out file: lines before it, its head up to the colon, and what really follows."""

    context: str
    head: str
    rest: str


def function_heads(sources: list[Source], count: int, seed: int = 0) -> list[Head]:
    """A seeded sample of the functions that have their body on lines of their own, and ten lines after their head."""
    heads = []
    for source in sources:
        lines = source.text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source.text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first, body = node.lineno - 1, node.body[0].lineno - 1
            head = "".join(lines[first:body]).rstrip("\n")
            if body > first and head.endswith(":") and len(lines) - body >= 10:
                context = "".join(lines[max(0, first - CONTEXT_LINES) : first])
                heads.append(Head(context, head, "\n" + "".join(lines[body:])))
    return Random(seed).sample(heads, min(count, len(heads)))


def cut_at_dedent(head: str, continuation: str) -> str:
    """The function that a continuation completes: head and body, up to the first line that is not in the body."""
    depth = len(head) - len(head.lstrip(" "))
    first, *lines = continuation.split("\n")
    body = [head + first]
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip(" ")) <= depth:
            break
        body.append(line)
    return textwrap.dedent("\n".join(body))


def parses(function: str) -> bool:
    """Whether Python accepts it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # `1if x` is bad style, not an error
        try:
            ast.parse(function)
        except (SyntaxError, ValueError):
            return False
    return True


def whole_lines(text: str) -> str:
    """The text up to its last line break."""
    return text[: text.rfind("\n") + 1]


def parse_rates(model: BoxModel, tokenizer: Tokenizer, sources: list[Source], count: int = 200) -> dict[str, float]:
    """Share of function heads whose 96-token continuation parses: the model's, the file's own, and shuffled tokens.

    `whole lines` drops a last line that the 96 tokens left unfinished, when no dedent came before.
    """
    passed: dict[str, int] = defaultdict(int)
    heads = function_heads(sources, count)
    for number, head in enumerate(heads):
        real = tokenizer.encode(head.rest).ids[:BODY_TOKENS]
        mixed = Random(number).sample(real, len(real))
        continuations = {
            "model": greedy(model, tokenizer, head.context + head.head, BODY_TOKENS),
            "real code": str(tokenizer.decode(real)),
            "shuffled tokens": str(tokenizer.decode(mixed)),
        }
        for name, text in continuations.items():
            passed[name] += parses(cut_at_dedent(head.head, text))
            passed[f"{name}, whole lines"] += parses(cut_at_dedent(head.head, whole_lines(text)))
    return {name: number / len(heads) for name, number in passed.items()}


def parse_call(text: str) -> object:
    """The JSON of the first tool call in a text, or None."""
    _, found, rest = text.partition("<tool_call>")
    inner, closed, _ = rest.partition("</tool_call>")
    try:
        return json.loads(inner) if found and closed else None
    except json.JSONDecodeError:
        return None


def assistant_turns(dialogue: Dialogue) -> Iterator[tuple[list[Message], Message]]:
    """Every assistant message with the messages before it."""
    for index, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            yield dialogue.messages[:index], message


def is_right(message: Message, text: str) -> bool:
    """Whether a generated text equals the expected message: the call's JSON, or the exact answer."""
    if calls := message.get("tool_calls"):
        return bool(parse_call(text) == calls[0]["function"])
    return bool(text.strip() == message["content"])


def chat_accuracy(
    model: BoxModel,
    tokenizer: Tokenizer,
    count: int = 300,
    max_turns: int = 1,
    report: Callable[[str], None] | None = None,
) -> dict[str, tuple[int, int]]:
    """(right, asked) per kind of turn on held-out dialogues: `tool call`, `tool answer`, and the plain families."""
    score: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for dialogue in dialogues(1, count, held_out=True, max_turns=max_turns):
        for history, message in assistant_turns(dialogue):
            kind = dialogue.kind if max_turns == 1 else "later turn"
            if message.get("tool_calls"):
                kind = "tool call"
            elif history[-1]["role"] == "tool":
                kind = "tool answer"
            text = greedy(model, tokenizer, render(history, dialogue.tools, add_generation_prompt=True), BODY_TOKENS)
            right = is_right(message, text)
            score[kind][0] += right
            score[kind][1] += 1
            if report is not None and not right:
                report(f"{kind}: {history[-1]['content']!r} -> {text!r}, not {message!r}")
    return {kind: (right, asked) for kind, (right, asked) in sorted(score.items())}
