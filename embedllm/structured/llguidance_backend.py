"""The backend on llguidance, which makes masks when they are asked for.

Owns what llguidance does otherwise: a token that does not fit breaks its matcher, so each is tried first. Invariant:
only states change, and each is one thread's own.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedllm.errors import InvalidRequest, MissingDependency, RequestFailed
from embedllm.structured.backend import Shape, Vocabulary
from embedllm.structured.lark import depth, lark
from embedllm.structured.sources import check_source, check_start, readable
from embedllm.structured.vocabulary import whole_text

# Lexemes of one character, which recursive shapes need, take more items and more fuel than its defaults give.
MAX_DEPTH = 500  # levels of nodes; some thousands overflow its stack
MAX_ITEMS = 2_000_000  # per step
MAX_STEP_FUEL, MAX_INITIAL_FUEL = 4_000_000, 20_000_000


class LLGuidanceBackend:
    """Takes rules, and grammars written in Lark."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: Any = None
        self._preparing = threading.Lock()

    def prepare(self) -> None:
        """Import llguidance and give it the vocabulary, once. Raises MissingDependency."""
        with self._preparing:
            if self._tokenizer is None:
                self._tokenizer = self._made_tokenizer()

    def _made_tokenizer(self) -> Any:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise MissingDependency(f"llguidance is missing: `pip install 'embedllm[structured]'` ({error})") from error
        ends = list(self._vocabulary.eos_ids)
        return LLTokenizer(
            TokenizerWrapper(_Tokens(self._vocabulary)), n_vocab=len(self._vocabulary.tokens), eos_token=ends
        )

    def refuses(self, shape: Shape) -> str | None:
        """GBNF is not its language, and its recursion runs out of stack where others' does not."""
        if shape.dialect == "gbnf":
            return "llguidance does not read GBNF: write Lark (`start: ...`), or `pip install xgrammar`"
        if shape.rules is not None and depth(shape.rules) > MAX_DEPTH:
            return f"llguidance takes no shape of over {MAX_DEPTH} levels: `pip install xgrammar`, or make it flatter"
        return None

    def compile(self, shape: Shape) -> LLGuidanceGrammar:
        """Raises InvalidRequest for a shape that is malformed."""
        self.prepare()
        from llguidance import LLMatcher, LLParserLimits

        if shape.rules is None:
            check_source(shape.source)
        source = LLMatcher.grammar_from_lark(shape.source if shape.rules is None else lark(shape.rules))
        limits = LLParserLimits(
            step_max_items=MAX_ITEMS,
            step_lexer_fuel=MAX_STEP_FUEL,
            initial_lexer_fuel=MAX_INITIAL_FUEL,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequest(f"llguidance cannot compile the grammar: {readable(matcher.get_error())}")
        grammar = LLGuidanceGrammar(matcher, frozenset(self._vocabulary.eos_ids))
        if shape.rules is None:
            check_start(grammar, self._vocabulary.num_words)
        return grammar


class _Tokens:
    """A vocabulary as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.eos_token_id = vocabulary.eos_ids[0]
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class LLGuidanceGrammar:
    """A compiled grammar: a matcher at the beginning, which is only copied."""

    def __init__(self, matcher: Any, eos_ids: frozenset[int]) -> None:
        self._matcher, self._eos_ids = matcher, eos_ids

    def new_state(self) -> LLGuidanceState:
        """A state before the first token."""
        return LLGuidanceState(self._matcher.deep_copy(), self._eos_ids)


class LLGuidanceState:
    """Where one sequence is; for one thread at a time."""

    def __init__(self, matcher: Any, eos_ids: frozenset[int]) -> None:
        self._matcher, self._eos_ids = matcher, eos_ids
        self._done = False

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write which ids may come next into int32 [num_words]. Raises RequestFailed beyond llguidance's limits."""
        if self._done:
            row[:] = 0
            return
        self._matcher.unsafe_compute_mask_ptr(row.__array_interface__["data"][0], row.nbytes)
        if self._matcher.is_error():
            raise RequestFailed(f"llguidance gave up on the grammar: {readable(self._matcher.get_error())}")

    def accept(self, token: int) -> bool:
        """Go on by one token; False, with nothing changed, if it may not come here."""
        if token in self._eos_ids:  # the matcher is not told: where nothing else may come it would refuse
            if self._done or not self._matcher.is_accepting():
                return False
            self._done = True
            return True
        return not self._done and bool(self._matcher.try_consume_tokens([token]))

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens accepted."""
        if num_tokens:
            self._matcher.rollback(num_tokens - self._done)
            self._done = False

    def forced_text(self) -> str:
        """The text that must come next; "" where there is a choice, or at the end."""
        return "" if self._done else whole_text(self._matcher.compute_ff_bytes())

    @property
    def can_end(self) -> bool:
        """Whether EOS may come next."""
        return not self._done and bool(self._matcher.is_accepting())

    @property
    def done(self) -> bool:
        """Whether EOS was accepted."""
        return self._done
