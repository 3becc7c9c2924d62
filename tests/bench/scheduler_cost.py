"""What scheduling costs: time of plan + commit per step, as the pool grows and as more sequences run.

No model: every sequence is told a token per step. The pool is full of cached blocks, so that every new block is an
eviction. Run it from the root of the tree: `python -m tests.bench.scheduler_cost`.
"""

import argparse
import gc
import random
import statistics
import time

from embedllm.config import Limits
from embedllm.scheduler import Scheduler
from embedllm.sequence import Sequence

BLOCK_SIZE = 16
NUM_PROMPT = 96


def full_scheduler(num_blocks: int, num_running: int, num_steps: int) -> Scheduler:
    """`num_running` sequences past their prompts, in a pool whose other blocks are all cached and idle."""
    limits = Limits(
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=NUM_PROMPT + num_steps + 64,
        max_num_seqs=num_running,
        max_batch_tokens=8_192,
    )
    scheduler = Scheduler(limits)
    r = random.Random(0)
    filler = [scheduler.pool.allocate() for _ in range(num_blocks)]
    for i, block in enumerate(filler):
        scheduler.pool.cache(block, f"filler {i}", [i] * BLOCK_SIZE)
    scheduler.pool.release(filler)
    for i in range(num_running):
        prompt = [r.randrange(32_000) for _ in range(NUM_PROMPT + i % BLOCK_SIZE)]
        scheduler.add(Sequence(i, prompt, num_steps + 32))
    while any(sequence.num_output < 2 for sequence in scheduler.sequences.values()):
        step(scheduler)
    assert len(scheduler.running) == num_running and not scheduler.num_preemptions
    return scheduler


def step(scheduler: Scheduler) -> tuple[int, int]:
    """One step; nanoseconds of plan and of commit."""
    start = time.perf_counter_ns()
    plan = scheduler.plan()
    planned = time.perf_counter_ns()
    assert plan is not None
    sampled = [[7] if entry.num_logits else [] for entry in plan.entries]
    began = time.perf_counter_ns()
    scheduler.commit(plan, sampled)
    return planned - start, time.perf_counter_ns() - began


def cost(num_blocks: int, num_running: int, num_steps: int) -> tuple[float, float]:
    """Median microseconds of plan and of commit per step of decoding."""
    scheduler = full_scheduler(num_blocks, num_running, num_steps)
    gc.collect()
    gc.disable()
    try:
        times = [step(scheduler) for _ in range(num_steps)]
    finally:
        gc.enable()
    return statistics.median(t[0] for t in times) / 1_000, statistics.median(t[1] for t in times) / 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160, help="steps to take the median of")
    parser.add_argument("--repeat", type=int, default=3, help="take the best of so many medians")
    arguments = parser.parse_args()

    def row(num_blocks: int, num_running: int) -> float:
        plan, commit = min((cost(num_blocks, num_running, arguments.steps) for _ in range(arguments.repeat)), key=sum)
        total = plan + commit
        print(
            f"{num_blocks:>8,} {num_running:>8} {plan:>9.1f} {commit:>9.1f} {total:>9.1f} {total / num_running:>9.2f}"
        )
        return total

    print(f"{'blocks':>8} {'running':>8} {'plan us':>9} {'commit us':>9} {'step us':>9} {'per seq':>9}")
    by_pool = [row(num_blocks, 64) for num_blocks in (1_000, 3_000, 10_000, 30_000, 100_000)]
    print(f"slowest pool size / fastest: {max(by_pool) / min(by_pool):.2f}\n")
    sizes = [8, 16, 32, 64, 128, 256]
    line = statistics.linear_regression(sizes, [row(10_000, n) for n in sizes])
    print(f"step = {line.intercept:.0f} us + {line.slope:.2f} us per running sequence")


if __name__ == "__main__":
    main()
