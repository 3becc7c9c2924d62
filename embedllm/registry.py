"""The engines alive in this process, shared by equal handles.

Owns the only process-wide mutable state: cores by key, with a count of handles. A handle may be dropped anywhere, even
by the garbage collector inside an engine's thread, so releasing never waits for the lock: it leaves a note, and
whoever holds the lock reads the notes after letting go. Invariant: two LLMs opened with equal options are handles on
one core; the last one released closes it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedllm.core import Core


@dataclass(eq=False)
class _Entry:
    """One key: its core once built, its handles, and how building ended."""

    core: Core | None = None
    num_handles: int = 0
    error: BaseException | None = None
    built: threading.Event = field(default_factory=threading.Event)


_lock = threading.Lock()
_entries: dict[Hashable, _Entry] = {}
_notes: queue.SimpleQueue[tuple[Hashable, Core]] = queue.SimpleQueue()


def acquire(key: Hashable, build: Callable[[], Core]) -> Core:
    """The live core of this key, built if there is none. Each call is paired with one `release`."""
    with _lock:
        entry = _entries.get(key)
        mine = entry is None or (entry.core is not None and not entry.core.worker.alive)
        if entry is None or mine:
            entry = _entries[key] = _Entry()
        entry.num_handles += 1
    _read_notes()
    if mine:
        _build(key, entry, build)
    while not entry.built.wait(0.1):
        pass
    if entry.core is None:
        assert entry.error is not None
        raise entry.error
    return entry.core


def _build(key: Hashable, entry: _Entry, build: Callable[[], Core]) -> None:
    """Load outside the lock; others of the same key wait for it and share its fate."""
    try:
        entry.core = build()
    except BaseException as error:
        entry.error = error
        with _lock:
            if _entries.get(key) is entry:
                del _entries[key]
        _read_notes()
        raise
    finally:
        entry.built.set()


def release(key: Hashable, core: Core) -> None:
    """Give one handle back; the last one closes the core. Never blocks on the lock."""
    _notes.put((key, core))
    _read_notes()


def _read_notes() -> None:
    done: list[Core] = []
    while not _notes.empty() and _lock.acquire(blocking=False):
        try:
            with contextlib.suppress(queue.Empty):
                while True:
                    key, core = _notes.get_nowait()
                    entry = _entries.get(key)
                    if entry is None or entry.core is not core:  # replaced after its engine died
                        done.append(core)
                        continue
                    entry.num_handles -= 1
                    if entry.num_handles == 0:
                        del _entries[key]
                        done.append(core)
        finally:
            _lock.release()
    for core in done:
        core.worker.close()


def cores() -> list[Core]:
    """Every live core."""
    with _lock:
        found = [entry.core for entry in _entries.values() if entry.core is not None]
    _read_notes()
    return found


def _close_all() -> None:
    """At exit: no daemon thread may be inside native code while the interpreter goes."""
    for core in cores():
        with contextlib.suppress(Exception):
            core.worker.close()


def _after_fork() -> None:
    """The child has no engine threads: it starts with an empty registry. A lock held at the fork is let go."""
    if _lock.locked():
        _lock.release()
    _entries.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
