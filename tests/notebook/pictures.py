"""Makes the pictures of the docs: `python -m tests.notebook.pictures docs/pictures`, from a checkout.

The live view in JupyterLab, light and dark, in the middle of sixteen requests.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.notebook.lab import Lab, opened

CELLS = [
    """\
import embedllm
llm = embedllm.LLM(num_kv_blocks=72, max_num_seqs=8, progress=False)
monitor = llm.monitor()
monitor""",
    """\
prompts = [f"# Small helpers.\\nimport os\\nimport sys\\n\\ndef function_{n % 3}(" * 2 for n in range(16)]
llm.generate(prompts[0], max_tokens=1)
asked = [llm.submit(p, max_tokens=60 + 9 * n, n=1 + (n % 5 == 1), ignore_eos=True) for n, p in enumerate(prompts)]
done = [request.result() for request in asked]""",
]
LIVELY = """() => {
  const state = document.querySelector(".ekv").moment();
  return state && [...state.seqs.values()].filter((sequence) => sequence.blocks.length > 4).length > 6;
}"""


def picture(browser: Any, lab: Lab, theme: str, folder: Path) -> None:
    with opened(browser, lab, f"{theme}.ipynb", CELLS) as notebook:
        page = notebook.page
        name = "JupyterLab Dark" if theme == "dark" else "JupyterLab Light"
        page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", name)
        page.evaluate("() => jupyterapp.commands.execute('application:toggle-left-area')")
        page.set_viewport_size({"width": 1_420, "height": 1_400})
        notebook.wait_idle()
        notebook.run_all()
        page.wait_for_selector(".ekv [aria-label='Pool of KV blocks']")
        page.evaluate("() => document.querySelector('.ekv').scrollIntoView()")
        page.wait_for_function(LIVELY, timeout=60_000)
        page.locator(".ekv").focus()
        page.keyboard.press("Space")  # the view stands still, the engine goes on
        page.wait_for_timeout(300)
        page.locator(".ekv").screenshot(path=str(folder / f"monitor-{theme}.png"))


def main(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    from tests.notebook.conftest import BROWSERS, FLAGS, shutil

    folder.mkdir(parents=True, exist_ok=True)
    path = next(filter(None, map(shutil.which, BROWSERS)))
    lab = Lab(Path(tempfile.mkdtemp()))
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
            for theme in ("light", "dark"):
                picture(browser, lab, theme, folder)
            browser.close()
    finally:
        lab.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
