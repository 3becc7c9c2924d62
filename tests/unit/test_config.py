"""The numbers every plan stays within, refusals with the numbers in them, and memory sizes."""

import math
import re

import numpy as np
import pytest

from embedllm.config import Limits
from embedllm.errors import InvalidRequest, RequestTooLong
from embedllm.options import Options, parse_memory

NOT_POSITIVE_INTEGERS = [0, -1, 1.0, "1", None, True, math.nan, 2.5, [1], np.int64(4)]


@pytest.mark.parametrize(
    "name", ["block_size", "num_blocks", "max_model_len", "max_num_seqs", "max_batch_tokens", "max_queued"]
)
def test_limits_are_positive_integers(name: str) -> None:
    for value in NOT_POSITIVE_INTEGERS:
        with pytest.raises(
            InvalidRequest, match=f"{name} must be an integer of at least 1, got {re.escape(repr(value))}"
        ):
            Limits(**{name: value})


def test_everyone_running_gets_a_token_per_step() -> None:
    Limits(max_num_seqs=64, max_batch_tokens=64)
    with pytest.raises(InvalidRequest, match="max_batch_tokens=63 is below max_num_seqs=64"):
        Limits(max_num_seqs=64, max_batch_tokens=63)


def test_whole_prompts_must_fit_a_step() -> None:
    Limits(chunked_prefill=False, max_model_len=512, max_batch_tokens=512)
    with pytest.raises(InvalidRequest, match=r"max_batch_tokens \(512\) of at least max_model_len \(513\)"):
        Limits(chunked_prefill=False, max_model_len=513, max_batch_tokens=512)


@pytest.mark.parametrize("num_tokens, num_blocks", [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (10**9, 62_500_000)])
def test_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert Limits(block_size=16).blocks_for(num_tokens) == num_blocks


def refusal(limits: Limits, *request: int) -> str:
    with pytest.raises(RequestTooLong) as caught:
        limits.check_fits(*request)
    return str(caught.value)


def test_context_is_a_limit_with_its_numbers() -> None:
    limits = Limits(max_model_len=100)
    limits.check_fits(90, 10)
    limits.check_fits(99, 1)
    assert refusal(limits, 90, 11) == "90 prompt tokens + max_tokens=11 exceed max_model_len=100: at most 10 fit"
    assert "shorten the prompt to 99 tokens" in refusal(limits, 100, 1)
    assert "shorten the prompt to 99 tokens" in refusal(limits, 10**6, 1)


def test_cache_is_a_limit_with_its_numbers() -> None:
    """The last token needs no slot: 4 blocks of 16 hold 64 computed tokens and allow one more."""
    limits = Limits(num_blocks=4)
    limits.check_fits(60, 5)
    assert refusal(limits, 60, 6).startswith("60 prompt tokens + max_tokens=6 need 5 KV blocks of 16; the cache has 4:")
    limits.check_fits(40, 9, 1)
    message = refusal(limits, 40, 10, 1)
    assert "need 4 KV blocks of 16; the cache has 4, 1 of them pinned" in message and "num_kv_blocks=" in message


def test_options() -> None:
    Options(max_model_len=4_096, num_kv_blocks=1, kv_cache_memory="4GiB", seed=2**63 - 1)
    for name in ("max_model_len", "max_num_seqs", "max_batch_tokens", "block_size", "num_kv_blocks"):
        for value in NOT_POSITIVE_INTEGERS:
            if not (name == "num_kv_blocks" and value is None):
                with pytest.raises(InvalidRequest, match=name):
                    Options(**{name: value})
    for bad in ({"quantization": "int8"}, {"speculative": "ngram"}, {"seed": -1}, {"seed": True}, {"seed": 2**63}):
        with pytest.raises(InvalidRequest, match=next(iter(bad))):
            Options(**bad)
    with pytest.raises(InvalidRequest, match="memory size 'lots' is not understood"):
        Options(kv_cache_memory="lots")


@pytest.mark.parametrize(
    "value, expected",
    [
        (1, 1),
        (10**12, 10**12),
        (0.5, 500),
        (0.999, 999),
        ("123", 123),
        ("123B", 123),
        ("4GiB", 4 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("512MB", 512_000_000),
        ("2KiB", 2_048),
        ("1TB", 10**12),
        ("50%", 500),
        ("12.5 %", 125),
    ],
)
def test_memory(value: int | float | str, expected: int) -> None:
    assert parse_memory(value, free=1_000) == expected


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, None, 0.0, 1.0, 1.5, -0.5, math.nan, math.inf, [1], b"4GiB"),
        *("", "GiB", "4 gallons", "-1GiB", "1e9", "0", "0GiB", "0%", "100%", "150%", "4GiB free", "1" * 400 + "TiB"),
        "٤GiB",  # a digit, but not one of ours
    ],
)
def test_memory_that_is_not_understood(value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"memory size {re.escape(repr(value))} is not understood"):
        parse_memory(value, free=1_000)
