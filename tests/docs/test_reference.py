"""What the pages list is what there is: commands, options, events, statistics, modules."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tests.rules.tree import ROOT, sources

GUIDE = ROOT / "docs" / "guide"
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def commands(program: str) -> list[list[str]]:
    """What the pages tell a reader to type, without their comments."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    typed = [line for page in pages for block in CONSOLE.findall(read(page)) for line in block.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in typed if line.startswith(f"$ {program} ")]


@pytest.mark.parametrize("command", commands("embedllm"), ids=shlex.join)
def test_command_lines_are_understood(command: list[str]) -> None:
    from embedllm.cli import build_parser

    assert build_parser().parse_args(command[1:]).command == command[1]


def test_make_verbs_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named = {command[1] for command in commands("make")}
    assert {"demo", "test", "check", "docs"} <= named <= verbs


def unnamed(names: list[str], page: Path) -> list[str]:
    """The names that do not stand in backticks on a page."""
    coded = " ".join(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)))
    return [name for name in names if not re.search(rf"\b{name}\b", coded)]


def test_every_sampling_field_is_on_its_page() -> None:
    from embedllm import SamplingParams

    assert not unnamed([field.name for field in fields(SamplingParams)], GUIDE / "sampling.md")


def test_every_default_of_the_sampling_page_is_true() -> None:
    from embedllm import SamplingParams

    defaults = {field.name: field.default for field in fields(SamplingParams)}
    rows = re.findall(r"^\| (`.*`) \| `?(\S+?)`? \| ", read(GUIDE / "sampling.md"), re.MULTILINE)
    said = {name: value for names, value in rows for name in re.findall(r"`(\w+)`", names)}
    assert said.keys() == defaults.keys()
    for name, value in said.items():
        assert eval(value) == defaults[name], name


def test_every_option_of_an_llm_is_in_the_guide(tmp_path: Path) -> None:
    from embedllm.options import Options

    whole = tmp_path / "guide.md"
    whole.write_text("\n".join(read(page) for page in sorted(GUIDE.glob("*.md"))), encoding="utf-8")
    reserved = {"quantization", "speculative"}
    shown = set(re.findall(r"LLM\([^)]*?\b(\w+)=", read(whole)))
    names = [field.name for field in fields(Options) if field.name not in reserved | shown]
    assert not unnamed(names, whole)


def test_every_event_is_on_its_page() -> None:
    from embedllm import events

    names = [value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)]
    assert len(names) > 10
    assert not unnamed(names, GUIDE / "tracing.md")


def test_every_statistic_is_on_its_page() -> None:
    from embedllm import Stats

    assert not unnamed([field.name for field in fields(Stats)], GUIDE / "memory.md")


def test_architecture_names_every_module() -> None:
    table = re.findall(r"^```text\n(.*?)^```", read(ROOT / "docs" / "architecture.md"), re.MULTILINE | re.DOTALL)[0]
    present = {source.module.split(".")[1] for source in sources() if source.module.startswith("embedllm.")}
    assert not [name for name in sorted(present) if not re.search(rf"(?<![\w]){name}(?![\w])", table)]
    cells = re.findall(r"^(?:[1-7]|   ?)\s*(\S.*?)(?:\s{3,}|$)", table, re.MULTILINE)
    named = {word.rstrip("/") for cell in cells for word in cell.split()}
    assert named == present
