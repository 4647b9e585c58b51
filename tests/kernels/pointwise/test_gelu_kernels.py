"""The Triton kernels of gelu: on a GPU, or on CPU tensors in Triton's interpreter (run by test_interpreter.py).

bfloat16 is tested in the interpreter too, since these kernels cast up before any arithmetic.
"""

import pytest
import torch

from phi1 import testing
from phi1.kernels import backend, gelu
from phi1.kernels.pointwise.gelu import gelu_backward, gelu_forward, gelu_reference

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

SHAPES = [
    (1,),  # the smallest
    (3, 5, 7),  # more than two axes
    (2047,),  # one below a program's elements
    (3, 683),  # one above
    (0, 4),
    (),
]


def make(shape, dtype=torch.float32):
    return {"x": (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE, dtype)}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_kernels_match_reference(shape, dtype):
    with backend("triton"):
        testing.assert_matches_reference(gelu, gelu_reference, make(shape, dtype))


def test_the_kernels_ran_and_not_pytorch(monkeypatch):
    from phi1.kernels.pointwise import epilogue_triton

    launched = []
    for name in ("launch_epilogue_forward", "launch_epilogue_backward"):
        launch = getattr(epilogue_triton, name)
        monkeypatch.setattr(
            epilogue_triton, name,
            lambda *a, launch=launch, name=name, **k: launched.append(name) or launch(*a, **k),
        )
    with backend("triton"):
        testing.outputs_and_gradients(gelu, make((4, 32)))
    assert launched == ["launch_epilogue_forward", "launch_epilogue_backward"]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_ends_of_the_number_line(dtype):
    x = torch.tensor([[-60000.0, -300.0, -20.0, 0.0, 20.0, 300.0, 60000.0, torch.nan]], device=DEVICE).to(dtype)
    with backend("triton"):
        y = gelu(x.requires_grad_())
        y.sum().backward()
    assert torch.equal(y[:, :-1], x[:, :-1].clamp(min=0))
    assert x.grad.tolist()[0][:-1] == [0, 0, 0, 0.5, 1, 1, 1]
    assert y.isnan().tolist()[0] == [False] * 7 + [True]


def test_strided_rows_in_and_out():
    wide = torch.randn(9, 90, device=DEVICE)
    x, dy = wide[:, 10:50], wide[:, 45:85]
    testing_columns = torch.full((3, 9, 64), torch.nan, device=DEVICE)
    y, dx, y_again = (columns[:, 20:60] for columns in testing_columns)
    with backend("triton"):
        gelu_forward(x, y)
        gelu_backward(dy, x, dx, y_again)
        testing.assert_matches_reference(gelu, gelu_reference, {"x": wide.t()[::2]})
    leaf = x.detach().clone().requires_grad_()
    expected = gelu_reference(leaf)
    expected.backward(dy)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(y, y_again)
    assert testing_columns[:, :, :20].isnan().all()
    assert testing_columns[:, :, 60:].isnan().all()
