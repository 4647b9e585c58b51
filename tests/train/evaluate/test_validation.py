"""The figures of an evaluation, against sums that are written out: loss a token and bits a byte."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_runs import SMALL, in_processes

from phi1.model import Phi1
from phi1.train.checkpoint.checkpoint import gather_weights
from phi1.train.evaluate.validation import HeldOut
from phi1.train.runtime.engine import build_model, connect_processes, start

END, BATCH, ROWS = 2, 2, 7  # no number of processes divides 7 or 5 rows into batches of 2
DRAWN = np.random.default_rng(0).integers(3, SMALL.vocab_size, size=(ROWS, 13))
DRAWN[2, 5] = DRAWN[4, 12] = DRAWN[6, 0] = END  # the last is no target
CORPUS = SimpleNamespace(n_samples=lambda seq_len: len(DRAWN), rows=lambda indices, seq_len: DRAWN[indices])
# Each token is so many bytes as its id, modulo 5, says.
TOKENIZER = SimpleNamespace(eos_id=END, decode_bytes=lambda ids: b"".join(b"x" * (i % 5) for i in ids))


def figures(rank, store, sequences):
    engine = start(rank, "cpu", "fp32", 1)
    connect_processes(engine, rank, store)
    model = build_model(SMALL, engine, seed=1)
    held_out = HeldOut(CORPUS, TOKENIZER, 12, sequences)
    return held_out.evaluate(model, engine, rank.rank, BATCH), gather_weights(model)


@pytest.mark.parametrize(("processes", "sequences"), [(1, 0), (2, 5)])
def test_loss_and_bits_are_those_of_the_rows_alone(tmp_path, processes, sequences):
    found, *others = in_processes(processes, figures, tmp_path, sequences)
    assert all(other[0] == found[0] for other in others)
    model = Phi1(SMALL).eval()
    model.load_state_dict(found[1])
    bits, targets, text = 0.0, 0, 0
    for row in DRAWN[:sequences or ROWS]:
        chances = model(torch.from_numpy(row[None, :-1]))[0].detach().double().softmax(-1).numpy()
        for place, target in enumerate(row[1:]):
            bits -= np.log2(chances[place, target])
            targets += 1
            text += 0 if target == END else int(target) % 5
    assert (found[0].tokens, found[0].n_bytes) == (targets, text)
    assert found[0].bits_per_byte == pytest.approx(bits / text, rel=1e-6)
    assert found[0].loss == pytest.approx(bits / targets * 0.6931471805599453, rel=1e-6)
