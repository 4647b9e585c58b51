"""The corpus: reading returns what was written, and every kind of damage is found and named."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest

from phi1.tokenizer import train_bpe
from phi1.tokenizer_rules import MIN_VOCAB
from phi1.train.commands.verify import verify
from phi1.train.data.corpus import open_corpus
from phi1.train.data.sampler import sample_order
from phi1.train.data.shards import DOCUMENT, MANIFEST, DataError, ShardHeader, read_header, read_manifest
from phi1.train.prepare.writer import CorpusWriter, write_manifest

SHARD, BLOCK = 512, 64  # small, so that documents and rows cross blocks and shards
TOKENIZER = train_bpe([], MIN_VOCAB)
EOS = TOKENIZER.eos_id


def make_corpus(folder: Path, lengths: list[int], val_lengths: list[int], *, shard: int = SHARD, block: int = BLOCK):
    """Write a corpus of random documents and return the stream of each split."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    writer = CorpusWriter(folder, TOKENIZER, shard_tokens=shard, block_tokens=block)
    streams = {"train": np.empty(0, np.uint16), "val": np.empty(0, np.uint16)}
    for split, part in (("train", lengths), ("val", val_lengths)):
        for length in part:
            tokens = np.append(rng.integers(0, 256, length), EOS).astype(np.uint16)
            record = np.zeros(1, DOCUMENT)
            record["tokens"], record["bytes"] = length, 3 * length
            record["hash"] = np.void(rng.bytes(16))
            writer.add(split, tokens, record)
            streams[split] = np.append(streams[split], tokens)
    writer.close({})
    return streams


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    return folder, make_corpus(folder, [100, 0, 700, 63, 64, 65, 511, 1, 900], [300, 20])


def test_reads_back_what_was_written(corpus):
    folder, streams = corpus
    for split, stream in streams.items():
        opened = open_corpus(folder, split)
        assert opened.n_tokens == stream.size
        assert opened.n_bytes == 3 * (stream.size - opened.documents.size)
        assert (opened.vocab_size, opened.eos_id) == (MIN_VOCAB, EOS)
        assert np.array_equal(opened.rows(np.array([0]), stream.size - 1)[0], stream)
        for i, record in enumerate(opened.documents):
            begin, end = int(record["offset"]), int(record["offset"]) + int(record["tokens"])
            assert stream[end] == EOS
            assert np.array_equal(opened.document(i), stream[begin:end])
        assert opened.load_tokenizer().fingerprint == TOKENIZER.fingerprint
    assert len(list(folder.glob("train-*.bin"))) == 5
    assert open_corpus(folder, "train").fingerprint == open_corpus(folder, "val", verify=False).fingerprint


@pytest.mark.parametrize("seq_len", [1, 7, 64, 511, 512, 513, 2000])
def test_rows_cut_the_stream(corpus, seq_len):
    folder, streams = corpus
    opened, stream = open_corpus(folder, "train"), streams["train"]
    n = opened.n_samples(seq_len)
    assert n * seq_len + 1 <= stream.size < (n + 1) * seq_len + 1
    indices = np.random.default_rng(1).permutation(n)
    rows = opened.rows(indices, seq_len)
    assert rows.dtype == np.int64
    assert rows.shape == (n, seq_len + 1)
    for row, index in zip(rows, indices, strict=True):
        assert np.array_equal(row, stream[index * seq_len:(index + 1) * seq_len + 1])
    assert opened.rows(np.empty(0, np.int64), seq_len).shape == (0, seq_len + 1)


@pytest.mark.parametrize("wrong", [-1, 37])
def test_rows_refuses_a_sample_that_is_not_there(corpus, wrong):
    opened = open_corpus(corpus[0], "train")
    assert opened.n_samples(64) == 37
    with pytest.raises(ValueError, match=r"rows: indices must be from 0 to 36 \(seq_len 64\); got"):
        opened.rows(np.array([0, wrong]), 64)


def test_too_small_or_empty_a_split_says_what_is_needed(corpus, tmp_path):
    opened = open_corpus(corpus[0], "val")
    opened.require_samples(64, 5)
    with pytest.raises(DataError, match=r"val split is too small: its 322 tokens give 5 samples of 64 .* and 6 are"):
        opened.require_samples(64, 6)
    make_corpus(tmp_path / "empty", [10], [])
    opened = open_corpus(tmp_path / "empty", "val")
    assert (opened.n_tokens, opened.n_bytes, opened.n_samples(4), len(opened.documents)) == (0, 0, 0, 0)
    with pytest.raises(DataError, match="too small"):
        opened.require_samples(4, 1)


def _descriptors(folder: Path) -> int:
    """Return how many files in a folder this process has open."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/")
    return count


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def _cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("train-00002.bin", lambda p: _flip(p, 4096 + 2 * 70), r"damaged: .*block 1 \(tokens 64 to 127\)"),
    ("train-00000.bin", lambda p: _flip(p, -1), r"damaged: .*block 7 \(tokens 448 to 511\)"),
    ("train-00001.bin", lambda p: _flip(p, 30), "header is damaged"),
    ("train-00001.bin", lambda p: _flip(p, 0), "not a shard of tokens"),
    ("train-00004.bin", lambda p: _cut(p, 1), r"truncated: .* bytes instead of"),
    ("train-00003.bin", lambda p: p.write_bytes(b""), "truncated: 0 bytes"),
    ("train-00003.bin", lambda p: p.write_bytes(p.read_bytes() + b"x"), "too long"),
    ("train-00003.bin", lambda p: p.write_bytes(p.with_name("train-00002.bin").read_bytes()), "of another corpus"),
    ("train-00003.bin", Path.unlink, "missing"),
    ("train-documents.npy", lambda p: _flip(p, -3), "damaged"),
    ("train-documents.npy", lambda p: _cut(p, 32), "truncated"),
    ("tokenizer/tokenizer.json", lambda p: _flip(p, 50), "damaged"),
    ("train-00005.bin", lambda p: p.write_bytes(p.with_name("train-00000.bin").read_bytes()), "an extra file"),
    ("manifest.json", lambda p: p.write_text(p.read_text().replace('"tokens": 2413', '"tokens": 2414')),
     "damaged: it is not as it was written"),
    ("manifest.json", lambda p: p.unlink() or p.mkdir(), "Is a directory"),
    ("manifest.json", lambda p: p.write_text("[]"), "damaged"),
    ("manifest.json", lambda p: p.write_text('{"format": "phi1-corpus", "version": 2}'), "version 2; this reader"),
])
def test_each_kind_of_damage_has_its_message(corpus, name, damage, message):
    folder, _ = corpus
    open_corpus(folder, "train")
    path = folder / name
    damage(path)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{message}") as error:
        open_corpus(folder, "train")
    assert "\n" not in str(error.value)


def test_a_shard_cut_short_after_it_was_opened_is_named(corpus):
    folder, streams = corpus
    opened, path = open_corpus(folder, "train"), folder / "train-00002.bin"
    os.truncate(path, 4096 + 2 * 100 + 1)  # tokens 1,024 to 1,123 of the stream, and half of one
    assert np.array_equal(opened.rows(np.array([0]), 1087)[0], streams["train"][:1088])  # its block is whole
    for index, seq_len, byte in ((1, 1024, "4,297"), (0, 1124, "4,297"), (20, 64, "4,608")):
        line = f"{path}: cut short since it was opened: it has no byte {byte} any more"
        with pytest.raises(DataError, match=f"^{re.escape(line)}$"):
            opened.rows(np.array([index]), seq_len)


def test_a_shard_that_is_written_to_after_it_was_opened_is_named(corpus):
    folder, streams = corpus
    opened, path = open_corpus(folder, "train"), folder / "train-00002.bin"
    for flips in (1, 2, 3, 4):  # a second flip mends the first
        if flips % 2:
            assert np.array_equal(opened.rows(np.array([17]), 64)[0], streams["train"][17 * 64 : 18 * 64 + 1])
        _flip(path, 4096 + 2 * 70)
        os.utime(path, ns=(0, flips))  # a clock may tick every 4 ms alone
        if flips % 2:
            with pytest.raises(DataError, match=rf"{path}: damaged: block 1 \(tokens 64 to 127\) is not as it was"):
                opened.rows(np.array([17]), 64)


def test_an_id_beyond_the_vocabulary_is_named(tmp_path):
    folder, largest = tmp_path / "corpus", int(make_corpus(tmp_path / "corpus", [300], [10])["train"].max())

    def open_with(vocab_size, verify):
        content = read_manifest(folder)["content"]
        (folder / MANIFEST).unlink()
        write_manifest(folder, content | {"vocab_size": vocab_size}, {})
        return open_corpus(folder, "train", verify=verify)

    open_with(largest + 1, True)
    for verified in (True, False):
        with pytest.raises(DataError, match=rf"holds the id {largest}, and the tokenizer has {largest:,}"):
            open_with(largest, verified).rows(np.array([0]), 299)
    assert f"holds the id {largest}" in dict(verify(folder))[folder]


def test_an_error_of_the_system_is_passed_on(corpus, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened = open_corpus(corpus[0], "train")
    monkeypatch.setattr(os, "preadv", failing)
    for read, what in ((lambda: opened.rows(np.array([8]), 64), "train-00001.bin: cannot be read at byte 4,096"),
                       (lambda: open_corpus(corpus[0], "train"), r"\S+: cannot be read at byte 0")):
        with pytest.raises(DataError, match=rf"^{re.escape(str(corpus[0]))}/{what}: Input/output error$"):
            read()


def test_a_partial_read_is_continued(corpus, monkeypatch):
    opened, preadv = open_corpus(corpus[0], "train"), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [memoryview(into[0]).cast("B")[:7]], at))
    stream = corpus[1]["train"]
    assert np.array_equal(opened.rows(np.array([0]), stream.size - 1)[0], stream)


def test_a_corpus_reads_the_files_that_it_checked(corpus):
    folder, streams = corpus
    opened, stream = open_corpus(folder, "train"), streams["train"]
    copy = pickle.loads(pickle.dumps(opened))
    for path in folder.glob("train-*.bin"):
        path.rename(path.with_suffix(".old"))
        path.write_bytes(b"another")
    for each in (opened, copy):
        assert np.array_equal(each.rows(np.array([0]), stream.size - 1)[0], stream)


def test_a_corpus_holds_one_descriptor_a_shard(corpus):
    opened = open_corpus(corpus[0], "train")
    assert _descriptors(corpus[0]) == len(opened.shards) == 5
    del opened
    assert _descriptors(corpus[0]) == 0


def test_without_reading_all_the_sizes_and_names_are_still_checked(corpus):
    folder, _ = corpus
    _flip(folder / "train-00000.bin", -1)
    open_corpus(folder, "train", verify=False)
    _cut(folder / "train-00001.bin", 2)
    with pytest.raises(DataError, match=r"train-00001.bin: truncated"):
        open_corpus(folder, "train", verify=False)


def test_a_shard_of_another_version_or_tokenizer_is_refused(corpus):
    folder, _ = corpus
    path = folder / "train-00000.bin"
    header = read_header(path)
    assert header == ShardHeader(4096, SHARD, TOKENIZER.fingerprint, BLOCK, header.blocks)
    assert len(header.blocks) == SHARD // BLOCK
    other = ShardHeader(4096, SHARD, "ab" * 32, BLOCK, header.blocks).pack()
    path.write_bytes(other + path.read_bytes()[4096:])
    with pytest.raises(DataError, match=r"its tokenizer \(abababababab\) is not the corpus'"):
        open_corpus(folder, "train", verify=False)
    path.write_bytes(other[:8] + b"\x09" + other[9:] + path.read_bytes()[4096:])
    with pytest.raises(DataError, match="format version 9 with 16-bit tokens"):
        open_corpus(folder, "train", verify=False)


def test_a_folder_without_a_corpus_says_how_to_make_one(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=f"no corpus there .*phi1 prepare --out {folder}"):
            open_corpus(folder, "train")
    with pytest.raises(ValueError, match="split must be one of train, val; got 'test'"):
        open_corpus(tmp_path, "test")


def test_the_fingerprint_follows_the_content_and_ignores_other_files(tmp_path):
    make_corpus(tmp_path / "a", [50, 60], [10])
    (tmp_path / "a" / "README.md").write_text("mine")
    make_corpus(tmp_path / "b", [50, 60], [10])
    make_corpus(tmp_path / "c", [50, 61], [10])
    a, b, c = (open_corpus(tmp_path / name, "train").fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.alone
def test_rows_and_a_whole_epoch_with_checksums_are_read_fast(tmp_path):
    make_corpus(tmp_path / "corpus", [4_000_000], [], shard=1 << 20, block=1 << 18)
    opened = open_corpus(tmp_path / "corpus", "train")
    held = np.arange(4_000_000, dtype=np.uint16)
    for seq_len, batch in ((256, 512), (2048, 64)):
        ours, plain = [], []
        for step in range(10):
            indices = sample_order(0, step * batch, batch, opened.n_samples(seq_len))
            start = time.process_time()  # the time of this process, which depends less on other load
            opened.rows(indices, seq_len)
            ours.append(time.process_time() - start)
            start = time.process_time()
            np.stack([held[at * seq_len : (at + 1) * seq_len + 1] for at in indices]).astype(np.int64)
            plain.append(time.process_time() - start)
        assert min(ours) < 4 * min(plain)  # 1.6 to 2.2 times measured: a row is one read of a file
    ours, plain = [], []
    for _ in range(3):
        start = time.process_time()
        opened = open_corpus(tmp_path / "corpus", "train")
        n_samples = opened.n_samples(2048)
        for first in range(0, n_samples - 64, 64):
            opened.rows(sample_order(0, first, 64, n_samples), 2048)
        ours.append(time.process_time() - start)
        start = time.process_time()
        np.stack([held[at * 2048 : (at + 1) * 2048 + 1] for at in range(n_samples)]).astype(np.int64)
        plain.append(time.process_time() - start)
    assert min(ours) < 10 * min(plain)  # 4.1 to 4.6 times measured: checksums read the corpus before
