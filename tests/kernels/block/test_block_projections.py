"""The parallel block's two projections, launched alone. What they do past the end of a weight and past 2^31:
test_bounds.py.
"""

import pytest
import torch
from kernel_checks import empty_is_nan, kernel_device, rotary_tables

from phi1.kernels import backend, gelu
from phi1.kernels.block import projections_triton as projections
from phi1.kernels.core.tiles import ARCHITECTURES, TILES, tile_for
from phi1.kernels.pointwise.gelu import gelu_new
from phi1.kernels.pointwise.rotary import rotate_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

SMALL = {"block_m": 32, "block_n": 64, "block_k": 32, "group_m": 2, "tma": 0, "num_warps": 4, "num_stages": 2}


def tables(rotary_size, n_positions=150):
    return dict(zip(("cos", "sin"), rotary_tables(rotary_size, n_positions, DEVICE), strict=True))


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("width", "n_heads", "inner", "half"), [
    (48, 3, 40, 8),  # no part is a multiple of a tile, and half a tile is past the end of v
    (64, 2, 64, 4),  # every part is
    (64, 4, 1, 2),
])
def test_in_proj_matches_reference(width, n_heads, inner, half, parts, tma):
    n_rows, generator = 41, torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*shape, generator=generator).to(DEVICE)
                       for shape in ((n_rows, width), (3 * width + inner, width), (3 * width + inner,)))
    positions = torch.randint(150, (n_rows,), generator=generator).to(DEVICE)
    rotary = tables(2 * half)["cos"], tables(2 * half)["sin"], positions
    with empty_is_nan():
        got = projections.launch_in_proj(h, weight, bias, rotary, n_heads, SMALL | {"parts": parts, "tma": tma})
    exact = h.double() @ weight.double().t() + bias.double()
    rotated = rotate_reference(exact[:, : 2 * width].reshape(n_rows, 2, n_heads, -1), *rotary).reshape(n_rows, -1)
    pre = exact[:, 3 * width :]
    expected = torch.cat((rotated, exact[:, 2 * width : 3 * width]), 1), pre, gelu_new(pre)
    for out, want in zip(got, expected, strict=True):
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_act_is_of_the_rounded_pre():
    """Bit for bit, as the backward computes it again; of the sums before they are rounded, one act in four differs."""
    h, weight, bias = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
                       for shape in ((41, 32), (160, 32), (160,)))
    rotary = *tables(8).values(), torch.arange(41, device=DEVICE)
    _, pre, act = projections.launch_in_proj(h, weight, bias, rotary, 2, SMALL | {"parts": 1})
    with backend("triton"):
        assert torch.equal(act, gelu(pre))


def test_a_position_outside_of_the_tables_gives_nan():
    h, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((3, 16), (50, 16), (50,)))
    rotary = *tables(8, 10).values(), torch.tensor([9, 10, -1], device=DEVICE)
    qkv, pre, _ = projections.launch_in_proj(h, weight, bias, rotary, 1, SMALL | {"parts": 1})
    unknown = torch.tensor([False, True, True], device=DEVICE)
    assert torch.equal(qkv[:, :32].isnan().any(1), unknown)
    assert not qkv[:, 32:].isnan().any()
    assert not pre.isnan().any()


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("width", "inner"), [(48, 40), (64, 96), (128, 1)])  # rows of 129 are not for TMA
def test_out_proj_matches_reference(monkeypatch, width, inner, parts, tma):
    monkeypatch.setattr(projections, "tile", lambda *_, **__: SMALL | {"parts": parts, "tma": tma})
    generator = torch.Generator().manual_seed(0)
    shapes = (41, width), (41, inner), (41, width), (width, width + inner), (2, width)
    att, act, x, weight, bias = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    with empty_is_nan():
        y = projections.launch_out_proj(att, act, x, weight, bias)
    exact = x.double() + torch.cat((att, act), 1).double() @ weight.double().t() + bias.double().sum(0)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["in_proj", "out_proj"])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "any"])
def test_the_table_has_candidates(kernel, arch):
    """A tuner tries every tile that the table picks, except those of GPUs without a row of their own."""
    t = tile_for("block", kernel, arch, dtype="float16", rows=16384, width=2048, inner=8192)
    assert t.keys() in ({"cublas"}, {*SMALL, "parts"})
    if arch in ("sm_80", "sm_90", "sm_100"):
        assert t in TILES["block", kernel]
