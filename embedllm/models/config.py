"""What a model computes, read from its config.json.

Owns ModelConfig: every number and switch the native decoder needs, in one spelling, whatever version of transformers
wrote the file. Knows no weights and no device. Invariant: a ModelConfig that exists describes a model the decoder
computes exactly; a feature that would change the maths and is not known here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedllm.errors import UnsupportedModel
from embedllm.models.families import FAMILIES, Family, architecture_of
from embedllm.models.fields import Fields
from embedllm.models.rope import MAX_POSITIONS, Rope, parse_rope

MAX_LAYERS = 4_096
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Settings that change the maths where they are set, and that no native family has.
_FOREIGN = ("quantization_config", "attention_sinks", "use_bidirectional_attention", "attention_chunk_size", "sinks")


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of experts: softmax over all, the best `num_chosen` weighted by it (`renormalise`: to sum 1)."""

    num_experts: int
    num_chosen: int
    intermediate_size: int
    renormalise: bool


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What differs from layer to layer.

    window: how many tokens a query sees, itself included; None = all before it.
    rope: None = this layer knows no positions. moe: None = a dense MLP.
    """

    window: int | None
    rope: Rope | None
    moe: MoE | None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are per model, not per device.

    norm_offset: added to every norm weight (Gemma: 1.0). pre_norms: norms before attention and MLP (OLMo 2: none).
    post_norms: norms on their outputs, before the residual is added (Gemma 2 and 3, OLMo 2).
    qk_norm: "none" | "head" (over head_dim, per head) | "full" (over all heads together); before rope in all cases.
    activation: "silu" | "gelu_tanh".
    attention_scale: factor on q·k. attention_softcap, logits_softcap: c in c·tanh(x / c), None = off.
    embed_scale: factor on embeddings, first rounded to their dtype where embed_scale_rounds.
    residual_scale: factor on what each block adds. logits_divisor: logits are divided by it.
    tied: the head is the embedding. max_len: most positions the model was made for.
    eos_ids may be empty. bos_id None = the file names none.
    dtype: what the weights were saved as, "float32" | "float16" | "bfloat16".
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_len: int
    layers: tuple[Layer, ...]
    norm_eps: float
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    attention_scale: float
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    embed_scale_rounds: bool = False
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    tied: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    dtype: str = "float32"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def values_per_token(self) -> int:
        """Most values that one token has in flight: residual, norm and output, and attention or the widest MLP."""
        mlps = [
            3 * self.intermediate_size
            if layer.moe is None
            else layer.moe.num_chosen * (3 * layer.moe.intermediate_size + self.hidden_size)
            for layer in self.layers
        ]
        return 3 * self.hidden_size + self.q_size + max(self.q_size + 2 * self.kv_size, *mlps)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the object of a config.json, transformers 4.x or 5.x spelling.

        Raises ModelFormatError naming `where` and the field for a value of a wrong type or out of range, and
        UnsupportedModel for an architecture without a native decoder or a feature that it does not compute.
        """
        fields = Fields(raw, where)
        architecture = architecture_of(fields)
        family = FAMILIES.get(architecture)
        if family is None:
            raise UnsupportedModel(
                f"{where}: no native decoder for architecture {architecture!r}; there is one for {', '.join(FAMILIES)}"
            )
        _refuse_foreign(fields)
        return cls(architecture=architecture, **_sizes(fields, family), **_maths(fields, family))


def _refuse_foreign(fields: Fields) -> None:
    for name in _FOREIGN:
        if fields.raw.get(name):
            raise UnsupportedModel(f"{fields.where}: {name} is set, and embedllm does not compute it")


def _sizes(fields: Fields, family: Family) -> dict[str, Any]:
    hidden = fields.integer("hidden_size", 1, 2**20)
    heads = fields.integer("num_attention_heads", 1, 2**16)
    kv_heads = fields.integer("num_key_value_heads", 1, heads, heads)
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"is {kv_heads}, which does not divide num_attention_heads={heads}")
    if family.head_dim is None and not fields.has("head_dim") and hidden % heads:
        fields.fail("num_attention_heads", f"is {heads}, which does not divide hidden_size={hidden}")
    head_dim = fields.integer("head_dim", 1, 2**14, family.head_dim or hidden // heads)
    vocab = fields.integer("vocab_size", 1, 2**26)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    windows = _windows(fields, family, num_layers)
    ropes = _ropes(fields, family, windows, head_dim)
    moes = _moes(fields, family, num_layers)
    layers = (Layer(window=w, rope=r, moe=m) for w, r, m in zip(windows, ropes, moes, strict=True))
    return {
        "hidden_size": hidden,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.integer("intermediate_size", 1, 2**24),
        "vocab_size": vocab,
        "max_len": fields.integer("max_position_embeddings", 1, MAX_POSITIONS),
        "layers": tuple(layers),
        "attention_scale": _attention_scale(fields, family, head_dim),
        "tied": fields.flag("tie_word_embeddings", family.tied),
        "eos_ids": fields.ids("eos_token_id", 2**31),
        "bos_id": next(iter(fields.ids("bos_token_id", 2**31)), None),
        "dtype": saved_dtype(fields),
    }


def _attention_scale(fields: Fields, family: Family, head_dim: int) -> float:
    if family.query_scalar:
        return float(fields.number("query_pre_attn_scalar", 0.0, 1e9, 256.0, above=True) ** -0.5)
    if family.multipliers:
        return float(fields.number("attention_multiplier", 0.0, 1e9, 1.0, above=True))
    return float(head_dim**-0.5)


def saved_dtype(fields: Fields) -> str:
    """The dtype field of transformers 5.x or torch_dtype of 4.x, "float32" where neither is set."""
    name = str(fields.text("dtype", fields.text("torch_dtype", "float32"))).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise UnsupportedModel(f"{fields.where}: dtype {name!r}; float32, float16 and bfloat16 can be run")
    return name


def _maths(fields: Fields, family: Family) -> dict[str, Any]:
    attention_bias = fields.flag("attention_bias", False) if family.qkv_bias is None else False
    activation = fields.text(
        "hidden_activation", fields.text("hidden_act", "gelu_pytorch_tanh" if family.gemma else "silu")
    )
    if family.gemma and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # what Gemma's first files meant
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(f"{fields.where}: hidden_act {activation!r}; known are {', '.join(_ACTIVATIONS)}")
    caps = family.softcaps or (None, None)
    return {
        "norm_eps": fields.number("rms_norm_eps", 0.0, 1.0, family.norm_eps),
        "norm_offset": 1.0 if family.gemma else 0.0,
        "pre_norms": family.pre_norms,
        "post_norms": family.post_norms,
        "qk_norm": family.qk_norm,
        "qkv_bias": attention_bias or bool(family.qkv_bias),
        "o_bias": attention_bias,
        "mlp_bias": family.mlp_bias and fields.flag("mlp_bias", False),
        "activation": _ACTIVATIONS[activation],
        "attention_softcap": _softcap(fields, "attn_logit_softcapping", caps[0]) if family.softcaps else None,
        "logits_softcap": _softcap(fields, "final_logit_softcapping", caps[1]) if family.softcaps else None,
        "embed_scale": _embed_scale(fields, family),
        "embed_scale_rounds": family.gemma,
        "residual_scale": fields.number("residual_multiplier", 0.0, 1e9, 1.0) if family.multipliers else 1.0,
        "logits_divisor": fields.number("logits_scaling", 0.0, 1e9, 1.0, above=True) if family.multipliers else 1.0,
    }


def _softcap(fields: Fields, name: str, default: float | None) -> float | None:
    if name in fields.raw and fields.raw[name] is None:
        return None  # null switches it off; only an absent field takes the family's default
    value: float | None = fields.number(name, 0.0, 1e9, default, above=True)
    return value


def _embed_scale(fields: Fields, family: Family) -> float:
    if family.gemma:
        return float(fields.integer("hidden_size", 1, 2**20) ** 0.5)
    return float(fields.number("embedding_multiplier", 0.0, 1e9, 1.0)) if family.multipliers else 1.0


def _windows(fields: Fields, family: Family, num_layers: int) -> list[int | None]:
    """Per layer, the window or None."""
    if family.window == "none":
        return [None] * num_layers
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        window = None  # null switches it off; only an absent field takes the family's default
    else:
        window = fields.integer("sliding_window", 1, MAX_POSITIONS, family.window_default)
    if family.window in ("layers", "flagged_all") and not fields.flag("use_sliding_window", False):
        window = None
    if window is None or family.window in ("all", "flagged_all"):
        return [window] * num_layers
    if fields.has("layer_types"):
        kinds = fields.items("layer_types", num_layers)
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(f"{fields.where}: layer type {kind!r}; full and sliding attention can be run")
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if family.window == "pattern":
        pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, family.pattern)
        return [window if (index + 1) % pattern else None for index in range(num_layers)]
    if family.nope:
        return [None if turned else window for turned in _turned(fields, num_layers)]
    first = fields.integer("max_window_layers", 0, MAX_LAYERS, 28)
    return [window if index >= first else None for index in range(num_layers)]


def _turned(fields: Fields, num_layers: int) -> list[bool]:
    """Per layer, whether it has a rope (SmolLM3 leaves it out of every fourth)."""
    if fields.has("no_rope_layers"):
        return [bool(entry) for entry in fields.items("no_rope_layers", num_layers)]
    interval = fields.integer("no_rope_layer_interval", 1, MAX_LAYERS, 4)
    return [(index + 1) % interval != 0 for index in range(num_layers)]


def _ropes(fields: Fields, family: Family, windows: list[int | None], head_dim: int) -> list[Rope | None]:
    """Per layer, its rope or None."""

    def rope(spec: Fields, theta: float) -> Rope:
        return parse_rope(fields, spec, head_dim=head_dim, theta=theta, partial=family.partial)

    spec = fields.child("rope_scaling" if fields.has("rope_scaling") else "rope_parameters")
    nested = {"full_attention", "sliding_attention"} & set(spec.raw)
    if nested and family.local_theta is None:
        raise UnsupportedModel(f"{spec.where}: a rope per kind of layer; this architecture has one for all")
    if family.local_theta is not None:
        local = fields.number("rope_local_base_freq", 1.0, 1e18, family.local_theta, above=True)
        full = rope(spec.child("full_attention") if nested else spec, family.theta)
        sliding_spec = spec.child("sliding_attention")
        if "rope_theta" not in sliding_spec.raw:
            sliding_spec = Fields({**sliding_spec.raw, "rope_theta": local}, sliding_spec.where)
        sliding = rope(sliding_spec, local)
        return [full if window is None else sliding for window in windows]
    one = rope(spec, family.theta)
    turned = _turned(fields, len(windows)) if family.nope else [True] * len(windows)
    return [one if turns else None for turns in turned]


def _moes(fields: Fields, family: Family, num_layers: int) -> list[MoE | None]:
    """Per layer, its experts or None."""
    if not family.experts:
        return [None] * num_layers
    dense = (
        fields.items("mlp_only_layers", len(fields.raw["mlp_only_layers"])) if fields.raw.get("mlp_only_layers") else []
    )
    name = next((name for name in ("num_local_experts", "num_experts") if fields.has(name)), "num_experts")
    count = fields.integer(name, 0, 2**16, family.experts)
    if not count:
        return [None] * num_layers
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    moe = MoE(
        num_experts=count,
        num_chosen=fields.integer("num_experts_per_tok", 1, count, 2 if family.renormalise else 8),
        intermediate_size=fields.integer("intermediate_size", 1, 2**24)
        if family.renormalise
        else fields.integer("moe_intermediate_size", 1, 2**24, 768),
        renormalise=fields.flag("norm_topk_prob", False) if family.renormalise is None else family.renormalise,
    )
    return [moe if index not in dense and (index + 1) % step == 0 else None for index in range(num_layers)]
