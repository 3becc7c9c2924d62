"""Any other causal model of transformers, through one attention function of ours.

Owns what has to be true of a model for that to be right, and checks it when loading: every layer calls the attention
function once, with arguments it knows, and keeps no other state between tokens. Knows no architecture by name.
Invariant: the batch travels by argument through the model's own forward; nothing is kept between two steps.

The model is run as transformers wrote it, on the packed tokens of a step with their positions and without its own
cache. Interface: https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from embedllm import ops, process
from embedllm.batch import Batch
from embedllm.errors import EmbedLLMError, EngineError, ModelFormatError, UnsupportedModel
from embedllm.kv_cache import KVCache, KVGroup
from embedllm.models import loader
from embedllm.models.checkpoint import open_checkpoint
from embedllm.models.config import MAX_LAYERS, saved_dtype
from embedllm.models.fields import Fields
from embedllm.models.hub import Snapshot
from embedllm.models.load import Loaded, check_length, check_room, dtype_note

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments of the attention function that say nothing about the answer when a step is run as we run it.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}


@dataclass(slots=True)
class _Step:
    """What the attention function needs of one step. `between_layers` is called before every layer's attention."""

    attention: ops.Attention
    between_layers: Callable[[], None] | None


@dataclass(slots=True)
class _Probe:
    """Records what a model asks of its attention, layer by layer: (heads, kv_heads, k_dim, v_dim), and the window."""

    shapes: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    embedllm_step: _Step | _Probe | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function registered with AttentionInterface: paged attention over a step's packed tokens.

    query [1, heads, tokens, k_dim], key and value [1, kv_heads, tokens, k_dim or v_dim] → [1, tokens, heads, v_dim].
    Raises UnsupportedModel for an argument it does not know.
    """
    if embedllm_step is None:
        raise EngineError(
            "attn_implementation='embedllm' runs inside an embedllm engine only; pick another for this model"
        )
    asked = (name for name, given in others.items() if given is not None and given is not False)
    unknown = sorted(name for name in asked if name not in _HARMLESS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if is_causal is False:
        unknown.append("is_causal=False")
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which is not known here"
        )
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise UnsupportedModel(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, dim]
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    if isinstance(embedllm_step, _Probe):
        if index in embedllm_step.shapes:
            raise UnsupportedModel(f"layer {index} ({type(module).__name__}) attends more than once")
        embedllm_step.shapes[index] = (q.shape[1], k.shape[1], k.shape[2], v.shape[2])
        embedllm_step.windows[index] = sliding_window
        return out.zero_()[None], None
    if embedllm_step.between_layers is not None:
        embedllm_step.between_layers()
    embedllm_step.attention.store(index, torch.cat((k.flatten(1), v.flatten(1)), 1))
    embedllm_step.attention(
        index,
        q.contiguous(),
        out,
        scale=q.shape[2] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return out[None], None


class Fallback:
    """A transformers model that reads and writes a paged KV cache."""

    def __init__(self, model: Any, config: Any) -> None:
        """`model` is a loaded CausalLM set to our attention. Raises UnsupportedModel where it would answer wrongly."""
        self._model = model
        decoder = model.get_decoder()
        decoder.forward = _forward_or_given(decoder)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._heads, self._group = self._probe(config)

    def _probe(self, config: Any) -> tuple[int, KVGroup]:
        """Run two tokens to learn what each layer keeps, and whether the model can be run this way at all."""
        name, probe = type(self._model).__name__, _Probe()
        ids = torch.tensor([[1, 0]], device=self._device)
        positions = torch.arange(2, device=self._device)[None]
        with torch.inference_mode():
            try:
                hidden = self._hidden(ids, positions, probe)
                whole = self._model(ids, position_ids=positions, use_cache=False, embedllm_step=_Probe()).logits
                halves = self.logits(hidden)
            except (TypeError, EngineError) as error:
                raise UnsupportedModel(f"{name} does not pass arguments on to its layers ({error})") from error
        if not torch.equal(whole[0].float(), halves):
            raise UnsupportedModel(f"{name} computes its logits from more than the hidden states of its decoder")
        num_layers = int(config.num_hidden_layers)
        silent = [index for index in range(num_layers) if index not in probe.shapes]
        if silent or len(probe.shapes) != num_layers:
            raise UnsupportedModel(
                f"{name}: {len(silent)} of {num_layers} layers do not call the attention function (the first is "
                f"{silent[0] if silent else num_layers}); what they keep between tokens has no place in a KV cache"
            )
        _check_windows(name, config, probe.windows)
        shapes = set(probe.shapes.values())
        if len(shapes) > 1:
            raise UnsupportedModel(f"{name}: its layers keep KV of different shapes {sorted(shapes)}")
        heads, kv_heads, k_dim, v_dim = shapes.pop()
        windows = list(probe.windows.values())
        group = KVGroup(
            layers=num_layers,
            kv_heads=kv_heads,
            k_dim=k_dim,
            v_dim=v_dim,
            dtype=self._dtype,
            window=None if None in windows else max(window for window in windows if window is not None),
        )
        return heads, group

    def _hidden(self, ids: Tensor, positions: Tensor, step: _Step | _Probe) -> Tensor:
        output = self._model.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, embedllm_step=step
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @property
    def kv_group(self) -> KVGroup:
        return self._group

    @property
    def num_bytes(self) -> int:
        """Bytes the weights take; tied ones once."""
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*self._model.parameters(), *self._model.buffers())}
        return sum(tensors.values())

    def forward(self, batch: Batch, kv: KVCache, between_layers: Callable[[], None] | None = None) -> Tensor:
        """Write the batch's KV, return hidden states [tokens, hidden] as the model's head takes them."""
        step = _Step(ops.attention(batch, kv, self._heads), between_layers)
        return self._hidden(batch.ids.long()[None], batch.positions.long()[None], step)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `forward`'s hidden states to float32 logits [rows, vocabulary]."""
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=self._device)
        logits: Tensor = self._model(ids, use_cache=False, embedllm_hidden=hidden).logits[0]
        return logits.float()


def _forward_or_given(decoder: nn.Module) -> Callable[..., Any]:
    """A forward for `decoder` that hands back the hidden states it is given, where it is given some.

    The head of a model may scale or cap its logits, so the model's own forward computes them; this lets it do so
    without computing the hidden states again. Keeps no strong reference: dropping the model must free it at once.
    """
    plain: Any = type(decoder).forward
    owner = weakref.ref(decoder)
    kind: list[type[Any]] = []  # the head reads the fields of this decoder's kind of output

    def forward(*args: Any, embedllm_hidden: Tensor | None = None, **options: Any) -> Any:
        if embedllm_hidden is not None:
            return kind[0](last_hidden_state=embedllm_hidden[None])
        output = plain(owner(), *args, **options)
        kind[:] = [type(output)]
        return output

    return forward


def load(
    snapshot: Snapshot,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    max_model_len: int | None,
    trust_remote_code: bool,
    progress: bool | None,
    refusal: UnsupportedModel,
) -> Loaded:
    """Load with transformers' own code. `refusal` says why there is no native decoder; every refusal here adds it."""
    try:
        return _load(snapshot, dtype, torch.device(device), max_model_len, trust_remote_code)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error} (and natively: {refusal})") from error


def read_config(snapshot: Snapshot, trusted: bool, refusal: UnsupportedModel) -> Any:
    """The transformers config of a model that the fallback could load, checked as far as a config can tell."""
    where = str(snapshot.path / "config.json")
    try:
        _check_raw(Fields(snapshot.config, where), trusted)
        config = _read_config(snapshot, trusted)
        text = config.get_text_config(decoder=True)
        _check_config(where, text)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error} (and natively: {refusal})") from error
    return text


def _load(
    snapshot: Snapshot, dtype: str | torch.dtype, device: torch.device, max_model_len: int | None, trusted: bool
) -> Loaded:
    where = str(snapshot.path / "config.json")
    _check_raw(Fields(snapshot.config, where), trusted)
    checkpoint = open_checkpoint(snapshot.path)  # safetensors or a refusal, before anything of the model is imported
    from transformers import AutoModelForCausalLM

    config = _read_config(snapshot, trusted)
    text = config.get_text_config(decoder=True)
    _check_config(where, text)
    saved = saved_dtype(Fields(snapshot.config, where))
    chosen = loader.choose_dtype(dtype, saved, device)
    check_room(checkpoint.num_values * chosen.itemsize, device, snapshot.name)
    name = process.register_attention(attention)
    with process.quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                snapshot.path,
                config=config,
                dtype=chosen,
                attn_implementation=name,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trusted,
                output_loading_info=True,
            )
        except (EmbedLLMError, MemoryError):
            raise
        except RuntimeError as error:  # how it reports shapes that do not match
            raise ModelFormatError(f"{snapshot.path}: the weights do not fit config.json ({error})") from error
        except Exception as error:  # a model's constructor fails in its own way on sizes that make no sense
            raise UnsupportedModel(f"{snapshot.path}: transformers cannot build it ({error!r})") from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise ModelFormatError(f"{snapshot.path}: {kind.replace('_', ' ')} {sorted(map(str, info[kind]))[:3]}")
    _check_class(type(model))
    model = model.to(device).eval().requires_grad_(False)
    return Loaded(
        model=Fallback(model, text),
        architecture=type(model).__name__,
        native=False,
        dtype=chosen,
        device=device,
        max_model_len=check_length(max_model_len, int(text.max_position_embeddings), snapshot.name),
        vocab_size=int(text.vocab_size),
        num_input_ids=int(model.get_input_embeddings().weight.shape[0]),
        values_per_token=12 * int(text.hidden_size),  # an MLP of four times the width, beside residual and attention
        note=dtype_note(dtype, saved, chosen),
    )


def _check_raw(fields: Fields, trusted: bool) -> None:
    """What config.json alone tells, before any class is looked up."""
    architectures = fields.raw.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if names and not str(names[0]).endswith(_CAUSAL):
        raise UnsupportedModel(f"{fields.where}: {names[0]} is not a causal language model")
    if fields.raw.get("auto_map") and not trusted and not _known_to_transformers(fields.text("model_type", "")):
        raise UnsupportedModel(
            f"{fields.where}: the model brings its own Python code; read it, then pass trust_remote_code=True to run it"
        )
    _check_counts(fields)
    if fields.raw.get("quantization_config"):
        raise UnsupportedModel(f"{fields.where}: quantization_config is set, and embedllm does not compute it")


def _check_counts(fields: Fields) -> None:
    """No count of layers beyond reason, at any depth: config classes make lists as long as they are told to."""
    for name, value in fields.raw.items():
        if isinstance(value, dict):
            _check_counts(Fields(value, f"{fields.where}: {name}"))
        elif "layer" in name and isinstance(value, int) and value > MAX_LAYERS:
            fields.integer(name, 0, MAX_LAYERS)


def _known_to_transformers(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _read_config(snapshot: Snapshot, trusted: bool) -> Any:
    from transformers import AutoConfig

    with process.quiet_transformers():
        try:
            return AutoConfig.from_pretrained(snapshot.path, local_files_only=True, trust_remote_code=trusted)
        except Exception as error:  # a config class checks its fields with whatever it likes to raise
            raise UnsupportedModel(f"{snapshot.path / 'config.json'}: transformers cannot read it ({error})") from error


def _check_config(where: str, config: Any) -> None:
    """What would make a request's answer depend on others, or on state that is not KV."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None:
        _check_class(model_class)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{where}: an encoder with a decoder; causal language models can be run")
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings", "vocab_size"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModel(f"{where}: {name} is {value!r}, expected an integer of at least 1")
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if foreign:
        raise UnsupportedModel(f"{where}: layers of type {', '.join(foreign)}; full and sliding attention can be run")
    spec = getattr(config, "rope_parameters", None) or {}
    for rope in (spec, *(value for value in spec.values() if isinstance(value, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModel(
                f"{where}: rope type {rope['rope_type']!r}; there one request's length changes another's answer"
            )


def _check_class(model_class: type[Any]) -> None:
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{model_class.__name__} does not call its attention through transformers' interface")


def _check_windows(name: str, config: Any, windows: dict[int, int | None]) -> None:
    """A window that only the model's own mask knows of would be lost: the attention function has to be told."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return
    kinds = getattr(config, "layer_types", None)
    expected = [index for index in windows if kinds is None or kinds[index] == "sliding_attention"]
    lost = [index for index in expected if windows[index] is None]
    if lost:
        raise UnsupportedModel(f"{name}: layer {lost[0]} has a sliding window that its attention is not told of")
