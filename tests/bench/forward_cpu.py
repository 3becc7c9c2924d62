"""Times the forward alone on this CPU: decode steps by batch size, prefill, and where the time goes.

A script: `PYTHONPATH=.:kernels python tests/bench/forward_cpu.py --dtype bfloat16 --threads 2`. Weights are random, so
the figures are of the shape and not of a model. The minimum of the runs is printed beside the median: on a machine that
others use too, the minimum is the steadier figure.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections import Counter
from collections.abc import Callable

import torch

from embedllm.kv_cache import KVCache
from embedllm.models.decoder import Decoder
from embedllm.models.shapes import random_weights, shape_config
from embedllm.plan_types import Entry, Plan
from embedllm.runner import Runner

NUM_BLOCKS, BLOCK_SIZE = 1_024, 16
KINDS = {
    "mkldnn::_linear_pointwise": "linear",
    "aten::linear": "linear",
    "aten::scaled_dot_product_attention": "attention",
    "aten::index_select": "gather",
    "aten::index_copy_": "store",
    "aten::index_fill_": "gather",
    "aten::layer_norm": "norm",
    "aten::neg": "norm",
    "aten::cat": "norm",
    "aten::roll": "rope",
    "aten::addcmul_": "rope",
    "aten::mul_": "rope",
    "aten::copy_": "copies",
}


def decode_plan(batch: int, context: int, block_size: int, num_blocks: int) -> Plan:
    """`batch` sequences of `context` tokens, one new token each, on blocks in random order."""
    each = -(-context // block_size)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    entries = [
        Entry(i, 0, i, context - 1, [i + 1], 0, 1, array("i", order[i * each : (i + 1) * each])) for i in range(batch)
    ]
    return Plan(0, entries)


def prefill_plan(tokens: int, block_size: int) -> Plan:
    blocks = array("i", range(-(-tokens // block_size)))
    return Plan(0, [Entry(0, 0, 0, 0, list(range(1, tokens + 1)), 0, 1, blocks)])


def timed(runner: Runner, plan: Plan, runs: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Minimum and median seconds of one step."""
    seconds = []
    for _ in range(runs + 2):
        began = clock()
        runner(plan)
        seconds.append(clock() - began)
    seconds = sorted(seconds[2:])
    return seconds[0], seconds[len(seconds) // 2]


def profile(runner: Runner, plan: Plan) -> str:
    """Self time by kind of operation, of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        runner(plan)
    kinds: Counter[str] = Counter()
    for event in prof.key_averages():
        if event.key in KINDS:
            kinds[KINDS[event.key]] += event.cpu_time_total
        else:
            kinds["other"] += event.self_cpu_time_total if "::" in event.key else 0
    return ", ".join(f"{kind} {micros / 1e3:.1f}" for kind, micros in kinds.most_common(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=208)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="do not pack the weights")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for --threads 1 on a machine that is shared")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    dtype = getattr(torch, args.dtype)
    config = shape_config(args.shape)
    began = time.perf_counter()
    decoder = Decoder(config, dtype=dtype, max_model_len=2_048, pack=not args.plain)
    for name, weight in random_weights(config, dtype=dtype):
        decoder.put(name, weight)
    decoder.finish()
    print(f"{args.shape} {args.dtype} {args.threads} threads, {decoder.num_bytes / 1e6:,.0f} MB of weights,", end=" ")
    print(f"made in {time.perf_counter() - began:.1f} s; packing: {decoder.packing or 'all'}")
    runner = Runner(decoder, KVCache(decoder.kv_group, NUM_BLOCKS, BLOCK_SIZE), 256)
    runner.kv_cache.blocks.fill_(0.01)
    for batch in args.batches:
        plan = decode_plan(batch, args.context, BLOCK_SIZE, NUM_BLOCKS)
        least, median = timed(runner, plan, args.runs, clock)
        print(
            f"decode  {batch:4} x context {args.context}: {least * 1e3:7.1f} ms min, {median * 1e3:7.1f} median,",
            end=" ",
        )
        print(f"{batch / median:7.0f} tokens/s", flush=True)
        if args.profile:
            print("        ms:", profile(runner, plan))
    for tokens in args.prefill:
        plan = prefill_plan(tokens, BLOCK_SIZE)
        least, median = timed(runner, plan, max(3, args.runs // 3), clock)
        print(f"prefill {tokens:4} tokens: {least * 1e3:7.1f} ms min, {median * 1e3:7.1f} median,", end=" ")
        print(f"{tokens / median:7.0f} tokens/s", flush=True)
        if args.profile:
            print("        ms:", profile(runner, plan))


if __name__ == "__main__":
    main()
