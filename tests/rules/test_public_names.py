"""The public names: sorted, real, documented, and no more than the documentation promises."""

import inspect
from pathlib import Path

import pytest

from tests.rules.tree import PUBLIC_MODULES, ROOT, modules


def docs() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_all_is_sorted_and_real() -> None:
    import embedllm

    assert list(embedllm.__all__) == sorted(set(embedllm.__all__))
    missing = [name for name in embedllm.__all__ if not hasattr(embedllm, name)]
    assert not missing
    assert set(embedllm.__all__) <= set(dir(embedllm))


def test_every_public_name_has_a_docstring() -> None:
    import embedllm

    objects = {name: getattr(embedllm, name) for name in embedllm.__all__ if not name.startswith("__")}
    bare = [name for name, value in objects.items() if not inspect.getdoc(value) and not isinstance(value, str)]
    assert not bare


def test_every_public_name_is_in_the_docs() -> None:
    import embedllm

    text = "\n".join(path.read_text(encoding="utf-8") for path in docs())
    unmentioned = [name for name in embedllm.__all__ if not name.startswith("__") and name not in text]
    assert not unmentioned


def test_errors_page_names_the_whole_tree() -> None:
    errors = pytest.importorskip("embedllm.errors")
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    own = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__ and not name.startswith("_")
    ]
    assert own
    assert not [name for name in own if f"`{name}`" not in page]
    assert not [name for name in own if name not in (errors.__doc__ or "")], (
        "the tree in the module docstring is behind"
    )


def test_public_modules_exist() -> None:
    present = {name for name in PUBLIC_MODULES if f"embedllm.{name}" in modules()}
    import embedllm

    assert present <= set(dir(embedllm)) | {"testing"}


def test_version_is_said_once() -> None:
    import embedllm

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{embedllm.__version__}"\n' in text
    assert f"## [{embedllm.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
