"""A Stop button below an answer that is being written, where the front end can show one.

Owns the button and what a click does. Knows no request: it calls what it was given. Invariant: it leaves nothing behind
in the notebook once it is removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anywidget
import traitlets
from IPython.display import display

# A cell that waits for the request keeps the kernel from hearing of a click, so the front end interrupts it, if it can.
ESM = """
function render({ model, el }) {
  const kernel = () => { try { return model.widget_manager?.kernel; } catch { return null; } };
  if (model.get("interrupts") && !kernel()?.interrupt) return;
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: "Stop", title: "stop this request" });
  button.style.cssText = "font: inherit; padding: 2px 12px; min-height: 26px; cursor: pointer";
  const stop = () => {
    Object.assign(button, { disabled: true, textContent: "stopping" });
    model.send({ t: "stop" });
    if (model.get("interrupts")) kernel().interrupt();
  };
  button.addEventListener("click", stop);
  el.append(button);
  return () => button.removeEventListener("click", stop);
}
export default { render };
"""


class Button(anywidget.AnyWidget):
    """interrupts: the cell that runs waits for the request, so a click interrupts that too."""

    _esm = ESM
    interrupts = traitlets.Bool(False).tag(sync=True)

    def __init__(self, cancel: Callable[[], object], interrupts: bool) -> None:
        super().__init__(interrupts=interrupts)
        self._cancel = cancel
        self.on_msg(self._hear)
        bundle: Any = self._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        shown = {"text/plain": "Stop", **{kind: value for kind, value in data.items() if kind != "text/plain"}}
        self._place: Any = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def _hear(self, *_: object) -> None:
        self._cancel()

    def remove(self) -> None:
        """The request has ended."""
        self._place.update({}, raw=True)
        self.close()
