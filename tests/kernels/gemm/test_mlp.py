"""mlp against its reference, and against linear twice."""

import pytest
import torch
from kernel_checks import (
    DTYPES_OF_PRODUCTS,
    assert_matches_reference,
    assert_operator_is_sound,
    empty_is_nan,
    launches,
    only,
    outputs_and_gradients,
)

from phi1.kernels import linear, mlp
from phi1.kernels.core import tiles
from phi1.kernels.gemm.mlp import mlp_reference

SHAPES = [  # N, D, F
    (1, 1, 1),  # the smallest
    (17, 33, 65),  # one over the blocks of rows, twice the width, the columns
    (63, 48, 130),
    *only("eager", (200, 32, 1024)),  # two strips of the CPU's gelu
]
# Small tiles, so that a few rows are several partial sums.
KERNEL, TMA = ({"block_m": 16, "block_n": 64, "block_k": 16, "group_m": 2, "tma": tma, "num_warps": 4,
                "num_stages": 2} for tma in (0, 1))
CUBLAS = {"cublas": 1}
TILES = [pytest.param(tile, marks=pytest.mark.triton, id=name)
         for name, tile in (("tma", TMA), ("cublas", CUBLAS))] + [pytest.param(KERNEL, id="kernel")]


def make(shape, dtype=torch.float32, device="cpu"):
    n_rows, width, inner = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(n_rows, width, generator=generator),
        "w1": torch.randn(inner, width, generator=generator) / max(width, 1) ** 0.5,
        "b1": torch.randn(inner, generator=generator),
        "w2": torch.randn(width, inner, generator=generator) / max(inner, 1) ** 0.5,
        "b2": torch.randn(width, generator=generator),
    }
    return {name: x.to(device, dtype) for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_mlp_matches_reference(device, tile, shape, dtype):
    with tiles.forced("mlp", "dgelu", tile):
        assert_matches_reference(mlp, mlp_reference, make(shape, dtype, device))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
def test_the_tables_own_tiles_match_reference(device, dtype):  # two by three of them
    assert_matches_reference(mlp, mlp_reference, make((130, 64, 260), dtype, device))


@pytest.mark.parametrize("shape", [(0, 5, 8), (5, 0, 8), (5, 8, 0)], ids=str)
def test_empty_inputs_match_reference(device, shape):
    with tiles.forced("mlp", "dgelu", KERNEL):
        assert_matches_reference(mlp, mlp_reference, make(shape, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, *only("eager", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_strided_inputs_match_reference(device, tile, dtype):
    tensors = {name: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2]
               for name, x in make((18, 33, 65), dtype, device).items()}
    with tiles.forced("mlp", "dgelu", tile):
        assert_matches_reference(mlp, mlp_reference, tensors)
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        expanded = torch.autograd.grad(mlp(**leaves).sum(), [*leaves.values()])
        whole = torch.autograd.grad(mlp(**leaves), [*leaves.values()], torch.ones_like(leaves["x"]))
    assert all(torch.equal(a, b) for a, b in zip(expanded, whole, strict=True))


def test_mlp_is_linear_twice(device):
    x, w1, b1, w2, b2 = make((7, 33, 65), device=device).values()
    torch.testing.assert_close(mlp(x, w1, b1, w2, b2), linear(linear(x, w1, b1, activation="gelu_new"), w2, b2))


def test_rows_do_not_meet(device):
    tensors = make((7, 33, 65), device=device)
    before = mlp(**tensors)
    tensors["x"][3] += 1
    changed = (mlp(**tensors) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.triton
@pytest.mark.parametrize(("tile", "programs"), [(KERNEL, 1), (KERNEL, 50), (TMA, 5)], ids=str)
def test_persistent_programs_give_the_same_bits(monkeypatch, device, tile, programs):  # for 4 x 3 tiles
    monkeypatch.setattr("phi1.kernels.gemm.matmul_triton.multiprocessors", lambda device: programs)
    tensors, found = make(SHAPES[2], torch.float16, device), []
    for t in (tile, tile | {"persistent": 1}):
        with tiles.forced("mlp", "dgelu", t), empty_is_nan():
            found.append(outputs_and_gradients(mlp, tensors))
    for name, plain in found[0].items():
        assert torch.equal(found[1][name], plain), name


@pytest.mark.triton
def test_the_kernels_ran_and_not_pytorch(device):
    with tiles.forced("mlp", "dgelu", KERNEL), tiles.forced("linear", "forward", KERNEL | {"parts": 1}), \
            launches() as launched:
        outputs_and_gradients(mlp, make((17, 33, 65), torch.float16, device))
    assert launched[:3] == ["linear_forward_kernel", "linear_forward_kernel", "dgelu_kernel"]


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"x": torch.zeros(8)}, ValueError, r"x must be \[N, D\]"),
    ({"w1": torch.zeros(12)}, ValueError, r"w1 must be \[F, D\]"),
    ({"w1": torch.zeros(12, 9)}, ValueError, r"w1.shape must be \(12, 8\), columns as many as x's \[4, 8\]"),
    ({"b1": torch.zeros(8)}, ValueError, r"b1.shape must be \(12,\), one per row of w1 \[12, 8\]"),
    ({"w2": torch.zeros(12, 8)}, ValueError, r"w2.shape must be \(8, 12\), w1's \[12, 8\] the other way round"),
    ({"b2": torch.zeros(12)}, ValueError, r"b2.shape must be \(8,\), one per row of w2 \[8, 12\]"),
])
def test_errors(change, error, match):
    with pytest.raises(error, match=f"^mlp: .*{match}"):
        mlp(**make((4, 8, 12)) | change)


def test_operator_is_sound():
    tensors = [x.requires_grad_() for x in make((4, 8, 12)).values()]
    assert_operator_is_sound("mlp", tensors)
    out, pre = torch.ops.phi1.mlp(*tensors)
    x, w1, _, w2, _ = (x.detach() for x in tensors)
    assert_operator_is_sound("mlp_backward", (out.detach(), x, w1, w2, pre.detach()))
