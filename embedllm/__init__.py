"""embedllm: an LLM engine inside your process.

    import embedllm
    llm = embedllm.LLM()                      # the small model in the box; or a folder, or a Hub id
    print(llm.generate("def fib(n):").text)

Importing this loads nothing heavy: torch comes with the first LLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from embedllm import errors as errors
    from embedllm import testing as testing
    from embedllm.cache import Pin as Pin
    from embedllm.generation import Generation as Generation
    from embedllm.llm import LLM as LLM
    from embedllm.metrics import Stats as Stats
    from embedllm.outputs import Completion as Completion
    from embedllm.outputs import Delta as Delta
    from embedllm.outputs import Logprob as Logprob
    from embedllm.outputs import Timing as Timing
    from embedllm.outputs import ToolCall as ToolCall
    from embedllm.outputs import Usage as Usage
    from embedllm.params import SamplingParams as SamplingParams
    from embedllm.sizing import plan as plan
    from embedllm.structured_output import StructuredOutput as StructuredOutput
    from embedllm.trace import Trace as Trace
    from embedllm.trace import open_trace as open_trace

_HOME = {
    "Completion": "outputs",
    "Delta": "outputs",
    "Generation": "generation",
    "LLM": "llm",
    "Logprob": "outputs",
    "Pin": "cache",
    "SamplingParams": "params",
    "Stats": "metrics",
    "StructuredOutput": "structured_output",
    "Timing": "outputs",
    "ToolCall": "outputs",
    "Trace": "trace",
    "Usage": "outputs",
    "errors": "",
    "open_trace": "trace",
    "plan": "sizing",
    "testing": "",
}

__all__ = [
    "Completion",
    "Delta",
    "Generation",
    "LLM",
    "Logprob",
    "Pin",
    "SamplingParams",
    "Stats",
    "StructuredOutput",
    "Timing",
    "ToolCall",
    "Trace",
    "Usage",
    "errors",
    "open_trace",
    "plan",
    "testing",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'embedllm' has no attribute {name!r}")
    if not home:
        return importlib.import_module(f"embedllm.{name}")
    value = getattr(importlib.import_module(f"embedllm.{home}"), name)
    globals()[name] = value
    return value


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext embedllm` calls."""
    importlib.import_module("embedllm.notebook").load_ipython_extension(shell)


def unload_ipython_extension(shell: Any) -> None:
    """What `%unload_ext embedllm` calls."""
    importlib.import_module("embedllm.notebook").unload_ipython_extension(shell)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
