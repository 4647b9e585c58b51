"""Real source files for the tests of tokenizers."""

import sysconfig
from pathlib import Path

import pytest

SAMPLE = ["json/decoder.py", "tokenize.py", "asyncio/base_events.py", "this.py", "turtle.py", "encodings/cp1252.py"]


@pytest.fixture(scope="session")
def source_files() -> list[str]:
    return [Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8") for name in SAMPLE]
