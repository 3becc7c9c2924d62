"""What every notebook test runs under: Jupyter's own files in a folder of their own, and a real browser.

Without Chromium or Playwright the tests that need a browser are skipped; with REQUIRE_BROWSER=1 that is a failure.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["JUPYTER_PLATFORM_DIRS"] = "1"  # set before jupyter_core is imported, which warns without it


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("jupyter")
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        os.environ[name] = str(folder / name.lower())


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--mute-audio",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no name leads anywhere
]


def missing(what: str) -> None:
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER=1 and {what}", pytrace=False)
    pytest.skip(f"{what}: NOTHING OF THE LIVE VIEW IS TESTED IN A BROWSER HERE")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as Playwright drives it. Not for longer than a module: while it is there, asyncio.run() fails in this
    thread, and other tests need that."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing("there is no Chromium (Debian: apt-get install -y --no-install-recommends chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("there is no Playwright (pip install playwright)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()
