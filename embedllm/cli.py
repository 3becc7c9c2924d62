"""The `embedllm` command: demo, generate, chat, plan, bench.

Owns the arguments, the exit codes and what a person at a terminal sees. Uses only the public names of embedllm, and
imports them when a command runs, so `--help` is quick. Invariant: what embedllm refuses is one line on stderr and exit
code 1, Ctrl-C is exit code 130 without a traceback, and text of a model can never steer the terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from embedllm import LLM, Completion

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "ignore_eos")
ENGINE = ("dtype", "device", "max_model_len", "kv_cache_memory", "max_num_seqs", "revision", "trust_remote_code")
SIZING = tuple(name for name in ENGINE)
CHAT_HELP = """/reset  forget the conversation
/exit   leave (so does Ctrl-D)
/help   this list; Ctrl-C while it answers stops the answer"""
INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell reports for SIGINT and SIGPIPE

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    from embedllm.errors import EmbedLLMError

    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.command is None:
            parser.print_help()
            return 0
        command: Command = args.run
        code = command(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone; nothing more can be said to it
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (EmbedLLMError, OSError) as error:
        print(f"embedllm {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Every command and option; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="embedllm",
        description="An LLM engine inside your process: paged KV cache, continuous batching, prefix cache.",
        epilog="`embedllm COMMAND --help` describes a command. Start with `embedllm demo`.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_plan(commands)
    _add_bench(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *ignored: object) -> None:
        import embedllm

        print(f"embedllm {embedllm.__version__}")
        parser.exit()


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch a small model answer many prompts at once",
        description="Streams ten prompts (twelve samples), eight at a time, through the model in the box, with a live "
        "view of the KV blocks on a terminal, and closes with what it measured.",
    )
    _add_model(parser, "of another model")
    parser.add_argument("--plain", action="store_true", help="no live view: print each answer as it is complete")
    parser.set_defaults(run=_demo)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="complete prompts",
        description="Completes a prompt and streams the text to stdout. Several prompts run at once and are printed in "
        "order.",
    )
    parser.add_argument("prompt", nargs="+", help="text to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message to a chat model")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its completion")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt instead of text")
    parser.add_argument("--stats", action="store_true", help="say on stderr how many tokens it took and how long")
    add_sampling(parser)
    _add_engine(parser)
    parser.set_defaults(run=_generate)


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a chat model",
        description="A conversation on the terminal. /reset forgets it, /exit leaves, Ctrl-C stops an answer.",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_sampling(parser)
    _add_engine(parser)
    parser.set_defaults(run=_chat)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a model would take, before it is loaded",
        description="Reads a model's config and headers and says what its weights and its KV cache would take here.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a Hub id; default: the model in the box")
    _add_engine(parser, model=False)
    parser.set_defaults(run=_plan)


def _add_bench(commands: Any) -> None:
    from embedllm.bench.arguments import add_arguments

    parser = commands.add_parser(
        "bench",
        help="measure, beside other engines if asked",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=_bench)


def _add_model(parser: argparse.ArgumentParser, instead: str = "") -> None:
    what = f"folder or Hub id {instead}".strip()
    parser.add_argument("-m", "--model", metavar="MODEL", help=f"{what}; default: the model in the box")


def _add_engine(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    group = parser.add_argument_group("model")
    if model:
        group.add_argument("-m", "--model", metavar="MODEL", help="folder or Hub id; default: the model in the box")
    group.add_argument("--dtype", help="auto (default), float32, bfloat16 or float16")
    group.add_argument("--device", help="auto (default) or cpu")
    group.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of prompt and output together")
    group.add_argument(
        "--kv-cache-memory", metavar="SIZE", help='"4GiB", "50%%" of free memory, or bytes; default: auto'
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences that run at once")
    group.add_argument("--revision", help="branch, tag or commit of a Hub id")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run Python files of the model")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of SAMPLING, as a group of the parser."""
    group = parser.add_argument_group("sampling (what is not given comes from the model's generation_config)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of output; default 256")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus: smallest set of tokens with this probability")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens; 0 for all")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens this likely relative to the best")
    group.add_argument("--seed", type=int, help="the same seed gives the same text")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be given more than once")
    group.add_argument("-n", type=int, metavar="N", help="samples per prompt")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end token")


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that were on the command line."""
    values = {name: getattr(args, name, None) for name in names}
    found = {name: value for name, value in values.items() if value is not None}
    memory = found.get("kv_cache_memory")
    if isinstance(memory, str) and memory.isdigit():
        found["kv_cache_memory"] = int(memory)
    return found


# ---- commands -------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from embedllm.demo.show import run

    return run(args.model, live=None if not args.plain else False)


def _plan(args: argparse.Namespace) -> int:
    import embedllm

    print(embedllm.plan(args.model, **given(args, ENGINE)))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from embedllm.bench.run import run

    return run(args)


def _generate(args: argparse.Namespace) -> int:
    import embedllm

    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    params = embedllm.SamplingParams(**given(args, SAMPLING))
    with embedllm.LLM(args.model, **given(args, ENGINE)) as llm:
        asked: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts] if args.chat else prompts
        if len(asked) == 1 and params.n == 1 and not args.json:
            if args.echo:
                sys.stdout.write(visible(prompts[0], sys.stdout))
            completion = stream(llm, asked[0], params)
            _tell(args, completion)
            return 0
        for prompt, completion in zip(prompts, llm.generate(asked, params), strict=True):
            if args.json:
                print(json.dumps(_as_json(prompt, completion), ensure_ascii=False))
            else:
                _print_all(prompt if args.echo else "", completion, many=len(prompts) > 1)
            _tell(args, completion)
    return 0


def stream(llm: LLM, prompt: Any, params: Any) -> Completion:
    """Print the text as it comes, end the line, and return the completion. An interrupt cancels the request."""
    out, last = sys.stdout, ""
    generation = llm.stream(prompt, params)
    for delta in generation:
        if delta.text:
            out.write(visible(delta.text, out))
            out.flush()
            last = delta.text
    if not last.endswith("\n"):
        out.write("\n")
        out.flush()
    return generation.result()


def _print_all(prompt: str, completion: Completion, many: bool) -> None:
    for output in completion.outputs:
        if many or len(completion.outputs) > 1:
            label = f"sample {output.index + 1} of {len(completion.outputs)} · " if len(completion.outputs) > 1 else ""
            print(f"── {label}{output.finish_reason} " + "─" * 20)
        print(visible(prompt + output.text, sys.stdout))


def _as_json(prompt: str, completion: Completion) -> dict[str, Any]:
    usage, timing = completion.usage, completion.timing
    return {
        "prompt": prompt,
        "outputs": [
            {"text": o.text, "tokens": o.tokens, "finish_reason": o.finish_reason, "stop_reason": o.stop_reason}
            for o in completion.outputs
        ],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "timing": {"queue": timing.queue, "ttft": timing.ttft, "decode": timing.decode, "total": timing.total},
    }


def _tell(args: argparse.Namespace, completion: Completion) -> None:
    if not args.stats:
        return
    usage, timing = completion.usage, completion.timing
    print(
        f"{usage.completion_tokens} tokens in {timing.total:.2f} s "
        f"({usage.completion_tokens / max(timing.total, 1e-9):.1f} tokens/s), first after {timing.ttft * 1e3:.0f} ms, "
        f"prompt {usage.prompt_tokens} ({usage.cached_tokens} cached), {completion.finish_reason}",
        file=sys.stderr,
    )


def _chat(args: argparse.Namespace) -> int:
    import embedllm

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines and keeps a history
    params = embedllm.SamplingParams(**given(args, SAMPLING))
    system = [{"role": "system", "content": args.system}] if args.system else []
    with embedllm.LLM(args.model, **given(args, ENGINE)) as llm:
        on_terminal = sys.stdin.isatty()
        if on_terminal:
            print(f"{llm.info.model}, {llm.info.max_model_len:,} tokens of context. /help lists the commands.")
        messages = list(system)
        while True:
            try:
                line = input("> " if on_terminal else "").strip()
            except (EOFError, KeyboardInterrupt) as leaving:
                if on_terminal:
                    print()
                return 0 if isinstance(leaving, EOFError) else INTERRUPTED
            if line in ("/exit", "/quit"):
                return 0
            if line == "/reset":
                messages = list(system)
            elif line == "/help":
                print(CHAT_HELP)
            elif line.startswith("/"):
                print(f"no command {line.split()[0]}\n{CHAT_HELP}")
            elif line:
                _answer(llm, messages, line, params)


def _answer(llm: LLM, messages: list[dict[str, str]], line: str, params: Any) -> None:
    """One turn; what was said becomes part of the conversation, also when it was interrupted."""
    from embedllm.errors import InvalidRequest, RequestFailed

    messages.append({"role": "user", "content": line})
    try:
        generation = llm.stream(messages, params)
    except InvalidRequest as error:
        messages.pop()
        print(f"{' '.join(str(error).split())} (/reset forgets the conversation)", file=sys.stderr)
        return
    try:
        for delta in generation:
            sys.stdout.write(visible(delta.text, sys.stdout))
            sys.stdout.flush()
    except KeyboardInterrupt:
        generation.cancel()
    except RequestFailed as error:
        print(f"\n{error}", file=sys.stderr)
    print()
    messages.append({"role": "assistant", "content": generation.text})


# ---- terminal -------------------------------------------------------------------------------------------------


def visible(text: str, file: TextIO) -> str:
    """Text of a model or a user for this file: on a terminal, control characters are shown and not obeyed."""
    return harmless(text) if file.isatty() else text


def harmless(text: str) -> str:
    """Every control character but newline and tab as a symbol (ESC as ␛), and what reverses the line as U+FFFD."""
    if text.isprintable():
        return text
    return "".join(_harmless(char) for char in text)


def _harmless(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or char.isprintable() or (char.isspace() and code > 0xFF):
        return char
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
