"""Command line of the training package: `prepare`, `train`, `eval` and `export`, in that order."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from . import corpus, evaluate
from .export import export, load_exported
from .loop import Run, Trainer
from .model import ModelConfig
from .packing import MIXES, load_pool, prepare


def parser() -> argparse.ArgumentParser:
    """The options of all four commands."""
    top = argparse.ArgumentParser(prog="python -m embedllm.demo.train", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("prepare", "train", "export"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, required=True, help="folder for token pools and checkpoints")
    for command in (commands.add_parser("eval"), commands.choices["export"]):
        command.add_argument("--model", type=Path, required=True, help="folder of the exported model")
    train = commands.choices["train"]
    train.add_argument("--minutes", type=float, default=60.0, help="active training time")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument("--pause-file", type=Path, help="training sleeps while this file exists")
    return top


def report(folder: Path) -> None:
    """Print every held-out figure of an exported model, after the mistakes it makes in single turns."""
    model, tokenizer = load_exported(folder)
    _, held_out = corpus.split(corpus.read_library())
    library = [source for source in held_out if not source.is_test]
    tests = [source for source in held_out if source.is_test]
    chat = evaluate.chat_accuracy(model, tokenizer, report=partial(print, flush=True))
    show("chat, single turns: right, asked", chat)
    show("chat, up to four turns", evaluate.chat_accuracy(model, tokenizer, 100, max_turns=4))
    show("bits per byte, library", evaluate.bits_per_byte(model, tokenizer, [source.text for source in library]))
    show("bits per byte, tests", evaluate.bits_per_byte(model, tokenizer, [source.text for source in tests]))
    show("functions that parse", evaluate.parse_rates(model, tokenizer, library))


def show(name: str, figure: object) -> None:
    """Print one figure as a line of JSON."""
    print(json.dumps({name: figure}), flush=True)


def main() -> None:
    """Run one command."""
    options = parser().parse_args()
    if options.command == "prepare":
        prepare(options.work)
    elif options.command == "train":
        pools = {name: load_pool(options.work, name) for name in MIXES[0][1]}
        run = Run(folder=options.work, minutes=options.minutes, device=options.device, pause_file=options.pause_file)
        trainer = Trainer(ModelConfig(), run, pools)
        trainer.resume()
        trainer.train(partial(print, flush=True))
    elif options.command == "export":
        export(options.work / "checkpoint.safetensors", options.work / "tokenizer.json", options.model)
    else:
        report(options.model)


if __name__ == "__main__":
    main()
