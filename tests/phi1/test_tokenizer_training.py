"""Training of small byte-level BPEs: phi-1's rules, determinism and the fingerprint."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from phi1.tokenizer import train_bpe
from phi1.tokenizer_rules import EOS, MIN_VOCAB, RUNS


def test_trained_bpe_follows_the_rules(source_files):
    trained = train_bpe(source_files, 600)
    assert len(trained) == 600
    assert trained.eos_id == 600 - 1 - len(RUNS)
    assert trained.encode(" " * 31) == [trained.eos_id + 1]
    assert trained.encode("\t\t") == [599]
    assert trained.encode(EOS) == [trained.eos_id]
    for text in source_files:
        assert trained.decode(trained.encode(text)) == text
    merged = [trained.decode_bytes([i]) for i in range(256, trained.eos_id)]
    assert not [token for token in merged if b"  " in token or b"\t\t" in token]  # such a merge could never be used
    assert b" self" in merged


def test_training_is_deterministic(source_files, tmp_path):
    """Other processes, hash seeds, core counts and orders of the texts give the same tokenizer."""
    ours = train_bpe(source_files, 900).fingerprint
    (tmp_path / "texts.json").write_text(json.dumps(source_files[::-1]), encoding="utf-8")
    code = ("import json, sys; from phi1.tokenizer import train_bpe; "
            "print(train_bpe(json.load(open(sys.argv[1], encoding='utf-8')), 900).fingerprint)")
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "texts.json")],
                              capture_output=True, text=True, check=True, env=env)
        assert done.stdout.strip() == ours


def test_fingerprint_tells_tokenizers_apart(source_files):
    some = {train_bpe(source_files, 600).fingerprint, train_bpe(source_files, 601).fingerprint,
            train_bpe(source_files[1:], 600).fingerprint}
    assert len(some) == 3
    assert all(len(bytes.fromhex(one)) == hashlib.sha256().digest_size for one in some)


def test_training_refuses_fewer_tokens_than_bytes_and_runs():
    assert len(train_bpe(["x"], MIN_VOCAB)) == MIN_VOCAB
    with pytest.raises(ValueError, match=r"train_bpe: vocab_size must be at least 295 .*; got 294"):
        train_bpe(["x"], MIN_VOCAB - 1)
