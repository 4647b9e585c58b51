"""A corpus that replaces another: files of the user, signals, kills and other processes between the renames."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from training_runs import folder_content

from phi1.tokenizer import train_bpe
from phi1.tokenizer_rules import MIN_VOCAB
from phi1.train.commands.prepare import main
from phi1.train.data.corpus import open_corpus
from phi1.train.data.shards import DataError
from phi1.train.prepare import prepare as prepare_module
from phi1.train.prepare.prepare import prepare

BYTES = train_bpe([], MIN_VOCAB)
"""The smallest tokenizer, which loads at once."""


def test_a_file_that_comes_while_a_corpus_is_made_anew_stays(code, tmp_path):
    out = tmp_path / "out"
    prepare(str(code / "json"), out, tokenizer=BYTES)
    held = folder_content(out)

    def report(line):
        (out / "thesis.tex").write_text("years of work")

    with pytest.raises(DataError, match=f"^{out}: it holds thesis.tex, which is no part of a corpus"):
        prepare(str(code / "email"), out, tokenizer=BYTES, force=True, report=report)
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    assert folder_content(out) == held
    assert os.listdir(tmp_path) == ["out"]


def after_rename(monkeypatch, target, act):
    """Call `act` when a folder has been renamed to `target`."""
    def rename(source, to, rename=os.rename):
        rename(source, to)
        if os.path.basename(to) == target:
            act()

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize(("after", "said"), [("old", "nothing was written"), ("out", "out is complete")])
def test_stopped_between_the_renames_it_says_which_corpus_is_there(code, tmp_path, monkeypatch, capsys, after,
                                                                        said):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    old = prepare(str(code / "json"), "out", tokenizer=BYTES).fingerprint
    after_rename(monkeypatch, after, stop)
    assert main(["--source", str(code / "email"), "--out", "out", "--force"]) == 130
    assert capsys.readouterr().err == f"phi1 prepare: stopped; {said}\n"
    assert (open_corpus("out").fingerprint == old) == (after == "old")
    assert os.listdir() == ["out"]


def test_a_corpus_that_takes_the_name_at_the_last_moment_is_replaced_too(code, tmp_path, monkeypatch):
    """No lock keeps the two processes apart."""
    out, taken = tmp_path / "out", []

    def take():
        if not taken:
            taken.append(out.mkdir())
            (out / "manifest.json").write_text("of another")

    prepare(str(code / "json"), out, tokenizer=BYTES)
    after_rename(monkeypatch, "old", take)
    made = prepare(str(code / "email"), out, tokenizer=BYTES, force=True)
    assert taken
    assert open_corpus(out).fingerprint == made.fingerprint
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("module", "function", "then"), [
    (os, "listdir", "other"), (os, "listdir", "aside"), (prepare_module, "read_manifest", "other")])
def test_a_corpus_moved_aside_while_it_is_read_is_read_again(code, tmp_path, monkeypatch, module, function,
                                                                       then):
    """The same holds if another corpus follows it, and if it is put back."""
    out, looked, look = tmp_path / "out", [], getattr(module, function)
    for name, source in (("out", "json"), ("other", "email")):
        prepare(str(code / source), tmp_path / name, tokenizer=BYTES)

    def moved_aside(path):
        if looked or Path(path) != out:
            return look(path)
        looked.append(out.rename(tmp_path / "aside"))
        try:
            return look(path)
        finally:
            (tmp_path / then).rename(out)

    monkeypatch.setattr(module, function, moved_aside)
    assert prepare(str(code / ("email" if then == "other" else "json")), out, tokenizer=BYTES).already_done
    assert looked


def test_the_summary_describes_the_corpus_that_was_made(code, tmp_path, monkeypatch):
    out = tmp_path / "out"
    expected = prepare(str(code / "json"), out, tokenizer=BYTES)
    after_rename(monkeypatch, "out", lambda: shutil.rmtree(out))
    made = prepare(str(code / "json"), out, tokenizer=BYTES, force=True)
    assert (made.fingerprint, made.splits) == (expected.fingerprint, expected.splits)


def test_killed_between_the_renames_it_leaves_the_old_corpus_to_the_next_process(code, tmp_path):
    out, left = tmp_path / "out", tmp_path / ".out.0123abcd.tmp"
    old = prepare(str(code / "json"), out, tokenizer=BYTES).fingerprint
    (left / "new").mkdir(parents=True)
    out.rename(left / "old")
    with pytest.raises(DataError, match="another corpus is there"):
        prepare(str(code / "email"), out, tokenizer=BYTES)
    assert open_corpus(out).fingerprint == old
    assert os.listdir(tmp_path) == ["out"]
