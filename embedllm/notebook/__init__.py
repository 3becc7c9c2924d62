"""The magics for IPython: `%load_ext embedllm`.

Owns their registration; nothing is registered before somebody asks for it. Uses only the public names of embedllm.
"""

from __future__ import annotations

from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """Add `%%chat`, `%%generate` and `%embedllm` to an IPython shell."""
    from embedllm.notebook.magics import EmbedLLMMagics

    shell.register_magics(EmbedLLMMagics)


def unload_ipython_extension(shell: Any) -> None:
    """Take them away again."""
    from embedllm.notebook.magics import EmbedLLMMagics

    for kind, names in EmbedLLMMagics.magics.items():
        for name in names:
            if isinstance(getattr(shell.find_magic(name, kind), "__self__", None), EmbedLLMMagics):
                del shell.magics_manager.magics[kind][name]
