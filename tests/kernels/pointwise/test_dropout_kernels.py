"""The Triton kernels of dropout_add: on a GPU, or on CPU tensors in Triton's interpreter (run by test_interpreter.py).

bfloat16 is tested in the interpreter too, since these kernels cast up before any arithmetic.
"""

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, kernel_device

from phi1.kernels import Dropout, backend, dropout_add
from phi1.kernels.core import tiles
from phi1.kernels.core.philox import dropout_scale, residual_keep
from phi1.kernels.pointwise.dropout import dropout_add_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

SHAPES = [
    (1, 1),  # the smallest
    (6, 63),  # either side of a block of 64 columns
    (8, 65),
    (3, 513),  # either side of a tile: 4 rows, 512 columns
    (5, 512),
    (0, 8),
]
RNG = torch.tensor([0xDEADBEEF, 7], device=DEVICE)


def make(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name in ("x", "residual")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [None, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_add_kernels_match_reference(shape, p, dtype):
    dropout = None if p is None else Dropout(p, RNG, layer=5, kind=2)
    with backend("triton"):
        assert_matches_reference(dropout_add, dropout_add_reference, make(shape, dtype), dropout=dropout)


@pytest.mark.parametrize("sample_ids", [None, [3], [3, 2**40 + 1], [9, 1, 1, 4, 0, 2**32 - 1]], ids=str)
@pytest.mark.parametrize("tile", [{"rows": 1, "cols": 64, "num_warps": 4}, {"rows": 8, "cols": 256, "num_warps": 4}],
                         ids=str)
def test_bits_are_those_of_the_specification_under_every_tile(sample_ids, tile):
    ids = None if sample_ids is None else torch.tensor(sample_ids, device=DEVICE)
    dropout = Dropout(0.4, RNG, ids, layer=0xFFFF, kind=15)
    x = torch.ones(12, 200, device=DEVICE, requires_grad=True)
    with backend("triton"), tiles.forced("epilogue", "forward", tile), tiles.forced("epilogue", "backward", tile):
        out = dropout_add(x, torch.zeros_like(x), dropout)
        out.sum().backward()
    expected = residual_keep(dropout, 12, 200) * dropout_scale(0.4)
    assert torch.equal(out.detach(), expected.float())
    assert torch.equal(x.grad, expected.float())


def test_what_is_dropped_may_be_nan():
    dropout = Dropout(0.5, RNG)
    x = torch.full((4, 64), torch.nan, device=DEVICE)
    with backend("triton"):
        assert torch.equal(dropout_add(x, torch.ones_like(x), dropout).isnan(), residual_keep(dropout, 4, 64))


def test_strided_rows_and_columns():
    wide = torch.randn(80, 90, device=DEVICE)
    tensors = {"x": wide[:20, 10:60].t(), "residual": wide[::4][:, ::2][:, :20].repeat(3, 1)[:50]}
    with backend("triton"):
        assert_matches_reference(dropout_add, dropout_add_reference, tensors, dropout=Dropout(0.2, RNG))
        shifted = {"x": wide[:, 3:], "residual": wide[:, :-3]}
        assert_matches_reference(dropout_add, dropout_add_reference, shifted, dropout=Dropout(0.2, RNG))
