"""The processes that tokenise: without their parent they end, and print nothing."""

import contextlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import time

import pytest

from phi1.tokenizer import train_bpe
from phi1.tokenizer_rules import MIN_VOCAB
from phi1.train.prepare import encode_pool
from phi1.train.prepare.encode_pool import EncodePool, encode_chunk, serve

TEXTS = ["def f():\n    return 1\n", "", "x = 2"]


@pytest.fixture
def folder(tmp_path):
    train_bpe([], MIN_VOCAB).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_worker_answers_until_its_input_ends_or_breaks_off(folder):
    request, replies = pickle.dumps(TEXTS), io.BytesIO()
    for length in (0, 1, len(request) // 2, len(request) - 1, len(request)):
        serve(str(folder), io.BytesIO(request + request[:length]), replies)
    replies.seek(0)
    answers = [pickle.load(replies) for _ in range(6)]
    assert replies.read() == b""
    assert {tokens.tobytes() for tokens, _ in answers} == {encode_chunk(train_bpe([], MIN_VOCAB), TEXTS)[0].tobytes()}


def test_a_worker_is_silent_about_a_missing_tokenizer_but_not_about_a_damaged_one(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no tokenizer can be read"):
        serve(str(folder), io.BytesIO(), io.BytesIO())
    (folder / "tokenizer.json").unlink()
    serve(str(folder), io.BytesIO(), io.BytesIO())
    shutil.rmtree(folder)
    serve(str(folder), io.BytesIO(), io.BytesIO())


def test_a_worker_whose_parent_is_killed_while_it_answers_ends_without_a_word(folder):
    worker = subprocess.Popen([sys.executable, "-P", encode_pool.__file__, str(folder)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    worker.stdout.close()
    _, said = worker.communicate(pickle.dumps(["x" * 100_000]), timeout=300)
    assert (worker.returncode, said) == (0, b"")


def test_stopped_while_its_processes_start_it_ends_them(folder, monkeypatch, capfd):
    started = []

    def start(*args, popen=subprocess.Popen, **options):
        if len(started) == 2:
            raise KeyboardInterrupt
        process = popen(*args, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    pool = EncodePool(folder, 3)  # kept alive, as by a traceback; otherwise the workers' pipes would close
    with pytest.raises(KeyboardInterrupt), pool:
        pass
    for pid in started:
        with contextlib.suppress(ChildProcessError):  # it was waited for
            end = time.monotonic() + 60
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                assert time.monotonic() < end
                time.sleep(0.02)
    assert len(started) == 2
    assert capfd.readouterr().err == ""
