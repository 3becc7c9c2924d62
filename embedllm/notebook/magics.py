"""`%%chat`, `%%generate` and `%embedllm`.

Owns what they are told and which LLM they mean; the request shows itself. What a cell holds is the prompt, letter for
letter: braces and dollars are no variables here. Uses only the public names of embedllm.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display

from embedllm import LLM
from embedllm.cli import SAMPLING, add_sampling, given, stream


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as a magic does: in one line, without leaving the kernel."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {' '.join(self.format_usage().split())}")


def _parser(magic: str) -> _Parser:
    parser = _Parser(prog=magic, add_help=False)
    parser.add_argument("name", nargs="?", help="the variable that holds the LLM; default: the only one that is open")
    parser.add_argument("--into", metavar="NAME", help="put the Completion into this variable")
    add_sampling(parser)
    return parser


class Status:
    """Text that a notebook shows as it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


@magics_class
class EmbedLLMMagics(Magics):
    """The magics of embedllm."""

    shell: Any

    @no_var_expand
    @cell_magic
    def chat(self, line: str, cell: str) -> None:
        """%%chat [name] [--system TEXT] [--into NAME] [--max-tokens N] [--temperature T] [...]

        The cell is a message to a chat model; the answer appears while it is written. A trailing ; shows nothing.
        The options are those of `embedllm chat` on a command line.
        """
        parser = _parser("%%chat")
        parser.add_argument("--system", metavar="TEXT", help="a system message before it")
        args = self._parse(parser, line)
        text, silent = _text_of(cell)
        messages = [{"role": "system", "content": args.system}] if args.system else []
        self._answer(args, [*messages, {"role": "user", "content": text}], silent)

    @no_var_expand
    @cell_magic
    def generate(self, line: str, cell: str) -> None:
        """%%generate [name] [--into NAME] [--max-tokens N] [--temperature T] [...]

        The cell is a text that the model goes on with, without the line break at its end. A trailing ; shows nothing.
        """
        args = self._parse(_parser("%%generate"), line)
        text, silent = _text_of(cell)
        self._answer(args, text, silent)

    @no_var_expand
    @line_magic
    def embedllm(self, line: str) -> Any:
        """%embedllm status | kv [name] | stop

        status: every open LLM and what it does. kv: a live view of one's KV blocks. stop: end every running request.
        """
        verb, *names = line.split() or ["status"]
        if verb == "kv" and len(names) <= 1:
            return self._llm(names[0] if names else None).monitor()
        if verb == "status" and not names:
            return Status("\n".join(map(self._line, LLM.opened())) or "no LLM is open")
        if verb == "stop" and not names:
            opened = LLM.opened()
            for llm in opened:
                llm.cancel_all()
            return Status(f"every request of {len(opened)} open LLM{'s' * (len(opened) != 1)} was told to end")
        raise UsageError("%embedllm status | kv [name] | stop")

    def _parse(self, parser: _Parser, line: str) -> argparse.Namespace:
        try:
            args = parser.parse_args(shlex.split(line))
        except ValueError as error:  # a quote that is not closed
            raise UsageError(str(error)) from None
        if args.into is not None and not args.into.isidentifier():
            raise UsageError(f"--into {args.into}: not the name of a variable")
        return args

    def _answer(self, args: argparse.Namespace, prompt: Any, silent: bool) -> None:
        llm, params = self._llm(args.name), given(args, SAMPLING)
        if silent:
            completion = llm.stream(prompt, **params).result()
        elif hasattr(self.shell, "kernel"):
            generation = llm.stream(prompt, **params)
            display(generation)  # type: ignore[no-untyped-call]
            completion = generation.result()
        else:
            from embedllm import SamplingParams

            completion = stream(llm, prompt, SamplingParams(**params))
        if args.into is not None:
            self.shell.user_ns[args.into] = completion

    def _llm(self, name: str | None) -> LLM:
        """The LLM of this name, or the only one. Raises UsageError."""
        opened = LLM.opened()
        if name is not None:
            named: list[LLM] = [llm for llm in opened if llm is self.shell.user_ns.get(name)]
            if not named:
                raise UsageError(f"{name} is not an open LLM{self._choice(opened)}")
            return named[0]
        if len(opened) != 1:
            how_many = f"{len(opened)} LLMs are open" if opened else "no LLM is open: llm = embedllm.LLM() opens one"
            raise UsageError(f"{how_many}{self._choice(opened)}")
        return opened[0]

    def _choice(self, opened: list[LLM]) -> str:
        names = sorted(filter(None, map(self._name, opened)))
        return f"; name one: {', '.join(names)}" if names else ""

    def _name(self, llm: LLM) -> str:
        """Of the variable that holds it, "" if none does."""
        variables = self.shell.user_ns.items()
        return next((name for name, value in variables if value is llm and not name.startswith("_")), "")

    def _line(self, llm: LLM) -> str:
        stats = llm.stats()
        return (
            f"{self._name(llm) or '(no name)'}: {llm.info.model} on {llm.info.device}, "
            f"{stats.num_requests_running} running, {stats.num_requests_waiting} waiting, "
            f"KV {stats.kv_cache_usage:.0%} of {stats.num_kv_blocks:,} blocks, "
            f"{stats.generation_tokens:,} tokens generated"
        )


def _text_of(cell: str) -> tuple[str, bool]:
    """The prompt, and whether the answer is to be silent."""
    text = cell.rstrip()
    return (text[:-1].rstrip(), True) if text.endswith(";") else (cell.removesuffix("\n"), False)
