"""JSON Schema (2020-12, and the spellings of draft-07) to nodes.

Owns what each keyword allows. Knows no type of the caller's. Invariant: every text that matches is JSON that validates,
written as json.dumps writes it, properties in the schema's order; what cannot be promised is refused with its path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import unquote

from embedllm.structured import containers, numbers, strings
from embedllm.structured.caps import (
    ARRAY_ITEMS,
    EXTRA_PROPERTIES,
    FREE_DEPTH,
    MAX_DEPTH,
    MAX_MERGED,
    MAX_NODES,
    MAX_REPEAT,
    STRING_LENGTH,
    check_entries,
    refuse,
)
from embedllm.structured.containers import Item, members
from embedllm.structured.expressions import Alt, Literal, Node, Ref
from embedllm.structured.merging import apart, constraints, identity, is_any, merge, types_of
from embedllm.structured.nodes import NOTHING, alt, rule, seq

REFUSED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "patternProperties", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor", "disallow", "extends", "divisibleBy"),
)


HEAD = "ref"  # names of rules that schemas with $ref or allOf have begin so, and no others


class Schema:
    """One schema document, lowered into `rules` as far as it is asked for.

    `where` names the document in errors. `value` and `members` give nodes; `finish` writes the rules they refer to.
    """

    def __init__(self, document: Any, rules: dict[str, Node], where: str) -> None:
        self.document, self.rules, self.where = document, rules, where
        self.rules.update(strings.common_rules())
        self.named: dict[str, str] = {}  # canonical text of a schema that has a rule -> its name
        self.pending: list[tuple[str, Any, str]] = []
        self.work = 0

    # ---- rules ----

    def fail(self, path: str, why: str) -> NoReturn:
        refuse(f"{self.where} at {path}", why)

    def spend(self, path: str, count: int = 1) -> None:
        self.work += count
        if self.work > MAX_NODES:
            self.fail(path, f"it takes more than {MAX_NODES:,} parts to describe, which is the limit; ask for less")

    def later(self, schema: dict[str, Any], path: str) -> Ref:
        """A reference to the rule of a schema with $ref or allOf; equal schemas share it, so recursion ends."""
        key = json.dumps(constraints(schema))
        self.spend(path, len(key) // 128)
        if key not in self.named:
            self.named[key] = f"{HEAD}{len(self.rules)}"
            self.rules[self.named[key]] = NOTHING  # reserved
            self.pending.append((self.named[key], schema, path))
        return Ref(self.named[key])

    def finish(self) -> None:
        """Write the rules that are referred to and not written yet."""
        while self.pending:
            name, schema, path = self.pending.pop()
            if set(constraints(schema)) == {"$ref"}:
                self.rules[name] = self.value(*self.target(schema["$ref"], path))
            else:
                self.rules[name] = self.value(self.flat(schema, path), path)

    def target(self, ref: Any, path: str) -> tuple[Any, str]:
        """What a $ref points at, and its path."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            self.fail(path, f"$ref {ref!r} is not within this schema; copy what it means into $defs")
        found, place = self.document, "$"
        for step in ref.split("/")[1:]:
            name = _unescaped(step)
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif (
                isinstance(found, list)
                and name.isascii()
                and name.isdigit()
                and len(name) < 6
                and int(name) < len(found)
            ):
                found = found[int(name)]
            else:
                self.fail(path, f"$ref {ref!r} points at nothing: there is no {name!r} in {place}")
            place += f".{name}"
        return found, place

    def flat(self, schema: Any, path: str) -> Any:
        """The schema without $ref and allOf at its top, merged; False if they exclude each other."""
        merged: Any = True
        stack: list[Any] = [(schema, path)]
        active: set[str] = set()
        num_merged = 0
        while stack:
            part, place = stack.pop()
            if place is None:
                active.discard(part)
                continue
            num_merged += 1
            if num_merged > MAX_MERGED:
                self.fail(path, f"more than {MAX_MERGED} schemas come together here, which is the limit; write it out")
            if isinstance(part, dict) and "$ref" in part:
                ref = part["$ref"]
                if ref in active:
                    self.fail(path, f"$ref {ref!r} leads back to itself; let it stand inside a property")
                target = self.target(ref, place)
                active.add(ref)
                stack += [(ref, None), target]
            if isinstance(part, dict) and "allOf" in part:
                stack += [(each, f"{place}.allOf[{i}]") for i, each in _listed(self, part, "allOf", place)][::-1]
            if isinstance(part, dict):
                self.check(part, place)
                part = {key: value for key, value in part.items() if key not in ("$ref", "allOf")}
                self.spend(place, 4 + len(part) + len(part.get("properties") or ()))
            elif not isinstance(part, bool):
                self.fail(place, f"a schema is an object, true or false, not {part!r}")
            merged = merge(merged, part, f"{self.where} at {place}")
        return merged

    # ---- values ----

    def check(self, schema: dict[str, Any], path: str) -> None:
        """Refuse the keywords that constrain in ways that are not supported."""
        for key in schema:
            if key in REFUSED:
                self.fail(f"{path}.{key}", f"{key} is not supported; leave it out and check it afterwards")
        if "$id" in schema and path != "$":
            self.fail(f"{path}.$id", "a schema with an $id inside another is not supported; leave out the $id")

    def value(self, schema: Any, path: str) -> Node:
        """The JSON texts that a schema allows, but where it only names others: there a reference."""
        self.spend(path)
        if schema is True:
            return containers.anything(FREE_DEPTH, self.rules)
        if schema is False:
            return NOTHING
        if not isinstance(schema, dict):
            self.fail(path, f"a schema is an object, true or false, not {schema!r}")
        self.check(schema, path)
        if "$ref" in schema or "allOf" in schema:
            return self.later(schema, path)
        for key in ("oneOf", "anyOf"):
            if key in schema:
                return self.union(schema, key, path)
        if "enum" in schema or "const" in schema:
            return self.one_of(schema, path)
        if not constraints(schema):
            return containers.anything(FREE_DEPTH, self.rules)
        types = types_of(schema, f"{self.where} at {path}")
        return alt(*(self.typed(name, schema, path) for name in types))

    def typed(self, name: str, schema: dict[str, Any], path: str) -> Node:
        if name == "null":
            return Literal("null")
        if name == "boolean":
            return alt(Literal("true"), Literal("false"))
        if name in ("integer", "number"):
            return numbers.number(schema, name, f"{self.where} at {path}", self.rules)
        if name == "string":
            return seq(Literal('"'), self.characters(schema, path), Literal('"'))
        return rule(self.array(schema, path) if name == "array" else self.object(schema, path), self.rules)

    def union(self, schema: dict[str, Any], key: str, path: str) -> Node:
        options = _listed(self, schema, key, path)
        base = {name: value for name, value in constraints(schema).items() if name != key}
        full = [({"allOf": [base, option]} if base else option, f"{path}.{key}[{i}]") for i, option in options]
        if key == "oneOf":
            full = self.disjoint(full, path)
        return alt(*(self.value(option, place) for option, place in full))

    def disjoint(self, options: list[tuple[Any, str]], path: str) -> list[tuple[Any, str]]:
        """The options of a oneOf, with the property that tells them apart required where it was not."""
        if len(options) > MAX_MERGED:
            self.fail(f"{path}.oneOf", f"it has {len(options)} options, the limit is {MAX_MERGED}; use anyOf")
        flat = [self.flat(option, place) for option, place in options]
        telling: list[set[str]] = [set() for _ in options]
        for i, mine in enumerate(flat):
            for j, other in enumerate(flat[:i]):
                name = apart(mine, other)
                if name is None:
                    self.fail(
                        f"{path}.oneOf",
                        f"options {j} and {i} may both match one value; use anyOf, or give each a required property "
                        f"with a const of its own",
                    )
                if name:
                    telling[i].add(name)
                    telling[j].add(name)
        return [
            ({"allOf": [option, {"required": sorted(names)}]} if names else option, place)
            for (option, place), names in zip(options, telling, strict=True)
        ]

    def one_of(self, schema: dict[str, Any], path: str) -> Node:
        """enum and const, of which the schema's types leave some."""
        values = [schema["const"]] if "const" in schema else [value for _, value in _listed(self, schema, "enum", path)]
        if "const" in schema and "enum" in schema:
            allowed = {identity(value) for _, value in _listed(self, schema, "enum", path)}
            values = [value for value in values if identity(value) in allowed]
        for key in constraints(schema):
            if key not in ("enum", "const", "type"):
                self.fail(
                    f"{path}.{key}", f"{key} beside enum or const is not supported; leave out the values it excludes"
                )
        if "type" in schema:
            names = types_of(schema, f"{self.where} at {path}")
            values = [value for value in values if is_any(value, names)]
        texts = [
            json.dumps(value, ensure_ascii=False) for value in {identity(value): value for value in values}.values()
        ]
        check_entries(texts, f"{self.where} at {path}")
        if not texts:
            self.fail(path, "no value is left: the enum is empty, or its values do not have the type")
        self.spend(path, len(texts))
        return alt(*map(Literal, texts))

    # ---- strings ----

    def count(self, schema: Mapping[str, Any], key: str, path: str) -> int | None:
        if key not in schema:
            return None
        value = schema[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != value // 1:
            self.fail(f"{path}.{key}", f"{key} must be a whole number from 0 up, got {value!r}")
        return int(value)

    def counts(self, schema: Mapping[str, Any], of: str, path: str) -> tuple[int, int | None]:
        """minX and maxX; the second is None where the schema does not say."""
        least, most = self.count(schema, f"min{of}", path) or 0, self.count(schema, f"max{of}", path)
        if least > MAX_REPEAT:
            self.fail(path, f"min{of} is {least:,}, the limit is {MAX_REPEAT:,}; ask for less")
        if most is not None and least > most:
            self.fail(path, f"min{of} {least} is above max{of} {most}: no value can match")
        return least, None if most is None else min(most, MAX_REPEAT)

    def characters(self, schema: dict[str, Any], path: str) -> Node:
        """What stands between the quotes of a string."""
        raw = self.shaped(schema, path)
        if raw is not None:
            return strings.in_json(raw)
        least, most = self.counts(schema, "Length", path)
        return strings.free(least, max(STRING_LENGTH, least) if most is None else most)

    def shaped(self, schema: dict[str, Any], path: str) -> Node | None:
        """The texts of a string with a pattern or a known format, before they are written as JSON."""
        for key in ("pattern", "format"):
            if not isinstance(schema.get(key, ""), str):
                self.fail(f"{path}.{key}", f"{key} must be a string, got {schema[key]!r}")
        least, most = self.counts(schema, "Length", path)
        return strings.shaped(schema.get("pattern"), schema.get("format"), least, most, f"{self.where} at {path}")

    # ---- arrays and objects ----

    def array(self, schema: dict[str, Any], path: str) -> Node:
        items, prefix = schema.get("items"), schema.get("prefixItems")
        if isinstance(items, list):
            prefix, items = items, schema.get("additionalItems")
        prefix = [] if prefix is None else prefix
        if not isinstance(prefix, list):
            self.fail(f"{path}.prefixItems", f"prefixItems must be a list of schemas, got {prefix!r}")
        least, most = self.counts(schema, "Items", path)
        if items is None:
            items = True
            most = len(prefix) if prefix and most is None and least <= len(prefix) else most
        if items is False:
            most = len(prefix) if most is None else min(most, len(prefix))
            if least > most:
                self.fail(path, f"minItems is {least}, but there can be no more than {most} items: no value can match")
        most = max(ARRAY_ITEMS, least, len(prefix)) if most is None else most
        if (num_open := min(most, len(prefix)) - least) > MAX_DEPTH:
            self.fail(
                f"{path}.prefixItems", f"{num_open} of them may be left out, the limit is {MAX_DEPTH}; raise minItems"
            )
        if schema.get("uniqueItems") and most > 1:
            return self.unique(False if prefix else items, least, "maxItems" in schema, path)
        first = [self.value(each, f"{path}.prefixItems[{i}]") for i, each in enumerate(prefix[:most])]
        rest = self.value(items, f"{path}.items") if most > len(prefix) else NOTHING
        return containers.array(first, rest, least, most, self.rules)

    def unique(self, items: Any, least: int, has_most: bool, path: str) -> Node:
        """An array of different values of one enum, in the enum's order."""
        flat = self.flat(items, path)
        if not isinstance(flat, dict) or "enum" not in flat or least > 1 or has_most:
            self.fail(
                f"{path}.uniqueItems",
                "uniqueItems is supported where maxItems is 1, or where items is an enum, minItems at most 1 and no "
                "maxItems given; leave it out and check it afterwards",
            )
        node = self.one_of(flat, path)
        items_of = [(option, False) for option in (node.options if isinstance(node, Alt) else (node,))]
        return seq(Literal("["), members(items_of, ", ", self.rules, least), Literal("]"))

    def object(self, schema: dict[str, Any], path: str) -> Node:
        properties, required, extra = self.parts(schema, path)
        least, most = self.counts(schema, "Properties", path)
        num_extra = 0 if extra is False else EXTRA_PROPERTIES
        if most is not None:
            if len(required) > most or (len(properties) > most and len(properties) != len(required)):
                self.fail(
                    f"{path}.maxProperties",
                    f"maxProperties {most} with {len(properties)} properties is not supported; leave it out",
                )
            num_extra = min(num_extra, most - len(properties))
        if least > max(1, len(required)):
            self.fail(
                f"{path}.minProperties",
                f"minProperties {least} with {len(required)} required properties is not supported; make more required",
            )
        items: list[Item] = []
        for name, each in properties.items():
            if each is False:
                if name in required:
                    self.fail(f"{path}.properties.{name}", "it is required, and false: no value can match")
                continue
            value = self.value(each, f"{path}.properties.{name}")
            items.append((seq(strings.quoted(name), Literal(": "), value), name in required))
        if least and not items and not num_extra:
            self.fail(f"{path}.minProperties", "it asks for a property, and none is allowed: no value can match")
        if num_extra:
            value = self.value(extra, f"{path}.additionalProperties")
            items.append((containers.extras(properties, value, num_extra, self.rules), False))
        return seq(Literal("{"), members(items, ", ", self.rules, least), Literal("}"))

    def parts(self, schema: dict[str, Any], path: str) -> tuple[dict[str, Any], set[str], Any]:
        """Properties in order, the names that are required, and what other properties must be."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            self.fail(f"{path}.properties", f"properties must be an object, got {properties!r}")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self.fail(f"{path}.required", f"required must be a list of names, got {required!r}")
        extra = schema.get("additionalProperties", "properties" not in schema)
        unnamed = schema.get("additionalProperties", True)
        properties = properties | {name: unnamed for name in required if name not in properties}
        return properties, set(required), extra


def _unescaped(step: str) -> str:
    """A step of a JSON pointer in a URI fragment: RFC 6901."""
    return unquote(step).replace("~1", "/").replace("~0", "~")


def _listed(owner: Schema, schema: dict[str, Any], key: str, path: str) -> list[tuple[int, Any]]:
    given = schema[key]
    if not isinstance(given, list) or not given:
        owner.fail(f"{path}.{key}", f"{key} must be a list with something in it, got {given!r}")
    return list(enumerate(given))
