"""The Triton kernels of layer_norm: on a GPU, or on CPU tensors in Triton's interpreter (run by test_interpreter.py).

bfloat16 is tested in the interpreter too, since these kernels cast up before any arithmetic.
"""

from itertools import pairwise

import pytest
import torch

from phi1 import testing
from phi1.kernels import add_layer_norm, backend, layer_norm
from phi1.kernels.core.tiles import table
from phi1.kernels.pointwise.layer_norm import MAX_WIDTH, add_layer_norm_reference, layer_norm_reference

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

SHAPES = [
    (1, 1),  # the smallest
    (3, 7, 64),  # 21 rows: not a multiple of the rows a program takes
    (8, 255),  # one below a power of two
    (9, 257),  # one above: another tile
    (5, 2048),  # phi-1's width
    (3, 2560),  # phi-2's width: a mask over the columns
]


def make(shape, dtype, residual=False):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}
    if not residual:
        del shapes["residual"]
    return {name: (torch.randn(s, generator=generator) * 2 + 0.5).to(DEVICE, dtype) for name, s in shapes.items()}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_kernels_match_reference(shape, dtype):
    with backend("triton"):
        testing.assert_matches_reference(layer_norm, layer_norm_reference, make(shape, dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layer_norm_kernels_match_reference(shape, dtype):
    with backend("triton"):
        testing.assert_matches_reference(
            add_layer_norm, add_layer_norm_reference, make(shape, dtype, residual=True)
        )


def test_neither_scale_nor_shift_of_x_matters():
    tensors = make((5, 257), torch.float32)
    with backend("triton"):
        expected = layer_norm(**tensors, eps=1e-12)
        found = layer_norm(**tensors | {"x": tensors["x"] * 16 - 3}, eps=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_widest_row():
    with backend("triton"):
        testing.assert_matches_reference(layer_norm, layer_norm_reference, make((2, MAX_WIDTH), torch.float32))


def test_the_kernels_ran_and_not_pytorch(monkeypatch):
    from phi1.kernels.pointwise import layer_norm_triton

    launched = []
    for name in ("launch_layer_norm_forward", "launch_layer_norm_backward"):
        launch = getattr(layer_norm_triton, name)
        monkeypatch.setattr(
            layer_norm_triton, name, lambda *a, launch=launch, name=name: launched.append(name) or launch(*a)
        )
    with backend("triton"):
        testing.outputs_and_gradients(layer_norm, make((4, 32), torch.float32))
    assert launched == ["launch_layer_norm_forward", "launch_layer_norm_backward"]


def test_non_contiguous_and_empty_inputs():
    tensors = make((6, 4, 32), torch.float32, residual=True)
    strided = tensors | {"x": tensors["x"].transpose(0, 1), "residual": tensors["residual"].transpose(0, 1)}
    strided["weight"] = torch.stack([tensors["weight"], tensors["bias"]], dim=1)[:, 0]
    with backend("triton"):
        testing.assert_matches_reference(add_layer_norm, add_layer_norm_reference, strided)
        got = testing.outputs_and_gradients(layer_norm, make((0, 32), torch.float32))
    assert got["out0"].shape == (0, 32)
    assert not got["dweight"].any()
    assert not got["dbias"].any()


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 40])
def test_partial_sums_take_several_groups_of_rows(monkeypatch, rows):
    monkeypatch.setattr("phi1.kernels.pointwise.layer_norm_triton.MAX_PARTIALS", 3)
    with backend("triton"):
        testing.assert_matches_reference(layer_norm, layer_norm_reference, make((rows, 24), torch.float32))


def test_more_partial_sums_than_one_block_of_them_are_added():
    with backend("triton"):
        testing.assert_matches_reference(layer_norm, layer_norm_reference, make((600, 24), torch.float32))


def test_backward_is_bitwise_repeatable(monkeypatch):
    monkeypatch.setattr("phi1.kernels.pointwise.layer_norm_triton.MAX_PARTIALS", 3)
    tensors = make((40, 24), torch.float32)
    with backend("triton"):
        first, second = (testing.outputs_and_gradients(layer_norm, tensors) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_every_width_up_to_the_limit_has_a_tile():
    for kernel, rows in table("layer_norm").items():
        ranges = [row["when"]["width"] for row in rows if row["gpu"] == "any"]
        assert ranges[0][0] == 1, kernel
        assert ranges[-1][1] == MAX_WIDTH, kernel
        assert all(low[1] + 1 == high[0] for low, high in pairwise(ranges)), kernel


def test_too_wide_raises_and_names_the_way_out():
    with backend("triton"), pytest.raises(NotImplementedError, match=r"at most 8192; got 8193; backend\('reference'\)"):
        layer_norm(**make((1, MAX_WIDTH + 1), torch.float32))
