"""bench/gpu_train.py where memory runs out, which a machine without a GPU has to pretend."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from phi1 import load_tokenizer
from phi1.bench.gpu import train
from phi1.bench.gpu.code_corpus import read_code
from phi1.bench.gpu.train import OUT_OF_MEMORY, RESULT, RUN, SEARCHED, TINY, attempt, fastest, search


class Memory:
    """Takes the place of `Training`: steps that fit up to a number of sequences, fewer beside gradients that add up."""

    largest, largest_with_dropout = 3, 3

    def __init__(self, size):
        self.size, self.dropout, self.steps = size, 0.0, 0

    def set_batch(self, micro_batch, micro_steps):
        self.micro_batch, self.micro_steps = micro_batch, micro_steps

    def set_dropout(self, p):
        self.dropout = p

    def step(self):
        largest = self.largest_with_dropout if self.dropout else self.largest + 2 * (self.micro_steps == 1)
        if self.micro_batch > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.steps += 1
        return {"step": self.steps, "loss": 9 - 0.1 * self.steps, "skipped": False, "seconds": 1.0,
                "tokens_per_s": self.size.tokens * self.micro_batch * self.micro_steps,
                "activation_peak_gib": 1.9 if self.dropout else 1.8}

    def peak_gib(self):
        return 70.0


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(train, "Training", Memory)
    return monkeypatch


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_search_tries_sizes_with_the_buffer_that_the_run_needs(memory, tmp_path):
    size = replace(TINY, micro_batches=(1, 2, 3, 4, 5, 6))
    assert search(size, tmp_path, float("inf")) == 0
    assert [(line["micro_batch"], "error" in line) for line in lines(tmp_path / SEARCHED)] == \
        [(1, False), (2, False), (3, False), (4, True)]
    assert lines(tmp_path / SEARCHED)[2] == {"micro_batch": 3, "seconds": 0.5, "peak_gib": 70.0,
                                             "activation_peak_gib": 1.8, "tokens_per_s": 192}


def test_a_run_that_does_not_fit_leaves_its_place_to_the_next_smaller(memory, tmp_path, capsys):
    rows = [{"micro_batch": size, "seconds": 0.1, "tokens_per_s": 10 * size} for size in (1, 2, 4, 6)]
    (tmp_path / SEARCHED).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for expected in (6, 4):
        assert fastest(tmp_path / SEARCHED)["micro_batch"] == expected
        assert attempt(TINY, tmp_path, float("inf")) == OUT_OF_MEMORY
    assert attempt(TINY, tmp_path, float("inf")) == 0
    assert json.loads((tmp_path / RESULT).read_text())["micro_batch"] == 2
    assert len(lines(tmp_path / RUN)) == TINY.steps
    printed = capsys.readouterr().out
    assert "with dropout 0.1 128" in printed
    assert "peak memory      70.0 GiB, activations 1.8 GiB a sequence" in printed
    result = json.loads((tmp_path / RESULT).read_text())
    assert (result["activation_peak_gib"], result["activation_peak_gib_dropout_0.1"]) == (1.8, 1.9)


def test_the_result_is_there_where_only_dropout_does_not_fit(memory, tmp_path, capsys):
    memory.setattr(Memory, "largest_with_dropout", 1)
    (tmp_path / SEARCHED).write_text('{"micro_batch": 2, "seconds": 0.1, "tokens_per_s": 20}\n')
    assert attempt(TINY, tmp_path, float("inf")) == 0
    result = json.loads((tmp_path / RESULT).read_text())
    assert result["steps"] == TINY.steps
    assert "tokens_per_s_dropout_0.1" not in result
    assert "with dropout 0.1 out of memory" in capsys.readouterr().out


def test_without_a_size_that_fits_a_run_ends_in_one_line(tmp_path, capsys):
    (tmp_path / SEARCHED).write_text('{"micro_batch": 1, "error": "out of memory"}\n')
    assert attempt(TINY, tmp_path, float("inf")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu_train: error: no micro-batch was timed that fits; run `search` first"]


def test_a_line_that_was_cut_short_hides_no_other(memory, tmp_path):
    """What is lost of it would else take the size that did not fit along, which is tried again and again."""
    (tmp_path / SEARCHED).write_text('{"micro_batch": 2, "seconds": 0.1, "tokens_per_s": 20}\n'
                                     '{"micro_batch": 4, "seconds": 0.1, "tokens_per_s": 40}\n{"micro_bat')
    assert fastest(tmp_path / SEARCHED)["micro_batch"] == 4
    assert attempt(TINY, tmp_path, float("inf")) == OUT_OF_MEMORY
    assert fastest(tmp_path / SEARCHED)["micro_batch"] == 2


def test_the_result_of_an_earlier_run_is_not_taken_for_this_ones(memory, tmp_path):
    (tmp_path / SEARCHED).write_text('{"micro_batch": 4, "seconds": 0.1, "tokens_per_s": 40}\n')
    (tmp_path / RESULT).write_text('{"micro_batch": 2}')
    assert attempt(TINY, tmp_path, float("inf")) == OUT_OF_MEMORY
    assert not (tmp_path / RESULT).exists()



def test_the_code_is_cut_into_rows_that_follow_each_other(tmp_path):
    for name, text in (("b/two.py", "y = 2\n"), ("a.py", "x = 1\n<|endoftext|>"), ("c.py", "too much"),
                       ("b/site-packages/three.py", "not read\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    corpus = read_code(str(tmp_path), "microsoft/phi-1", 27)
    tokenizer = load_tokenizer()
    assert tokenizer.decode_bytes(corpus.tokens) == b"x = 1\n<|endoftext|><|endoftext|>y = 2\n<|endoftext|>"
    assert (corpus.tokens == tokenizer.eos_id).sum() == 2, "the document's own is plain text"
    assert corpus.n_samples(4) == (corpus.tokens.size - 1) // 4 >= 2
    rows = corpus.rows(np.array([1, 0]), 4)
    assert rows.dtype == np.int64
    assert rows.tolist() == [corpus.tokens[4:9].tolist(), corpus.tokens[:5].tolist()]
