"""What a CUDA card reaches with this engine, beside what it can do at all and beside peers.

Owns the order of the parts of `embedllm bench gpu` and the processes they run in. Invariants: every figure is of one
card in one run; a part that fails, or whose process dies with it, takes no other figure along.

Time on an H100, reckoned from goals that are just met: the roofline 10 s; attention 30 s and the other kernels 45 s,
most of it compiling; the large shape 165 s (writing and loading 16 GB 45, alone 10, idle and spinning 15, decoding
262,144 tokens at 6,700/s 40, two passes over 131,072 prompt tokens at 25,000/s 11, the compared workloads twice 25,
compiling and capturing 15); the small one 45 s; the peers one by one 45 s, in batches 60 s and continuous 80 s, 25 s of
each to load. Together 8 minutes.
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

from embedllm.bench import gpu_attention, gpu_engine, gpu_kernels, gpu_peers
from embedllm.bench.apart import CLOSE_SECONDS
from embedllm.bench.card import Line, Roof, Setup, facts, matrix_size, measure_roof
from embedllm.bench.figures import Figure, Sheet
from embedllm.errors import InvalidRequest

LIMIT_SECONDS = 240.0  # for one figure, loading included
PARTS: dict[str, Callable[[Setup, Roof], Iterator[Line]]] = {
    "attention": gpu_attention.lines,
    "kernels": gpu_kernels.lines,
    "large shape": gpu_engine.large_lines,
    "small shape": gpu_engine.small_lines,
}


def measure(setup: Setup | None = None, say: Callable[[str], None] = lambda text: None) -> Sheet:
    """Everything. say: gets each line as soon as it is measured. Raises InvalidRequest where there is no card."""
    import torch

    setup = setup or Setup()
    if setup.device != "cpu" and not torch.cuda.is_available():
        raise InvalidRequest("embedllm bench gpu needs a CUDA device, and torch sees none")
    sheet = Sheet(facts(setup.device))
    say(f"{sheet.heading()}; models have random weights")

    def add(figure: Figure) -> None:
        sheet.figures.append(figure)
        say(figure.line())

    try:
        roof = measure_roof(setup)
    except Exception as error:  # a card that cannot even copy has nothing else to show
        add(Figure.failed("roofline", error))
        return sheet
    add(Figure("copy bandwidth", roof.bandwidth / 1e9, "GB/s", beside="read and written bytes"))
    add(Figure(f"matrix rate, {setup.dtype}", roof.rate / 1e12, "TFLOP/s", beside=f"{matrix_size(setup)} cubed"))
    with tempfile.TemporaryDirectory(prefix="embedllm-bench-") as scratch:
        setup = replace(setup, scratch=scratch)
        for part in PARTS:
            for figure in _elsewhere(part, setup, roof):
                add(figure)
        ours = {figure.name: figure.value for figure in sheet.figures}
        for name in setup.peers:
            lines = functools.partial(gpu_peers.lines, name, setup, torch.get_num_threads(), LIMIT_SECONDS, ours)
            for figure in figures(name, lines):
                add(figure)
    say(sheet.summary())
    return sheet


def figures(part: str, lines: Callable[[], Iterator[Line]]) -> Iterator[Figure]:
    """A part's figures, each measured when it is asked for. A failing one is a line that says so, and so is a part that
    cannot go on."""
    try:
        for name, one in lines():
            try:
                figure = one()
            except Exception as error:
                figure = Figure.failed(name, error)
            yield figure
    except Exception as error:
        yield Figure.failed(part, error)


def _elsewhere(part: str, setup: Setup, roof: Roof) -> Iterator[Figure]:
    """The same in a process of its own: an illegal access spoils a process's card for good, and its end frees it."""
    context = multiprocessing.get_context("spawn")
    line, other = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(other, part, setup, roof), name=f"bench-{part}", daemon=True)
    process.start()
    other.close()
    try:
        while True:
            if not line.poll(LIMIT_SECONDS):
                raise TimeoutError(f"no figure within {LIMIT_SECONDS:.0f} s")
            figure = line.recv()
            if figure is None:
                break
            yield figure
        process.join(CLOSE_SECONDS)
    except TimeoutError as error:
        yield Figure.failed(part, error)
    except (EOFError, OSError):
        process.join(CLOSE_SECONDS)
        yield Figure.failed(part, RuntimeError(f"its process ended with exit code {process.exitcode}"))
    finally:
        line.close()
        if process.is_alive():
            process.kill()
            process.join()


def _serve(line: Connection, part: str, setup: Setup, roof: Roof) -> None:
    """The child: figures out, then None."""
    for figure in figures(part, functools.partial(PARTS[part], setup, roof)):
        line.send(figure)
    line.send(None)
