"""Opens and closes a real model again and again and watches the memory of the process. A program.

    python tests/engine/memory_cycles.py FOLDER

Prints one line of JSON per scene: MiB of resident memory after each cycle, and the peak within it.
"""

import ctypes
import gc
import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import embedllm
from embedllm.errors import EmbedLLMError

KV = 32 * 2**20
CYCLES = 20
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": KV, "max_model_len": 256}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4_096,
    "hidden_size": 256,
    "intermediate_size": 1_024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MODEL_MIB = 4 * (4_096 * 256 + 8 * (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 1_024)) / 2**20  # 34


def write_llama(folder: Path) -> Path:
    """A small Llama with random weights that are wide enough to tell contexts apart; ids only."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    hidden, wide, kv = 256, 1_024, 128
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    weights = {"model.embed_tokens.weight": weight(4_096, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(8):
        name = f"model.layers.{layer}."
        shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        weights |= {f"{name}self_attn.{key}_proj.weight": weight(*shape) for key, shape in shapes.items()}
        shapes = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        weights |= {f"{name}mlp.{key}_proj.weight": weight(*shape) for key, shape in shapes.items()}
        weights |= {f"{name}{key}_layernorm.weight": torch.ones(hidden) for key in ("input", "post_attention")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """What malloc keeps for later is no leak of ours."""
    ctypes.CDLL(None).malloc_trim(0)


class Scenes:
    """Each call of a scene is one run of a notebook cell; `self.out` is the notebook's Out[]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out: list[Any] = []
        self.llm: embedllm.LLM | None = None

    def open(self, **options: Any) -> embedllm.LLM:
        return embedllm.LLM(self.folder, **(OPTIONS | options))

    def use(self, llm: embedllm.LLM, number: int) -> None:
        self.out.append(llm.generate([number + 1, 5, 9], max_tokens=4))
        self.out.append(llm.submit([7, 8], max_tokens=4))
        self.out[-1].result()

    def closed(self, number: int) -> None:
        """with LLM(...) as llm: and the results are kept."""
        with self.open() as llm:
            self.use(llm, number)

    def run_again(self, number: int) -> None:
        """llm = LLM(...), the same cell again: the new handle is there before the old one goes."""
        self.llm = self.open(seed=number)
        self.use(self.llm, number)

    def dropped(self, number: int) -> None:
        """del llm, then other options: nobody called close()."""
        self.llm = None
        self.llm = self.open(max_num_seqs=8 + number)
        self.use(self.llm, number)
        self.llm = None

    def traceback(self, number: int) -> None:
        """A cell that fails after it has used the model; the error and its traceback are kept, as IPython does."""
        llm = self.open(max_num_seqs=8 + number)
        try:
            self.use(llm, number)
            llm.generate([number], max_tokens=4, logits_processor=lambda *args: 1 / 0)
        except EmbedLLMError as error:
            self.out.append(error)
        llm.close()

    def refused(self, number: int) -> None:
        """A load that fails when the weights are in; the error is kept."""
        try:
            self.open(kv_cache_memory=2**14, max_model_len=500)
        except EmbedLLMError as error:
            self.out.append((error, traceback.format_exc()))
        else:
            raise AssertionError("it was not refused")

    def broken(self, number: int) -> None:
        """A file of which the last tensors are missing."""
        folder = self.folder.with_name("broken")
        if not folder.exists():
            shutil.copytree(self.folder, folder)
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate(20 * 2**20)
        try:
            embedllm.LLM(folder, **OPTIONS)
        except EmbedLLMError as error:
            self.out.append(error)
        else:
            raise AssertionError("it was not refused")

    def side_by_side(self, number: int) -> None:
        """Two at once; the same tokens from both."""
        with self.open(max_num_seqs=8) as one, self.open(max_num_seqs=9) as two:
            assert one._core is not two._core
            mine, its = one.submit([number + 1, 3], max_tokens=6), two.submit([number + 1, 3], max_tokens=6)
            assert mine.result().tokens == its.result().tokens


def measure(name: str, scene: Callable[[int], None], scenes: Scenes) -> None:
    after, peak = [], []
    for number in range(CYCLES):
        forget_peak()
        scene(number)
        peak.append(round(status("VmHWM"), 1))
        trim()
        after.append(round(status("VmRSS"), 1))
    scenes.llm = None
    print(json.dumps({"scene": name, "after": after, "peak": peak}), flush=True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    scenes = Scenes(write_llama(folder))
    gc.collect()
    for scene in (
        scenes.closed,
        scenes.run_again,
        scenes.dropped,
        scenes.traceback,
        scenes.refused,
        scenes.broken,
        scenes.side_by_side,
    ):
        measure(scene.__name__, scene, scenes)
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
