"""mlp against its reference, and against linear twice."""

import pytest
import torch
from kernel_checks import DTYPES, assert_compiles_whole, assert_matches_reference, assert_operator_is_sound

from phi1.kernels import backend, linear, mlp
from phi1.kernels.gemm.mlp import mlp_reference

SHAPES = [  # N, D, F
    (1, 1, 1),  # the smallest
    (7, 33, 65),
    (200, 32, 1024),  # two strips of the CPU's gelu
]


def make(shape, dtype=torch.float32):
    n_rows, width, inner = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(n_rows, width, generator=generator),
        "w1": torch.randn(inner, width, generator=generator) / width**0.5,
        "b1": torch.randn(inner, generator=generator),
        "w2": torch.randn(width, inner, generator=generator) / inner**0.5,
        "b2": torch.randn(width, generator=generator),
    }
    return {name: x.to(dtype) for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mlp_matches_reference(shape, dtype):
    assert_matches_reference(mlp, mlp_reference, make(shape, dtype))


def test_mlp_is_linear_twice():
    x, w1, b1, w2, b2 = make((7, 33, 65)).values()
    torch.testing.assert_close(mlp(x, w1, b1, w2, b2), linear(linear(x, w1, b1, activation="gelu_new"), w2, b2))


def test_rows_do_not_meet():
    tensors = make((7, 33, 65))
    before = mlp(**tensors)
    tensors["x"][3] += 1
    changed = (mlp(**tensors) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3]


def test_non_contiguous_inputs():
    tensors = {name: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2]
               for name, x in make((7, 33, 65), torch.bfloat16).items()}
    assert_matches_reference(mlp, mlp_reference, tensors)


def test_empty_input():
    assert_matches_reference(mlp, mlp_reference, make((0, 5, 8)))


def bad(**changes):
    return {**make((4, 8, 12)), **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(x=None), TypeError, "x must be a tensor"),
    (bad(x=torch.zeros(4, 8).int()), TypeError, "x must be float16, bfloat16 or float32"),
    (bad(b2=torch.zeros(8).half()), TypeError, "b2 must have x's dtype"),
    (bad(w2=torch.zeros(8, 12, device="meta")), ValueError, "w2 must be on x's device"),
    (bad(x=torch.zeros(8)), ValueError, r"x must be \[N, D\]"),
    (bad(w1=torch.zeros(12)), ValueError, r"w1 must be \[F, D\]"),
    (bad(w1=torch.zeros(12, 9)), ValueError, r"w1.shape must be \(12, 8\), columns as many as x's \[4, 8\]"),
    (bad(b1=torch.zeros(8)), ValueError, r"b1.shape must be \(12,\), one per row of w1 \[12, 8\]"),
    (bad(w2=torch.zeros(12, 8)), ValueError, r"w2.shape must be \(8, 12\), w1's \[12, 8\] the other way round"),
    (bad(b2=torch.zeros(12)), ValueError, r"b2.shape must be \(8,\), one per row of w2 \[8, 12\]"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^mlp: .*{match}"):
        mlp(**arguments)


def test_reference_backend():
    tensors = make((4, 8, 12))
    with backend("reference"):
        assert torch.equal(mlp(**tensors), mlp_reference(**tensors))


def test_operator_is_sound():
    tensors = [x.requires_grad_() for x in make((4, 8, 12)).values()]
    assert_operator_is_sound("mlp", tensors)
    out, pre = torch.ops.phi1.mlp(*tensors)
    x, w1, _, w2, _ = (x.detach() for x in tensors)
    assert_operator_is_sound("mlp_backward", (out.detach(), x, w1, w2, pre.detach()))


def test_compiles_whole():
    assert_compiles_whole(mlp, make((4, 8, 12)))
