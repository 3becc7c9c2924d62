"""The `embedllm demo` program: many prompts at once, the KV blocks while they run, and what it all took.

Owns what a person sees. Uses only the public names of embedllm: an LLM, its streams, its monitor and its trace.
Invariant: the figures of the closing table are counted by the engine; only the wall time is this file's.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, TextIO

import embedllm
from embedllm.bench.waste import replay
from embedllm.cli import harmless
from embedllm.demo.prompts import Ask, asks

if TYPE_CHECKING:
    from embedllm import LLM, Completion, Delta, Generation

NUM_BLOCKS, BLOCK_SIZE, MAX_SEQS = 156, 8, 8  # few enough to see every block, and some requests have to wait
FRAMES_PER_SECOND = 15
MIN_WIDTH, MAX_WIDTH, MIN_HEIGHT = 60, 100, 22
MAX_SHOWN = 6  # lines of each answer in the list at the end

HIDE_CURSOR, SHOW_CURSOR, CLEAR_BELOW, CLEAR_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[J", "\x1b[K"
PLAIN, DIM, BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"


def run(model: str | None = None, live: bool | None = None, file: TextIO | None = None) -> int:
    """Run the demo; returns the exit code.

    live: draw over the screen while it runs; None: where there is a terminal large enough.
    """
    out = sys.stdout if file is None else file
    size = shutil.get_terminal_size()
    if live is None:
        live = out.isatty() and size.columns > MIN_WIDTH and size.lines >= MIN_HEIGHT and os.getenv("TERM") != "dumb"
    paper = Paper(out, min(size.columns - 1, MAX_WIDTH), out.isatty() and "NO_COLOR" not in os.environ)
    title = paper.paint(f"embedllm {embedllm.__version__}", BOLD)
    if live:
        paper.redraw([f"{title}  {paper.paint('loading', DIM)}"])
    began = time.monotonic()
    with embedllm.LLM(
        model, num_kv_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_SEQS, progress=False
    ) as llm:
        ready = time.monotonic() - began
        what = f"{llm.info.model} · {llm.info.dtype} on {llm.info.device} · ready in {ready:.1f} s"
        if live:
            paper.redraw([])
        paper.write(f"{title}  {paper.paint(what, DIM)}\n")
        show(llm, paper, live)
    return 0


def show(llm: LLM, paper: Paper, live: bool) -> None:
    """Ask everything at once, show it, and close with the figures."""
    with llm.trace() as trace:
        began = time.monotonic()
        board = Board([(ask, submit(llm, ask)) for ask in asks()])
        asyncio.run(_read_all(llm, board, paper, live))
        seconds = time.monotonic() - began
    stats = llm.stats()
    held = [step for step in replay(trace, trace.block_size) if step.used]
    if live:
        for _, generation in board.requests:
            _print_answer(board, generation, paper)
    first = stats.time_to_first_token
    rows = [
        (
            "requests",
            f"{len(board.requests)} with {len(board.lines)} samples, up to {max(s.running for s in held)} at once",
        ),
        ("output", f"{stats.generation_tokens:,} tokens in {seconds:.2f} s"),
        ("speed", f"{stats.generation_tokens / seconds:,.0f} tokens/s"),
        ("first token", f"p50 {first.p50 * 1e3:,.0f} ms, p99 {first.p99 * 1e3:,.0f} ms"),
        ("KV in use", f"up to {max(s.used for s in held) / stats.num_kv_blocks:.0%} of {stats.num_kv_blocks} blocks"),
        ("KV waste", f"{fmean(s.waste for s in held):.1%} of the slots in use, mean of {len(held)} steps"),
        ("prefix hits", f"{stats.prefix_cache_hits:,} of {stats.prefix_cache_queries:,} prompt tokens"),
        ("preemptions", f"{stats.num_preemptions}"),
    ]
    paper.write(paper.paint("─" * min(paper.width, 62), DIM))
    for name, value in rows:
        paper.write(f"  {paper.paint(name.ljust(13), DIM)} {paper.paint(value, BOLD)}")
    paper.write(paper.paint("\nnext: embedllm chat, embedllm generate TEXT, embedllm bench, or LLM() in Python", DIM))


def submit(llm: LLM, ask: Ask) -> Generation:
    """One request; it ends if nobody reads it any more."""
    return llm.stream(ask.prompt, tools=list(ask.tools) or None, **ask.options)


# ---- what was said so far -------------------------------------------------------------------------------------


@dataclass
class Line:
    """One sample: a line of the live view."""

    ask: Ask
    label: str
    sequence_id: int
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None

    def take(self, delta: Delta) -> None:
        """Add what is new."""
        self.text += delta.text
        self.num_tokens += len(delta.tokens)
        self.finish_reason = delta.finish_reason or self.finish_reason


@dataclass
class Board:
    """Every request and its lines."""

    requests: list[tuple[Ask, Generation]]
    first_id: int = 0  # the engine numbers sequences in order of arrival; another handle may have used some already
    lines: list[Line] = field(default_factory=list)
    _first_line: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for ask, generation in self.requests:
            self._first_line[id(generation)] = len(self.lines)
            count = ask.options.get("n", 1)
            for index in range(count):
                label = ask.name if count == 1 else f"{ask.name} {index + 1}/{count}"
                self.lines.append(Line(ask, label, len(self.lines)))

    def line(self, generation: Generation, index: int) -> Line:
        """The line of one sample."""
        return self.lines[self._first_line[id(generation)] + index]

    def lines_of(self, generation: Generation) -> Iterator[Line]:
        """All samples of a request."""
        ask = next(ask for ask, other in self.requests if other is generation)
        return (self.line(generation, index) for index in range(ask.options.get("n", 1)))


async def _read_all(llm: LLM, board: Board, paper: Paper, live: bool) -> None:
    async def read(generation: Generation) -> None:
        async for delta in generation:
            board.line(generation, delta.index).take(delta)
        if not live:
            _print_answer(board, generation, paper)

    readers = [asyncio.ensure_future(read(generation)) for _, generation in board.requests]
    try:
        if live:
            await _watch(llm, board, paper, readers)
        await asyncio.gather(*readers)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _watch(llm: LLM, board: Board, paper: Paper, readers: list[asyncio.Task[None]]) -> None:
    """Redraw until everybody is done, then take the picture away again."""
    monitor = llm.monitor()
    paper.hide_cursor()
    try:
        while not all(reader.done() for reader in readers):
            picture = await asyncio.to_thread(monitor.look)
            rows = monitor.draw(picture, paper.width, 6, ansi=paper.colour, sequences=False).split("\n")
            running = picture.running
            colours = [monitor.colour_of(board.first_id + line.sequence_id) for line in board.lines]
            rows.append("")
            rows += [
                _row(line, board.first_id + line.sequence_id in running, colour, paper)
                for line, colour in zip(board.lines, colours, strict=True)
            ]
            paper.redraw(rows)
            await asyncio.wait(readers, timeout=1 / FRAMES_PER_SECOND)
    finally:
        paper.redraw([])
        paper.show_cursor()


def _row(line: Line, running: bool, colour: str, paper: Paper) -> str:
    """`■ name  ▄▄▄▄····  31/72  the end of its text`."""
    most = line.ask.options["max_tokens"]
    bar = "━" * round(10 * line.num_tokens / most) if line.finish_reason is None else "━" * 10
    mark = "✓" if line.finish_reason else "■" if running else "○"
    head = f"{mark} {line.label:<12}"
    count = f"{line.num_tokens:>3}/{most}"
    room = paper.width - len(head) - 10 - len(count) - 4
    text = " ".join(harmless(line.text).split())
    tail = text if len(text) <= room else "…" + text[1 - room :]
    dots = paper.paint("╌" * (10 - len(bar)), DIM)
    shown = paper.paint(tail, DIM) if line.finish_reason else tail
    return f"{paper.paint(head, colour)}{paper.paint(bar, colour)}{dots} {paper.paint(count, DIM)}  {shown}"


def _print_answer(board: Board, generation: Generation, paper: Paper) -> None:
    """The prompt, and under it what each sample made of it."""
    completion: Completion = generation.result()
    for line, output in zip(board.lines_of(generation), completion.outputs, strict=True):
        note = f"{len(output.tokens)} tokens, {output.finish_reason}"
        paper.write(f"{paper.paint(line.label, BOLD)}  {paper.paint(note, DIM)}")
        is_chat = isinstance(line.ask.prompt, list)
        prompt = line.ask.shown + "\n" if is_chat else line.ask.shown
        before = prompt.split("\n")
        after = output.text.strip("\n").split("\n") if is_chat else output.text.rstrip().split("\n")
        for text in before[:-1]:
            paper.write("  " + paper.paint(paper.cut(text), DIM))
        paper.write("  " + paper.paint(before[-1], DIM) + paper.cut(after[0], len(before[-1])))
        for text in after[1:MAX_SHOWN]:
            paper.write("  " + paper.cut(text))
        if len(after) > MAX_SHOWN:
            paper.write("  " + paper.paint(f"… {len(after) - MAX_SHOWN} more lines", DIM))
        paper.write("")


# ---- where it is shown ----------------------------------------------------------------------------------------


class Paper:
    """A terminal or a file: colours where they are wanted, and one region that can be drawn over."""

    def __init__(self, file: TextIO, width: int, colour: bool) -> None:
        self.width = max(width, MIN_WIDTH)
        self.colour = colour
        self._file = file
        self._drawn = 0

    def paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{PLAIN}" if self.colour and text else text

    def cut(self, text: str, used: int = 0) -> str:
        """A line of anybody's text that fits behind two spaces and can do no harm."""
        text = harmless(text.replace("\t", "    "))
        room = self.width - 2 - used
        return text if len(text) <= room else text[: room - 1] + "…"

    def write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def redraw(self, rows: list[str]) -> None:
        """Replace the region drawn last."""
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self._file.write(up + "".join(f"{row}{CLEAR_LINE}\n" for row in rows) + CLEAR_BELOW)
        self._file.flush()
        self._drawn = len(rows)

    def hide_cursor(self) -> None:
        self._file.write(HIDE_CURSOR)

    def show_cursor(self) -> None:
        self._file.write(SHOW_CURSOR)
        self._file.flush()
