"""Tiny random models in transformers' layout, one per architecture, that can tell right from wrong.

Weights are wide (initializer_range 0.3 and more) and norms and biases are random too: with the defaults of the
configs, neither the context nor a bias would change a single token. Built on the spot, saved as a folder, once a run.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 251
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Recipe:
    """`config_class` of transformers with the settings that make this architecture different."""

    config_class: str
    settings: dict[str, Any]
    native: bool = True
    max_model_len: int = 256

    def config(self) -> Any:
        import transformers

        return getattr(transformers, self.config_class)(**self.settings)


def _recipe(config_class: str, *, native: bool = True, max_model_len: int = 256, **settings: Any) -> Recipe:
    return Recipe(config_class, _BASE | settings, native, max_model_len)


_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + index / 8 for index in range(6)],
    "long_factor": [2.0 + index / 2 for index in range(6)],
}
RECIPES: dict[str, Recipe] = {
    "llama": _recipe("LlamaConfig", attention_bias=True, mlp_bias=True),
    "llama-tied": _recipe("LlamaConfig", tie_word_embeddings=True, head_dim=24),
    "llama-llama3": _recipe(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-linear": _recipe("LlamaConfig", rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
    "llama-yarn": _recipe(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
        },
    ),
    "mistral": _recipe("MistralConfig", sliding_window=8),
    "qwen2": _recipe("Qwen2Config", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": _recipe("Qwen3Config", head_dim=24),
    "gemma": _recipe("GemmaConfig", head_dim=16),
    # Untied: over a tied head the scaled embedding of the last token would win every time.
    "gemma2": _recipe(
        "Gemma2Config",
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=5.0,
        tie_word_embeddings=False,
    ),
    "gemma3": _recipe(
        "Gemma3TextConfig",
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=12,
        sliding_window_pattern=3,
        tie_word_embeddings=False,
    ),
    # Ends at the original context, so the short factors hold; `phi3-long` starts beyond it.
    "phi3": _recipe(
        "Phi3Config",
        rope_parameters=_LONGROPE | {"partial_rotary_factor": 0.75},
        original_max_position_embeddings=256,
    ),
    "phi3-long": _recipe(
        "Phi3Config",
        rope_parameters=_LONGROPE | {"partial_rotary_factor": 0.75},
        original_max_position_embeddings=4,
    ),
    "olmo2": _recipe("Olmo2Config", initializer_range=1.2),
    "granite": _recipe(
        "GraniteConfig",
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
    ),
    "smollm3": _recipe("SmolLM3Config", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=8),
    "mixtral": _recipe("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": _recipe(
        "Qwen3MoeConfig",
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "gpt2": Recipe(
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.5,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_implementation": "eager",
        },
        native=False,
    ),
    "opt": Recipe(
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "init_std": 0.5,
            "tie_word_embeddings": False,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "attn_implementation": "eager",
        },
        native=False,
    ),
}
NATIVE = [name for name, recipe in RECIPES.items() if recipe.native]


@functools.cache
def _root() -> Path:
    path = Path(tempfile.mkdtemp(prefix="embedllm-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def reference(name: str) -> Any:
    """The transformers model, float32, on the CPU."""
    import transformers

    recipe = RECIPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        model = transformers.AutoModelForCausalLM.from_config(recipe.config(), attn_implementation="eager")
        model = model.float().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@functools.cache
def folder(name: str) -> Path:
    """The model saved with save_pretrained."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = _root() / name
    reference(name).save_pretrained(path)
    return path


def variant(name: str, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a saved model whose config.json was changed."""
    shutil.copytree(folder(name), target)
    path = target / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return target


def generate(name: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """What transformers.generate answers, greedy, prompts of equal length together so that nothing is padded."""
    model, answers = reference(name), dict[int, list[int]]()
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        ids = torch.tensor([prompts[index] for index in indices])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        for index, row in zip(indices, out[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = row
    return [answers[index] for index in range(len(prompts))]


def teacher_forced(name: str, tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one forward over all tokens."""
    with torch.no_grad():
        logits: torch.Tensor = reference(name)(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits
