"""layer_norm and add_layer_norm on the PyTorch path. Their kernels: test_layer_norm_kernels.py."""

import math

import pytest
import torch
from kernel_checks import (
    DTYPES,
    assert_compiles_whole,
    assert_matches_reference,
    assert_operator_is_sound,
    kernel_device,
    outputs_and_gradients,
)

from phi1.kernels import add_layer_norm, backend, layer_norm
from phi1.kernels.pointwise.layer_norm import add_layer_norm_reference, layer_norm_reference

SHAPES = [
    (1, 3),  # the smallest whose dx is not a difference of equal numbers
    (3, 7, 64),  # more than two axes
    (5, 255),  # one below a power of two
    (5, 257),  # one above
    (33, 2048),  # phi-1's width
    (4, 2560),  # phi-2's width, no power of two
    (600, 40),  # many rows, where sums over them lose digits
    (17,),  # one row without a leading axis
]


def make(shape, dtype, residual=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1:]
    tensors = {"x": torch.randn(shape, generator=generator) * 2 + 0.5}
    if residual:
        tensors["residual"] = torch.randn(shape, generator=generator)
    tensors["weight"] = torch.randn(width, generator=generator) + 1
    tensors["bias"] = torch.randn(width, generator=generator)
    return {name: x.to(dtype) for name, x in tensors.items()}


def roundings(shape):
    # PyTorch's CPU kernel adds up dweight and dbias row after row, in float32: the error grows like the root of N.
    return max(2, math.prod(shape[:-1]) ** 0.5 / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_matches_reference(shape, dtype):
    assert_matches_reference(
        layer_norm, layer_norm_reference, make(shape, dtype), roundings=roundings(shape)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layer_norm_matches_reference(shape, dtype):
    assert_matches_reference(
        add_layer_norm, add_layer_norm_reference, make(shape, dtype, residual=True), roundings=roundings(shape)
    )


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


def test_eps_is_used():
    tensors = make((4, 32), torch.float32)
    assert_matches_reference(layer_norm, layer_norm_reference, tensors, eps=0.5)
    assert not torch.allclose(layer_norm(**tensors), layer_norm(**tensors, eps=0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_mean_0_and_variance_1(dtype):
    torch.manual_seed(0)
    x = torch.randn(50, 512).mul(30).add(100).to(dtype)
    y = layer_norm(x, torch.ones(512, dtype=dtype), torch.zeros(512, dtype=dtype)).double()
    assert y.mean(-1).abs().max() < 8 * torch.finfo(dtype).eps
    assert (y.var(-1, unbiased=False) - 1).abs().max() < 4 * torch.finfo(dtype).eps


def test_neither_scale_nor_shift_of_x_matters():
    tensors = make((20, 256), torch.float32)
    expected = layer_norm(**tensors, eps=1e-12)
    found = layer_norm(**tensors | {"x": tensors["x"] * 16 - 3}, eps=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 40)[::2].transpose(0, 1)
    tensors = {"x": x, "residual": torch.randn(40, 32, 3).permute(2, 1, 0),
               "weight": torch.randn(80)[::2], "bias": torch.randn(1).expand(40)}
    assert_matches_reference(add_layer_norm, add_layer_norm_reference, tensors)
    del tensors["residual"]
    assert_matches_reference(layer_norm, layer_norm_reference, tensors)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_empty_input_gives_empty_output_and_zero_parameter_gradients(shape):
    got = outputs_and_gradients(layer_norm, make(shape, torch.float32))
    assert got["out0"].shape == got["dx"].shape == shape
    assert not got["dweight"].any()
    assert not got["dbias"].any()
    assert_matches_reference(
        add_layer_norm, add_layer_norm_reference, make(shape, torch.float32, residual=True)
    )


def test_width_1_gives_the_bias_and_no_gradient_to_x():
    got = outputs_and_gradients(layer_norm, make((4, 1), torch.float32))
    bias = make((4, 1), torch.float32)["bias"]
    torch.testing.assert_close(got["out0"], bias.expand(4, 1))
    assert got["dx"].abs().max() < 1e-3  # 1 / sqrt(eps) = 316 multiplies a difference of equal numbers


def test_add_layer_norm_gives_gradients_where_one_output_is_unused():
    tensors = make((6, 32), torch.float32, residual=True)
    for used in (0, 1):
        assert_matches_reference(
            lambda used=used, **t: add_layer_norm(**t)[used] + 0 * t["weight"].sum() + 0 * t["bias"].sum(),
            lambda used=used, **t: add_layer_norm_reference(**t)[used] + 0 * t["weight"].sum() + 0 * t["bias"].sum(),
            tensors,
        )


def test_backend_reference_calls_the_reference():
    tensors = make((4, 32), torch.float64, residual=True)
    with backend("reference"):
        h, y = add_layer_norm(**tensors)
    assert torch.equal(h, tensors["x"] + tensors["residual"])
    assert torch.equal(y, layer_norm_reference(h, tensors["weight"], tensors["bias"]))


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


def test_compiles_without_a_graph_break():
    assert_compiles_whole(layer_norm, make((3, 5, 32), torch.float32))
    assert_compiles_whole(add_layer_norm, make((3, 5, 32), torch.float32, residual=True))


def changed(**changes):
    return make((2, 8), torch.float32, residual=True) | changes


ERRORS = [
    ({"x": [1.0]}, TypeError, r"add_layer_norm: x must be a tensor; got list"),
    ({"weight": None}, TypeError, r"add_layer_norm: weight must be a tensor; got NoneType"),
    ({"x": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, r"x must be float16, bfloat16 or float32 .*; got int32"),
    ({"x": torch.zeros(2, 8).double()}, TypeError, r"\(float64 inside backend\('reference'\)\); got float64"),
    ({"bias": torch.zeros(8).half()}, TypeError, r"bias must have x's dtype \(float32\); got float16"),
    ({"residual": torch.zeros(2, 8).half()}, TypeError, r"residual must have x's dtype \(float32\); got float16"),
    ({"residual": 1.0}, TypeError, r"residual must be a tensor; got float"),
    ({"residual": torch.zeros(2, 8, device="meta")}, ValueError, r"residual must be on x's device \(cpu\); got meta"),
    ({"bias": torch.zeros(8, device="meta")}, ValueError, r"bias must be on x's device \(cpu\); got meta"),
    ({"x": torch.zeros(())}, ValueError, r"x must have a last axis of at least 1; got \[\]"),
    ({"x": torch.zeros(2, 0)}, ValueError, r"x must have a last axis of at least 1; got \[2, 0\]"),
    ({"weight": torch.zeros(4)}, ValueError,
     r"add_layer_norm: weight.shape must be \(8,\), the last axis of x \[2, 8\]; got \(4,\)"),
    ({"bias": torch.zeros(8, 1)}, ValueError, r"bias.shape must be \(8,\), the last axis of x \[2, 8\]; got \(8, 1\)"),
    ({"residual": torch.zeros(1, 8)}, ValueError, r"residual.shape must be \(2, 8\), x's; got \(1, 8\)"),
    ({"weight": torch.zeros(8, device="meta")}, ValueError, r"weight must be on x's device \(cpu\); got meta"),
    ({"eps": 0.0}, ValueError, r"eps must be greater than 0; got 0.0"),
    ({"eps": None}, TypeError, r"eps must be a number; got None"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[row[2][:40] for row in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        add_layer_norm(**changed(**change))
    if "residual" not in change:
        arguments = changed(**change)
        del arguments["residual"]
        with pytest.raises(error, match=message.replace("add_layer_norm", "layer_norm")):
            layer_norm(**arguments)


def test_triton_backend_says_what_it_needs():
    if kernel_device() is not None:
        pytest.skip("Triton kernels run here")
    with pytest.raises(RuntimeError, match="needs a CUDA device, or TRITON_INTERPRET=1"), backend("triton"):
        pass
