"""A request shown in a notebook: live, at most ten times a second, with its numbers, and harmless whatever it says."""

import json
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import ipykernel
import pytest

from tests.notebook.kernels import Kernel, Ran, kernel

LIVE = not ipykernel.__version__.startswith("7.0.")  # there, nothing that another thread sends arrives
ANSWER = "# Title\n\nSome **bold** text, `code`, and a list:\n\n- one\n- two\n\n" + "and more of it " * 8
HOSTILE = (
    "<img src=https://evil.example/a.png> ![x](https://evil.example/b.png) [y](javascript:alert(1)) $x^2$ \\(y\\) "
    "<script>alert(1)</script> https://evil.example/c **fine**\n\n```\n</code><img src=d>\n```\n"
)
SETUP = f"""
import asyncio, gc, threading, time, weakref, embedllm, ipykernel
from embedllm.testing import ScriptedModel, ByteTokenizer
user = [{{"role": "user", "content": "hi"}}]

def opened(text, delay=0.004, **options):
    return embedllm.LLM(ScriptedModel([text], delay=delay, **options), tokenizer=ByteTokenizer())

llm, hostile = opened({ANSWER!r}), opened({HOSTILE!r}, 0.001)
endless = opened("word " * 10_000, 0.01, max_model_len=60_000)
broken = opened("abcdefgh", fail_at=range(3, 99))
ask = dict(max_tokens=None)
"""


@pytest.fixture(scope="module")
def notebook() -> Iterator[Kernel]:
    with kernel() as running:
        running.run(SETUP)
        yield running


WIDGET = "application/vnd.jupyter.widget-view+json"


def drawings(messages: Ran | list[dict[str, Any]], ended: bool = True) -> list[dict[str, Any]]:
    """Everything shown but Stop buttons, of which none is left once all has `ended`."""
    found = messages.messages if isinstance(messages, Ran) else messages
    shown = [m for m in found if m["msg_type"] in ("display_data", "update_display_data", "execute_result")]
    places: dict[str, list[dict[str, Any]]] = {}
    for message in shown:
        places.setdefault(message["content"].get("transient", {}).get("display_id", ""), []).append(message)
    buttons = [place for place in places.values() if WIDGET in place[0]["content"]["data"]]
    assert all(bool(button[-1]["content"]["data"]) is not ended for button in buttons)
    return [message for message in shown if not any(message in button for button in buttons)]


def pictures(messages: Ran | list[dict[str, Any]], ended: bool = True) -> list[dict[str, str]]:
    """What was shown in one place, drawing by drawing."""
    shown = drawings(messages, ended)
    assert [m["msg_type"] for m in shown] == ["display_data"] + ["update_display_data"] * (len(shown) - 1)
    assert len({m["content"]["transient"]["display_id"] for m in shown}) == 1
    return [m["content"]["data"] for m in shown]


def test_the_kernel_is_the_one_meant(notebook: Kernel) -> None:
    assert notebook.value("ipykernel.__version__") == ipykernel.__version__


def test_a_stream_is_shown_while_its_cell_runs(notebook: Kernel) -> None:
    began = time.monotonic()
    ran = notebook.run("llm.stream(user, **ask)")
    seconds = ran.ended - began
    drawn = pictures(ran)
    assert 4 <= len(drawn) <= 10 * seconds + 2
    assert len({picture["text/html"] for picture in drawn}) == len(drawn), "something was drawn twice"
    assert "running" in drawn[1]["text/html"] and "tokens/s" in drawn[-2]["text/html"]
    last = drawn[-1]
    assert "<h1>Title</h1><p>Some <strong>bold</strong> text, <code>code</code>" in last["text/html"]
    assert "<ul><li>one</li><li>two</li></ul>" in last["text/html"]
    assert last["text/markdown"].startswith("# Title\n\nSome **bold** text")
    for said in (" tokens · stop · ", " tokens/s · first token after 0.", "prompt tokens cached"):
        assert said in last["text/html"] and said in last["text/plain"]
    assert not ran.of("stream", "execute_result", "error")
    assert notebook.value("_.result().text") == ANSWER  # the value of the cell, as of any other


def test_text_that_goes_on_is_shown_as_it_is(notebook: Kernel) -> None:
    """A prompt that is no conversation is not answered in Markdown: in code, every space and star counts."""
    last = pictures(notebook.run("llm.stream('hi', **ask)"))[-1]
    assert "**bold** text, `code`, and a list:\n\n- one" in last["text/html"] and "<pre" in last["text/html"]
    assert last["text/markdown"].startswith("```\n# Title")


def test_every_sample_is_shown(notebook: Kernel) -> None:
    last = pictures(notebook.run("llm.stream(user, n=2, **ask)"))[-1]
    assert last["text/html"].count("<h1>Title</h1>") == 2 and "sample 1 · " in last["text/html"]


def test_stop_ends_what_is_shown(notebook: Kernel) -> None:
    number = notebook.start("endless.stream(user, **ask)")
    time.sleep(0.6)
    notebook.stop()
    ran = notebook.finish(number)
    assert ran.error == "KeyboardInterrupt"
    assert "cancelled" in pictures(ran)[-1]["text/html"]
    assert notebook.value("endless.stats().num_requests_running") == 0


def test_a_failure_is_shown(notebook: Kernel) -> None:
    last = pictures(notebook.run("broken.stream('hi', **ask)"))[-1]
    assert "failed" in last["text/html"] and "running" not in last["text/html"]


IN_THREADS = ["background = llm.submit(user, **ask)\nbackground", "await asyncio.sleep(0)\nllm.stream(user, **ask)"]


@pytest.mark.parametrize("cell", IN_THREADS)
def test_what_cannot_be_stopped_here_is_followed_from_a_thread(notebook: Kernel, cell: str) -> None:
    """A background request; and a foreground one in a cell that awaits, where Stop would come after the display."""
    ran = notebook.run(cell)
    assert len(pictures(ran, ended=False)) == 1
    if not LIVE:
        assert "pip install -U 'ipykernel&gt;=7.1'" in pictures(ran)[0]["text/html"].replace("&#x27;", "'")
        assert notebook.value("_.result(30).text") == ANSWER
        return
    drawn = pictures([*ran.messages, *notebook.shown(seconds=1.0)])
    assert len(drawn) >= 3
    assert "<li>two</li>" in drawn[-1]["text/html"] and " tokens · stop · " in drawn[-1]["text/html"]
    assert notebook.value("[t.name for t in threading.enumerate() if t.name == 'embedllm-display']") == []


@pytest.mark.skipif(not LIVE, reason="nothing is drawn from threads there")
def test_what_is_shown_is_not_kept(notebook: Kernel) -> None:
    """The thread that draws is no reason for a request to go on."""
    ran = notebook.run("g = endless.submit(user, **ask)\ndisplay(g)\ntime.sleep(0.3)\ndel g")
    drawn = pictures([*ran.messages, *notebook.shown(seconds=1.0)])
    assert notebook.value("endless.stats().num_requests_running") == 0
    assert "tokens · " in drawn[-1]["text/html"]


def test_a_finished_request_is_shown_once(notebook: Kernel) -> None:
    drawn = pictures(notebook.run("done = llm.submit(user, **ask)\ndone.wait()\ndone"))
    assert len(drawn) == 1 and "tokens · stop" in drawn[0]["text/html"] and "not live" not in drawn[0]["text/html"]


def test_a_completion_is_one_line_of_text_and_a_page_with_numbers(notebook: Kernel) -> None:
    (result,) = notebook.run("llm.generate('hi', **ask)").of("execute_result")
    assert "\n" not in result["data"]["text/plain"] and result["data"]["text/plain"].startswith("<Completion '# Title")
    assert "tokens · stop · " in result["data"]["text/html"] and "prompt tokens cached" in result["data"]["text/html"]
    assert "```" in result["data"]["text/markdown"]


# ---- hostile answers --------------------------------------------------------------------------------------------

OURS = {"div", "p", "pre", "code", "span", "strong"}


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(attributes)))


def assert_safe(html: str) -> None:
    for tag, attributes in Page(html).found:
        assert tag in OURS and all(name == "style" and "url" not in (value or "") for name, value in attributes)


CALLS = ["hostile.stream(user, **ask)", "hostile.stream('hi', **ask)", "hostile.generate('hi', **ask)"]


@pytest.mark.parametrize("call", CALLS)
def test_a_hostile_answer_is_text_live_and_at_the_end(notebook: Kernel, call: str) -> None:
    ran = notebook.run(call)
    shown = [message["content"]["data"] for message in drawings(ran)]
    assert shown and "evil.example/c" in shown[-1]["text/html"]
    for data in shown:
        assert set(data) == {"text/plain", "text/markdown", "text/html"}
        assert_safe(data["text/html"])


@pytest.mark.parametrize("preferred", ["text/html", "text/markdown"])
def test_a_hostile_answer_is_text_when_it_is_exported(notebook: Kernel, preferred: str) -> None:
    nbformat, exporters = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert.exporters")
    data = pictures(notebook.run("hostile.stream(user, **ask)"))[-1]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x")])
    book.cells[0].outputs = [nbformat.v4.new_output("display_data", {preferred: data[preferred]})]
    page, _ = exporters.HTMLExporter(template_name="basic").from_notebook_node(book)
    found = Page(page).found
    assert "evil.example/c" in page and "<strong>fine</strong>" in page
    assert "evil" not in json.dumps(found) and not {"img", "a", "script"} & {tag for tag, _ in found}
