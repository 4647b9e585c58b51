"""gelu against its reference, PyTorch's tanh GELU and the ends of the number line."""

import pytest
import torch

from phi1 import testing
from phi1.kernels import backend, gelu
from phi1.kernels.pointwise.gelu import _constant, gelu_reference

SHAPES = [
    (1,),  # the smallest
    (3, 5, 7),  # more than two axes
    (128, 1024),  # one strip of the CPU path
    (129, 1024),  # one row more
    (2, 70001),  # rows longer than half a strip
]


def make(shape, dtype=torch.float32):
    return {"x": (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_matches_reference(shape, dtype):
    testing.assert_matches_reference(gelu, gelu_reference, make(shape, dtype))


def test_reference_is_pytorchs_tanh_gelu():
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    torch.testing.assert_close(gelu_reference(x), torch.nn.functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_ends_of_the_number_line(dtype):
    x = torch.tensor([[-60000.0, -300.0, -20.0, 0.0, 20.0, 300.0, 60000.0]]).to(dtype).requires_grad_()
    y = gelu(x)
    y.sum().backward()
    assert torch.equal(y, x.clamp(min=0))
    assert torch.equal(x.grad, torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], dtype=dtype))


def test_nan_stays_in_its_place():
    y = gelu(torch.tensor([[1.0, torch.nan, -1.0]]))
    assert y.isnan().tolist() == [[False, True, False]]


def test_the_default_dtype_does_not_matter():
    x = make((128, 64))
    _constant.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        testing.assert_matches_reference(gelu, gelu_reference, x)
    finally:
        torch.set_default_dtype(torch.float32)


def test_non_contiguous_input():
    x = torch.randn(300, 400).bfloat16()
    testing.assert_matches_reference(gelu, gelu_reference, {"x": x[:, 100:333]})
    testing.assert_matches_reference(gelu, gelu_reference, {"x": x.t()[::2]})


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), ()], ids=str)
def test_empty_and_scalar_input(shape):
    testing.assert_matches_reference(gelu, gelu_reference, make(shape))


def test_errors():
    with pytest.raises(TypeError, match=r"^gelu: x must be a tensor; got int"):
        gelu(3)
    with pytest.raises(TypeError, match=r"^gelu: x must be float16, bfloat16 or float32"):
        gelu(torch.zeros(2, dtype=torch.float64))


def test_reference_backend():
    x = make((4, 5))["x"]
    with backend("reference"):
        assert torch.equal(gelu(x), gelu_reference(x))
        assert gelu(x.double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4)], ids=str)
def test_operator_is_sound(shape):
    x = make(shape)["x"].requires_grad_()
    testing.assert_operator_is_sound("gelu", (x,))
    testing.assert_operator_is_sound("gelu_backward", (torch.randn(shape), x.detach()))


def test_compiles_whole():
    testing.assert_compiles_whole(gelu, make((5, 6)))
