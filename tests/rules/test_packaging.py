"""One wheel holds everything a user needs and nothing else, and it works outside the tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.rules.tree import ROOT, package_folders

pytest.importorskip("hatchling")
pytestmark = pytest.mark.slow

MAX_WHEEL_BYTES = 40_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=100,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {info, *(folder.name for folder in package_folders())}
    for folder in package_folders():
        shipped = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        missing = [path.name for path in shipped if path.relative_to(folder.parent).as_posix() not in names]
        assert not missing
        assert f"{folder.name}/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "test" in name.split("/")[:-1] or name.startswith("tests/")]
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_wheel_has_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "embedllm = embedllm.cli:main" in archive.read(name).decode()


def test_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """Installed in a folder of its own and started from another, `LLM()` generates with the model in the box."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=100)
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import embedllm, embedllm_kernels
assert embedllm.__file__.startswith(sys.argv[1]) and embedllm_kernels.__file__.startswith(sys.argv[1])
with embedllm.LLM() as llm:
    print(len(llm.generate("def add(a, b):", max_tokens=8).tokens))
"""
    run = [sys.executable, "-c", code, site]
    done = subprocess.run(run, cwd=elsewhere, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 8
