"""`phi1 verify` on checkpoints, runs and corpora, whole and damaged."""

import errno
import hashlib
import json
import os
import re

import pytest
from training_runs import write_files

from phi1.cli.main import main
from phi1.train.checkpoint.files import choose, describe, write_manifest
from phi1.train.prepare.prepare import prepare
from phi1.weights import checksums


@pytest.fixture
def run(tmp_path):
    """A run's folder with two checkpoints and their manifests."""
    for step in (10, 20):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps({"step": step}))
        (folder / "__0_0.distcp").write_bytes(hashlib.sha256(bytes([step])).digest() * 40)
        write_manifest(folder, {path.name: describe(path) for path in sorted(folder.iterdir())})
    return tmp_path / "run"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for i in range(40):
        (source / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 8)
    folder = tmp_path_factory.mktemp("made") / "corpus"
    prepare(str(source), folder, tokenizer="train", vocab_size=400, workers=1)
    return folder


def test_a_whole_run_a_checkpoint_and_a_corpus(run, corpus, capsys):
    assert main(["verify", str(run), str(run / "checkpoints" / "step-10"), str(corpus)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{run}/checkpoints/step-10: whole", f"{run}/checkpoints/step-20: whole", f"{run}/checkpoints/step-10: whole",
        f"{corpus}: whole"]


def test_one_flipped_byte_is_named_and_the_others_are_still_read(run, corpus, capsys):
    shard = run / "checkpoints" / "step-10" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[700] ^= 4
    shard.write_bytes(content)
    tokens = next(corpus.glob("train-*.bin"))
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert main(["verify", str(corpus), str(run)]) == 1
    finally:
        tokens.write_bytes(whole)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{corpus}: {tokens.name}: damaged: its content hash is wrong")
    assert second == f"{run}/checkpoints/step-10: __0_0.distcp is not as it was written (SHA-256 differs)"
    assert third == f"{run}/checkpoints/step-20: whole"


def test_a_file_that_the_disk_cannot_read_is_damaged(run, corpus, capsys, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hashlib, "file_digest", failing)
    monkeypatch.setattr(os, "preadv", failing)
    assert main(["verify", str(corpus), str(run / "checkpoints" / "step-20")]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(corpus))}: \S+: cannot be read at byte 0: Input/output error", first)
    assert second == f"{run}/checkpoints/step-20: __0_0.distcp cannot be read: Input/output error"


def test_reading_never_forces_files_to_the_disk(run, monkeypatch):
    def failing(*_):  # as on some file systems
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", failing)
    assert choose(run / "checkpoints", "auto") == run / "checkpoints" / "step-20"
    with pytest.raises(OSError, match="Invalid argument"):
        describe(run / "checkpoints" / "step-20" / "trainer.json")


@pytest.mark.parametrize("given", [".", "export"])
def test_an_export_is_compared_with_its_hashes(run, capsys, given):
    export = write_files(run / "export", {"model.safetensors": b"abc", "README.md": "card"})
    checksums.write(export)
    (export / "README.md").write_text("edited")
    assert main(["verify", str(run / given)]) == 0
    assert capsys.readouterr().out.endswith(f"{export}: whole\n")
    (export / "model.safetensors").write_bytes(b"abd")
    assert main(["verify", str(run / given)]) == 1
    assert capsys.readouterr().out.endswith(f"{export}: model.safetensors is not as it was written (SHA-256 differs)\n")


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: path / "nosuch", "nosuch: there is no such folder"),
    (lambda path: write_files(path, {"ledger.jsonl": ""}) / "ledger.jsonl", "ledger.jsonl: a file, where the"),
    (lambda path: path, "nor an export with SHA256SUMS, nor a corpus"),
])
def test_a_path_that_cannot_be_verified_is_one_line(make, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(make(tmp_path))])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1
