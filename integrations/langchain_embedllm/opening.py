"""Which model an adapter speaks to, and the LLM that it opens for it at the first use.

Owns the fields that all adapters share and the handles they open. Knows no messages and no LangChain verbs. Invariant:
making an adapter loads nothing, and what it opened is given back by `close()` or with the adapter.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from langchain_core.utils import from_env
from pydantic import BaseModel, Field, PrivateAttr

import embedllm

if TYPE_CHECKING:
    from embedllm import LLM

BOX = "the model in the box"
_OF_ONE_MODEL = ("revision", "tokenizer")  # of engine_kwargs: they do not go to another model that a call names
_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "timeout")


class Handles:
    """The LLMs of one adapter, by model and options. Any thread may ask; each is opened once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: list[tuple[Any, dict[str, Any], LLM]] = []

    def find(self, model: Any, options: dict[str, Any]) -> LLM | None:
        """The open one, or None; takes no lock."""
        for known, its_options, llm in self._opened:
            if (known is model or (isinstance(known, str) and known == model)) and its_options == options:
                return llm
        return None

    def open(self, model: Any, options: dict[str, Any]) -> LLM:
        """The open one, or a new one, which loads the model unless this process has it open already."""
        with self._lock:
            found = self.find(model, options)
            if found is None:
                found = embedllm.LLM(model, **options)
                self._opened.append((model, dict(options), found))
            return found

    def __reduce__(self) -> tuple[type[Handles], tuple[()]]:
        return Handles, ()  # a copy of the adapter, or one from a pickle, opens its own

    def close(self) -> None:
        """Give them all back."""
        with self._lock:
            opened, self._opened = self._opened, []
        for _, _, llm in opened:
            llm.close()


class Opening(BaseModel):
    """The fields that say which model and how it samples.

    model: None for the model in the box, a folder, a Hugging Face Hub id, or an object from `embedllm.testing`; taken
        from the environment's EMBEDLLM_MODEL where it is not given.
    llm: an open `embedllm.LLM` to use instead of model; `close()` leaves it open.
    engine_kwargs: options of `embedllm.LLM`, such as {"device": "cuda"}.
    """

    model: Any = Field(default_factory=from_env("EMBEDLLM_MODEL", default=None))
    llm: Any = Field(default=None, exclude=True)
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)

    _handles: Handles = PrivateAttr(default_factory=Handles)

    def _found(self, model: Any = None) -> LLM | None:
        """The LLM for this model, the adapter's own by default, if it is open."""
        if self.llm is not None and model in (None, self.llm.info.model):
            return self.llm  # type: ignore[no-any-return]
        return self._handles.find(*self._wanted(model))

    def _open(self, model: Any = None) -> LLM:
        """The same, opened now if it is not yet. Raises what `embedllm.LLM` raises."""
        return self._found(model) or self._handles.open(*self._wanted(model))

    def _wanted(self, model: Any) -> tuple[Any, dict[str, Any]]:
        if model is None or model == self.model:
            return self.model, self.engine_kwargs
        return model, {name: value for name, value in self.engine_kwargs.items() if name not in _OF_ONE_MODEL}

    def _name(self, model: Any = None) -> str:
        """What the model is called in metadata and traces; the same before and after it is loaded."""
        if model is None and self.llm is not None:
            return str(self.llm.info.model)
        model = self.model if model is None else model
        if isinstance(model, (str, os.PathLike)):
            return os.fspath(model)
        return BOX if model is None else str(getattr(model, "name", type(model).__name__))

    def close(self) -> None:
        """Give back what was opened here; the last user of a model ends its engine. The next use opens it again."""
        self._handles.close()


class Sampling(Opening):
    """The same for adapters that generate.

    temperature, top_p, top_k, max_tokens, stop, seed: as in `embedllm.SamplingParams`; what is None is left to the
        model's own defaults, and max_tokens to embedllm's; -1 is as many as fit. timeout: seconds from the call until
        the request fails with DeadlineExceeded. max_retries: accepted and unused: there is no network in between.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    timeout: float | None = None
    max_retries: int | None = None
    streaming: bool = False

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What tells this model from others in traces and caches."""
        given = {name: getattr(self, name) for name in (*_SAMPLING, "engine_kwargs")}
        return {"model": self._name(), **{name: value for name, value in given.items() if value not in (None, {})}}

    def _sampling(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords for the engine: the fields, replaced by those of the call. None means not given."""
        options = {name: getattr(self, name) for name in _SAMPLING}
        options |= {name: value for name, value in kwargs.items() if value is not None}
        if stop is not None:
            options["stop"] = stop
        options.setdefault("deadline", options.pop("timeout"))
        given = {name: value for name, value in options.items() if value is not None}
        return {**given, "max_tokens": None} if given.get("max_tokens") == -1 else given
