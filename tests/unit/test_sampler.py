"""Sampling against naive references: the tokens of a loop over Python floats, exact distributions, contained faults."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedllm.edits import keep_ids, pack_ids
from embedllm.errors import InvalidRequest, RequestFailed
from embedllm.params import SamplingParams
from embedllm.sampler import Sampler
from embedllm_kernels import sampling as ops

U32 = 2**32 - 1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ---- the reference: one row, Python numbers ------------------------------------------------------------------------


def noise(key: int, token: int) -> float:
    """Gumbel noise of one (key, id), from the published hash, in unbounded integers."""
    x = token
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & U32
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & U32
    x ^= x >> 15
    x = ((x ^ (key & U32)) * 0x7FEB352D) & U32
    x = ((x ^ (x >> 15)) + (key >> 32)) & U32
    x = (x * 0x846CA68B) & U32
    x = ((x ^ (x >> 16)) * 0x31848BAB) & U32
    x = (x ^ (x >> 14)) & (2**31 - 1)
    return -math.log(-math.log1p(-min((x + 0.5) / 2**31, 1 - 2**-24)))


def processed(logits: list[float], p: SamplingParams, tokens: list[int], num_prompt: int, eos: Any, bad: Any) -> Any:
    """Penalties, bias and masks as the documentation words them; float32 where the logits are."""
    row = torch.tensor(logits)
    output = tokens[num_prompt:]
    for token in set(tokens):
        row[token] = row[token] / p.repetition_penalty if row[token] > 0 else row[token] * p.repetition_penalty
    for token in set(output):
        row[token] = row[token] - p.frequency_penalty * output.count(token)
        row[token] = row[token] - p.presence_penalty
    for token, bias in (p.logit_bias or {}).items():
        row[token] += bias
    if p.allowed_token_ids is not None:
        for token in range(len(row)):
            if token not in p.allowed_token_ids:
                row[token] = -math.inf
    for *prefix, last in bad:
        if (prefix or last not in eos) and (not prefix or tokens[-len(prefix) :] == prefix):
            row[last] = -math.inf
    if len(output) < p.min_tokens:
        for token in (*eos, *p.stop_token_ids):
            row[token] = -math.inf
    return row.tolist()


def survivors(logits: list[float], p: SamplingParams) -> list[int]:
    """Ids left by top-k, then top-p, then min-p, likeliest first."""
    best = max(logits)
    order = sorted((i for i, x in enumerate(logits) if x > -math.inf), key=lambda i: (-logits[i], i))
    if 0 < p.top_k < len(order):
        kth = logits[order[p.top_k - 1]]
        order = [i for i in order if logits[i] >= kth]
    weight = {i: math.exp((logits[i] - best) / p.temperature) for i in order}
    if p.top_p < 1:
        total, before, nucleus = math.fsum(weight.values()), 0.0, []
        for i in order:
            if before < p.top_p * total or not nucleus:
                nucleus.append(i)
            before += weight[i]
        order = nucleus
    return [i for i in order if weight[i] >= p.min_p] or order[:1]


def choose(logits: list[float], p: SamplingParams, key: int) -> tuple[int, float]:
    """The token, and by how much it won."""
    if p.temperature == 0:
        return logits.index(max(logits)), math.inf
    best = max(logits)
    scores = sorted(((logits[i] - best) / p.temperature + noise(key, i), i) for i in survivors(logits, p))
    return scores[-1][1], scores[-1][0] - scores[-2][0] if len(scores) > 1 else math.inf


def key_of(seed: int, sample_index: int, position: int) -> int:
    return ops.fold(ops.fold(ops.fold(ops.fold(0, seed), sample_index), 0), position)


@st.composite
def requests(draw: st.DrawFn, size: int) -> dict[str, Any]:
    ids = st.integers(0, size - 1)
    maybe: Callable[..., Any] = lambda value, other: draw(st.one_of(st.just(value), other))  # noqa: E731
    params = SamplingParams(
        temperature=maybe(0.0, st.floats(0.1, 3.0)),
        top_k=maybe(0, st.integers(1, size + 5)),
        top_p=maybe(1.0, st.floats(0.05, 0.999)),
        min_p=maybe(0.0, st.floats(0.001, 0.9)),
        presence_penalty=maybe(0.0, st.floats(-2, 2)),
        frequency_penalty=maybe(0.0, st.floats(-2, 2)),
        repetition_penalty=maybe(1.0, st.floats(0.5, 2.0)),
        logit_bias=maybe(None, st.dictionaries(ids, st.one_of(st.floats(-5, 5), st.just(-math.inf)), max_size=3)),
        allowed_token_ids=maybe(None, st.lists(ids, min_size=1, max_size=9)),
        min_tokens=maybe(0, st.integers(1, 4)),
        stop_token_ids=maybe((), st.lists(ids, max_size=2)),
    )
    return {
        "params": params,
        "prompt": draw(st.lists(ids, min_size=1, max_size=6)),
        "output": draw(st.lists(ids, max_size=6)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "index": draw(st.integers(0, 127)),
        "eos": draw(st.lists(ids, max_size=2)),
        "bad": draw(st.lists(st.lists(ids, min_size=1, max_size=3), max_size=3)),
        "quant": draw(st.sampled_from([0.0, 0.5])),  # coarse logits: many ties
        "noise": draw(st.integers(0, 2**31)),
    }


def logits_for(request: dict[str, Any], size: int) -> torch.Tensor:
    row = torch.randn(size, generator=torch.Generator().manual_seed(request["noise"])) * 3
    return (row / request["quant"]).round() * request["quant"] if request["quant"] else row


@given(st.sampled_from([1, 7, 40, 300]).flatmap(lambda v: st.tuples(st.just(v), st.lists(requests(v), max_size=5))))
@settings(max_examples=80)
def test_every_mix_equals_the_naive_reference(case: tuple[int, list[dict[str, Any]]]) -> None:
    size, batch = case
    sampler = Sampler(8, size)
    logits = torch.stack([logits_for(r, size) for r in batch]) if batch else torch.empty(0, size)
    before = logits.clone()
    rows = list(range(7, 7 - len(batch), -1))
    for row, r in zip(rows, batch, strict=True):
        tokens = r["prompt"] + r["output"]
        sampler.bind(row, r["params"], tokens, len(r["prompt"]), r["seed"], r["index"], r["eos"], r["bad"])
    result = sampler.sample(logits, rows)
    assert torch.equal(logits, before)
    for i, r in enumerate(batch):
        tokens = r["prompt"] + r["output"]
        row = processed(logits[i].tolist(), r["params"], tokens, len(r["prompt"]), r["eos"], r["bad"])
        if max(row) == -math.inf:
            assert "no token may be chosen" in str(result.failures[i]) and result.tokens[i] == -1
            continue
        want, margin = choose(row, r["params"], key_of(r["seed"], r["index"], len(tokens)))
        assert i not in result.failures and 0 <= result.tokens[i] < size
        assert result.tokens[i] == want or margin < 1e-4


# ---- distribution and randomness -----------------------------------------------------------------------------------


def chi_square(counts: list[int], weights: list[float]) -> float:
    total, mass = sum(counts), sum(weights)
    expected = [total * w / mass for w in weights]
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.5, "logit_bias": {3: 1.0}},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(options: dict[str, Any]) -> None:
    """10^5 draws on 16 ids (2 x 10^4 with penalties): chi-square below the 1e-5 quantile, total variation 1 % (2 %)."""
    params = SamplingParams(**options)
    fixed = params.repetition_penalty != 1.0  # then the context must stay, and the key is changed instead
    size, num_rows, steps = 16, 1000, 20 if fixed else 100
    row = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1.5
    sampler = Sampler(num_rows, size)
    for i in range(num_rows):
        sampler.bind(i, params, [1, 3], 2, seed=i, sample_index=0)
    logits = row.expand(num_rows, size).contiguous()
    live = [sampler._rows[i].tokens for i in range(num_rows)]  # type: ignore[union-attr]
    counts = [0] * size
    for step in range(steps):
        for i, tokens in enumerate(live):
            if fixed:
                sampler._rows[i]._stream = ops.fold(ops.fold(0, step), i)  # type: ignore[union-attr]
            elif step:
                tokens.append(0)
        for token in sampler.sample(logits, list(range(num_rows))).tokens:
            counts[token] += 1
    final = processed(row.tolist(), params, [1, 3], 2, [], [])
    kept = survivors(final, params)
    weights = [math.exp(final[i] / params.temperature) if i in kept else 0.0 for i in range(size)]
    assert all(c == 0 for c, w in zip(counts, weights, strict=True) if w == 0)
    assert chi_square(counts, weights) < 50  # 15 degrees of freedom: 1e-5
    mass = sum(weights)
    distance = sum(abs(c / sum(counts) - w / mass) for c, w in zip(counts, weights, strict=True)) / 2
    assert distance < (0.02 if fixed else 0.01)


def draws(keys: list[int], size: int) -> torch.Tensor:
    flat = torch.zeros(len(keys), size)
    return ops.draw(flat, flat[:, 0], torch.ones(len(keys)), ops.key_words(keys), ops.mix_ids(torch.arange(size)))


@pytest.mark.parametrize("what", ["position", "seed", "far seed", "sample", "purpose"])
def test_draws_of_neighbouring_keys_are_independent(what: str) -> None:
    """Pairs of draws fill an 8 x 8 table evenly: chi-square with 63 degrees of freedom below the 1e-5 quantile."""
    base = [(seed, 0, 0, seed % 40) for seed in range(50_000)]
    moved = {
        "position": [(s, i, p, t + 1) for s, i, p, t in base],
        "seed": [(s + 50_000, i, p, t) for s, i, p, t in base],
        "far seed": [(2**63 - 1 - s, i, p, t) for s, i, p, t in base],
        "sample": [(s, i + 1, p, t) for s, i, p, t in base],
        "purpose": [(s, i, p + 1, t) for s, i, p, t in base],
    }[what]
    first, second = (
        draws([ops.fold(ops.fold(ops.fold(ops.fold(0, s), i), p), t) for s, i, p, t in keys], 8)
        for keys in (base, moved)
    )
    table = torch.bincount(first * 8 + second, minlength=64).tolist()
    assert chi_square(table, [1.0] * 64) < 128


def test_noise_is_gumbel_and_uncorrelated_between_ids() -> None:
    mixed = ops.mix_ids(torch.arange(2_000))
    g = ops.gumbel_noise(mixed[None], ops.key_words([ops.fold(0, i) for i in range(400)]), torch.float64)
    assert torch.isfinite(g).all()
    uniform = torch.exp(-torch.exp(-g)).flatten().sort().values
    ideal = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    assert (uniform - ideal).abs().max() < 1.9 / math.sqrt(len(uniform))  # Kolmogorov-Smirnov, about 1e-3
    for shift in (1, 2, 64, 1024):
        for a, b in ((g[:, shift:], g[:, :-shift]), (g[shift % 7 + 1 :], g[: -(shift % 7 + 1)])):
            pair = torch.stack([a.flatten(), b.flatten()])
            assert abs(torch.corrcoef(pair)[0, 1]) < 4 / math.sqrt(a.numel())


MODES = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 0.8, "presence_penalty": 0.5},
    {"temperature": 1.0, "top_k": 300},
]


def test_a_draw_is_the_same_alone_and_among_64() -> None:
    size = 20_011
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(2)) * 2
    sampler = Sampler(64, size)
    for row in range(64):
        sampler.bind(
            row, SamplingParams(**MODES[row % 7]), [row, 5, row], 1, seed=2**63 - 1 - row, sample_index=row % 3
        )
    together = sampler.sample(logits, list(range(64))).tokens
    assert len(set(together)) > 40
    alone = Sampler(64, size)
    for row in range(64):
        place = 63 - row
        alone.bind(place, SamplingParams(**MODES[row % 7]), [row, 5, row], 1, 2**63 - 1 - row, row % 3)
        assert alone.sample(logits[row : row + 1], [place]).tokens == [together[row]]
    shuffled = list(range(63, -1, -1))
    assert sampler.sample(logits[shuffled], shuffled).tokens == [together[row] for row in shuffled]
    assert sampler.sample(logits, list(range(64))).tokens == together


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 129, 8193, 10_000])
def test_no_id_is_outside_the_vocabulary(size: int) -> None:
    sampler = Sampler(8, size)
    logits = torch.zeros(7, size)
    logits[:, -1] = 1.0
    for row, mode in enumerate(MODES):
        sampler.bind(row, SamplingParams(**mode), [0], 1, seed=row, sample_index=0)
        sampler._rows[row].tokens.append(0)  # type: ignore[union-attr]
    for _ in range(30):
        for row in range(7):
            sampler._rows[row].tokens.append(0)  # type: ignore[union-attr]
        tokens = sampler.sample(logits, list(range(7))).tokens
        assert all(0 <= token < size for token in tokens)


# ---- filters -------------------------------------------------------------------------------------------------------


@given(
    size=st.sampled_from([5, 130, 9_000]),
    top_k=st.sampled_from([0, 1, 50, 127, 128, 129, 5_000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.99999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.1, 1.0]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 8.0]),
    quant=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_filters_equal_a_sorted_reference(
    size: int, top_k: int, top_p: float, min_p: float, scale: float, quant: float, seed: int
) -> None:
    """With all noise equal the draw is the likeliest survivor; the set is seen by making each survivor the winner."""
    row = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    row = (row / quant).round() * quant if quant else row
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    want = survivors(row.tolist(), params)
    got: set[int] = set()
    keys = [ops.fold(seed, i) for i in range(40)]
    n = len(keys)
    lines = row.expand(n, size).contiguous()
    ids = ops.draw_filtered(
        lines,
        lines.amax(1),
        torch.ones(n, dtype=torch.float64),
        ops.key_words(keys),
        torch.full((n,), top_k),
        torch.full((n,), top_p, dtype=torch.float64),
        torch.full((n,), min_p, dtype=torch.float64),
    )
    got = set(ids.tolist())
    # The mass in float32 may move the nucleus by one of many almost equal ids.
    slack = set(survivors(row.tolist(), params.replace(top_p=min(1.0, top_p * (1 + 1e-6)))))
    assert got <= set(want) | slack
    if len(want) == 1:
        assert got == set(want)


def test_top_candidates_are_a_stable_sort() -> None:
    for size, width in [(9_000, 64), (9_001, 16), (300, 128), (64, 64), (10, 40)]:
        x = (torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 40).round() / 4
        values, ids = ops.top_candidates(x, width)
        full, order = x.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, full[:, :width])
        known = values > values[:, -1:]
        assert torch.equal(ids[known], order[:, :width][known])
        assert torch.equal(x.gather(1, ids), values)
        assert all(len(set(line)) == len(line) for line in ids.tolist())


def test_processors_and_warpers_equal_transformers() -> None:
    """repetition, bad words, min tokens, and the sets that top-k, top-p and min-p leave, one after another."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        NoBadWordsLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    size = 200
    generator = torch.Generator().manual_seed(5)
    for trial in range(6):
        logits = torch.randn(1, size, generator=generator) * 3
        tokens = torch.randint(0, size, (12,), generator=generator).tolist()
        bad = [[5], [tokens[-1], 7], [tokens[-2], tokens[-1], 9], [1, 2, 3], [9], [4]]
        eos = [4]
        theirs = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                NoBadWordsLogitsProcessor(bad, eos_token_id=torch.tensor(eos)),
                TemperatureLogitsWarper(0.8),
                TopKLogitsWarper(30),
                TopPLogitsWarper(0.85),
                MinPLogitsWarper(0.02),
            ]
        )(torch.tensor([tokens]), logits.clone())
        allowed = set(torch.isfinite(theirs[0]).nonzero()[:, 0].tolist())
        params = SamplingParams(temperature=0.8, repetition_penalty=1.3, top_k=30, top_p=0.85, min_p=0.02)
        sampler = Sampler(400, size)
        for row in range(400):
            sampler.bind(
                row, params, tokens, 8, seed=trial * 400 + row, sample_index=0, eos_ids=eos, encode_bad_words=bad
            )
        got = set(sampler.sample(logits.expand(400, size).contiguous(), list(range(400))).tokens)
        assert got <= allowed
        likely = torch.softmax(theirs[0], 0)
        assert {i for i in allowed if likely[i] > 0.05} <= got


# ---- options -------------------------------------------------------------------------------------------------------


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, **options)


def sample_one(params: SamplingParams, logits: list[float], tokens: list[int], num_prompt: int = 1, **bind: Any) -> Any:
    sampler = Sampler(1, len(logits))
    sampler.bind(0, params, tokens, num_prompt, 0, 0, **bind)
    return sampler.sample(torch.tensor([logits]), [0])


def test_greedy_takes_the_lowest_id_of_a_tie_and_equals_argmax() -> None:
    x = (torch.randn(50, 3_000, generator=torch.Generator().manual_seed(0)) * 4).round()
    x[7] = 0.0
    x[8, :] = -math.inf
    x[8, 5] = -3e38
    sampler = Sampler(50, 3_000)
    for row in range(50):
        sampler.bind(row, greedy(), [1], 1, 0, 0)
    tokens = sampler.sample(x, list(range(50))).tokens
    assert tokens == x.argmax(-1).tolist() == [line.index(max(line)) for line in x.tolist()]


def test_tiny_temperatures_neither_overflow_nor_divide_by_zero() -> None:
    for temperature in (5e-324, 1e-300, 1e-45, 1e-38, 1e-10):
        for extra in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
            params = SamplingParams(temperature=temperature, **extra)
            assert sample_one(params, [1.0, 30.0, 29.999, -math.inf], [0]).tokens == [1]


def test_penalties_by_hand() -> None:
    """vLLM's and transformers' definitions, on numbers one can check in one's head."""
    logits, tokens = [2.0, -2.0, 1.0, 0.0], [0, 1, 2, 2, 3]  # prompt 0 1, output 2 2 3
    seen: list[list[float]] = []

    def spy(prompt: list[int], output: list[int], line: torch.Tensor) -> torch.Tensor:
        assert (prompt, output) == ([0, 1], [2, 2, 3])
        seen.append(line.tolist())
        return line

    for options in (
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 1.0, "logit_bias": {2: 10.0}},
    ):
        sample_one(greedy(logits_processor=spy, **options), logits, tokens, num_prompt=2)
    assert seen == [[1.0, -4.0, 0.5, 0.0], [2.0, -2.0, 0.0, -0.5], [2.0, -2.0, 0.5, -0.5], [1.0, -4.0, 8.5, -1.5]]


def test_min_tokens_holds_back_eos_and_stop_ids_until_then() -> None:
    params = greedy(min_tokens=2, stop_token_ids=[1])
    tokens = [9]
    sampler = Sampler(1, 10)
    sampler.bind(0, params, tokens, 1, 0, 0, eos_ids=(0, 99))
    logits = torch.tensor([[9.0, 8.0, 7.0] + [0.0] * 7])
    for want in (2, 2, 0):
        got = sampler.sample(logits, [0]).tokens[0]
        assert got == want
        tokens.append(got)


def test_bad_words_are_watched_across_prompt_and_output() -> None:
    logits = [0.0, 5.0, 4.0, 3.0]
    assert sample_one(greedy(), logits, [2, 3], encode_bad_words=[[2, 3, 1]]).tokens == [2]
    assert sample_one(greedy(), logits, [3], encode_bad_words=[[2, 3, 1]]).tokens == [1]
    assert sample_one(greedy(), logits, [2, 3], encode_bad_words=[[1], [3, 2]]).tokens == [3]
    assert sample_one(greedy(), logits, [0], encode_bad_words=[[99], [0, 99], [99, 1], []]).tokens == [1]
    assert sample_one(greedy(), logits, [], num_prompt=0, encode_bad_words=[[1, 2]]).tokens == [1]


def test_ids_without_a_logit_are_refused() -> None:
    for options in ({"logit_bias": {4: 1.0}}, {"allowed_token_ids": [4]}, {"stop_token_ids": [4], "min_tokens": 1}):
        with pytest.raises(InvalidRequest, match="4"):
            sample_one(greedy(**options), [0.0] * 4, [0])


def test_counts_follow_the_live_list_and_heal() -> None:
    size = 30
    seen: list[list[float]] = []

    def spy(prompt: list[int], output: list[int], line: torch.Tensor) -> torch.Tensor:
        seen.append(line.tolist())
        return line

    params = greedy(repetition_penalty=1.7, frequency_penalty=0.9, presence_penalty=0.3, logits_processor=spy)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, size, (10,), generator=generator).tolist()
    num_prompt = 4
    sampler = Sampler(2, size)
    sampler.bind(0, params, tokens, num_prompt, 0, 0)

    def rebind() -> None:
        nonlocal num_prompt
        num_prompt = 2
        sampler.bind(0, params, tokens, num_prompt, 0, 0)

    changes: list[Callable[[], None]] = [
        *[lambda: tokens.append(int(torch.randint(0, size, (1,), generator=generator)))] * 120,
        lambda: tokens.extend([3] * 7),
        lambda: tokens.__delitem__(slice(8, None)),
        lambda: tokens.__delitem__(slice(4, None)),
        lambda: tokens.extend([1, 2, 3]),
        lambda: tokens.__setitem__(slice(-1, None), [9]),
        lambda: tokens.__setitem__(slice(-2, None), [8, 8, 8]),
        lambda: tokens.__setitem__(slice(5, None), [7] * 20),
        rebind,
    ]
    for change in changes:
        change()
        logits = torch.randn(1, size, generator=generator) * 2
        sampler.sample(logits, [0])
        want = processed(logits[0].tolist(), params, tokens, num_prompt, [], [])
        assert seen[-1] == pytest.approx(want, abs=1e-5)


def test_prompts_may_hold_ids_without_a_logit() -> None:
    params = greedy(repetition_penalty=2.0, frequency_penalty=1.0, logprobs=1)
    got = sample_one(params, [1.0, 1.9, 0.0], [7, 1, 3, 0], num_prompt=3, encode_bad_words=[[7, 1, 3, 0, 2]])
    assert got.tokens == [1] and not got.failures
    entries = Sampler(1, 3).prompt_logprobs(torch.tensor([[1.0, 2.0, 0.0]]), [3], 2)
    assert entries[0][0] == (3, -math.inf, 4) and [e.id for e in entries[0][1:]] == [1, 0]


def test_an_unbound_row_and_a_wrong_shape_are_programming_errors() -> None:
    sampler = Sampler(2, 4)
    with pytest.raises(ValueError, match="row 1 is not bound"):
        sampler.sample(torch.zeros(1, 4), [1])
    sampler.bind(1, greedy(), [0], 1, 0, 0)
    with pytest.raises(ValueError, match="shape"):
        sampler.sample(torch.zeros(1, 5), [1])
    sampler.release(1)
    with pytest.raises(ValueError, match="not bound"):
        sampler.sample(torch.zeros(1, 4), [1])
    assert sampler.sample(torch.zeros(0, 4), []).tokens == []


# ---- failures stay in their row ------------------------------------------------------------------------------------


def sleepy(seconds: float, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def call(prompt: list[int], output: list[int], line: torch.Tensor) -> torch.Tensor:
        clock[0] += seconds
        return line

    return call


def raising(error: BaseException) -> Callable[..., torch.Tensor]:
    def call(*_: Any) -> torch.Tensor:
        raise error

    return call


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", range(7))
def test_a_row_that_is_not_finite_fails_alone(bad: float, mode: int) -> None:
    logits = torch.randn(7, 500, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(7, 500)
    for row in range(7):
        sampler.bind(row, SamplingParams(**MODES[(mode + row) % 7], logprobs=2), [1, 2], 1, row, 0)
    rows = list(range(7))
    want = sampler.sample(logits, rows)
    logits[3, :] = bad if bad == -math.inf else logits[3]
    logits[3, 77] = bad
    got = sampler.sample(logits, rows)
    assert list(got.failures) == [3] and isinstance(got.failures[3], RequestFailed)
    assert "not finite" in str(got.failures[3]) and got.tokens[3] == -1 and got.logprobs[3] is None
    for i in (0, 1, 2, 4, 5, 6):
        assert got.tokens[i] == want.tokens[i] and got.logprobs[i] == want.logprobs[i]


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (raising(ValueError("mine")), "mine"),
        (raising(SystemExit(3)), "SystemExit"),
        (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
        (lambda *_: None, "NoneType"),
        (lambda p, o, x: x.tolist(), "list"),
        (lambda p, o, x: x[:-1], "shape"),
        (lambda p, o, x: x[None], "shape"),
        (lambda p, o, x: x.long(), "int64"),
        (lambda p, o, x: x.to_sparse(), "dense"),
        (lambda p, o, x: x * math.nan, "not finite"),
        (lambda p, o, x: x.fill_(math.inf), "not finite"),
        (lambda p, o, x: x.fill_(-math.inf), "no token may be chosen"),
    ],
    ids=range(12),
)
def test_a_logits_processor_fails_its_own_row(callback: Any, says: str) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(3, 50)
    for row in range(3):
        processor = callback if row == 1 else None
        sampler.bind(row, SamplingParams(temperature=1.0, logits_processor=processor), [1, 2], 1, row, 0)
    got = sampler.sample(logits, [0, 1, 2])
    assert list(got.failures) == [1] and says in str(got.failures[1])
    sampler.bind(1, SamplingParams(temperature=1.0), [1, 2], 1, 1, 0)
    want = sampler.sample(logits, [0, 1, 2])
    assert [got.tokens[0], got.tokens[2]] == [want.tokens[0], want.tokens[2]]


def test_a_logits_processor_cannot_reach_other_rows_or_the_live_list() -> None:
    logits = torch.zeros(2, 4)
    tokens, other = [1, 2], [1, 2]

    def vandal(prompt: list[int], output: list[int], line: torch.Tensor) -> torch.Tensor:
        prompt.clear()
        output.extend([9, 9])
        line.untyped_storage().fill_(0x7F)
        assert line.untyped_storage().nbytes() == 16
        return torch.tensor([0.0, 0.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)

    sampler = Sampler(2, 4)
    sampler.bind(0, greedy(logits_processor=vandal), tokens, 1, 0, 0)
    sampler.bind(1, greedy(logit_bias={3: 1.0}), other, 1, 0, 0)
    assert sampler.sample(logits, [0, 1]).tokens == [2, 3]
    assert tokens == other == [1, 2] and torch.equal(logits, torch.zeros(2, 4))


def test_slow_processors_are_logged_and_stuck_ones_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not sample_one(greedy(logits_processor=sleepy(0.9, monkeypatch)), [0.0, 1.0], [0]).failures
    assert not caplog.records
    assert sample_one(greedy(logits_processor=sleepy(1.5, monkeypatch)), [0.0, 1.0], [0]).tokens == [1]
    assert [r.name for r in caplog.records] == ["embedllm"] and "1.5 s" in caplog.text
    failed = sample_one(greedy(logits_processor=sleepy(10.5, monkeypatch)), [0.0, 1.0], [0])
    assert "10.5 s" in str(failed.failures[0])


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_model() -> None:
    size = 9_001
    logits = (torch.randn(6, size, generator=torch.Generator().manual_seed(8)) * 8).round() / 2  # ties
    sampler = Sampler(6, size)
    ks = [0, 5, 32, None, 5, 1]
    for row, k in enumerate(ks):
        params = SamplingParams(temperature=[0.0, 2.0][row % 2], logprobs=k, logit_bias={7: 50.0} if row == 4 else None)
        sampler.bind(row, params, [1], 1, row, 0)
    got = sampler.sample(logits, list(range(6)))
    assert got.tokens[4] == 7
    expected = torch.log_softmax(logits.double(), 1)
    for row, k in enumerate(ks):
        entry = got.logprobs[row]
        if k is None:
            assert entry is None
            continue
        assert entry is not None
        line = logits[row].tolist()
        order = sorted(range(size), key=lambda i: (-line[i], i))
        first, *rest = entry
        assert first.id == got.tokens[row] and first.rank == 1 + order.index(first.id)
        assert [e.id for e in rest] == [i for i in order[:k] if i != first.id]
        assert [e.rank for e in rest] == [1 + order.index(e.id) for e in rest]
        for e in entry:
            assert e.logprob == pytest.approx(float(expected[row, e.id]), abs=1e-4)


def test_prompt_logprobs_work_on_slices() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(8))
    sampler = Sampler(1, 40)
    whole = sampler.prompt_logprobs(logits, [3, 1, 4, 1, 5], 3)
    parts = sampler.prompt_logprobs(logits[:2], [3, 1], 3) + sampler.prompt_logprobs(logits[2:], [4, 1, 5], 3)
    assert whole == parts and [entry[0].id for entry in whole] == [3, 1, 4, 1, 5]
    assert all(len(entry) in (3, 4) for entry in whole)
    assert sampler.prompt_logprobs(logits[:1], [3], 0) == [whole[0][:1]]
    assert len(sampler.prompt_logprobs(logits[:, :2], [0] * 5, 32)[0]) == 2
    logits[2, 0] = math.nan
    with pytest.raises(RequestFailed, match="not finite"):
        sampler.prompt_logprobs(logits, [3, 1, 4, 1, 5], 3)


@pytest.mark.parametrize("k", [0, 1, 5, 40])
def test_logprobs_without_a_look_on_the_way_are_the_same(k: int) -> None:
    logits = (torch.randn(9, 1_003, generator=torch.Generator().manual_seed(4)) * 4).round() / 2  # ties
    logits[0, :700] = -0.0
    logits[0, 700:] = 0.0
    logits[1, ::3] = -math.inf
    chosen = torch.tensor([699, 0, 1_002, 5, 77, 500, 3, 900, 12])
    for found, wanted in zip(ops.logprobs_in_one_go(logits, chosen, k), ops.logprobs(logits, chosen, k), strict=True):
        assert torch.equal(found, wanted)


def test_ids_as_bits() -> None:
    assert pack_ids([0, 31, 33], 65).tolist() == [1 - 2**31, 2, 0]
    kept = keep_ids(torch.arange(65.0)[None], pack_ids([64, 3], 65)[None])
    assert kept.isfinite().nonzero()[:, 1].tolist() == [3, 64] and kept[0, 64] == 64


@pytest.mark.serial
def test_greedy_rows_cost_one_pass() -> None:
    """32 greedy rows over 151,936 ids: below 1 ms on one quiet core, 6 ms allowed."""
    logits = torch.randn(32, 151_936)
    sampler = Sampler(32, 151_936)
    for row in range(32):
        sampler.bind(row, greedy(), [1], 1, 0, 0)
    rows = list(range(32))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        sampler.sample(logits, rows)
        best = min(best, time.perf_counter() - start)
    assert best < 0.006
