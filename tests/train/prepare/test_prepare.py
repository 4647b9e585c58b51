"""The content of a prepared corpus: every document once, on its side of the split, and equal bytes for any number of
workers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from training_runs import folder_content, write_files

from phi1.tokenizer import load_tokenizer, train_bpe
from phi1.tokenizer_rules import EOS, MIN_VOCAB
from phi1.train.commands.prepare import main
from phi1.train.data.corpus import open_corpus
from phi1.train.data.shards import DataError
from phi1.train.prepare import prepare as prepare_module
from phi1.train.prepare.prepare import prepare
from phi1.train.prepare.selection import Selection
from phi1.train.prepare.sources import content_hash, find_source, gather

datasets = pytest.importorskip("datasets")

STDLIB = Path(sysconfig.get_path("stdlib"))
BYTES = train_bpe([], MIN_VOCAB)
"""The smallest tokenizer, which loads at once."""


def texts_of(folder: Path) -> dict[str, list[bytes]]:
    """Return the decoded documents of a corpus."""
    found = {}
    for split in ("train", "val"):
        corpus = open_corpus(folder, split)
        tokenizer = corpus.load_tokenizer()
        found[split] = [tokenizer.decode_bytes(corpus.document(i)) for i in range(len(corpus.documents))]
    return found

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
    # Training documents are in the order of their paths, validation documents in that of their hashes.
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
    packages = ("concurrent", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml", "xmlrpc")
    sources = [str(code), *(str(STDLIB / name) for name in packages)]  # packages that every distribution of Python has
    speeds = []
    for attempt in range(3):  # other load can only slow it down
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        summary = prepare(sources, tmp_path / str(attempt), workers=1)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The worker's start is part of it.
        speeds.append(summary.tokens / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        assert summary.tokens > 500_000
    assert max(speeds) > 0.15e6  # 0.45e6 measured; other load on the same core can halve it


def test_shards_are_cut_where_asked(code, tmp_path):
    prepare(str(code / "json"), tmp_path / "out", tokenizer=BYTES, shard_tokens=1 << 12)
    corpus = open_corpus(tmp_path / "out", "train")
    assert len(corpus.shards) == -(-corpus.n_tokens // (1 << 12)) > 2


def test_skipped_files_are_counted(tmp_path, capsys):
    source = write_files(tmp_path / "src", {
        "a.py": "x = 1\n", "b/same.py": "x = 1\n", "c.py": "y = 'é'\r\n", "latin.py": "z = 'é'".encode("latin-1"),
        "empty.py": "", "notes.txt": "no", ".git/hook.py": "h = 1", "z.py": "\ufeffbom = 1\n",
    })
    (tmp_path / "secret.py").write_text("key = 1\n")
    (source / "gone.py").symlink_to(source / "nowhere.py")
    (source / "out.py").symlink_to(tmp_path / "secret.py")
    (source / "elsewhere").symlink_to(tmp_path)
    (source / "b" / "inside.py").symlink_to(source / "c.py")
    os.mkfifo(source / "pipe.py")  # opening it would wait for ever
    (source / "b" / "loop").symlink_to(source)
    summary = prepare(str(source), tmp_path / "out", tokenizer="train", vocab_size=300, val_fraction=0)
    assert summary.skipped == {"duplicate": 2, "empty": 1, "links that lead out of the source": 2, "not UTF-8": 1}
    assert texts_of(tmp_path / "out") == {"train": [b"x = 1\n", "y = 'é'\r\n".encode(), "\ufeffbom = 1\n".encode()],
                                          "val": []}
    assert str(summary).count("skipped: 2 duplicate, 1 empty, 2 links that lead out of the source, 1 not") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_counted(tmp_path):
    source = write_files(tmp_path / "src", {"a.py": "x = 1\n", "b.py": "y = 1\n"})
    (source / "b.py").chmod(0)
    (source / "closed").mkdir(0)
    assert prepare(str(source), tmp_path / "out", tokenizer=BYTES).skipped == {"unreadable": 2}


@pytest.mark.parametrize(("lines", "complaint"), [
    (b"", "no line in it"), (b"\n\n", "no line in it"),
    (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: not JSON: maximum recursion depth"),
], ids=["empty", "blank", "deep"])
def test_lines_that_hold_no_text_are_refused_in_one_line(tmp_path, lines, complaint):
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(DataError, match=complaint) as raised:
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=BYTES)
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_before_json_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "x = 1\n"}).encode() + b"\n")
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=BYTES, val_fraction=0)
    assert texts_of(tmp_path / "out")["train"] == [b"x = 1\n"]


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
    """With the same cache folder, `datasets` must not return the old content of a changed file."""
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
