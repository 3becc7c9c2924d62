"""JupyterLab on this machine's loopback, as a user has it: a server in a scratch home, a notebook open in a browser.

Nothing here reaches the network: the server looks for no news and no updates, and the browser resolves no name.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVER = [
    "--no-browser",
    "--allow-root",
    "--ip=127.0.0.1",
    "--ServerApp.port_retries=0",
    "--IdentityProvider.token=",
    "--ServerApp.password=",
    "--ServerApp.disable_check_xsrf=True",
    "--LabApp.expose_app_in_browser=True",
    "--LabApp.extension_manager=readonly",
    "--LabApp.news_url=None",
]
OWN = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:")
IDLE = "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"


class Lab:
    """A JupyterLab server whose notebooks lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        home = folder / ".home"
        settings = home / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        quiet = {"fetchNews": "false", "checkForUpdates": False}
        (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
        places = ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        own = {name: str(home / name.lower()) for name in places}
        for path in own.values():
            Path(path).mkdir()
        paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "integrations"))
        self._log = (folder / "lab.log").open("wb")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *SERVER, f"--port={self.port}", f"--ServerApp.root_dir={folder}"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | own | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "PYTHONPATH": paths},
            cwd=folder,
        )
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            if self._server.poll() is not None:
                raise RuntimeError("JupyterLab ended: " + (self.folder / "lab.log").read_text()[-3_000:])
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/api/status", timeout=2):
                return
            time.sleep(0.1)
        raise TimeoutError("JupyterLab did not come up")

    def close(self) -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(self.url + "/api/shutdown", method="POST", data=b""), timeout=5
            )
            self._server.wait(15)
        except (OSError, subprocess.TimeoutExpired):
            self._server.kill()
            self._server.wait()
        self._log.close()


@dataclass
class Notebook:
    """A notebook open in a page. `outside`: requests that were for anybody else; `errors`: what the console said."""

    page: Any
    url: str
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Until its kernel is idle; also after a reload."""
        self.page.goto(self.url)
        self.page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context", timeout=60_000)
        self.page.evaluate(
            "async () => { const panel = jupyterapp.shell.currentWidget; await panel.context.ready; "
            "await panel.sessionContext.ready; }"
        )
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)

    def run_all(self) -> None:
        """Begin to run every cell."""
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")

    def wait_idle(self, seconds: float = 60) -> None:
        self.page.wait_for_function(IDLE, timeout=seconds * 1_000)

    def wait_text(self, text: str, seconds: float = 60) -> None:
        """Until an output says so. Cells print it in two parts, or their source would do."""
        self.page.wait_for_function(
            "(text) => [...document.querySelectorAll('.jp-OutputArea-output')].some((o) => o.innerText.includes(text))",
            arg=text,
            timeout=seconds * 1_000,
        )

    def ask(self, code: str) -> str:
        """What code printed in the kernel, run beside the notebook."""
        return str(
            self.page.evaluate(
                """async (code) => {
                    const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                    const future = kernel.requestExecute({ code, store_history: false });
                    let text = "";
                    future.onIOPub = (message) => {
                        if (message.header.msg_type === "stream") text += message.content.text;
                        if (message.header.msg_type === "error") text += message.content.traceback.join("\\n");
                    };
                    await future.done;
                    return text;
                }""",
                code,
            )
        ).strip()


@contextlib.contextmanager
def opened(browser: Any, lab: Lab, name: str, cells: list[str], **options: Any) -> Iterator[Notebook]:
    """A notebook with these cells, not run yet."""
    sheet = {
        "cells": [
            {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell}
            for i, cell in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (lab.folder / name).write_text(json.dumps(sheet))
    context = browser.new_context(viewport={"width": 1_280, "height": 1_000}, **options)
    page = context.new_page()
    notebook = Notebook(page, f"{lab.url}/lab/tree/{name}?reset")
    page.on("request", lambda request: OWN.match(request.url) or notebook.outside.append(request.url))
    page.on("websocket", lambda socket: OWN.match(socket.url) or notebook.outside.append(socket.url))
    page.on("console", lambda message: message.type == "error" and notebook.errors.append(message.text))
    page.on("pageerror", lambda error: notebook.errors.append(f"page error: {error}"))
    try:
        notebook.open()
        yield notebook
    finally:
        context.close()
