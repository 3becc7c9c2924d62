"""Many prompts at once: every one of them in the engine before the first answer is waited for.

Owns `batch`, `batch_as_completed` and `generate`, which LangChain runs in a few threads or one by one. The requests are
submitted first, from the calling thread; then LangChain's own way of running one prompt collects each, so that
callbacks, metadata and output versions are its own. The async verbs need none of it: their coroutines run together.
Knows no messages. Invariant: what was submitted is collected once or cancelled.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from langchain_core.callbacks import Callbacks
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import PrivateAttr

from embedllm.errors import QueueFull

if TYPE_CHECKING:
    from embedllm import Generation

POLL = 0.05  # seconds that the oldest of several is waited for before the others are looked at
MAX_THREADS = 64  # of a batch that LangChain's own threads run


class Batching(BaseChatModel):
    """A chat model whose requests can be submitted ahead of the calls that collect them."""

    # In a copy that collects: what was submitted for its next calls, in their order.
    _ahead: deque[Generation | Exception] = PrivateAttr(default_factory=deque)

    @abstractmethod
    def _submit(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Generation:
        """Queue a conversation that is collected later: a background request."""

    @abstractmethod
    def _watch(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Generation:
        """Queue a conversation that is waited for now: a foreground request."""

    def _begun(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Generation:
        """The request that was submitted ahead for this call, or a new one."""
        if not self._ahead:
            return self._watch(messages, stop, kwargs)
        begun = self._ahead.popleft()
        if isinstance(begun, Exception):
            raise begun
        return begun

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """One answer per input, in order; all of them run at once, max_concurrency of the first config at most.

        If one fails, the others are cancelled and its error is raised; with return_exceptions it takes its place.
        """
        found = dict(self.batch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs))
        return [found[index] for index in range(len(inputs))]

    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """(index of the input, answer) as they come; leaving the loop cancels what is left."""
        if not inputs:
            return
        configs = get_config_list(config, len(inputs))
        limit = configs[0].get("max_concurrency") or len(inputs)
        if self._waits_for_each:
            configs[0]["max_concurrency"] = min(limit, MAX_THREADS)
            yield from super().batch_as_completed(inputs, configs, return_exceptions=return_exceptions, **kwargs)  # type: ignore[call-overload]
            return
        waiting = deque(range(len(inputs)))
        begun: dict[int, Generation | Exception] = {}
        try:
            while waiting or begun:
                while waiting and len(begun) < limit:
                    one = self._try_to_submit(inputs[waiting[0]], kwargs)
                    if isinstance(one, QueueFull) and begun:
                        break  # it goes on when some of them have ended
                    begun[waiting.popleft()] = one
                    if isinstance(one, Exception) and not return_exceptions:
                        break
                index = _ended(begun)
                copy = self._collecting([begun[index]])
                try:
                    answer: AIMessage | Exception = copy.invoke(inputs[index], configs[index], **kwargs)
                except Exception as error:
                    if not return_exceptions:
                        raise
                    answer = error
                begun.pop(index)
                yield index, answer
        finally:
            _cancel(begun.values())

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        run_name: str | None = None,
        run_id: UUID | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """The answers to several conversations, all of which run at once. The first error cancels the others."""
        begun: list[Generation | Exception] = []
        try:
            if len(messages) > 1 and not self._ahead and not self._waits_for_each:
                for one in messages:
                    begun.append(self._try_to_submit(one, {**kwargs, "stop": stop}))
                    if isinstance(begun[-1], Exception):
                        break  # it is raised in its turn; the queue, if that is what was full, has room then
                if begun and isinstance(begun[-1], QueueFull):
                    begun.pop()
            about = {"tags": tags, "metadata": metadata, "run_name": run_name, "run_id": run_id}
            copy = self._collecting(begun) if begun else self
            return super(Batching, copy).generate(messages, stop, callbacks, **about, **kwargs)  # type: ignore[arg-type]
        finally:
            _cancel(begun)

    @property
    def _waits_for_each(self) -> bool:
        """Whether LangChain decides in the middle of a call if there is to be a request, and when."""
        has_cache = bool(self.cache) or (self.cache is None and get_llm_cache() is not None)
        return has_cache or self.rate_limiter is not None

    def _try_to_submit(self, given: LanguageModelInput, kwargs: dict[str, Any]) -> Generation | Exception:
        options = dict(kwargs)
        stop = options.pop("stop", None)
        try:
            return self._submit(self._convert_input(given).to_messages(), stop, options)
        except Exception as error:
            return error

    def _collecting(self, begun: Iterable[Generation | Exception]) -> Batching:
        """A copy whose next calls are answered by these."""
        copy = self.model_copy()
        copy._ahead = deque(begun)
        return copy


def _ended(begun: dict[int, Generation | Exception]) -> int:
    """The index of one that has ended, once one has."""
    while True:
        for index, one in begun.items():
            if isinstance(one, Exception) or one.done:
                return index
        oldest = next(iter(begun.values()))
        if not isinstance(oldest, Exception):
            oldest.wait(POLL)


def _cancel(begun: Iterable[Generation | Exception]) -> None:
    """A no-op for those that have ended."""
    for one in begun:
        if not isinstance(one, Exception):
            one.cancel()
