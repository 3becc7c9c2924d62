"""A folder with a model of random weights, as transformers lays them out: engines are compared on it, offline.

Owns the way back from the decoder's weights to published names. Invariant: what is written loads here and in
transformers as the same model, and (shape, seed, dtype) decides every byte of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from embedllm.errors import InvalidRequest
from embedllm.models.config import ModelConfig
from embedllm.models.shapes import SHAPES, random_weights, shape_config
from embedllm.models.weights import locate

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
_MODULES = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def write_random_model(folder: str | Path, shape: str, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Write config.json and model.safetensors of a named shape (`embedllm.models.shapes`) into a folder; returns it.

    There is no tokenizer: token ids in, token ids out. Takes as much memory as the weights while it writes.
    Raises ModelNotFound listing the shapes, InvalidRequest for another dtype.
    """
    import torch
    from safetensors.torch import save_file

    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    config = shape_config(shape)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = dict(random_weights(config, seed, getattr(torch, dtype)))
    save_file(_published(config, weights), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({**SHAPES[shape], "dtype": dtype}, indent=1), encoding="utf-8")
    return path


def _published(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names and in the pieces that checkpoints of these families have."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for index in range(config.num_layers):
        names += [f"model.layers.{index}.{module}.{kind}" for module in _MODULES for kind in ("weight", "bias")]
    out = {}
    for name in names:
        part = locate(config, name)
        if part is not None and part.target in weights:
            out[name] = weights[part.target][part.start : part.stop].contiguous()
    return out
