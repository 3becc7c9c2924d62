"""A request shown in a notebook: live while it runs, with its numbers below it.

Owns what is drawn and how often. Knows nothing of how tokens are made. Invariant: what a model says reaches the front
end escaped or through safe_markdown, and drawing takes a tenth of a thread's time at most.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedllm.channel import Channel
from embedllm.outputs import Completion, Timing
from embedllm.process import can_send_from_threads, is_interruptible
from embedllm.safe_markdown import escape, fenced, to_html, to_markdown

if TYPE_CHECKING:
    from embedllm.generation import Generation

INTERVAL = 0.1  # seconds between two drawings, at least
NOT_LIVE = "not live: ipykernel 7.0 loses what other threads send, pip install -U 'ipykernel>=7.1'"
WRAPPED, FAINT = 'style="white-space:pre-wrap"', 'style="opacity:.65;font-size:85%"'

log = logging.getLogger("embedllm")


def show(generation: Generation) -> None:
    """Display a request below the cell that runs, and keep it up to date until it has ended.

    A foreground request is followed here, so the cell goes on as long as it does and Stop ends both. Where Stop would
    not interrupt that, and for a background request, a thread follows it and the cell goes on at once.
    """
    channel = generation._channel
    here = channel.foreground and is_interruptible()
    threaded = not here and channel.ended is None and can_send_from_threads()
    card = Card(channel, "" if here or threaded or channel.ended is not None else NOT_LIVE)
    if here or threaded:
        card.offer_stop(functools.partial(generation._worker.cancel, channel.request_id), interrupts=here)
    if here:
        _follow_here(generation, card)
    elif threaded:
        followed = weakref.ref(generation)  # a request that nobody else holds ends
        threading.Thread(target=_follow, args=(followed, card), name="embedllm-display", daemon=True).start()


def _follow_here(generation: Generation, card: Card) -> None:
    try:
        while not generation.wait(card.pause):
            card.update()
    except BaseException:
        generation.cancel()
        generation.wait(1.0)
        raise
    finally:
        card.end()


def _follow(followed: weakref.ref[Generation], card: Card) -> None:
    try:
        while (generation := followed()) is not None and not generation.wait(card.pause):
            card.update()
            del generation
        card.end()
    except Exception:
        log.warning("a request is not shown any more", exc_info=True)


class Card:
    """One request's place in a notebook's output. `pause`: seconds to wait before the next `update`."""

    def __init__(self, channel: Channel, note: str = "") -> None:
        from IPython.display import display

        self.pause = INTERVAL
        self._channel = channel
        self._version = channel.version
        shown: Any = display(views(channel, note), raw=True, display_id=True)  # type: ignore[no-untyped-call]
        self._handle = shown
        self._stop: Any = None

    def offer_stop(self, cancel: Callable[[], object], interrupts: bool) -> None:
        """A button for as long as it runs, where widgets can be had and the notebook is not made to be kept."""
        if importlib.util.find_spec("anywidget") is not None and not os.environ.get("EMBEDLLM_FREEZE"):
            from embedllm.view.stop import Button

            self._stop = Button(cancel, interrupts)

    def end(self) -> None:
        """Draw it for the last time."""
        self.update()
        if self._stop is not None:
            self._stop.remove()

    def update(self) -> None:
        """Draw it again if there is news."""
        version = self._channel.version
        if version == self._version:
            return
        began = time.thread_time()
        self._handle.update(views(self._channel), raw=True)
        self._version = version
        self.pause = max(INTERVAL, 10 * (time.thread_time() - began))


def views(channel: Channel, note: str = "") -> dict[str, str]:
    """What a request has said so far, as plain text, Markdown and HTML: by type."""
    completion = channel.completion()
    lines, rich, pages = [], [], []
    for output in completion.outputs:
        label = f"sample {output.index} · " if completion.siblings else ""
        footer = label + _footer(channel, output) + (note and f" · {note}")
        lines.append(repr(footer)[1:-1])
        answer = to_markdown(output.text) if channel.is_chat else fenced(output.text)
        rich.append(f"{answer}\n\n{to_markdown(footer)}")
        body = to_html(output.text) if channel.is_chat else f"<pre {WRAPPED}>{escape(output.text)}</pre>"
        pages.append(f"<div>{body}<div {FAINT}>{html.escape(footer)}</div></div>")
    plain = f"<Generation {channel.request_id}: {'; '.join(lines)}>"
    return {"text/plain": plain, "text/markdown": "\n\n".join(rich), "text/html": "\n".join(pages)}


def _footer(channel: Channel, output: Completion) -> str:
    ended = channel.ended
    if ended is not None:
        how = output.finish_reason if ended.error is None else " ".join(str(ended.error).split())
        return output.footer(how)
    if channel.first_token is None:
        return output.footer("waiting")
    ttft = channel.first_token - channel.began
    decode = time.monotonic() - channel.first_token
    running = channel.samples[output.index].finish_reason or "running"
    return replace(output, timing=Timing(ttft=ttft, decode=decode)).footer(running)
