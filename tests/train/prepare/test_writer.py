"""A corpus that cannot be written is refused before its first file."""

import pytest

from phi1.tokenizer import train_bpe
from phi1.tokenizer_rules import MIN_VOCAB
from phi1.train.data.shards import DataError
from phi1.train.prepare.writer import CorpusWriter

TOKENIZER = train_bpe([], MIN_VOCAB)


def test_a_tokenizer_with_more_than_16_bits_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(type(TOKENIZER), "__len__", lambda self: 65537)
    with pytest.raises(DataError, match=r"must have at most 65,536 tokens.*got 65,537"):
        CorpusWriter(tmp_path, TOKENIZER)


def test_a_shard_must_hold_whole_blocks(tmp_path):
    with pytest.raises(ValueError, match=r"shard_tokens must be a multiple of block_tokens \(64\); got 100"):
        CorpusWriter(tmp_path, TOKENIZER, shard_tokens=100, block_tokens=64)
