"""The folder of a corpus, in real processes: other files are never replaced, and nothing half made stays after a
refusal, a stop, a kill or a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import alive, folder_content, injected, wait_for, wait_until, write_files

from phi1.tokenizer import train_bpe
from phi1.tokenizer_rules import MIN_VOCAB
from phi1.train.commands import prepare as prepare_command
from phi1.train.commands.prepare import main
from phi1.train.data.corpus import open_corpus
from phi1.train.data.shards import DataError
from phi1.train.prepare import prepare as prepare_module
from phi1.train.prepare.prepare import prepare

datasets = pytest.importorskip("datasets")

BYTES = train_bpe([], MIN_VOCAB)
"""The smallest tokenizer, which loads at once."""
COMMAND = [sys.executable, "-P", prepare_command.__file__]


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)

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
    (["--source", "src", "--tokenizer", "no/such/one"], "name_or_folder must be a folder or a Hub id"),
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


NO_REPLY = """import os, sys
if any(word.endswith("encode_pool.py") for word in sys.orig_argv):
    import pickle, time
    dump, parent, worker = pickle.dump, os.getppid(), os.path.join({folder!r}, str(os.getpid()))
    def wait_and_dump(*args, **options):
        open(worker, "w").close()
        while os.path.exists(worker) and os.getppid() == parent:
            time.sleep(0.02)
        dump(*args, **options)
    pickle.dump = wait_and_dump
"""


@pytest.fixture
def tokenising(code: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
               ) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A prepare into `out` whose two workers do not reply while a file named after their process id exists."""
    workers = tmp_path_factory.mktemp("workers")
    hook = injected(tmp_path_factory.mktemp("hook"), NO_REPLY.format(folder=str(workers)))
    process = subprocess.Popen([*COMMAND, "--source", str(code), "--out", str(tmp_path / "out"), "--workers", "2",
                                "--val-fraction", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=os.environ | hook)
    try:
        wait_for(process, lambda: len(os.listdir(workers)) == 2)
        yield process, list(workers.iterdir())
    finally:
        process.kill()


def any_alive(workers: list[Path]) -> bool:
    return any(alive(int(worker.name)) for worker in workers)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_stopped_it_leaves_nothing(how, tmp_path, tokenising):
    process, workers = tokenising
    if how == "SIGTERM":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (130, "phi1 prepare: stopped; nothing was written\n")
    assert os.listdir(tmp_path) == []
    wait_until(lambda: not any_alive(workers))


def test_killed_it_leaves_nothing_once_another_has_run(code, tmp_path, tokenising):
    process, workers = tokenising
    process.kill()
    process.communicate(timeout=300)
    wait_until(lambda: not any_alive(workers))
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.")
    assert left.endswith(".tmp")
    prepare(str(code / "json"), tmp_path / "out", tokenizer=BYTES)
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_worker_is_one_line(tmp_path, tokenising):
    process, workers = tokenising
    os.kill(int(workers[0].name), signal.SIGKILL)
    workers[1].unlink()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    assert error.startswith("phi1 prepare: error: a tokenising process ended early, with status -9")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_two_at_once_do_not_break_each_other(code, tmp_path):
    same = [subprocess.Popen([*COMMAND, "--source", str(code), "--out", str(tmp_path / "out")], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    other = subprocess.Popen([*COMMAND, "--source", str(code / "json"), "--out", str(tmp_path / "out")],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        outputs = [process.communicate(timeout=300) for process in (*same, other)]
    finally:
        for process in (*same, other):
            process.kill()
    codes = [process.returncode for process in (*same, other)]
    # The first one makes its corpus; the same command then finds it done, another one gets one line.
    assert codes in ([0, 0, 2], [2, 2, 0])
    for code_, (_, error) in zip(codes, outputs, strict=True):
        assert error.count("\n") == (code_ == 2)
        assert not error or "another corpus is there" in error
    open_corpus(tmp_path / "out", "train")
    open_corpus(tmp_path / "out", "val")
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_one_line(code, tmp_path, monkeypatch, capsys):
    """The disk is full while documents are gathered, tokens written or the manifest made."""
    from phi1.train.prepare import sources, writer

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
    """Fill a small file system. Rare characters take a token a byte, more than the estimate assumes."""
    random.seed(0)
    texts = ("".join(chr(random.randrange(0x4E00, 0x9FFF)) for _ in range(4000)) for _ in range(300))
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "han.jsonl").write_text("\n".join(lines), encoding="utf-8")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (f"mount -t tmpfs -o size={kilobytes}k none {disk} || exit 77; "
              f"'{sys.executable}' -P '{prepare_command.__file__}' --source {tmp_path}/han.jsonl --out {disk}/out; "
              f"echo $? $(ls -A {disk})")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode or "unshare" in done.stderr:
        pytest.skip("mounting needs a user namespace")
    assert done.stdout.split("\n")[-2] == "2"
    assert done.stderr.startswith(f"phi1 prepare: error: no space on the disk of {disk}: about 6.1 MB are needed, and ")
    assert done.stderr.count("\n") == 1
    assert ("tokenising" in done.stdout) == (found == "on the way")
