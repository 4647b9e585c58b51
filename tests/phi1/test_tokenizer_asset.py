"""The shipped merges of GPT-2: published hashes, a license, and the script that rebuilds them."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi1.tokenizer import MERGES_FILE
from phi1.tokenizer_rules import byte_level_vocab, read_merges

_SPEC = importlib.util.spec_from_file_location("build", MERGES_FILE.with_name("build_tokenizer_asset.py"))
build_tokenizer_asset = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build_tokenizer_asset)


def test_merges_have_the_published_hashes():
    vocab_bpe = gzip.decompress(MERGES_FILE.read_bytes())
    build_tokenizer_asset.check("vocab.bpe", vocab_bpe)
    vocab = byte_level_vocab(read_merges(vocab_bpe.decode()))
    build_tokenizer_asset.check("encoder.json", json.dumps(vocab).encode())
    with pytest.raises(ValueError, match=r"vocab.bpe: sha256 must be 1ce16647.*; got"):
        build_tokenizer_asset.check("vocab.bpe", vocab_bpe[:-1])


def test_asset_is_small_and_licensed():
    assert MERGES_FILE.stat().st_size < 250_000
    assert "Copyright (c) 2019 OpenAI" in MERGES_FILE.with_name("LICENSE-gpt2").read_text(encoding="utf-8")


def test_build_script_recovers_the_merge_of_each_token():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"abab": 6}
    assert build_tokenizer_asset.split_in_two(b"abc", ranks) == [b"ab", b"c"]
    assert build_tokenizer_asset.split_in_two(b"abab", ranks) == [b"ab", b"ab"]


def test_build_script_names_a_missing_archive(tmp_path):
    script = Path(build_tokenizer_asset.__file__)
    done = subprocess.run([sys.executable, str(script), "--archive", str(tmp_path / "no.tar.gz")],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("build_tokenizer_asset: error: ")
    assert done.stderr.count("\n") == 1
    assert "no.tar.gz" in done.stderr
