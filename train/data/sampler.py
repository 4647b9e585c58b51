"""The order of the training samples: a pure function of seed and position, with no state and no array to keep.

Position p of a run belongs to epoch p // n and takes the sample to which that epoch's permutation sends p % n. The
permutation is a Feistel network on the next power of two, keyed by (seed, epoch); values of n or more go through it
again until they fall below n (cycle walking), which keeps it a permutation of the n samples. All is 64-bit integer
arithmetic, so any machine, number of processes and numpy version gives the same order.

The network and cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002. The mixing function is
the finaliser of SplitMix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8
_LIMIT = 1 << 62


def sample_order(seed: int, first: int, count: int, n_samples: int) -> np.ndarray:
    """Return the samples at the positions first, ..., first + count - 1 of an endless run over shuffled epochs.

    Args:
        seed: key of all the permutations, 0 to 2**64 - 1.
        first: first position, 0 or more; position p lies in epoch p // n_samples.
        count: number of positions.
        n_samples: samples in an epoch.

    Returns:
        int64 [count], each from 0 to n_samples - 1. Each epoch holds every sample once, in its own order. Time and
        memory grow with count alone.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, least, most in (("seed", seed, 0, (1 << 64) - 1), ("first", first, 0, _LIMIT),
                                     ("count", count, 0, _LIMIT), ("n_samples", n_samples, 1, _LIMIT)):
        if not least <= value <= most:
            raise ValueError(f"sample_order: {name} must be from {least} to {most}; got {value}")
    positions = np.arange(first, first + count, dtype=np.uint64)
    epochs, samples = np.divmod(positions, np.uint64(n_samples))
    bits = max(2, (n_samples - 1).bit_length())
    walking = np.arange(count)
    while walking.size:
        samples[walking] = _permute(samples[walking], _epoch_keys(seed, epochs[walking]), bits)
        walking = walking[samples[walking] >= n_samples]
    return samples.astype(np.int64)


def _permute(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """Apply each key's permutation of 0 ... 2**bits - 1 to a value; values, keys uint64 [n]."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for i in range(0, ROUNDS, 2):
        high = high ^ (_mix(low ^ _mix(keys + np.uint64(i))) & high_mask)
        low = low ^ (_mix(high ^ _mix(keys + np.uint64(i + 1))) & low_mask)
    return (high << low_bits) | low


def _epoch_keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    return _mix(epochs ^ _mix(np.full_like(epochs, seed)))


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's step and finaliser: a bijection of 64-bit words in which each input bit affects each output bit."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
