"""Shapes of well-known models, to measure with random weights where no download is wanted.

Owns the table and the noise. A shape is the part of the published config.json that decides what is computed.
Invariant: the same (shape, seed, dtype) is the same model on every machine.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from embedllm.errors import ModelNotFound
from embedllm.models.config import ModelConfig
from embedllm.models.weights import shapes

if TYPE_CHECKING:
    import torch

_NOISE = 4_194_301  # values drawn once and repeated; a prime, so that no two rows of a weight are equal
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8_192,
}


def _shape(
    family: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    vocab: int,
    max_len: int,
    theta: float,
    **more: Any,
) -> dict[str, Any]:
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": max_len,
        "rope_theta": theta,
        "rms_norm_eps": 1e-6 if family.startswith("Qwen") else 1e-5,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    } | more


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2-0.5b": _shape("Qwen2", 896, 4_864, 24, (14, 2), 151_936, 32_768, 1e6, tie_word_embeddings=True),
    "qwen2.5-1.5b": _shape("Qwen2", 1_536, 8_960, 28, (12, 2), 151_936, 32_768, 1e6, tie_word_embeddings=True),
    "qwen2.5-7b": _shape("Qwen2", 3_584, 18_944, 28, (28, 4), 152_064, 32_768, 1e6),
    "qwen3-0.6b": _shape(
        "Qwen3", 1_024, 3_072, 28, (16, 8), 151_936, 40_960, 1e6, head_dim=128, tie_word_embeddings=True
    ),
    "qwen3-1.7b": _shape(
        "Qwen3", 2_048, 6_144, 28, (16, 8), 151_936, 40_960, 1e6, head_dim=128, tie_word_embeddings=True
    ),
    "qwen3-8b": _shape("Qwen3", 4_096, 12_288, 36, (32, 8), 151_936, 40_960, 1e6, head_dim=128),
    "llama-3.2-1b": _shape(
        "Llama",
        2_048,
        8_192,
        16,
        (32, 8),
        128_256,
        131_072,
        5e5,
        head_dim=64,
        tie_word_embeddings=True,
        rope_scaling={**_LLAMA3_ROPE, "factor": 32.0},
    ),
    "llama-3.1-8b": _shape(
        "Llama", 4_096, 14_336, 32, (32, 8), 128_256, 131_072, 5e5, rope_scaling={**_LLAMA3_ROPE, "factor": 8.0}
    ),
    "mistral-7b": _shape("Mistral", 4_096, 14_336, 32, (32, 8), 32_768, 32_768, 1e6, sliding_window=None),
    "smollm2-135m": _shape("Llama", 576, 1_536, 30, (9, 3), 49_152, 8_192, 1e5, tie_word_embeddings=True),
}


def shape_config(name: str) -> ModelConfig:
    """The ModelConfig of a named shape; ModelNotFound listing the names."""
    if name not in SHAPES:
        raise ModelNotFound(f"no shape is called {name!r}; there are {', '.join(sorted(SHAPES))}")
    return ModelConfig.from_dict(SHAPES[name], f"shape {name}")


def random_weights(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the decoder, drawn rather than loaded: norms 1, biases 0, the rest normal with deviation 0.02.

    A weight depends on (seed, its name) and the dtype (default float32) only. The noise of one weight repeats after
    some four million values: drawing eight billion takes minutes and would measure nothing else.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(_NOISE, generator=generator) * 0.02).to(device=device, dtype=dtype or torch.float32)
    for name, shape in shapes(config).items():
        count = math.prod(shape)
        weight = torch.empty(shape, dtype=noise.dtype, device=device)
        if "norm" in name:
            weight.fill_(1.0 - config.norm_offset)
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            flat, filled, start = weight.view(-1), 0, zlib.crc32(name.encode()) % _NOISE
            while filled < count:
                piece = noise[start : start + count - filled]
                flat[filled : filled + len(piece)] = piece
                filled, start = filled + len(piece), 0
        yield name, weight
