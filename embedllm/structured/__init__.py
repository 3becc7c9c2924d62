"""Shapes that answers must have: lowered to a small language, compiled by a backend, said in masks.

Owns lowering, the backends and what a sequence may say next. Knows no scheduling and no threads. Invariant: what a
grammar accepts matches the shape that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from embedllm.errors import InvalidRequest
from embedllm.structured.backend import Backend, State, Vocabulary
from embedllm.structured.builtin import BuiltinBackend
from embedllm.structured.llguidance_backend import LLGuidanceBackend
from embedllm.structured.xgrammar_backend import XGrammarBackend

# Best first, as measured: llguidance takes least to begin with, and counts characters best.
BACKENDS: dict[str, Callable[[Vocabulary], Backend]] = {
    "llguidance": LLGuidanceBackend,
    "xgrammar": XGrammarBackend,
    "builtin": BuiltinBackend,
}


def available(vocabulary: Vocabulary) -> list[Backend]:
    """The backends that can be used here, best first; the built-in one always can."""
    return [backend(vocabulary) for name, backend in BACKENDS.items() if name == "builtin" or find_spec(name)]


def backend_named(name: str, vocabulary: Vocabulary) -> Backend:
    """The backend of this name, or the best one available for "auto". Raises InvalidRequest for another name."""
    if name == "auto":
        return available(vocabulary)[0]
    if name not in BACKENDS:
        raise InvalidRequest(f"no grammar backend is named {name!r}; there are auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](vocabulary)


def forced(state: State, vocabulary: Vocabulary) -> list[int]:
    """The ids of the text that must come next, as the tokenizer spells it; [] where there is a choice.

    The last one is left out where other text may follow: it may merge with that. EOS is not among them.
    """
    text = state.forced_text()
    ids = vocabulary.encode(text) if text else []
    accepted = 0
    while accepted < len(ids) and state.accept(ids[accepted]):
        accepted += 1
    if accepted and accepted == len(ids) and not _only_end(state, vocabulary):
        ids = ids[:-1]
    state.rollback(accepted)
    return ids[:accepted]


def _only_end(state: State, vocabulary: Vocabulary) -> bool:
    row = np.zeros(vocabulary.num_words, np.int32)
    if state.can_end:
        state.fill(row)
    chosen = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
    return bool(chosen.size) and set(chosen.tolist()) <= set(vocabulary.eos_ids)
