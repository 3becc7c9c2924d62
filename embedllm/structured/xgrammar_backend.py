"""The backend on xgrammar, which compiles masks ahead and looks them up.

Owns what xgrammar does otherwise: it leaves the bits after the last id set, it raises when asked after the end, and it
counts characters only where it is told how. Invariant: only states change, and each is one thread's own.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedllm.errors import InvalidRequest, MissingDependency
from embedllm.structured.backend import Shape, Vocabulary
from embedllm.structured.gbnf import gbnf, num_counted
from embedllm.structured.normal import normal_form
from embedllm.structured.sources import check_source, check_start, readable
from embedllm.structured.vocabulary import whole_text

MAX_MASKED = 20_000_000  # ids in all masks that counts need; about 5 s
_ROOT = "embedllm_root"


class XGrammarBackend:
    """Takes rules, and grammars written in GBNF."""

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._compiler: Any = None
        self._preparing = threading.Lock()

    def prepare(self) -> None:
        """Import xgrammar and give it the vocabulary, once. Raises MissingDependency."""
        with self._preparing:
            if self._compiler is None:
                self._compiler = self._made_compiler()

    def _made_compiler(self) -> Any:
        try:
            from xgrammar import GrammarCompiler, TokenizerInfo
        except ImportError as error:
            raise MissingDependency(f"xgrammar is missing: `pip install 'embedllm[structured]'` ({error})") from error
        tokens, ends = list(self._vocabulary.tokens), list(self._vocabulary.eos_ids)
        info = TokenizerInfo(tokens, stop_token_ids=ends)
        # Its cache gives a rule the masks of an equal rule in another grammar, where other text may follow.
        return GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def refuses(self, shape: Shape) -> str | None:
        """Lark is not its language, and counts take it long: each one more to come is a mask made ahead."""
        if shape.dialect == "lark":
            return "xgrammar does not read Lark: write GBNF (`root ::= ...`), or `pip install llguidance`"
        if shape.rules is not None and num_counted(shape.rules) * len(self._vocabulary.tokens) > MAX_MASKED:
            return "xgrammar would take long over so many counts: `pip install llguidance`, or lower the maxima"
        return None

    def compile(self, shape: Shape) -> XGrammarGrammar:
        """Raises InvalidRequest for a shape that is malformed."""
        self.prepare()
        if shape.rules is None:
            check_source(shape.source)
            source = shape.source
        else:
            source = gbnf(normal_form(shape.rules))
        try:
            # Under a root that no rule leads back to: else it takes the end of an inner one for the end of the text.
            compiled = self._compiler.compile_grammar(f"{source}\n{_ROOT} ::= root\n", root_rule_name=_ROOT)
            grammar = XGrammarGrammar(compiled, len(self._vocabulary.tokens))
        except RuntimeError as error:
            raise InvalidRequest(f"xgrammar cannot compile the grammar: {readable(error)}") from error
        if shape.rules is None:
            check_start(grammar, self._vocabulary.num_words)
        return grammar


class XGrammarGrammar:
    """A compiled grammar, for masks of `width` ids."""

    def __init__(self, compiled: Any, width: int) -> None:
        self._compiled, self._width = compiled, width

    def new_state(self) -> XGrammarState:
        """A state before the first token."""
        return XGrammarState(self._compiled, self._width)


class XGrammarState:
    """Where one sequence is; for one thread at a time."""

    def __init__(self, compiled: Any, width: int) -> None:
        from xgrammar import GrammarMatcher

        self._matcher = GrammarMatcher(compiled)
        used = width % 32  # bits of the last word
        self._last_word = np.int32((1 << used) - 1) if used else np.int32(-1)

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write which ids may come next into int32 [num_words]."""
        if self._matcher.is_terminated():
            row[:] = 0
            return
        self._matcher.fill_next_token_bitmask(row)
        row[-1] &= self._last_word

    def accept(self, token: int) -> bool:
        """Go on by one token; False, with nothing changed, if it may not come here."""
        return bool(not self._matcher.is_terminated() and self._matcher.accept_token(token))

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens accepted."""
        self._matcher.rollback(num_tokens)

    def forced_text(self) -> str:
        """The text that must come next; "" where there is a choice, or at the end."""
        if self._matcher.is_terminated():
            return ""
        try:
            return str(self._matcher.find_jump_forward_string())
        except UnicodeDecodeError as error:  # it begins or ends within a character
            return whole_text(bytes(error.object))

    @property
    def can_end(self) -> bool:
        """Whether EOS may come next."""
        return bool(not self._matcher.is_terminated() and self._matcher.is_completed())

    @property
    def done(self) -> bool:
        """Whether EOS was accepted."""
        return bool(self._matcher.is_terminated())
