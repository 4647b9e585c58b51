"""Checks of arguments that are not tensors, and the one place that expands a user's paths."""

import re
from pathlib import Path

import numpy as np
import pytest

import phi1
from phi1.arguments import check_instance, check_text, check_whole, shown, user_path
from phi1.cli.main import main
from phi1.tokenizer import Tokenizer
from phi1.train.prepare.sources import find_source
from phi1.train.recipe.command_line import parse
from phi1.train.runtime.launch import RunError
from phi1.weights.files import locate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "m").mkdir(parents=True)
    return tmp_path / "home"


@pytest.mark.parametrize(("value", "error", "message"), [
    (5, TypeError, "f: folder must be a path, a str or a pathlib.Path; got 5"),
    (b"x", TypeError, "f: folder must be a path"),
    ("", ValueError, "f: folder must name a file or folder; got an empty path"),
    ("x\0y", ValueError, "f: folder must hold no NUL character; got 'x\\x00y'"),
    ("~nobody-of-that-name/x", ValueError, "f: folder must be ./~"),
])
def test_a_path_that_is_none_is_refused(value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        user_path("f", "folder", value)


def test_the_home_is_expanded_by_every_reader_and_writer_of_paths(home):
    assert user_path("f", "folder", "~/m") == user_path("f", "folder", Path("~/m")) == home / "m"
    assert user_path("f", "folder", "./~") == Path("./~")
    assert locate("~/m") == home / "m"
    phi1.load_tokenizer().save("~/tok")
    assert len(phi1.load_tokenizer("~/tok")) == len(Tokenizer.from_folder("~/tok")) == 50295
    (home / "m" / "a.py").write_text("x = 1\n")
    assert find_source("~/m").name == str(home / "m")
    assert [path.name for path in home.parent.iterdir()] == ["home"]


def test_the_home_is_expanded_in_recipes_and_their_command_line(home):
    (home / "r.toml").write_text('[run]\nfolder = "~/r1"\n[data]\nfolder = "~/d"\n')
    recipe = parse(["--config=~/r.toml", "--data.tokenizer=~/tok", "--model.init", "~/m", "--data.source", "~/m"])
    assert recipe.run.folder == str(home / "r1")
    assert (recipe.data.folder, recipe.data.tokenizer) == (str(home / "d"), str(home / "tok"))
    assert recipe.model.init == recipe.data.source == str(home / "m")
    with pytest.raises(RunError, match=r"run\.folder must be \./~"):
        parse(["--run.folder=~nobody-of-that-name/x"])


@pytest.mark.parametrize("words", [
    ["ledger", "~/none"], ["verify", "~/none"], ["convert", "--model=~/none", "--out=~/o"], ["plan", "--config=~/none"],
    ["prepare", "--source=~/none", "--out=~/o"], ["generate", "--prompt-file=~/none", "--model=~/m"],
    ["humaneval", "--completions=~/none", "--problems=~/none", "--execute"],
])
def test_the_home_is_expanded_by_every_command(home, capsys, words):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    shown = "".join(capsys.readouterr())
    assert f"{home}/none" in shown
    assert list(home.parent.iterdir()) == [home]


def test_no_option_is_a_path_that_is_not_expanded():
    files = [path for folder in ("phi1", "train", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in files if re.search(r"type=(pathlib\.)?Path\b", path.read_text())] == []


def test_messages_show_short_values():
    assert shown(10**30) == "a number of 100 bits"
    assert shown("x" * 1000) == "a str"
    assert shown(np.zeros(3)) == "an array of shape [3]"
    assert shown(object.__new__(Tokenizer)).startswith("<phi1.tokenizer.Tokenizer")
    check_whole("f", low=1, n=np.int64(3))
    with pytest.raises(ValueError, match="f: n must be 1 or more; got 0"):
        check_whole("f", low=1, n=0)
    with pytest.raises(ValueError, match=r"f: text must be valid Unicode text; got '\\ud800', a lone surrogate, at 1"):
        check_text("f", text="a\ud800b")
    with pytest.raises(TypeError, match="f: text must be a str; got 5"):
        check_text("f", text=5)
    with pytest.raises(TypeError, match="f: x must be a list; got None"):
        check_instance("f", "x", None, list, "a list")
