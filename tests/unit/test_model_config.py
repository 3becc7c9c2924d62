"""config.json to ModelConfig: every spelling, and nothing hostile gets through."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedllm.errors import ModelFormatError, UnsupportedModel
from embedllm.models.config import ModelConfig
from embedllm.models.families import FAMILIES
from embedllm.models.fields import read_json
from embedllm.models.shapes import SHAPES, shape_config
from embedllm.models.weights import num_bytes, shapes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def parse(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelConfig:
    model_type = architecture.removesuffix("ForCausalLM").lower()
    model_type = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}.get(model_type, model_type)
    return ModelConfig.from_dict(LLAMA | {"architectures": [architecture], "model_type": model_type} | changes)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_reads_llama() -> None:
    config = parse(eos_token_id=[2, 5], bos_token_id=1, torch_dtype="bfloat16")
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (64, 6, 4, 2)
    assert (config.head_dim, config.q_size, config.kv_size) == (16, 64, 32)
    assert config.norm_eps == 1e-5
    assert config.eos_ids == (2, 5)
    assert config.bos_id == 1
    assert config.dtype == "bfloat16"
    assert config.attention_scale == 16**-0.5
    assert windows(config) == [None] * 6


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_fields_take_the_defaults_of_the_config_class(architecture: str) -> None:
    """A file with the sizes alone means what transformers' own class for it means."""
    transformers = pytest.importorskip("transformers")
    model_type = {"Gemma3ForCausalLM": "gemma3_text", "Qwen3MoeForCausalLM": "qwen3_moe"}.get(
        architecture, architecture.removesuffix("ForCausalLM").lower()
    )
    raw = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
    theirs = transformers.CONFIG_MAPPING[model_type](**raw | {"pad_token_id": 0})
    ours = ModelConfig.from_dict(raw | {"architectures": [architecture], "model_type": model_type})
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    kinds = getattr(theirs, "layer_types", None)
    window = theirs.sliding_window if hasattr(theirs, "sliding_window") else None
    assert windows(ours) == [
        window if kinds is None or kind == "sliding_attention" else None for kind in kinds or [""] * 6
    ]
    rope = theirs.rope_parameters
    thetas = {kind: spec["rope_theta"] for kind, spec in rope.items()} if "full_attention" in rope else {}
    for index, layer in enumerate(ours.layers):
        if layer.rope is not None:
            assert layer.rope.theta == (thetas[kinds[index]] if thetas else rope["rope_theta"])
        assert (layer.rope is None) == (hasattr(theirs, "no_rope_layers") and not theirs.no_rope_layers[index])
        assert (layer.moe is None) == (not hasattr(theirs, "num_experts_per_tok"))
        if layer.moe is not None:
            assert layer.moe.num_experts == theirs.num_experts
            assert layer.moe.num_chosen == theirs.num_experts_per_tok


def test_old_and_new_rope_spellings_agree() -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = parse(rope_theta=5e5, rope_scaling={"type": "llama3", **llama3})
    new = parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert old.layers == new.layers
    assert old.layers[0].rope is not None
    assert old.layers[0].rope.theta == 5e5


def test_gemma3_has_a_rope_per_kind_of_layer() -> None:
    old = parse(
        "Gemma3ForCausalLM", rope_theta=5e5, rope_local_base_freq=300.0, sliding_window_pattern=3, sliding_window=8
    )
    new = parse(
        "Gemma3ForCausalLM",
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
        sliding_window=8,
    )
    assert old.layers == new.layers
    assert windows(old) == [8, 8, None] * 2
    assert [layer.rope.theta for layer in old.layers if layer.rope] == [300.0, 300.0, 5e5] * 2


def test_windows() -> None:
    assert windows(parse("MistralForCausalLM")) == [4096] * 6
    assert windows(parse("MistralForCausalLM", sliding_window=None)) == [None] * 6
    assert windows(parse("Qwen2ForCausalLM", sliding_window=8, max_window_layers=2)) == [None] * 6
    sliding = parse("Qwen2ForCausalLM", sliding_window=8, max_window_layers=2, use_sliding_window=True)
    assert windows(sliding) == [None, None, 8, 8, 8, 8]
    assert windows(parse("Gemma2ForCausalLM", sliding_window=8)) == [8, None] * 3
    assert windows(parse("SmolLM3ForCausalLM", sliding_window=8, use_sliding_window=True)) == [
        None,
        None,
        None,
        8,
        None,
        None,
    ]


def test_longrope_is_chosen_by_the_longest_context() -> None:
    config = parse(
        "Phi3ForCausalLM",
        original_max_position_embeddings=64,
        rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    )
    rope = config.layers[0].rope
    assert rope is not None
    short, long = rope.frequencies(64), rope.frequencies(65)
    assert short.tolist() == pytest.approx([4.0 * value for value in long.tolist()])
    assert rope.amplitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_experts() -> None:
    config = parse(
        "Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        decoder_sparse_step=2,
        moe_intermediate_size=32,
    )
    assert [layer.moe is not None for layer in config.layers] == [False, False, False, True, False, True]
    assert shapes(config)["layers.3.experts.gate_up"] == (4, 64, 64)
    assert shapes(config)["layers.0.gate_up.weight"] == (192, 64)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(name: str) -> None:
    """Parameter counts as the models' own pages give them, within rounding."""
    billions = {
        "qwen2-0.5b": 0.494,
        "qwen2.5-1.5b": 1.54,
        "qwen2.5-7b": 7.62,
        "qwen3-0.6b": 0.596,
        "qwen3-1.7b": 1.72,
        "qwen3-8b": 8.19,
        "llama-3.2-1b": 1.24,
        "llama-3.1-8b": 8.03,
        "mistral-7b": 7.25,
        "smollm2-135m": 0.1345,
    }
    assert num_bytes(shape_config(name), 1) / 1e9 == pytest.approx(billions[name], rel=0.005)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**18),
        ("num_hidden_layers", 10**400),
        ("num_hidden_layers", "6"),
        ("num_hidden_layers", 6.0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", None),
        ("num_attention_heads", 0),
        ("num_attention_heads", -4),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("hidden_size", [64]),
        ("vocab_size", 0),
        ("vocab_size", 2**40),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", math.inf),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", "1e-6"),
        ("rope_theta", 0),
        ("rope_theta", math.inf),
        ("rope_scaling", "linear"),
        ("rope_scaling", ["linear"]),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", list(range(100_000))),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [3]),
        ("architectures", ["Qwen2ForCausalLM"]),
        ("hidden_act", 7),
        ("max_position_embeddings", 0),
    ],
)
def test_hostile_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ModelFormatError) as caught:
        ModelConfig.from_dict(LLAMA | {field: value}, "models/evil/config.json")
    assert "models/evil/config.json" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["RwkvForCausalLM"]}, "RwkvForCausalLM"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "mrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"head_dim": 15}, "15"),
    ],
)
def test_features_that_would_change_the_answer_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        ModelConfig.from_dict(LLAMA | changes)


def test_unknown_layer_type_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        parse("Gemma2ForCausalLM", layer_types=["linear_attention"] * 6)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, -1, 10**18, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = sorted(
    {
        *LLAMA,
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "max_window_layers",
        "no_rope_layers",
        "no_rope_layer_interval",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "mlp_only_layers",
        "decoder_sparse_step",
        "head_dim",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
        "partial_rotary_factor",
        "eos_token_id",
        "original_max_position_embeddings",
        "sliding_window_pattern",
        "rope_local_base_freq",
        "dtype",
        "torch_dtype",
    }
)
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "longrope", "su", "dynamic"])},
    optional=dict.fromkeys(
        [
            "factor",
            "rope_theta",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "short_factor",
            "long_factor",
            "truncate",
        ],
        JSON | st.floats(0.0, 100.0) | st.integers(1, 100) | st.just([1.0] * 8),
    ),
)


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    st.none() | ROPES,
)
def test_any_file_is_read_or_refused(architecture: str, changes: dict[str, Any], rope: dict[str, Any] | None) -> None:
    """No file makes anything but a checked config, a ModelFormatError or an UnsupportedModel."""
    try:
        config = parse(architecture, **(changes | ({"rope_scaling": rope} if rope else {})))
    except (ModelFormatError, UnsupportedModel) as error:
        assert str(error)
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert len(config.layers) == config.num_layers
    for turned in {layer.rope for layer in config.layers if layer.rope}:
        if turned.dim <= 256:
            assert turned.frequencies(64).isfinite().all()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b'{"a": ' + b"[" * 100_000, b'{"a": 1' + b"0" * 10_000 + b"}"],
    ids=["empty", "cut", "list", "null", "not utf-8", "deep", "long number"],
)
def test_broken_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        read_json(path)


def test_oversized_json_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(ModelFormatError, match="more than the 50"):
        read_json(path, max_bytes=50)
