"""From what a caller asks to a shape that a backend can compile.

Owns the kinds of shape, the types that a schema is made of, and the key of a compiled shape. Knows no backend.
Invariant: equal keys mean equal shapes; the order of properties is part of both.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import operator
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from embedllm.errors import InvalidRequest
from embedllm.structured.backend import Shape
from embedllm.structured.caps import FREE_DEPTH, RECURSION_DEPTH, check_entries, check_text, plain, refuse
from embedllm.structured.containers import free_object
from embedllm.structured.depth import bounded
from embedllm.structured.expressions import EMPTY, Literal, Node
from embedllm.structured.nodes import alt, checked, well_formed
from embedllm.structured.regex import regex
from embedllm.structured.schema import HEAD, Schema
from embedllm.structured.tags import structural_tag
from embedllm.structured_output import StructuredOutput

Parse = Callable[[str], Any]


def lower(asked: StructuredOutput) -> Shape:
    """The shape, checked and small enough to compile.

    Raises InvalidRequest naming the place, the value, the limit and the way out.
    """
    kind, source = asked.kind, _source(asked)
    if kind == "grammar":
        return Shape(source=source, dialect="gbnf" if "::=" in source else "lark")
    rules: dict[str, Node] = {"root": EMPTY}
    if kind == "choice":
        rules["root"] = alt(*(Literal(check_text(text, kind)) for text in source))
    elif kind == "regex":
        rules["root"] = regex(source, kind)
    elif kind == "structural_tag":
        rules["root"] = structural_tag(source, rules, kind)
    else:
        schema = Schema(source, rules, kind)
        rules["root"] = free_object(FREE_DEPTH, rules) if kind == "json_object" else schema.value(source, "$")
        schema.finish()
    heads = frozenset(name for name in rules if name.startswith(HEAD))
    return Shape(rules=well_formed(bounded(checked(rules, kind), heads, RECURSION_DEPTH), kind))


def key_of(asked: StructuredOutput) -> str:
    """A sha256 that is equal for equal shapes, to keep compiled ones by. Raises InvalidRequest as `lower`."""
    canonical = json.dumps([asked.kind, _source(asked)], separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _source(asked: StructuredOutput) -> Any:
    """What is asked, as plain data."""
    given = getattr(asked, asked.kind)
    if asked.kind == "json_schema":
        return schema_of(given)[0]
    if asked.kind == "structural_tag":
        return plain(dict(given), asked.kind)
    if asked.kind == "choice":
        check_entries([check_text(text, "choice") for text in given], "choice")
        return list(given)
    return given


def schema_of(given: Any) -> tuple[dict[str, Any], Parse]:
    """The JSON Schema of what a caller gives, and how an answer's text becomes the caller's object.

    given: a JSON Schema as a dict, a pydantic model (v2 or v1), a dataclass, a TypedDict, or another type that
    pydantic.TypeAdapter takes. A dict and a TypedDict are parsed to plain data, everything else to an instance.
    Raises InvalidRequest for anything else, and for a schema over a limit.
    """
    if isinstance(given, Mapping):
        return plain(dict(given), "json_schema"), json.loads
    # A function would be called with what the model writes.
    if given is None or isinstance(given, (bool, int, float, str, bytes, list, tuple, set)) or inspect.isroutine(given):
        refuse("json_schema", f"it must be a dict, a pydantic model or a type, got {given!r:.100}")
    if isinstance(given, type) and hasattr(given, "parse_obj") and not hasattr(given, "model_validate"):
        model = cast(Any, given)  # pydantic.v1
        return plain(model.schema(), "json_schema"), lambda text: model.parse_obj(json.loads(text))
    import pydantic

    try:
        try:
            adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(given)
        except pydantic.errors.PydanticUserError as error:
            if error.code != "typed-dict-version":
                raise
            adapter = pydantic.TypeAdapter(_with_typing_extensions(given))
        schema = adapter.json_schema()
    except (pydantic.errors.PydanticUserError, TypeError, NameError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidRequest(f"json_schema: no JSON Schema can be made of {given!r:.100}: {reason}") from error
    return plain(schema, "json_schema"), json.loads if is_typeddict(given) else adapter.validate_json


def _with_typing_extensions(given: Any) -> Any:
    """The type with each TypedDict in it as one of typing_extensions: before Python 3.12 pydantic takes no other."""
    import typing_extensions

    if is_typeddict(given):
        fields: dict[str, Any] = {}
        for name, hint in get_type_hints(given, include_extras=True).items():
            while get_origin(hint) in (typing_extensions.Required, typing_extensions.NotRequired):
                (hint,) = get_args(hint)
            marker: Any = typing_extensions.Required
            if name not in given.__required_keys__:
                marker = typing_extensions.NotRequired
            fields[name] = marker[_with_typing_extensions(hint)]
        make: Any = typing_extensions.TypedDict
        return make(given.__name__, fields)
    origin, args = get_origin(given), get_args(given)
    changed = tuple(map(_with_typing_extensions, args))
    if origin is None or changed == args:
        return given
    return functools.reduce(operator.or_, changed) if origin in (UnionType, Union) else origin[changed]
