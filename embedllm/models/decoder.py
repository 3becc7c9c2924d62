"""The native decoder: one forward for every architecture that `config` can describe.

Owns the order of operations and the weights. Knows numbers, never sequences: a step is a Batch, the past is a KVCache,
both come as arguments. Invariant: hidden states depend on ids, positions and the KV read through the tables only, not
on what else is in the batch (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedllm import ops
from embedllm.batch import Batch
from embedllm.errors import EngineError, ModelFormatError
from embedllm.kv_cache import KVCache, KVGroup
from embedllm.layers import MLP, Experts, Head, Linear, Norm, parts_for
from embedllm.models.config import Layer, ModelConfig
from embedllm.models.rope import Rope
from embedllm.models.weights import Shape, shapes


class Block:
    """One layer's weights, and what it computes apart from attention over the past."""

    __slots__ = ("attn_norm", "mlp", "mlp_norm", "o", "post_attn_norm", "post_mlp_norm", "qk_norm", "qkv", "spec")

    def __init__(self, spec: Layer, config: ModelConfig, take: _Shelf, parts: Any, pack: bool) -> None:
        """parts: the classes to build from, of `layers` or their twins."""

        def linear(name: str) -> Linear:
            weight: Linear = parts.Linear(take.one(f"{name}.weight"), take.maybe(f"{name}.bias"), pack)
            return weight

        def weight_of(name: str) -> Tensor | None:
            weight = take.maybe(f"{name}.weight")
            return None if weight is None else weight.float() + config.norm_offset

        def norm(name: str) -> Norm | None:
            weight = weight_of(name)
            return None if weight is None else parts.Norm(weight, config.norm_eps)

        self.spec = spec
        self.attn_norm, self.post_attn_norm = norm("attn_norm"), norm("post_attn_norm")
        self.mlp_norm, self.post_mlp_norm = norm("mlp_norm"), norm("post_mlp_norm")
        self.qkv, self.o = linear("qkv"), linear("o")
        self.qk_norm = _qk_norm(config, parts, weight_of("q_norm"), weight_of("k_norm"))
        self.mlp: MLP | Experts
        if spec.moe is None:
            biases = take.maybe("gate_up.bias"), take.maybe("down.bias")
            self.mlp = parts.MLP(take.one("gate_up.weight"), take.one("down.weight"), config.activation, biases, pack)
        else:
            weights = take.one("experts.gate_up"), take.one("experts.down")
            self.mlp = parts.Experts(
                linear("router"), *weights, config.activation, spec.moe.num_chosen, spec.moe.renormalise, pack
            )

    @property
    def linears(self) -> list[Linear]:
        return [self.qkv, self.o, *self.mlp.linears]


def _qk_norm(config: ModelConfig, parts: Any, q: Tensor | None, k: Tensor | None) -> tuple[Norm, ...]:
    """Per head: one norm with a weight [heads + kv_heads, head_dim] for both; full width: q's and k's; without: ()."""
    if q is None or k is None:
        return ()
    if config.qk_norm == "full":
        return parts.Norm(q, config.norm_eps), parts.Norm(k, config.norm_eps)
    both = torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
    return (parts.Norm(both, config.norm_eps),)


class Decoder:
    """A decoder-only transformer: put every weight, finish(), then forward and logits.

    max_model_len: most positions a request may have; chooses between longrope's two sets of frequencies. pack: keep
    linear weights in the layout that oneDNN computes in. A tied head is then a packed copy beside the embedding's own
    rows: at a vocabulary of 151,936 and 896 hidden that costs 272 MB in bfloat16 and makes the head a third faster.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_model_len: int | None = None,
        pack: bool = True,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.max_model_len = max_model_len or config.max_len
        self._pack = pack
        self._parts = parts_for(self.device)
        self._expected = shapes(config)
        self._waiting: dict[str, Tensor] = {}
        self._put: set[str] = set()
        self._missing = [0] * config.num_layers  # weights each layer still waits for
        for name in self._expected:
            if (index := _layer_of(name)) is not None:
                self._missing[index] += 1
        self._blocks: dict[int, Block] = {}
        self._layers: list[Block] = []  # all of them, in order, once finished
        self._embed: Tensor | None = None
        self._norm: Norm | None = None
        self._head: Head | None = None
        ropes = {layer.rope for layer in config.layers if layer.rope is not None}
        self._frequencies = {rope: rope.frequencies(self.max_model_len).to(self.device) for rope in ropes}

    @property
    def kv_group(self) -> KVGroup:
        """The KV this model needs."""
        config = self.config
        windows = [layer.window for layer in config.layers]
        return KVGroup(
            layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            k_dim=config.head_dim,
            v_dim=config.head_dim,
            dtype=self.dtype,
            window=None if None in windows else max(window for window in windows if window is not None),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes the weights take, packed copies included."""
        total = sum(linear.num_bytes for block in self._blocks.values() for linear in block.linears)
        if self._embed is not None:
            total += self._embed.nbytes
        if self._head is not None and not (self.config.tied and self._head.linear.reason):
            total += self._head.linear.num_bytes
        return total

    @property
    def packing(self) -> str:
        """ "" where every linear weight is packed, else why the first that is not, is not."""
        linears = (linear for block in self._blocks.values() for linear in block.linears)
        return next((linear.reason for linear in linears if linear.reason), "")

    def expected(self) -> dict[str, Shape]:
        """Every weight that `put` must be given, with its shape."""
        return dict(self._expected)

    def put(self, name: str, tensor: Tensor) -> None:
        """Take one weight over: cast, and packed as soon as its layer is complete. The caller keeps no reference.

        Raises ModelFormatError for a name that is not expected, is given twice, or comes in another shape.
        """
        shape = self._expected.get(name)
        if shape is None:
            raise ModelFormatError(f"weight {name!r} is none of {self.config.architecture}'s")
        if name in self._put:
            raise ModelFormatError(f"weight {name!r} was given twice")
        if tuple(tensor.shape) != shape:
            raise ModelFormatError(f"weight {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
        self._put.add(name)
        self._waiting[name] = tensor.detach().to(device=self.device, dtype=self.dtype)
        index = _layer_of(name)
        if index is not None:
            self._missing[index] -= 1
            if not self._missing[index]:
                take = _Shelf(self._waiting, f"layers.{index}.")
                self._blocks[index] = Block(self.config.layers[index], self.config, take, self._parts, self._pack)

    def finish(self) -> None:
        """Every weight is there: ready to run. Raises ModelFormatError naming what is missing."""
        missing = [name for name in self._expected if name not in self._put]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelFormatError(f"{self.config.architecture} lacks {', '.join(missing[:3])}{more}")
        config, take = self.config, _Shelf(self._waiting, "")
        self._layers = [self._blocks[index] for index in range(config.num_layers)]
        self._embed = take.one("embed.weight")
        self._norm = self._parts.Norm(take.one("norm.weight").float() + config.norm_offset, config.norm_eps)
        head = self._embed if config.tied else take.one("head.weight")
        self._head = Head(self._parts.Linear(head, None, self._pack), config.logits_divisor, config.logits_softcap)

    def forward(self, batch: Batch, kv: KVCache, between_layers: Callable[[], None] | None = None) -> Tensor:
        """Compute a step: write its tokens' KV, return hidden states [tokens, hidden] after the final norm.

        `between_layers` is called before every layer; what it raises ends the step.
        """
        config, embed, norm = self.config, self._embed, self._norm
        if embed is None or norm is None:
            raise EngineError("forward() before finish()")
        x = self._scaled(F.embedding(batch.padded_ids, embed))  # [padded, hidden]
        attention = ops.attention(batch, kv, config.num_heads)
        angles = {
            rope: attention.angles(frequencies, rope.amplitude, self.dtype)
            for rope, frequencies in self._frequencies.items()
        }
        attended = x.new_zeros((x.shape[0], config.q_size))  # reused by every layer; padded rows stay zero
        for index, block in enumerate(self._layers):
            if between_layers is not None:
                between_layers()
            self._attend(block, index, x, attended, attention, angles, batch.num_tokens)
            x = self._add(x, block.o, attended, block.post_attn_norm)
            h = x if block.mlp_norm is None else block.mlp_norm(x)
            x = self._add(x, block.mlp, h, block.post_mlp_norm)
        return norm(x)[: batch.num_tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `forward`'s hidden states to float32 logits [rows, vocabulary]."""
        if self._head is None:
            raise EngineError("logits() before finish()")
        return self._head(hidden)

    def _scaled(self, x: Tensor) -> Tensor:
        scale = self.config.embed_scale
        if scale == 1.0:
            return x
        return x * torch.tensor(scale, dtype=self.dtype) if self.config.embed_scale_rounds else x * scale

    def _attend(
        self,
        block: Block,
        index: int,
        x: Tensor,
        attended: Tensor,
        attention: ops.Attention,
        angles: dict[Rope, tuple[Tensor, Tensor]],
        num_tokens: int,
    ) -> None:
        """Attention of one layer up to its output projection, into `attended` [padded, heads · head_dim]."""
        config, spec = self.config, block.spec
        h = x if block.attn_norm is None else block.attn_norm(x)
        qkv = block.qkv(h)  # [padded, q_size + 2 · kv_size]
        attention.enter(index, qkv, block.qk_norm, None if spec.rope is None else angles[spec.rope])
        attention(
            index,
            qkv[:num_tokens, : config.q_size].view(num_tokens, config.num_heads, config.head_dim),
            attended[:num_tokens].view(num_tokens, config.num_heads, config.head_dim),
            scale=config.attention_scale,
            window=spec.window,
            softcap=config.attention_softcap,
        )

    def _add(self, x: Tensor, part: Linear | MLP | Experts, h: Tensor, post_norm: Norm | None) -> Tensor:
        """x + residual_scale · post_norm(part(h))."""
        scale = self.config.residual_scale
        if post_norm is None and scale == 1.0:
            return part(h, x)
        y = part(h)
        if post_norm is not None:
            y = post_norm(y)
        return x.add(y, alpha=scale)


class _Shelf:
    """Weights under a prefix, each given out once."""

    def __init__(self, weights: dict[str, Tensor], prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def maybe(self, name: str) -> Tensor | None:
        return self._weights.pop(self._prefix + name, None)

    def one(self, name: str) -> Tensor:
        return self._weights.pop(self._prefix + name)


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None
