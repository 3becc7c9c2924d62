"""A whole decoder on the Triton kernels, interpreted: the same logits as on the CPU's own operations, in float32.

This is the proof of the wiring (`gpu`, and who calls what with which views), not of the kernels one by one.
"""

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

import embedllm.sampler
from embedllm import ops
from embedllm.kv_cache import KVCache
from embedllm.models.config import ModelConfig
from embedllm.models.decoder import Decoder
from embedllm.params import SamplingParams
from embedllm.plan_types import UNKNOWN, Entry, Plan
from embedllm.runner import Runner
from embedllm.sampler import Sampler

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "sliding_window": 6,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 9.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.3,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
BLOCK = 4


def make(raw: dict[str, Any]) -> Runner:
    decoder = Decoder(ModelConfig.from_dict(SMALL | raw), max_model_len=128)
    generator = torch.Generator().manual_seed(5)
    for name, shape in decoder.expected().items():
        decoder.put(name, torch.randn(shape, generator=generator) * (0.3 if "norm" not in name else 1.0))
    decoder.finish()
    kv = KVCache(decoder.kv_group, 32, BLOCK)
    kv.blocks.fill_(torch.nan)  # what is read must have been written
    return Runner(decoder, kv, 8)


def plans() -> list[Plan]:
    """Whole prompts and a chunk; then decodes and the rest of the chunk; then a block's copy and ids not known yet."""

    def part(row: int, start: int, tokens: list[int], blocks: list[int], logits: int = 1) -> Entry:
        return Entry(row, 0, row, start, tokens, 0, logits, array("i", blocks))

    first = [part(0, 0, [3, 1, 4, 1, 5], [7, 2]), part(1, 0, [9], [5]), part(2, 0, [2, 6, 5, 3, 5, 8, 9], [1, 9], 0)]
    second = [part(0, 5, [11], [7, 2]), part(1, 1, [12], [5]), part(2, 7, [7, 9, 3], [1, 9, 30])]
    third = [part(0, 6, [UNKNOWN], [7, 2]), part(1, 2, [UNKNOWN], [31]), part(2, 10, [UNKNOWN], [1, 9, 30])]
    return [Plan(0, first), Plan(1, second), Plan(2, third, [(5, 31)])]


def run(raw: dict[str, Any]) -> list[Tensor]:
    runner = make(raw)
    found = []
    for plan in plans():
        logits = runner(plan).logits
        found.append(logits)
        rows = [entry.row for entry in plan.entries if entry.num_logits]
        runner.remember(rows, logits.argmax(1))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(MODELS[name])
    monkeypatch.setattr(ops, "on_gpu", lambda device: True)
    found = run(MODELS[name])
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all() and theirs.std() > 0.05, "a model that says nothing proves nothing"
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
        assert torch.equal(ours.argmax(1), theirs.argmax(1))


def test_the_sampler_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch, test_seed: int) -> None:
    """Greedy, unfiltered and filtered rows side by side, and one whose logits are edited first."""
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8, min_p=0.01),
        SamplingParams(temperature=0.8, logit_bias={3: 5.0}),
    ]

    def tokens() -> list[list[int]]:
        generator = torch.Generator().manual_seed(test_seed)
        sampler = Sampler(len(params), 500)
        for row, its in enumerate(params):
            sampler.bind(row, its, [1, 2, 3], 3, seed=row, sample_index=0)
        rows = list(range(len(params)))
        steps = [torch.randn((len(params), 500), generator=generator) * 3 for _ in range(8)]
        return [sampler.sample(logits, rows, [3 + step] * len(rows)).tokens for step, logits in enumerate(steps)]

    expected = tokens()
    monkeypatch.setattr(embedllm.sampler, "on_gpu", lambda device: True)
    assert tokens() == expected
    assert len({row[1] for row in expected}) > 3, "nothing was drawn"
