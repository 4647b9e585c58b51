"""layer_norm and add_layer_norm against their references, and what a normalised row is."""

import math
from itertools import pairwise

import pytest
import torch
from kernel_checks import (
    DTYPES,
    assert_matches_reference,
    assert_operator_is_sound,
    kernel_device,
    only,
    outputs_and_gradients,
)

from phi1.kernels import add_layer_norm, backend, layer_norm
from phi1.kernels.core.tiles import table
from phi1.kernels.pointwise.layer_norm import MAX_WIDTH, add_layer_norm_reference, layer_norm_reference

SHAPES = [
    (3, 5, 64),  # more than two axes; 15 rows, no multiple of the rows that a program takes
    (8, 255),  # one below a power of two
    (9, 257),  # one above: another tile
    (5, 2048),  # phi-1's width
    (3, 2560),  # phi-2's width, no power of two
    *only("triton", (1, 1)),  # the smallest
    *only("eager",
          (1, 3),  # the smallest whose dx is not a difference of equal numbers
          (600, 40),  # many rows, where sums over them lose digits
          (17,)),  # one row without a leading axis
]


def make(shape, dtype=torch.float32, device="cpu", residual=False):
    generator = torch.Generator().manual_seed(0)
    width = shape[-1:]
    tensors = {"x": torch.randn(shape, generator=generator) * 2 + 0.5}
    if residual:
        tensors["residual"] = torch.randn(shape, generator=generator)
    tensors["weight"] = torch.randn(width, generator=generator) + 1
    tensors["bias"] = torch.randn(width, generator=generator)
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def roundings(shape):
    # PyTorch's CPU kernel adds up dweight and dbias row after row, in float32: the error grows like the root of N.
    return max(2, math.prod(shape[:-1]) ** 0.5 / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_matches_reference(device, shape, dtype):
    assert_matches_reference(layer_norm, layer_norm_reference, make(shape, dtype, device), roundings=roundings(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layer_norm_matches_reference(device, shape, dtype):
    assert_matches_reference(add_layer_norm, add_layer_norm_reference, make(shape, dtype, device, residual=True),
                             roundings=roundings(shape))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_empty_input_gives_empty_output_and_zero_parameter_gradients(device, shape):
    got = outputs_and_gradients(layer_norm, make(shape, device=device))
    assert got["out0"].shape == got["dx"].shape == shape
    assert not got["dweight"].any()
    assert not got["dbias"].any()


def test_axes_in_another_order_match_reference(device):
    tensors = make((6, 4, 32), device=device, residual=True)
    for name in ("x", "residual"):
        tensors[name] = tensors[name].transpose(0, 1)
    tensors["weight"] = torch.stack([tensors["weight"], tensors["bias"]], dim=1)[:, 0]
    assert_matches_reference(add_layer_norm, add_layer_norm_reference, tensors)
    del tensors["residual"]
    assert_matches_reference(layer_norm, layer_norm_reference, tensors)


def test_parameter_gradients_do_not_lose_digits_over_many_rows():
    # PyTorch's own bfloat16 layer_norm on a CPU is 7 % wrong here: it sums over rows in bfloat16.
    tensors = make((4096, 64), torch.bfloat16)
    got = outputs_and_gradients(layer_norm, tensors)
    exact = outputs_and_gradients(layer_norm_reference, {name: x.double() for name, x in tensors.items()})
    for name in ("dweight", "dbias"):
        assert (got[name] - exact[name]).abs().max() <= exact[name].abs().max() / 256, name


def test_reference_is_pytorchs_layer_norm():
    x, weight, bias = make((6, 100), torch.float64).values()
    torch.testing.assert_close(
        layer_norm_reference(x, weight, bias, 1e-3), torch.nn.functional.layer_norm(x, (100,), weight, bias, 1e-3)
    )


def test_eps_is_used(device):
    tensors = make((4, 32), device=device)
    assert_matches_reference(layer_norm, layer_norm_reference, tensors, eps=0.5)
    assert not torch.allclose(layer_norm(**tensors), layer_norm(**tensors, eps=0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_mean_0_and_variance_1(device, dtype):
    x = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)).mul(30).add(100).to(device, dtype)
    y = layer_norm(x, torch.ones(512, dtype=dtype, device=device), torch.zeros(512, dtype=dtype, device=device))
    assert y.double().mean(-1).abs().max() < 8 * torch.finfo(dtype).eps
    assert (y.double().var(-1, unbiased=False) - 1).abs().max() < 4 * torch.finfo(dtype).eps


def test_neither_scale_nor_shift_of_x_matters(device):
    tensors = make((9, 257), device=device)
    expected = layer_norm(**tensors, eps=1e-12)
    found = layer_norm(**tensors | {"x": tensors["x"] * 16 - 3}, eps=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_width_1_gives_the_bias_and_no_gradient_to_x(device):
    tensors = make((4, 1), device=device)
    got = outputs_and_gradients(layer_norm, tensors)
    torch.testing.assert_close(got["out0"], tensors["bias"].expand(4, 1))
    assert got["dx"].abs().max() < 1e-3  # 1 / sqrt(eps) = 316 multiplies a difference of equal numbers


@pytest.mark.parametrize("used", [0, 1])
def test_add_layer_norm_gives_gradients_where_one_output_is_unused(device, used):
    def one_of(operation):
        return lambda **t: operation(**t)[used] + 0 * t["weight"].sum() + 0 * t["bias"].sum()

    assert_matches_reference(one_of(add_layer_norm), one_of(add_layer_norm_reference),
                             make((6, 32), device=device, residual=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_sound(dtype):
    x, residual, weight, bias = (t.requires_grad_() for t in make((3, 5, 32), dtype, residual=True).values())
    assert_operator_is_sound("layer_norm", (x, weight, bias, 1e-5))
    assert_operator_is_sound("layer_norm", (x.transpose(0, 1), weight, bias, 1e-5))
    assert_operator_is_sound("add_layer_norm", (x, residual, weight, bias, 1e-5))
    with torch.no_grad():
        _, mean, rstd = torch.ops.phi1.layer_norm(x, weight, bias, 1e-5)
        assert_operator_is_sound("layer_norm_backward", (x, x, weight, mean, rstd, None))
        assert_operator_is_sound("layer_norm_backward", (x, x, weight, mean, rstd, residual))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(())}, ValueError, r"x must have a last axis of at least 1; got \[\]"),
    ({"x": torch.zeros(2, 0)}, ValueError, r"x must have a last axis of at least 1; got \[2, 0\]"),
    ({"weight": torch.zeros(4)}, ValueError, r"weight.shape must be \(8,\), the last axis of x \[2, 8\]; got \(4,\)"),
    ({"bias": torch.zeros(8, 1)}, ValueError, r"bias.shape must be \(8,\), the last axis of x \[2, 8\]; got \(8, 1\)"),
    ({"residual": torch.zeros(1, 8)}, ValueError, r"residual.shape must be \(2, 8\), x's; got \(1, 8\)"),
    ({"eps": 0.0}, ValueError, r"eps must be greater than 0; got 0.0"),
    ({"eps": None}, TypeError, r"eps must be a number; got None"),
])
def test_errors(change, error, message):
    arguments = make((2, 8), residual=True) | change
    with pytest.raises(error, match=f"^add_layer_norm: {message}"):
        add_layer_norm(**arguments)
    if "residual" not in change:
        del arguments["residual"]
        with pytest.raises(error, match=f"^layer_norm: {message}"):
            layer_norm(**arguments)


@pytest.mark.skipif(kernel_device() is not None, reason="Triton kernels run here")
def test_triton_backend_says_what_it_needs():
    with pytest.raises(RuntimeError, match="needs a CUDA device, or TRITON_INTERPRET=1"), backend("triton"):
        pass


@pytest.mark.triton
def test_the_widest_row(device):
    assert_matches_reference(layer_norm, layer_norm_reference, make((2, MAX_WIDTH), device=device))


@pytest.mark.triton
def test_too_wide_raises_and_names_the_way_out(device):
    with pytest.raises(NotImplementedError, match=r"at most 8192; got 8193; backend\('reference'\)"):
        layer_norm(**make((1, MAX_WIDTH + 1), device=device))


@pytest.mark.triton
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 40])
def test_partial_sums_take_several_groups_of_rows(monkeypatch, device, rows):
    monkeypatch.setattr("phi1.kernels.pointwise.layer_norm_triton.MAX_PARTIALS", 3)
    assert_matches_reference(layer_norm, layer_norm_reference, make((rows, 24), device=device))


@pytest.mark.triton
def test_partial_sums_are_bitwise_repeatable(monkeypatch, device):
    monkeypatch.setattr("phi1.kernels.pointwise.layer_norm_triton.MAX_PARTIALS", 3)
    first, second = (outputs_and_gradients(layer_norm, make((40, 24), device=device)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.triton
def test_more_partial_sums_than_one_block_of_them_are_added(device):
    assert_matches_reference(layer_norm, layer_norm_reference, make((600, 24), device=device))


def test_every_width_up_to_the_limit_has_a_tile():
    for kernel, rows in table("layer_norm").items():
        ranges = [row["when"]["width"] for row in rows if row["gpu"] == "any"]
        assert ranges[0][0] == 1, kernel
        assert ranges[-1][1] == MAX_WIDTH, kernel
        assert all(low[1] + 1 == high[0] for low, high in pairwise(ranges)), kernel
