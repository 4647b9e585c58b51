"""Pages link to files and headings that exist, and name options that the commands have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from phi1.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")
COMMAND = re.compile(r"\bphi1 ((?:bench )?[a-z]+)([^`#\n]*)")
KEY = re.compile(r"--(?:model|data|train|checkpoint|eval|run)\.[a-z_]+")
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page, with this text, to files or headings that are not there."""
    broken = []
    for path, anchor in LINK.findall(text):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    text = "[a](LICENSE) [b](docs/missing.md) [c](docs/training.md#faults) [d](docs/training.md#nothing) [e](https://x.y/z)"
    assert broken_links(ROOT / "README.md", text) == ["docs/missing.md", "docs/training.md#nothing"]


def manuals() -> dict[Path, str]:
    """Pages that tell what to type now, with each command on one line."""
    return {page: page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES
            if page.name != "CHANGELOG.md"}


def test_options_of_commands_exist(capsys):
    helps: dict[str, str] = {}
    for page, text in manuals().items():
        for words, options in COMMAND.findall(text):
            command = words if words.startswith("bench ") else words.split()[0]
            named = re.findall(r"(?<!\S)--[a-z][a-z-]*(?![\w.])", options)
            if command.split()[0] not in COMMANDS or not named:
                continue
            if command not in helps:
                with pytest.raises(SystemExit):
                    main([*command.split(), "--help"])
                helps[command] = capsys.readouterr().out
            assert [option for option in named if option not in helps[command]] == [], f"{page}: phi1 {command}"
    assert len(helps) >= 9


def test_keys_of_recipes_exist():
    script = ROOT / "train" / "pretrain.py"
    known = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
    named = {key for text in manuals().values() for key in KEY.findall(text)}
    assert len(named) >= 15
    assert named - set(KEY.findall(known)) == set()
