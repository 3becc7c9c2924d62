"""Incremental text: always the decoded ids, cut at the stop, whatever the tokens and however they come."""

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from embedllm.detokenizer import MAX_RUN, Detokenizer, TextStream
from embedllm.outputs import Said, ToolCall
from embedllm.params import SamplingParams
from embedllm.tokenizer import Tokenizer, TokenizerProtocol
from tests.unit.tiny_tokenizers import KINDS, TEXT, tokenizer


class Pieces(TokenizerProtocol):
    """Token i is the i-th of the given strings."""

    eos_ids = ()

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids)


def steps(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The ids as steps of 1..3 tokens."""
    out, at, turn = [], 0, 0
    while at < len(ids):
        size = cuts[turn % len(cuts)] if cuts else 1
        out.append(ids[at : at + size])
        at, turn = at + size, turn + 1
    return out


def ids_of(found: Tokenizer) -> st.SearchStrategy[list[int]]:
    anything = st.integers(0, found.vocab_size - 1)
    few = st.lists(anything, min_size=1, max_size=5).flatmap(lambda some: st.lists(st.sampled_from(some), max_size=40))
    texts = st.text(st.sampled_from("a the.é😀日\ufffd\u0301👍🏽 \n"), max_size=20).map(
        lambda t: found.encode(t, False)
    )
    return st.one_of(st.lists(anything, max_size=30), few, texts)


def longest_run(found: Tokenizer, ids: list[int]) -> int:
    return max((len(list(run)) for is_byte, run in groupby(ids, lambda i: i in found._byte_of) if is_byte), default=0)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans(), cuts=st.lists(st.integers(1, 3), max_size=3))
@settings(max_examples=150)
def test_the_pieces_are_the_decoded_ids(kind: str, data: st.DataObject, skip: bool, cuts: list[int]) -> None:
    found = tokenizer(kind)
    ids = data.draw(ids_of(found))
    detokenizer = Detokenizer(found, [1, 2], SamplingParams(skip_special_tokens=skip))
    out = []
    for step in steps(ids, cuts):
        piece = detokenizer.step(step)
        assert (piece.num_tokens, piece.stop) == (len(step), None)
        out.append(piece.said.text)
    text = "".join(out) + detokenizer.finish().text
    want = found.decode(ids, skip)
    if longest_run(found, [i for i in ids if not (skip and i in found.special_ids)]) <= MAX_RUN or "\ufffd" not in want:
        assert text == want
    else:  # such a run is read in parts: what of it was out when it turned bad stays
        assert "\ufffd" in text


@given(data=st.data())
@settings(max_examples=100)
def test_windows_alone_say_the_same(data: st.DataObject) -> None:
    found = tokenizer("byte-level")
    ids = data.draw(ids_of(found))
    stream = TextStream(found.decode)
    assert "".join(map(stream.push, ids)) + stream.finish() == found.decode(ids)


def test_a_decode_stream_that_gives_up_is_replaced() -> None:
    found = tokenizer("byte-level")

    class Fragile:
        def __init__(self, ids: list[int]) -> None:
            self.inner = found.decode_stream()
            for i in ids:
                self.inner.push(i)
            self.left = 3

        def step(self, backend: object, ids: list[int]) -> str | None:
            self.left -= 1
            if not self.left:
                raise ValueError("Invalid prefix encountered")
            return "".join(map(self.inner.push, ids)) or None

    stream = TextStream(found.decode, Fragile)
    ids = found.encode(TEXT * 3)
    assert "".join(map(stream.push, ids)) + stream.finish() == TEXT * 3


def test_whole_characters_come_at_once_and_half_ones_at_the_end() -> None:
    found = tokenizer("byte-level")
    ids = found.encode("a", False) + found.encode("🙈", False)
    detokenizer = Detokenizer(found, [], SamplingParams())
    assert [detokenizer.step([i]).said.text for i in ids] == ["a", *[""] * (len(ids) - 2), "🙈"] and len(ids) > 2
    half = Detokenizer(found, [], SamplingParams())
    assert "".join(half.step([i]).said.text for i in ids[:-1]) == "a"
    assert half.finish().text == "\ufffd" and half.finish().text == ""


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_nothing_of_the_prompt_shows(kind: str) -> None:
    found = tokenizer(kind)
    whole = found.encode("the 🙈 a", False)
    for cut in range(len(whole)):
        detokenizer = Detokenizer(found, whole[:cut], SamplingParams())
        text = "".join(detokenizer.step([i]).said.text for i in whole[cut:]) + detokenizer.finish().text
        assert text == found.decode(whole[cut:])
        assert "the" not in text or cut == 0 or "the" in found.decode(whole[cut:])


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_bytes_that_never_make_a_character_are_held_briefly_and_cost_little(kind: str) -> None:
    found = tokenizer(kind)
    bad = found.encode("🙈", False)[-1]
    stream = found.decode_stream()
    shown = 0
    start = time.thread_time()
    for count in range(1, 4_001):
        shown += len(stream.push(bad))
        assert count - shown <= MAX_RUN
    assert time.thread_time() - start < 1.0
    assert shown + len(stream.finish()) == 4_000
    silent = found.decode_stream()
    start = time.thread_time()
    assert not any(silent.push(next(iter(found.special_ids))) for _ in range(4_000))
    assert time.thread_time() - start < 0.2


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_after_any_number_of_bad_bytes_is_whole(kind: str) -> None:
    found = tokenizer(kind)
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🙈")[0][0]
    names = list(spelled) if kind == "byte-level" else [f"<0x{byte:02X}>" for byte in "🙈".encode()]
    monkey = [i for name in names if (i := found._backend.token_to_id(name)) is not None]
    assert len(monkey) == 4
    for bad in range(70):
        ids = [monkey[3]] * bad + monkey * 2
        stream = found.decode_stream()
        text = "".join(map(stream.push, ids)) + stream.finish()
        assert text == found.decode(ids)
        assert text.endswith("🙈🙈") is (kind == "byte-level" or bad == 0)


# ---- stop strings --------------------------------------------------------------------------------------------------


def cut(text: str, ends: list[int], stops: Sequence[str], min_tokens: int, keep: bool) -> tuple[str, int, str | None]:
    """Text, number of tokens, stop: the definition, character by character. ends[t]: where the text of token t ends."""
    start = ends[min_tokens - 1] if 0 < min_tokens <= len(ends) else len(text) if min_tokens else 0
    for end in range(start + 1, len(text) + 1):
        hits = [stop for stop in stops if text[start:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            num_tokens = 1 + next(t for t, e in enumerate(ends) if e >= end)
            return text[: end if keep else end - len(stop)], num_tokens, stop
    return text, len(ends), None


@given(
    pieces=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    output=st.lists(st.integers(0, 3), max_size=14),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(1, 3), max_size=3),
    min_tokens=st.integers(0, 6),
    keep=st.booleans(),
)
@settings(max_examples=300)
def test_stop_strings_equal_the_definition(
    pieces: list[str], output: list[int], stops: list[str], cuts: list[int], min_tokens: int, keep: bool
) -> None:
    ids = [i % len(pieces) for i in output]
    text = "".join(pieces[i] for i in ids)
    ends = [len("".join(pieces[i] for i in ids[: t + 1])) for t in range(len(ids))]
    params = SamplingParams(stop=stops, min_tokens=min_tokens, include_stop_str_in_output=keep)
    detokenizer = Detokenizer(Pieces(*pieces), [], params)
    out, num_tokens, hit = "", 0, None
    for step in steps(ids, cuts):
        piece = detokenizer.step(step)
        out += piece.said.text
        num_tokens += piece.num_tokens
        if piece.stop is not None:
            hit = piece.stop
            break
        known = text[: ends[num_tokens - 1]]
        held = known[len(out) :]
        assert out + held == known
        free = ends[min_tokens - 1] if 0 < min_tokens <= len(ends) else 0
        longest = max((n for s in stops for n in range(1, len(s)) if known[free:].endswith(s[:n])), default=0)
        assert len(held) == (longest if num_tokens > min_tokens else 0)  # no more is held back than may become a stop
    out += detokenizer.finish().text
    assert (out, num_tokens, hit) == cut(text, ends, stops, min_tokens, keep)
    assert detokenizer.step([0]).said.text == "" and detokenizer.finish().text == ""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40)
def test_stop_strings_cut_real_text(kind: str, data: st.DataObject) -> None:
    found = tokenizer(kind)
    ids = data.draw(ids_of(found))
    text = found.decode(ids)
    if longest_run(found, ids) > MAX_RUN or len(text) < 2:
        return
    start = data.draw(st.integers(0, len(text) - 2))
    stop = text[start : start + data.draw(st.integers(1, 4))]
    detokenizer = Detokenizer(found, [], SamplingParams(stop=[stop]))
    out = ""
    for i in ids:
        piece = detokenizer.step([i])
        out += piece.said.text
        if piece.stop:
            break
    assert out + detokenizer.finish().text == text[: text.find(stop)]


def test_the_ending_token_has_no_text() -> None:
    found = Pieces("a", "b", "</s>", "stop")
    params = SamplingParams(stop=["ab"])
    detokenizer = Detokenizer(found, [], params)
    assert detokenizer.step([0]) == (Said(""), 1, None)
    assert detokenizer.step([0, 2], ended_by_token=True) == (Said("a"), 2, None)
    assert detokenizer.finish().text == "a"
    first = Detokenizer(found, [], params)
    assert first.step([0, 1, 2], ended_by_token=True) == (Said(""), 2, "ab")  # the string was complete before
    kept = Detokenizer(found, [], SamplingParams(stop=["ab"], include_stop_str_in_output=True))
    assert kept.step([3, 0, 1, 3]) == (Said("stopab"), 3, "ab")
    last = Detokenizer(found, [], params)
    assert last.step([0, 1], ended_by_token=True) == (Said(""), 2, None) and last.finish().text == "a"


def test_unicode_stops_are_exact_code_points() -> None:
    found = tokenizer("byte-level")
    for text, stop, want in [
        ("ae\u0301x", "é", "ae\u0301x"),
        ("aéx", "é", "a"),
        ("a👍🏽b", "👍", "a"),
        ("a😀b", "😀b", "a"),
    ]:
        detokenizer = Detokenizer(found, [], SamplingParams(stop=[stop]))
        out = "".join(detokenizer.step([i]).said.text for i in found.encode(text, False))
        assert out + detokenizer.finish().text == want


def test_many_long_stops_do_not_slow_it_down() -> None:
    found = Pieces("a", "b")
    stops = ["a" * (1_000 - i) + "c" for i in range(64)]
    detokenizer = Detokenizer(found, [], SamplingParams(stop=stops))
    start = time.thread_time()
    for _ in range(3_000):
        detokenizer.step([0])
    assert time.thread_time() - start < 3.0
    assert len(detokenizer.step([1]).said.text) == 1_001


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None, [1], SamplingParams())
    assert detokenizer.step([1, 2, 3]) == (Said(""), 3, None)
    assert detokenizer.step([4], ended_by_token=True) == (Said(""), 1, None)
    assert detokenizer.finish().text == ""


def test_special_tokens_show_only_when_asked() -> None:
    found = tokenizer("byte-level")
    ids = found.encode("the<|im_start|>cat<think>", False)
    shown: dict[bool, Any] = {}
    for skip in (True, False):
        detokenizer = Detokenizer(found, [], SamplingParams(skip_special_tokens=skip))
        shown[skip] = detokenizer.step(ids).said.text + detokenizer.finish().text
    assert shown == {True: "thecat<think>", False: "the<|im_start|>cat<think>"}


class Tags:
    """A parser for which what stands between < and > is reasoning, and ! is a call."""

    def __init__(self) -> None:
        self.inside = False

    def feed(self, text: str) -> Said:
        said = Said()
        for char in text:
            if char in "<>":
                self.inside = char == "<"
            elif char == "!":
                said = said.then(Said("", "", (ToolCall("now", {}, "1"),)))
            else:
                said = said.then(Said("", char) if self.inside else Said(char))
        return said

    def finish(self) -> Said:
        return Said("", ".")


def test_stop_strings_are_of_the_answer_alone() -> None:
    """Not of reasoning or calls, and across what lies between."""
    found = Pieces("<ab>", "a", "!", "<c>", "b", "z")
    detokenizer = Detokenizer(found, [], SamplingParams(stop=["ab"]), Tags())
    said = [detokenizer.step([i]) for i in range(5)]
    assert [piece.said.text for piece in said] == ["", "", "", "", ""] and [p.stop for p in said] == [None] * 4 + ["ab"]
    assert "".join(piece.said.reasoning for piece in said) == "abc" and len(said[2].said.tool_calls) == 1
    whole = Detokenizer(found, [], SamplingParams(stop=["never"]), Tags())
    piece = whole.step([0, 1, 2, 3, 4, 5])
    assert piece.said.text == "abz" and piece.num_tokens == 6 and whole.finish() == Said("", ".")
