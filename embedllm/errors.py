"""Every error embedllm raises on purpose, in one tree.

    EmbedLLMError
    ├── InvalidRequest (ValueError)      refused in the caller's thread; nothing was queued
    │   ├── RequestTooLong               the prompt or max_tokens cannot fit, with the numbers
    │   └── UnknownOption (TypeError)    a name nobody knows, with the nearest one
    ├── RequestFailed                    this request only; `.completion` holds what there was
    │   └── DeadlineExceeded             its deadline passed
    ├── RequestCancelled                 cancelled by its owner; `.completion` holds what there was
    ├── InvalidOutput (ValueError)       `.parsed` of an answer that is cut short or that its type refuses
    ├── QueueFull                        too many requests wait already; try again later
    ├── ModelError                       the model cannot be loaded
    │   ├── ModelNotFound                no such folder or hub id, or offline and not cached
    │   ├── ModelFormatError (ValueError)  a file of the model is broken; names file and field
    │   └── UnsupportedModel             understood, but not runnable here; names what is missing
    ├── OutOfMemory (MemoryError)        weights or KV cache do not fit; says what would
    ├── MissingDependency (ImportError)  an optional package is absent; gives the pip line
    └── EngineError                      the engine itself
        ├── EngineClosed                 used after close()
        ├── EngineForked                 used in a child process made by fork()
        ├── EngineReentered              a callback called a blocking method on its own engine
        └── EngineDead                   a fault the engine could not contain; `__cause__` is the first one

A message names the value, the limit and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedllm.outputs import Completion

__all__ = [
    "DeadlineExceeded",
    "EmbedLLMError",
    "EngineClosed",
    "EngineDead",
    "EngineError",
    "EngineForked",
    "EngineReentered",
    "InvalidOutput",
    "InvalidRequest",
    "MissingDependency",
    "ModelError",
    "ModelFormatError",
    "ModelNotFound",
    "OutOfMemory",
    "QueueFull",
    "RequestCancelled",
    "RequestFailed",
    "RequestTooLong",
    "UnknownOption",
    "UnsupportedModel",
]


class EmbedLLMError(Exception):
    """Base of every error embedllm raises on purpose."""


class InvalidRequest(EmbedLLMError, ValueError):
    """The request cannot be run as asked; raised in the caller before anything is queued."""


class RequestTooLong(InvalidRequest):
    """Prompt plus `max_tokens` exceeds the context or the whole KV cache."""


class UnknownOption(InvalidRequest, TypeError):
    """An option name that does not exist."""

    @classmethod
    def named(cls, name: str, known: Iterable[str], where: str) -> UnknownOption:
        nearest = difflib.get_close_matches(name, list(known), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return cls(f"{where} has no option {name!r}{hint}")


class _Ended(EmbedLLMError):
    """A request that ended without finishing; carries its partial completion.

    `completion` is the partial answer. When a list was generated, `completions` holds one entry per prompt.
    """

    def __init__(self, message: str, completion: Completion | None = None) -> None:
        super().__init__(message)
        self.completion = completion
        self.completions: list[Completion | BaseException] = []


class RequestFailed(_Ended):
    """One request failed (its callback raised, its logits were not finite, ...); no other was touched."""


class DeadlineExceeded(RequestFailed):
    """The request's `deadline` passed before it finished."""


class RequestCancelled(_Ended):
    """The request was cancelled by its owner, by a dropped handle, or by close()."""


class InvalidOutput(_Ended, ValueError):
    """An answer was asked to have a shape and has no value: it was cut short, or its type refuses it (`__cause__`)."""


class QueueFull(EmbedLLMError):
    """The waiting queue is full; nothing was queued."""


class ModelError(EmbedLLMError):
    """The model cannot be loaded."""


class ModelNotFound(ModelError):
    """No such local folder or hub id, or it is not cached and the hub is out of reach."""


class ModelFormatError(ModelError, ValueError):
    """A file of the model is malformed or does not match its config."""


class UnsupportedModel(ModelError):
    """The model is well-formed but needs something embedllm does not have."""


class OutOfMemory(EmbedLLMError, MemoryError):
    """Weights or KV cache do not fit in the memory that may be used."""


class MissingDependency(EmbedLLMError, ImportError):
    """An optional package is needed and not installed."""


class EngineError(EmbedLLMError):
    """The engine cannot take or finish requests."""


class EngineClosed(EngineError):
    """The LLM was closed."""


class EngineForked(EngineError):
    """The engine's thread does not exist in a forked child process."""


class EngineReentered(EngineError):
    """A blocking call from the engine's own thread would wait for itself."""


class EngineDead(EngineError):
    """The engine hit a fault it could not contain; `__cause__` is the first cause."""
