"""The Triton kernel of rotary: on a GPU, or on CPU tensors in Triton's interpreter (run by test_interpreter.py).

bfloat16 is tested in the interpreter too, since the kernel casts up before any arithmetic.
"""

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, kernel_device, outputs_and_gradients

from phi1.kernels import backend, rotary, rotary_
from phi1.kernels.core import tiles
from phi1.kernels.pointwise.rotary import rotary_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

SHAPES = [  # N, S, H, K, R
    (1, 1, 1, 2, 2),  # the smallest
    (5, 2, 3, 16, 6),  # neither half nor rest is a power of two
    (7, 3, 40, 64, 32),  # phi-1's head; more heads than a program takes, rows that do not divide
    (3, 3, 2, 80, 32),  # phi-2's
    (3, 2, 2, 32, 32),  # the whole head rotated
    (3, 1, 5, 64, 48),  # the other tiles
    (2, 1, 5, 256, 200),
    (0, 3, 2, 16, 8),
]


def tables(rotary_size, n_positions=128):
    angle = torch.outer(torch.arange(n_positions).double(), 10000 ** (-torch.arange(0, rotary_size, 2) / rotary_size))
    return angle.cos().float().to(DEVICE), angle.sin().float().to(DEVICE)


def make(shape, dtype=torch.float32):
    n_rows, parts, n_heads, head_size, rotary_size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, parts, n_heads, head_size, generator=generator).to(DEVICE, dtype)
    cos, sin = tables(rotary_size)
    positions = torch.randint(128, (n_rows,), generator=generator).to(DEVICE)
    return x, {"cos": cos, "sin": sin, "positions": positions}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_kernel_matches_reference(shape, inverse, dtype):
    x, options = make(shape, dtype)
    with backend("triton"):
        assert_matches_reference(rotary, rotary_reference, {"x": x}, inverse=inverse, **options)
        expected = rotary(x, **options, inverse=inverse)
        assert torch.equal(rotary_(x.clone(), **options, inverse=inverse), expected)
    if x.shape[1] == 3:
        assert torch.equal(expected[:, 2], x[:, 2])
    assert torch.equal(expected[..., shape[-1]:], x[..., shape[-1]:])


def test_the_kernel_ran_and_not_pytorch(monkeypatch):
    from phi1.kernels.pointwise import rotary_triton

    launched, launch = [], rotary_triton.launch_rotary
    monkeypatch.setattr(rotary_triton, "launch_rotary", lambda *a: launched.append(a[1] is a[0]) or launch(*a))
    x, options = make((3, 2, 2, 16, 8))
    with backend("triton"):
        outputs_and_gradients(rotary, {"x": x}, **options)
        rotary_(x, **options)
    assert launched == [False, False, True]


@pytest.mark.parametrize("tile", [{"rows": 1, "heads": 1, "num_warps": 4}, {"rows": 4, "heads": 2, "num_warps": 4}],
                         ids=str)
def test_every_tile_gives_the_same_bits(tile):
    x, options = make((7, 3, 5, 16, 8))
    with backend("triton"):
        expected = rotary(x, **options)
        with tiles.forced("rotary", "rotate", tile):
            assert torch.equal(rotary(x, **options), expected)


def test_strides():
    _, options = make((20, 3, 4, 16, 8))
    wide = torch.randn(20, 300, device=DEVICE)
    x = wide[:, 50:242].unflatten(1, (3, 4, 16))
    strided = {name: table.t().contiguous().t() for name, table in options.items() if name != "positions"}
    strided["positions"] = options["positions"].repeat_interleave(2)[::2].int()
    with backend("triton"):
        assert_matches_reference(rotary, rotary_reference, {"x": x}, **options)
        columns_first = x.transpose(0, 3).contiguous().transpose(0, 3)
        assert_matches_reference(rotary, rotary_reference, {"x": columns_first}, **strided)
        before = wide.clone()
        rotary_(x, **options)
    torch.testing.assert_close(x, rotary_reference(before[:, 50:242].unflatten(1, (3, 4, 16)), **options))
    changed = (wide != before).any(0).nonzero().flatten().tolist()
    assert changed == [50 + 16 * head + d for head in range(8) for d in range(8)]


def test_a_position_that_is_not_in_the_tables_gives_nan_and_touches_no_other_row():
    x, options = make((4, 3, 2, 16, 8))
    options["positions"] = torch.tensor([5, 128, -1, 127], device=DEVICE)
    from phi1.kernels import check_values

    with backend("triton"), check_values(False):
        y = rotary(x, **options)
    assert y[1:3, :2, :, :8].isnan().all()
    assert torch.equal(y[1:3, :, :, 8:], x[1:3, :, :, 8:])
    known = {**options, "positions": options["positions"].clamp(0, 127)}
    torch.testing.assert_close(y[[0, 3]], rotary_reference(x, **known)[[0, 3]])
