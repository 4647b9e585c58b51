"""dropout_add against its reference, and its masks against their specification."""

import math

import pytest
import torch
from kernel_checks import DTYPES, assert_compiles_whole, assert_matches_reference, assert_operator_is_sound

from phi1.kernels import Dropout, backend, dropout_add
from phi1.kernels.core.philox import dropout_scale, residual_keep
from phi1.kernels.pointwise.dropout import dropout_add_reference

SHAPES = [(1, 1), (6, 63), (8, 65), (4, 2048)]  # the smallest; either side of a block of 64 columns; phi-1's width
RNG = torch.tensor([5, 7])


def make(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in ("x", "residual")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [None, Dropout(0.0, RNG), Dropout(0.1, RNG, layer=5, kind=2)],
                         ids=["none", "0", "0.1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_add_matches_reference(shape, dropout, dtype):
    assert_matches_reference(dropout_add, dropout_add_reference, make(shape, dtype), dropout=dropout)


def test_samples_are_named_by_their_ids():
    tensors = make((12, 40))
    dropout = Dropout(0.4, RNG, torch.tensor([30, 10, 20]))
    assert_matches_reference(dropout_add, dropout_add_reference, tensors, dropout=dropout)
    out = dropout_add(**tensors, dropout=dropout)
    other_order = Dropout(0.4, RNG, torch.tensor([10, 20]))
    rest = dropout_add(tensors["x"][4:], tensors["residual"][4:], other_order)
    assert torch.equal(out[4:], rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_scale_are_those_of_the_specification(dtype):
    dropout = Dropout(0.25, RNG, torch.tensor([3, 1]), layer=2, kind=1)
    x = torch.full((10, 70), 3.0, dtype=dtype, requires_grad=True)
    out = dropout_add(x, torch.zeros(10, 70, dtype=dtype), dropout)
    keep = residual_keep(dropout, 10, 70)
    assert torch.equal(out, (keep * 3.0 * dropout_scale(0.25)).to(dtype))
    out.sum().backward()
    assert torch.equal(x.grad, (keep * dropout_scale(0.25)).to(dtype))


def test_dropout_keeps_the_mean():
    x = torch.ones(512, 512)
    out = dropout_add(x, torch.zeros_like(x), Dropout(0.3, RNG))
    assert abs(out.mean().item() - 1) < 5 * math.sqrt(0.3 / 0.7 / out.numel())  # 5 standard deviations


def test_what_is_dropped_may_be_nan():
    dropout = Dropout(0.5, RNG)
    keep = residual_keep(dropout, 4, 64)
    x = torch.full((4, 64), torch.nan)
    assert torch.equal(dropout_add(x, torch.ones(4, 64), dropout).isnan(), keep)


def test_another_step_another_mask():
    tensors = make((4, 64))
    assert not torch.equal(dropout_add(**tensors, dropout=Dropout(0.5, RNG)),
                           dropout_add(**tensors, dropout=Dropout(0.5, RNG + torch.tensor([0, 1]))))


def test_non_contiguous_inputs():
    wide = torch.randn(80, 90).bfloat16()
    tensors = {"x": wide[:20, 10:60].t(), "residual": wide[::4][:, ::2][:, :20].repeat(3, 1)[:50]}
    assert_matches_reference(dropout_add, dropout_add_reference, tensors, dropout=Dropout(0.2, RNG))
    assert dropout_add(tensors["x"], tensors["x"], None).is_contiguous()


def test_empty_input():
    assert_matches_reference(dropout_add, dropout_add_reference, make((0, 8)), dropout=Dropout(0.2, RNG))


@pytest.mark.parametrize(("arguments", "error", "match"), [
    ({"x": None}, TypeError, "x must be a tensor"),
    ({"residual": None}, TypeError, "residual must be a tensor"),
    ({"residual": torch.zeros(4, 8, device="meta")}, ValueError, "residual must be on x's device"),
    ({"x": torch.zeros(4, 8).int()}, TypeError, "x must be float16, bfloat16 or float32"),
    ({"residual": torch.zeros(4, 8).half()}, TypeError, "residual must have x's dtype"),
    ({"x": torch.zeros(8)}, ValueError, r"x must be \[N, D\]"),
    ({"residual": torch.zeros(4, 9)}, ValueError, r"residual.shape must be \(4, 8\), x's; got \(4, 9\)"),
    ({"dropout": 0.1}, TypeError, "dropout must be a phi1.kernels.Dropout or None; got float"),
    ({"dropout": Dropout(0.1, RNG.to("meta"))}, ValueError, "dropout.rng must be on x's device"),
    ({"dropout": Dropout(0.1, RNG, torch.arange(3))}, ValueError, "divide the 4 rows of x evenly; got 3 sample ids"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^dropout_add: .*{match}"):
        dropout_add(**{**make((4, 8)), "dropout": None, **arguments})


def test_reference_backend():
    tensors = make((4, 8))
    with backend("reference"):
        assert dropout_add(tensors["x"].double(), tensors["residual"].double(), None).dtype == torch.float64


@pytest.mark.parametrize("fields", [(0.3, RNG, torch.tensor([1, 2]), 4, 1), (0.0, None, None, 0, 0)],
                         ids=["0.3", "none"])
def test_operator_is_sound(fields):
    x, residual = (t.requires_grad_() for t in make((4, 8)).values())
    assert_operator_is_sound("dropout_add", (x, residual, *fields))
    assert_operator_is_sound("dropout_add_backward", (x.detach(), *fields))


def test_compiles_whole():
    assert_compiles_whole(dropout_add, make((4, 8)), dropout=Dropout(0.3, RNG))
