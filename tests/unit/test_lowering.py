"""What a schema is lowered to: only texts that validate, and all that its caps promise.

`sample` and `matches` read the rules without any backend; `jsonschema` judges values and knows nothing of ours.
"""

import dataclasses
import datetime
import decimal
import enum
import itertools
import json
import math
import random
import typing
from typing import Any

import jsonschema
import pydantic
import pytest
import typing_extensions
from pydantic import v1

from embedllm.errors import InvalidRequest
from embedllm.structured import caps
from embedllm.structured.backend import Shape
from embedllm.structured.expressions import Rules
from embedllm.structured.lower import key_of, lower, schema_of
from embedllm.structured.strings import FORMATS
from embedllm.structured_output import StructuredOutput
from tests.unit.expressions import matches, sample
from tests.unit.schemas import random_schema, random_value
from tests.unit.test_lowering_regex import num_nodes

Validator = jsonschema.Draft202012Validator


def lowered(schema: Any) -> Rules:
    shape = lower(StructuredOutput(json_schema=schema))
    assert shape.rules is not None
    return shape.rules


def allows(schema: Any, value: Any) -> bool:
    return matches(lowered(schema), json.dumps(value, ensure_ascii=False))


def validator(schema: Any) -> jsonschema.protocols.Validator:
    return Validator(schema, format_checker=Validator.FORMAT_CHECKER)


# ---- sound and complete ----------------------------------------------------------------------------------------


def check_schema(seed: int, num_texts: int) -> None:
    schema = random_schema(seed)
    rules, judge, rng = lowered(schema), validator(schema), random.Random(seed)
    for _ in range(num_texts):
        text = sample(rules, rng)
        value = json.loads(text)
        judge.validate(value)
        if len(text) < 1_000:
            assert matches(rules, text)
    for _ in range(num_texts):
        value = random_value(schema, schema, rng)
        judge.validate(value)  # else the test itself is wrong
        text = json.dumps(value, ensure_ascii=False)
        assert matches(rules, text), text
        changed = rng.randrange(len(text) + 1)
        wrong = text[:changed] + rng.choice('x"}],{[ ') + text[changed + 1 :]
        if matches(rules, wrong):
            judge.validate(json.loads(wrong))


@pytest.mark.parametrize("seeds", range(0, 300, 50))
def test_random_schemas(seeds: int) -> None:
    for seed in range(seeds, seeds + 50):
        check_schema(seed, num_texts=3)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", range(300, 2_000, 100))
def test_more_random_schemas(seeds: int) -> None:
    for seed in range(seeds, seeds + 100):
        check_schema(seed, num_texts=4)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_what_validators_accept(name: str) -> None:
    schema = {"type": "string", "format": name}
    rules, judge, rng = lowered(schema), validator(schema), random.Random(7)
    for _ in range(300):
        judge.validate(json.loads(sample(rules, rng)))


def test_dates_know_months_and_leap_years() -> None:
    rules = lowered({"format": "date", "type": "string"})
    for year in (1, 4, 100, 400, 1900, 1996, 1999, 2000, 2023, 2024, 2100, 9999):
        for month, day in itertools.product(range(14), range(33)):
            text = f"{year:04}-{month:02}-{day:02}"
            try:
                datetime.date.fromisoformat(text)
                is_date = True
            except ValueError:
                is_date = False
            assert matches(rules, f'"{text}"') == is_date, text


@pytest.mark.parametrize(
    "low,high", [(0, 9), (-3, 4), (7, 7), (98, 1_203), (-1_001, -99), (0, 0), (-250, 1_050), (1, 1_000)]
)
@pytest.mark.parametrize("step", [1, 2, 3, 10, 12])
def test_integer_ranges_exactly(low: int, high: int, step: int) -> None:
    schema = {"type": "integer", "minimum": low, "maximum": high, "multipleOf": step}
    expected = [value for value in range(low, high + 1) if value % step == 0]
    if not expected:
        with pytest.raises(InvalidRequest, match=r"within the bounds|no finite value"):
            lowered(schema)
        return
    rules = lowered(schema)
    assert [value for value in range(low - 1_500, high + 1_500) if matches(rules, str(value))] == expected
    assert not any(matches(rules, text) for text in ("-0", "00", "01", "", "-", "1.0", "+1"))


def test_integers_without_bounds_and_with_large_ones() -> None:
    assert allows({"type": "integer"}, caps.INTEGER) and allows({"type": "integer"}, -caps.INTEGER)
    assert not allows({"type": "integer"}, caps.INTEGER + 1)
    int64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert allows(int64, 2**63 - 1) and allows(int64, -(2**63)) and allows(int64, 10**18 + 7)
    assert not allows(int64, 2**63) and not allows(int64, -(2**63) - 1)
    assert allows({"type": "integer", "minimum": 10**20}, 10**20) and not allows(
        {"type": "integer", "minimum": 10**20}, 0
    )
    assert allows({"type": "integer", "exclusiveMinimum": 2.5, "maximum": 3.9}, 3)
    assert not allows({"type": "integer", "exclusiveMaximum": 3}, 3) and allows({"type": "integer", "maximum": 3.0}, 3)
    assert allows({"type": "integer", "multipleOf": 7}, 7 * 10**13) and not allows(
        {"type": "integer", "multipleOf": 7}, 10**13
    )


BOUNDS = [0, 1, -1, 0.1, 99.99, 100, -0.5, 3.0000001, 12.345, -273.15, 1e-9, 123456789012345]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("key", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
def test_decimals_near_a_bound(bound: float, key: str) -> None:
    """Every text is judged as a reader sees it, as a float; all short decimals around the bound are tried."""
    schema = {"type": "number", key: bound}
    rules, judge = lowered(schema), validator(schema)
    exact = decimal.Decimal(repr(bound))
    for digits in range(16):
        for steps in (-11, -9, -2, -1, 0, 1, 2, 9, 11):
            with decimal.localcontext(prec=60):
                near = (exact + decimal.Decimal(steps).scaleb(-digits)).quantize(decimal.Decimal(1).scaleb(-digits))
            for text in (f"{near:f}", f"{near:f}0", f"{near:f}9"):
                if "." in text and len(text.split(".")[1]) > caps.FRACTION_DIGITS:
                    continue
                if "." not in text and text.lstrip("-") != str(abs(int(text))):
                    continue
                taken = matches(rules, text)
                if taken:
                    judge.validate(json.loads(text))
                # What is lost lies closer to an excluded bound than floats can tell.
                elif judge.is_valid(json.loads(text)) and abs(decimal.Decimal(text)) <= caps.INTEGER:
                    assert abs(decimal.Decimal(text) - exact) <= 2 * decimal.Decimal(math.ulp(bound)), text


def test_decimals_exhaustively_in_a_small_range() -> None:
    schema = {"type": "number", "minimum": -0.25, "exclusiveMaximum": 1.5}
    rules = lowered(schema)
    for thousandths in range(-400, 1_700):
        for digits in (0, 1, 2, 3):
            if thousandths % 10 ** (3 - digits) == 0:
                text = f"{decimal.Decimal(thousandths) / 1000:.{digits}f}"
                assert matches(rules, text) == (-250 <= thousandths < 1_500), text
    assert not any(matches(rules, text) for text in (".5", "1.", "01", "1e0", "+1", "0." + "1" * 16))


# ---- what each keyword means ------------------------------------------------------------------------------------

OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {"type": "boolean"}},
    "required": ["b"],
}
MEANINGS: list[tuple[Any, list[str], list[str]]] = [
    (
        OBJECT,
        ['{"b": null}', '{"a": 1, "b": null, "c": true}'],
        ["{}", '{"b": null, "a": 1}', '{"b":null}', '{"b": null, "d": 1}'],
    ),
    ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
    ({"type": "object"}, ["{}", '{"a": [1, {"b": "c"}]}'], ["[]"]),
    ({}, ["null", '"x"', '[[[["x"]]]]', '{"a": {"b": {"c": {"d": 1}}}}'], ["", "[[[[[1]]]]]"]),
    (
        {"properties": {"name": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        ['{"name": null, "nam": 1, "names": 2, "": 3, "x\\"": 4}', '{"name2": 1}', "{}"],
        ['{"name": 1}', '{"x": 1, "name": 2}', '{"x": "1"}'],
    ),
    (
        {"required": ["x"], "properties": {"a": {"type": "null"}}},
        ['{"a": null, "x": [1]}', '{"x": 1}'],
        ['{"a": null}'],
    ),
    ({"additionalProperties": {"type": "null"}, "maxProperties": 1}, ["{}", '{"a": null}'], ['{"a": null, "b": null}']),
    ({"additionalProperties": {"type": "null"}, "minProperties": 1}, ['{"a": null}'], ["{}"]),
    ({**OBJECT, "required": [], "minProperties": 1}, ['{"a": 1}', '{"c": true}'], ["{}"]),
    ({"type": "object", "properties": {"a": False, "b": {"type": "null"}}}, ["{}", '{"b": null}'], ['{"a": 1}']),
    (
        {"type": "array", "items": {"type": "null"}, "maxItems": 2},
        ["[]", "[null, null]"],
        ["[null,null]", "[null, null, null]"],
    ),
    ({"type": "array", "items": {"type": "null"}, "minItems": 20}, [f"[{', '.join(['null'] * 20)}]"], ["[null]"]),
    (
        {"type": "array", "items": {"type": "null"}},
        [f"[{', '.join(['null'] * 16)}]"],
        [f"[{', '.join(['null'] * 17)}]"],
    ),
    ({"prefixItems": [{"const": 1}, {"const": 2}]}, ["[]", "[1]", "[1, 2]"], ["[2]", "[1, 2, 3]"]),
    ({"prefixItems": [{"const": 1}, {"const": 2}], "minItems": 2}, ["[1, 2]"], ["[]", "[1]"]),
    (
        {"prefixItems": [{"const": 1}], "items": {"const": 2}, "maxItems": 3},
        ["[]", "[1, 2, 2]"],
        ["[2]", "[1, 2, 2, 2]"],
    ),
    (
        {"items": [{"const": 1}], "additionalItems": {"const": 2}, "minItems": 2},
        ["[1, 2]", "[1, 2, 2]"],
        ["[1]", "[2, 2]"],
    ),
    ({"type": "array", "items": False}, ["[]"], ["[1]"]),
    ({"items": {"enum": ["a", "b", "c"]}, "uniqueItems": True}, ["[]", '["a", "c"]'], ['["a", "a"]', '["c", "a"]']),
    ({"items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 1}, ['["b"]'], ["[]"]),
    ({"items": {"type": "null"}, "uniqueItems": True, "maxItems": 1}, ["[]", "[null]"], ["[null, null]"]),
    ({"enum": ["a", 1, 1.0, None, True, {"k": [1]}]}, ['"a"', "null", "true", '{"k": [1]}'], ['{"k":[1]}', "false"]),
    ({"enum": ["a", 1, None], "type": ["string", "null"]}, ['"a"', "null"], ["1"]),
    ({"const": 'q"\n'}, ['"q\\"\\n"'], ['"q"']),
    ({"type": ["integer", "number"], "minimum": 1}, ["1", "1.5"], ["0"]),
    ({"minLength": 1, "maxLength": 2}, ['"a"', '"😀\\n"'], ['""', '"abc"', "1"]),
    ({"type": "string", "maxLength": 0}, ['""'], ['"a"']),
    (
        {"type": "string"},
        [f'"{"x" * 256}"', '"\\u0000\x7f\\u001f"'],
        [f'"{"x" * 257}"', '"\n"', '"\\u0041"', '"\\u001F"', '"\\/"'],
    ),
    ({"type": "string", "pattern": "^a+$", "maxLength": 4, "minLength": 2}, ['"aa"', '"aaaa"'], ['"a"', '"aaaaa"']),
    ({"type": "string", "pattern": "^#[a-f]{3}$", "maxLength": 10}, ['"#abc"'], ['"abc"']),
    ({"type": "string", "pattern": '"'}, ['"x\\"y"', '"\\""'], ['"x"']),
    ({"type": "string", "format": "not-a-format"}, ['"x"'], []),
    ({"anyOf": [{"type": "null"}, False, {"type": "string"}]}, ["null", '"x"'], ["1"]),
    (
        {
            "type": "object",
            "properties": {"a": {"const": 1}, "b": {"const": 2}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ['{"a": 1}', '{"b": 2}', '{"a": 1, "b": 2}'],
        ["{}"],
    ),
    (
        {
            "allOf": [
                {"properties": {"a": {"type": "number"}}},
                {"properties": {"a": {"maximum": 5}}, "required": ["a"]},
            ]
        },
        ['{"a": 5}', '{"a": 1.5}'],
        ['{"a": 6}', "{}", '{"a": "x"}'],
    ),
    ({"allOf": [{"type": ["string", "null"]}, {"type": ["null", "integer"]}]}, ["null"], ['"x"', "1"]),
    ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [3.0, 2]}]}, ["2", "3"], ["1"]),
    ({"allOf": [{"minimum": 3}, {"minimum": 5, "type": "integer"}]}, ["5"], ["4"]),
    (
        {
            "allOf": [
                {"properties": {"a": {"const": 1}}, "additionalProperties": False},
                {"properties": {"b": {"const": 2}}},
            ]
        },
        ["{}", '{"a": 1}'],
        ['{"b": 2}', '{"a": 1, "b": 2}'],
    ),
    (
        {"$ref": "#/$defs/s", "minLength": 2, "$defs": {"s": {"type": "string", "maxLength": 3}}},
        ['"ab"', '"abc"'],
        ['"a"', '"abcd"'],
    ),
    ({"$ref": "#/definitions/a%20b", "definitions": {"a b": {"const": 1}}}, ["1"], ["2"]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"x"'], ["1.5"]),
    ({"oneOf": [{"enum": [1, 2]}, {"enum": [3]}]}, ["1", "3"], ["4"]),
    (
        {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "discriminator": {"propertyName": "t"},
            "$defs": {
                "a": {"type": "object", "properties": {"t": {"const": "a"}, "x": {"type": "null"}}, "required": ["t"]},
                "b": {"type": "object", "properties": {"t": {"const": "b"}, "y": {"type": "null"}}},
            },
        },
        ['{"t": "a", "x": null}', '{"t": "b"}'],
        ['{"t": "b", "x": null}', "{}", '{"y": null}'],  # those without t would match both, or say less than they could
    ),
    (
        {"properties": {"v": {"const": 1}, "next": {"$ref": "#"}}, "required": ["v"]},
        ['{"v": 1}', '{"v": 1, "next": {"v": 1, "next": {"v": 1}}}'],
        ['{"next": {"v": 1}}', '{"v": 1, "next": {}}'],
    ),
    (
        {
            "properties": {"a": {"const": 1}, "never": {"$ref": "#/$defs/n"}},
            "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
        },
        ["{}", '{"a": 1}'],
        ['{"never": '],
    ),
]


@pytest.mark.parametrize("case", range(len(MEANINGS)))
def test_meaning(case: int) -> None:
    schema, allowed, refused = MEANINGS[case]
    rules = lowered(schema)
    assert [text for text in allowed if not matches(rules, text)] == []
    assert [text for text in refused if matches(rules, text)] == []
    older = isinstance(schema, dict) and isinstance(schema.get("items"), list)
    judge, rng = jsonschema.Draft7Validator(schema) if older else validator(schema), random.Random(case)
    for _ in range(30):
        judge.validate(json.loads(sample(rules, rng)))


def test_a_part_that_can_never_end_is_left_out() -> None:
    """No choice in the rules leads where no text can end: a model would be trapped there."""
    schema, _, _ = MEANINGS[-1]
    assert "never" not in str(lowered(schema))


# ---- what is refused --------------------------------------------------------------------------------------------

REFUSED: list[tuple[Any, str]] = [
    *(
        ({"properties": {"x": {key: {}}}}, rf"\$\.properties\.x\.{key}: {key} is not supported")
        for key in (
            "not",
            "if",
            "contains",
            "patternProperties",
            "propertyNames",
            "dependentRequired",
            "dependencies",
            "unevaluatedProperties",
        )
    ),
    ({"type": "object", "properties": {"x": {"type": "nosuch"}}}, r"\$\.properties\.x: type must be .*'nosuch'"),
    ({"type": []}, "an empty list"),
    ({"type": {"a": 1}}, "type must be"),
    ({"enum": []}, "something in it"),
    ({"enum": [1], "type": "string"}, "no value is left"),
    ({"enum": ["a"], "minLength": 1}, r"\$\.minLength: minLength beside enum"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "within the bounds"),
    ({"type": "number", "minimum": 1e300}, "within the bounds"),
    ({"type": "integer", "minimum": "3"}, "must be a number"),
    ({"type": "integer", "exclusiveMinimum": True, "minimum": 3}, "must be a number"),
    ({"type": "integer", "multipleOf": 97}, "the limit is 64"),
    ({"type": "number", "multipleOf": 0.01}, "whole number"),
    ({"type": "integer", "multipleOf": 0}, "whole number"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 is above maxLength 2"),
    ({"type": "string", "minLength": -1}, "whole number"),
    ({"type": "string", "minLength": 10**6}, "limit is 4,096"),
    ({"type": "string", "pattern": "^(ab)+$", "maxLength": 7}, "let the pattern count"),
    ({"type": "string", "pattern": "("}, "never closed"),
    ({"type": "string", "pattern": "a", "format": "date"}, "beside format"),
    ({"type": "string", "pattern": 3}, "pattern must be a string"),
    ({"type": "array", "minItems": 3, "items": False}, "no value can match"),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems is supported where"),
    ({"prefixItems": [{}] * 80, "minItems": 3}, r"\$\.prefixItems: 77 of them may be left out, the limit is 64"),
    ({"type": "array", "items": 3}, "a schema is an object"),
    ({"type": "object", "properties": []}, "properties must be an object"),
    ({"type": "object", "required": "a"}, "required must be a list"),
    ({"properties": {"a": False}, "required": ["a"]}, r"\$\.properties\.a: it is required, and false"),
    ({"properties": {"a": {}}, "required": ["b"], "additionalProperties": False}, r"\$\.properties\.b: it is required"),
    ({"properties": {"a": {}}, "minProperties": 2}, "minProperties 2"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "maxProperties 1"),
    ({"properties": {}, "minProperties": 1}, "no value can match"),
    ({"anyOf": []}, "something in it"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "options 0 and 1 may both match"),
    ({"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}]}, "may both match"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern is given more than once"),
    ({"allOf": [{"prefixItems": [{}]}, {"items": {"type": "null"}}]}, "prefixItems beside the items"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "no finite value"),
    ({"$ref": "https://example.com/x"}, "not within this schema"),
    ({"$ref": "#/$defs/x"}, "points at nothing"),
    ({"$ref": "#anchor"}, "not within this schema"),
    ({"$ref": 3}, "not within this schema"),
    ({"$ref": "#"}, "leads back to itself"),
    ({"$ref": "#", "type": "object"}, "leads back to itself"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads back to itself"),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}},
        "leads back to itself",
    ),
    ({"properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "no finite value"),
    ({"properties": {"a": {"$id": "other", "$ref": "#"}}}, r"\$id inside another"),
    ({"properties": {"\ud800": {}}}, "plain JSON data"),
    ({"const": float("nan")}, "plain JSON data"),
    ({"const": {1, 2}}, "plain JSON data"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refusals_name_the_place(case: int) -> None:
    schema, message = REFUSED[case]
    with pytest.raises(InvalidRequest, match=message) as caught:
        lowered(schema)
    assert str(caught.value).startswith("json_schema")


def nested(depth: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def circular() -> Any:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


def chain(length: int, **beside: Any) -> Any:
    definitions: Any = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **beside} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "string"}}}


HOSTILE: dict[str, tuple[Any, str]] = {
    "deep": (nested(10_000), "nested more than 64"),
    "circular data": (circular(), "plain JSON data|nested"),
    "enum": ({"enum": list(range(100_000))}, "limit is"),
    "long enum": ({"enum": list(range(6_000))}, "6,000 entries, the limit is 5,000"),
    "large": ({"description": "x" * 300_000}, "the limit is 262,144"),
    "many": ({"properties": {f"p{i}": {} for i in range(10_000)}}, "the limit is 10,000"),
    "merges": (chain(1_000, minLength=1), "more than 64 schemas"),
    "options": ({"oneOf": [{"const": i} for i in range(65)]}, "65 options, the limit is 64"),
    "repeats": ({"type": "string", "pattern": "a{1,1000000000}"}, "limit of 4,096"),
    "wide": (
        {
            "properties": {f"p{i}": {"enum": list(range(400))} for i in range(20)},
            "anyOf": [{"required": [f"p{i}"]} for i in range(20)],
        },
        "50,000",
    ),
    "doubling": (
        {
            "$defs": {
                f"d{i}": {
                    "anyOf": [
                        {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"properties": {f"a{i}": {"const": 1}}}]},
                        {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"properties": {f"b{i}": {"const": 1}}}]},
                    ]
                }
                for i in range(40)
            }
            | {"d40": {"type": "object"}},
            "$ref": "#/$defs/d0",
        },
        "anyOf is given|50,000|more than",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused(name: str) -> None:
    schema, message = HOSTILE[name]
    with pytest.raises(InvalidRequest, match=message):
        lowered(schema)


BOUNDED: dict[str, Any] = {
    "optional properties": {"properties": {f"p{i}": {"type": "null"} for i in range(1_000)}},
    "names with a long prefix": {
        "properties": {"x" * 1_000 + str(i): {} for i in range(200)},
        "additionalProperties": True,
    },
    "prefix items": {"prefixItems": [{"type": "null"} for _ in range(2_000)], "minItems": 1_950},
    "nested": nested(60),
    "nested optionals": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"properties": {f"p{i}": {"$ref": "#/$defs/n"} for i in range(100)}}},
    },
    "enum of long texts": {"enum": ["x" * 50 + str(i) for i in range(4_000)]},
    "nested arrays of long strings": {
        "items": {"items": {"items": {"maxLength": 4_000}, "maxItems": 4_000}, "maxItems": 10**9}
    },
    "pattern": {"type": "string", "pattern": "(a+)+b"},
}


@pytest.mark.parametrize("name", BOUNDED)
def test_large_schemas_stay_small(name: str) -> None:
    rules = lowered(BOUNDED[name])
    assert sum(map(num_nodes, rules.values())) <= caps.MAX_NODES
    value = json.loads(sample(rules, random.Random(2), max_depth=3))
    validator(BOUNDED[name]).validate(value)


def test_a_chain_of_references_is_one_rule() -> None:
    rules = lowered(chain(3_000))
    assert matches(rules, '"x"') and len(rules) < 10


# ---- other kinds, types and keys --------------------------------------------------------------------------------


def test_json_object() -> None:
    rules = lower(StructuredOutput(json_object=True)).rules
    assert rules is not None
    assert matches(rules, "{}") and matches(rules, '{"a": {"b": {"c": {"d": 1}}}, "e": [true, -1.5, "x\\n"]}')
    assert not matches(rules, "[]") and not matches(rules, '{"a": {"b": {"c": {"d": {"e": 1}}}}}')
    rng = random.Random(5)
    for _ in range(50):
        assert isinstance(json.loads(sample(rules, rng)), dict)


def test_choice() -> None:
    rules = lower(StructuredOutput(choice=["yes", 'n"o\n', "yes"])).rules
    assert rules is not None
    assert matches(rules, "yes") and matches(rules, 'n"o\n') and not matches(rules, "") and not matches(rules, "ye")
    for texts, message in (
        (["a\0"], "NUL"),
        (["\ud800"], "surrogate"),
        (list(map(str, range(6_000))), "5,000"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            lower(StructuredOutput(choice=texts))


def test_grammars_go_on_as_they_are() -> None:
    assert (
        lower(StructuredOutput(grammar='root ::= "a"')).__dict__
        == Shape(source='root ::= "a"', dialect="gbnf").__dict__
    )
    assert lower(StructuredOutput(grammar='start: "a"')).dialect == "lark"


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Item(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    color: Color = Color.RED
    price: float = pydantic.Field(default=1.0, ge=0)
    when: datetime.date | None = None
    parts: list["Item"] = []
    tags: dict[str, int] = {}
    pair: tuple[int, typing.Literal["a", "b"]] | None = pydantic.Field(default=None, alias="thePair")


class Old(v1.BaseModel):
    a: int
    b: str | None = None


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Inner(typing.TypedDict, total=False):
    when: datetime.date


class Outer(typing.TypedDict):
    inner: list[Inner] | None
    rest: typing_extensions.NotRequired[typing.Annotated[dict[str, Inner], "said of it"]]


GIVEN: list[tuple[Any, str, Any]] = [
    (Item, '{"name": "x", "color": "blue", "thePair": [1, "b"]}', Item(name="x", color=Color.BLUE, thePair=(1, "b"))),
    (Old, '{"a": 1, "b": "c"}', Old(a=1, b="c")),
    (Point, '{"x": 1.5}', Point(1.5)),
    (Outer, '{"inner": [{"when": "2024-02-29"}, {}]}', {"inner": [{"when": "2024-02-29"}, {}]}),
    (list[int], "[1, 2]", [1, 2]),
    (int, "7", 7),
    (Color, '"red"', Color.RED),
    (typing.Literal["a", 1], "1", 1),
    (Item | int, "3", 3),
    ({"type": "integer"}, "3", 3),
]


@pytest.mark.parametrize("case", range(len(GIVEN)))
def test_types_become_schemas_and_answers_their_objects(case: int) -> None:
    given, text, expected = GIVEN[case]
    schema, parse = schema_of(given)
    rules = lowered(given)
    assert matches(rules, text)
    assert parse(text) == expected and type(parse(text)) is type(expected)
    judge, rng = validator(schema), random.Random(case)
    for _ in range(40):
        drawn = sample(rules, rng, max_depth=6)
        judge.validate(json.loads(drawn))
        parse(drawn)


@pytest.mark.parametrize("given", ["{}", None, True, 3, [1], lambda x: x, len, object(), typing.Callable[[int], int]])
def test_what_is_no_type_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match="json_schema: "):
        schema_of(given)


def test_decimals_of_pydantic() -> None:
    """Its pattern has a look-ahead, which is refused elsewhere."""
    pattern = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
    schema = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": pattern}]}
    rules, rng = lowered(schema), random.Random(0)
    assert matches(rules, '"-12.50"') and matches(rules, "7") and not matches(rules, '"."') and not matches(rules, '""')
    for _ in range(100):
        text = sample(rules, rng)
        validator(schema).validate(json.loads(text))
        decimal.Decimal(str(json.loads(text)))


def test_a_schema_is_copied_when_it_is_given() -> None:
    given = {"type": "object", "properties": {"a": {}}}
    schema, _ = schema_of(given)
    given["properties"].clear()  # type: ignore[attr-defined]
    assert schema["properties"] == {"a": {}}


def test_keys_tell_shapes_apart() -> None:
    def key(**asked: Any) -> str:
        return key_of(StructuredOutput(**asked))

    one, other = {"a": {"type": "null"}}, {"b": {"type": "null"}}
    asked: list[dict[str, Any]] = [
        {"json_schema": {"properties": {**one, **other}}},
        {"json_schema": {"properties": {**other, **one}}},
        {"json_object": True},
        {"regex": "a"},
        {"choice": ["a"]},
        {"choice": ["a", "b"]},
        {"choice": ["b", "a"]},
        {"grammar": "root ::= a"},
        {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}},
        {"json_schema": Item},
    ]
    keys = [key(**each) for each in asked]
    assert len(set(keys)) == len(keys)
    assert [key(**json.loads(json.dumps(each))) for each in asked[:-1]] == keys[:-1]
    assert key(json_schema=schema_of(Item)[0]) == keys[-1]
    with pytest.raises(InvalidRequest, match="nested"):
        key(json_schema=nested(200))
