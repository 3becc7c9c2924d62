"""The engine on a card: transformers' tokens, requests that end, memory that comes back."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import embedllm
from embedllm.errors import OutOfMemory
from tests.engine import tiny_models
from tests.engine.equality import draw, judge

pytestmark = pytest.mark.gpu
OPTIONS = {"device": "cuda", "tokenizer": None, "max_model_len": 128, "progress": False}


@pytest.fixture(autouse=True)
def exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("name", list(tiny_models.RECIPES))
@pytest.mark.parametrize("block_size", [4, 16])
def test_same_tokens_as_transformers(name: str, block_size: int, test_seed: int) -> None:
    """float32, greedy; many at once, in chunks, with shared prefixes, and a pool so tight that some are preempted."""
    rng = random.Random(test_seed)
    shared = draw(rng, 17)
    prompts = [draw(rng, 5 + number) for number in range(8)] + [shared + draw(rng, 3 + number) for number in range(8)]
    params = embedllm.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    tight = max(2 * -(-48 // block_size), 12)
    for options in ({"num_kv_blocks": 512}, {"num_kv_blocks": tight, "max_batch_tokens": 32, "max_num_seqs": 8}):
        with embedllm.LLM(
            tiny_models.folder(name), dtype="float32", block_size=block_size, **OPTIONS, **options
        ) as llm:
            answers = [completion.tokens for completion in llm.generate(prompts, params)]
            stats = llm.stats()
        verdict = judge(name, prompts, answers, 24)
        assert not verdict.wrong, verdict.wrong
        assert len(verdict.ties) <= 1
        assert stats.num_requests_running == 0 and stats.kv_cache_usage == 0.0


DEVICE = OPTIONS["device"]


def gaps(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """By how much, in the logits' scale, transformers' best logit leads our token, given our tokens before it."""
    found = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]], device=DEVICE)).logits[0, len(prompt) - 1 :].float()
        ours = torch.tensor(tokens, device=DEVICE)
        found.append((logits.amax(1) - logits.gather(1, ours[:, None])[:, 0]) / logits.abs().amax(1))
    return torch.cat(found)


@pytest.mark.parametrize("name", list(tiny_models.RECIPES))
def test_bfloat16_tokens_are_mostly_transformers_own(name: str, test_seed: int) -> None:
    """Teacher-forced, in bfloat16 on the same device. These models are made so that everything depends on everything,
    so rounding turns some choices around: on a CPU one in ten at most, and more where experts are chosen.
    """
    rng = random.Random(test_seed)
    prompts = [draw(rng, 5 + 3 * number) for number in range(8)]
    params = embedllm.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    with embedllm.LLM(tiny_models.folder(name), dtype="bfloat16", num_kv_blocks=512, **OPTIONS) as llm:
        answers = [completion.tokens for completion in llm.generate(prompts, params)]
    found = gaps(copy.deepcopy(tiny_models.reference(name)).to(DEVICE, torch.bfloat16), prompts, answers)
    assert (found == 0).float().mean() > 0.75, found


def test_bfloat16_tokens_of_a_trained_model_are_transformers_own() -> None:
    """The same for the model in the box, whose logits are not chaotic: what differs leads by next to nothing."""
    texts = ["def add(a, b):", "class Reader:", "import os", "for name in names:", "import sys; print("]
    params = embedllm.SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    with embedllm.LLM(device=DEVICE, dtype="bfloat16", progress=False) as llm:
        prompts = [llm.tokenize(text) for text in texts]
        answers = [completion.tokens for completion in llm.generate(prompts, params)]
    folder = Path(embedllm.__file__).parent / "demo" / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    found = gaps(theirs, prompts, answers)
    assert (found == 0).float().mean() > 0.95 and found.max() < 0.03, found


def test_resizing_moves_the_memory_and_nobodys_tokens() -> None:
    prompts = ["def add(a, b):", "class Reader:", "import os", "for name in names:"]
    params = embedllm.SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    with embedllm.LLM(device=DEVICE, dtype="float32", kv_cache_memory="64MiB", progress=False) as llm:
        expected = [completion.tokens for completion in llm.generate(prompts, params)]
        before = torch.cuda.memory_allocated()
        asked = [llm.submit(prompt, params) for prompt in prompts]
        next(iter(asked[0]))
        sizes = [llm.resize_kv(size).kv_cache for size in ("16MiB", "96MiB")]
        assert [one.result().tokens for one in asked] == expected
        assert sizes[0] <= 16 * 2**20 < sizes[1] <= 96 * 2**20
        assert before + 28 * 2**20 < torch.cuda.memory_allocated() < before + 36 * 2**20
        assert [completion.tokens for completion in llm.generate(prompts, params)] == expected  # captured anew


def test_bfloat16_is_near_what_the_host_computes() -> None:
    """Log-probabilities of a text, of the model in the box, by the card and by this machine's processor."""
    text = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n"
    found = []
    for device in ("cuda", "cpu"):
        with embedllm.LLM(device=device, dtype="bfloat16" if device == "cuda" else "float32", progress=False) as llm:
            entries = llm.generate(text, max_tokens=1, prompt_logprobs=0).prompt_logprobs
            assert entries is not None
            found.append(torch.tensor([entry[0].logprob for entry in entries[1:] if entry is not None]))
    assert (found[0] - found[1]).abs().mean() < 0.05


def test_a_float8_cache_is_near_a_bfloat16_one() -> None:
    """Log-probabilities of a text, of the model in the box, in half the bytes per token."""
    text = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n" * 8
    found, sizes = [], []
    for kept in ("auto", "fp8"):
        with embedllm.LLM(device="cuda", dtype="bfloat16", kv_cache_dtype=kept, progress=False) as llm:
            completion = llm.generate(text, max_tokens=32, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
            entries = completion.prompt_logprobs
            assert entries is not None and len(completion.tokens) == 32
            found.append(torch.tensor([entry[0].logprob for entry in entries[1:] if entry is not None]))
            sizes.append(llm.memory().kv_bytes_per_token)
    assert sizes[0] == 2 * sizes[1]
    assert 0 < (found[0] - found[1]).abs().mean() < 0.05


def test_a_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    with embedllm.LLM(device="cuda", dtype="float32", progress=False) as llm:
        alone = llm.generate("for name in ", max_tokens=32, temperature=0.9, top_p=0.95, seed=7).tokens
        crowd = llm.generate(["for name in "] + ["import "] * 20, max_tokens=32, temperature=0.9, top_p=0.95, seed=7)
    assert crowd[0].tokens == alone


def test_leaving_a_stream_ends_its_request() -> None:
    with embedllm.LLM(device="cuda", progress=False) as llm:
        for _ in llm.stream("class ", max_tokens=1_000, ignore_eos=True):
            break
        assert llm.generate("import ", max_tokens=4).tokens
        assert llm.stats().num_requests_running == 0


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "qwen3_moe"])
def test_captured_steps_give_the_same_tokens(name: str, test_seed: int) -> None:
    rng = random.Random(test_seed)
    prompts = [draw(rng, 5 + number) for number in range(11)]
    params = embedllm.SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    answers = []
    for captured in (True, False):
        with embedllm.LLM(tiny_models.folder(name), dtype="float32", num_kv_blocks=512, **OPTIONS) as llm:
            assert llm._core is not None
            runner = llm._core.worker._engine._run
            if not captured:
                runner._graphs = None  # type: ignore[attr-defined]
            answers.append([completion.tokens for completion in llm.generate(prompts, params)])
            if captured:
                assert len(runner._graphs) > 0  # type: ignore[attr-defined]
    assert answers[0] == answers[1]


def test_answers_with_a_shape_beside_answers_without() -> None:
    """Masks are made on the host while the card computes; everybody's tokens are those of a CPU, but for rounding."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}
    schema["required"] = ["name", "n"]
    answers = []
    for device in ("cpu", "cuda"):
        with embedllm.LLM(device=device, dtype="float32", num_kv_blocks=512, progress=False) as llm:
            shaped = [llm.submit(f"Record {i}: ", json_schema=schema, max_tokens=400) for i in range(8)]
            free = [llm.submit(f"def task_{i}(", max_tokens=40) for i in range(8)]
            answers.append([generation.result().tokens for generation in (*shaped, *free)])
            for generation in shaped:
                assert set(generation.result().parsed) == {"name", "n"}
    assert sum(mine == theirs for mine, theirs in zip(*answers, strict=True)) >= 15


def test_two_engines_and_all_memory_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    first = embedllm.LLM(device="cuda", kv_cache_memory="64MiB", progress=False)
    second = embedllm.LLM(device="cuda", kv_cache_memory="32MiB", progress=False)
    texts = [llm.generate("def add(a, b):", max_tokens=16).text for llm in (first, second)]
    assert texts[0] == texts[1]
    first.close()
    assert second.generate("def add(a, b):", max_tokens=16).text == texts[0]
    second.close()
    assert torch.cuda.memory_allocated() == before


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(OutOfMemory, match="are free"):
        embedllm.LLM(device="cuda", kv_cache_memory="4TiB", progress=False)


def test_the_host_programs_stream_and_device_stay_as_they_were() -> None:
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    with embedllm.LLM(device="cuda", progress=False) as llm:
        llm.generate("import ", max_tokens=4)
        assert (torch.cuda.current_device(), torch.cuda.current_stream()) == (device, stream)
