"""linear against its reference: bias, gelu_new, dropout and the residual, each with and without the others."""

import itertools

import pytest
import torch
from kernel_checks import (
    DTYPES,
    DTYPES_OF_PRODUCTS,
    assert_matches_reference,
    assert_operator_is_sound,
    empty_is_nan,
    only,
)

from phi1.kernels import Dropout, linear
from phi1.kernels.core import tiles
from phi1.kernels.core.philox import residual_keep
from phi1.kernels.gemm.linear import linear_reference

# Small tiles, so that a few rows are several groups of tiles. The columns whole, in halves, by TMA, in quarters.
WHOLE, HALVES, TMA, QUARTERS = (
    {"block_m": 16, "block_n": n, "block_k": 16, "group_m": 2, "parts": parts, "tma": tma, "num_warps": 4,
     "num_stages": 2} for n, parts, tma in ((64, 1, 0), (128, 2, 0), (128, 2, 1), (256, 4, 0)))
CUBLAS = {"cublas": 1}
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


@pytest.fixture(autouse=True)
def _small_tiles():
    with tiles.forced("linear", "forward", HALVES):
        yield


def rng(device="cpu"):
    return torch.tensor([5, 7], device=device)


def make(shape, dtype=torch.float32, device="cpu", bias=True, residual=False):
    n_rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(n_rows, inputs, generator=generator),
        "weight": torch.randn(outputs, inputs, generator=generator) / max(inputs, 1) ** 0.5,
        "bias": torch.randn(outputs, generator=generator) if bias else None,
        "residual": torch.randn(n_rows, outputs, generator=generator) if residual else None,
    }
    return {name: x if x is None else x.to(device, dtype) for name, x in tensors.items()}


def check(device, shape, dtype, bias, activation, residual, dropout):
    assert_matches_reference(linear, linear_reference, make(shape, dtype, device, bias, residual),
                             activation=activation,
                             dropout=Dropout(0.3, rng(device), layer=4, kind=1) if dropout else None)


@pytest.mark.eager
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", [*itertools.product([True, False], [None, "gelu_new"], [True, False],
                                                         [True, False])], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_matches_reference_with_any_epilogue(device, shape, epilogue, dtype):
    check(device, shape, dtype, *epilogue)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_kernel_matches_reference(device, shape, epilogue, dtype):
    check(device, shape, dtype, *EPILOGUES[epilogue])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("epilogue", ["nothing", "bias", "bias, dropout, residual", "all"])
@pytest.mark.parametrize("tile", [WHOLE, TMA, QUARTERS, CUBLAS], ids=["whole", "tma", "quarters", "cublas"])
def test_other_tiles_match_reference(device, tile, epilogue, dtype):
    with tiles.forced("linear", "forward", tile):
        check(device, SHAPES[-1], dtype, *EPILOGUES[epilogue])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
def test_the_tables_own_tile_matches_reference(monkeypatch, device, dtype):
    monkeypatch.setattr(tiles, "_forced", {})
    check(device, (130, 70, 260), dtype, *EPILOGUES["all"])


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_empty_inputs_match_reference(device, shape):
    check(device, shape, torch.float32, True, "gelu_new", True, False)


@pytest.mark.parametrize("tile", [WHOLE, *only("triton", HALVES, TMA, QUARTERS)], ids=str)
def test_dropout_is_the_mask_of_the_specification(device, tile):
    dropout = Dropout(0.3, rng(device), torch.tensor([6, 2**33 + 1], device=device), layer=40000, kind=2)
    with tiles.forced("linear", "forward", tile):
        out = linear(torch.ones(34, 1, device=device), torch.ones(200, 1, device=device), dropout=dropout)
    assert torch.equal(out != 0, residual_keep(dropout, 34, 200))


def test_dropout_spares_the_residual(device):
    tensors = make((4, 8, 64), device=device, residual=True)
    out = linear(**tensors, dropout=Dropout(0.99, rng(device)))
    assert (out == tensors["residual"]).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, *only("eager", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("tile", [WHOLE, *only("triton", CUBLAS)], ids=["own", "cublas"])
def test_strided_inputs_match_reference(device, tile, dtype):
    wide = torch.randn(60, 80).to(device, dtype)
    tensors = {"x": wide[:12, 20:60], "weight": wide[20:, :20].t(), "bias": wide[:20, 7],
               "residual": wide[:20, :12].t()}
    with tiles.forced("linear", "forward", tile):
        assert_matches_reference(linear, linear_reference, tensors, activation="gelu_new")
        assert_matches_reference(linear, linear_reference, tensors | {"x": wide[::5, ::2], "weight": wide[:40:2, ::2]})


def test_what_is_never_written_is_never_read(device):
    """Every operand is a part of one matrix, which is NaN around it."""
    nan = torch.full((40, 40), torch.nan, device=device)
    nan[3:20, 3:20] = torch.randn(17, 17, device=device)
    block = nan[3:20, 3:20]
    tensors = {"x": block, "weight": block[:5], "bias": block[0, :5], "residual": block[:, :5]}
    with tiles.forced("linear", "forward", WHOLE):
        assert_matches_reference(linear, linear_reference, tensors, activation="gelu_new")


@pytest.mark.triton
@pytest.mark.parametrize("tile", [HALVES, TMA], ids=["halves", "tma"])
def test_persistent_programs_give_the_same_bits(monkeypatch, device, tile):
    from phi1.kernels.gemm import matmul_triton

    x, weight, bias, residual = make((40, 48, 300), torch.float16, device, residual=True).values()
    found, grids = [], []
    for programs in (None, 1, 4, 50):  # a program a tile; one for all 3 x 3; up to three tiles each; more than tiles
        monkeypatch.setattr(matmul_triton, "multiprocessors", lambda device, n=programs: n)
        t = tile if programs is None else tile | {"persistent": 1}
        grids.append(matmul_triton.n_programs(t, 40, 300, x.device))
        with tiles.forced("linear", "forward", t), empty_is_nan():
            found.append(torch.ops.phi1.linear(x, weight, bias, residual, True, 0.3, rng(device), None, 4, 1))
    assert grids == [9, 1, 4, 9]
    for out, pre in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(pre, found[0][1])


@pytest.mark.triton
def test_what_tma_takes(device):
    from phi1.kernels.gemm.tma_triton import describable

    x, weight, *_ = make(SHAPES[-1], torch.float16, device).values()
    assert describable(x, weight)
    refused = {"columns first": x.t(), "unaligned rows": x[:, :33].contiguous(), "unaligned memory": x[:, 1:],
               "one row": x[:1].expand(9, -1), "empty": x[:0]}
    for name, operand in refused.items():
        assert not describable(operand, weight), name


@pytest.mark.triton
def test_rows_too_far_apart_raise():
    from phi1.kernels.gemm.matmul_triton import check_rows

    x, far = torch.zeros(2, 8), torch.empty_strided((2, 4), (2**28, 1), device="meta")
    with pytest.raises(NotImplementedError, match=r"^linear: a row may be at most 16777215 elements from the next"):
        check_rows("linear", 128, x, None, far)


@pytest.mark.triton
def test_gelu_is_taken_of_what_is_saved(device):
    tensors = make((17, 33, 65), torch.float16, device)
    with tiles.forced("linear", "forward", WHOLE):
        out, pre = torch.ops.phi1.linear(*tensors.values(), True, 0.0, None, None, 0, 0)
    assert torch.equal(out, torch.ops.phi1.gelu(pre))


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"x": torch.zeros(2, 2, 8)}, ValueError, r"x must be \[N, K\]"),
    ({"weight": torch.zeros(8)}, ValueError, r"weight must be \[M, K\]"),
    ({"weight": torch.zeros(8, 6)}, ValueError, r"weight.shape must be \(8, 8\), columns as many as x's \[4, 8\]"),
    ({"bias": torch.zeros(8)}, ValueError, r"bias.shape must be \(6,\), one per row of weight \[6, 8\]"),
    ({"residual": torch.zeros(6)}, ValueError, r"residual.shape must be \(4, 6\), the output's"),
    ({"activation": "relu"}, ValueError, "activation must be None or \"gelu_new\"; got 'relu'"),
    ({"dropout": 0.1}, TypeError, "dropout must be a phi1.kernels.Dropout or None"),
    ({"dropout": Dropout(0.1, rng(), torch.tensor([1, 2, 3]))}, ValueError, "must divide the 4 rows of x evenly"),
])
def test_errors(change, error, match):
    with pytest.raises(error, match=f"^linear: .*{match}"):
        linear(**make((4, 8, 6), residual=True) | change)


@pytest.mark.parametrize("gelu", [True, False])
def test_operator_is_sound(gelu):
    x, weight, bias, residual = (t.requires_grad_() for t in make((4, 8, 6), residual=True).values())
    dropout = (0.3, rng(), torch.tensor([1, 2]), 4, 1)
    assert_operator_is_sound("linear", (x, weight, bias, residual, gelu, *dropout))
    assert_operator_is_sound("linear", (x, weight, None, None, gelu, 0.0, None, None, 0, 0))
    out, pre = torch.ops.phi1.linear(x, weight, bias, residual, gelu, *dropout)
    saved = (out.detach(), x.detach(), weight.detach(), pre.detach())
    assert_operator_is_sound("linear_backward", (*saved, True, gelu, *dropout))
