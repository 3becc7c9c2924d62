"""`EmbedLLMEmbeddings`: vectors of texts, from the same models in the same process.

Owns LangChain's two verbs and their async forms. Knows nothing of pooling beyond its name. Invariant: a vector is a
list of floats as long as the model's hidden size, in the order of the texts.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from langchain_core.embeddings import Embeddings

from langchain_embedllm.opening import Opening


class EmbedLLMEmbeddings(Opening, Embeddings):
    """Embeddings on the engine in this process.

    model, llm, engine_kwargs: which model, as in ChatEmbedLLM; nothing is loaded before the first use. pooling: "mean"
    over the tokens, or "last" for models trained that way. normalize: vectors of length 1. Errors are embedllm's own.

        EmbedLLMEmbeddings().embed_query("How do I open a file?")    # a list of floats
    """

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text, in order."""
        if not texts:
            return []
        vectors = self._open().embed(texts, pooling=self.pooling, normalize=self.normalize)
        return [[float(value) for value in vector] for vector in vectors]

    def embed_query(self, text: str) -> list[float]:
        """The vector of one text, the same as among documents."""
        return self.embed_documents([text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """The same, in a thread: the event loop goes on."""
        return await asyncio.to_thread(self.embed_documents, texts)

    async def aembed_query(self, text: str) -> list[float]:
        """The same, in a thread."""
        return await asyncio.to_thread(self.embed_query, text)
