"""Counter-based dropout masks: Philox4x32 with 7 rounds, in PyTorch integer arithmetic on any device.

A mask bit depends only on (seed, step, layer, kind, head, sample id, row, column). It does not depend on the rank, the
world size, a tile or the order of calls, so a run can be replayed on another number of GPUs. These functions are the
specification: the Triton kernels match them bit for bit.

    key       (seed, step)
    counter   c0 = (column // 64) * 8 + column % 8
              c1 = row                  attention: the query's position; residual: the row's position in its sample
              c2 = sample id
              c3 = layer << 16 | kind << 12 | head
    value     with j = (column % 64) // 8: 16 bits of word j % 4, the low half for j < 4 and the high half for j >= 4
    keep      value >= round(65536 p); kept elements are scaled by 65536 / (65536 - round(65536 p))

Each word of key and counter is the low 32 bits of its value. One call of the generator gives 8 columns, 8 apart, so a
kernel fills a block of 64 columns from 8 consecutive counters. Philox is from Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011; 7 rounds are the fewest that pass BigCrush in that paper.

B samples, N rows, D width, H heads, Tq queries, Tk keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from phi1.arguments import check_real, check_whole, require
from phi1.kernels.core.checks import check_device, check_dtype, check_rank, check_shape, check_tensors

ROUNDS = 7
COLUMNS_PER_BLOCK = 64
GROUPS_PER_BLOCK = 8
MAX_LAYER, MAX_KIND, MAX_HEADS = 0xFFFF, 0xF, 0x1000

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Word = TypeVar("Word", int, torch.Tensor)


@dataclass(frozen=True, eq=False)
class Dropout:
    """A dropout probability with the counters that make its mask reproducible.

    Args:
        p: probability of dropping an element, at least 0 and at most 65535/65536; used in steps of 1/65536.
        rng: int64 [2] on the inputs' device, (seed, step). It is a tensor so that a compiled step or a CUDA graph
            replays with new values. Only the low 32 bits of each are used.
        sample_ids: int64 [B] on the inputs' device, one number per sample (per document of packed documents). With
            None, attention uses the sample's index in the batch, and other operations use the row's index.
        layer: index of the layer, 0..65535.
        kind: index of the mask in the layer, 0..15: 0 attention, 1 the attention's output projection, 2 the MLP's.

    Raises:
        TypeError: rng or sample_ids is not an int64 tensor, or another field is not a number.
        ValueError: a field is out of its range, or has another shape.
    """

    p: float
    rng: torch.Tensor
    sample_ids: torch.Tensor | None = None
    layer: int = 0
    kind: int = 0

    def __post_init__(self) -> None:
        check_real("Dropout", p=self.p)
        require(0 <= self.p < 1 and threshold(self.p) <= 0xFFFF, "Dropout",
                "p must be at least 0 and at most 65535/65536", self.p)
        check_tensors("Dropout", rng=self.rng)
        check_dtype("Dropout", "rng", self.rng, torch.int64)
        check_shape("Dropout", "rng", self.rng, (2,), "the seed and the step")
        if self.sample_ids is not None:
            check_tensors("Dropout", sample_ids=self.sample_ids)
            check_dtype("Dropout", "sample_ids", self.sample_ids, torch.int64)
            check_rank("Dropout", "sample_ids", self.sample_ids, "B")
            check_device("Dropout", "sample_ids", self.sample_ids, "rng", self.rng)
        check_whole("Dropout", layer=self.layer, kind=self.kind)
        require(0 <= self.layer <= MAX_LAYER, "Dropout", f"layer must be 0..{MAX_LAYER}", self.layer)
        require(0 <= self.kind <= MAX_KIND, "Dropout", f"kind must be 0..{MAX_KIND}", self.kind)


def threshold(p: float) -> int:
    """Return round(65536 p), ties to even. An element is kept if its 16 bits are at least this value."""
    return round(65536 * p)


def dropout_scale(p: float) -> float:
    """Return the factor on kept elements. It preserves the mean exactly, because p counts in steps of 1/65536."""
    return 65536 / (65536 - threshold(p))


def is_active(dropout: Dropout | None) -> bool:
    """True if `dropout` drops anything."""
    return dropout is not None and threshold(dropout.p) > 0


def check_dropout(op: str, dropout: Dropout | None, x: torch.Tensor, n_samples: int | None = None,
                  n_heads: int = 1, name: str = "dropout") -> None:
    """Raise unless `dropout` is None or a Dropout on x's device with one sample id for each of n_samples.

    Without n_samples, the number of sample ids must divide the rows [N, ...] of x.
    """
    if dropout is None:
        return
    if not isinstance(dropout, Dropout):
        raise TypeError(f"{op}: {name} must be a phi1.kernels.Dropout or None; got {type(dropout).__name__}")
    check_device(op, f"{name}.rng", dropout.rng, "x", x)
    require(n_heads <= MAX_HEADS, op, f"{name} masks number at most {MAX_HEADS} heads", n_heads)
    if dropout.sample_ids is None:
        return
    given = dropout.sample_ids.shape[0]
    if n_samples is None:
        require(given > 0 and x.shape[0] % given == 0, op,
                f"{name}.sample_ids must divide the {x.shape[0]} rows of x evenly", f"{given} sample ids")
    else:
        require(given == n_samples, op, f"{name}.sample_ids.shape must be ({n_samples},), one per sample", (given,))


Fields = tuple[float, torch.Tensor | None, torch.Tensor | None, int, int]


def dropout_fields(dropout: Dropout | None) -> Fields:
    """Return (p, rng, sample_ids, layer, kind) as arguments of an operator. Without dropout p is 0."""
    if dropout is None or not is_active(dropout):
        return 0.0, None, None, 0, 0
    return dropout.p, dropout.rng, dropout.sample_ids, dropout.layer, dropout.kind


def dropout_from_fields(
    p: float, rng: torch.Tensor | None, sample_ids: torch.Tensor | None, layer: int, kind: int
) -> Dropout | None:
    """Return the inverse of `dropout_fields`: None if nothing is dropped."""
    return None if rng is None else Dropout(p, rng, sample_ids, layer, kind)


def philox_4x32(
    c0: Word, c1: Word, c2: Word, c3: Word, k0: Word, k1: Word, rounds: int = ROUNDS
) -> tuple[Word, Word, Word, Word]:
    """Philox4x32 of a counter (c0..c3) and a key (k0, k1), all uint32 values held in int64 tensors or Python ints.

    The words' shapes broadcast. A word that does not vary along an axis stays small for two of the rounds.
    An int64 product wraps modulo 2**64, so both of its 32-bit halves are correct.
    """
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ (c1 ^ k0)) & _MASK, product1 & _MASK
        c2, c3 = ((product0 >> 32) ^ (c3 ^ k1)) & _MASK, product0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def attention_keep(
    dropout: Dropout, *, samples: range, heads: range, queries: range, keys: range
) -> torch.Tensor:
    """Return the mask of the attention probabilities: True for those that are kept.

    Args:
        samples: indices into `dropout.sample_ids`, or the sample ids themselves if that is None. A packed document
            counts as a sample.
        heads: head numbers.
        queries, keys: positions within the sample. With a cache, the queries are range(Tk - Tq, Tk). In a left-padded
            batch, positions count from the start of the padded row.

    Returns:
        bool [B, H, Tq, Tk] on rng's device. Smaller ranges give the same bits as the whole mask.
    """
    assert heads.stop <= MAX_HEADS, f"{heads.stop} heads do not fit the counter"
    head, sample, query = (_indices(dropout, r) for r in (heads, samples, queries))
    sample = _sample_id(dropout, sample)
    return _keep(dropout, query.view(-1, 1), sample.view(-1, 1, 1, 1), head.view(-1, 1, 1), keys)


def packed_attention_keep(dropout: Dropout, cu_seqlens: torch.Tensor, n_heads: int, n_rows: int) -> torch.Tensor:
    """Return the mask of the attention probabilities between N packed rows: bool [H, N, N].

    Entry [h, i, j] is the bit of query i and key j at their positions within the document of i. It has a meaning only
    if j is in that document too. No value is read back from the device.
    """
    assert n_heads <= MAX_HEADS, f"{n_heads} heads do not fit the counter"
    document, position = document_positions(cu_seqlens, n_rows)
    sample = _sample_id(dropout, document)
    head = _indices(dropout, range(n_heads))
    keep = _keep(dropout, position.view(-1, 1), sample.view(-1, 1), head.view(-1, 1, 1), range(n_rows))
    return keep.index_select(-1, position)


def residual_keep(
    dropout: Dropout, n_rows: int, width: int, *, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mask of a residual branch: bool [N, D] on rng's device, True for elements that are kept.

    With sample ids [B], N = B * T, and a row's counter is its position in its sample (with cu_seqlens, in its
    document). Without sample ids, a row's counter is its index among the N rows.
    """
    row = _indices(dropout, range(n_rows))
    if dropout.sample_ids is None:
        position, sample = torch.zeros_like(row), row
    elif cu_seqlens is not None:
        document, position = document_positions(cu_seqlens, n_rows)
        sample = dropout.sample_ids[document]
    else:
        n_samples = dropout.sample_ids.numel()
        assert n_rows % max(n_samples, 1) == 0, f"{n_rows} rows are not a whole number for each of {n_samples} samples"
        position = _indices(dropout, range(n_rows // max(n_samples, 1))).view(-1, 1)
        sample = dropout.sample_ids.view(-1, 1, 1)
        head = torch.zeros_like(sample)
        return _keep(dropout, position, sample, head, range(width)).reshape(n_rows, width)
    head = torch.zeros_like(row[:1])
    return _keep(dropout, position.view(-1, 1), sample.view(-1, 1), head.view(-1, 1), range(width))


def document_positions(cu_seqlens: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each packed row's document, and its position in that document: two int64 [N]."""
    starts = cu_seqlens.long()
    row = torch.arange(n_rows, device=cu_seqlens.device)
    document = torch.searchsorted(starts, row, right=True) - 1
    return document, row - starts[document]


def _indices(dropout: Dropout, r: range) -> torch.Tensor:
    assert r.step == 1, f"{r} is not contiguous"
    return torch.arange(r.start, r.stop, device=dropout.rng.device)


def _sample_id(dropout: Dropout, index: torch.Tensor) -> torch.Tensor:
    return index if dropout.sample_ids is None else dropout.sample_ids[index]


def _keep(
    dropout: Dropout, row: torch.Tensor, sample: torch.Tensor, head: torch.Tensor, columns: range
) -> torch.Tensor:
    """Return bool [..., columns] for row, sample and head words [..., 1] that broadcast."""
    first_block, last_block = columns.start // COLUMNS_PER_BLOCK, -(-columns.stop // COLUMNS_PER_BLOCK)
    group = _indices(dropout, range(first_block * GROUPS_PER_BLOCK, last_block * GROUPS_PER_BLOCK))
    stream = dropout.layer << 16 | dropout.kind << 12 | head
    seed, step = (dropout.rng & _MASK).unbind()
    words = philox_4x32(group, row & _MASK, sample & _MASK, stream, seed, step)
    t = threshold(dropout.p)
    low = [(word & 0xFFFF) >= t for word in words]
    high = [word >= t << 16 for word in words]
    # [..., blocks * 8] -> [..., blocks, j, d] -> [..., columns]
    keep = torch.stack([half.unflatten(-1, (-1, GROUPS_PER_BLOCK)) for half in low + high], dim=-2).flatten(-3)
    offset = first_block * COLUMNS_PER_BLOCK
    return keep[..., columns.start - offset : columns.stop - offset]
