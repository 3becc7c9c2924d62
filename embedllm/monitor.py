"""A live picture of the KV blocks and of who holds them, as text.

Owns the drawing. What it draws is copied on the engine's thread between two steps and drawn on the caller's, so a
picture is always of one moment and costs the engine microseconds. Invariant: looking changes nothing.
"""

from __future__ import annotations

import html
import os
import sys
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from embedllm.errors import EngineError, InvalidRequest
from embedllm.metrics import Stats
from embedllm.models.progress import in_notebook
from embedllm.sequence import Sequence

if TYPE_CHECKING:
    from embedllm.engine import Engine
    from embedllm.worker import Worker

FREE, IDLE, SHARED, PINNED = "·", "░", "▓", "◆"
LEVELS = "▁▂▃▄▅▆▇█"  # a private block by how full it is
LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = (39, 208, 41, 170, 220, 45, 203, 112, 141, 214, 87, 168)  # of the 256-colour palette, far apart
PLAIN, DIM, BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
HIDE_CURSOR, SHOW_CURSOR, CLEAR_BELOW, CLEAR_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[J", "\x1b[K"
MAX_LISTED = 64  # sequences copied of each queue
MIN_WIDTH, MIN_HEIGHT = 40, 6


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence at one moment. `num_computed` counts tokens whose KV is there; `num_cached` of the prompt's came
    from the prefix cache."""

    id: int
    state: str
    num_prompt: int
    num_output: int
    max_tokens: int
    num_computed: int
    num_cached: int
    blocks: array[int]

    @classmethod
    def of(cls, sequence: Sequence) -> SequenceView:
        return cls(
            id=sequence.id,
            state=sequence.state.value,
            num_prompt=sequence.num_prompt,
            num_output=sequence.num_output,
            max_tokens=sequence.max_tokens,
            num_computed=sequence.num_computed,
            num_cached=sequence.num_cached,
            blocks=sequence.blocks[:],
        )


@dataclass(frozen=True, slots=True)
class Picture:
    """The engine between two steps: plain numbers, nothing alive.

    sequences: all that run and the first that wait, in order. idle: cached blocks nobody uses. pinned: blocks held by
    pins. Every other block is free.
    """

    stats: Stats
    block_size: int
    sequences: tuple[SequenceView, ...]
    idle: list[int]
    pinned: frozenset[int]
    taken: float  # monotonic seconds


def _copy(engine: Engine) -> Picture:
    scheduler = engine.scheduler
    return Picture(
        stats=engine.stats(),
        block_size=engine.limits.block_size,
        sequences=tuple(SequenceView.of(s) for s in (*scheduler.running, *scheduler.waiting[:MAX_LISTED])),
        idle=scheduler.pool.idle_blocks,
        pinned=frozenset(engine.pins.references),
        taken=time.monotonic(),
    )


class Monitor:
    """`llm.monitor()`: print it for a picture of now, `show()` it to watch, or let a notebook display it.

    Holds no request and no memory. Safe from any thread.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._last: tuple[float, int] | None = None  # when the speed was last measured, and the tokens then

    def look(self) -> Picture:
        """The numbers of now. Raises EngineClosed or EngineDead."""
        return self._worker.call(_copy)

    def frame(self, width: int = 80, height: int = 24, ansi: bool = False) -> str:
        """The picture of now: at most `width` columns and `height` lines, with colours if `ansi`.

        Raises InvalidRequest for less than 40 columns or 6 lines.
        """
        return self.draw(self.look(), width, height, ansi)

    def draw(
        self, picture: Picture, width: int = 80, height: int = 24, ansi: bool = False, sequences: bool = True
    ) -> str:
        """The same of a picture taken before, with or without a line for each sequence."""
        if width < MIN_WIDTH or height < MIN_HEIGHT:
            raise InvalidRequest(
                f"{width} columns by {height} lines: a picture needs {MIN_WIDTH} by {MIN_HEIGHT} at least"
            )
        head = self._head(picture, width)
        listed = len(picture.sequences) if sequences else 0
        rows = min(-(-picture.stats.num_kv_blocks // width), max((height - 2) // 2, height - 2 - listed))
        rows = max(1, min(rows, height - 3))
        lines = [_paint(head, BOLD, ansi), *pool_lines(picture, width, rows, ansi), legend(picture, width, rows, ansi)]
        if sequences:
            lines += sequence_lines(picture, width, height - len(lines), ansi)
        return "\n".join(lines)

    @staticmethod
    def colour_of(sequence_id: int) -> str:
        """The escape sequence that begins a sequence's colour."""
        return colour_of(sequence_id)

    def _head(self, picture: Picture, width: int) -> str:
        stats = picture.stats
        last, self._last = self._last, (picture.taken, stats.generation_tokens)
        parts = [
            f"running {stats.num_requests_running}",
            f"waiting {stats.num_requests_waiting}",
            f"KV {stats.kv_cache_usage:.0%}",
            f"waste {stats.kv_cache_waste:.1%}",
            f"prefix hits {stats.prefix_cache_hits}/{stats.prefix_cache_queries}",
        ]
        if stats.num_preemptions:
            parts.append(f"preempted {stats.num_preemptions}")
        if last is not None and picture.taken > last[0]:
            parts.append(f"{(stats.generation_tokens - last[1]) / (picture.taken - last[0]):.0f} tok/s")
        while len(" · ".join(parts)) > width:
            parts.pop()
        return " · ".join(parts)

    def show(self, seconds: float | None = None, hz: float = 4.0, file: TextIO | None = None) -> None:
        """Draw again and again for `seconds`, by default until interrupted (Ctrl-C, Stop) or the LLM is closed.

        On a terminal each frame replaces the last, in a notebook too; elsewhere they follow each other.
        """
        if not 0 < hz <= 60:
            raise InvalidRequest(f"hz={hz!r} is out of range: above 0 to 60 frames per second")
        end = None if seconds is None else time.monotonic() + seconds
        screen = _Screen(sys.stdout if file is None else file, self)
        try:
            while True:
                screen.refresh()
                left = 1 / hz if end is None else min(1 / hz, end - time.monotonic())
                if left <= 0:
                    return
                time.sleep(left)
        except (KeyboardInterrupt, EngineError):
            return
        finally:
            screen.close()

    def __str__(self) -> str:
        return self.frame()

    def __repr__(self) -> str:
        return "<Monitor: print it, show() it, or take frame(width, height)>"

    def _repr_html_(self) -> str:
        return f'<pre style="line-height:1.2">{html.escape(self.frame(width=100, height=40))}</pre>'


class _Screen:
    """Where the frames go: over each other on a terminal and in a notebook, else below each other."""

    def __init__(self, file: TextIO, monitor: Monitor) -> None:
        self._file = file
        self._monitor = monitor
        self._notebook = file is sys.stdout and in_notebook()
        self._cell: object = None
        self._terminal = not self._notebook and file.isatty()
        self._num_lines = 0
        if self._terminal:
            file.write(HIDE_CURSOR)

    def refresh(self) -> None:
        if self._notebook:
            from IPython.display import display

            if self._cell is None:
                self._cell = display(self._monitor, display_id=True)  # type: ignore[no-untyped-call]
            else:
                self._cell.update(self._monitor)  # type: ignore[attr-defined]
            return
        if not self._terminal:
            self._file.write(self._monitor.frame() + "\n\n")
            return
        size = os.get_terminal_size(self._file.fileno())
        width, height = max(size.columns - 1, MIN_WIDTH), max(size.lines - 1, MIN_HEIGHT)
        lines = self._monitor.frame(width, height, ansi="NO_COLOR" not in os.environ).split("\n")
        up = f"\x1b[{self._num_lines}F" if self._num_lines else "\r"
        self._file.write(up + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW)
        self._file.flush()
        self._num_lines = len(lines)

    def close(self) -> None:
        if self._terminal:
            self._file.write(SHOW_CURSOR)
            self._file.flush()


# ---- drawing: plain numbers to lines --------------------------------------------------------------------------


def colour_of(sequence_id: int) -> str:
    """The escape sequence of a sequence's colour."""
    return f"\x1b[38;5;{COLOURS[sequence_id % len(COLOURS)]}m"


def letter_of(sequence_id: int) -> str:
    """The letter that stands for a sequence where there is no colour."""
    return LETTERS[sequence_id % len(LETTERS)]


def _paint(text: str, colour: str, ansi: bool) -> str:
    return f"{colour}{text}{PLAIN}" if ansi and text else text


def _per_cell(num_blocks: int, width: int, rows: int) -> int:
    return -(-num_blocks // (width * rows))


def pool_lines(picture: Picture, width: int, rows: int, ansi: bool) -> list[str]:
    """The pool, block 0 first: one character per block, or per group of neighbours where there are too many."""
    num_blocks, size = picture.stats.num_kv_blocks, picture.block_size
    group = _per_cell(num_blocks, width, rows)
    holders: dict[int, list[int]] = {}  # block -> ids of the sequences that hold it
    filled: dict[int, int] = {}  # block -> slots that hold a token
    for view in picture.sequences:
        for i, block in enumerate(view.blocks):
            holders.setdefault(block, []).append(view.id)
            filled[block] = max(filled.get(block, 0), min(size, view.num_computed - i * size))
    for block in picture.pinned:
        filled[block] = size
    used: dict[int, list[int]] = {}
    for block in sorted(filled):
        used.setdefault(block // group, []).append(block)
    idle = {block // group for block in picture.idle}
    cells: list[tuple[str, str]] = []  # (character, colour)
    for cell in range(-(-num_blocks // group)):
        blocks = used.get(cell)
        if blocks is None:
            cells.append((IDLE if cell in idle else FREE, DIM))
            continue
        in_cell = min(group, num_blocks - cell * group)
        share = sum(filled[block] for block in blocks) / (in_cell * size)
        who = Counter(_holder(block, holders, picture.pinned) for block in blocks).most_common(1)[0][0]
        cells.append(_used_cell(who, share, ansi))
    return [_runs(cells[start : start + width], ansi) for start in range(0, len(cells), width)]


def _runs(cells: list[tuple[str, str]], ansi: bool) -> str:
    """One line; neighbours of one colour share its escape sequence."""
    runs = groupby(cells, key=lambda cell: cell[1])
    return "".join(_paint("".join(char for char, _ in run), colour, ansi) for colour, run in runs)


def _holder(block: int, holders: dict[int, list[int]], pinned: frozenset[int]) -> int | str:
    """Who holds a block that is in use: one sequence's id, or the character for several or for a pin."""
    if block in pinned:
        return PINNED
    ids = holders[block]
    return ids[0] if len(ids) == 1 else SHARED


def _used_cell(who: int | str, share: float, ansi: bool) -> tuple[str, str]:
    if isinstance(who, str):
        return who, BOLD
    return LEVELS[max(0, min(7, round(share * 8) - 1))] if ansi else letter_of(who), colour_of(who)


def legend(picture: Picture, width: int, rows: int, ansi: bool) -> str:
    """What the characters of the pool mean, and how many blocks one stands for."""
    group = _per_cell(picture.stats.num_kv_blocks, width, rows)
    private = f"{LEVELS[2]}{LEVELS[7]} in use, by fill" if ansi else "a-z in use"
    what = [f"{FREE} free", f"{IDLE} cached", private, f"{SHARED} shared", f"{PINNED} pinned"]
    what.append(f"each {'a block' if group == 1 else f'{group} blocks'} of {picture.block_size} tokens")
    while len("  ".join(what)) > width:
        what.pop()
    return _paint("  ".join(what), DIM, ansi)


def sequence_lines(picture: Picture, width: int, room: int, ansi: bool) -> list[str]:
    """One line per sequence, as many as there is room for."""
    views = picture.sequences
    unlisted = picture.stats.num_requests_running + picture.stats.num_requests_waiting - len(views)
    shown = views if len(views) + (unlisted > 0) <= room else views[: max(0, room - 1)]
    lines = [_sequence_line(view, width, ansi) for view in shown]
    hidden = len(views) - len(shown) + unlisted
    if hidden > 0 and room > 0:
        lines.append(_paint(f"… and {hidden} more", DIM, ansi))
    return lines


def _sequence_line(view: SequenceView, width: int, ansi: bool) -> str:
    colour = colour_of(view.id)
    name = f"{'■' if ansi else letter_of(view.id)} {view.id:>4}"
    cached = f" ({view.num_cached} cached)" if view.num_cached else ""
    counts = (
        f"{view.num_output:>4}/{view.max_tokens} tokens  prompt {view.num_prompt}{cached}  {len(view.blocks)} blocks"
    )
    if view.state != "running":
        return _paint(f"{name}  {view.state} {counts}"[:width], DIM, ansi)
    bar_width = max(4, min(24, width - len(name) - len(counts) - 4))
    bar = progress_bar(view, bar_width)
    counts = counts[: max(0, width - len(name) - bar_width - 4)]
    return f"{_paint(name, colour, ansi)}  {_paint(bar, colour, ansi)}  {counts}"


def progress_bar(view: SequenceView, width: int) -> str:
    """Computed tokens of all it may become: its prompt as ▒, its output as █."""
    total = view.num_prompt + view.max_tokens
    prompt = round(width * min(view.num_computed, view.num_prompt) / total)
    output = round(width * max(0, view.num_computed - view.num_prompt) / total)
    return ("▒" * prompt + "█" * output).ljust(width, "·")[:width]
