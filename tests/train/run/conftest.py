"""A place to run in for the tests of starts."""

import pytest


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a source in src/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in "ab":
        (tmp_path / "src" / f"{name}.py").write_text(f"{name} = 1\n")
    return tmp_path
