"""Structural tags: which texts they allow, also beside xgrammar's own reading of them."""

import random
import re
from typing import Any

import pytest

from embedllm.errors import InvalidRequest
from embedllm.structured.expressions import Rules
from embedllm.structured.lower import lower
from embedllm.structured_output import StructuredOutput
from tests.unit.expressions import matches, sample

ANY: dict[str, Any] = {"type": "any_text"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
}


def const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def tag(begin: str, content: Any, end: str | list[str]) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def schema(given: Any, style: str = "json") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": given, "style": style}


def rules_of(form: Any) -> Rules:
    shape = lower(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}))
    assert shape.rules is not None
    return shape.rules


def triggered(**options: Any) -> dict[str, Any]:
    tags = [tag("<a>", const("1"), "</a>"), tag("<ab>", const("2"), "</ab>")]
    return {"type": "triggered_tags", "triggers": ["<a"], "tags": tags, **options}


def separated(**options: Any) -> dict[str, Any]:
    return {
        "type": "tags_with_separator",
        "tags": [tag("(", const("1"), ")"), tag("[", ANY, "]")],
        "separator": "; ",
        **options,
    }


CASES: list[tuple[Any, list[str], list[str]]] = [
    (const("x\n"), ["x\n"], ["", "x", "x\n "]),
    (ANY, ["", "anything\n😀"], []),
    ({"type": "regex", "pattern": "a+"}, ["a", "a" * 300], ["", "b"]),
    (schema({"enum": ["é", 1]}), ['"é"', "1"], ["é", '"\\u00e9"']),
    (schema(True), ["1", '{"a": [null]}'], ["", "{"]),
    (
        {"type": "sequence", "elements": [const("a"), {"type": "regex", "pattern": "b*"}, const("c")]},
        ["ac", "abbc"],
        ["ab", "abc "],
    ),
    (
        {"type": "sequence", "elements": [ANY, const("</x>"), const("y")]},
        ["</x>y", "a<</x>y"],
        ["</x>a</x>y", "y", "</x>"],
    ),
    ({"type": "sequence", "elements": [ANY, tag("<t>", ANY, "</t>"), ANY]}, ["<t></t>", "a<t>b</t>c<t>"], ["a", "<t>"]),
    ({"type": "or", "elements": [const("a"), const("b")]}, ["a", "b"], ["", "ab"]),
    (tag("<a>", ANY, "</a>"), ["<a></a>", "<a>x</a></a>"[:8], "<a><a></a>"], ["<a>", "<a>x</a>y", "<a></a></a>"]),
    (tag("<a>", ANY, ["</a>", "</b>"]), ["<a>x</a>", "<a>x</b>"], ["<a>x</a></b>"]),
    (tag("<a>", ANY, ["b</a>", "</a>"]), ["<a>x</a>", "<a>b</a>"], ["<a>x</a>b</a>"]),
    (tag("", ANY, "</think>"), ["</think>", "so\n</think>"], ["so", "</think></think>"]),
    (tag("<a>", ANY, ""), ["<a>", "<a>x"], ["a"]),
    (
        tag("<a>", {"type": "sequence", "elements": [const("="), ANY]}, "\n"),
        ["<a>=x\n", "<a>=\n"],
        ["<a>x\n", "<a>=x", "<a>=\nx\n"],
    ),
    (tag("<a>", {"type": "or", "elements": [const("1"), ANY]}, "."), ["<a>1.", "<a>22."], ["<a>1..", "<a>1"]),
    (tag("<a>", {"type": "optional", "content": ANY}, "."), ["<a>.", "<a>x."], ["<a>x"]),
    (triggered(), ["", "hi", "<b>", "<a>1</a>", "x<ab>2</ab>y<a>1</a>"], ["<a", "<a>2</a>", "<ac", "x<a>1</a>y<a"]),
    (triggered(at_least_one=True), ["<a>1</a>", "<a>1</a>x<ab>2</ab>"], ["", "x", "x<a>1</a>"]),
    (triggered(stop_after_first=True), ["", "x", "x<a>1</a>"], ["<a>1</a>x", "<a>1</a><a>1</a>"]),
    (triggered(at_least_one=True, stop_after_first=True), ["<a>1</a>", "<ab>2</ab>"], ["", "x", "<a>1</a>x"]),
    (separated(), ["", "(1)", "(1); [x]; (1)"], ["(1);", "; (1)", "(1)(1)"]),
    (separated(at_least_one=True), ["[]", "(1); (1)"], ["", "(1); "]),
    (separated(stop_after_first=True), ["", "[]"], ["(1); (1)"]),
    (separated(at_least_one=True, stop_after_first=True), ["(1)"], ["", "(1); (1)"]),
    ({"type": "optional", "content": const("a")}, ["", "a"], ["aa"]),
    ({"type": "plus", "content": const("a")}, ["a", "aaa"], [""]),
    ({"type": "star", "content": const("ab")}, ["", "abab"], ["aba"]),
    ({"type": "repeat", "min": 1, "max": 2, "content": const("a")}, ["a", "aa"], ["", "aaa"]),
    ({"type": "repeat", "min": 2, "max": -1, "content": const("a")}, ["aa", "aaaa"], ["a"]),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_formats(case: int) -> None:
    form, allowed, refused = CASES[case]
    rules = rules_of(form)
    assert [text for text in allowed if not matches(rules, text)] == []
    assert [text for text in refused if matches(rules, text)] == []


# xgrammar writes JSON with free whitespace, and there a text that ends something may also stand in what it ends.
DIFFERENT = ("json_schema", "'end': ''", "'b</a>'", "'type': 'any_text'}, {'type': 'const_string'")


@pytest.mark.parametrize(
    "case", [i for i in range(len(CASES)) if not any(part in str(CASES[i][0]) for part in DIFFERENT)]
)
def test_xgrammar_reads_them_the_same_way(case: int) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    form, allowed, refused = CASES[case]
    vocabulary = xgrammar.TokenizerInfo([bytes([i]) for i in range(1, 256)] + [b"</s>"], stop_token_ids=[255])
    grammar = xgrammar.Grammar.from_structural_tag({"type": "structural_tag", "format": form})
    compiled = xgrammar.GrammarCompiler(vocabulary).compile_grammar(grammar)
    for text in [*allowed, *refused]:
        matcher = xgrammar.GrammarMatcher(compiled)
        taken = matcher.accept_string(text) and matcher.accept_token(255)
        assert bool(taken) == (text in allowed), text


def test_older_form() -> None:
    given = {
        "structures": [
            {"begin": "<f=get>", "schema": SCHEMA, "end": "</f>"},
            {"begin": "<f=no>", "schema": "{}", "end": "</f>"},
        ],
        "triggers": ["<f="],
    }
    rules = lower(StructuredOutput(structural_tag=given)).rules
    assert rules is not None
    assert matches(rules, 'so <f=get>{"city": "Rome"}</f> and <f=no>1</f>.') and matches(rules, "nothing")
    assert not matches(rules, 'so <f=get>{"days": 1}</f>') and not matches(rules, "<f=x>")


XML = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["°C", "°F", 3]},
        "when": {"type": "string", "format": "date"},
        "short": {"type": "string", "maxLength": 3},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "more": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
    "required": ["city", "days"],
}


def test_arguments_in_qwen_xml() -> None:
    rules = rules_of(schema(XML, "qwen_xml"))
    must = '<parameter=city>\nNew "York"\n<b>\n</parameter>\n'
    days = "<parameter=days>\n7\n</parameter>"
    assert matches(rules, must + days)
    assert matches(
        rules, f"{must}<parameter=unit>\n°C\n</parameter>\n<parameter=when>\n2024-01-02\n</parameter>\n{days}"
    )
    assert matches(rules, must + "<parameter=note>\nnull\n</parameter>\n" + days)
    assert matches(rules, must + days + '\n<parameter=more>\n{"x": "a\\nb"}\n</parameter>')
    for wrong in (
        days,
        must + "<parameter=days>\nseven\n</parameter>",
        must + "<parameter=unit>\nK\n</parameter>\n" + days,
        must + "<parameter=short>\nabcd\n</parameter>\n" + days,
        must + days + "\n<parameter=other>\n1\n</parameter>",
        days + "\n" + must.rstrip(),
    ):
        assert not matches(rules, wrong), wrong


def test_arguments_in_glm_xml() -> None:
    rules = rules_of(schema(XML, "glm_xml"))
    pairs = "<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n<arg_value>null</arg_value>"
    assert matches(rules, pairs) and not matches(rules, pairs.replace("null", "x"))


@pytest.mark.parametrize("style", ["qwen_xml", "glm_xml"])
def test_a_raw_argument_never_holds_its_own_end(style: str) -> None:
    """What a reader takes to be the end of a value is always that."""
    given = {
        "type": "object",
        "properties": {
            "free": {"type": "string"},
            "dots": {"type": "string", "pattern": ".*"},
            "least": {"type": "string", "minLength": 2},
            "kinds": {"type": ["string", "integer"]},
        },
        "required": ["free", "dots", "least", "kinds"],
    }
    rules, rng = rules_of(schema(given, style)), random.Random(1)
    reader = {
        "qwen_xml": re.compile(r"<parameter=(\w+)>\n.*?</parameter>\n?", re.DOTALL),
        "glm_xml": re.compile(r"<arg_key>(\w+)</arg_key>\n<arg_value>.*?</arg_value>\n?", re.DOTALL),
    }[style]
    for _ in range(200):
        text = sample(rules, rng)
        found = list(reader.finditer(text))
        assert [match[1] for match in found] == ["free", "dots", "least", "kinds"], text
        assert "".join(match[0] for match in found) == text
    value_end = "</parameter>" if style == "qwen_xml" else "</arg_value>"
    assert not matches(rules, sample(rules, rng).replace(value_end, f"x{value_end}{value_end}", 1))


def test_the_rules_of_several_schemas_do_not_mix() -> None:
    """Equal references in two schemas mean each its own target."""
    first = {"$ref": "#/$defs/x", "$defs": {"x": {"const": 1}}}
    second = {"$ref": "#/$defs/x", "$defs": {"x": {"const": 2}}}
    rules = rules_of({"type": "sequence", "elements": [schema(first), const(","), schema(second)]})
    assert matches(rules, "1,2") and not matches(rules, "1,1") and not matches(rules, "2,2")


REFUSED: list[tuple[Any, str]] = [
    ({"type": "structural_tag"}, 'needs a "format"'),
    ({"type": "structural_tag", "format": None}, r"\$\.format: a format needs"),
    ({"type": "structural_tag", "formal": ANY}, "did you mean 'format'"),
    ({"format": {"type": "token", "token": 1}}, "got 'token'"),
    ({"format": {"type": []}}, "a format needs"),
    ({"format": {"type": "const_string", "valeu": "x"}}, "did you mean 'value'"),
    ({"format": {"type": "const_string", "value": 1}}, "must be a string"),
    ({"format": const("a\0")}, "NUL"),
    ({"format": {"type": "any_text", "excludes": ["x"]}}, "'excludes' is not supported"),
    ({"format": {"type": "any_text", "max_tokens": 5}}, "'max_tokens' is not supported"),
    (
        {"format": {"type": "sequence", "elements": [ANY, {"type": "regex", "pattern": "a"}]}},
        "any_text here has no end",
    ),
    ({"format": {"type": "star", "content": ANY}}, r"\$\.format\.content: any_text here has no end"),
    ({"format": {"type": "sequence", "elements": []}}, "something in it"),
    ({"format": tag("<a>", ANY, [])}, "end must be"),
    ({"format": tag("<a>", ANY, ["x", 1])}, "end must be"),  # type: ignore[list-item]
    ({"format": {"type": "tag", "begin": {"type": "token"}, "content": ANY, "end": "x"}}, "begin must be a string"),
    ({"format": {**triggered(), "triggers": ["<a", "<ab"]}}, "part of each other"),
    ({"format": {**triggered(), "triggers": [""]}}, "part of each other"),
    ({"format": {**triggered(), "triggers": ["<b"]}}, "no trigger begins"),
    ({"format": {**triggered(), "triggers": ["<a", "(("]}}, "no tag begins"),
    ({"format": {**triggered(), "tags": [const("x")]}}, "must be of type tag"),
    ({"format": tag("", triggered(), "!")}, "put it last"),
    ({"format": {**triggered(), "at_least_one": "yes"}}, "true or false"),
    ({"format": {"type": "repeat", "min": 2, "max": 1, "content": ANY}}, "min must be"),
    ({"format": {"type": "repeat", "min": 0, "max": 10**9, "content": const("a")}}, "limit of 4,096"),
    ({"format": schema(SCHEMA, "yaml")}, "style must be"),
    ({"format": schema({"type": "array"}, "qwen_xml")}, "plain object schema"),
    ({"format": schema({"properties": {"a>b": {}}}, "qwen_xml")}, "cannot be the name"),
    ({"format": schema({"properties": {"a": {"enum": ["</arg_value>"]}}}, "glm_xml")}, "ends an argument"),
    ({"format": schema({"not": {}})}, r"at \$\.format\.json_schema at \$\.not: not is not supported"),
    ({"format": schema(None)}, "a schema is an object"),
    ({"structures": [], "triggers": ["x"]}, "something in it"),
    ({"structures": [{"begin": "<a>", "schema": "{", "end": ""}], "triggers": ["<"]}, "not JSON"),
    (
        {"structures": [{"begin": "<a>", "schema": {}, "end": "", "stop": 1}], "triggers": ["<"]},
        "'stop' is not supported",
    ),
    ({"format": {"type": "sequence", "elements": [{}], 3: object()}}, "plain JSON data"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refusals_name_the_place(case: int) -> None:
    given, message = REFUSED[case]
    with pytest.raises(InvalidRequest, match=message):
        lower(StructuredOutput(structural_tag=given))


def test_deep_tags_are_refused() -> None:
    form: Any = const("a")
    for _ in range(2_000):
        form = {"type": "optional", "content": form}
    with pytest.raises(InvalidRequest, match="nested more than 64"):
        rules_of(form)
