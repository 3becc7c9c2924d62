"""Export of a checkpoint to a Hugging Face folder, and loading such a folder back.

Writes weights in bfloat16 with the names of `LlamaForCausalLM`, the configuration, the tokenizer and the chat template.
Invariant: `load_exported(export(...))` gives the checkpoint's weights rounded to bfloat16, nothing missing or added.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .chatml import TEMPLATE
from .checkpoint import load
from .model import BoxModel, ModelConfig
from .tokens import CONTROL, END_OF_TEXT, TURN_END


def hf_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """config.json of `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(checkpoint: Path, tokenizer_file: Path, folder: Path) -> None:
    """Write everything but the model card to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = load(checkpoint)
    config = ModelConfig(**saved.facts["config"])
    weights = {f"model.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in saved.model.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    write_text_files(config, tokenizer_file, folder)


def write_text_files(config: ModelConfig, tokenizer_file: Path, folder: Path) -> None:
    """Write the configuration, the tokenizer and the chat template to folder."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    end, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    _write_json(folder / "config.json", hf_config(config, end))
    generation = {"eos_token_id": [turn_end, end], "pad_token_id": end, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(CONTROL[1:]),
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def load_exported(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[BoxModel, Tokenizer]:
    """The model, computing in dtype, and the tokenizer of an exported folder."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig(
        vocab=raw["vocab_size"],
        hidden=raw["hidden_size"],
        mlp=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        context=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
    )
    model = BoxModel(config)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.to(dtype).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
