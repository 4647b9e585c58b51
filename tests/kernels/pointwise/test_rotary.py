"""rotary against its reference, and what a rotation is."""

import math

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, assert_operator_is_sound, only, rotary_tables

from phi1.kernels import backend, check_values, rotary, rotary_
from phi1.kernels.core import tiles
from phi1.kernels.pointwise.rotary import rotary_reference

SHAPES = [  # N, S, H, K, R
    (1, 1, 1, 2, 2),  # the smallest
    (5, 2, 3, 16, 6),  # neither half nor rest is a power of two
    (9, 2, 2, 32, 32),  # the whole head rotated
    (0, 3, 2, 16, 8),
    *only("eager",
          (67, 3, 4, 64, 32),  # phi-1's head, rows by a prime
          (33, 3, 2, 80, 32)),  # phi-2's
    *only("triton",
          (7, 3, 40, 64, 32),  # phi-1's; more heads than a program takes, rows that do not divide
          (3, 3, 2, 80, 32),  # phi-2's
          (3, 1, 5, 64, 48),  # the other tiles
          (2, 1, 5, 256, 200)),
]


def make(shape, dtype=torch.float32, device="cpu"):
    n_rows, parts, n_heads, head_size, rotary_size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, parts, n_heads, head_size, generator=generator).to(device, dtype)
    cos, sin = rotary_tables(rotary_size, 128, device)
    positions = torch.randint(128, (n_rows,), generator=generator).to(device)
    return x, {"cos": cos, "sin": sin, "positions": positions}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_matches_reference_and_in_place_gives_its_bits(device, shape, inverse, dtype):
    x, options = make(shape, dtype, device)
    assert_matches_reference(rotary, rotary_reference, {"x": x}, inverse=inverse, **options)
    rotated = rotary(x, **options, inverse=inverse)
    assert torch.equal(rotated[:, 2:], x[:, 2:])  # v
    assert torch.equal(rotated[..., shape[-1]:], x[..., shape[-1]:])  # the rest of each head
    assert rotary_(x, **options, inverse=inverse) is x
    assert torch.equal(x, rotated)


def test_reference_is_a_complex_product():
    x, options = make((12, 1, 2, 8, 6))
    angle = torch.polar(torch.ones(12, 3), torch.atan2(options["sin"], options["cos"])[options["positions"]])
    z = torch.complex(x[..., :3], x[..., 3:6]) * angle[:, None, None]
    expected = torch.cat((z.real, z.imag, x[..., 6:]), dim=-1)
    torch.testing.assert_close(rotary_reference(x, **options), expected)


def test_rotation_keeps_norms_and_the_inverse_undoes_it(device):
    x, options = make((7, 3, 4, 64, 32), device=device)
    y = rotary(x, **options)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotary(y, **options, inverse=True), x)
    assert not torch.allclose(y, x)


def test_scores_depend_on_the_distance_alone(device):
    cos, sin = rotary_tables(16, 128, device)
    q, k = torch.randn(2, 1, 1, 1, 16, device=device).expand(-1, 100, -1, -1, -1)
    positions = torch.arange(100, device=device)
    scores = (rotary(q, cos, sin, positions) * rotary(k, cos, sin, positions + 7)).sum(-1)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=0, atol=1e-5 * math.sqrt(16))


def test_in_place_writes_the_rotated_part_of_a_view_alone(device):
    _, options = make((20, 3, 4, 16, 8), device=device)
    options["positions"] = options["positions"].repeat_interleave(2)[::2].int()
    wide = torch.randn(20, 300, device=device)
    before = wide.clone()
    x = wide[:, 50:242].unflatten(1, (3, 4, 16))
    expected = rotary_reference(x.clone(), **options)
    rotary_(x, **options)
    torch.testing.assert_close(x, expected)
    changed = (wide != before).any(0).nonzero().flatten().tolist()
    assert changed == [50 + 16 * head + d for head in range(8) for d in range(8)]


def test_in_place_under_the_reference_backend():
    x, options = make((5, 2, 3, 16, 8))
    with backend("reference"):
        wide = rotary_(x.double(), **options)
    assert torch.equal(wide, rotary_reference(x.double(), **options))


def test_in_place_refuses_what_it_cannot_write_to():
    x, options = make((5, 2, 3, 16, 8))
    with pytest.raises(ValueError, match=r"^rotary_: x must not require a gradient: `rotary` has a backward"):
        rotary_(x.clone().requires_grad_(), **options)
    with pytest.raises(ValueError, match=r"^rotary_: x must not be expanded, .* got strides \(0, 96, 16, 1\)"):
        rotary_(torch.zeros(1, 2, 6, 16).expand(5, -1, -1, -1), **options)
    with pytest.raises(ValueError, match=r"^rotary_: positions.shape must be \(4,\)"):
        rotary_(x[:4], **options)


def test_in_place_compiles_whole():
    x, options = make((5, 2, 3, 16, 8))
    expected = rotary(x, **options)

    def decode(x):
        return rotary_(x * 1, **options) + 0

    torch._dynamo.reset()
    assert torch.equal(torch.compile(decode, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"inverse": None}, TypeError, "inverse must be True or False; got None"),
    ({"inverse": "no"}, TypeError, "inverse must be True or False; got 'no'"),
    ({"x": torch.zeros(6, 2, 16)}, ValueError, r"x must be \[N, S, H, K\]; got shape \(6, 2, 16\)"),
    ({"x": torch.zeros(6, 4, 2, 16)}, ValueError, r"x.shape\[1\] must be 1, 2 or 3"),
    ({"cos": torch.zeros(128)}, ValueError, r"cos must be \[T, R/2\]"),
    ({"sin": torch.zeros(128, 3)}, ValueError, r"sin.shape must be \(128, 4\), cos's; got \(128, 3\)"),
    ({"cos": torch.zeros(128, 4).half()}, ValueError, "cos must be float32; got float16"),
    ({"cos": torch.zeros(128, 9), "sin": torch.zeros(128, 9)}, ValueError, "cos must have between 1 and 8 columns"),
    ({"positions": torch.zeros(6)}, ValueError, "positions must be int32 or int64; got float32"),
    ({"positions": torch.zeros(5).long()}, ValueError,
     r"positions.shape must be \(6,\), one per row of x; got \(5,\)"),
    ({"positions": torch.tensor([0, 1, 2, 128, 4, 5])}, ValueError, r"less than 128, the rows of cos; got 128 at \[3"),
    ({"positions": torch.tensor([0, -1, 2, 3, 4, 5])}, ValueError, r"at least 0 .* got -1 at \[1\]"),
])
def test_errors(change, error, match):
    x, options = make((6, 2, 2, 16, 8))
    with pytest.raises(error, match=f"^rotary: .*{match}"):
        rotary(**{"x": x, **options, **change})


def test_positions_are_not_read_where_values_are_not_checked():
    x, options = make((6, 2, 2, 16, 8))
    with check_values(False), pytest.raises(IndexError):  # PyTorch's own, from inside the operation
        rotary(x, **options | {"positions": torch.full((6,), 128)})


def test_operator_is_sound():
    x, options = make((5, 2, 3, 16, 8))
    assert_operator_is_sound("rotary_", (x.clone(), *options.values(), False))
    assert_operator_is_sound("rotary", (x.requires_grad_(), *options.values(), False))


@pytest.mark.triton
def test_a_position_that_is_not_in_the_tables_gives_nan_and_touches_no_other_row(device):
    x, options = make((4, 3, 2, 16, 8), device=device)
    options["positions"] = torch.tensor([5, 128, -1, 127], device=device)
    with check_values(False):
        y = rotary(x, **options)
    assert y[1:3, :2, :, :8].isnan().all()
    assert torch.equal(y[1:3, :, :, 8:], x[1:3, :, :, 8:])
    known = {**options, "positions": options["positions"].clamp(0, 127)}
    torch.testing.assert_close(y[[0, 3]], rotary_reference(x, **known)[[0, 3]])


@pytest.mark.triton
def test_in_place_runs_one_kernel_on_its_own_memory(monkeypatch, device):
    from phi1.kernels.pointwise import rotary_triton

    launched, launch = [], rotary_triton.launch_rotary
    monkeypatch.setattr(rotary_triton, "launch_rotary", lambda *a: launched.append(a[1] is a[0]) or launch(*a))
    x, options = make((3, 2, 2, 16, 8), device=device)
    rotary(x, **options)
    rotary_(x, **options)
    assert launched == [False, True]


@pytest.mark.triton
@pytest.mark.parametrize("tile", [{"rows": 1, "heads": 1, "num_warps": 4}, {"rows": 4, "heads": 2, "num_warps": 4}],
                         ids=str)
def test_every_tile_gives_the_same_bits(device, tile):
    x, options = make((7, 3, 5, 16, 8), device=device)
    expected = rotary(x, **options)
    with tiles.forced("rotary", "rotate", tile):
        assert torch.equal(rotary(x, **options), expected)
