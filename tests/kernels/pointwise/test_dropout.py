"""dropout_add against its reference, and its masks against their specification."""

import math

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, assert_operator_is_sound, only

from phi1.kernels import Dropout, dropout_add
from phi1.kernels.core import tiles
from phi1.kernels.core.philox import dropout_scale, residual_keep
from phi1.kernels.pointwise.dropout import dropout_add_reference

SHAPES = [
    (1, 1),  # the smallest
    (6, 63),  # either side of a block of 64 columns
    (8, 65),
    (0, 8),
    *only("eager", (4, 2048)),  # phi-1's width
    *only("triton", (3, 513), (5, 512)),  # either side of a tile: 4 rows, 512 columns
]
SEED = 0xDEADBEEF


def rng(device="cpu", step=7):
    return torch.tensor([SEED, step], device=device)


def make(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name in ("x", "residual")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [None, *only("eager", 0.0), 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_add_matches_reference(device, shape, p, dtype):
    dropout = None if p is None else Dropout(p, rng(device), layer=5, kind=2)
    assert_matches_reference(dropout_add, dropout_add_reference, make(shape, dtype, device), dropout=dropout)


def test_samples_are_named_by_their_ids(device):
    tensors = make((12, 40), device=device)
    dropout = Dropout(0.4, rng(device), torch.tensor([30, 10, 20], device=device))
    assert_matches_reference(dropout_add, dropout_add_reference, tensors, dropout=dropout)
    out = dropout_add(**tensors, dropout=dropout)
    rest = dropout_add(tensors["x"][4:], tensors["residual"][4:], Dropout(0.4, dropout.rng, dropout.sample_ids[1:]))
    assert torch.equal(out[4:], rest)


TILES = [*only("eager", {}), *only("triton", {"rows": 1, "cols": 64, "num_warps": 4},
                                   {"rows": 8, "cols": 256, "num_warps": 4})]


@pytest.mark.parametrize("dtype", [torch.float32, *only("eager", torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("sample_ids", [None, [3], [3, 2**40 + 1], [9, 1, 1, 4, 0, 2**32 - 1]], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_masks_and_scale_are_those_of_the_specification(device, tile, sample_ids, dtype):
    ids = None if sample_ids is None else torch.tensor(sample_ids, device=device)
    dropout = Dropout(0.4, rng(device), ids, layer=0xFFFF, kind=15)
    x = torch.full((12, 200), 3.0, device=device, dtype=dtype, requires_grad=True)
    with tiles.forced("epilogue", "forward", tile), tiles.forced("epilogue", "backward", tile):
        out = dropout_add(x, torch.zeros_like(x), dropout)
        out.sum().backward()
    kept = residual_keep(dropout, 12, 200) * dropout_scale(0.4)
    assert torch.equal(out.detach(), (kept * 3.0).to(dtype))
    assert torch.equal(x.grad, kept.to(dtype))


def test_dropout_keeps_the_mean():
    x = torch.ones(512, 512)
    out = dropout_add(x, torch.zeros_like(x), Dropout(0.3, rng()))
    assert abs(out.mean().item() - 1) < 5 * math.sqrt(0.3 / 0.7 / out.numel())  # 5 standard deviations


def test_what_is_dropped_may_be_nan(device):
    dropout = Dropout(0.5, rng(device))
    x = torch.full((4, 64), torch.nan, device=device)
    assert torch.equal(dropout_add(x, torch.ones_like(x), dropout).isnan(), residual_keep(dropout, 4, 64))


def test_another_step_another_mask(device):
    tensors = make((4, 64), device=device)
    assert not torch.equal(dropout_add(**tensors, dropout=Dropout(0.5, rng(device))),
                           dropout_add(**tensors, dropout=Dropout(0.5, rng(device, step=8))))


@pytest.mark.parametrize("dtype", [torch.float32, *only("eager", torch.bfloat16)], ids=str)
def test_strided_rows_and_columns_match_reference(device, dtype):
    wide = torch.randn(80, 90).to(device, dtype)
    tensors = {"x": wide[:20, 10:60].t(), "residual": wide[::4][:, ::2][:, :20].repeat(3, 1)[:50]}
    shifted = {"x": wide[:, 3:], "residual": wide[:, :-3]}
    for each in (tensors, shifted):
        assert_matches_reference(dropout_add, dropout_add_reference, each, dropout=Dropout(0.2, rng(device)))
    assert dropout_add(tensors["x"], tensors["x"], None).is_contiguous()


@pytest.mark.parametrize(("arguments", "error", "match"), [
    ({"x": torch.zeros(8)}, ValueError, r"x must be \[N, D\]"),
    ({"residual": torch.zeros(4, 9)}, ValueError, r"residual.shape must be \(4, 8\), x's; got \(4, 9\)"),
    ({"dropout": 0.1}, TypeError, "dropout must be a phi1.kernels.Dropout or None; got float"),
    ({"dropout": Dropout(0.1, rng("meta"))}, ValueError, "dropout.rng must be on x's device"),
    ({"dropout": Dropout(0.1, rng(), torch.arange(3))}, ValueError, "divide the 4 rows of x evenly; got 3 sample ids"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^dropout_add: .*{match}"):
        dropout_add(**{**make((4, 8)), "dropout": None, **arguments})


@pytest.mark.parametrize("fields", [(0.3, rng(), torch.tensor([1, 2]), 4, 1), (0.0, None, None, 0, 0)],
                         ids=["0.3", "none"])
def test_operator_is_sound(fields):
    x, residual = (t.requires_grad_() for t in make((4, 8)).values())
    assert_operator_is_sound("dropout_add", (x, residual, *fields))
    assert_operator_is_sound("dropout_add_backward", (x.detach(), *fields))
