"""One sequence in its grammar: what may come next, and what must.

Owns the way from a live list of tokens to a state. Knows no sampler. Invariant: what it says depends on the output
tokens alone, so that preemption, a repeated step or another batch change nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedllm.errors import RequestFailed
from embedllm.structured import forced
from embedllm.structured.backend import Grammar, Vocabulary


class Follower:
    """Follows `tokens`, a live list of prompt and output, of which the output has the shape of `grammar`.

    Where the grammar leaves no choice the text is spelled as the tokenizer spells it. These tokens need no step of
    their own: `after` gives them with the one before them. Whoever cannot take them at once is given the same ones,
    each as the only one that may come.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, tokens: list[int], num_prompt: int) -> None:
        self._grammar, self._vocabulary = grammar, vocabulary
        self._tokens, self._num_prompt = tokens, num_prompt
        self._begin()

    def _begin(self) -> None:
        self._state = self._grammar.new_state()
        self._followed: list[int] = []
        self._forced: list[int] | None = None  # what must come next; None: not asked yet

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write what may come next: bit id % 32 of word id // 32. Raises RequestFailed if the output does not fit."""
        self._catch_up()
        must = self._must()
        if must:
            row[:] = 0
            row[must[0] // 32] = np.int64(1 << must[0] % 32).astype(np.int32)
        else:
            self._state.fill(row)

    def after(self, token: int) -> list[int]:
        """What must come after this token, chosen by the mask that `fill` wrote last."""
        self._follow(token)
        return [] if self._state.done else self._must()

    def _must(self) -> list[int]:
        if self._forced is None:
            self._forced = forced(self._state, self._vocabulary)
        return self._forced

    def _catch_up(self) -> None:
        end = self._num_prompt + len(self._followed)
        if self._followed and self._tokens[end - 1 : end] != self._followed[-1:]:  # a step was undone
            self._begin()
            end = self._num_prompt
        for token in self._tokens[end:]:
            self._follow(token)

    def _follow(self, token: int) -> None:
        must = self._must()
        if not self._state.accept(token):
            raise RequestFailed(f"token {token} cannot come where the grammar is: the model's answer lost its shape")
        self._followed.append(token)
        self._forced = must[1:] if len(must) > 1 and must[0] == token else None
