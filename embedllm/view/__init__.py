"""The live view of the KV cache: how what happens in the engine comes to be a picture in a browser.

Owns the module that the browser runs, which is written by hand in parts and joined here: it imports nothing and is
handed on as text, never as a path.
"""

from __future__ import annotations

import functools
from importlib import resources

PARTS = (
    "state",
    "player",
    "theme",
    "pool",
    "tables",
    "timeline",
    "panels",
    "view",
)  # in the order they need each other


@functools.cache
def module() -> str:
    """The text of the ES module."""
    folder = resources.files(__name__)
    return "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in PARTS)
