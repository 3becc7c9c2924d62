"""What LangChain costs here: forty prompts by `batch` against `generate`, and a token of a stream.

Runs the model in the box. Both sides of a comparison are measured in every round, in turn, and medians are printed.
Run it from the root of the tree: `PYTHONPATH=.:kernels:integrations python -m tests.bench.langchain`.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

from langchain_core.messages import HumanMessage

import embedllm
from embedllm.testing import ScriptedModel
from langchain_embedllm import ChatEmbedLLM

PROMPTS = [f"What does function number {i} of the module do?" for i in range(40)]
CHATS: Any = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def batches(llm: embedllm.LLM, model: ChatEmbedLLM, rounds: int, options: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds of generate() and of batch() with the same prompts, per round."""
    asked: Any = PROMPTS
    runs = (lambda: llm.generate(CHATS, **options), lambda: model.batch(asked, **options))

    def seconds(run: Callable[[], Any]) -> float:
        llm.cache.reset()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    pairs = []
    for i in range(rounds):
        first, second = (0, 1) if i % 2 == 0 else (1, 0)
        spent = {which: seconds(runs[which]) for which in (first, second)}
        pairs.append((spent[0], spent[1]))
    return pairs


async def streams(llm: embedllm.LLM, model: ChatEmbedLLM, rounds: int, options: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of the reader's thread per piece, medians. The engine has a thread of its own."""
    message = HumanMessage(PROMPTS[0])
    readers: dict[str, Callable[[], Any]] = {
        "engine": lambda: llm.stream(CHATS[0], **options),
        "_astream": lambda: model._astream([message], **options),
        "astream": lambda: model.astream([message], **options),
    }
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            began, num_pieces = time.thread_time(), 0
            async for _ in read():
                num_pieces += 1
            found[name].append((time.thread_time() - began) / num_pieces)
    return {name: statistics.median(values) for name, values in found.items()}


def show_streams(name: str, llm: embedllm.LLM, rounds: int, options: dict[str, Any]) -> None:
    """Print what a piece of a stream costs its reader."""
    spent = asyncio.run(streams(llm, ChatEmbedLLM(llm=llm), rounds, options))
    print(f"{name}: CPU of the reader per piece: " + ", ".join(f"{key} {spent[key] * 1e6:.0f} us" for key in spent))
    print(
        f"    _astream over the engine's own iteration: {(spent['_astream'] - spent['engine']) * 1e6:.0f} us per piece"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each request")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each comparison")
    arguments = parser.parse_args()
    options = {"max_tokens": arguments.tokens, "ignore_eos": True, "temperature": 0.0}
    with embedllm.LLM(progress=False) as llm:
        model = ChatEmbedLLM(llm=llm)
        batches(llm, model, 1, options)
        pairs = batches(llm, model, arguments.rounds, options)
        generate, batch = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(batch / generate for generate, batch in pairs)
        print(f"{len(PROMPTS)} prompts x {arguments.tokens} tokens: generate {generate:.2f} s, batch {batch:.2f} s")
        print(f"batch / generate, median of {len(pairs)} pairs: {ratio:.3f}")
        show_streams("the model in the box", llm, arguments.rounds, options)
    # Without a model that computes beside it, the reader finds its caches warm.
    said = ScriptedModel(["and so on " * 100], delay=1e-3)
    with embedllm.LLM(said, tokenizer=said.tokenizer) as llm:
        show_streams("an engine that computes nothing", llm, arguments.rounds, options)


if __name__ == "__main__":
    main()
