"""What a shape costs a decoding step: the same 16 requests with and without one, step by step, in turns.

    python -m tests.bench.structured_cost [--rows 16] [--rounds 5] [--temperature 1.0] [--model FOLDER]

Prints the median step of free rows, of rows whose answers have a shape, and of a batch that is half and half, and how
many tokens a step gives: where a shape leaves no choice, more than one per row.
"""

import argparse
import statistics
import time

import embedllm
from embedllm import StructuredOutput
from embedllm.engine import Engine

SHAPES = {
    "free text in JSON": {"type": "array", "items": {"type": "string", "minLength": 30}, "minItems": 16},
    "records": {
        "type": "array",
        "minItems": 16,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "kind": {"enum": ["alpha", "beta", "gamma"]},
            },
            "required": ["name", "age", "kind"],
        },
    },
}
WARM, STEPS = 5, 60


def measure(
    llm: embedllm.LLM, shapes: list[StructuredOutput | None], tokens: int, temperature: float
) -> tuple[float, float]:
    """Seconds of the median step with these rows all decoding, and tokens per row and step."""
    engine: Engine = llm._open().worker._engine
    times: list[tuple[float, int]] = []
    step = engine.step

    def timed():  # type: ignore[no-untyped-def]
        rows = len(engine.scheduler.running)
        before, began = engine.metrics.generation_tokens, time.perf_counter()
        output = step()
        if rows == len(shapes):
            times.append((time.perf_counter() - began, engine.metrics.generation_tokens - before))
        return output

    engine.step = timed  # type: ignore[method-assign]
    try:
        asked = []
        for number, shape in enumerate(shapes):
            options = {"ignore_eos": True} if shape is None else {"structured": shape}
            params = embedllm.SamplingParams(max_tokens=tokens, temperature=temperature, seed=number, **options)
            asked.append(llm.submit(f"Row {number}: ", params))
        for generation in asked:
            generation.result()
    finally:
        engine.step = step  # type: ignore[method-assign]
    kept = times[WARM : WARM + STEPS]
    return statistics.median(seconds for seconds, _ in kept), sum(n for _, n in kept) / len(kept) / len(shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--model", default=None)
    given = parser.parse_args()
    with embedllm.LLM(given.model, progress=False) as llm:
        print(f"{llm.info.model}, {llm.info.dtype}, {given.rows} rows, medians of {given.rounds} rounds")
        for name, schema in SHAPES.items():
            shape = StructuredOutput(json_schema=schema)
            kinds = {
                "free": [None] * given.rows,
                "shaped": [shape] * given.rows,
                "half": [shape, None] * (given.rows // 2),
            }
            found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for round_number in range(given.rounds + 1):
                for kind, shapes in kinds.items():
                    result = measure(llm, shapes, WARM + STEPS + 20, given.temperature)
                    if round_number:  # the first compiles
                        found[kind].append(result)
            free = statistics.median(seconds for seconds, _ in found["free"])
            for kind, results in found.items():
                seconds = statistics.median(seconds for seconds, _ in results)
                tokens = statistics.median(tokens for _, tokens in results)
                print(
                    f"{name:18} {kind:7} {seconds * 1e3:7.2f} ms per step ({seconds / free - 1:+.1%}), "
                    f"{tokens:.2f} tokens per row and step, {seconds / tokens * 1e3:.2f} ms per token"
                )


if __name__ == "__main__":
    main()
