"""`phi1 prepare` on real files and in real processes: what goes in, what is left out, and what may go wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from phi1.tokenizer import EOS, MIN_VOCAB, load_tokenizer, train_bpe
from phi1.train import prepare as prepare_module
from phi1.train.data import open_corpus
from phi1.train.prepare import main, prepare
from phi1.train.selection import Selection
from phi1.train.shards import DataError
from phi1.train.sources import content_hash, find_source, gather

STDLIB = Path(sysconfig.get_path("stdlib"))
SMALL = ("json", "asyncio", "email")  # 0.8 MB of real code
BYTES = train_bpe([], MIN_VOCAB)
"""The smallest tokenizer, which loads at once, for tests in which any will do."""
COMMAND = [sys.executable, "-P", prepare_module.__file__]


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for name in SMALL:
        shutil.copytree(STDLIB / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts_of(folder: Path) -> dict[str, list[bytes]]:
    """The documents of a corpus, decoded again."""
    found = {}
    for split in ("train", "val"):
        corpus = open_corpus(folder, split)
        tokenizer = corpus.load_tokenizer()
        found[split] = [tokenizer.decode_bytes(corpus.document(i)) for i in range(len(corpus.documents))]
    return found


def folder_content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


def test_every_document_comes_back(code, tmp_path):
    summary = prepare(str(code), tmp_path / "out", tokenizer="train", vocab_size=600, val_fraction=0.2)
    files = {path.read_bytes() for path in code.rglob("*.py")} - {b""}
    texts = texts_of(tmp_path / "out")
    assert {*texts["train"], *texts["val"]} == files
    assert len(texts["train"]) + len(texts["val"]) == len(files) == summary.documents
    assert 0.05 * len(files) < len(texts["val"]) < 0.4 * len(files)
    for split in ("train", "val"):
        corpus = open_corpus(tmp_path / "out", split)
        assert corpus.vocab_size == 600
        assert corpus.n_bytes == sum(map(len, texts[split])) == summary.splits[split]["bytes"]
        assert corpus.n_tokens == summary.splits[split]["tokens"]
        assert corpus.fingerprint == summary.fingerprint
        stream = corpus.rows(np.array([0]), corpus.n_tokens - 1)[0]
        assert (stream == corpus.eos_id).sum() == len(texts[split])
        assert stream[-1] == corpus.eos_id
        assert [bytes(one["hash"]) for one in corpus.documents] == [content_hash(text) for text in texts[split]]
    # In the order of the paths for training, of the hashes for validation.
    paths = sorted(code.rglob("*.py"), key=lambda path: path.relative_to(code).as_posix())
    order = [path.read_bytes() for path in paths]
    assert texts["train"] == [text for text in dict.fromkeys(order) if text in set(texts["train"])]
    assert texts["val"] == sorted(texts["val"], key=content_hash)


def test_the_same_bytes_for_any_number_of_workers(code, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 20_000)  # 40 chunks, so that workers overtake one another
    for workers in (1, 2, 3):
        prepare(str(code), tmp_path / str(workers), tokenizer="train", vocab_size=500, workers=workers)
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 1 << 20)
    prepare(str(code), tmp_path / "whole", tokenizer="train", vocab_size=500)
    one = folder_content(tmp_path / "1")
    assert set(one) == {"manifest.json", "train-00000.bin", "val-00000.bin", "train-documents.npy", "val-documents.npy",
                        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    for other in ("2", "3", "whole"):
        assert folder_content(tmp_path / other) == one


@pytest.mark.alone
def test_one_core_tokenises_fast_enough(code, tmp_path):
    sources = [str(code), str(STDLIB / "unittest"), str(STDLIB / "multiprocessing"), str(STDLIB / "idlelib")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = prepare(sources, tmp_path / "out", workers=1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # the worker's start is part of it
    assert summary.tokens > 500_000
    assert summary.tokens / seconds > 0.25e6  # 0.45e6 measured


def test_shards_are_cut_where_asked(code, tmp_path):
    prepare(str(code / "json"), tmp_path / "out", tokenizer=BYTES, shard_tokens=1 << 12)
    corpus = open_corpus(tmp_path / "out", "train")
    assert len(corpus.shards) == -(-corpus.n_tokens // (1 << 12)) > 2


def test_what_is_left_out_is_counted(tmp_path, capsys):
    source = write_files(tmp_path / "src", {
        "a.py": "x = 1\n", "b/same.py": "x = 1\n", "c.py": "y = 'é'\r\n", "latin.py": "z = 'é'".encode("latin-1"),
        "empty.py": "", "notes.txt": "no", ".git/hook.py": "h = 1", "z.py": "\ufeffbom = 1\n",
    })
    (source / "gone.py").symlink_to(tmp_path / "nowhere.py")
    os.mkfifo(source / "pipe.py")  # opening it would wait for ever
    (source / "b" / "loop").symlink_to(source)
    summary = prepare(str(source), tmp_path / "out", tokenizer="train", vocab_size=300, val_fraction=0)
    assert summary.skipped == {"duplicate": 1, "empty": 1, "not UTF-8": 1}
    assert texts_of(tmp_path / "out") == {"train": [b"x = 1\n", "y = 'é'\r\n".encode(), "\ufeffbom = 1\n".encode()],
                                          "val": []}
    assert str(summary).count("skipped: 1 duplicate, 1 empty, 1 not UTF-8") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_counted(tmp_path):
    source = write_files(tmp_path / "src", {"a.py": "x = 1\n", "b.py": "y = 1\n"})
    (source / "b.py").chmod(0)
    assert prepare(str(source), tmp_path / "out", tokenizer=BYTES).skipped == {"unreadable": 1}


def test_the_end_token_written_in_a_file_is_text(tmp_path):
    source = write_files(tmp_path / "src", {"a.py": f"end = '{EOS}'\n", "b.py": "b = 2\n"})
    for tokenizer in ("microsoft/phi-1", "train"):
        prepare(str(source), tmp_path / "out", tokenizer=tokenizer, vocab_size=300, val_fraction=0, force=True)
        corpus = open_corpus(tmp_path / "out", "train")
        assert (corpus.rows(np.array([0]), corpus.n_tokens - 1) == corpus.eos_id).sum() == 2
        assert texts_of(tmp_path / "out")["train"] == [f"end = '{EOS}'\n".encode(), b"b = 2\n"]


def test_a_document_keeps_its_side_when_others_come(code, tmp_path):
    some = [str(code / "json"), str(code / "email")]
    prepare(some, tmp_path / "some", tokenizer=BYTES, val_fraction=0.3)
    prepare([*some, str(code / "asyncio")], tmp_path / "all", tokenizer=BYTES, val_fraction=0.3)
    some_texts, all_texts = texts_of(tmp_path / "some"), texts_of(tmp_path / "all")
    for split in ("train", "val"):
        assert set(some_texts[split]) < set(all_texts[split])
    assert not set(all_texts["train"]) & set(all_texts["val"])


def test_two_documents_are_enough_for_both_splits(tmp_path):
    for i in range(6):
        source = write_files(tmp_path / f"src{i}", {"a.py": f"a = {i}\n", "b.py": f"b = {i}\n"})
        documents = gather([find_source(str(source))], "text", tmp_path / "cache")
        for fraction in (0.001, 0.999):
            rows = Selection(documents, fraction, {}).rows
            assert {split: len(rows[split]) for split in rows} == {"train": 1, "val": 1}
    one = write_files(tmp_path / "one", {"a.py": "a"})
    prepare(str(one), tmp_path / "out", tokenizer=BYTES, val_fraction=0.9)
    assert texts_of(tmp_path / "out") == {"train": [b"a"], "val": []}


def test_the_bpe_never_sees_validation_text(code, tmp_path):
    prepare(str(code), tmp_path / "a", tokenizer="train", vocab_size=700, val_fraction=0.3)
    held_out = set(texts_of(tmp_path / "a")["val"])
    for path in code.rglob("*.py"):
        if path.read_bytes() not in held_out:
            target = tmp_path / "seen" / path.relative_to(code)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    prepare(str(tmp_path / "seen"), tmp_path / "b", tokenizer="train", vocab_size=700, val_fraction=0)
    assert open_corpus(tmp_path / "a").load_tokenizer().fingerprint == \
        open_corpus(tmp_path / "b").load_tokenizer().fingerprint


def test_a_changed_file_is_read_again(tmp_path):
    source = write_files(tmp_path / "src", {"a.py": "a = 1\n", "b.py": "b = 1\n"})
    first = prepare(str(source), tmp_path / "first", tokenizer=BYTES, val_fraction=0)
    stamp = (source / "b.py").stat()
    (source / "b.py").write_text("b = 2\n")
    os.utime(source / "b.py", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time
    second = prepare(str(source), tmp_path / "second", tokenizer=BYTES, val_fraction=0)
    assert texts_of(tmp_path / "second")["train"] == [b"a = 1\n", b"b = 2\n"]
    assert first.fingerprint != second.fingerprint
    with pytest.raises(DataError, match="another corpus is there"):
        prepare(str(source), tmp_path / "first", tokenizer=BYTES, val_fraction=0)


def test_datasets_cache_is_not_stale(tmp_path):
    """The same cache folder twice: what `datasets` finds in it must not be served for a changed file."""
    source = write_files(tmp_path / "src", {"a.py": "a = 1\n"})
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (source / "a.py").write_text(text)
        assert gather([find_source(str(source))], "text", tmp_path / "cache")["text"][:] == [text]


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    source = write_files(tmp_path / "src", {"a.py": "a = 1\n", "b.jsonl": '{"text": "b"}\n'})
    for name in ("", "b.jsonl"):
        found = find_source(str(source / name))
        (source / (name or "a.py")).write_text('{"text": "c"}\n')
        with pytest.raises(datasets.exceptions.DatasetGenerationError) as error:
            gather([found], "text", tmp_path / "cache")
        assert "it changed while it was read" in str(error.value.__cause__)


def test_a_file_that_cannot_be_read_any_more_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    source = write_files(tmp_path / "src", {"a.py": "a = 1\n", "b.py": "b = 2\n"})
    found = find_source(str(source))
    (source / "b.py").unlink()
    monkeypatch.setattr(prepare_module, "find_source", lambda *_: found)
    assert main(["--source", str(source), "--out", str(tmp_path / "out"), "--tokenizer", "train"]) == 2
    error = capsys.readouterr().err
    assert error == f"phi1 prepare: error: {source / 'b.py'}: cannot be read: No such file or directory\n"
    assert os.listdir(tmp_path) == ["src"]


def test_json_lines(tmp_path):
    lines = ['{"text": "a = 1"}', "", '{"id": 3, "text": "b = \\u00e9"}', '{"text": ""}', '{"text": null}',
             '{"text": "\\ud800"}', '{"text": "a = 1"}']
    path = tmp_path / "code.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    summary = prepare(str(path), tmp_path / "out", tokenizer=BYTES, val_fraction=0)
    assert texts_of(tmp_path / "out")["train"] == [b"a = 1", "b = é".encode()]
    assert summary.skipped == {"duplicate": 1, "empty": 2, "not UTF-8": 2}


def test_a_hub_dataset(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_dict({"content": ["a = 1", "b = 2", None], "id": [1, 2, 3]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or rows)
    summary = prepare("owner/name:python", tmp_path / "out", tokenizer=BYTES, column="content", val_fraction=0)
    assert asked == [(("owner/name", "python"), {"split": "train"})]
    assert texts_of(tmp_path / "out")["train"] == [b"a = 1", b"b = 2"]
    assert summary.skipped == {"empty": 1}
    with pytest.raises(DataError, match="source owner/name: it has no column 'text'; its columns are content, id"):
        prepare("owner/name", tmp_path / "other")


def test_a_second_run_finds_it_done(code, tmp_path, monkeypatch):
    first = prepare(str(code / "json"), tmp_path / "out", tokenizer=BYTES)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    moved = shutil.copytree(code / "json", tmp_path / "moved")
    monkeypatch.setattr(prepare_module, "gather", None)  # nothing is read twice
    for source in (str(code / "json"), str(moved)):
        again = prepare(source, tmp_path / "out", tokenizer=BYTES)
        assert again.already_done
        assert (again.fingerprint, again.tokens, again.skipped) == (first.fingerprint, first.tokens, first.skipped)
        assert str(again).startswith("already prepared")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_another_corpus_is_replaced_only_with_force(code, tmp_path):
    out = tmp_path / "out"
    prepare(str(code / "json"), out, tokenizer=BYTES)
    held = folder_content(out)
    for change in ({"val_fraction": 0.5}, {"tokenizer": "train", "vocab_size": 300}, {"shard_tokens": 1 << 12}):
        with pytest.raises(DataError, match=f"^{out}: another corpus is there .made from {code / 'json'}, .*--force"):
            prepare(str(code / "json"), out, **{"tokenizer": BYTES, **change})
    assert folder_content(out) == held
    assert prepare(str(code / "email"), out, tokenizer=BYTES, force=True).fingerprint == open_corpus(out).fingerprint
    assert folder_content(out) != held
    assert os.listdir(tmp_path) == ["out"]


def test_a_damaged_corpus_is_not_called_done(code, tmp_path):
    out = tmp_path / "out"
    prepare(str(code / "json"), out, tokenizer=BYTES)
    content = bytearray((out / "val-00000.bin").read_bytes())
    content[-1] ^= 1
    (out / "val-00000.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"val-00000.bin: damaged.*--force replaces it"):
        prepare(str(code / "json"), out, tokenizer=BYTES)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"unfinished or damaged corpus is there; --force replaces it"):
        prepare(str(code / "json"), out, tokenizer=BYTES)
    prepare(str(code / "json"), out, tokenizer=BYTES, force=True)
    open_corpus(out, "val")


def test_a_folder_of_something_else_is_never_replaced(code, tmp_path):
    mine = write_files(tmp_path / "mine", {"thesis.tex": "years of work"})
    (tmp_path / "file").write_text("x")
    for force in (False, True):
        with pytest.raises(DataError, match=r"mine: it holds thesis.tex, which is no part of a corpus"):
            prepare(str(code / "json"), mine, tokenizer=BYTES, force=force)
        with pytest.raises(DataError, match="file: it is there and is no folder"):
            prepare(str(code / "json"), tmp_path / "file", tokenizer=BYTES, force=force)
    assert (mine / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert prepare(str(code / "json"), tmp_path / "empty", tokenizer=BYTES).documents > 1


def test_it_leaves_nothing_behind_but_the_corpus(code, tmp_path):
    """In a process with a home of its own: no cache, no temporary folder, no progress bars."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary)}
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        env.pop(name, None)
    done = run("--source", code / "json", "--source", code / "email", "--tokenizer", "train", "--vocab-size", "400",
               "--out", tmp_path / "deep" / "er" / "out", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens/s" in done.stdout
    assert list(home.rglob("*")) == list(temporary.rglob("*")) == []
    assert os.listdir(tmp_path / "deep" / "er") == ["out"]
    assert (tmp_path / "deep" / "er" / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("arguments", "message"), [
    (["--source", "nowhere"], "source must be stdlib, a folder, a .jsonl file or a Hub dataset"),
    (["--source", "no/where"], "source no/where is no folder or .jsonl file, and the Hub did not give it"),
    (["--source", "bare"], "source bare: no readable Python file in bare"),
    (["--source", "void"], "the sources hold no document; 1 duplicate; 2 empty; 1 not UTF-8"),
    (["--source", "bad.jsonl"], "bad.jsonl, line 2: not JSON: "),
    (["--source", "named.jsonl"], "named.jsonl, line 1: it must have the field 'text'; it has the fields code, id"),
    (["--source", "named.jsonl", "--column", "id"], "named.jsonl, line 1: the text must be a string; got 7"),
    (["--source", "list.jsonl"], "list.jsonl, line 1: it must have the field 'text'; it has no fields"),
    (["--source", "src", "--tokenizer", "bare"], "no tokenizer can be read from bare"),
    (["--source", "src", "--tokenizer", "none"], "name_or_folder must be a folder or a Hub id"),
    (["--source", "src", "--vocab-size", "500"], "--vocab-size goes with --tokenizer train"),
    (["--source", "src", "--tokenizer", "train", "--vocab-size", "99"], "vocab_size must be from 295 to 65,536; got"),
    (["--source", "src", "--tokenizer", "train", "--vocab-size", "70000"], "vocab_size must be from 295 to 65,536"),
    (["--source", "src", "--val-fraction", "1"], "val_fraction must be at least 0 and less than 1; got 1.0"),
    (["--source", "src", "--workers", "-1"], "workers must be 0 or more; got -1"),
    (["--source", "src", "--workers", "two"], "argument --workers: invalid int value: 'two'"),
    (["--source", "src", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--source", "src", "--out", "src/a.py/out"], "src/a.py"),
])
def test_bad_input_gets_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "bare").mkdir()
    write_files(tmp_path, {
        "src/a.py": "x = 1\n", "void/a.py": "", "void/b.py": "", "void/c.py": b"\xff",
        "bad.jsonl": '{"text": "x"}\n{"text": \n', "named.jsonl": '{"code": "x", "id": 7}\n', "list.jsonl": "[1]\n",
    })
    if "void" in arguments:
        message = message.replace("1 duplicate; ", "")
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    with contextlib.suppress(SystemExit):
        code = 2
        code = main(arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("phi1 prepare: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not any(path.name == "out" or path.name.endswith(".tmp") for path in tmp_path.rglob("*"))


def test_out_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "phi1 prepare: error: the following arguments are required: --out\n"


def start_tokenising(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """A prepare of the whole standard library, at the moment when its workers begin."""
    process = subprocess.Popen([*COMMAND, "--out", str(out), "--workers", "2", *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tokenising"):
            break
    time.sleep(0.7)
    assert process.poll() is None
    return process


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def is_gone(pid: int) -> bool:
    """Whether a process ends within five seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_stopped_it_leaves_nothing(how, tmp_path):
    process = start_tokenising(tmp_path / "out")
    workers = workers_of(process)
    assert len(workers) == 2
    if how == "SIGTERM":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "phi1 prepare: stopped; nothing was written\n")
    assert os.listdir(tmp_path) == []
    assert all(map(is_gone, workers))


def test_killed_it_leaves_nothing_once_another_has_run(code, tmp_path):
    process = start_tokenising(tmp_path / "out")
    workers = workers_of(process)
    process.kill()
    process.communicate(timeout=20)
    assert all(map(is_gone, workers))
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.")
    assert left.endswith(".tmp")
    prepare(str(code / "json"), tmp_path / "out", tokenizer=BYTES)
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_worker_is_one_line(tmp_path):
    process = start_tokenising(tmp_path / "out")
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 2
    assert error.startswith("phi1 prepare: error: a tokenising process ended early, with status -9")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_two_at_once_do_not_disturb_one_another(code, tmp_path):
    same = [subprocess.Popen([*COMMAND, "--source", str(code), "--out", str(tmp_path / "out")], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    other = subprocess.Popen([*COMMAND, "--source", str(code / "json"), "--out", str(tmp_path / "out")],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    outputs = [process.communicate(timeout=60) for process in (*same, other)]
    codes = [process.returncode for process in (*same, other)]
    # Whichever was first has its corpus there; those who asked for the same find it done, the others get one line.
    assert codes in ([0, 0, 2], [2, 2, 0])
    for code_, (_, error) in zip(codes, outputs, strict=True):
        assert error.count("\n") == (code_ == 2)
        assert not error or "another corpus is there" in error
    open_corpus(tmp_path / "out", "train")
    open_corpus(tmp_path / "out", "val")
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_one_line(code, tmp_path, monkeypatch, capsys):
    """Wherever it strikes: while the documents are gathered, tokens written, or the manifest made."""
    from phi1.train import sources, writer

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((sources, "_document"), (writer.ShardWriter, "append"), (writer, "write_manifest")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            assert main(["--source", str(code / "json"), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"phi1 prepare: error: no space on the disk of {tmp_path}: about ")
        assert error.count("\n") == 1
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("kilobytes", "found"), [(3_000, "beforehand"), (10_000, "on the way")])
def test_a_disk_that_is_really_full(kilobytes, found, tmp_path):
    """On a small file system of its own. Rare characters take a token a byte, more than the estimate foresees."""
    random.seed(0)
    texts = ("".join(chr(random.randrange(0x4E00, 0x9FFF)) for _ in range(4000)) for _ in range(300))
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "han.jsonl").write_text("\n".join(lines), encoding="utf-8")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (f"mount -t tmpfs -o size={kilobytes}k none {disk} || exit 77; "
              f"'{sys.executable}' -P '{prepare_module.__file__}' --source {tmp_path}/han.jsonl --out {disk}/out; "
              f"echo $? $(ls -A {disk})")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode or "unshare" in done.stderr:
        pytest.skip("mounting needs a user namespace")
    assert done.stdout.split("\n")[-2] == "2"
    assert done.stderr.startswith(f"phi1 prepare: error: no space on the disk of {disk}: about 6.1 MB are needed, and ")
    assert done.stderr.count("\n") == 1
    assert ("tokenising" in done.stdout) == (found == "on the way")


def test_a_given_tokenizer_object_or_folder(code, tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    prints = {prepare(str(code / "json"), tmp_path / str(i), tokenizer=one).fingerprint
              for i, one in enumerate((tokenizer, tmp_path / "tokenizer", "microsoft/phi-2"))}
    assert len(prints) == 1


def test_the_standard_library_is_found():
    source = find_source("stdlib")
    assert len(source.files) > 500
    assert not [path for path, _, _ in source.files if "-packages" in path]
    assert source.files == find_source("stdlib").files
