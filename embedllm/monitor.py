"""What users hold of an engine's KV blocks: a picture of now, as text or drawn, and a live view in a notebook.

Owns where pictures go. What they show is copied on the engine's thread between two steps, so each is of one moment, and
the live view is told of every event after it. Invariant: looking changes nothing, and keeps no engine alive.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from embedllm import wire
from embedllm.errors import EngineError, InvalidRequest
from embedllm.metrics import Stats
from embedllm.models.progress import in_notebook
from embedllm.picture import draw
from embedllm.process import can_send_from_threads
from embedllm.replay import State
from embedllm.text_picture import BOLD, colour_of, legend, paint, pool_lines, sequence_lines
from embedllm.view.feed import Feed
from embedllm.view.page import page

if TYPE_CHECKING:
    from embedllm.engine import Engine
    from embedllm.worker import Worker

HIDE_CURSOR, SHOW_CURSOR, CLEAR_BELOW, CLEAR_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[J", "\x1b[K"
MIN_WIDTH, MIN_HEIGHT = 40, 6


@dataclass(frozen=True, slots=True)
class Picture:
    """The engine between two steps: plain numbers, nothing alive."""

    stats: Stats
    state: State
    taken: float  # monotonic seconds

    @property
    def running(self) -> set[int]:
        """Ids of the sequences that run."""
        return {sequence.id for sequence in self.state.running}


def _copy(engine: Engine) -> Picture:
    return Picture(engine.stats(), State.of(engine), time.monotonic())


class Monitor:
    """`llm.monitor()`: what is in the KV cache and who holds it. One of each engine, whoever asks for it.

    In a notebook it is a live view as soon as it is shown; elsewhere `print` it for a picture of now, or `show()` it to
    watch. It holds no request and no memory. Safe from any thread.
    """

    def __init__(self, worker: Worker, info: Mapping[str, object], decode: Callable[[list[int]], str] | None) -> None:
        self._worker, self._info, self._decode = worker, info, decode
        self._last: tuple[float, int] | None = None  # when the speed was last measured, and the tokens then
        self._feed = Feed(worker)
        self._view: Any = None
        self._shown: list[Any] = []  # IPython's handles on where it is shown

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
        state = picture.state
        listed = len(state.sequences) if sequences else 0
        rows = min(-(-state.num_blocks // width), max((height - 2) // 2, height - 2 - listed))
        rows = max(1, min(rows, height - 3))
        lines = [paint(head, BOLD, ansi), *pool_lines(state, width, rows, ansi), legend(state, width, rows, ansi)]
        if sequences:
            lines += sequence_lines(state, width, height - len(lines), ansi)
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
        hz = min(hz, screen.most_hz)
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

    # ---- the live view ----------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Hold the engine back: requests wait, and can be cancelled. `resume()` or `step()` let it go on."""
        self._let_run(0)

    def step(self, num_steps: int = 1) -> None:
        """Let a paused engine run so many steps."""
        self._let_run(num_steps)

    def resume(self) -> None:
        """Let a paused engine go on."""
        self._let_run(None)

    def _let_run(self, num_steps: int | None) -> None:
        self._worker.call(lambda engine: setattr(engine, "steps_left", num_steps))

    def to_svg(self) -> str:
        """A still picture of now, readable on white and on black. It holds numbers, never a prompt's text."""
        return draw(self.look().state)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write what the live view has seen so far as one file that replays itself, from any disk without a network.

        Where nobody watched it is a picture of now. It holds numbers, never a prompt's text.
        """
        messages = self._feed.history() or [wire.encode_keyframe(self.look().state, 0)]
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(messages, self._info, "embedllm: the KV cache"))

    def freeze(self) -> None:
        """Put a still picture of now wherever the live view is shown, for a notebook that is to be kept."""
        for handle in self._shown:
            handle.update(self._bundle(live=False), raw=True)
        self._shown.clear()

    def _ipython_display_(self) -> None:
        """Shows itself where IPython would show its repr. Raises NotImplementedError outside a notebook."""
        if not in_notebook():
            raise NotImplementedError  # IPython asks for the other views then
        from IPython.display import display

        live = not os.environ.get("EMBEDLLM_FREEZE") and self._make_view()
        handle = display(self._bundle(live), raw=True, display_id=True)  # type: ignore[no-untyped-call]
        if live:
            self._shown.append(handle)

    def _make_view(self) -> bool:
        """Whether there is a widget to show. Raises EngineError where the kernel would lose what it is sent."""
        if self._view is None and importlib.util.find_spec("anywidget") is not None:
            if not can_send_from_threads():
                raise EngineError(
                    "ipykernel 7.0 loses what a background thread sends, so the live view would stay empty: "
                    'pip install -U "ipykernel>=7.1", restart the kernel, or print(llm.monitor())'
                )
            from embedllm.view.widget import View

            self._view = View(self._worker, self._feed, self._info, self._decode)
        return self._view is not None

    def _bundle(self, live: bool) -> dict[str, Any]:
        still = {"text/plain": repr(self), "image/svg+xml": self.to_svg()}
        if not live:
            return still
        found = self._view._repr_mimebundle_()
        widget: dict[str, Any] = found[0] if isinstance(found, tuple) else found
        return still | widget

    def __str__(self) -> str:
        return self.frame()

    def __repr__(self) -> str:
        return "<Monitor: print it, show() it, or take frame(width, height)>"


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

    @property
    def most_hz(self) -> float:
        """A notebook keeps what it is sent, so it is sent less."""
        return 2.0 if self._notebook else 60.0

    def refresh(self) -> None:
        if self._notebook:
            from IPython.display import display

            picture = {"text/plain": repr(self._monitor), "image/svg+xml": self._monitor.to_svg()}
            if self._cell is None:
                self._cell = display(picture, raw=True, display_id=True)  # type: ignore[no-untyped-call]
            else:
                self._cell.update(picture, raw=True)  # type: ignore[attr-defined]
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
