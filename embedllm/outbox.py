"""The channels of the requests an engine has: what it says goes to their readers.

Owns the way out. For the engine's thread, but `refuse`, which any thread may call. Knows no engine. Invariant: a
channel that was put in here is ended, by what the engine says or by `refuse_all`.
"""

from __future__ import annotations

from collections.abc import Callable

from embedllm.channel import Channel, fire
from embedllm.errors import RequestFailed
from embedllm.faults import let_go
from embedllm.outputs import Timing, Usage
from embedllm.request import Ended, StepOutput


def refuse(channel: Channel, error: Exception | None) -> None:
    """End a channel with an error, and wake whoever reads it."""
    channel.end(Ended(channel.request_id, Usage(), Timing(), None, error))
    fire(channel.take_waiters())


class Outbox(dict[int, Channel]):
    """Channels by request id."""

    def deliver(self, output: StepOutput, lose: Callable[[int], None]) -> None:
        """Write everything down, then wake each reader once. `lose` hears of requests that cannot be written down."""
        touched: dict[int, Channel] = {}
        for update in output.updates:
            channel = self.get(update.request_id)
            if channel is not None:
                try:
                    channel.push(update)
                except Exception as error:
                    failed = RequestFailed(f"request {channel.request_id} failed: {error!r}")
                    failed.__cause__ = let_go(error)
                    del self[channel.request_id]
                    channel.end(Ended(channel.request_id, Usage(), Timing(), None, failed))
                    lose(channel.request_id)
                touched[update.request_id] = channel
        for ended in output.ended:
            channel = self.pop(ended.request_id, None)
            if channel is not None:
                channel.end(ended)
                touched[ended.request_id] = channel
        waiters = [waiter for channel in touched.values() for waiter in channel.take_waiters()]
        if waiters:
            fire(waiters)

    def refuse_all(self, error: Exception) -> None:
        """End every channel with this error."""
        for channel in list(self.values()):
            refuse(channel, error)
