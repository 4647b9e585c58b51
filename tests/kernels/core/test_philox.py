"""The dropout masks: Random123's known answers, our own vectors, and independence of how a range is cut."""

import pytest
import torch

from phi1.kernels import Dropout
from phi1.kernels.core.philox import (
    attention_keep,
    dropout_fields,
    dropout_from_fields,
    dropout_scale,
    packed_attention_keep,
    philox_4x32,
    residual_keep,
    threshold,
)

FULL = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)

# Random123's kat_vectors for philox4x32: rounds, counter and key, output.
KNOWN_ANSWERS = [
    (7, (0,) * 6, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, (FULL,) * 6, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, (0,) * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, (FULL,) * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "words", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, words, expected):
    from_ints = philox_4x32(*words, rounds=rounds)
    from_tensors = philox_4x32(*(torch.tensor([word, 7]) for word in words), rounds=rounds)
    assert " ".join(f"{word:08x}" for word in from_ints) == expected
    assert " ".join(f"{int(word[0]):08x}" for word in from_tensors) == expected


def make(p=0.5, seed=1234, step=5, samples=(7, 1 << 31, 9), layer=3, kind=0):
    ids = None if samples is None else torch.tensor(samples)
    return Dropout(p, torch.tensor([seed, step]), ids, layer, kind)


def one_bit(dropout, head, sample, row, column):
    """One mask bit from the words of the design, with Python integers."""
    seed, step = dropout.rng.tolist()
    j, d = column % 64 // 8, column % 8
    counter = (column // 64 * 8 + d, row, sample, dropout.layer << 16 | dropout.kind << 12 | head)
    word = philox_4x32(*counter, seed, step)[j % 4]
    return (word >> 16 * (j // 4) & 0xFFFF) >= threshold(dropout.p)


def test_attention_keep_is_the_documented_function_of_position():
    dropout = make(p=0.3)
    keep = attention_keep(dropout, samples=range(3), heads=range(4), queries=range(70), keys=range(131))
    assert keep.shape == (3, 4, 70, 131)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        b, h, q, k = (int(torch.randint(size, (), generator=generator)) for size in keep.shape)
        assert keep[b, h, q, k] == one_bit(dropout, h, dropout.sample_ids[b].item(), q, k), (b, h, q, k)


def bits(keep):
    """The bits of a row as a hexadecimal number, column 0 first."""
    return [f"{int(''.join(str(int(bit)) for bit in row), 2):x}" for row in keep.reshape(-1, keep.shape[-1])]


# Committed vectors, (seed, step, layer, sample, head, query): they change only if every stored run loses its replay.
ATTENTION_VECTORS = {
    (1234, 5, 3, 7, 0, 0): "b78fb1268c2fc554cc45713c4",
    (1234, 5, 3, 7, 2, 1): "938b4a133263db03ae2c96d13",
    (1234, 5, 23, 7, 2, 1): "9244d8b48f60bc0bb2c0ecf78",
    (1235, 5, 3, 7, 0, 0): "785c002641f1ecd69603001bb",
    (1234, 6, 3, 7, 0, 0): "d2ec9d7965336510215c0e130",
    ((1 << 32) - 1, 0, 65535, (1 << 32) - 1, 31, 2047): "4582c877c9cc9eedc701953ae",
}
# By kind: samples 7 and 8, positions 0 and 1 of each.
RESIDUAL_VECTORS = {
    1: ["ff10862cede1528142", "d141f527686aae0729", "644690224e21ded1ee", "212b4da361a3e56ef0"],
    2: ["78fd0ebf7c15f6b23e", "5bcff185f8fd867462", "db9d7f1e54b4e99514", "1350c171e5794b984e"],
}


@pytest.mark.parametrize(("stream", "expected"), ATTENTION_VECTORS.items())
def test_attention_keep_vectors(stream, expected):
    seed, step, layer, sample, head, query = stream
    dropout = make(seed=seed, step=step, samples=(sample,), layer=layer)
    keep = attention_keep(
        dropout, samples=range(1), heads=range(head, head + 1), queries=range(query, query + 1), keys=range(100)
    )
    assert bits(keep) == [expected]


@pytest.mark.parametrize(("kind", "expected"), RESIDUAL_VECTORS.items())
def test_residual_keep_vectors(kind, expected):
    dropout = make(samples=(7, 8), kind=kind)
    assert bits(residual_keep(dropout, 4, 72)) == expected


def test_masks_do_not_depend_on_how_a_range_is_cut():
    dropout = make(p=0.1)
    whole = attention_keep(dropout, samples=range(3), heads=range(5), queries=range(40), keys=range(200))
    for keys in (range(1), range(63, 65), range(64, 128), range(130, 200), range(7, 7)):
        part = attention_keep(dropout, samples=range(1, 3), heads=range(2, 4), queries=range(11, 30), keys=keys)
        assert torch.equal(part, whole[1:3, 2:4, 11:30, keys.start : keys.stop])
    assert torch.equal(residual_keep(dropout, 9, 300)[:, :77], residual_keep(dropout, 9, 77))
    alone = Dropout(0.1, dropout.rng, dropout.sample_ids[1:2], dropout.layer, dropout.kind)
    assert torch.equal(residual_keep(dropout, 9, 77)[3:6], residual_keep(alone, 3, 77))


def test_packed_documents_have_the_masks_of_the_same_samples_unpacked():
    dropout = make(p=0.2)
    lengths = [5, 70, 1]
    cu_seqlens = torch.tensor([0, 5, 75, 76], dtype=torch.int32)
    packed = packed_attention_keep(dropout, cu_seqlens, n_heads=2, n_rows=76)
    residual = residual_keep(dropout, 76, 40, cu_seqlens=cu_seqlens)
    start = 0
    for number, length in enumerate(lengths):
        rows = slice(start, start + length)
        alone = attention_keep(
            dropout, samples=range(number, number + 1), heads=range(2), queries=range(length), keys=range(length)
        )
        assert torch.equal(packed[:, rows, rows], alone[0])
        sample = Dropout(0.2, dropout.rng, dropout.sample_ids[number : number + 1], dropout.layer, dropout.kind)
        assert torch.equal(residual[rows], residual_keep(sample, length, 40))
        start += length


def test_without_sample_ids_the_number_stands_in():
    named, unnamed = make(samples=(0, 1, 2)), make(samples=None)
    ranges = {"samples": range(3), "heads": range(2), "queries": range(9), "keys": range(65)}
    assert torch.equal(attention_keep(named, **ranges), attention_keep(unnamed, **ranges))
    # One row a sample: position 0, sample id the row's number.
    assert torch.equal(residual_keep(named, 3, 65), residual_keep(unnamed, 3, 65))


def test_every_part_of_the_stream_changes_the_mask():
    base = residual_keep(make(kind=1), 3, 512)
    for change in ({"seed": 1235}, {"step": 6}, {"layer": 4}, {"kind": 2}, {"samples": (8, 9, 10)}):
        other = residual_keep(make(**{"kind": 1} | change), 3, 512)
        agreement = (base == other).float().mean()
        assert 0.4 < agreement < 0.6, (change, agreement)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p):
    keep = residual_keep(make(p=p), 300, 1024)
    kept = keep.double().mean().item()
    n = keep.numel()
    assert kept == pytest.approx(1 - p, abs=5 * (0.25 / n) ** 0.5 + 1e-5)
    assert kept * dropout_scale(p) == pytest.approx(1, rel=0.02)
    # No row and no column of the 64-wide block is favoured: five sigma of the binomial, over 1024 columns.
    columns = keep.double().mean(0)
    assert (columns - (1 - p)).abs().max() <= 5 * (0.25 / 300) ** 0.5 + 1e-5


def test_scale_is_exact_for_the_threshold():
    assert threshold(0.1) == 6554
    assert dropout_scale(0.1) == 65536 / 58982
    assert dropout_scale(0.0) == 1.0
    assert residual_keep(make(p=0.0), 3, 64).all()


def test_fields_round_trip():
    dropout = make()
    again = dropout_from_fields(*dropout_fields(dropout))
    assert torch.equal(residual_keep(dropout, 3, 64), residual_keep(again, 3, 64))
    assert dropout_from_fields(*dropout_fields(None)) is None
    assert dropout_from_fields(*dropout_fields(make(p=0.0))) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": 1.0}, ValueError, r"Dropout: p must be at least 0 and at most 65535/65536; got 1.0"),
        ({"p": -0.1}, ValueError, r"Dropout: p must be at least 0"),
        ({"p": 0.999999}, ValueError, r"Dropout: p must be .*65535/65536; got 0.999999"),
        ({"rng": 7}, TypeError, r"Dropout: rng must be a tensor; got int"),
        ({"rng": torch.zeros(2)}, TypeError, r"Dropout: rng must be int64; got float32"),
        ({"rng": torch.tensor([1, 2, 3])}, ValueError, r"Dropout: rng.shape must be \(2,\).*got \(3,\)"),
        ({"sample_ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"sample_ids must be \[B\].*\(2, 2\)"),
        ({"p": "0.1"}, TypeError, r"Dropout: p must be a number; got '0.1'"),
        ({"layer": 1.5}, TypeError, r"Dropout: layer must be a whole number; got 1.5"),
        ({"p": False}, TypeError, r"Dropout: p must be a number; got False"),
        ({"kind": True}, TypeError, r"Dropout: kind must be a whole number; got True"),
        ({"layer": torch.tensor(1)}, TypeError, r"Dropout: layer must be a whole number; got a tensor of shape \[\]"),
        ({"layer": 65536}, ValueError, r"layer must be 0..65535; got 65536"),
        ({"kind": 16}, ValueError, r"kind must be 0..15; got 16"),
    ],
)
def test_dropout_rejects(change, error, message):
    with pytest.raises(error, match=message):
        Dropout(**{"p": 0.1, "rng": torch.tensor([1, 2])} | change)


def test_masks_trace_under_torch_compile():
    def masks(rng, sample_ids):
        dropout = Dropout(0.1, rng, sample_ids, 2, 1)
        attention = attention_keep(dropout, samples=range(2), heads=range(2), queries=range(5), keys=range(70))
        return attention, residual_keep(dropout, 6, 70)

    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        arguments = torch.tensor([seed, 3]), torch.tensor([4, 5])
        for got, expected in zip(compiled(*arguments), masks(*arguments), strict=True):
            assert torch.equal(got, expected)
