"""The command line: what it prints, what it refuses and how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import embedllm
from embedllm import cli
from embedllm.cli import harmless, main
from tests.unit.tiny_tokenizers import byte_level

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny llama with a byte-level tokenizer and a chat template. It talks nonsense, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("cli-model")
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.4,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return str(folder)


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# ---- without a model ------------------------------------------------------------------------------------------


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; from embedllm.cli import main\n"
        "for line in (['--version'], ['--help'], ['bench', '--help'], ['generate', '--help']):\n"
        "    try: main(line)\n"
        "    except SystemExit as leaving: assert not leaving.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=path())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"embedllm {embedllm.__version__}\n")


def path() -> dict[str, str]:
    root = Path(embedllm.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "embedllm demo" in capsys.readouterr().out


def test_unknown_option_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["generate", "x", "--no-such-option"])
    assert leaving.value.code == 2


def test_a_refusal_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "-m", "no such/folder at all"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("embedllm generate: there is no folder 'no such/folder at all'")
    assert captured.err.count("\n") == 1


def test_bench_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "mixt"]) == 1
    assert "unknown: 'mixt'" in capsys.readouterr().err
    assert main(["bench", "--against", "hf,vllm"]) == 1
    assert "unknown: 'vllm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("\x1b[2J\x07\x7f", "␛[2J␇␡"),
        ("\x9b31m \u202eabc\u2066", "\ufffd31m \ufffdabc\ufffd"),
        ("été 日本語 👍🏽 \u3000", "été 日本語 👍🏽 \u3000"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    assert harmless(text) == shown


# ---- with a tiny model ----------------------------------------------------------------------------------------


def expected(model: str, prompt: str, **options: object) -> str:
    with embedllm.LLM(model) as llm:
        return llm.generate(prompt, **options).text


def test_generate_streams_the_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "the cat", "-m", model, "--max-tokens", "12", "--stats", "--echo"]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == ("the cat" + expected(model, "the cat", max_tokens=12)).rstrip("\n")
    assert "12 tokens in" in captured.err and "prompt" in captured.err


def test_generate_reads_stdin(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "the mat")
    assert main(["generate", "-", "-m", model, "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected(model, "the mat", max_tokens=5).rstrip("\n")


def test_generate_many_as_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "one", "two", "-m", model, "--max-tokens", "4", "--ignore-eos", "-n", "2", "--temperature", "1"]
    assert main([*line, "--seed", "1", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["prompt"] for one in found] == ["one", "two"]
    assert [len(output["tokens"]) for one in found for output in one["outputs"]] == [4, 4, 4, 4]
    assert found[0]["usage"]["completion_tokens"] == 8
    assert main([*line, "--seed", "1"]) == 0
    assert "sample 2 of 2" in capsys.readouterr().out


def test_sampling_options_are_checked_before_the_model_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "-m", "nowhere/at-all", "--temperature", "-1"]) == 1
    assert "temperature=-1.0 is out of range" in capsys.readouterr().err


def test_chat_is_a_conversation(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, str]]] = []
    stream = embedllm.LLM.stream

    def spy(self: embedllm.LLM, messages: list[dict[str, str]], *args: object) -> object:
        asked.append([dict(message) for message in messages])
        return stream(self, messages, *args)

    monkeypatch.setattr(embedllm.LLM, "stream", spy)
    feed(monkeypatch, "hello\nagain\n/help\n/what\n\n/reset\nnew\n/exit\nnever\n")
    assert main(["chat", "-m", model, "--system", "Be brief.", "--max-tokens", "4"]) == 0
    roles = [[message["role"] for message in messages] for messages in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert [messages[-1]["content"] for messages in asked] == ["hello", "again", "new"]
    out = capsys.readouterr().out
    assert "/reset  forget the conversation" in out and "no command /what" in out


def test_chat_goes_on_after_a_turn_that_does_not_fit(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, f"{'x ' * 400}\nhello\n")
    assert main(["chat", "-m", model, "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "max_model_len=256" in captured.err and "/reset" in captured.err
    assert captured.out.strip()


def test_an_interrupted_answer_stays_in_the_conversation(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[dict[str, str]] = []
    count = 0

    def visible(text: str, file: object) -> str:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(cli, "visible", visible)
    with embedllm.LLM(model) as llm:
        cli._answer(llm, messages, "hello", embedllm.SamplingParams(max_tokens=200, ignore_eos=True))
        assert [message["role"] for message in messages] == ["user", "assistant"]
        deadline = time.monotonic() + 5
        while llm.stats().num_requests_running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert llm.stats().num_requests_running == 0


def test_plan_prints_sizes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model]) == 0
    assert "weights" in capsys.readouterr().out


def test_interrupt_ends_quietly(model: str) -> None:
    line = [sys.executable, "-m", "embedllm", "generate", "the cat", "-m", model, "--max-tokens", "250", "--ignore-eos"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=path())
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, cli.INTERRUPTED)  # 0 where it was done before the signal came
    assert err == ""


def test_a_closed_pipe_ends_quietly(model: str) -> None:
    line = [sys.executable, "-m", "embedllm", "generate", "the cat", "-m", model, "--max-tokens", "200", "--ignore-eos"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=path()) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == cli.BROKEN_PIPE
    assert err == ""


# ---- the demo -------------------------------------------------------------------------------------------------


def test_demo_prints_answers_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0  # the output is no terminal, so nothing is drawn
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for name in ("length", "queue", "chat", "tool call", "sample 3/3", "pop"):
        assert f"\n{name}  " in out
    figures = {line[2:15].strip(): line[16:] for line in out.split("────\n")[-1].splitlines() if line.startswith("  ")}
    assert figures["requests"] == "10 with 12 samples, up to 8 at once"
    assert figures.keys() >= {"speed", "first token", "KV waste", "prefix hits", "preemptions"}
    assert int(figures["prefix hits"].split()[0]) > 0
    assert 0 < float(figures["KV waste"].split("%")[0]) < 50


def test_demo_draws_over_one_region_and_takes_it_away() -> None:
    from embedllm.demo.show import Paper, show

    file = io.StringIO()
    with embedllm.LLM(num_kv_blocks=156, block_size=8, max_num_seqs=8, progress=False) as llm:
        show(llm, Paper(file, 79, colour=False), live=True)
    drawn, _, rest = file.getvalue().rpartition("\x1b[?25h")
    assert drawn.startswith("\x1b[?25l") and "\x1b" not in rest
    frames = drawn.split("F")[:-1]
    assert len(frames) >= 2
    for line in drawn.replace("\x1b[K", "").split("\n"):
        assert len(line.split("F")[-1]) <= 79
