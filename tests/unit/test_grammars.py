"""The grammar backends: each says what the rules say, all say the same, and no grammar brings the process down."""

import itertools
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedllm.errors import InvalidRequest, MissingDependency, RequestFailed
from embedllm.structured import BACKENDS, available, backend_named, forced
from embedllm.structured.backend import Backend, Grammar, Shape, State, Vocabulary
from embedllm.structured.expressions import EMPTY, Alt, Chars, Dispatch, Literal, Ref, Repeat, Rules, Seq
from embedllm.structured.nodes import NOTHING, chars, without
from embedllm.structured.vocabulary import vocabulary_of
from embedllm.testing import ByteTokenizer
from embedllm.tokenizer import Tokenizer
from tests.unit.expressions import matches, sample
from tests.unit.random_rules import ALPHABET, random_rules
from tests.unit.tiny_tokenizers import tokenizer as tiny

BOX = Path(__file__).parents[2] / "embedllm" / "demo" / "model"
# Tokens over several characters, over a part of one, and over the end of one and the start of the next.
LONGER = [text.encode() for text in ("ab", 'a"', "éb", "((a", "aab(", "😀é", '": ', "\\\\")] + [
    b"a\xc3",
    b"\xa9b",
    b"\xf0\x9f",
]
TOKENS = [bytes((byte,)) for byte in range(256)] + LONGER + [b""] * 6
ENDS = (len(TOKENS) - 4, len(TOKENS) - 1)
BYTES = Vocabulary(TOKENS, ENDS, lambda text: list(text.encode()))

LETTER, DIGIT = chars([(ord("a"), ord("z"))]), chars([(ord("0"), ord("9"))])
ESCAPED = Seq((Literal("\\"), chars([(ord(c), ord(c)) for c in '"\\bfnrt'])))
STRING = Seq((Literal('"'), Repeat(Alt((without([(0, 31), (34, 34), (92, 92)]), ESCAPED)), 0, 40), Literal('"')))


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_named(request.param, BYTES)


@pytest.fixture(scope="module")
def box() -> Vocabulary:
    tokenizer = Tokenizer.from_folder(BOX)
    assert tokenizer is not None
    return vocabulary_of(tokenizer, 8_200, tokenizer.eos_ids)  # a width that is no multiple of 32


def state_of(backend: Backend, rules: Rules) -> State:
    return backend.compile(Shape(rules=rules)).new_state()


def mask(state: State, vocabulary: Vocabulary = BYTES) -> frozenset[int]:
    row = np.full(vocabulary.num_words, -1, np.int32)
    state.fill(row)
    return frozenset(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def takes(state: State, text: str | bytes) -> bool:
    """Whether the bytes of a text come through one by one; if not, nothing has changed."""
    spelled = text.encode() if isinstance(text, str) else text
    for n, byte in enumerate(spelled):
        if not state.accept(byte):
            state.rollback(n)
            return False
    return True


def fits(grammar: Grammar, text: str) -> bool:
    state = grammar.new_state()
    return takes(state, text) and state.can_end


# ---- what single rules say ------------------------------------------------------------------------------------------

EVERYTHING = "".join(map(chr, range(1, 0x250))) + "\u2028\ufeff\ufffd\ufffe\ud7ff\ue000\U0001f600\U0010ffff"
SHAPES: list[tuple[str, Rules, list[str], list[str]]] = [
    ("literal", {"root": Literal('say "hi"\\\n\t{}[]#//')}, ['say "hi"\\\n\t{}[]#//'], ["", 'say "hi"']),
    ("every character", {"root": Literal(EVERYTHING)}, [EVERYTHING], [EVERYTHING[:-1], EVERYTHING + "x"]),
    ("every class", {"root": Seq(tuple(Chars(((ord(c), ord(c)),)) for c in EVERYTHING))}, [EVERYTHING], ["x"]),
    (
        "ranges",
        {"root": Repeat(chars([(0xE8, 0xE9), (0x7D0, 0x10FFFF)]), 2, 3)},
        ["éè", "ߐ\U0010ffff😀", "\ud7ff\ue000"],
        ["é", "éèéè", "éê", "aé"],
    ),
    (
        "empty option",
        {"root": Seq((Alt((Literal("a"), EMPTY)), Alt((EMPTY, Literal("b")))))},
        ["", "a", "ab", "b"],
        ["ba"],
    ),
    ("nothing", {"root": EMPTY}, [""], ["a"]),
    ("nested repeats", {"root": Repeat(Repeat(Literal("ab"), 1, 2), 2, 2)}, ["abab", "abababab"], ["ab", "ab" * 5]),
    ("repeats of what may be empty", {"root": Repeat(Repeat(Literal("a"), 0, 1), 2, 3)}, ["", "aaa"], ["aaaa"]),
    ("no times", {"root": Seq((Repeat(Literal("a"), 0, 0), Literal("b")))}, ["b"], ["ab"]),
    ("at least", {"root": Repeat(Literal("ab"), 3, None)}, ["ababab", "ab" * 9], ["abab", "abababa"]),
    (
        "a class and what it holds",
        {"root": Seq((Repeat(LETTER, 0, None), Literal("xy")))},
        ["xy", "axyxy"],
        ["x", "ax"],
    ),
    (
        "one begins the other",
        {"root": Alt((Seq((Literal("ab"), Literal("de"))), Literal("abd")))},
        ["abd", "abde"],
        ["ab"],
    ),
    (
        "recursion",
        {
            "root": Alt((Seq((Literal("("), Ref("a rule"), Literal(")"))), EMPTY)),
            "a rule": Seq((Ref("root"), Ref("b"))),
            "b": Alt((EMPTY, Seq((Literal(","), Ref("b"))))),
        },
        ["", "()", "((),,)", "(" * 50 + ")" * 50],
        ["(", "())", "(" * 50 + ")" * 49, ","],
    ),
    (
        "back to the root",
        {
            "root": Alt(
                (Literal("x"), Seq((Ref("r"), Ref("r")))),
            ),
            "r": Alt((Repeat(LETTER, 1, None), Seq((Literal("("), Ref("root"))))),
        },
        ["x", "(xb", "((abab"],
        ["(", "()"],
    ),
    (
        "counts",
        {"root": Seq((Literal('"'), Repeat(Alt((LETTER, Literal("\\n"))), 3, 200), Literal('"')))},
        ['"abc"', '"' + "\\n" * 200 + '"'],
        ['"ab"', '"' + "a" * 201 + '"'],
    ),
]


@pytest.mark.parametrize(("rules", "yes", "no"), [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_texts(backend: Backend, rules: Rules, yes: list[str], no: list[str]) -> None:
    grammar = backend.compile(Shape(rules=rules))
    assert [text for text in yes if not fits(grammar, text)] == []
    assert [text for text in no if fits(grammar, text)] == []


@pytest.mark.parametrize(("may_end", "again"), list(itertools.product((False, True), repeat=2)))
def test_free_text_and_triggers(backend: Backend, may_end: bool, again: bool) -> None:
    """All texts of up to six characters, with a trigger that overlaps itself and one that shares its beginning."""
    for options in (
        (("aab", Literal("X")),),
        (("aab", Literal("X")), ("aac", Alt((EMPTY, Literal("b"))))),
        (("aab", NOTHING), ("c", Literal("a"))),
    ):
        rules = {"root": Seq((Dispatch(options, may_end, again), Literal("X")))}
        grammar = backend.compile(Shape(rules=rules))
        for length in range(6):
            for text in map("".join, itertools.product("abcX", repeat=length)):
                assert fits(grammar, text) == matches(rules, text), text
    state = state_of(backend, {"root": Dispatch((("aab", Literal("X")),), may_end, again)})
    assert takes(state, "aé😀aaab") and mask(state) == {ord("X")} and state.forced_text() == "X"
    assert not takes(state, b"\xff")
    state.rollback(1)
    assert not takes(state, b"\xff") and not takes(state, b"\xed\xa0\x80"), "free text is UTF-8 without surrogates"


# ---- all say the same -----------------------------------------------------------------------------------------------


def walk(states: list[State], vocabulary: Vocabulary, data: bytes, draw: random.Random) -> Iterator[bytes]:
    """What was accepted so far, at every step of a random way to cut `data` into tokens; asserts that all agree."""
    spelled = {token: i for i, token in enumerate(vocabulary.tokens) if token}
    done = 0
    while True:
        masks = [mask(state, vocabulary) for state in states]
        assert len(set(masks)) == 1, [sorted(found ^ masks[0])[:9] for found in masks]
        assert len({state.can_end for state in states}) == 1
        assert len({state.forced_text() for state in states}) == 1
        assert states[0].can_end == (not masks[0].isdisjoint(vocabulary.eos_ids))
        yield data[:done]
        if done == len(data):
            return
        lengths = [n for n in range(1, len(data) - done + 1) if data[done : done + n] in spelled]
        token = spelled[data[done : done + draw.choice(lengths)]]
        assert {state.accept(token) for state in states} == {token in masks[0]}
        if token not in masks[0]:
            return
        done += len(vocabulary.tokens[token])


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_rules(first: int) -> None:
    backends = available(BYTES)
    assert len(backends) == 3
    num_ends = num_given_up = 0
    for seed in range(first, first + 20):
        rules, draw = random_rules(seed), random.Random(seed)
        grammars = [backend.compile(Shape(rules=rules)) for backend in backends]
        for _ in range(3):
            text = sample(rules, draw)[:30]
            if draw.random() < 0.3:
                text = text[: draw.randrange(len(text) + 1)] + draw.choice(ALPHABET)
            states = [grammar.new_state() for grammar in grammars]
            try:
                for done in walk(states, BYTES, text.encode(), draw):
                    if done == done.decode(errors="ignore").encode():
                        assert states[0].can_end == matches(rules, done.decode()), (seed, done)
                        num_ends += states[0].can_end
            except RequestFailed:  # exponentially many ways to read it
                num_given_up += 1
    assert num_given_up <= 6
    assert num_ends > 20


def test_a_real_vocabulary(box: Vocabulary) -> None:
    person = {
        "root": Seq(
            (
                Literal('{"name": '),
                STRING,
                Literal(', "tags": ['),
                Repeat(Seq((STRING, Literal(", "))), 0, 3),
                Literal('], "age": '),
                Repeat(DIGIT, 1, 3),
                Literal("}"),
            )
        ),
    }
    nested = {
        "root": Seq((Literal('{"v": '), Ref("s"), Literal(', "kids": ['), Repeat(Ref("root"), 0, None), Literal("]}"))),
        "s": STRING,
    }
    for rules, text in (
        (person, '{"name": "Ada \\"L\\" Lovelace é日😀", "tags": ["alpha", ], "age": 36}'),
        (nested, '{"v": "def f(x):", "kids": [{"v": "return", "kids": []}{"v": "", "kids": []}]}'),
        ({"root": Dispatch((("<tool_call>", Literal("\n{")),), True, True)}, "We call <tool <tool_call>\n{ and on"),
    ):
        states = [state_of(backend, rules) for backend in available(box)]
        for seed in range(3):
            *_, done = walk(states, box, text.encode(), random.Random(seed))
            assert done == text.encode() and states[0].can_end
            states = [state_of(backend, rules) for backend in available(box)]


# ---- states ---------------------------------------------------------------------------------------------------------


def test_fill_is_what_accept_takes(backend: Backend) -> None:
    for seed in range(12):
        state = state_of(backend, rules := random_rules(seed))
        for byte in sample(rules, random.Random(seed)).encode()[:12]:
            allowed = mask(state)
            for token in range(len(TOKENS)):
                assert state.accept(token) == (token in allowed), (seed, token)
                if token in allowed:
                    assert state.done == (token in ENDS)
                    state.rollback(1)
            assert mask(state) == allowed
            assert state.accept(byte)


def test_the_end(backend: Backend) -> None:
    state = state_of(backend, {"root": Seq((Literal("ab"), Alt((Literal("c"), EMPTY))))})
    assert not state.can_end and not any(state.accept(end) for end in ENDS)
    assert takes(state, "ab") and state.can_end and mask(state) == {ord("c"), *ENDS}
    for end in ENDS:
        assert state.accept(end) and state.done and not state.can_end
        assert mask(state) == set() and state.forced_text() == ""
        assert not any(state.accept(token) for token in range(len(TOKENS))), "nothing comes after EOS"
        state.rollback(1)
        assert not state.done and mask(state) == {ord("c"), *ENDS}
    assert takes(state, "c") and mask(state) == set(ENDS) and state.accept(ENDS[0])
    state.rollback(3)  # EOS, c, b
    assert mask(state) == {ord("b")} and takes(state, "bc") and state.accept(ENDS[1]) and state.done


def test_rollback_leads_to_the_same_masks(backend: Backend) -> None:
    rules = {"root": Seq((Literal("["), Repeat(Seq((STRING, Literal(","))), 0, 4), Literal("]")))}
    state, masks, text = state_of(backend, rules), [], '["aé\\n","",]'.encode()
    for byte in text:
        masks.append(mask(state))
        assert state.accept(byte)
    for n in range(1, len(text) + 1):
        state.rollback(n)
        assert mask(state) == masks[len(text) - n]
        assert all(map(state.accept, text[len(text) - n :]))
    state.rollback(0)
    assert state.can_end


def test_tokens_over_several_parts(backend: Backend) -> None:
    rules = {"root": Seq((Repeat(LETTER, 1, 2), Literal('": '), Alt((Literal("é"), Literal("è"))), Literal("b")))}
    state = state_of(backend, rules)
    assert state.accept(TOKENS.index(b'a"')) and state.forced_text() == ": ", "not half of é or è"
    assert takes(state, ": ") and mask(state) >= {0xC3, TOKENS.index("éb".encode())}
    assert state.accept(0xC3) and mask(state) == {0xA8, 0xA9, TOKENS.index(b"\xa9b")} and state.forced_text() == ""
    assert state.accept(TOKENS.index(b"\xa9b")) and state.can_end


def test_states_on_many_threads(backend: Backend) -> None:
    rules = [random_rules(seed) for seed in (3, 5, 8, 11)]
    texts = [sample(one, random.Random(1)).encode()[:40] for one in rules]
    shared = [backend.compile(Shape(rules=one)) for one in rules]

    def masks(grammars: list[Grammar]) -> list[frozenset[int]]:
        found = []
        for grammar, text in zip(grammars, texts, strict=True):
            state = grammar.new_state()
            found += [mask(state) for byte in text if state.accept(byte)]
        return found

    expected, answers, fresh = masks(shared), [], backend_named(backend.name, BYTES)

    def work() -> None:
        for _ in range(3):
            answers.append(masks(shared) == expected)
            answers.append(masks([fresh.compile(Shape(rules=one)) for one in rules]) == expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 24


# ---- what must come -------------------------------------------------------------------------------------------------


def test_forced_ids(backend: Backend, box: Vocabulary) -> None:
    here = backend_named(backend.name, box)
    rules = {"root": Seq((Literal('{"name": "'), Repeat(LETTER, 1, 5), Literal('", "kind": "person"}')))}
    state = state_of(here, rules)
    before = mask(state, box)
    ids = forced(state, box)
    assert mask(state, box) == before, "the state is as it was"
    assert ids == box.encode('{"name": "')[:-1] and len(ids) > 1, "the last one may merge with what follows"
    assert all(map(state.accept, ids))
    assert takes_text(state, box, ' "') and forced(state, box) == []
    assert takes_text(state, box, "ada") and takes_text(state, box, '",')
    assert forced(state, box) == box.encode(' "kind": "person"}'), "all of it, as nothing else may follow"
    text = b' "kind": "person"}'
    assert {text[: len(box.tokens[i])] for i in mask(state, box)} == {box.tokens[i] for i in mask(state, box)}
    assert all(map(state.accept, forced(state, box))) and forced(state, box) == [] and state.can_end


def takes_text(state: State, vocabulary: Vocabulary, text: str) -> bool:
    return all(map(state.accept, vocabulary.encode(text)))


def test_forced_ids_that_are_refused_end_the_list() -> None:
    """A tokenizer that begins each text with a space, as SentencePiece does, or spells a control token."""
    wrong = Vocabulary(TOKENS, ENDS, lambda text: [*text[:2].encode(), ENDS[0] - 1, *text[2:].encode()])
    for backend in available(wrong):
        state = state_of(backend, {"root": Literal("abcd")})
        assert forced(state, wrong) == [ord("a"), ord("b")] and mask(state) == {ord("a"), TOKENS.index(b"ab")}


# ---- vocabularies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "unigram"])
def test_bytes_of_tokens(kind: str) -> None:
    """In the middle of a text, where what decoders do to its start does not matter, bytes joined are the text."""
    tokenizer = tiny(kind)
    vocabulary = vocabulary_of(tokenizer, tokenizer.vocab_size + 5, [2])
    for text in ("the cat sat", "a <think> the </think> é", "日本 😀" if kind != "unigram" else "日本"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(vocabulary.tokens[i] for i in ids).decode().lstrip(" ") == tokenizer.decode(ids).lstrip(" ")
    assert vocabulary.tokens[-5:] == [b""] * 5 and vocabulary.tokens[2] == b"" and vocabulary.eos_ids == (2,)
    assert all(not vocabulary.tokens[i] for i in tokenizer.special_ids)


def test_every_token_of_the_box(box: Vocabulary) -> None:
    tokenizer = Tokenizer.from_folder(BOX)
    assert tokenizer is not None
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i], skip_special_tokens=False)
        if i not in tokenizer.special_ids and "\ufffd" not in text:
            assert box.tokens[i].decode() == text == tokenizer.token_bytes(i).decode()
    assert {len(token) for token in box.tokens[8_192:]} == {0} and len(box.tokens) == 8_200


def test_kept_and_silent_tokens() -> None:
    kept = vocabulary_of(ByteTokenizer(), 300, (257, 258, 999), frozenset({"<|im_start|>", "<|im_end|>"}))
    assert kept.tokens[256] == b"<|im_start|>" and kept.tokens[257] == b"", "what ends an answer is no text"
    assert kept.tokens[ord("a")] == b"a" and kept.eos_ids == (257, 258) and kept.num_words == 10
    assert vocabulary_of(ByteTokenizer(), 300, (258,)).tokens[256] == b""
    for backend in available(kept):
        state = state_of(backend, {"root": Literal("a<|im_start|>")})
        assert state.accept(ord("a")) and mask(state, kept) == {ord("<"), 256} and state.accept(256) and state.can_end
    with pytest.raises(InvalidRequest, match="no end-of-sequence"):
        vocabulary_of(ByteTokenizer(), 300, ())


# ---- grammars that callers wrote ------------------------------------------------------------------------------------

GBNF_LISTS = 'root ::= "[" (item ("," item)*)? "]"\nitem ::= [0-9]+ | root  # lists of lists\n'
LARK_LISTS = 'start: "[" (item ("," item)*)? "]"\nitem: /[0-9]+/ | start\n'


@pytest.mark.parametrize(
    ("name", "dialect", "source"), [("xgrammar", "gbnf", GBNF_LISTS), ("llguidance", "lark", LARK_LISTS)]
)
def test_sources(name: str, dialect: str, source: str) -> None:
    backend = backend_named(name, BYTES)
    shape = Shape(source=source, dialect=dialect)  # type: ignore[arg-type]
    assert backend.refuses(shape) is None
    grammar = backend.compile(shape)
    assert all(fits(grammar, text) for text in ("[]", "[1,[22,[]],3]"))
    assert not any(fits(grammar, text) for text in ("", "[", "[1,]", "[1]]"))
    other = backend_named("llguidance" if name == "xgrammar" else "xgrammar", BYTES)
    assert "pip install" in (other.refuses(shape) or "")
    assert "pip install" in (backend_named("builtin", BYTES).refuses(shape) or "")
    with pytest.raises(InvalidRequest, match="pip install"):
        backend_named("builtin", BYTES).compile(shape)


CHAINED = "\n".join(f"r{i} ::= r{i + 1}" for i in range(3_000))
HOSTILE_GBNF = {
    "": "not found|not defined",
    "root": "not found|not defined|Expect",
    "root ::= ": "Expect",
    'root ::= "a': "Expect",
    "root ::= x": "not defined",
    "root ::= [z-a]": "larger",
    "root ::= root": "lead to each other",
    "root ::= []": "lead to",
    'root ::= "a"{5,2}': "larger",
    'root ::= "a"{1,99999}': "4,096",
    'root ::= ("a"{400}){400}': "65,536",
    'root ::= "a\0"': "NUL",
    "root ::= " + "(" * 600 + '"a"' + ")" * 600: "64 deep",
    f"{CHAINED}\nroot ::= r0": "500 rules",
    'root ::= "' + "a" * 70_000 + '"': "65,536 bytes",
}
HOSTILE_LARK = {
    "": "Empty",
    "start": "Expected",
    'start: "a': "lexer error",
    "start: x": "unknown",
    'root: "a"': "no start",
    "start: start": "begin",
    "start: /[a/": "unclosed",
    r"start: /(?=a)b/": "look-around",
    r"start: /[^\s\S]/": "begin",
    'start: "a"{1,99999}': "4,096",
    'start: ("a"{400}){400}': "65,536",
    'start: "a\0"': "NUL",
    "start: A\nA: A": "circular",
    "start: " + "(" * 60 + '"a"' + ")" * 60: "nested",
    CHAINED.replace("::=", ":") + "\nstart: r0": "500 rules",
}


@pytest.mark.parametrize(
    ("name", "dialect", "sources"), [("xgrammar", "gbnf", HOSTILE_GBNF), ("llguidance", "lark", HOSTILE_LARK)]
)
def test_hostile_sources(name: str, dialect: str, sources: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    backend = backend_named(name, BYTES)
    for source, reason in sources.items():
        with pytest.raises(InvalidRequest, match=reason) as refused:
            backend.compile(Shape(source=source, dialect=dialect))  # type: ignore[arg-type]
        assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)
    left = 'root ::= root "a" | "a"' if dialect == "gbnf" else 'start: start "a" | "a"'
    assert fits(backend.compile(Shape(source=left, dialect=dialect)), "aaa")  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(40):
        mask(state_of(backend, random_rules(seed)))
    for _, rules, _, _ in SHAPES:
        state_of(backend, rules)
    assert capfd.readouterr() == ("", "")


# ---- limits, and which one is taken ---------------------------------------------------------------------------------


def test_long_and_deep_rules_are_taken_or_refused(backend: Backend) -> None:
    """Rules that lead to each other thousands of levels deep, triggers without end, and counts."""
    chain: dict[str, Literal | Seq] = {f"r{i}": Seq((Literal("a"), Ref(f"r{i + 1}"))) for i in range(5_000)}
    deep = {"root": Ref("r0"), **chain, "r5000": Literal("b")}
    for rules in (deep, {**deep, "root": Alt((Ref("r0"), Seq((Literal("("), Ref("root")))))}):
        refused = backend.refuses(Shape(rules=rules))
        assert (refused is not None) == (backend.name == "llguidance"), refused
        if refused is None:
            assert takes(state_of(backend, rules), "aaa")
    counted: Rules = {"root": Repeat(LETTER, 0, 100_000)}
    assert (backend.refuses(Shape(rules=counted)) is not None) == (backend.name == "xgrammar")
    nested: Seq | Literal = Literal("x")
    for _ in range(3_000):
        nested = Seq((nested, Literal("y")))
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        backend.compile(Shape(rules={"root": nested}))
    if backend.name != "llguidance":  # it has its own way to say that free text has no trigger in it
        with pytest.raises(InvalidRequest, match="4,096"):
            backend.compile(Shape(rules={"root": Dispatch((("a" * 5_000, EMPTY),), True, True)}))


def test_too_many_ways() -> None:
    """The built-in backend keeps every way to read a text, and gives up where they double with each character."""
    open_or_not = Alt((Literal("("), Seq((Literal("("), Ref("root"), Literal(")")))))
    state = state_of(backend_named("builtin", BYTES), {"root": Repeat(open_or_not, 1, 90)})
    with pytest.raises(RequestFailed, match=r"16,000 ways.*pip install"):
        for _ in range(100):
            assert state.accept(ord("("))
    with pytest.raises(RequestFailed):
        state.accept(ord("("))
    state.rollback(1)
    assert state.accept(ord("(")), "nothing had changed"


def test_counts_share_masks() -> None:
    """The built-in backend finds a mask once for all counts that no token can exhaust."""
    grammar = backend_named("builtin", BYTES).compile(Shape(rules={"root": Repeat(LETTER, 0, 4_000)}))
    state = grammar.new_state()
    for _ in range(3_000):
        mask(state)
        assert state.accept(ord("a"))
    assert len(grammar._masks) == 1  # type: ignore[attr-defined]


def test_which_backend() -> None:
    assert [backend.name for backend in available(BYTES)] == list(BACKENDS)
    assert backend_named("auto", BYTES).name == next(iter(BACKENDS))
    with pytest.raises(InvalidRequest, match=r"'outlines'.*builtin"):
        backend_named("outlines", BYTES)


@pytest.mark.parametrize("name", ["xgrammar", "llguidance"])
def test_a_package_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"pip install 'embedllm\[structured\]'"):
        backend_named(name, BYTES).compile(Shape(rules={"root": Literal("a")}))
    monkeypatch.setattr("embedllm.structured.find_spec", lambda found: None)
    assert [backend.name for backend in available(BYTES)] == ["builtin"]
