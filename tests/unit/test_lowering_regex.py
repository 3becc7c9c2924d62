"""Regular expressions: the same texts as Python's `re` says, and a clear refusal of everything else."""

import random
import re

import pytest

from embedllm.errors import InvalidRequest
from embedllm.structured.caps import MAX_NODES
from embedllm.structured.expressions import Node
from embedllm.structured.nodes import parts_of
from embedllm.structured.regex import regex, search
from tests.unit.expressions import matches, sample

ALPHABET = "ab1-_ \n\t]^$.é😀\\{}|"


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """A pattern that both we and `re` can read; a group is never repeated twice without a bound."""
    match rng.randrange(9 if depth else 5):
        case 0 | 1:
            return re.escape(rng.choice(ALPHABET))
        case 2:
            return rng.choice([".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"\n", r"\x61", r"\u00e9", "é", "😀"])
        case 3:
            items = rng.sample(
                [r"\d", "a-c", "_", r"\-", r"\]", r"\^", "é-ü", "1", " ", r"\s", r"\n", "{", "$"], rng.randint(1, 4)
            )
            return f"[{rng.choice(['', '^'])}{''.join(items)}]"
        case 4:
            atom = rng.choice(["a", "[ab]", r"\d", "."])
            lazy = rng.choice(["", "", "?"])
            return atom + rng.choice(["*", "+", "?", "{2}", "{1,}", "{0,3}", "{0,0}"]) + lazy
        case 5:
            count = rng.choice(["?", "{2}", "{1,3}", "{0,2}"])
            kind = rng.choice(["", "?:", f"?P<name{rng.randrange(10**9)}>"])
            return f"({kind}{random_pattern(rng, depth - 1)}){count}"
        case 6:
            return f"(?:{random_pattern(rng, depth - 1)}|{random_pattern(rng, depth - 1)}|{rng.choice(['', 'ab'])})"
    return "".join(random_pattern(rng, depth - 1) for _ in range(rng.randint(1, 3)))


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_re(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        pattern = random_pattern(rng)
        if rng.random() < 0.3:
            pattern = f"{rng.choice(['^', ''])}{pattern}{rng.choice(['$', ''])}|{random_pattern(rng, 1)}"
        rules = {"root": regex(pattern, "regex")}
        compiled = re.compile(pattern, re.ASCII)
        for _ in range(6):
            text = sample(rules, rng)
            assert compiled.fullmatch(text), (pattern, text)
            cut = text[: rng.randint(0, len(text))] + rng.choice(["", rng.choice(ALPHABET)])
            tried = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 5)))
            for other in (cut, tried):
                # `$` of re also matches before a last newline; ours does not.
                expected = bool(compiled.fullmatch(other)) and not ("$" in pattern and other.endswith("\n"))
                if not ("$" in pattern and other.endswith("\n")):
                    assert matches(rules, other) == expected, (pattern, other)


@pytest.mark.parametrize("pattern", ["b", "^a+", "a$", "^a|b$", "^(?:x|y)$", "", "a{2}", r"^\d+-[^-]$"])
def test_search_pads_where_no_anchor_is(pattern: str) -> None:
    rng = random.Random(3)
    rules = {"root": search(pattern, "pattern", 6)}
    for _ in range(60):
        text = "".join(rng.choice("abxy1-") for _ in range(rng.randint(0, 5)))
        assert matches(rules, text) == bool(re.search(pattern, text)), text
    assert matches(rules, "a" * 40) == (pattern == "") or not matches(rules, "a" * 40)


def test_open_repeats_are_capped_only_where_it_is_asked() -> None:
    assert matches({"root": regex("a*", "regex")}, "a" * 500)
    capped = {"root": search("^a*$", "pattern", 256)}
    assert matches(capped, "a" * 256) and not matches(capped, "a" * 257)
    assert matches({"root": search("^a{300,}$", "pattern", 256)}, "a" * 300)


REFUSED = {
    "foo**": "may not follow another",
    "(": "never closed",
    "a)": "closes nothing",
    "\\": "escapes nothing",
    "[": "never closed",
    "[]": "must not begin with ]",
    "[^]": "must not begin with ]",
    "[z-a]": "wrong way round",
    r"[\d-z]": "one character on each side",
    "a{2,1}": "wrong way round",
    "a{1,1000000000}": "limit of 4,096",
    "a{99999999999999999999999999}": "limit of 4,096",
    "a{,5}": "lower bound",
    "(?:(?:a{4000}){4000})": "65,536",
    "*a": "nothing to repeat",
    "a|+b": "nothing to repeat",
    "{2}": "nothing to repeat",
    "a++": "may not follow another|possessive",
    "a{2}{3}": "may not follow another",
    r"(a)\1": "back-references",
    r"(?P=name)": "not supported",
    r"\k<name>": "back-references",
    "(?=a)": "look-ahead",
    "(?!a)": "look-ahead",
    "(?<=a)b": "look-behind",
    "(?<!a)b": "look-behind",
    "(?i)a": "not supported",
    "(?>a)": "not supported",
    r"\bword": "word boundaries",
    r"\p{L}": "Unicode classes",
    r"\cA": "control characters",
    r"\0": "NUL",
    r"\x00": "not a character",
    "a\0b": "NUL",
    r"\uD800": "not a character",
    r"\u{110000}": "not a character",
    "\ud800": "surrogate",
    r"\y": "not known",
    "a^b": "only at the ends",
    "a$b": "only at the end",
    "(a$)": "only at the ends",
    "a" * 20_000: "limit is 16,384",
    "(" * 100 + ")" * 100: "nested more than 64",
    "[^\\u0001-\\u{10ffff}]": "no character",
}


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: ascii(pattern)[:30])
def test_refusals_say_what_and_where(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match=REFUSED[pattern]) as caught:
        regex(pattern, "regex")
    assert str(caught.value).startswith("regex: ")


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*" * 20, "(a*)*", "((a?b?)*c?)*", "(((a{1,9}){1,9}){1,9})*", "(" * 60 + "a" + ")*" * 60]
)
def test_hard_patterns_stay_small(pattern: str) -> None:
    node = regex(pattern, "regex")
    assert num_nodes(node) < MAX_NODES
    assert matches({"root": node}, "a" * 12 + "b") == bool(
        re.fullmatch("a*b", "a" * 12 + "b") and re.search("b", pattern)
    )


def num_nodes(node: Node) -> int:
    return 1 + sum(map(num_nodes, parts_of(node)))
