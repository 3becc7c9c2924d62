"""The shape an answer is asked to have.

Owns StructuredOutput: which one of the known kinds of shape, and its checks that need nothing but the standard library.
Knows no grammar and no tokenizer: what it says is compiled in `structured/`, at submit. Invariant: exactly one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from embedllm.errors import InvalidRequest, UnknownOption


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What every answer must match, from its first character to its last; exactly one of these is given.

    json_schema: a JSON Schema (dict), a pydantic model, a dataclass, a TypedDict or another type that pydantic knows.
    json_object: True for any JSON object.
    regex: a regular expression, matched as a whole.
    choice: texts, of which the answer is one.
    grammar: a context-free grammar: GBNF (`root ::= ...`) or Lark (`start: ...`).
    structural_tag: free text with shaped parts between tags, in xgrammar's format or the older one with "structures"
        and "triggers".

    JSON is written as `json.dumps` does, without free whitespace. Lengths that a schema leaves open are capped (docs:
    structured output). Raises InvalidRequest unless exactly one kind is given, UnknownOption for another name.
    """

    json_schema: Any = field(default=None, hash=False)
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    structural_tag: Mapping[str, Any] | None = field(default=None, hash=False)

    def __new__(cls, **given: Any) -> StructuredOutput:
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise UnknownOption.named(name, cls.__dataclass_fields__, "StructuredOutput")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        asked = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(asked) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise InvalidRequest(f"structured output takes exactly one of {names}; got {', '.join(asked) or 'none'}")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidRequest(f"{name} must be a non-empty string, got {value!r}")
        if not isinstance(self.json_object, bool):
            raise InvalidRequest(f"json_object must be True or False, got {self.json_object!r}")
        if self.choice is not None:
            texts: Sequence[Any] = self.choice
            if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
                raise InvalidRequest(f"choice must be a list of strings, got {texts!r}")
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise InvalidRequest(f"choice must hold non-empty strings, got {list(texts)!r}")
            object.__setattr__(self, "choice", tuple(dict.fromkeys(texts)))
        if self.structural_tag is not None and not isinstance(self.structural_tag, Mapping):
            raise InvalidRequest(f"structural_tag must be a dict, got {type(self.structural_tag).__name__}")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(f.name for f in fields(self) if getattr(self, f.name) not in (None, False))

    @classmethod
    def of(cls, given: Any) -> StructuredOutput:
        """A StructuredOutput as it is, a dict of its fields as one."""
        if isinstance(given, StructuredOutput):
            return given
        if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
            return cls(**given)
        raise InvalidRequest(f"structured must be a StructuredOutput or a dict of its fields, got {given!r}")
