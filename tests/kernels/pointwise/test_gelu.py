"""gelu against its reference, PyTorch's tanh GELU and the ends of the number line."""

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, assert_operator_is_sound, only

from phi1.kernels import gelu
from phi1.kernels.pointwise.gelu import _constant, gelu_backward, gelu_forward, gelu_reference

SHAPES = [
    (1,),  # the smallest
    (3, 5, 7),  # more than two axes
    (2047,),  # one below the elements of a program
    (3, 683),  # one above
    (0,),
    (4, 0),
    (),
    *only("eager",
          (128, 1024),  # one strip of the CPU path
          (129, 1024),  # one row more
          (2, 70001)),  # rows longer than half a strip
]


def make(shape, dtype=torch.float32, device="cpu"):
    return {"x": (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(device, dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_matches_reference(device, shape, dtype):
    assert_matches_reference(gelu, gelu_reference, make(shape, dtype, device))


def test_reference_is_pytorchs_tanh_gelu():
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    torch.testing.assert_close(gelu_reference(x), torch.nn.functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_of_the_number_line(device, dtype):
    x = torch.tensor([[-60000.0, -300.0, -20.0, 0.0, 20.0, 300.0, 60000.0, torch.nan]], device=device).to(dtype)
    y = gelu(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y[:, :-1], x[:, :-1].clamp(min=0))
    assert x.grad.tolist()[0][:-1] == [0, 0, 0, 0.5, 1, 1, 1]
    assert y.isnan().tolist()[0] == [False] * 7 + [True]


def test_the_default_dtype_does_not_matter():
    x = make((128, 64))
    _constant.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_matches_reference(gelu, gelu_reference, x)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *only("eager", torch.bfloat16)], ids=str)
def test_strided_rows_match_reference(device, dtype):
    x = torch.randn(60, 50).to(device, dtype)
    assert_matches_reference(gelu, gelu_reference, {"x": x[:, 10:43]})
    assert_matches_reference(gelu, gelu_reference, {"x": x.t()[::2]})


def test_strided_rows_are_written_and_nothing_beside_them(device):
    wide = torch.randn(9, 90, device=device)
    x, dy = wide[:, 10:50], wide[:, 45:85]
    columns = torch.full((3, 9, 64), torch.nan, device=device)
    y, dx, y_again = columns[:, :, 20:60]
    gelu_forward(x, y)
    gelu_backward(dy, x, dx, y_again)
    leaf = x.detach().clone().requires_grad_()
    expected = gelu_reference(leaf)
    expected.backward(dy)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(y, y_again)
    assert columns[:, :, :20].isnan().all()
    assert columns[:, :, 60:].isnan().all()


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4)], ids=str)
def test_operator_is_sound(shape):
    x = make(shape)["x"].requires_grad_()
    assert_operator_is_sound("gelu", (x,))
    assert_operator_is_sound("gelu_backward", (torch.randn(shape), x.detach()))
