"""The parser of answers: every family, cut in every way, and what hostile models write."""

import itertools
import json
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedllm.chat.calls import cast, new_id
from embedllm.chat.families import FAMILIES, HARMONY, HERMES, LLAMA, MISTRAL, QWEN_XML, Family, Reasoning
from embedllm.chat.parse import MAX_CALL, CallParser
from tests.unit.chat_templates import Call, written

THINK = Reasoning("<think>", "</think>", r"\n{0,2}")
BY_NAME = {family.name: family for family in FAMILIES}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"type": "object"},
            "tags": {"type": "array"},
        },
    },
    "now": {"type": "object", "properties": {}},
}
ONE: list[Call] = [("get_weather", {"city": "Paris", "days": 3})]
TWO: list[Call] = [*ONE, ("now", {})]
ZERO: list[Call] = [("now", {})]
HARD: list[Call] = [
    (
        "get_weather",
        {
            "city": 'São "Paulo" \\ </tool_call> 👍🏽\n{[ <|call|>',
            "days": -1,
            "where": {"a": [1, {"b": None}], "ü": "}"},
            "tags": ["x", 1.5, True, []],
        },
    )
]


Parts = tuple[str, str, list[Call]]


def parsed(pieces: list[str], family: Family | None, reasoning: Reasoning | None = None, opened: bool = False) -> Parts:
    parser = CallParser(family, SCHEMAS if family else {}, reasoning, opened)
    said = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    calls = [(call.name, call.arguments) for part in said for call in part.tool_calls]
    return "".join(part.text for part in said), "".join(part.reasoning for part in said), calls


def whole(text: str, family: Family | None, reasoning: Reasoning | None = None, opened: bool = False) -> Parts:
    """The parts of a text, the same however it is cut: at each single place, and into single characters."""
    found = parsed([text], family, reasoning, opened)
    for cut in range(1, len(text)):
        assert parsed([text[:cut], text[cut:]], family, reasoning, opened) == found, (text[:cut], text[cut:])
    assert parsed(list(text), family, reasoning, opened) == found
    return found


NAMES = sorted(BY_NAME)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("calls", [ONE, TWO, ZERO, HARD], ids=["one", "two", "zero", "hard"])
def test_calls_of_every_family(name: str, calls: list[Call]) -> None:
    family = BY_NAME[name]
    if name in ("glm", "qwen_xml") and calls is HARD:  # a raw value must not hold its own end
        assert "</parameter>" not in str(calls)
    assert whole(written(name, calls), family, family.reasoning) == ("", "", calls)


@pytest.mark.parametrize("name", NAMES)
def test_text_around_calls(name: str) -> None:
    family, text = BY_NAME[name], written(name, TWO)
    if family.whole:  # a call begins the answer, or it is none
        assert whole(f"Let me see: {text}", family) == (f"Let me see: {text}", "", [])
        assert whole(f"\n {text} Done.\n", family) == (" Done.\n", "", TWO)
        assert whole(f"Look.<|python_tag|>{text}", family) == ("Look.", "", TWO)
        return
    before = family.lead or ""
    reasoning = family.reasoning
    assert whole(f"{before}Let me see.\n\n{text}\n", family, reasoning) == ("Let me see.", "", TWO)
    assert whole(f"{before} A \n{text}\nB \n", family, reasoning) == (" A \n\nB \n", "", TWO)
    assert whole(f"\n{text} \n {text}", family, reasoning) == ("", "", [*TWO, *TWO])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "harmony"])
@pytest.mark.parametrize("opened", [True, False])
def test_reasoning_before_calls(name: str, opened: bool) -> None:
    thought = "\nIs it <tool_call> or { or [TOOL_CALLS]?\n\nYes <thinking>.\n"
    text = ("" if opened else "<think>") + thought + "</think>\n\n" + written(name, TWO)
    assert whole(text, BY_NAME[name], THINK, opened) == ("", thought.strip("\n"), TWO)


def test_reasoning_and_text() -> None:
    def told(text: str, opened: bool = False) -> Parts:
        return whole(text, None, THINK, opened)

    assert told("<think>\n\n</think>\n\n  Hi </think> \n") == ("  Hi </think> \n", "", [])
    assert told("<think>a</think>b") == ("b", "a", [])
    assert told(" \n<think>a\n\nb\n</think>\n\nc") == ("c", "a\n\nb", [])
    assert told("a\n\n</think>\n\nb", opened=True) == ("b", "a", [])
    assert told("never closed </thin", opened=True) == ("", "never closed </thin", [])
    assert told("<think>never closed\n") == ("", "never closed", [])
    assert told("no thought <think>at</think> all\n") == ("no thought <think>at</think> all\n", "", [])
    assert told("<think") == ("<think", "", [])
    assert told("") == ("", "", [])
    assert told("  \n ") == ("  \n ", "", [])
    assert told("<think>a</think><think>b</think>") == ("<think>b</think>", "a", [])
    assert whole("<think>a</think>\n<think>b", LLAMA, THINK) == ("<think>b", "a", [])
    call = written("hermes", ZERO)
    assert whole(f"<think>a</think>{call}\nb", HERMES, THINK) == ("\nb", "a", ZERO)


def test_harmony_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.\nTools?<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look."
        "<|end|><|start|>assistant<|channel|>analysis<|message|> More.<|end|><|start|>assistant to=functions.now"
        "<|channel|>commentary json<|message|>{}"
    )
    assert whole(text, HARMONY, HARMONY.reasoning) == ("Let me look.", "Hm.\nTools? More.", [("now", {})])
    twice = "<|channel|>analysis<|message|>a\n<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
    assert whole(twice, HARMONY, HARMONY.reasoning) == ("", "ab", [])
    assert whole("<|channel|>analysis to=functions.now code<|message|>{}", HARMONY, HARMONY.reasoning) == ("", "", ZERO)
    assert whole("<|start|>assistant<|message|>Hi", HARMONY, HARMONY.reasoning) == ("Hi", "", [])
    final = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello!\n"
    assert whole(final, HARMONY, HARMONY.reasoning) == ("Hello!\n", "Hm.", [])


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "now"}',
        '{"name": "now", "arguments": null}',
        '{"name": "now", "arguments": ""}',
        '{"name": "now", "arguments": "{}"}',
        '{"name": "now", "parameters": {}}',
        '{"arguments": {}, "name": "now", "id": 7}',
        '  {"name":"now","arguments":{ } }  ',
    ],
)
def test_spellings_of_no_arguments(call: str) -> None:
    assert whole(f"<tool_call>{call}</tool_call>", HERMES) == ("", "", ZERO)
    assert whole(f"<tool_call>{call}", HERMES) == ("", "", ZERO)  # the end marker did not come


def test_arguments_in_a_string_are_read_once() -> None:
    text = json.dumps({"name": "get_weather", "arguments": json.dumps({"city": '"{}"'})})
    assert whole(f"<tool_call>{text}</tool_call>", HERMES) == ("", "", [("get_weather", {"city": '"{}"'})])
    twice = json.dumps({"name": "now", "arguments": json.dumps(json.dumps({}))})
    assert whole(f"<tool_call>{twice}</tool_call>", HERMES)[2] == []
    assert whole("[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}", MISTRAL) == ("", "", ZERO)
    assert whole("[TOOL_CALLS]now", MISTRAL) == ("", "", ZERO)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>\n{",
        "use the <tool_call> tag, then </tool_call>",
        '<tool_call>{"name": "now"</tool_call> and more',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": 3}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "now"}}</tool_call>',
        '<tool_call>{"name": "now"} x</tool_call>',
        '<tool_call>{"name": "no\nw"}</tool_call>',
        '<tool_call>{"name": "now\\</tool_call>',
        '<tool_call>[{"name": "now"}]</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": 1' + "}" * 3 + "</tool_call>\n",
        "<tool_call>{}</tool_call> \n\n x",
        " \n<tool_call>{'name': 'now'}</tool_call>",
    ],
)
def test_what_is_malformed_or_unknown_stays_text(text: str) -> None:
    assert whole(text, HERMES) == (text, "", [])


def test_a_good_call_after_a_bad_one() -> None:
    good = written("hermes", ZERO)
    bad = '<tool_call>{"name": "other"}</tool_call>'
    assert whole(f"{bad}\n{good}", HERMES) == (bad, "", ZERO)
    assert whole(f"<tool_call>{good}", HERMES) == ("<tool_call>", "", ZERO)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=now>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>Paris</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\nParis\n</function>\n</tool_call>",
        "<tool_call>\n<function=other>\n</function>\n</tool_call>",
        "<tool_call>\nnow()\n</tool_call>",
        "<tool_call>\n<function=now>\nx <parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_malformed_xml_stays_text(text: str) -> None:
    assert whole(text, QWEN_XML) == (text, "", [])


def test_a_raw_value_keeps_its_own_whitespace() -> None:
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\n\n  x \n\n</parameter>\n</function>\n</tool_call>"
    assert whole(text, QWEN_XML) == ("", "", [("get_weather", {"city": "\n  x \n"})])


def test_llama_answers_in_json_are_text() -> None:
    for text in ('{"name": "Bob", "age": 3}', '{"a": [1, "}"]} and more', "{", "[1]", '{"name": "now", "parameters'):
        assert whole(text, LLAMA) == (text, "", [])


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("7", {"type": "integer"}, 7),
        ("7", {"type": "string"}, "7"),
        ("007", {"type": "integer"}, "007"),
        ("1.5", {"type": "number"}, 1.5),
        ("2", {"type": "number"}, 2),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("True", {"type": "string"}, "True"),
        ("true", {"type": "integer"}, "true"),
        ("null", {"type": ["string", "null"]}, None),
        ("none", {"type": ["string", "null"]}, "none"),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "string"}]}, 7),
        ("7", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "7"),
        ('"x"', {"anyOf": [{"type": "string"}, {"type": "null"}]}, '"x"'),
        ('"x"', {}, "x"),
        ('"x"', {"type": "string"}, '"x"'),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ('{"a": 1}', {"$ref": "#/$defs/Point"}, {"a": 1}),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"const": 2}, 2),
        ("plain words", {}, "plain words"),
        ("12", {}, 12),
        ("NaN", {"type": "number"}, "NaN"),
        ("[" * 5000, {"type": "array"}, "[" * 5000),
        ("x", {"$ref": "#/$defs/Loop"}, "x"),
        ("__import__('os')", {"type": "object"}, "__import__('os')"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
    ],
)
def test_bare_texts_are_cast_by_the_schema(text: str, schema: dict[str, Any], value: Any) -> None:
    root = {"$defs": {"Point": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}}}
    found = cast(text, schema, root)
    assert found == value and type(found) is type(value)


def test_ids_are_nine_letters_and_digits_and_differ() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(each) == 9 and each.isalnum() and each.isascii() for each in ids)
    parser = CallParser(HERMES, SCHEMAS)
    a, b = parser.feed(written("hermes", TWO)).tool_calls
    assert a.id != b.id


@pytest.mark.parametrize("text", ['{"a": }}', '{"a": "x\n', "{" * 65, '{"a": ["' + "[" * 9 + '"]]}}'])
def test_what_cannot_become_a_call_is_told_at_once(text: str) -> None:
    parser = CallParser(HERMES, SCHEMAS)
    parser.feed("<tool_call>" + text[:-1])
    assert parser.feed(text[-1] + "x").text.endswith("x")


def test_a_call_is_told_at_its_end_and_text_at_once() -> None:
    parser = CallParser(HERMES, SCHEMAS)
    assert parser.feed("Hello").text == "Hello"
    assert parser.feed(" wor").text == " wor"
    assert parser.feed("ld <to").text == "ld"
    assert parser.feed("o>").text == " <too>"
    assert parser.feed('\n<tool_call>{"name": "now"}</tool_call')[2] == ()
    assert [call.name for call in parser.feed(">").tool_calls] == ["now"]


ALPHABET = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", '{"name": "now"}', "{", "}"]
ALPHABET += [
    '"',
    "\\",
    "\n",
    " ",
    "a",
    "<",
    "now",
    "é",
    "<function=now>",
    "</function>",
    "<parameter=a>",
    "</parameter>",
]
ALPHABET += ["<|channel|>", "analysis<|message|>", "<|end|>", " to=functions.", ";", "<arg_key>", "[", "]", "<|call|>"]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(ALPHABET), max_size=30).map("".join),
    st.sampled_from(NAMES),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=6),
)
def test_the_parts_do_not_depend_on_the_cuts(text: str, name: str, opened: bool, cuts: list[int]) -> None:
    family = BY_NAME[name]
    reasoning = family.reasoning or THINK
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert parsed(pieces, family, reasoning, opened) == parsed([text], family, reasoning, opened)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([each for each in ALPHABET if each not in ("{", "[")]), max_size=20).map("".join))
def test_nothing_is_lost(text: str) -> None:
    """Without a call or reasoning in it, every text comes out as it went in."""
    said, thought, calls = parsed([text], HERMES)
    assert thought == ""
    if not calls:
        assert said == text


def seconds(text: str, family: Family, step: int) -> float:
    parser = CallParser(family, SCHEMAS, family.reasoning or THINK)
    begin = time.process_time()
    said = [parser.feed(text[i : i + step]) for i in range(0, len(text), step)] + [parser.finish()]
    end = time.process_time()
    assert "".join(part.text for part in said) == text
    return end - begin


HOSTILE = {
    "brackets": lambda n: "[" + "a(" * n,
    "markers": lambda n: "<tool_call>" * n,
    "braces": lambda n: "{" * (8 * n),
    "begun": lambda n: '<tool_call>{"' + "x" * (8 * n),
    "escapes": lambda n: '<tool_call>{"' + "\\" * (8 * n),
    "nested": lambda n: "<tool_call>" + "[{" * n,
    "spaces": lambda n: "a" + " " * (8 * n),
    "half": lambda n: "<tool_cal" * n,
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("family", [HERMES, LLAMA, QWEN_XML], ids=lambda family: family.name)
@pytest.mark.parametrize("step", [1, 10**9], ids=["characters", "at once"])
def test_time_is_linear(text: str, family: Family, step: int) -> None:
    small, large = 500, 4_000

    def ratio() -> float:
        return seconds(HOSTILE[text](large), family, step) / max(seconds(HOSTILE[text](small), family, step), 1e-4)

    assert any(ratio() < 8 * 3 for _ in range(5))  # in square time 64


@pytest.mark.slow
def test_a_megabyte_of_braces_one_character_at_a_time() -> None:
    assert seconds("{" * 2**20, HERMES, 1) < 60


def test_a_call_over_the_limit_is_text() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": "' + "x" * MAX_CALL
    parser = CallParser(HERMES, SCHEMAS)
    said = "".join(parser.feed(text[i : i + 4096]).text for i in range(0, len(text), 4096))
    assert len(said) > MAX_CALL  # it was given out before the end
    after = parser.feed('"}}</tool_call>' + written("hermes", ZERO))
    assert said + after.text == text + '"}}</tool_call>'
    assert [call.name for call in after.tool_calls] == ["now"]


def test_random_calls_come_back(seed: int = 5) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        calls = [
            ("get_weather", {"city": _text(rng), "days": rng.randrange(-99, 99)}) for _ in range(rng.randint(1, 3))
        ]
        for name, family in BY_NAME.items():
            assert parsed([written(name, calls)], family, family.reasoning)[2] == calls


def _text(rng: random.Random) -> str:
    return "".join(rng.choice('ab"\\{}[]<>/é日😀 :,\t') for _ in range(rng.randint(0, 12))).strip()
