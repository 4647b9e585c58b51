"""The Triton kernel of linear: on a GPU, or on CPU tensors in Triton's interpreter (run by test_interpreter.py).

bfloat16 products are tested on a GPU only: the interpreter multiplies their raw bits.
"""

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, empty_is_nan, kernel_device, outputs_and_gradients

from phi1.kernels import Dropout, backend, linear
from phi1.kernels.core import tiles
from phi1.kernels.core.philox import residual_keep
from phi1.kernels.gemm.linear import linear_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]
# Small tiles, so that a few rows are several groups of tiles. The columns whole, in halves, by TMA, in quarters.
TILES = [{"block_m": 16, "block_n": n, "block_k": 16, "group_m": 2, "parts": parts, "tma": tma, "num_warps": 4,
          "num_stages": 2} for n, parts, tma in ((64, 1, 0), (128, 2, 0), (128, 2, 1), (256, 4, 0))]
SHAPES = [  # N, K, M
    (1, 1, 1),  # the smallest
    (17, 33, 65),  # one over the blocks of rows, twice the inputs, the columns
    (63, 48, 130),  # whole blocks of inputs; 4 x 3 tiles in groups of 2 rows
]
EPILOGUES = {  # bias, activation, residual, dropout
    "nothing": (False, None, False, False),
    "bias": (True, None, False, False),
    "bias, gelu_new": (True, "gelu_new", False, False),
    "bias, residual": (True, None, True, False),
    "bias, dropout, residual": (True, None, True, True),
    "all": (True, "gelu_new", True, True),
}
RNG = torch.tensor([5, 7], device=DEVICE)


def make(shape, dtype=torch.float32, bias=True, residual=False):
    n_rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(n_rows, inputs, generator=generator),
        "weight": torch.randn(outputs, inputs, generator=generator) / max(inputs, 1) ** 0.5,
        "bias": torch.randn(outputs, generator=generator) if bias else None,
        "residual": torch.randn(n_rows, outputs, generator=generator) if residual else None,
    }
    return {name: x if x is None else x.to(DEVICE, dtype) for name, x in tensors.items()}


def assert_matches(tensors, tile, **options):
    with backend("triton"), tiles.forced("linear", "forward", tile):
        assert_matches_reference(linear, linear_reference, tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_kernel_matches_reference(shape, epilogue, dtype):
    bias, activation, residual, dropout = EPILOGUES[epilogue]
    assert_matches(make(shape, dtype, bias, residual), TILES[1], activation=activation,
                   dropout=Dropout(0.3, RNG, layer=4, kind=1) if dropout else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["nothing", "bias", "bias, dropout, residual", "all"])
@pytest.mark.parametrize("tile", [TILES[0], *TILES[2:], {"cublas": 1}], ids=["whole", "tma", "quarters", "cublas"])
def test_other_tiles_match_reference(tile, epilogue, dtype):
    shape = SHAPES[-1]
    bias, activation, residual, dropout = EPILOGUES[epilogue]
    assert_matches(make(shape, dtype, bias, residual), tile, activation=activation,
                   dropout=Dropout(0.3, RNG, layer=4, kind=1) if dropout else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tables_own_tile(dtype):
    with backend("triton"):
        assert_matches_reference(linear, linear_reference, make((130, 70, 260), dtype, residual=True),
                                         activation="gelu_new", dropout=Dropout(0.3, RNG))


@pytest.mark.parametrize("tile", TILES, ids=["whole", "halves", "tma", "quarters"])
def test_bits_are_those_of_the_specification(tile):
    dropout = Dropout(0.3, RNG, torch.tensor([6, 2**33 + 1], device=DEVICE), layer=40000, kind=2)
    x, weight = torch.ones(34, 1, device=DEVICE), torch.ones(200, 1, device=DEVICE)
    with backend("triton"), tiles.forced("linear", "forward", tile):
        out = linear(x, weight, dropout=dropout)
    assert torch.equal(out != 0, residual_keep(dropout, 34, 200))


@pytest.mark.parametrize("tile", TILES[1:3], ids=["halves", "tma"])
def test_persistent_programs_give_the_same_bits(monkeypatch, tile):
    from phi1.kernels.gemm import matmul_triton

    x, weight, bias, residual = make((40, 48, 300), torch.float16, residual=True).values()
    found, grids = [], []
    for programs in (None, 1, 4, 50):  # a program a tile; one for all 3 x 3; up to three tiles each; more than tiles
        monkeypatch.setattr(matmul_triton, "multiprocessors", lambda device, n=programs: n)
        t = tile if programs is None else tile | {"persistent": 1}
        grids.append(matmul_triton.n_programs(t, 40, 300, x.device))
        with backend("triton"), tiles.forced("linear", "forward", t), empty_is_nan():
            found.append(torch.ops.phi1.linear(x, weight, bias, residual, True, 0.3, RNG, None, 4, 1))
    assert grids == [9, 1, 4, 9]
    for out, pre in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(pre, found[0][1])


def test_what_tma_takes():
    from phi1.kernels.gemm.tma_triton import describable

    x, weight, *_ = make(SHAPES[-1], torch.float16).values()
    assert describable(x, weight)
    refused = {"columns first": x.t(), "unaligned rows": x[:, :33].contiguous(), "unaligned memory": x[:, 1:],
               "one row": x[:1].expand(9, -1), "empty": x[:0]}
    for name, operand in refused.items():
        assert not describable(operand, weight), name


def test_rows_too_far_apart_raise():
    from phi1.kernels.gemm.matmul_triton import check_rows

    x, far = torch.zeros(2, 8), torch.empty_strided((2, 4), (2**28, 1), device="meta")
    with pytest.raises(NotImplementedError, match=r"^linear: a row may be at most 16777215 elements from the next"):
        check_rows("linear", 128, x, None, far)


def test_gelu_is_taken_of_what_is_saved():
    tensors = make((17, 33, 65), torch.float16)
    with backend("triton"), tiles.forced("linear", "forward", TILES[0]):
        out, pre = torch.ops.phi1.linear(*tensors.values(), True, 0.0, None, None, 0, 0)
        again = torch.ops.phi1.gelu(pre)
    assert torch.equal(out, again)


@pytest.mark.parametrize("tile", [TILES[0], {"cublas": 1}], ids=["kernel", "cublas"])
def test_strided_inputs_and_an_expanded_gradient(tile):
    wide = torch.randn(60, 80, device=DEVICE)
    tensors = {"x": wide[:12, 20:60], "weight": wide[20:, :20].t(), "bias": wide[:20, 7],
               "residual": wide[:20, :12].t()}
    assert_matches(tensors, tile, activation="gelu_new")
    assert_matches(tensors | {"x": wide[::5, ::2], "weight": wide[:40:2, ::2]}, tile)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    with backend("triton"), tiles.forced("linear", "forward", tile):
        linear(**leaves).sum().backward()
    for name, x in leaves.items():
        expected = torch.autograd.grad(linear_reference(**leaves).sum(), x)[0]
        torch.testing.assert_close(x.grad, expected, msg=name)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_empty_inputs(shape):
    assert_matches(make(shape, residual=True), TILES[0], activation="gelu_new")


def test_what_is_never_written_is_never_read():
    nan = torch.full((40, 40), torch.nan, device=DEVICE)
    nan[3:20, 3:20] = torch.randn(17, 17, device=DEVICE)
    block = nan[3:20, 3:20]
    tensors = {"x": block, "weight": block[:5], "bias": block[0, :5], "residual": block[:, :5]}
    assert_matches(tensors, TILES[0], activation="gelu_new")


def test_gradients_are_bitwise_repeatable():
    tensors = make((300, 20, 30), torch.float16, residual=True)
    with backend("triton"):
        first, second = (outputs_and_gradients(linear, tensors, activation="gelu_new") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
