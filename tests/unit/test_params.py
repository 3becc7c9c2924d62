"""SamplingParams: what is refused, by which words, and that what exists is consistent and cannot change."""

import copy
import dataclasses
import decimal
import fractions
import math
import numbers
import pickle

import numpy as np
import pytest

from embedllm.errors import InvalidRequest, UnknownOption
from embedllm.params import MAX_IDS, MAX_INT, MAX_STOP_LENGTH, MAX_STOP_STRINGS, SamplingParams

ODD = [
    None, True, False, "1", "", b"1", -1, 0, 1, 2, 100, 0.5, -0.0, 1.0, 1.5, 1e-45, 1e308, math.inf, -math.inf,
    math.nan, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), decimal.Decimal(1), 1j, [1], (1,),
    fractions.Fraction(1, 2), fractions.Fraction(10**400), {1: 1}, object(), int,
    np.int64(1), np.float32(1), np.array(1),
]  # fmt: skip

# Field: lowest, highest, whether the lowest itself is refused.
REALS = {
    "temperature": (0, 100, False),
    "top_p": (0, 1, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (0, 100, True),
    "deadline": (0, 1e9, True),
}
INTEGERS = {
    "n": (1, 128),
    "top_k": (-1, MAX_INT),
    "min_tokens": (0, 256),  # the default of max_tokens
    "priority": (-(2**31), 2**31 - 1),
    "seed": (0, MAX_INT),
    "max_tokens": (1, MAX_INT),
    "logprobs": (0, 32),
    "prompt_logprobs": (0, 32),
}
OPTIONAL = {"deadline", "seed", "max_tokens", "logprobs", "prompt_logprobs"}


def is_good(name: str, value: object) -> bool:
    if value is None:
        return name in OPTIONAL
    if isinstance(value, bool):
        return False
    if name in INTEGERS:
        low, high = INTEGERS[name]
        return isinstance(value, numbers.Integral) and low <= value <= high
    low, high, above = REALS[name]
    return isinstance(value, numbers.Real) and low <= value <= high and not (above and value == low)


@pytest.mark.parametrize("name", [*REALS, *INTEGERS])
def test_numbers(name: str) -> None:
    for value in ODD:
        if is_good(name, value):
            found = getattr(SamplingParams(**{name: value}), name)
            assert found in (value, 0) and type(found) in (int, float, type(None))
        else:
            with pytest.raises(InvalidRequest, match=name):
                SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams) if f.type == "bool"])
def test_flags(name: str) -> None:
    for value in ODD:
        if isinstance(value, bool):
            assert getattr(SamplingParams(**{name: value}), name) is value
        else:
            with pytest.raises(InvalidRequest, match=name):
                SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_strings(name: str) -> None:
    bad = [None, 1, b"a", [""], ["a", ""], [1], [None], {"a"}, {"a": 1}, ["a" * (MAX_STOP_LENGTH + 1)], ["a"] * 5_000]
    bad += [""] if name == "stop" else ["a"]
    for value in bad:
        with pytest.raises(InvalidRequest, match=name):
            SamplingParams(**{name: value})
    for value in ([], (), ["a"], ["a", "ab", "\n", "\0", "😀", "a" * MAX_STOP_LENGTH]):
        assert getattr(SamplingParams(**{name: value}), name) == tuple(value)


def test_stop_may_be_one_string() -> None:
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    assert len(SamplingParams(stop=["a"] * MAX_STOP_STRINGS).stop) == MAX_STOP_STRINGS
    with pytest.raises(InvalidRequest, match=f"stop has {MAX_STOP_STRINGS + 1} entries; at most {MAX_STOP_STRINGS}"):
        SamplingParams(stop=["a"] * (MAX_STOP_STRINGS + 1))


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_ids(name: str) -> None:
    bad = [1, "1", b"1", [-1], [1.0], ["1"], [True], [None], [2**31], [10**400], {1}, np.array([1]), [[1]]]
    for value in bad:
        with pytest.raises(InvalidRequest, match=name):
            SamplingParams(**{name: value})
    for value in ([0], (1, 2), [5] * 100, range(3), [2**31 - 1], [np.int64(3)]):
        found = getattr(SamplingParams(**{name: value}), name)
        assert found == tuple(value) and {type(one) for one in found} == {int}


def test_how_many_ids() -> None:
    SamplingParams(stop_token_ids=list(range(MAX_IDS)), allowed_token_ids=list(range(100_000)))
    with pytest.raises(InvalidRequest, match=f"at most {MAX_IDS}"):
        SamplingParams(stop_token_ids=list(range(MAX_IDS + 1)))
    with pytest.raises(InvalidRequest, match="no token could be chosen"):
        SamplingParams(allowed_token_ids=[])


def test_logit_bias() -> None:
    for value in ([1], 1, "a", {"1": 1.0}, {-1: 1.0}, {1: None}, {1: "1"}, {1: True}, {1: math.nan}, {1: math.inf}):
        with pytest.raises(InvalidRequest, match="logit_bias"):
            SamplingParams(logit_bias=value)
    for value in ({1: 100.1}, {1: -101}, {True: 1.0}, {1.0: 1.0}, dict.fromkeys(range(MAX_IDS + 1), 1.0)):
        with pytest.raises(InvalidRequest, match="logit_bias"):
            SamplingParams(logit_bias=value)
    assert SamplingParams(logit_bias={3: 1, 4: -math.inf, 5: -100}).logit_bias == {3: 1.0, 4: -math.inf, 5: -100.0}


def test_what_fits_together() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens=9 exceeds max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=8, max_tokens=8).min_tokens == 8
    assert SamplingParams(min_tokens=9_000, max_tokens=None).max_tokens is None
    for bad in (
        {"cache_salt": 1},
        {"cache_salt": b"a"},
        {"logits_processor": 1},
        {"structured": {}},
        {"structured": 0},
    ):
        with pytest.raises(InvalidRequest, match=next(iter(bad))):
            SamplingParams(**bad)
    assert SamplingParams(top_k=-1).top_k == 0  # the other spelling of "all"


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownOption, match="no option 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1)
    with pytest.raises(UnknownOption, match=r"no option 'zzz'$"):
        SamplingParams(zzz=1)
    with pytest.raises(UnknownOption):
        SamplingParams().replace(max_token=3)
    with pytest.raises(TypeError):
        SamplingParams(0.5)


def test_nothing_the_caller_holds_changes_it() -> None:
    stop, ids, bias = ["a"], [1], {1: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, allowed_token_ids=ids, logit_bias=bias, bad_words=stop)
    stop.append("b")
    ids.append(2)
    bias[2] = 2.0
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (("a",), (1,), (1,))
    assert params.logit_bias == {1: 1.0} and params.bad_words == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


def test_given_beats_defaults() -> None:
    params = SamplingParams(temperature=0.5, top_p=1.0)
    assert params.given == {"temperature", "top_p"} and repr(params) == "SamplingParams(temperature=0.5, top_p=1.0)"
    resolved = params.resolve({"temperature": 0.9, "top_p": 0.8, "top_k": 20})
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.5, 1.0, 20)
    assert params.resolve({"temperature": 0.9}) is params
    changed = params.replace(temperature=0.1)
    assert changed.given == params.given and (changed.temperature, changed.top_p) == (0.1, 1.0)
    with pytest.raises(InvalidRequest, match="temperature"):
        params.replace(temperature=-1)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda params: pickle.loads(pickle.dumps(params))])
def test_copies_are_equal_and_remember_what_was_given(again: object) -> None:
    params = SamplingParams(temperature=0.5, stop="a", logit_bias={1: 1.0})
    twin = again(params)
    assert twin == params and twin.given == params.given
    assert {params: 1}[twin] == 1


def test_ids_must_be_in_the_vocabulary() -> None:
    for params in ({"stop_token_ids": [100]}, {"allowed_token_ids": [3, 100]}, {"logit_bias": {100: 1.0}}):
        SamplingParams(**params).check_fits(101)
        with pytest.raises(
            InvalidRequest, match=f"{next(iter(params))} has token id 100, but the model's ids end at 99"
        ):
            SamplingParams(**params).check_fits(100)
    SamplingParams().check_fits(1)
