"""linear against its reference: bias, gelu_new, dropout and the residual, each with and without the others."""

import itertools

import pytest
import torch
from kernel_checks import DTYPES, assert_compiles_whole, assert_matches_reference, assert_operator_is_sound

from phi1.kernels import Dropout, backend, linear
from phi1.kernels.core.philox import residual_keep
from phi1.kernels.gemm.linear import linear_reference

SHAPES = [  # N, K, M
    (1, 1, 1),  # the smallest
    (6, 33, 65),
    (64, 128, 100),
]
RNG = torch.tensor([5, 7])


def make(shape, dtype=torch.float32, bias=True, residual=False):
    n_rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(n_rows, inputs, generator=generator),
        "weight": torch.randn(outputs, inputs, generator=generator) / inputs**0.5,
        "bias": torch.randn(outputs, generator=generator) if bias else None,
        "residual": torch.randn(n_rows, outputs, generator=generator) if residual else None,
    }
    return {name: x if x is None else x.to(dtype) for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "activation", "dropout", "residual"),
                         [*itertools.product([True, False], ["gelu_new", None], [True, False], [True, False])])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_matches_reference(shape, bias, activation, dropout, residual, dtype):
    assert_matches_reference(linear, linear_reference, make(shape, dtype, bias, residual),
                                     activation=activation,
                                     dropout=Dropout(0.3, RNG, layer=4, kind=1) if dropout else None)


def test_dropout_is_the_mask_of_the_specification():
    dropout = Dropout(0.3, RNG, torch.tensor([6, 1]), kind=2)
    out = linear(torch.ones(10, 1), torch.ones(70, 1), dropout=dropout)
    assert torch.equal(out != 0, residual_keep(dropout, 10, 70))


def test_dropout_spares_the_residual():
    tensors = make((4, 8, 64), residual=True)
    out = linear(**tensors, dropout=Dropout(0.99, RNG))
    assert (out == tensors["residual"]).float().mean() > 0.9


def test_residual_is_not_written_to():
    tensors = make((4, 8, 6), residual=True)
    before = tensors["residual"].clone()
    linear(**tensors)
    assert torch.equal(tensors["residual"], before)


def test_non_contiguous_inputs():
    wide = torch.randn(60, 80).bfloat16()
    tensors = {"x": wide[:12, 20:60], "weight": wide[20:, :50].t(), "bias": wide[0, :50],
               "residual": wide[:50, :12].t()}
    for activation in ("gelu_new", None):
        assert_matches_reference(linear, linear_reference, tensors, activation=activation)


def test_an_expanded_gradient():
    tensors = {name: x.requires_grad_() for name, x in make((6, 5, 4), residual=True).items()}
    linear(**tensors, activation="gelu_new").sum().backward()
    got = {name: x.grad.clone() for name, x in tensors.items()}
    for x in tensors.values():
        x.grad = None
    linear_reference(**tensors, activation="gelu_new").sum().backward()
    for name, x in tensors.items():
        torch.testing.assert_close(got[name], x.grad)


def test_empty_input():
    assert_matches_reference(linear, linear_reference, make((0, 4, 3), residual=True), activation="gelu_new")


def bad(**changes):
    return {**make((4, 8, 6), residual=True), **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(x=None), TypeError, "x must be a tensor"),
    (bad(bias=3), TypeError, "bias must be a tensor; got int"),
    (bad(x=torch.zeros(4, 8).int()), TypeError, "x must be float16, bfloat16 or float32"),
    (bad(weight=torch.zeros(6, 8).half()), TypeError, r"weight must have x's dtype \(float32\)"),
    (bad(residual=torch.zeros(4, 6, device="meta")), ValueError, "residual must be on x's device"),
    (bad(x=torch.zeros(2, 2, 8)), ValueError, r"x must be \[N, K\]"),
    (bad(weight=torch.zeros(8)), ValueError, r"weight must be \[M, K\]"),
    (bad(weight=torch.zeros(8, 6)), ValueError, r"weight.shape must be \(8, 8\), columns as many as x's \[4, 8\]"),
    (bad(bias=torch.zeros(8)), ValueError, r"bias.shape must be \(6,\), one per row of weight \[6, 8\]"),
    (bad(residual=torch.zeros(6)), ValueError, r"residual.shape must be \(4, 6\), the output's"),
    (bad(activation="relu"), ValueError, "activation must be None or \"gelu_new\"; got 'relu'"),
    (bad(dropout=0.1), TypeError, "dropout must be a phi1.kernels.Dropout or None"),
    (bad(dropout=Dropout(0.1, RNG, torch.tensor([1, 2, 3]))), ValueError, "must divide the 4 rows of x evenly"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^linear: .*{match}"):
        linear(**arguments)


def test_reference_backend():
    tensors = make((4, 8, 6))
    with backend("reference"):
        assert torch.equal(linear(**tensors), linear_reference(**tensors))


@pytest.mark.parametrize("gelu", [True, False])
def test_operator_is_sound(gelu):
    x, weight, bias, residual = (t.requires_grad_() for t in make((4, 8, 6), residual=True).values())
    dropout = (0.3, RNG, torch.tensor([1, 2]), 4, 1)
    assert_operator_is_sound("linear", (x, weight, bias, residual, gelu, *dropout))
    assert_operator_is_sound("linear", (x, weight, None, None, gelu, 0.0, None, None, 0, 0))
    out, pre = torch.ops.phi1.linear(x, weight, bias, residual, gelu, *dropout)
    saved = (out.detach(), x.detach(), weight.detach(), pre.detach())
    assert_operator_is_sound("linear_backward", (*saved, True, gelu, *dropout))


def test_compiles_whole():
    assert_compiles_whole(linear, make((4, 8, 6), residual=True), activation="gelu_new",
                                  dropout=Dropout(0.3, RNG))
