"""The live view as a widget: messages of the feed go out, questions of the browser come in.

Owns the model that every view of one engine shares. What the browser asks is answered on whatever thread its message
arrives on; the engine is asked between two of its steps and never waits. Invariant: the view works without an answer to
anything it asks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from embedllm import wire
from embedllm.errors import EmbedLLMError
from embedllm.view import module

if TYPE_CHECKING:
    from embedllm.engine import Engine
    from embedllm.view.feed import Feed
    from embedllm.worker import Worker

PATIENCE = 2.0  # seconds an answer may take
STATS_EVERY = 1.0

Decode = Callable[[list[int]], str]


class View(anywidget.AnyWidget):
    """`decode` gives the text of token ids, None where there is no tokenizer."""

    _esm = module()
    keyframe = traitlets.Bytes(b"").tag(sync=True)  # the newest one, for views that come later
    info = traitlets.Dict().tag(sync=True)
    closed = traitlets.Bool(False).tag(sync=True)

    def __init__(self, worker: Worker, feed: Feed, info: Mapping[str, object], decode: Decode | None) -> None:
        super().__init__(info=dict(info))
        self._worker: Worker | None = worker
        self._feed, self._decode = feed, decode
        self._next_stats = 0.0
        self.on_msg(self._hear)
        feed.listen(self._tell)

    def end(self) -> None:
        """Nothing more will come; what was shown can still be looked at."""
        self._worker = self._decode = None
        self.closed = True

    # ---- to the browser, on the feed's thread -----------------------------------------------------------------

    def _tell(self, messages: list[bytes]) -> None:
        if not messages:
            self.end()
            return
        self.send({"t": "b"}, messages)
        for message in messages:
            if wire.is_keyframe(message):
                self.keyframe = message
        if time.monotonic() >= self._next_stats and self._worker is not None:
            self._next_stats = time.monotonic() + STATS_EVERY
            with contextlib.suppress(EmbedLLMError, TimeoutError):
                self.send({"t": "stats", **asdict(self._worker.call(lambda engine: engine.stats(), PATIENCE))})

    # ---- from the browser, on any thread ----------------------------------------------------------------------

    def _hear(self, _: Any, content: Any, buffers: Any) -> None:
        self._feed.acknowledge()
        question = content.get("t") if isinstance(content, dict) else None
        if question == "sync":
            self._feed.ask_for_keyframe()
        elif question == "text":
            self._answer(content, lambda engine: _tokens_of(engine, int(content["block"])), self._text)
        elif question == "cancel":
            self._answer(content, lambda engine: _cancel(engine, int(content["sequence"])))
        elif question == "engine":
            steps = {"pause": 0, "step": 1, "resume": None}[content["do"]]
            self._answer(content, lambda engine: setattr(engine, "steps_left", steps))

    def _answer(
        self,
        asked: dict[str, Any],
        act: Callable[[Engine], Any],
        tell: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None,
    ) -> None:
        answer: dict[str, Any] = {"t": "done", "of": asked}
        try:
            if self._worker is not None:
                found = self._worker.call(act, PATIENCE)
                answer = answer if tell is None else tell(asked, found)
        except (EmbedLLMError, TimeoutError) as error:
            answer["error"] = str(error)
        self.send(answer)

    def _text(self, asked: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
        text = self._decode(tokens) if self._decode is not None else " ".join(map(str, tokens))
        return {"t": "text", "block": asked["block"], "text": text}


def _tokens_of(engine: Engine, block: int) -> list[int]:
    """What a block holds: of a sequence that has it in its table, or what it is findable by."""
    scheduler, size = engine.scheduler, engine.limits.block_size
    for sequence in scheduler.running:
        if block in sequence.blocks:
            first = sequence.blocks.index(block) * size
            return sequence.tokens[first : min(first + size, sequence.num_computed)]
    return [token for token in scheduler.pool.cached_tokens(block) or () if isinstance(token, int)]


def _cancel(engine: Engine, sequence_id: int) -> None:
    request_id = engine.request_of(sequence_id)
    if request_id is not None:
        engine.cancel(request_id)
