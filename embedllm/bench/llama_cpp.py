"""llama.cpp on the same work: the weights written as GGUF, and continuous batching over its batch API.

Owns both. llama-cpp-python's high-level class runs one request at a time, so this drives `llama_decode` the way
llama.cpp's own server does: every step one token of each running sequence, the rest of the batch filled with prompts.
Invariant: the GGUF holds the same numbers as the safetensors file it came from.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from embedllm.bench.engines import MAX_BATCH_TOKENS, MAX_SEQS, Engine, Run
from embedllm.bench.workloads import Job, Workload
from embedllm.errors import MissingDependency, UnsupportedModel

BATCH = 2_048  # llama.cpp's default; it computes MAX_BATCH_TOKENS of them at once
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, target: Path, dtype: str) -> None:
    """Write a transformers folder as GGUF in `dtype`; UnsupportedModel for more than qwen2, qwen3 and plain llama."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependency("the llama.cpp peer needs: pip install llama-cpp-python gguf") from error
    from safetensors import safe_open

    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"the llama.cpp peer converts a model's folder; {str(folder)!r} is none")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    scaling = config.get("rope_scaling") or {}
    if kind not in ("qwen2", "qwen3", "llama") or scaling.get("rope_type", "default") != "default":
        raise UnsupportedModel(f"the llama.cpp peer runs qwen2, qwen3 and llama without rope scaling, not {kind!r}")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    out = gguf.GGUFWriter(target, kind)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_rope_dimension_count(head_dim)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    matrix = gguf.GGMLQuantizationType.BF16 if dtype == "bfloat16" else gguf.GGMLQuantizationType.F32
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                tensor = file.get_tensor(name).float()
                if kind == "llama":
                    tensor = _interleave(name, tensor, {"q_proj": heads, "k_proj": kv_heads})
                values = tensor.numpy()
                raw = matrix if values.ndim > 1 else gguf.GGMLQuantizationType.F32
                out.add_tensor(_gguf_name(name), gguf.quants.quantize(values, raw), raw_dtype=raw)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _gguf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{LAYER[rest]}"


def _interleave(name: str, tensor: Any, heads: dict[str, int]) -> Any:
    """llama.cpp rotates neighbouring pairs where transformers rotates halves; the rows move accordingly."""
    module = name.split(".")[-2]
    if module not in heads:
        return tensor
    shape = tensor.shape
    return tensor.reshape(heads[module], 2, shape[0] // heads[module] // 2, -1).transpose(1, 2).reshape(shape)


class LlamaCpp(Engine):
    """One model and one context with room for MAX_SEQS sequences of `longest` tokens."""

    name = "llama.cpp"

    def __init__(self, folder: Path, scratch: Path, dtype: str, longest: int, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise MissingDependency("the llama.cpp peer needs: pip install llama-cpp-python gguf") from error
        self.version = importlib.metadata.version("llama-cpp-python")
        self._lib = lib = llama_cpp
        path = scratch / "model.gguf"
        write_gguf(folder, path, dtype)
        self._quiet = lib.llama_log_callback(lambda *ignored: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = MAX_SEQS * longest
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, MAX_BATCH_TOKENS, MAX_SEQS
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise UnsupportedModel("llama.cpp could not load the GGUF file")
        self._width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(BATCH, 0, 1)

    def run(self, work: Workload) -> Run:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        outputs: list[list[int]] = [[] for _ in work.jobs]
        first = [0.0] * len(work.jobs)
        waiting, running = deque(range(len(work.jobs))), dict[int, tuple[int, int]]()  # job -> (sequence, computed)
        free = list(range(MAX_SEQS))
        began = time.perf_counter()
        while waiting or running:
            while waiting and free:
                running[waiting.popleft()] = (free.pop(), 0)
            rows = self._step(work.jobs, running, outputs)
            for job, row in rows.items():
                token = self._choose(row, work.temperature)
                first[job] = first[job] or time.perf_counter() - began
                outputs[job].append(token)
                if len(outputs[job]) == work.jobs[job].num_output:
                    sequence, _ = running.pop(job)
                    self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, -1, -1)
                    free.append(sequence)
        return Run(time.perf_counter() - began, outputs, first)

    def _step(
        self, jobs: tuple[Job, ...], running: dict[int, tuple[int, int]], outputs: list[list[int]]
    ) -> dict[int, int]:
        """Fill a batch and decode it; returns job -> row of its logits."""
        batch, rows, count = self._batch, dict[int, int](), 0
        for job, (sequence, computed) in sorted(
            running.items(), key=lambda item: item[1][1] < len(jobs[item[0]].prompt)
        ):
            prompt = jobs[job].prompt
            tokens = prompt[computed:] if computed < len(prompt) else outputs[job][-1:]
            tokens = tokens[: MAX_BATCH_TOKENS - count]
            for offset, token in enumerate(tokens):
                batch.token[count], batch.pos[count] = token, computed + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = last = computed + offset + 1 >= len(prompt)
                if last:
                    rows[job] = count
                count += 1
            running[job] = (sequence, computed + len(tokens))
        batch.n_tokens = count
        code = self._lib.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return rows

    def _choose(self, row: int, temperature: float) -> int:
        import numpy as np

        logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, row), (self._width,))
        if temperature:
            logits = logits / temperature - np.log(-np.log(np.random.random_sample(self._width)))
        return int(logits.argmax())

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
