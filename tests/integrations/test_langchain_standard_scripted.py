"""LangChain's own test suites, on the real engine with a scripted model: no weights, so every assertion counts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

import embedllm
from langchain_embedllm import ChatEmbedLLM
from tests.integrations import oracle

MODEL = oracle.model()
PARAMS = {"model": MODEL, "engine_kwargs": {"tokenizer": MODEL.tokenizer}}
REASONS = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """Held for the whole module: the adapters of the tests are handles on it."""
    with embedllm.LLM(MODEL, tokenizer=MODEL.tokenizer):
        yield


class TestUnit(ChatModelUnitTests):
    chat_model_class = ChatEmbedLLM
    chat_model_params = PARAMS

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"EMBEDLLM_MODEL": "some/model"}, {}, {"model": "some/model"}


class TestIntegration(ChatModelIntegrationTests):
    chat_model_class = ChatEmbedLLM
    chat_model_params = PARAMS
    supports_json_mode = True
    supports_anthropic_inputs = True
    model_override_value = str(Path(embedllm.__file__).parent / "demo" / "model")

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {verb: ["cache_read_input", "reasoning_output"] for verb in ("invoke", "stream")}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatEmbedLLM(**PARAMS)
        model.invoke("This is said twice, so the second time it is cached.")
        return one(model, "This is said twice, so the second time it is cached.", stream)

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        return one(ChatEmbedLLM(**PARAMS, **REASONS), "Think first.", stream)


def one(model: ChatEmbedLLM, question: str, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke(question)
    first, *rest = model.stream(question)
    for chunk in rest:
        first += chunk
    return first
