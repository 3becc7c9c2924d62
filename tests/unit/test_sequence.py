"""One sample's tokens and progress: what a step computes for it, and what ends it."""

from array import array

import pytest

from embedllm.plan_types import UNKNOWN
from embedllm.sequence import Sequence, State


def sequence(num_prompt: int = 5, max_tokens: int = 4, **options: object) -> Sequence:
    return Sequence(7, list(range(10, 10 + num_prompt)), max_tokens, **options)


def test_new_sequence_has_its_whole_prompt_before_it() -> None:
    s = sequence()
    assert (s.num_prompt, s.num_output, s.num_pending, s.state) == (5, 0, 5, State.WAITING)
    assert s.order == (0, 7) and sequence(priority=-1).order < s.order
    assert s.max_slots == 8  # the last of the 4 output tokens needs no slot
    assert sequence(salt="a").chain == "a"


@pytest.mark.parametrize("num_tokens, logits", [(1, 0), (4, 0), (5, 1)])
def test_chunk_asks_for_logits_only_at_the_end(num_tokens: int, logits: int) -> None:
    entry = sequence().entry(num_tokens)
    assert (entry.start, entry.tokens, entry.num_draft, entry.num_logits) == (
        0,
        list(range(10, 10 + num_tokens)),
        0,
        logits,
    )


def test_next_chunk_starts_where_the_last_one_ends() -> None:
    s = sequence()
    s.num_computed, s.num_in_flight = 1, 2
    assert s.num_pending == 2
    entry = s.entry(2)
    assert (entry.start, entry.tokens, entry.num_logits) == (3, [13, 14], 1)


def test_token_still_on_the_device_is_unknown() -> None:
    s = sequence()
    s.num_in_flight, s.num_sampling = 5, 1
    assert s.num_pending == 1
    assert s.entry(1).tokens == [UNKNOWN]
    s.num_in_flight, s.num_sampling = 4, 1  # one known token and one unknown
    assert s.entry(2).tokens == [14, UNKNOWN]


def test_draft_follows_the_known_tokens() -> None:
    s = sequence(draft=[1, 2, 3])
    s.num_computed = 4
    entry = s.entry(1 + 2)
    assert (entry.tokens, entry.num_draft, entry.num_logits) == ([14, 1, 2], 2, 3)
    assert s.entry(1).num_draft == 0


def test_entry_copies_the_block_table() -> None:
    s = sequence()
    s.blocks = array("i", [3, 4])
    entry = s.entry(5)
    s.blocks.append(9)
    assert entry.blocks == array("i", [3, 4])


def test_nothing_is_pending_for_the_last_token() -> None:
    s = sequence(max_tokens=2)
    s.num_in_flight, s.num_sampling = 5, 1
    assert s.num_pending == 1  # the first output token's KV makes the second
    s.num_in_flight, s.num_sampling = 6, 2
    assert s.num_pending == 0  # the second is the last, whatever it is


def test_wants_hidden_are_asked_once() -> None:
    s = sequence(wants_hidden=True)
    assert s.entry(3).wants_hidden
    s.num_computed = 3
    assert s.entry(2).wants_hidden
    s.append([1])
    s.forget()
    assert not s.entry(6).wants_hidden  # a recomputation after the first token repeats nothing


@pytest.mark.parametrize(
    "tokens, kept, reason, stop_reason",
    [
        ([1, 2], [1, 2], None, None),
        ([1, 2, 3, 4], [1, 2, 3, 4], "length", None),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], "length", None),
        ([1, 0, 5], [1, 0], "stop", None),
        ([1, 9, 0], [1, 9], "stop", 9),
        ([1, 2, 3, 0], [1, 2, 3, 0], "stop", None),  # the end at the limit is still an end
        ([], [], None, None),
    ],
)
def test_append_stops_at_the_first_end(tokens: list[int], kept: list[int], reason: str, stop_reason: int) -> None:
    s = sequence(eos_ids=frozenset([0]), stop_ids=frozenset([9]))
    assert s.append(tokens) == kept
    assert s.tokens[5:] == kept and (s.finish_reason, s.stop_reason) == (reason, stop_reason)


def test_forget_keeps_the_tokens_and_nothing_else() -> None:
    s = sequence(draft=[1])
    s.append([1])
    s.row, s.num_computed, s.num_in_flight, s.num_sampling, s.num_chained, s.chain = 3, 4, 1, 1, 2, 77
    s.blocks, s.copy = array("i", [1, 2]), (5, 2)
    s.forget()
    assert s.tokens == [10, 11, 12, 13, 14, 1] and s.epoch == 1
    assert (s.row, s.num_computed, s.num_in_flight, s.num_sampling, s.num_chained, s.chain) == (-1, 0, 0, 0, 0, None)
    assert not s.blocks and s.copy is None and not s.draft and s.num_pending == 6
