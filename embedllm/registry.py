"""The engines alive in this process, shared by equal handles.

Owns the only process-wide mutable state. A core lives as long as somebody holds it: the registry itself does so weakly,
so that dropping the last LLM ends its engine wherever that happens, without a lock. Invariant: two LLMs opened with
equal options are handles on one core; a core that is closed or dead is never handed out.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from embedllm.process import Haste, ipython_shell

if TYPE_CHECKING:
    from embedllm.core import Core
    from embedllm.worker import Worker

EXIT_SECONDS = 1.0  # all engines together, at the end of the process

if "_lock" not in globals():  # once, also where this module is reloaded
    _lock = threading.Lock()
    _cores: weakref.WeakValueDictionary[Hashable, Core] = weakref.WeakValueDictionary()
    _loading: weakref.WeakValueDictionary[Hashable, threading.Lock] = weakref.WeakValueDictionary()
    _workers: weakref.WeakSet[Worker] = weakref.WeakSet()  # every one whose thread may still run


def acquire(key: Hashable, build: Callable[[], Core], handle: object) -> Core:
    """The live core of this key, built if there is none, with one more handle. Raises what `build` raises."""
    with _lock:
        loading = _loading.setdefault(key, threading.Lock())
    try:
        with loading:  # who else wants this key waits here, and then finds what was built or tries it too
            with _lock:
                core = _cores.get(key)
                if core is not None and core.worker.alive:
                    core.handles[handle] = running_cell()
                    return core
            return _build(key, build, handle)
    finally:
        del loading  # the traceback of a failed load may be kept, and this frame with it


def _build(key: Hashable, build: Callable[[], Core], handle: object) -> Core:
    _end_leftovers(running_cell())
    for worker in _running():
        if not worker.alive:
            worker.join()  # its memory comes back before more is taken
    try:
        core = build()
    except BaseException as error:
        _let_go_of_frames(error)
        raise
    with _lock:
        core.handles[handle] = running_cell()
        _cores[key] = core
        _workers.add(core.worker)
    return core


def running_cell() -> tuple[str, int] | None:
    """The notebook cell that runs now and the number of its run; None where there is none, or it has no id."""
    shell = ipython_shell()
    try:
        return str(shell.get_parent()["metadata"]["cellId"]), int(shell.execution_count)
    except (AttributeError, KeyError, TypeError):
        return None


def _end_leftovers(cell: tuple[str, int] | None) -> None:
    """A cell that is changed and run again gets its memory back first: its earlier runs' idle engines end here."""
    if cell is None:
        return
    with _lock:
        cores = list(_cores.values())
        for core in cores:
            made = list(core.handles.values())
            if made and core.worker.is_idle and all(one is not None and _is_earlier(one, cell) for one in made):
                core.worker.stop()


def _is_earlier(one: tuple[str, int], cell: tuple[str, int]) -> bool:
    return one[0] == cell[0] and one[1] < cell[1]


def _let_go_of_frames(error: BaseException) -> None:
    """A kept traceback (IPython keeps the last one) must not keep what was loaded before the error."""
    from embedllm.faults import let_go

    let_go(error)


def release(core: Core, handle: object) -> None:
    """Give one handle back; the last one ends the core and waits until its memory is back, 2 seconds at most."""
    with _lock:
        core.handles.pop(handle, None)
        last = not core.handles
        if last:
            core.worker.stop()
    if last:
        core.worker.join()


def handles() -> list[Any]:
    """Every open LLM of this process, in no order."""
    with _lock:
        return [handle for core in list(_cores.values()) for handle in list(core.handles)]


def end_foreground(since: float) -> None:
    """End what stream() and generate() began since then (monotonic seconds), in every engine."""
    for worker in _running():
        worker.cancel_all(lambda channel: channel.ends_with_cell and channel.began >= since)


def _running() -> list[Worker]:
    with _lock:
        return list(_workers)


def _end_all() -> None:
    """At exit: no daemon thread may be inside native code while the interpreter goes."""
    deadline = time.monotonic() + EXIT_SECONDS
    workers = _running()
    for worker in workers:
        worker.stop()
    for worker in workers:
        with contextlib.suppress(Exception):
            worker.join(max(0.0, deadline - time.monotonic()))


def _forget_all() -> None:
    """In a forked child: it has no engine threads, and whoever held the lock is not here."""
    if _lock.locked():
        _lock.release()
    _cores.clear()
    _loading.clear()
    _workers.clear()
    Haste.forget()


if "_registered" not in globals():
    _registered = True
    atexit.register(_end_all)
    os.register_at_fork(after_in_child=_forget_all)
