"""Files to weights: every value arrives once, in the right place, and nothing foreign is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedllm.errors import InvalidRequest, ModelFormatError, UnsupportedModel
from embedllm.models import loader
from embedllm.models.checkpoint import INDEX, SINGLE, open_checkpoint
from embedllm.models.config import ModelConfig
from embedllm.models.shapes import random_weights, shape_config
from embedllm.models.weights import Shape, shapes
from tests.rules.tree import ROOT

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


class Kept:
    """A sink that keeps what is put into it."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.weights: dict[str, torch.Tensor] = {}
        self.finished = False

    def expected(self) -> dict[str, Shape]:
        return shapes(self.config)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        assert name not in self.weights
        self.weights[name] = tensor

    def finish(self) -> None:
        self.finished = True


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({"architectures": [architecture], "model_type": _type(architecture)} | TINY | changes)


def _type(architecture: str) -> str:
    return {"LlamaForCausalLM": "llama", "MixtralForCausalLM": "mixtral", "Qwen3MoeForCausalLM": "qwen3_moe",
            "Phi3ForCausalLM": "phi3"}[architecture]  # fmt: skip


def llama_tensors(tied: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint as transformers writes it, every value different."""
    torch.manual_seed(0)
    out = {"model.embed_tokens.weight": torch.randn(30, 16), "model.norm.weight": torch.randn(16)}
    if not tied:
        out["lm_head.weight"] = torch.randn(30, 16)
    sizes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
             "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16),
             "mlp.down_proj": (16, 24), "input_layernorm": (16,), "post_attention_layernorm": (16,)}  # fmt: skip
    for layer in range(2):
        out |= {f"model.layers.{layer}.{name}.weight": torch.randn(size) for name, size in sizes.items()}
    return out


def load(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> Kept:
    sink = Kept(model)
    loader.fill(sink, model, open_checkpoint(folder), dtype, CPU)
    assert sink.finished
    assert {name: tuple(weight.shape) for name, weight in sink.weights.items()} == shapes(model)
    return sink


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {name: tensors[name] for name in names[number::shards]}
        save_file(chosen, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_fuses_rows_in_order(tmp_path: Path, shards: int) -> None:
    tensors = llama_tensors()
    save_sharded(tmp_path, tensors, shards)
    weights = load(tmp_path, config()).weights
    attention = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    torch.testing.assert_close(weights["layers.1.qkv.weight"], torch.cat(attention), rtol=0, atol=0)
    mlp = [tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    torch.testing.assert_close(weights["layers.0.gate_up.weight"], torch.cat(mlp), rtol=0, atol=0)
    torch.testing.assert_close(weights["head.weight"], tensors["lm_head.weight"], rtol=0, atol=0)
    post = tensors["model.layers.0.post_attention_layernorm.weight"]
    torch.testing.assert_close(weights["layers.0.mlp_norm.weight"], post, rtol=0, atol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_converts(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in llama_tensors().items()}
    save_file(tensors, tmp_path / SINGLE)
    weights = load(tmp_path, config(), dtype).weights
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert torch.equal(weights["embed.weight"], tensors["model.embed_tokens.weight"].to(dtype))


def test_tied(tmp_path: Path) -> None:
    tensors = llama_tensors(tied=True)
    model = config(tie_word_embeddings=True)
    save_file(tensors, tmp_path / SINGLE)
    assert "head.weight" not in load(tmp_path, model).weights
    # A copy of the head in the file changes nothing; a different one is a head of its own.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / SINGLE)
    assert loader.untie_if_saved_apart(model, open_checkpoint(tmp_path)).tied
    assert "head.weight" not in load(tmp_path, model).weights
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / SINGLE)
    apart = loader.untie_if_saved_apart(model, open_checkpoint(tmp_path))
    assert not apart.tied
    assert torch.equal(load(tmp_path, apart).weights["head.weight"], tensors["lm_head.weight"])
    # Saved under the head's name only.
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / SINGLE)
    assert torch.equal(load(tmp_path, model).weights["embed.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("spelling", ["mixtral", "per expert", "stacked"])
def test_experts_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    torch.manual_seed(1)
    tensors = {name: tensor for name, tensor in llama_tensors().items() if ".mlp." not in name}
    gate, up, down = torch.randn(2, 4, 24, 16), torch.randn(2, 4, 24, 16), torch.randn(2, 4, 16, 24)
    names = ("w1", "w3", "w2") if spelling == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    module = "block_sparse_moe" if spelling == "mixtral" else "mlp"
    for layer in range(2):
        prefix = f"model.layers.{layer}.{module}"
        tensors[f"{prefix}.gate.weight"] = torch.randn(4, 16)
        if spelling == "stacked":
            tensors[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate[layer], up[layer]], 1)
            tensors[f"{prefix}.experts.down_proj"] = down[layer].clone()
            continue
        for expert in range(4):
            for name, values in zip(names, (gate, up, down), strict=True):
                tensors[f"{prefix}.experts.{expert}.{name}.weight"] = values[layer, expert].clone()
    save_sharded(tmp_path, tensors, 3)
    weights = load(tmp_path, config("MixtralForCausalLM", num_local_experts=4)).weights
    assert torch.equal(weights["layers.1.experts.gate_up"], torch.cat([gate[1], up[1]], 1))
    assert torch.equal(weights["layers.1.experts.down"], down[1])


def test_fused_files(tmp_path: Path) -> None:
    tensors = llama_tensors()
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        attention = [tensors.pop(f"{prefix}.self_attn.{name}_proj.weight") for name in "qkv"]
        tensors[f"{prefix}.self_attn.qkv_proj.weight"] = torch.cat(attention)
        mlp = [tensors.pop(f"{prefix}.mlp.{name}_proj.weight") for name in ("gate", "up")]
        tensors[f"{prefix}.mlp.gate_up_proj.weight"] = torch.cat(mlp)
    save_file(tensors, tmp_path / SINGLE)
    weights = load(tmp_path, config("Phi3ForCausalLM")).weights
    assert torch.equal(weights["layers.0.qkv.weight"], tensors["model.layers.0.self_attn.qkv_proj.weight"])


def test_what_older_files_keep_beside_weights_is_ignored(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(2)}
    save_file(tensors, tmp_path / SINGLE)
    load(tmp_path, config())


def test_what_is_put_is_not_a_view_of_the_file(tmp_path: Path) -> None:
    save_file(llama_tensors(), tmp_path / SINGLE)
    weights = load(tmp_path, config()).weights
    before = {name: weight.clone() for name, weight in weights.items()}
    with (tmp_path / SINGLE).open("r+b") as file:
        file.write(b"\xff" * (tmp_path / SINGLE).stat().st_size)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


NORM = "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(NORM), "norm.weight .* is missing"),
        (lambda t: t.pop(Q), "layers.1.qkv.weight .* is incomplete"),
        (lambda t: t.pop("lm_head.weight"), "head.weight .* is missing"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "'model.extra.weight' has no place"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(16)}), "has no place"),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(16)}), "asks for no layers.1.qkv.bias"),
        (lambda t: t.update({Q: torch.ones(16, 15)}), r"has shape \[16, 15\], .* \[16, 16\]"),
        (lambda t: t.update({NORM: torch.ones(1)}), r"has shape \[1\]"),
        (lambda t: t.update({"norm.weight": torch.ones(16)}), "are the same weight"),
        (lambda t: t.update({Q.replace("q_proj", "qkv_proj"): torch.ones(32, 16)}), "qkv.weight .* is incomplete"),
    ],
)
def test_names_must_balance(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], told: str) -> None:
    tensors = llama_tensors()
    change(tensors)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ModelFormatError, match=told):
        load(tmp_path, config())


def test_quantized_values_are_refused(tmp_path: Path) -> None:
    save_file(llama_tensors() | {Q: torch.ones(16, 16, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(UnsupportedModel, match="stored as I8"):
        load(tmp_path, config())


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "opened"
    (tmp_path / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(ModelFormatError, match="save_pretrained"):
        load(tmp_path, config())
    assert not canary.exists()


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a.bin", 3, None]
)
def test_an_index_cannot_reach_elsewhere(tmp_path: Path, file: Any) -> None:
    save_file(llama_tensors(), tmp_path / "other.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: file}}))
    with pytest.raises(ModelFormatError, match="safetensors file beside it"):
        open_checkpoint(folder)


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    save_sharded(tmp_path, llama_tensors(), 2)
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))
    save_file({"model.extra": torch.ones(1)}, tmp_path / second)
    with pytest.raises(ModelFormatError, match="does not hold it"):
        open_checkpoint(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(ModelFormatError, match=second):
        open_checkpoint(tmp_path)
    save_file(load_file(tmp_path / first), tmp_path / second)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {NORM: first, "lm_head.weight": first} | {Q: second}}))
    with pytest.raises(ModelFormatError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, 5_000])
def test_cut_files_are_named(tmp_path: Path, size: int) -> None:
    save_file(llama_tensors(), tmp_path / SINGLE)
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ModelFormatError, match=SINGLE):
        open_checkpoint(tmp_path)


def test_auto_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "cpu_multiplies_bfloat16", lambda: False)
    assert loader.choose_dtype("auto", "bfloat16", CPU) is torch.float32
    assert loader.choose_dtype("bfloat16", "float32", CPU) is torch.bfloat16
    assert loader.choose_dtype(torch.float16, "float32", CPU) is torch.float16
    monkeypatch.setattr(loader, "cpu_multiplies_bfloat16", lambda: True)
    assert loader.choose_dtype("auto", "bfloat16", CPU) is torch.bfloat16
    assert loader.choose_dtype("auto", "float16", CPU) is torch.float32
    assert loader.choose_dtype("auto", "float16", torch.device("cuda")) is torch.float16
    with pytest.raises(InvalidRequest, match="int8"):
        loader.choose_dtype("int8", "float32", CPU)


def test_no_bar_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file(llama_tensors(), tmp_path / SINGLE)
    load(tmp_path, config())
    assert capfd.readouterr() == ("", "")
    loader.fill(Kept(config()), config(), open_checkpoint(tmp_path), torch.float32, CPU, progress=True)
    assert "loading weights" in capfd.readouterr().err


def test_random_weights_are_the_same_every_time() -> None:
    model = config(tie_word_embeddings=True)
    first, again, other = (dict(random_weights(model, seed)) for seed in (0, 0, 1))
    assert {name: tuple(weight.shape) for name, weight in first.items()} == shapes(model)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert not torch.equal(first["layers.0.qkv.weight"], first["layers.1.qkv.weight"])
    assert torch.equal(first["norm.weight"], torch.ones(16))


def test_random_rows_differ_in_a_large_embedding() -> None:
    """Equal rows would give equal logits, and greedy a tie."""
    _, embedding = next(iter(random_weights(shape_config("smollm2-135m"), dtype=torch.bfloat16)))
    assert embedding.shape == (49_152, 576)
    assert len({tuple(row) for row in embedding[:, :24].float().tolist()}) == 49_152
    assert embedding.float().std().item() == pytest.approx(0.02, rel=0.05)


PEAK = """
import resource, sys
import torch
torch.set_num_threads(1)
import embedllm.models.decoder
from embedllm.models.hub import resolve
from embedllm.models.load import load
load(resolve(sys.argv[1]), dtype="float32")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load(resolve(sys.argv[2]), dtype="float32")
print(peak() - before, model.num_bytes)
"""


@pytest.mark.slow
def test_loading_holds_one_copy(tmp_path: Path) -> None:
    """Peak memory grows by the model and little more, packed and fused as it is."""
    sizes = {"hidden_size": 512, "intermediate_size": 2_048, "num_hidden_layers": 8, "vocab_size": 2_000}
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | TINY
    for name, changes in (("small", {}), ("large", sizes)):
        model = ModelConfig.from_dict(raw | changes)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw | changes))
        save_file(unfused(model), folder / SINGLE)
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")],
        cwd=ROOT, env={"PYTHONPATH": ".:kernels", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
        check=True,
    )  # fmt: skip
    growth, size = map(int, out.stdout.split())
    assert size > 100e6
    assert growth < 1.25 * size


def unfused(model: ModelConfig) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights under the names that files use."""
    out = {}
    back = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "o": "self_attn.o_proj",
             "down": "mlp.down_proj"}  # fmt: skip
    for name, weight in random_weights(model):
        if name in back:
            out[back[name]] = weight
            continue
        _, layer, part, _ = name.split(".")
        prefix = f"model.layers.{layer}"
        if part == "qkv":
            rows = weight.split([model.q_size, model.kv_size, model.kv_size])
            out |= {f"{prefix}.self_attn.{x}_proj.weight": row.clone() for x, row in zip("qkv", rows, strict=True)}
        elif part == "gate_up":
            out |= {
                f"{prefix}.mlp.{x}_proj.weight": row.clone()
                for x, row in zip(("gate", "up"), weight.chunk(2), strict=True)
            }
        else:
            out[f"{prefix}.{names[part]}.weight"] = weight
    return out
