"""`%load_ext embedllm`: prompts arrive letter for letter, the right LLM answers, what is wrong is said in a line."""

from collections.abc import Iterator

import pytest

from tests.notebook.kernels import Kernel, kernel

SETUP = """
import embedllm
from embedllm.testing import ScriptedModel, ByteTokenizer
x, y, name = 'EXPANDED', 'EXPANDED', 'EXPANDED'
tokenizer = ByteTokenizer()
echo = ScriptedModel(lambda prompt: [ord('<'), *prompt, ord('>')])
"""
OPEN = "llm = embedllm.LLM(echo, tokenizer=tokenizer)"
LONG = "%%generate --max-tokens 1000 --into"


@pytest.fixture(scope="module")
def loaded() -> Iterator[Kernel]:
    with kernel() as running:
        running.run(SETUP)
        running.run("%load_ext embedllm")
        yield running


@pytest.fixture
def notebook(loaded: Kernel) -> Iterator[Kernel]:
    """With one LLM open, named llm, that says the prompt again in angle brackets."""
    loaded.run(OPEN)
    yield loaded
    loaded.run("for one in embedllm.LLM.opened(): one.close()\ndel llm")


def complaint(notebook: Kernel, cell: str) -> str:
    """What is said to a cell that is refused; nothing is shown beside it."""
    ran = notebook.finish(notebook.start(cell))
    assert not ran.of("execute_result", "display_data")
    said = ran.printed + " ".join("\n".join(error["traceback"]) for error in ran.of("error"))
    assert "UsageError" in said and "Traceback" not in said
    return said


LITERAL = [
    "x = {x} and $y and ${y} and {{x}} and {1 + 1}",
    "def f(name):\n    return f'{name!r}'  # $name",
    "%time is no magic here\n!ls\n?x",
    "quotes \" and ' and \\n and \\",
    "  spaces stay, and é, 漢 and 🎉",
    "a; b",
]


@pytest.mark.parametrize("text", LITERAL)
@pytest.mark.parametrize("magic", ["generate", "chat"])
def test_the_cell_is_the_prompt_letter_for_letter(notebook: Kernel, magic: str, text: str) -> None:
    ran = notebook.run(f"%%{magic} --into answer --max-tokens 1000\n{text}")
    wanted = text if magic == "generate" else f"user\n{text}\nassistant\n"  # control tokens are no text
    assert notebook.value("answer.text") == f"<{wanted}>"
    assert ran.of("update_display_data", "display_data") and not ran.of("execute_result")


def test_the_line_is_literal_too(notebook: Kernel) -> None:
    notebook.run("%%chat --into answer --max-tokens 1000 --system 'say {x} $y'\nhi")
    assert "system\nsay {x} $y\nuser\nhi" in notebook.value("answer.text")


def test_options_reach_the_request(notebook: Kernel) -> None:
    notebook.run("%%generate llm --max-tokens 9 --temperature 0 --top-p 0.9 --stop cd --into answer\nabcdef")
    assert notebook.value("answer.text, answer.finish_reason, answer.stop_reason") == ("<ab", "stop", "cd")


def test_a_semicolon_silences(notebook: Kernel) -> None:
    ran = notebook.run(f"{LONG} answer\nhello;\n")
    assert not ran.of("display_data", "update_display_data", "execute_result", "stream")
    assert notebook.value("answer.text") == "<hello>"


def test_the_name_says_which(notebook: Kernel) -> None:
    notebook.run("other = embedllm.LLM(ScriptedModel(['other']), tokenizer=tokenizer)")
    assert "2 LLMs are open; name one: llm, other" in complaint(notebook, "%%generate\nhi")
    notebook.run(f"{LONG} answer other\nhi")
    assert notebook.value("answer.text") == "other"
    notebook.run("other.close()\ndel other")
    notebook.run(f"{LONG} answer\nhi")
    assert notebook.value("answer.text") == "<hi>"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%%generate nobody\nhi", "nobody is not an open LLM; name one: llm"),
        ("%%chat x\nhi", "x is not an open LLM"),
        ("%%chat --max-tokens many\nhi", "argument --max-tokens: invalid int value: 'many'"),
        ("%%chat --no-such 1\nhi", "unrecognized arguments: --no-such"),
        ("%%chat --system 'open\nhi", "No closing quotation"),
        ("%%chat --into 1x\nhi", "1x: not the name of a variable"),
        ("%embedllm dance", "%embedllm status | kv [name] | stop"),
        ("%embedllm stop now", "%embedllm status | kv [name] | stop"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(notebook: Kernel, cell: str, said: str) -> None:
    assert said in complaint(notebook, cell)


def test_what_the_engine_refuses_is_an_error(notebook: Kernel) -> None:
    ran = notebook.finish(notebook.start("%%generate --max-tokens 100000\nhi"))
    assert ran.error == "RequestTooLong"


def test_nothing_open(loaded: Kernel) -> None:
    assert "no LLM is open: llm = embedllm.LLM() opens one" in complaint(loaded, "%%chat\nhi")
    (status,) = loaded.run("%embedllm status").of("execute_result")
    assert status["data"]["text/plain"] == "no LLM is open"


def test_status(notebook: Kernel) -> None:
    notebook.run("again = embedllm.LLM(echo, tokenizer=tokenizer)")
    (status,) = notebook.run("%embedllm").of("execute_result")
    lines = status["data"]["text/plain"].splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["again", "llm"]
    assert all("scripted on cpu, 0 running, 0 waiting, KV 0% of 4,096 blocks" in line for line in lines)
    notebook.run("again.close()\ndel again")


def test_kv_is_the_monitor(notebook: Kernel) -> None:
    notebook.run("shown = get_ipython().run_line_magic('embedllm', 'kv llm')")
    assert notebook.value("type(shown) is type(llm.monitor())")


def test_stop_ends_every_request(notebook: Kernel) -> None:
    notebook.run("slow = embedllm.LLM(ScriptedModel(['word ' * 300], delay=0.01), tokenizer=tokenizer)")
    notebook.run("asked = [slow.submit('x', max_tokens=1000) for _ in range(5)]")
    (said,) = notebook.run("%embedllm stop").of("execute_result")
    assert "2 open LLMs" in said["data"]["text/plain"]
    notebook.run("for one in asked: assert one.wait(5)")
    assert notebook.value("{one._channel.samples[0].finish_reason for one in asked}") == {"cancelled"}
    assert notebook.value("slow.generate('x', max_tokens=4).text") == "word"
    notebook.run("slow.close()\ndel slow")


def test_they_go_when_they_are_unloaded_and_nobody_elses_do(loaded: Kernel) -> None:
    found = "bool(get_ipython().find_magic({!r}, {!r}))"
    names = ", ".join(found.format(*one) for one in (("chat", "cell"), ("generate", "cell"), ("embedllm", "line")))
    loaded.run("%unload_ext embedllm")
    assert loaded.value(names) == (False, False, False)
    loaded.run("%load_ext embedllm")
    loaded.run("get_ipython().register_magic_function(lambda line, cell: 'mine', 'cell', 'chat')")
    loaded.run("%unload_ext embedllm")
    assert loaded.value(names) == (True, False, False)
    loaded.run("del get_ipython().magics_manager.magics['cell']['chat']")
    loaded.run("%load_ext embedllm")
    assert loaded.value(names) == (True, True, True)


def test_importing_registers_nothing() -> None:
    with kernel() as fresh:
        before = fresh.value("[len(v) for v in get_ipython().events.callbacks.values()]")
        fresh.run("import embedllm")
        assert fresh.value("[len(v) for v in get_ipython().events.callbacks.values()]") == before
        assert fresh.value("get_ipython().find_cell_magic('chat')") is None
