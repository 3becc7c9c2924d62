"""embedllm in LangChain: a chat model, a completion model and embeddings on the engine in this process.

Owns the three classes and nothing of the engine: it uses the public names of embedllm only. Nothing loads when one of
them is made; the first use opens the model, and equal models share one engine. Invariant: every prompt is a request of
its own in the engine, so whatever LangChain runs at the same time is batched there.

    from langchain_embedllm import ChatEmbedLLM
    ChatEmbedLLM().invoke("Hello!").content    # the small model in the box; or a folder, or a Hub id
"""

from langchain_embedllm.chat import ChatEmbedLLM
from langchain_embedllm.completion import EmbedLLM
from langchain_embedllm.embeddings import EmbedLLMEmbeddings

__all__ = ["ChatEmbedLLM", "EmbedLLM", "EmbedLLMEmbeddings"]
