"""Structural tags to nodes: free text with shaped parts between tags.

Owns the formats, as xgrammar writes them (xgrammar.structural_tag, 0.2.8), and arguments in XML. Knows no tool and no
model family. Invariant: free text is taken only where something tells its end, or where the answer may end.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from embedllm.structured.caps import MAX_REPEAT, STRING_LENGTH, check_text, refuse
from embedllm.structured.containers import members
from embedllm.structured.expressions import EMPTY, Chars, Dispatch, Literal, Node, Repeat, Seq
from embedllm.structured.merging import types_of
from embedllm.structured.nodes import ANY, alt, chars, optional, parts_of, repeat, rule, seq, without
from embedllm.structured.regex import regex
from embedllm.structured.schema import Schema

Ends = tuple[str, ...]
FIELDS = {
    "const_string": ("value",),
    "json_schema": ("json_schema", "style"),
    "any_text": (),
    "regex": ("pattern",),
    "sequence": ("elements",),
    "or": ("elements",),
    "tag": ("begin", "content", "end"),
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
    "optional": ("content",),
    "plus": ("content",),
    "star": ("content",),
    "repeat": ("content", "min", "max"),
}
# Fields that only say what is so anyway.
DEFAULTS: dict[str, Any] = {
    "excludes": [],
    "any_order": False,
    "max_whitespace_cnt": None,
    "max_tokens": None,
    "max_chars": None,
}
# Per property: before the name, between name and value, after the value. Properties are parted by a newline.
STYLES = {
    "qwen_xml": ("<parameter=", ">\n", "\n</parameter>"),
    "glm_xml": ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
}


def structural_tag(given: Mapping[str, Any], rules: dict[str, Node], where: str) -> Node:
    """What a structural tag allows; `rules` gets the rules it refers to.

    Raises InvalidRequest with the path of what is malformed or not supported.
    """
    if "structures" in given:
        known(given, ("structures", "triggers", "type"), where)
        tags = []
        for i, item in enumerate(listed(given, "structures", where)):
            known(item, ("begin", "schema", "end"), f"{where} at $.structures[{i}]")
            schema = item.get("schema")
            if isinstance(schema, str):
                try:
                    schema = json.loads(schema)
                except (ValueError, RecursionError) as error:
                    refuse(f"{where} at $.structures[{i}].schema", f"it is not JSON: {error}")
            content = {"type": "json_schema", "json_schema": schema}
            tags.append({"type": "tag", "begin": item.get("begin"), "content": content, "end": item.get("end")})
        triggers = given.get("triggers")
        return Tags(rules, where).node({"type": "triggered_tags", "triggers": triggers, "tags": tags}, "$", True)
    known(given, ("type", "format"), where)
    if "format" not in given:
        refuse(where, 'it needs a "format", or "structures" and "triggers"')
    return Tags(rules, where).node(given["format"], "$.format", True)


def known(given: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        refuse(where, f"it must be an object, got {given!r}")
    for key, value in given.items():
        if key in names or (key in DEFAULTS and value == DEFAULTS[key]):
            continue
        nearest = difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(names)}"
        refuse(where, f"{key!r} is not supported{hint}")


def listed(given: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = given.get(key)
    if not isinstance(value, list) or not value:
        refuse(where, f"{key} must be a list with something in it, got {value!r}")
    return value


class Tags:
    """One structural tag, lowered into `rules`."""

    def __init__(self, rules: dict[str, Node], where: str) -> None:
        self.rules, self.where = rules, where

    def fail(self, path: str, why: str) -> NoReturn:
        refuse(f"{self.where} at {path}", why)

    def text(self, given: Mapping[str, Any], key: str, path: str, default: str | None = None) -> str:
        value = given.get(key, default)
        if not isinstance(value, str):
            self.fail(path, f"{key} must be a string, got {value!r}")
        return check_text(value, f"{self.where} at {path}.{key}")

    def flag(self, given: Mapping[str, Any], key: str, path: str) -> bool:
        value = given.get(key, False)
        if not isinstance(value, bool):
            self.fail(path, f"{key} must be true or false, got {value!r}")
        return value

    def kind(self, given: Any, path: str) -> str:
        kind = given.get("type") if isinstance(given, dict) else None
        if not isinstance(kind, str) or kind not in FIELDS:
            self.fail(path, f"a format needs one of these types: {', '.join(FIELDS)}; got {kind!r}")
        known(given, ("type", *FIELDS[kind]), f"{self.where} at {path}")
        return kind

    def node(self, given: Any, path: str, last: bool) -> Node:
        """What a format allows. last: nothing comes after it, so that free text may end anywhere."""
        match self.kind(given, path):
            case "const_string":
                return Literal(self.text(given, "value", path))
            case "regex":
                return regex(self.text(given, "pattern", path), f"{self.where} at {path}")
            case "json_schema":
                return self.json_schema(given, path)
            case "any_text":
                if not last:
                    self.fail(
                        path, "any_text here has no end: put it last, into a tag, or before a const_string or tag"
                    )
                return Repeat(ANY, 0, None)
            case "sequence":
                return self.sequence(given, path, None, last)
            case "or":
                return alt(*(self.node(each, place, last) for each, place in self.elements(given, "elements", path)))
            case "tag":
                return seq(Literal(self.text(given, "begin", path)), self.rest_of_tag(given, path, last))
            case "triggered_tags":
                return self.triggered_tags(given, path, last)
            case "tags_with_separator":
                return self.separated_tags(given, path)
            case "optional":
                return optional(self.node(given.get("content"), f"{path}.content", last))
            case "plus":
                return repeat(self.node(given.get("content"), f"{path}.content", False), 1, None)
            case "star":
                return repeat(self.node(given.get("content"), f"{path}.content", False), 0, None)
            case _:
                return self.repeat(given, path)

    def elements(self, given: Mapping[str, Any], key: str, path: str) -> list[tuple[Any, str]]:
        values = listed(given, key, f"{self.where} at {path}")
        return [(each, f"{path}.{key}[{i}]") for i, each in enumerate(values)]

    def closed(self, given: Any, path: str, ends: Ends) -> Node:
        """What a format allows, and one of `ends` after it."""
        match self.kind(given, path):
            case "any_text":
                # An end that holds another never comes: the other one ends the text before it.
                first = [end for end in dict.fromkeys(ends) if not any(o in end for o in ends if o != end)]
                return Dispatch(tuple((end, EMPTY) for end in first), may_end=False, again=False)
            case "sequence":
                return self.sequence(given, path, ends, False)
            case "or":
                return alt(*(self.closed(e, place, ends) for e, place in self.elements(given, "elements", path)))
            case "optional":
                return alt(self.closed(given.get("content"), f"{path}.content", ends), *map(Literal, ends))
        return seq(self.node(given, path, False), alt(*map(Literal, ends)))

    def sequence(self, given: Mapping[str, Any], path: str, ends: Ends | None, last: bool) -> Node:
        after: Node = EMPTY
        lead = ""  # the text that `after` begins with, in front of it
        elements = self.elements(given, "elements", path)
        for i, (each, place) in reversed(list(enumerate(elements))):
            kind = self.kind(each, place)
            if i == len(elements) - 1 and ends is not None:
                after = self.closed(each, place, ends)
            elif kind == "const_string" or (kind == "tag" and each.get("begin")):
                rest = self.rest_of_tag(each, place, last and i == len(elements) - 1) if kind == "tag" else EMPTY
                after = seq(rest, Literal(lead), after)
                lead = self.text(each, "value" if kind == "const_string" else "begin", place)
                continue
            elif kind == "any_text" and lead:
                after = Dispatch(((lead, after),), may_end=False, again=False)
            else:
                after = seq(self.node(each, place, last and i == len(elements) - 1), Literal(lead), after)
            lead = ""
        return seq(Literal(lead), after)

    def rest_of_tag(self, given: Mapping[str, Any], path: str, last: bool) -> Node:
        """The content and the end of a tag."""
        end = given.get("end")
        ends = tuple(text for text in (end if isinstance(end, list) else [end]) if isinstance(text, str))
        if not ends or (isinstance(end, list) and len(ends) < len(end)):
            self.fail(path, f"end must be a string or a list of strings, got {end!r}")
        for text in ends:
            check_text(text, f"{self.where} at {path}.end")
        if "" in ends:
            return self.node(given.get("content"), f"{path}.content", last)
        return self.closed(given.get("content"), f"{path}.content", ends)

    def tags(self, given: Mapping[str, Any], path: str) -> list[tuple[str, Node]]:
        """The tags of a format: how each begins, and the rule of the rest."""
        found = []
        for tag, place in self.elements(given, "tags", path):
            if self.kind(tag, place) != "tag":
                self.fail(place, f"it must be of type tag, got {tag['type']!r}")
            found.append((self.text(tag, "begin", place), rule(self.rest_of_tag(tag, place, False), self.rules)))
        return found

    def triggered_tags(self, given: Mapping[str, Any], path: str, last: bool) -> Node:
        """Free text with tags in it; with at_least_one it begins with a tag, as in xgrammar."""
        tags = self.tags(given, path)
        at_least_one, once = self.flag(given, "at_least_one", path), self.flag(given, "stop_after_first", path)
        first = alt(*(seq(Literal(begin), rest) for begin, rest in tags))
        triggers = listed(given, "triggers", f"{self.where} at {path}")
        for trigger in triggers:
            if (
                not isinstance(trigger, str)
                or not trigger
                or sum(trigger in o for o in triggers if isinstance(o, str)) > 1
            ):
                self.fail(path, f"triggers must be texts that are not part of each other, got {triggers!r}")
        options: dict[str, list[Node]] = {check_text(trigger, f"{self.where} at {path}"): [] for trigger in triggers}
        for begin, rest in tags:
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                self.fail(path, f"no trigger begins the tag {begin!r}; triggers are {triggers!r}")
            options[trigger].append(seq(Literal(begin[len(trigger) :]), rest))
        if idle := [trigger for trigger, nodes in options.items() if not nodes]:
            self.fail(path, f"no tag begins with the trigger {idle[0]!r}; leave it out")
        if at_least_one and once:
            return first
        if not last:
            self.fail(path, "the free text of triggered_tags has no end here: put it last")
        dispatch = tuple((trigger, alt(*nodes)) for trigger, nodes in options.items())
        text = Dispatch(dispatch, may_end=True, again=not once)
        return seq(first, text) if at_least_one else text

    def separated_tags(self, given: Mapping[str, Any], path: str) -> Node:
        one = rule(alt(*(seq(Literal(begin), rest) for begin, rest in self.tags(given, path))), self.rules)
        more = repeat(seq(Literal(self.text(given, "separator", path)), one), 0, None)
        some = one if self.flag(given, "stop_after_first", path) else seq(one, more)
        return some if self.flag(given, "at_least_one", path) else optional(some)

    def repeat(self, given: Mapping[str, Any], path: str) -> Node:
        least, most = given.get("min"), given.get("max")
        if type(least) is not int or type(most) is not int or least < 0 or (most != -1 and most < least):
            self.fail(path, f"min must be from 0 up, max not below it or -1 for no end; got {least!r} and {most!r}")
        if max(least, most) > MAX_REPEAT:
            self.fail(path, f"{max(least, most):,} repeats are over the limit of {MAX_REPEAT:,}; ask for less")
        return repeat(self.node(given.get("content"), f"{path}.content", False), least, None if most == -1 else most)

    def json_schema(self, given: Mapping[str, Any], path: str) -> Node:
        style, document = given.get("style", "json"), given.get("json_schema")
        schema = Schema(document, self.rules, f"{self.where} at {path}.json_schema")
        if style != "json" and style not in STYLES:
            self.fail(path, f"style must be one of json, {', '.join(STYLES)}; got {style!r}")
        node = schema.value(document, "$") if style == "json" else arguments(schema, *STYLES[style])
        schema.finish()
        return node


def arguments(schema: Schema, before: str, between: str, after: str) -> Node:
    """The properties of an object schema in XML: strings raw, everything else as JSON; no other properties."""
    flat = schema.flat(schema.document, "$")
    if (
        not isinstance(flat, dict)
        or types_of(flat, schema.where) not in ([], ["object"])
        or {"anyOf", "oneOf"} & set(flat)
    ):
        schema.fail("$", "arguments in XML need a plain object schema; use the style json")
    properties, required, _ = schema.parts(flat, "$")
    items = []
    for name, each in properties.items():
        path = f"$.properties.{name}"
        if not name or set(name) & set("<>\n"):
            schema.fail(path, f"{name!r} cannot be the name of an argument in XML; use the style json")
        if each is not False:
            begin = Literal(f"{before}{name}{between}")
            items.append((seq(begin, _argument(schema, each, path, after)), name in required))
        elif name in required:
            schema.fail(path, "it is required, and false: no value can match")
    return members(items, "\n", schema.rules)


def _argument(schema: Schema, each: Any, path: str, after: str) -> Node:
    """A value and the end of its element."""
    flat = schema.flat(each, path)
    # The newline that the format puts before the end is left to the model: no text of the end may stand in the value.
    free = Dispatch(((after.lstrip(), EMPTY),), may_end=False, again=False)
    if not isinstance(flat, dict):
        return free
    values = [flat["const"]] if "const" in flat else flat.get("enum")
    if isinstance(values, list):
        schema.one_of(flat, path)  # refuses what is wrong with it
        raw = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        if any(after.lstrip() in text for text in raw):
            schema.fail(path, f"a value holds {after.lstrip()!r}, which ends an argument; use the style json")
        return seq(alt(*(Literal(check_text(text, schema.where)) for text in raw)), Literal(after))
    options = flat.get("anyOf", flat.get("oneOf"))
    if isinstance(options, list) and options:
        return alt(*dict.fromkeys(_argument(schema, {"allOf": [_base(flat), o]}, path, after) for o in options))
    names = types_of(flat, schema.where)
    if names and "string" not in names:
        return seq(schema.value(each, path), Literal(after))
    shaped = schema.shaped(flat, path) if names == ["string"] else None
    if shaped is not None:
        return seq(_without_tags(shaped), Literal(after))
    if names == ["string"] and {"minLength", "maxLength"} & set(flat):
        least, most = schema.counts(flat, "Length", path)
        plain = without([(ord("<"), ord("<"))])
        return seq(repeat(plain, least, max(STRING_LENGTH, least) if most is None else most), Literal(after))
    return free


def _base(flat: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if key not in ("anyOf", "oneOf")}


def _without_tags(node: Node) -> Node:
    """The same texts, but for those in which a class of characters stands for <."""
    if isinstance(node, Chars):
        cuts = [(low, min(high, ord("<") - 1)) for low, high in node.ranges]
        return chars([*cuts, *((max(low, ord("<") + 1), high) for low, high in node.ranges)])
    if isinstance(node, Repeat):
        return Repeat(_without_tags(node.item), node.least, node.most)
    parts = map(_without_tags, parts_of(node))
    return node if isinstance(node, Literal) else seq(*parts) if isinstance(node, Seq) else alt(*parts)
