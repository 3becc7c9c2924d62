"""Several schemas as one, and whether two exclude each other.

Owns what allOf, and $ref or anyOf beside other keywords, come to. Knows no nodes. Invariant: a merged schema allows
exactly the values that both allow; where that cannot be written as one schema, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from embedllm.structured.caps import refuse

ANNOTATIONS = (
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("$schema", "$id", "$comment", "$defs", "definitions", "contentEncoding", "contentMediaType", "contentSchema"),
)
# The types that a keyword speaks of; a schema that names no type means those.
SPEAKS_OF = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
COMBINERS = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const", "type")
KEYWORDS = frozenset(COMBINERS).union(*SPEAKS_OF.values())
LARGER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
SMALLER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


def constraints(schema: dict[str, Any]) -> dict[str, Any]:
    """The keywords that say something about values."""
    return {key: value for key, value in schema.items() if key in KEYWORDS}


def types_of(schema: dict[str, Any], where: str) -> list[str]:
    """The types that a schema names, or that its keywords speak of."""
    if "type" not in schema:
        return [name for name, keys in SPEAKS_OF.items() if any(key in schema for key in keys)]
    given = schema["type"]
    names = given if isinstance(given, list) else [given]
    unknown = [name for name in names if name not in TYPES]
    if unknown or not names:
        wrong = repr(unknown[0]) if unknown else "an empty list"
        refuse(where, f"type must be one or more of {', '.join(TYPES)}; got {wrong}")
    return [name for name in dict.fromkeys(names) if name != "integer" or "number" not in names]


def identity(value: Any) -> str:
    """Equal for values that JSON Schema takes as equal: 1 and 1.0, but not 1 and true."""
    if isinstance(value, float) and value == value // 1 and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(map(identity, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(json.dumps(key) + ":" + identity(value[key]) for key in sorted(value)) + "}"
    return json.dumps(value)


def both(mine: Any, theirs: Any) -> Any:
    """A schema for what both allow, merged only when it is needed."""
    if mine is False or theirs is False:
        return False
    if mine in (True, {}) or mine == theirs:
        return theirs
    return mine if theirs in (True, {}) else {"allOf": [mine, theirs]}


def merge(mine: Any, theirs: Any, where: str) -> Any:
    """One schema for what both allow, at the top level; False where they exclude each other."""
    if mine is False or theirs is False:
        return False
    if mine is True:
        return theirs
    if theirs is True:
        return mine
    merged = dict(mine)
    for key, other in theirs.items():
        own = merged.setdefault(key, other)
        if key in ANNOTATIONS or key == "properties" or (type(own) is type(other) and own == other):
            continue
        if key == "type":
            merged[key] = _common_types(mine, theirs, where)
        elif key == "required":
            merged[key] = list(dict.fromkeys([*own, *other]))
        elif key in LARGER or key in SMALLER:
            if not all(isinstance(bound, (int, float)) for bound in (own, other)):
                refuse(where, f"{key} must be a number, got {own!r} and {other!r}")
            merged[key] = max(own, other) if key in LARGER else min(own, other)
        elif key == "enum":
            allowed = {identity(value) for value in other}
            merged[key] = [value for value in own if identity(value) in allowed]
        elif key == "const":
            if identity(own) != identity(other):
                return False
        elif key in ("items", "additionalProperties") and not isinstance(own, list):
            merged[key] = both(own, other)
        elif key in KEYWORDS:
            refuse(where, f"{key} is given more than once by schemas that hold together (allOf, $ref); write it once")
    if merged.get("type") == [] or merged.get("enum") == []:
        return False
    _check_tuples(mine, theirs, where)
    if "properties" in mine or "properties" in theirs:
        names = [*mine.get("properties", {}), *theirs.get("properties", {})]
        merged["properties"] = {
            name: both(_property(mine, name), _property(theirs, name)) for name in dict.fromkeys(names)
        }
    return merged


def _property(schema: dict[str, Any], name: str) -> Any:
    return schema.get("properties", {}).get(name, schema.get("additionalProperties", True))


def _common_types(mine: dict[str, Any], theirs: dict[str, Any], where: str) -> list[str]:
    own, other = types_of(mine, where), types_of(theirs, where)
    common = [name for name in own if name in other or (name == "integer" and "number" in other)]
    return common + [name for name in other if name == "integer" and "number" in own and name not in common]


def _check_tuples(mine: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    def shape(schema: dict[str, Any]) -> list[Any]:
        return [schema.get(key) for key in ("items", "prefixItems", "additionalItems")]

    def is_tuple(schema: dict[str, Any]) -> bool:
        return "prefixItems" in schema or isinstance(schema.get("items"), list)

    speak = shape(mine) != [None] * 3 and shape(theirs) != [None] * 3
    if speak and (is_tuple(mine) or is_tuple(theirs)) and shape(mine) != shape(theirs):
        refuse(where, "prefixItems beside the items of another schema (allOf, $ref) is not supported; write it once")


def apart(mine: Any, theirs: Any) -> str | None:
    """How two schemas exclude each other: "" by type or values, a name by that property's values; None if they may not.

    A name that one of them does not require keeps them apart once it is required.
    """
    if mine is False or theirs is False:
        return ""
    if not isinstance(mine, dict) or not isinstance(theirs, dict):
        return None
    own, other = _values(mine), _values(theirs)
    if own is not None and other is not None and not own & other:
        return ""
    kinds = [_kinds(schema) for schema in (mine, theirs)]
    if kinds[0] is not None and kinds[1] is not None:
        common = kinds[0] & kinds[1]
        if not common:
            return ""
        if common != {"object"}:
            return None
        ours, others = mine.get("properties", {}), theirs.get("properties", {})
        for name in ours:
            own, other = _values(ours[name]), _values(others.get(name))
            if own is not None and other is not None and not own & other:
                required = all(name in schema.get("required", []) for schema in (mine, theirs))
                return "" if required else name
    return None


def _values(schema: Any) -> set[str] | None:
    """The only values it may allow, None if they are not listed."""
    if not isinstance(schema, dict) or not ("enum" in schema or "const" in schema):
        return None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    return {identity(value) for value in values} if isinstance(values, list) else None


def _kinds(schema: dict[str, Any]) -> set[str] | None:
    """The types it allows, with integers as numbers; None if it does not say."""
    if "type" not in schema:
        values = _values(schema)
        kinds = {'"': "string", "[": "array", "{": "object", "t": "boolean", "f": "boolean", "n": "null"}
        return None if values is None else {kinds.get(value[0], "number") for value in values}
    given = schema["type"]
    return {"number" if name == "integer" else str(name) for name in (given if isinstance(given, list) else [given])}


def is_any(value: Any, names: Sequence[str]) -> bool:
    """Whether a value has one of these types; 1.0 is an integer too."""
    kinds = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object", int: "integer"}
    kind = kinds.get(type(value), "number")
    if kind == "number":
        return "number" in names or ("integer" in names and value == value // 1)
    return kind in names or (kind == "integer" and "number" in names)
