"""transformers and llama.cpp on the same work: the peers of `embedllm bench --against`.

Owns how each is driven as its own documentation says it is fastest in one process. Every peer is an optional install.
Invariant: a peer gets the same weights, token ids and output lengths as embedllm, and nothing but useful tokens count.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from pathlib import Path
from typing import Any

from embedllm.bench.engines import WARM_UP, Engine, Run, sizes
from embedllm.bench.workloads import Workload
from embedllm.errors import MissingDependency

PAGE = 16


def load_transformers(folder: str | Path, dtype: str, device: str = "cpu", flash: bool = False) -> Any:
    """The model of the transformers peers. flash: with FlashAttention on a card, where its package is installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependency('the transformers peers need: pip install "embedllm[bench]"') from error
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    has_flash = flash and device != "cpu" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if has_flash else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=attention)
    model = model.to(device)  # type: ignore[arg-type]
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    model.train(False)
    return model


def _version(model: Any) -> str:
    return f"{importlib.metadata.version('transformers')}, {model.config._attn_implementation}"


class HFGenerate(Engine):
    """`generate()` on left-padded batches of `batch` prompts; one prompt at a time with batch=1.

    A padded batch runs to its longest output: what a shorter one made past its own length is not useful and not
    counted.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self.name = "hf" if batch == 1 else "hf-batch"
        self.version = _version(model)
        self._model = model
        self._batch = batch

    def run(self, work: Workload) -> Run:
        outputs: list[list[int]] = []
        began = time.perf_counter()
        for start in range(0, len(work.jobs), self._batch):
            outputs += self._generate(work, start)
        return Run(time.perf_counter() - began, outputs)

    def _generate(self, work: Workload, start: int) -> list[list[int]]:
        import torch

        jobs = work.jobs[start : start + self._batch]
        width = max(len(job.prompt) for job in jobs)
        count = max(job.num_output for job in jobs)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + list(job.prompt) for job in jobs])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        sampling = {"do_sample": True, "temperature": work.temperature} if work.temperature else {"do_sample": False}
        with torch.inference_mode():
            out = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
                eos_token_id=None,
                **sampling,
            )
        return [row[width : width + job.num_output] for row, job in zip(out.tolist(), jobs, strict=True)]

    def close(self) -> None:
        del self._model


class HFContinuous(Engine):
    """transformers' continuous batching: a paged cache and a scheduler on a thread of this process."""

    name = "hf-cb"

    def __init__(self, model: Any, longest: int) -> None:
        self.version = _version(model)
        self._model = model
        max_num_seqs, max_batch_tokens = sizes(model.device.type)
        self._limits: dict[str, Any] = {"max_batch_tokens": max_batch_tokens}
        if model.device.type == "cpu":  # on a card it takes what memory there is, in pages of its own choice
            self._limits |= {"page_size": PAGE, "num_blocks": (max_num_seqs + 1) * -(-longest // PAGE)}

    def run(self, work: Workload) -> Run:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        sampling = {"do_sample": True, "temperature": work.temperature} if work.temperature else {"do_sample": False}
        # -1 is no token's id: only the length ends a request
        generation = GenerationConfig(eos_token_id=-1, pad_token_id=0, **sampling)  # type: ignore[no-untyped-call]
        batching = ContinuousBatchingConfig(auto_switch_to_flash=False, **self._limits)
        context = self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, warmup=True
        )
        with context as batcher:  # starting it and warming it up is not timed
            self._go(batcher, Workload("first", WARM_UP))  # not of the work: its cache keeps prefixes too
            began = time.perf_counter()
            results = self._go(batcher, work)
            seconds = time.perf_counter() - began
        first = [float(result.timestamps[0] - result.created_time) for result in results if result.timestamps]
        return Run(seconds, [list(result.generated_tokens) for result in results], first)

    def _go(self, batcher: Any, work: Workload) -> list[Any]:
        ids = [
            batcher.add_request(list(job.prompt), max_new_tokens=job.num_output, record_timestamps=True)
            for job in work.jobs
        ]
        done: dict[str, Any] = {}
        while len(done) < len(ids):
            result = batcher.get_result(timeout=600)
            if result is None or result.error:
                raise RuntimeError(f"transformers continuous batching failed: {getattr(result, 'error', 'no result')}")
            done[result.request_id] = result
        return [done[request_id] for request_id in ids]

    def close(self) -> None:
        del self._model
