"""rotary against its reference, and what a rotation is."""

import math

import pytest
import torch
from kernel_checks import DTYPES, assert_compiles_whole, assert_matches_reference, assert_operator_is_sound

from phi1.kernels import backend, check_values, rotary, rotary_
from phi1.kernels.pointwise.rotary import rotary_reference

SHAPES = [  # N, S, H, K, R
    (1, 1, 1, 2, 2),  # the smallest
    (5, 2, 3, 16, 8),
    (67, 3, 4, 64, 32),  # phi-1's head, rows by a prime
    (33, 3, 2, 80, 32),  # phi-2's
    (9, 2, 2, 32, 32),  # the whole head rotated
]


def tables(rotary_size, n_positions=128):
    angle = torch.outer(torch.arange(n_positions).double(), 10000 ** (-torch.arange(0, rotary_size, 2) / rotary_size))
    return angle.cos().float(), angle.sin().float()


def make(shape, dtype=torch.float32):
    n_rows, parts, n_heads, head_size, rotary_size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, parts, n_heads, head_size, generator=generator).to(dtype)
    cos, sin = tables(rotary_size)
    return x, {"cos": cos, "sin": sin, "positions": torch.randint(128, (n_rows,), generator=generator)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_matches_reference(shape, inverse, dtype):
    x, options = make(shape, dtype)
    assert_matches_reference(rotary, rotary_reference, {"x": x}, inverse=inverse, **options)


def test_reference_is_a_complex_product():
    x, options = make((12, 1, 2, 8, 6))
    angle = torch.polar(torch.ones(12, 3), torch.atan2(options["sin"], options["cos"])[options["positions"]])
    z = torch.complex(x[..., :3], x[..., 3:6]) * angle[:, None, None]
    expected = torch.cat((z.real, z.imag, x[..., 6:]), dim=-1)
    torch.testing.assert_close(rotary_reference(x, **options), expected)


def test_rotation_keeps_norms_and_the_inverse_undoes_it():
    x, options = make((67, 3, 4, 64, 32))
    y = rotary(x, **options)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotary(y, **options, inverse=True), x)
    assert not torch.allclose(y, x)


def test_v_and_the_rest_of_the_head_stay():
    x, options = make((33, 3, 2, 80, 32), torch.bfloat16)
    y = rotary(x, **options)
    assert torch.equal(y[:, 2], x[:, 2])
    assert torch.equal(y[..., 32:], x[..., 32:])


def test_scores_depend_on_the_distance_alone():
    cos, sin = tables(16)
    q, k = torch.randn(1, 1, 1, 16).expand(100, -1, -1, -1), torch.randn(1, 1, 1, 16).expand(100, -1, -1, -1)
    positions = torch.arange(100)
    scores = (rotary(q, cos, sin, positions) * rotary(k, cos, sin, positions + 7)).sum(-1)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=0, atol=1e-5 * math.sqrt(16))


def test_non_contiguous_inputs():
    _, options = make((20, 3, 4, 16, 8))
    x = torch.randn(20, 300)[:, 50:242].unflatten(1, (3, 4, 16))
    assert_matches_reference(rotary, rotary_reference, {"x": x}, **options)
    strided = {name: table.t().contiguous().t() for name, table in options.items() if name != "positions"}
    positions = options["positions"].repeat_interleave(2)[::2].int()
    assert_matches_reference(rotary, rotary_reference, {"x": x.transpose(0, 3).contiguous().transpose(0, 3)},
                                     **strided, positions=positions)


def test_input_is_not_written_to():
    x, options = make((5, 2, 3, 16, 8))
    before = x.clone()
    rotary(x, **options)
    assert torch.equal(x, before)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_gives_the_bits_of_rotary(shape, inverse):
    x, options = make(shape, torch.bfloat16)
    expected = rotary(x, **options, inverse=inverse)
    assert rotary_(x, **options, inverse=inverse) is x
    assert torch.equal(x, expected)


def test_in_place_writes_the_rotated_part_of_a_view_alone():
    _, options = make((20, 3, 4, 16, 8))
    wide = torch.randn(20, 300)
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


def test_empty_input():
    x, options = make((0, 3, 2, 16, 8))
    assert_matches_reference(rotary, rotary_reference, {"x": x}, **options)


def bad(**changes):
    x, options = make((6, 2, 2, 16, 8))
    return {"x": x, **options, **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(x=3), TypeError, "x must be a tensor"),
    (bad(positions=None), TypeError, "positions must be a tensor"),
    (bad(inverse=None), TypeError, "inverse must be True or False; got None"),
    (bad(inverse="no"), TypeError, "inverse must be True or False; got 'no'"),
    (bad(x=torch.zeros(6, 2, 2, 16).long()), TypeError, "x must be float16, bfloat16 or float32"),
    (bad(x=torch.zeros(6, 2, 16)), ValueError, r"x must be \[N, S, H, K\]; got shape \(6, 2, 16\)"),
    (bad(x=torch.zeros(6, 4, 2, 16)), ValueError, r"x.shape\[1\] must be 1, 2 or 3"),
    (bad(cos=torch.zeros(128)), ValueError, r"cos must be \[T, R/2\]"),
    (bad(sin=torch.zeros(128, 3)), ValueError, r"sin.shape must be \(128, 4\), cos's; got \(128, 3\)"),
    (bad(cos=torch.zeros(128, 4).half()), ValueError, "cos must be float32; got float16"),
    (bad(cos=torch.zeros(128, 9), sin=torch.zeros(128, 9)), ValueError, "cos must have between 1 and 8 columns"),
    (bad(sin=torch.zeros(128, 4, device="meta")), ValueError, r"sin must be on x's device \(cpu\); got meta"),
    (bad(positions=torch.zeros(6)), ValueError, "positions must be int32 or int64; got float32"),
    (bad(positions=torch.zeros(5).long()), ValueError, r"positions.shape must be \(6,\), one per row of x; got \(5,\)"),
    (bad(positions=torch.tensor([0, 1, 2, 128, 4, 5])), ValueError, r"less than 128, the rows of cos; got 128 at \[3"),
    (bad(positions=torch.tensor([0, -1, 2, 3, 4, 5])), ValueError, r"at least 0 .* got -1 at \[1\]"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^rotary: .*{match}"):
        rotary(**arguments)


def test_positions_are_not_read_where_values_are_not_checked():
    with check_values(False), pytest.raises(IndexError):  # PyTorch's own, from inside the operation
        rotary(**bad(positions=torch.full((6,), 128)))


def test_backends():
    x, options = make((5, 2, 3, 16, 8))
    with backend("reference"):
        assert rotary(x.double(), **options).dtype == torch.float64
        assert torch.equal(rotary(x, **options), rotary_reference(x, **options))


def test_operator_is_sound():
    x, options = make((5, 2, 3, 16, 8))
    assert_operator_is_sound("rotary_", (x.clone(), *options.values(), False))
    assert_operator_is_sound("rotary", (x.requires_grad_(), *options.values(), False))


def test_compiles_whole():
    x, options = make((5, 2, 3, 16, 8))
    assert_compiles_whole(rotary, {"x": x}, **options)
