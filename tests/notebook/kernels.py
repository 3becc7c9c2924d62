"""A kernel as a front end sees one: cells run in it, Stop interrupts it, and what it shows is collected."""

import os
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.rules.tree import ROOT

PATH = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "integrations"))


@dataclass
class Ran:
    """What a cell gave back. `ended`: the monotonic second at which its reply was here."""

    content: dict[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)
    ended: float = 0.0

    @property
    def error(self) -> str:
        return str(self.content.get("ename", ""))

    @property
    def printed(self) -> str:
        return "".join(m["content"]["text"] for m in self.messages if m["msg_type"] == "stream")

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The contents of its messages of these types."""
        return [m["content"] for m in self.messages if m["msg_type"] in kinds]


class Kernel:
    """A running kernel and its client."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager = manager
        self._client = client

    def start(self, code: str, cell: str = "") -> str:
        """Send a cell, by the id that its replies name. `cell` is the id a front end gives a cell for good."""
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
        message = self._client.session.msg("execute_request", content, metadata={"cellId": cell} if cell else {})
        self._client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def finish(self, number: str, seconds: float = 60.0) -> Ran:
        """Wait for a cell that was sent, and for all it shows."""
        deadline = time.monotonic() + seconds
        reply = None
        while reply is None or reply["parent_header"].get("msg_id") != number:
            reply = self._client.get_shell_msg(timeout=deadline - time.monotonic())
        ran = Ran(reply["content"], ended=time.monotonic())
        while True:
            message = self._client.get_iopub_msg(timeout=deadline - time.monotonic())
            ours = message["parent_header"].get("msg_id") == number
            if ours and message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return ran
            ran.messages.append(message)

    def run(self, code: str, cell: str = "", seconds: float = 60.0) -> Ran:
        """Run a cell that succeeds."""
        ran = self.finish(self.start(code, cell), seconds)
        assert ran.content["status"] == "ok", "\n".join(ran.content["traceback"])
        return ran

    def value(self, expression: str) -> Any:
        """What an expression of plain data is."""
        return eval(self.run(f"print(repr(({expression})))").printed, {"__builtins__": {}})

    def stop(self) -> float:
        """Press Stop; the monotonic second at which."""
        pressed = time.monotonic()
        self._manager.interrupt_kernel()
        return pressed

    def shown(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What comes from the kernel while no cell runs, until nothing has come for so long."""
        while True:
            try:
                yield self._client.get_iopub_msg(timeout=seconds)
            except queue.Empty:
                return


@contextmanager
def kernel() -> Iterator[Kernel]:
    """Start a kernel of this Python, with the source tree on its path."""
    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    old = os.environ.get("PYTHONPATH", "")
    manager.start_kernel(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (PATH, old)))})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
