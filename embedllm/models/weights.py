"""Names and shapes of a native model's weights, and which checkpoint tensors they are made of.

Owns the vocabulary between files and decoder: `layers.3.qkv.weight` is q, k and v of layer 3 stacked by rows. Knows
no file and no tensor. Invariant: `shapes(config)` is exactly what the decoder of that config needs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from embedllm.models.config import Layer, ModelConfig

Shape = tuple[int, ...]
_LAYER = re.compile(r"layers\.(\d{1,6})\.(.+)")
_EXPERT = re.compile(r"experts\.(\d{1,6})\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # older files keep what is computed from the config


@dataclass(frozen=True)
class Part:
    """A piece of a weight: rows start..stop of `target`; of expert `expert` where the weight has one per expert."""

    target: str
    start: int = 0
    stop: int | None = None
    expert: int | None = None


def shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every weight of the decoder with its shape; linear weights are [out, in]."""
    hidden = config.hidden_size
    out: dict[str, Shape] = {"embed.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    if not config.tied:
        out["head.weight"] = (config.vocab_size, hidden)
    for index, layer in enumerate(config.layers):
        out |= {f"layers.{index}.{name}": shape for name, shape in _layer_shapes(config, layer).items()}
    return out


def num_bytes(config: ModelConfig, bytes_per_value: int) -> int:
    """Bytes all weights take at this width."""
    return bytes_per_value * sum(math.prod(shape) for shape in shapes(config).values())


def _layer_shapes(config: ModelConfig, layer: Layer) -> dict[str, Shape]:
    hidden, rows = config.hidden_size, config.q_size + 2 * config.kv_size
    out: dict[str, Shape] = {"qkv.weight": (rows, hidden), "o.weight": (hidden, config.q_size)}
    if config.pre_norms:
        out |= {"attn_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
    if config.post_norms:
        out |= {"post_attn_norm.weight": (hidden,), "post_mlp_norm.weight": (hidden,)}
    if config.qkv_bias:
        out["qkv.bias"] = (rows,)
    if config.o_bias:
        out["o.bias"] = (hidden,)
    if config.qk_norm != "none":
        full = config.qk_norm == "full"
        out["q_norm.weight"] = (config.q_size if full else config.head_dim,)
        out["k_norm.weight"] = (config.kv_size if full else config.head_dim,)
    if layer.moe is not None:
        experts, inner = layer.moe.num_experts, layer.moe.intermediate_size
        out["router.weight"] = (experts, hidden)
        out["experts.gate_up"] = (experts, 2 * inner, hidden)
        out["experts.down"] = (experts, hidden, inner)
        return out
    inner = config.intermediate_size
    out |= {"gate_up.weight": (2 * inner, hidden), "down.weight": (hidden, inner)}
    if config.mlp_bias:
        out |= {"gate_up.bias": (2 * inner,), "down.bias": (hidden,)}
    return out


def locate(config: ModelConfig, source: str) -> Part | None:
    """Where a checkpoint's tensor goes; None for one that is not needed.

    Raises KeyError for a name that no native architecture has.
    """
    if _IGNORED.fullmatch(source):
        return None
    name = source.removeprefix("model.")
    top = {"embed_tokens.weight": "embed.weight", "norm.weight": "norm.weight", "lm_head.weight": "head.weight"}
    if name in top:
        return Part(top[name])
    match = _LAYER.fullmatch(name)
    if match is None or int(match[1]) >= config.num_layers:
        raise KeyError(source)
    index = int(match[1])
    part = _locate_in_layer(config, config.layers[index], match[2].replace("block_sparse_moe.", "mlp."))
    return Part(f"layers.{index}.{part.target}", part.start, part.stop, part.expert)


def _locate_in_layer(config: ModelConfig, layer: Layer, name: str) -> Part:
    if layer.moe is not None and name.startswith("mlp."):
        return _locate_expert(layer.moe.intermediate_size, name.removeprefix("mlp."))
    norms = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attn_norm" if config.post_norms else "mlp_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
        "self_attn.q_norm": "q_norm",
        "self_attn.k_norm": "k_norm",
        "self_attn.o_proj": "o",
        "self_attn.qkv_proj": "qkv",
        "mlp.gate_up_proj": "gate_up",
        "mlp.down_proj": "down",
    }
    q, kv, inner = config.q_size, config.kv_size, config.intermediate_size
    rows = {
        "self_attn.q_proj": ("qkv", 0, q),
        "self_attn.k_proj": ("qkv", q, q + kv),
        "self_attn.v_proj": ("qkv", q + kv, q + 2 * kv),
        "mlp.gate_proj": ("gate_up", 0, inner),
        "mlp.up_proj": ("gate_up", inner, 2 * inner),
    }
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias") or module not in norms.keys() | rows.keys():
        raise KeyError(name)
    if module in norms:
        return Part(f"{norms[module]}.{kind}")
    target, start, stop = rows[module]
    return Part(f"{target}.{kind}", start, stop)


def _locate_expert(inner: int, name: str) -> Part:
    whole = {
        "gate.weight": "router.weight",
        "experts.gate_up_proj": "experts.gate_up",
        "experts.down_proj": "experts.down",
    }
    if name in whole:
        return Part(whole[name])
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise KeyError(name)
    if match[2] in ("w2", "down_proj"):
        return Part("experts.down", expert=int(match[1]))
    first = 0 if match[2] in ("w1", "gate_proj") else inner
    return Part("experts.gate_up", first, first + inner, int(match[1]))
