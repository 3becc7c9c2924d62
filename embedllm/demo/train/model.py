"""The Llama architecture of the model in the box, in plain torch, for training and for its evaluation.

Parameter names are those of a Hugging Face `LlamaForCausalLM` without the `model.` prefix, so that export is a rename.
It knows nothing of data or of optimisers. Invariant: `forward` returns the mean loss in nats per target token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the network. Lengths are counted in elements; `context` is the longest trained sequence in tokens."""

    vocab: int = 8192
    hidden: int = 256
    mlp: int = 768
    layers: int = 10
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def as_dict(self) -> dict[str, int | float]:
        """The fields as a plain dictionary, for checkpoints."""
        return asdict(self)


KVCache = list[tuple[Tensor, Tensor]]  # per layer keys and values, [batch, kv_heads, tokens, head_dim]


def rope_table(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [context, head_dim], with the halves repeated as Hugging Face lays them out."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.context, device=device).float(), config.rope_theta**-exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, heads, tokens, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        inner_kv = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden, inner_kv, bias=False)
        self.v_proj = nn.Linear(config.hidden, inner_kv, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, tokens, _ = x.shape
        shape = (batch, tokens, -1, self.config.head_dim)
        q = rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        groups = self.config.heads // self.config.kv_heads
        out = F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, dim=1),
            v.repeat_interleave(groups, dim=1),
            is_causal=past is None,  # with a cache, exactly one new token is computed
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1)), (k, v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class BoxModel(nn.Module):
    """The decoder with tied embeddings."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        cos, sin = rope_table(config, torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            std = 0.02 if name.startswith("embed") else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * self.config.layers) ** 0.5
            with torch.no_grad():
                parameter.normal_(0.0, std, generator=generator)

    def hidden(self, ids: Tensor, past: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """Last hidden states [batch, tokens, hidden] of ids [batch, tokens], and the grown cache."""
        start = 0 if past is None else past[0][0].shape[2]
        x = self.embed_tokens(ids)
        cos = self.cos[start : start + ids.shape[1]].to(x.dtype)
        sin = self.sin[start : start + ids.shape[1]].to(x.dtype)
        cache: KVCache = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, cos, sin, None if past is None else past[index])
            cache.append(present)
        return self.norm(x), cache

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, float32."""
        return F.linear(hidden, self.embed_tokens.weight).float()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = self.hidden(ids)
        logits = F.linear(hidden, self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
