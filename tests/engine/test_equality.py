"""The engine's greedy tokens are those of transformers.generate, whatever else happens in the engine.

Every architecture meets every setting, and every two settings meet, on tiny random models in float32. Each model first
proves that it can tell: its answers vary, depend on the context, and change when KV, tables or positions are wrong.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import embedllm
from embedllm.config import Limits
from embedllm.plan_types import Plan
from tests.engine import tiny_models
from tests.engine.equality import Bench, Prompts, Verdict, alone, draw, judge, loaded, shifted
from tests.engine.pairwise import Case, pairwise

FACTORS: dict[str, list[Any]] = {
    "model": list(tiny_models.RECIPES),
    "cache": ["off", "cold", "warm"],
    "chunk": [1, 7, "block", "large"],
    "block": [1, 4, 16],
    "pool": ["roomy", "tight"],
    "batch": [1, 8, 64],
    "arrivals": ["together", "staggered"],
    "lengths": ["short", "long", "mixed"],
    "depth": [1, 2],
}
LENGTHS = {"short": [5, 6], "long": [33, 47], "mixed": [5, 19, 50]}


def budget(case: Case) -> int:
    """Most tokens of a step."""
    return {"block": case["block"], "large": 512}.get(case["chunk"], case["chunk"])


def num_running(case: Case) -> int:
    return min(case["batch"], budget(case))


def allowed(case: Case) -> bool:
    """Preemption takes two that run at once. Sixty-four prompts in sips take more time than they tell."""
    if case["batch"] == 64 and (
        (budget(case) == 1 and case["lengths"] != "short") or (budget(case) < 16 and case["pool"] == "tight")
    ):
        return False
    return case["pool"] == "roomy" or num_running(case) > 1


def num_tokens(case: Case) -> int:
    """Tokens asked for: in a tight pool, so many that two prompts outgrow it while both run."""
    return 12 if case["pool"] == "roomy" else max(36, 3 * case["block"])


CASES = pairwise(FACTORS, allowed)


def name_of(case: Case) -> str:
    return "-".join(str(value) for value in case.values())


def make_prompts(case: Case, rng: random.Random) -> Prompts:
    """Prompts of the case's lengths, every other one starting as the one before it."""
    prompts: Prompts = []
    shared = draw(rng, 17)
    for index in range(case["batch"]):
        length = LENGTHS[case["lengths"]][index % len(LENGTHS[case["lengths"]])]
        prompt = draw(rng, length)
        if index % 2:
            keep = min(17, length - 1)
            prompt[:keep] = shared[:keep]
        prompts.append(prompt)
    return prompts


def make_bench(case: Case, prompts: Prompts) -> Bench:
    """A tight pool lets some of the longest prompts in, and not all of them finish."""
    crowd = min(6 if budget(case) >= 16 else 2, num_running(case))
    longest, running = max(map(len, prompts)), num_running(case)
    at_first, at_last = (-(-length // case["block"]) for length in (longest, longest + num_tokens(case)))
    limits = Limits(
        block_size=case["block"],
        num_blocks=max(crowd * (at_first + 1) - 1, at_last + 1)
        if case["pool"] == "tight"
        else 2 * at_last * (running + 2),
        max_model_len=tiny_models.RECIPES[case["model"]].max_model_len,
        max_num_seqs=running,
        max_batch_tokens=budget(case),
        prefix_caching=case["cache"] != "off",
    )
    return Bench(case["model"], limits, case["depth"])


WITHIN = pairwise({name: values for name, values in FACTORS.items() if name != "model"}, allowed)
SWEEP = [{"model": name} | case for name in tiny_models.RECIPES for case in WITHIN]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_same_tokens_as_transformers(
    case: Case, test_seed: int, record_property: Callable[[str, object], None]
) -> None:
    run_case(case, test_seed, record_property)


@pytest.mark.soak
@pytest.mark.parametrize("case", SWEEP, ids=name_of)
def test_same_tokens_for_every_model_in_every_setting(
    case: Case, test_seed: int, record_property: Callable[[str, object], None]
) -> None:
    """All pairs of settings for each model by itself."""
    run_case(case, test_seed, record_property)


def run_case(case: Case, test_seed: int, record_property: Callable[[str, object], None]) -> None:
    rng = random.Random(test_seed)
    prompts = make_prompts(case, rng)
    bench = make_bench(case, prompts)
    if case["cache"] == "warm":
        bench.run_together(prompts, 2)
    hits_before = bench.engine.scheduler.num_prefix_hits
    if case["arrivals"] == "staggered":
        answers = bench.run_staggered(prompts, num_tokens(case), rng)
    else:
        answers = bench.run_together(prompts, num_tokens(case))
    verdict = judge(case["model"], prompts, answers, num_tokens(case))
    assert not verdict.wrong, verdict.wrong
    record_property("equality", (verdict.num_requests, len(verdict.ties)))
    check_that_it_happened(case, bench, prompts, bench.engine.scheduler.num_prefix_hits - hits_before)


def check_that_it_happened(case: Case, bench: Bench, prompts: Prompts, num_hits: int) -> None:
    """The settings had the effect they are named for."""
    scheduler = bench.engine.scheduler
    assert scheduler.pool.num_used == 0
    assert bench.most_tokens <= budget(case)
    if max(map(len, prompts)) > budget(case):
        assert bench.num_chunks
    assert bool(bench.num_ahead) == (case["depth"] > 1)
    if case["pool"] == "tight":
        assert scheduler.num_preemptions
    elif case["arrivals"] == "together":
        assert bench.most_entries >= min(2, num_running(case))
        assert case["chunk"] != "large" or bench.most_entries == num_running(case)
    if case["cache"] == "off":
        assert num_hits == 0
    if case["cache"] == "warm" and case["pool"] == "roomy" and case["block"] < min(map(len, prompts)):
        assert num_hits


def test_the_judge_tells_wrong_from_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = probe_prompt("llama")
    right = tiny_models.generate("llama", [prompt], 4)
    other = [[*right[0][:2], (right[0][2] + 1) % 251, right[0][3]]]
    assert judge("llama", [prompt], right, 4) == Verdict(1)
    assert len(judge("llama", [prompt], other, 4).wrong) == 1
    flat = torch.ones(len(prompt) + 2, 251)
    flat[-1, other[0][2]] -= 0.9e-4
    monkeypatch.setattr(tiny_models, "teacher_forced", lambda name, tokens: flat)
    assert len(judge("llama", [prompt], other, 4).ties) == 1


PROBE = 24


def probe_prompt(name: str, seed: int = 0) -> list[int]:
    return draw(random.Random(f"{name} {seed}"), PROBE)


@pytest.mark.parametrize("name", tiny_models.RECIPES)
def test_answers_vary_and_depend_on_the_context(name: str) -> None:
    first, other = probe_prompt(name), probe_prompt(name, 1)
    other[-1] = first[-1]
    answers = tiny_models.generate(name, [first, other], 20)
    assert len(set(answers[0])) >= 10
    assert answers[0] != answers[1]


@pytest.mark.parametrize("name", tiny_models.RECIPES)
def test_wrong_kv_tables_and_positions_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = probe_prompt(name)
    expected = tiny_models.generate(name, [prompt], 20)[0]
    assert alone(name, prompt, 20) == expected

    def overwrite(bench: Bench, plan: Plan) -> None:
        entry = plan.entries[0]
        if entry.start == PROBE + 4:
            last_full = entry.blocks[entry.start // 4 - 1]
            bench.kv.blocks[last_full].normal_(generator=torch.Generator().manual_seed(0))

    def swap(bench: Bench, plan: Plan) -> None:
        blocks = plan.entries[0].blocks
        if plan.entries[0].start == PROBE + 6:
            blocks[-1], blocks[-2] = blocks[-2], blocks[-1]

    assert alone(name, prompt, 20, disturb=overwrite) != expected
    assert alone(name, prompt, 20, disturb=swap) != expected
    with monkeypatch.context() as patch:
        patch.setattr(loaded(name).model, "forward", shifted(loaded(name)))
        assert alone(name, prompt, 20) != expected


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "gpt2"])
def test_through_the_public_api(name: str, test_seed: int) -> None:
    """LLM(folder, tokenizer=None): token ids in, the same tokens out, many at once through the thread."""
    rng = random.Random(test_seed)
    prompts = [draw(rng, length) for length in [5, 19, 50] * 5]
    expected = tiny_models.generate(name, prompts, 12)
    with embedllm.LLM(
        tiny_models.folder(name), tokenizer=None, dtype="float32", block_size=4, num_kv_blocks=256, max_num_seqs=8,
        max_batch_tokens=32, max_model_len=256,
    ) as llm:  # fmt: skip
        params = embedllm.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        completions = llm.generate(prompts, params)
        again = llm.generate(prompts, params)
    assert [completion.tokens for completion in completions] == expected
    assert [completion.tokens for completion in again] == expected
    assert sum(completion.usage.cached_tokens for completion in again) > 0
