"""What to do when a step raises: find out whose fault it is, and run the rest.

Owns the order in which parts of a plan are tried again, and the clean-up of what errors hold. Knows no scheduler and no
requests. Invariant: every entry that is still wanted is either part of exactly one result or blamed.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

from embedllm.plan_types import Entry, Plan

log = logging.getLogger("embedllm")
if not log.handlers:  # a record that nobody asked for lands nowhere, and not below the cell that happens to run
    log.addHandler(logging.NullHandler())
R = TypeVar("R")


class StepStopped(BaseException):
    """The step was left between two layers because the engine is being closed."""


class StepAbandoned(Exception):
    """The step was left between two layers because nobody wants any of it any more."""


def contain(
    plan: Plan,
    run: Callable[[Plan], R],
    wanted: Callable[[Entry], bool],
    blame: Callable[[Entry, BaseException], None],
) -> Iterator[tuple[Plan, R]]:
    """Run a plan and yield it with its result: as a whole, unless something raises.

    A plan that fails is run once more as it is, then by halves; an entry that fails alone is blamed. Entries that are
    not `wanted` any more are left out. KV written by an attempt that failed lies past what is computed and is written
    again. Raises StepStopped and what `blame` raises.
    """
    parts = [(plan, True)]
    while parts:
        part, again = parts.pop()
        entries = [entry for entry in part.entries if wanted(entry)]
        if not entries:
            continue
        if len(entries) < len(part.entries):
            part = part.subset(entries)
        result, error = _try(run, part)
        if error is None:
            yield part, result  # type: ignore[misc]  # without an error there is a result
        elif isinstance(error, StepAbandoned):
            parts.append((part, again))
        elif again:
            log.warning("step %d failed and is run again: %r", plan.number, error, exc_info=error)
            parts.append((part, False))
        elif len(entries) > 1:
            middle = len(entries) // 2
            parts += [(part.subset(half), False) for half in (entries[middle:], entries[:middle])]
        else:
            blame(entries[0], error)


def _try(run: Callable[[Plan], R], part: Plan) -> tuple[R | None, BaseException | None]:
    """The result or the error, which holds nothing of the attempt: memory it took is free before the next one."""
    try:
        return run(part), None
    except StepStopped:
        raise
    except BaseException as error:  # SystemExit in a tokenizer or a hook is that step's, not the engine's
        return None, let_go(error)


def let_go(error: BaseException) -> BaseException:
    """Turn tracebacks into text: a note of the error (Python 3.11 and later).

    A frame, and through it those that called it, would hold all their variables: weights, activations, prompts.
    """
    for link in links_of(error):
        if link.__traceback__ is not None:
            told = "".join(traceback.format_tb(link.__traceback__)).rstrip()
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None
            if sys.version_info >= (3, 11):
                link.add_note(f"Traceback:\n{told}")
    return error


def links_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error with its causes and contexts, each once."""
    links, seen = [error], set[int]()
    while links:
        link = links.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            links += [link.__cause__, link.__context__]
            yield link
