"""Models that transformers' own code runs: what is taken, what is refused by name, and whose code is executed."""

import gc
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import embedllm
from embedllm import process
from embedllm.errors import EngineError, InvalidRequest, ModelError, ModelFormatError, OutOfMemory, UnsupportedModel
from embedllm.models import fallback
from embedllm.models.hub import resolve
from embedllm.models.load import load
from tests.engine import tiny_models
from tests.engine.equality import alone, draw, judge
from tests.rules.tree import ROOT

BASE: dict[str, Any] = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# One of each kind of thing that attention functions are asked for.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sinks and windows": ("GptOssConfig", {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4,
                                           "num_experts_per_tok": 2}),
    "keys wider than values": ("DeepseekV3Config", {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16,
                                                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
                                                    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                                                    "topk_group": 1, "first_k_dense_replace": 1,
                                                    "moe_intermediate_size": 32}),
    "scaled logits, parallel blocks": ("CohereConfig", {"logit_scale": 0.3}),
    "one key head": ("GPTBigCodeConfig", {}),
    "shared expert": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "an activation the decoder lacks": ("LlamaConfig", {"hidden_act": "gelu"}),
}  # fmt: skip


def build(config_class: str, target: Path, **settings: Any) -> Any:
    """Save a tiny model and return transformers' own."""
    config = getattr(transformers, config_class)(**BASE | settings)
    with torch.random.fork_rng(), process.quiet_transformers():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.save_pretrained(target)
    return model


@pytest.mark.parametrize("kind", OTHERS)
def test_same_tokens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_class, settings = OTHERS[kind]
    model = build(config_class, tmp_path, **settings)
    loaded = load(resolve(tmp_path), dtype="float32")
    assert not loaded.native
    monkeypatch.setitem(tiny_models.RECIPES, kind, tiny_models.Recipe(config_class, settings, native=False))
    monkeypatch.setattr(tiny_models, "reference", lambda name: model)
    monkeypatch.setattr("tests.engine.equality.loaded", lambda name: loaded)
    prompts = [draw(random.Random(f"{kind} {length}"), length) for length in (5, 24, 41)]
    answers = [alone(kind, prompt, 12) for prompt in prompts]
    assert not judge(kind, prompts, answers, 12).wrong
    assert len({token for answer in answers for token in answer}) > 10


@pytest.mark.parametrize(
    ("config_class", "settings", "named"),
    [
        ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("FalconConfig", {}, "FalconForCausalLM does not call its attention through"),
        ("NemotronConfig", {}, "NemotronForCausalLM does not pass arguments on"),
        ("DiffLlamaConfig", {}, "attends more than once"),
        ("Llama4TextConfig", {}, "chunked_attention"),
        ("Qwen3NextConfig", {"num_hidden_layers": 4}, "Qwen3NextForCausalLM does not call"),
    ],
)
def test_refused_by_name(config_class: str, settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    build(config_class, tmp_path, **settings)
    with pytest.raises(UnsupportedModel, match=named) as caught:
        load(resolve(tmp_path))
    assert "and natively: " in str(caught.value)


def test_an_unknown_argument_of_attention_is_refused() -> None:
    module = torch.nn.Module()
    q = torch.zeros(1, 2, 3, 4)
    step = fallback._Probe()
    fallback.attention(_layer(module), q, q, q, None, embedllm_step=step, position_bias=None, use_cache=True)
    for name, value in {"position_bias": q, "block_indices": [1], "indexer": 0.5}.items():
        with pytest.raises(UnsupportedModel, match=name):
            fallback.attention(_layer(module), q, q, q, None, embedllm_step=step, **{name: value})
    for options, name in (({"is_causal": False}, "is_causal"), ({"dropout": 0.1}, "dropout")):
        with pytest.raises(UnsupportedModel, match=name):
            fallback.attention(_layer(module), q, q, q, None, embedllm_step=step, **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="attention_mask"):
        fallback.attention(_layer(module), q, q, q, torch.zeros(1), embedllm_step=step)
    with pytest.raises(UnsupportedModel, match="layer_idx"):
        fallback.attention(torch.nn.Module(), q, q, q, None, embedllm_step=step)
    with pytest.raises(EngineError, match="inside an embedllm engine"):
        fallback.attention(_layer(module), q, q, q, None)


def _layer(module: torch.nn.Module) -> torch.nn.Module:
    module.layer_idx = len(getattr(module, "seen", []))  # type: ignore[assignment]
    return module


def test_a_window_that_only_the_mask_knows_of_is_refused() -> None:
    config = transformers.Gemma2Config(**BASE | {"sliding_window": 8, "head_dim": 16})
    fallback._check_windows("Model", config, {0: 8, 1: None, 2: 8})
    with pytest.raises(UnsupportedModel, match="layer 2"):
        fallback._check_windows("Model", config, {0: 8, 1: None, 2: None})


CANARY = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class CanaryConfig(LlamaConfig):
    model_type = "embedllm_canary"
class CanaryForCausalLM(LlamaForCausalLM):
    config_class = CanaryConfig
"""


def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, architecture: str) -> tuple[Path, Path]:
    """A model folder that brings Python code, and the file which that code makes when it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    canary = tmp_path / "executed"
    auto_map = {"AutoConfig": "canary.CanaryConfig", "AutoModelForCausalLM": "canary.CanaryForCausalLM"}
    change = {"model_type": model_type, "architectures": [architecture], "auto_map": auto_map}
    folder = tiny_models.variant("llama", tmp_path / "model", lambda raw: raw.update(change))
    (folder / "canary.py").write_text(CANARY.format(canary=str(canary)))
    return folder, canary


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("embedllm_canary", "CanaryForCausalLM"),
        ("llama", "CanaryForCausalLM"),
        ("llama", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
    ],
)
def test_a_models_code_is_never_run_untrusted(
    model_type: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, canary = with_code(tmp_path, monkeypatch, model_type, architecture)
    for attempt in (lambda: load(resolve(folder)), lambda: embedllm.plan(folder)):
        try:
            attempt()
        except ModelError as error:
            if model_type == "embedllm_canary":
                assert "trust_remote_code=True" in str(error)
        else:
            assert model_type != "embedllm_canary"
    assert not canary.exists()


def test_a_models_code_is_run_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, canary = with_code(tmp_path, monkeypatch, "embedllm_canary", "CanaryForCausalLM")
    loaded = load(resolve(folder), trust_remote_code=True, max_model_len=64)
    assert canary.exists()
    assert loaded.architecture == "CanaryForCausalLM"
    assert loaded.max_model_len == 64


def test_names_must_balance(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.variant("gpt2", tmp_path / "m", lambda raw: None)
    tensors = load_file(folder / "model.safetensors")
    first = next(name for name in tensors if "attn.c_attn.weight" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match="missing keys"):
        load(resolve(folder))
    save_file(tensors | {"transformer.extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match="unexpected keys"):
        load(resolve(folder))


@pytest.mark.parametrize(
    "change", [{"n_layer": 10**18}, {"n_embd": 68}, {"vocab_size": 10**12}, {"n_head": 0}, {"n_head": "4"}]
)
def test_hostile_configs_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_models.variant("gpt2", tmp_path / "m", lambda raw: raw.update(change))
    with pytest.raises(ModelError, match=str(folder)):
        load(resolve(folder))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_cannot_fit_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = resolve(tiny_models.folder(name))
    monkeypatch.setattr("embedllm.kv_cache.free_memory", lambda: 100_000)
    monkeypatch.setattr("embedllm.models.loader.stream", None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(OutOfMemory, match=r"take 0\.0 GiB"):
        load(snapshot)


def test_length_is_limited_by_learned_positions() -> None:
    with pytest.raises(InvalidRequest, match="512"):
        load(resolve(tiny_models.folder("gpt2")), max_model_len=513)


def test_the_guest_leaves_transformers_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    state = torch.random.get_rng_state()
    load(resolve(tiny_models.folder("opt")))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_dropping_a_model_frees_it_at_once(name: str) -> None:
    """Without a garbage collection: a cell that is run again must not hold two models."""
    tiny_models.reference(name)
    gc.collect()
    before = count_tensors()
    loaded = load(resolve(tiny_models.folder(name)))
    assert count_tensors() > before
    gc.disable()
    try:
        del loaded
        assert count_tensors() == before
    finally:
        gc.enable()


def count_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_another_function_under_our_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    process.register_attention(fallback.attention)
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, process.ATTENTION, print)
    with pytest.raises(EngineError, match="another function"):
        process.register_attention(fallback.attention)


NATIVE = """
import sys
from embedllm.models.hub import resolve
from embedllm.models.load import load
assert load(resolve(sys.argv[1])).native
heavy = [name for name in sys.modules if name.startswith("transformers")]
print(heavy)
"""


def test_a_native_model_imports_nothing_of_transformers() -> None:
    out = subprocess.run(
        [sys.executable, "-c", NATIVE, str(tiny_models.folder("llama"))],
        cwd=ROOT, env={"PYTHONPATH": ".:kernels", "PATH": ""}, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert json.loads(out.stdout) == []
    assert out.stderr == ""
