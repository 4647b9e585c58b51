"""The order of samples: every epoch is a permutation, which follows from its number alone."""

import time

import numpy as np
import pytest

from phi1.train.data.sampler import sample_order

hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

PINNED = [
    [7, 8, 2, 6, 9, 3, 0, 4],
    [1185601, 2286729, 360471, 2208843],
    [768954621098, 329186583533, 1048176090178, 336792607794],
]


@hypothesis.given(st.integers(0, 2**64 - 1), st.integers(1, 300), st.integers(0, 10**9))
@hypothesis.settings(max_examples=200, deadline=None)
def test_each_epoch_is_a_permutation(seed, n, epoch):
    order = sample_order(seed, epoch * n, n, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@hypothesis.given(st.integers(0, 2**64 - 1), st.integers(1, 5000), st.integers(0, 10**12),
       st.lists(st.integers(0, 200), max_size=5))
@hypothesis.settings(max_examples=100, deadline=None)
def test_pieces_join_to_the_whole(seed, n, first, counts):
    """No state: however a run is cut, and whoever asks, the order is the same."""
    pieces, at = [np.empty(0, np.int64)], first
    for count in counts:
        pieces.append(sample_order(seed, at, count, n))
        at += count
    assert np.array_equal(np.concatenate(pieces), sample_order(seed, first, sum(counts), n))


def test_epochs_and_seeds_differ():
    n = 1000
    orders = [sample_order(seed, epoch * n, n, n) for seed in (0, 1, 2**63) for epoch in range(20)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 15  # two random permutations agree in 1 place on average


def test_order_is_uniform():
    """Each sample is equally likely at each place, over epochs: chi-square with 15 degrees of freedom a place."""
    for n in (2, 3, 5, 16):
        epochs = 4000
        orders = sample_order(7, 0, epochs * n, n).reshape(epochs, n)
        for place in range(n):
            counts = np.bincount(orders[:, place], minlength=n)
            assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 3 * n + 25
        followers = np.bincount(orders[:, 0] * n + orders[:, 1], minlength=n * n)
        assert (followers > 0).sum() == n * (n - 1)  # every ordered pair begins some epoch


def test_order_keeps_its_values():
    """A run must replay with a later version: these values never change."""
    assert sample_order(0, 0, 8, 10).tolist() == PINNED[0]
    assert sample_order(1234, 10**12, 4, 3_420_000).tolist() == PINNED[1]
    assert sample_order(2**64 - 1, 5, 4, 1 << 40).tolist() == PINNED[2]


def test_order_costs_nothing_at_any_position():
    for first in (0, 10**12, 10**18):
        start = time.process_time()
        assert np.unique(sample_order(3, first, 1024, 10**9)).size == 1024
        assert time.process_time() - start < 1.0


@pytest.mark.parametrize(("arguments", "name"), [
    ((-1, 0, 1, 1), "seed"), ((2**64, 0, 1, 1), "seed"), ((0, -1, 1, 1), "first"), ((0, 0, -1, 1), "count"),
    ((0, 0, 1, 0), "n_samples"),
])
def test_order_names_an_argument_out_of_range(arguments, name):
    with pytest.raises(ValueError, match=f"sample_order: {name} must be from"):
        sample_order(*arguments)
