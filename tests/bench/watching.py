"""What the live view costs: its thread and the recording as shares of the process's CPU time, and throughput.

Runs the model in the box. Run it from the root of the tree: `python -m tests.bench.watching`.
"""

import argparse
import statistics
import time
import timeit

import embedllm
from embedllm import events
from embedllm.view.feed import Feed, Ring

PROMPTS = [f"def task_{i}(values):\n    " for i in range(16)]


class Thing:
    """What looks for a recorder, as scheduler and pool do."""

    def __init__(self, recorder: object) -> None:
        self.recorder = recorder

    def say(self, times: int) -> None:
        for i in range(times):
            if self.recorder is not None:
                self.recorder.append((events.COMMIT, i, i, 1))

    def loop(self, times: int) -> None:
        for _ in range(times):
            pass


def seconds_per_call(recorder: object) -> float:
    """One look for a recorder, and the event if there is one."""
    thing, times = Thing(recorder), 20_000
    loop = min(timeit.repeat(lambda: thing.loop(times), number=1, repeat=7))
    return max(0.0, min(timeit.repeat(lambda: thing.say(times), number=1, repeat=7)) - loop) / times


def run(llm: embedllm.LLM, tokens: int) -> float:
    """Tokens per second of one round."""
    began = time.perf_counter()
    llm.generate(PROMPTS, max_tokens=tokens, ignore_eos=True, temperature=0.0)
    return len(PROMPTS) * tokens / (time.perf_counter() - began)


def watched(llm: embedllm.LLM, tokens: int) -> tuple[float, float, float, int]:
    """One round with a view at its fastest: tokens per second, CPU seconds of the thread and of the process, bytes."""
    feed, sizes = Feed(llm._core.worker), []
    feed.listen(lambda messages: (feed.acknowledge(), sizes.extend(map(len, messages))))
    thread = time.pthread_getcpuclockid(feed._thread.ident)
    before, of_process = time.clock_gettime(thread), time.process_time()
    speed = run(llm, tokens)
    spent, of_process = time.clock_gettime(thread) - before, time.process_time() - of_process
    feed.close()
    return speed, spent, of_process, sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=160, help="tokens of each request of a round")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of rounds, watched and not")
    arguments = parser.parse_args()
    with embedllm.LLM(progress=False) as llm:
        run(llm, arguments.tokens)
        steps = llm.stats().num_steps
        with llm.trace() as trace:
            run(llm, arguments.tokens)
        steps = llm.stats().num_steps - steps
        ring, pairs, spent, cpu, size = Ring(), [], 0.0, 0.0, 0
        for i in range(arguments.rounds):
            alone = run(llm, arguments.tokens) if i % 2 == 0 else 0.0
            speed, thread, process, num_bytes = watched(llm, arguments.tokens)
            alone = alone or run(llm, arguments.tokens)
            pairs.append(speed / alone - 1)
            spent, cpu, size = spent + thread, cpu + process, size + num_bytes
        began = time.perf_counter()
        run(llm, arguments.tokens)
        step = (time.perf_counter() - began) / steps
    looks = len(trace)
    tap, look = seconds_per_call(ring), seconds_per_call(None)
    told = looks * arguments.rounds * (tap - look)
    print(f"{looks / steps:.0f} events a step of {step * 1e3:.1f} ms; {size / arguments.rounds / 1e3:.0f} kB a round")
    print(f"watching at 10 Hz: thread {spent / cpu:.2%} + recording {told / cpu:.2%} of the process's CPU time")
    spread = f"{min(pairs):+.1%} to {max(pairs):+.1%}"
    print(f"throughput watched against not, {len(pairs)} pairs: median {statistics.median(pairs):+.1%}, {spread}")
    share = looks / steps * look / step
    print(f"nobody watching: {looks / steps:.0f} looks x {look * 1e9:.0f} ns = {share:.3%} of a step")


if __name__ == "__main__":
    main()
