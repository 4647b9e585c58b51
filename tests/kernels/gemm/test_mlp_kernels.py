"""The Triton kernels of mlp: on a GPU, or on CPU tensors in Triton's interpreter (run by test_interpreter.py).

bfloat16 products are tested on a GPU only: the interpreter multiplies their raw bits.
"""

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, empty_is_nan, kernel_device, outputs_and_gradients

from phi1.kernels import backend, mlp
from phi1.kernels.core import tiles
from phi1.kernels.gemm.mlp import mlp_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]
# Small tiles, so that a few rows are several partial sums.
TILES = [{"block_m": 16, "block_n": 64, "block_k": 16, "group_m": 2, "tma": tma, "num_warps": 4, "num_stages": 2}
         for tma in (0, 1)] + [{"cublas": 1}]
SHAPES = [  # N, D, F
    (1, 1, 1),  # the smallest
    (17, 33, 65),  # one over the blocks of rows, twice the width, the columns
    (63, 48, 130),
]


def make(shape, dtype=torch.float32):
    n_rows, width, inner = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(n_rows, width, generator=generator),
        "w1": torch.randn(inner, width, generator=generator) / max(width, 1) ** 0.5,
        "b1": torch.randn(inner, generator=generator),
        "w2": torch.randn(width, inner, generator=generator) / max(inner, 1) ** 0.5,
        "b2": torch.randn(width, generator=generator),
    }
    return {name: x.to(DEVICE, dtype) for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=["kernel", "tma", "cublas"])
def test_mlp_kernels_match_reference(tile, shape, dtype):
    with backend("triton"), tiles.forced("mlp", "dgelu", tile):
        assert_matches_reference(mlp, mlp_reference, make(shape, dtype))


@pytest.mark.parametrize(("tile", "programs"), [(TILES[0], 1), (TILES[0], 50), (TILES[1], 5)], ids=str)
def test_persistent_programs_give_the_same_bits(monkeypatch, tile, programs):  # for 4 x 3 tiles
    monkeypatch.setattr("phi1.kernels.gemm.matmul_triton.multiprocessors", lambda device: programs)
    tensors = make(SHAPES[-1], torch.float16)
    found = []
    for t in (tile, tile | {"persistent": 1}):
        with backend("triton"), tiles.forced("mlp", "dgelu", t), empty_is_nan():
            found.append(outputs_and_gradients(mlp, tensors))
    for name, plain in found[0].items():
        assert torch.equal(found[1][name], plain), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tables_own_tiles(dtype):  # two by three of them
    with backend("triton"):
        assert_matches_reference(mlp, mlp_reference, make((130, 64, 260), dtype))


def test_the_kernels_ran_and_not_pytorch(monkeypatch):
    from phi1.kernels.gemm import linear_triton, mlp_triton

    launched = []
    for module, name in ((linear_triton, "linear_forward_kernel"), (mlp_triton, "dgelu_kernel")):
        kernel = getattr(module, name)

        class Counted:
            def __getitem__(self, grid, kernel=kernel, name=name):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Counted())
    with backend("triton"), tiles.forced("mlp", "dgelu", TILES[0]):
        outputs_and_gradients(mlp, make((17, 33, 65), torch.float16))
    assert launched == ["linear_forward_kernel", "linear_forward_kernel", "dgelu_kernel"]


@pytest.mark.parametrize("tile", TILES, ids=["kernel", "tma", "cublas"])
def test_non_contiguous_inputs(tile):
    tensors = {name: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2]
               for name, x in make((18, 33, 65), torch.float16).items()}
    with backend("triton"), tiles.forced("mlp", "dgelu", tile):
        assert_matches_reference(mlp, mlp_reference, tensors)
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        expanded = torch.autograd.grad(mlp(**leaves).sum(), [*leaves.values()])
        whole = torch.autograd.grad(mlp(**leaves), [*leaves.values()], torch.ones_like(leaves["x"]))
    assert all(torch.equal(a, b) for a, b in zip(expanded, whole, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 8), (5, 0, 8), (5, 8, 0)], ids=str)
def test_empty_inputs(shape):
    with backend("triton"), tiles.forced("mlp", "dgelu", TILES[0]):
        assert_matches_reference(mlp, mlp_reference, make(shape))


def test_gradients_are_bitwise_repeatable():
    tensors = make((63, 48, 130), torch.float16)
    with backend("triton"), tiles.forced("mlp", "dgelu", TILES[0]):
        first, second = (outputs_and_gradients(mlp, tensors) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
