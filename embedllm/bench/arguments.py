"""The options of `embedllm bench`.

Owns their names and help. Imports nothing heavy. Invariant: what is not understood is refused before anything loads.
"""

from __future__ import annotations

import argparse

WORKLOADS = ("mixed", "single", "shared-prefix", "nano", "sharegpt")
PROBES = ("overhead", "waste", "gpu")
PEERS = ("hf", "hf-batch", "hf-cb", "llama.cpp")

DESCRIPTION = """\
Runs fixed, seeded work and prints what it took. Workloads: mixed (32 requests, prompts of 16 to 128 tokens, outputs of
8 to 64), single (one request), shared-prefix (64 questions after one system prompt of 512 tokens), nano (the nano-vllm
workload: 256 requests, 100 to 1,024 tokens in and out), sharegpt (256 requests of chat-like lengths). Probes of the
engine alone: overhead (CPU time of a step outside the model), waste (KV memory on chat-like lengths). gpu: what a CUDA
card reaches, beside its own copy bandwidth and matrix rate and beside the transformers peers; eight minutes on an H100,
with settings of its own. Default: mixed.

Peers run on the same weights, token ids and output lengths, each in a process of its own, on a CPU taking turns
round by round, on a card one after another with the card to itself:
  hf         transformers generate(), one prompt after another
  hf-batch   transformers generate() on padded batches of 32
  hf-cb      transformers continuous batching
  llama.cpp  continuous batching over llama-cpp-python's batch API, on the same weights as GGUF

With --shape every weight is random, which times the same arithmetic as trained ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `embedllm bench` its options."""
    parser.description = DESCRIPTION
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(WORKLOADS + PROBES)}; default: mixed")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-m", "--model", metavar="MODEL", help="folder or Hub id; default: the model in the box")
    which.add_argument("--shape", metavar="NAME", help="random weights of a known shape, such as qwen2-0.5b")
    parser.add_argument("--against", default="", metavar="PEERS", help=f"comma-separated: {', '.join(PEERS)}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--device", default="cpu", metavar="D", help="where everybody computes: cpu (default) or cuda")
    parser.add_argument("--rounds", type=_positive_int, default=3, metavar="N", help="timed rounds; default 3")
    parser.add_argument("--threads", type=_positive_int, metavar="N", help="CPU threads of everybody; default: torch's")
    parser.add_argument("--scale", type=_positive, default=1.0, metavar="X", help="take this share of the requests")
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON; - for stdout alone")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1_000:
        raise argparse.ArgumentTypeError(f"{text} is out of range: above 0 to 1000")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is out of range: 1 to 10000")
    return value


def chosen(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What to run and against whom; ValueError naming what is unknown."""
    what = args.what or ["mixed"]
    against = [name for name in args.against.split(",") if name]
    for name, known in [*((w, WORKLOADS + PROBES) for w in what), *((a, PEERS) for a in against)]:
        if name not in known:
            raise ValueError(f"unknown: {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(what)), list(dict.fromkeys(against))
