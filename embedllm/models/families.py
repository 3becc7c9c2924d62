"""The architectures the native decoder runs, as differences from Llama.

Owns the table and how a config.json is matched to a row of it. Knows no weights; `config` turns a row and a file into
numbers. Invariant: a row holds what the architecture's own config class does where the file says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embedllm.models.fields import Fields


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture differs from Llama, with the defaults of its own config class."""

    norm_eps: float = 1e-6
    theta: float = 10_000.0
    local_theta: float | None = None  # a rope of their own for sliding layers
    head_dim: int | None = None  # None = hidden_size // num_heads
    window: str = "none"  # none | all | flagged_all | layers | pattern
    window_default: int | None = None
    pattern: int = 0  # every pattern-th layer sees everything
    qkv_bias: bool | None = False  # None = field attention_bias, for all four projections
    mlp_bias: bool = False  # True = field mlp_bias
    qk_norm: str = "none"
    gemma: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    query_scalar: bool = False
    softcaps: tuple[float | None, float | None] | None = None  # defaults of attention, logits
    multipliers: bool = False
    nope: bool = False
    partial: bool = False
    experts: int = 0  # how many where the file says nothing; 0 = a dense model
    renormalise: bool | None = None  # None = field norm_topk_prob
    tied: bool = False


_GEMMA = Family(head_dim=256, qkv_bias=None, gemma=True, tied=True)
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(qkv_bias=None, mlp_bias=True),
    "MistralForCausalLM": Family(window="all", window_default=4_096),
    "Qwen2ForCausalLM": Family(window="layers", qkv_bias=True),
    "Qwen3ForCausalLM": Family(head_dim=128, window="layers", qkv_bias=None, qk_norm="head"),
    "Phi3ForCausalLM": Family(norm_eps=1e-5, window="all", partial=True),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": Family(
        head_dim=256,
        window="pattern",
        window_default=4_096,
        pattern=2,
        qkv_bias=None,
        gemma=True,
        post_norms=True,
        query_scalar=True,
        softcaps=(50.0, 30.0),
        tied=True,
    ),
    "Gemma3ForCausalLM": Family(
        theta=1_000_000.0,
        local_theta=10_000.0,
        head_dim=256,
        window="pattern",
        window_default=4_096,
        pattern=6,
        qkv_bias=None,
        qk_norm="head",
        gemma=True,
        post_norms=True,
        query_scalar=True,
        softcaps=(None, None),
        tied=True,
    ),
    "Olmo2ForCausalLM": Family(norm_eps=1e-5, qkv_bias=None, qk_norm="full", pre_norms=False, post_norms=True),
    "GraniteForCausalLM": Family(qkv_bias=None, mlp_bias=True, multipliers=True),
    "SmolLM3ForCausalLM": Family(
        theta=2_000_000.0, window="layers", qkv_bias=None, mlp_bias=True, nope=True, tied=True
    ),
    "MixtralForCausalLM": Family(norm_eps=1e-5, theta=1_000_000.0, window="all", experts=8, renormalise=True),
    "Qwen3MoeForCausalLM": Family(head_dim=None, window="flagged_all", qkv_bias=None, qk_norm="head", experts=128),
}
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def architecture_of(fields: Fields) -> str:
    """The class name the file was saved for; where it names none, the one its model_type stands for."""
    names = fields.raw.get("architectures")
    model_type = fields.text("model_type", "")
    if names is None or names == []:
        return _BY_MODEL_TYPE.get(model_type, model_type or "unknown")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        fields.fail("architectures", "must be a list of class names")
    expected = _BY_MODEL_TYPE.get(model_type)
    if names[0] in FAMILIES and expected != names[0]:
        fields.fail("architectures", f"names {names[0]}, which does not go with model_type {model_type!r}")
    return str(names[0])
