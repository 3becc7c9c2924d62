"""`llm.cache`: ask the prefix cache what it holds, keep something in it, empty it.

Owns the questions; the answers are made on the engine's thread between two steps. Invariant: pinned blocks never take
more than half the pool, and never so much that an admitted request could no longer fit.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from embedllm.engine import Engine
from embedllm.errors import EngineClosed, EngineDead, RequestFailed
from embedllm.params import check_salt
from embedllm.worker import Worker

if TYPE_CHECKING:
    from embedllm.generation import Generation

PREFILLS = 3  # times a pin computes its prompt, if others evict it in between

Encode = Callable[[object], list[int]]


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block of a prompt: which tokens it covers, whether it would hit, and why not.

    `block` is the pool's block id on a hit, `refs` how many requests use it right now.
    """

    start: int
    end: int
    hit: bool
    block: int | None
    refs: int
    reason: str


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the cache would do for a prompt, block by block."""

    num_tokens: int
    cached_tokens: int
    blocks: tuple[BlockReport, ...]

    def __str__(self) -> str:
        lines = [f"{self.cached_tokens} of {self.num_tokens} prompt tokens are cached"]
        for b in self.blocks:
            what = f"block {b.block}, used by {b.refs}" if b.hit else b.reason
            lines.append(f"  {b.start:>6}..{b.end - 1:<6} {'hit ' if b.hit else 'miss'}  {what}")
        return "\n".join(lines)


class Pin:
    """Keeps a prompt's full blocks in the cache until `unpin()`; also a context manager.

    Dropping it, or closing the LLM it came from, undoes it too. After a fault in which the engine had to forget its
    whole cache nothing is pinned any more.
    """

    def __init__(self, worker: Worker, pin_id: int, num_blocks: int, num_tokens: int) -> None:
        self._worker = worker
        self._unpin = partial(_unpin, pin_id)
        self._finalizer = weakref.finalize(self, worker.tell, self._unpin)
        self._finalizer.atexit = False
        self.num_blocks = num_blocks
        self.num_tokens = num_tokens

    def unpin(self) -> None:
        """Let the blocks be evicted again. Idempotent; nothing to do once the engine has ended."""
        if self._finalizer.detach() is not None:
            with contextlib.suppress(EngineClosed, EngineDead):
                self._worker.call(self._unpin)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.unpin()

    def __repr__(self) -> str:
        return f"<Pin: {self.num_tokens} tokens in {self.num_blocks} blocks>"


def _unpin(pin_id: int, engine: Engine) -> None:
    engine.pins.remove(pin_id)


class Cache:
    """The prefix cache of one LLM."""

    def __init__(
        self,
        worker: Worker,
        encode: Encode,
        prefill: Callable[[list[int], str | None], Generation],
        held: weakref.WeakSet[Any],
    ) -> None:
        self._worker = worker
        self._encode = encode
        self._prefill = prefill
        self._held = held  # what ends with the handle

    def explain(self, prompt: object, cache_salt: str | None = None) -> CacheReport:
        """Which blocks of this prompt are cached, which are not, and why. Changes nothing.

        Prompts as in `generate`. Blocks are only shared between requests of the same `cache_salt`.
        """
        tokens = self._encode(prompt)
        check_salt(cache_salt)
        return self._worker.call(lambda engine: _explain(engine, tokens, cache_salt))

    def pin(self, prompt: object, cache_salt: str | None = None) -> Pin:
        """Compute the prompt if needed and keep its full blocks until the pin is undone.

        Raises InvalidRequest if pins would take more than half the pool or leave too little for a request that is
        already admitted, or if there is no full block; RequestFailed if the cache evicts faster than it can be pinned.
        """
        tokens = self._encode(prompt)
        check_salt(cache_salt)
        self._worker.call(lambda engine: engine.pins.check(tokens, cache_salt))
        for _ in range(PREFILLS):
            self._prefill(tokens, cache_salt).result()
            pin_id, num_blocks, size = self._worker.call(
                lambda engine: (*engine.pins.add(tokens, cache_salt), engine.limits.block_size)
            )
            if pin_id:
                pin = Pin(self._worker, pin_id, num_blocks, num_blocks * size)
                self._held.add(pin)
                return pin
        raise RequestFailed(
            f"the prompt's blocks were evicted {PREFILLS} times before they could be pinned: the cache is too busy; "
            "pin earlier, or give it more memory"
        )

    def reset(self) -> int:
        """Forget everything nobody uses or pins; returns how many blocks became free."""
        return self._worker.call(lambda engine: engine.scheduler.pool.reset_cache())


def _explain(engine: Engine, tokens: list[int], salt: str | None) -> CacheReport:
    limits, pool = engine.limits, engine.scheduler.pool
    size = limits.block_size
    found = pool.find(tokens[:-1], salt)[0] if limits.prefix_caching else []
    reports = []
    for start in range(0, len(tokens), size):
        end, index = min(start + size, len(tokens)), start // size
        if index < len(found):
            reports.append(BlockReport(start, end, True, found[index], pool.refs(found[index]), "cached"))
            continue
        if not limits.prefix_caching:
            reason = "prefix caching is off"
        elif end - start < size:
            reason = "only full blocks are shared"
        elif end == len(tokens):
            reason = "the last token is always computed: its logits are needed"
        elif index > len(found):
            reason = "a block before it is missing"
        else:
            reason = "these tokens were not computed yet, or were evicted"
        reports.append(BlockReport(start, end, False, None, 0, reason))
    return CacheReport(len(tokens), len(found) * size, tuple(reports))
