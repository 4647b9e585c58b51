"""linear_cross_entropy against its reference and F.cross_entropy, in one chunk and in many."""

import math

import pytest
import torch
from kernel_checks import (
    DTYPES,
    assert_compiles_whole,
    assert_operator_is_sound,
    assert_within_bound,
    empty_is_nan,
    outputs_and_gradients,
    to_float64,
)
from torch.nn.functional import cross_entropy

import phi1.kernels.cross_entropy.eager as chunks
from phi1.kernels import backend, check_values, linear_cross_entropy
from phi1.kernels.cross_entropy.linear_cross_entropy import linear_cross_entropy_reference

SHAPES = [  # N, D, V
    (3, 4, 2),  # the smallest whose gradients are not differences of equal numbers
    (17, 33, 65),
    (50, 16, 5000),  # a vocabulary of more than one slice
]
VARIANTS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.02},
    "everything": {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "ignore_index": 1},
}
IGNORED = -100


def make(shape, dtype=torch.float32, bias=True):
    n_rows, width, vocab = shape
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(vocab, (n_rows,), generator=generator)
    targets[1] = IGNORED
    return {
        "x": torch.randn(n_rows, width, generator=generator).to(dtype),
        "weight": (torch.randn(vocab, width, generator=generator) / math.sqrt(width)).to(dtype),
        "bias": torch.randn(vocab, generator=generator).to(dtype) if bias else None,
        "targets": targets,
    }


def check(tensors, **options):
    """The tolerance rule; logits of 16 bits are rounded on both sides, which the float32 loss inherits."""
    if options.get("ignore_index") == 1:
        tensors = {**tensors, "targets": tensors["targets"].where(tensors["targets"] != IGNORED, 1)}
    with empty_is_nan():
        got = outputs_and_gradients(linear_cross_entropy, tensors, **options)
    options.pop("workspace_mb", None)
    eager = outputs_and_gradients(linear_cross_entropy_reference, tensors, **options)
    exact = outputs_and_gradients(
        linear_cross_entropy_reference, {name: to_float64(x) for name, x in tensors.items()}, **options)
    dtype = tensors["x"].dtype
    for name, out in got.items():
        # Sums over thousands of columns, in another order for each number of threads.
        roundings = 8 * torch.finfo(dtype).eps / torch.finfo(out.dtype).eps if name.startswith("out") else 8
        assert_within_bound(out, eager[name], exact[name], name, roundings=roundings)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 7 rows in strips of 3, and slices of the vocabulary of 1000."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_: (7, 3))
    monkeypatch.setattr(chunks, "VOCABULARY_SLICE", 1000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy_matches_reference(shape, variant, dtype):
    check(make(shape, dtype), **VARIANTS[variant])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_match_reference(small_chunks, variant, dtype):
    check(make((50, 16, 2500), dtype), **VARIANTS[variant])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_bias_and_with_a_smaller_vocabulary(reduction, dtype):
    tensors = make((17, 33, 65), dtype, bias=False)
    check(tensors, reduction=reduction)
    tensors = make((17, 33, 65), dtype)
    tensors["targets"].clamp_(max=39)
    check(tensors, reduction=reduction, valid_vocab=40, label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_reference_is_pytorchs_cross_entropy(reduction, smoothing):
    x, weight, bias, targets = make((17, 33, 65), torch.float64).values()
    expected = cross_entropy(x @ weight.t() + bias, targets, reduction=reduction, label_smoothing=smoothing)
    loss = linear_cross_entropy_reference(x, weight, bias, targets, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_z_loss_is_the_mean_square_of_lse():
    x, weight, bias, targets = make((17, 33, 65)).values()
    plain, lse = linear_cross_entropy(x, weight, bias, targets, return_lse=True)
    torch.testing.assert_close(lse, (x @ weight.t() + bias).logsumexp(1))
    with_z = linear_cross_entropy(x, weight, bias, targets, z_loss=0.5)
    torch.testing.assert_close(with_z - plain, 0.5 * lse[targets != IGNORED].square().mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uniform_logits_lose_log_v(dtype):
    x, targets = torch.randn(9, 8).to(dtype), torch.randint(300, (9,))
    weight, bias = torch.zeros(512, 8, dtype=dtype), torch.zeros(512, dtype=dtype)
    assert linear_cross_entropy(x, weight, bias, targets).item() == pytest.approx(math.log(512), rel=1e-6)
    loss = linear_cross_entropy(x, weight, bias, targets, valid_vocab=300)
    assert loss.item() == pytest.approx(math.log(300), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_stay_finite(dtype):
    tensors = make((17, 32, 65), dtype)
    tensors["x"] *= 500
    got = outputs_and_gradients(linear_cross_entropy, tensors)
    assert all(out.isfinite().all() for out in got.values())


def test_ignored_rows_and_columns_get_no_gradient():
    tensors = make((17, 33, 65))
    tensors["targets"].clamp_(max=39)
    got = outputs_and_gradients(linear_cross_entropy, tensors, valid_vocab=40)
    assert not got["dx"][1].any()
    assert not got["dweight"][40:].any()
    assert not got["dbias"][40:].any()
    assert got["dx"][0].any()


def test_all_ignored():
    x, weight, bias, targets = make((3, 4, 5)).values()
    targets.fill_(IGNORED)
    assert linear_cross_entropy(x, weight, bias, targets, reduction="sum").item() == 0
    assert linear_cross_entropy(x, weight, bias, targets).isnan()  # a mean over nothing, as PyTorch's
    x.requires_grad_()
    linear_cross_entropy(x, weight, bias, targets).backward()
    assert not x.grad.any()  # as PyTorch's, and the reference's


def loss_scale_gradients(dtype, scale, n_rows=256, vocab=20000):
    """Gradients of a float16 mean loss times a loss scale, and the exact ones, at the initial loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 32, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, 32, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(100, (n_rows,), generator=generator)
    (linear_cross_entropy(x, weight, None, targets) * scale).backward()
    x64, weight64 = (p.detach().double().requires_grad_() for p in (x, weight))
    (linear_cross_entropy_reference(x64, weight64, None, targets) * scale).backward()
    return weight.grad.double(), weight64.grad


@pytest.mark.parametrize("scale", [2.0**8, 2.0**13])
def test_float16_gradients_do_not_flush_to_zero(scale):
    got, exact = loss_scale_gradients(torch.float16, scale)
    mass = got[100:].abs().sum() / exact[100:].abs().sum()  # of columns that are nobody's target
    assert 0.999 < mass < 1.001
    assert (got - exact).abs().max() < 2e-3 * exact.abs().max()


@pytest.mark.slow
def test_float16_keeps_the_mass_of_gradients_at_full_size():
    """phi-1's vocabulary and batch; inputs are positive, so that the mass of columns nobody targets does not cancel."""
    n_rows, vocab, width, scale = 16384, 51200, 8, 2.0**16
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n_rows, width, generator=generator).half()
    weight = (0.02 * torch.randn(vocab, width, generator=generator)).half().requires_grad_()
    (linear_cross_entropy(x, weight, None, torch.randint(100, (n_rows,), generator=generator)) * scale).backward()
    exact = torch.zeros(vocab, width, dtype=torch.float64)
    for rows in x.double().split(512):
        exact += (rows @ weight.detach().double().t()).softmax(1).t() @ rows
    mass = weight.grad[100:].double().sum() / (exact[100:].sum() * scale / n_rows)
    assert 0.999 < mass < 1.001


def test_float16_gradients_of_frequent_targets_do_not_overflow():
    x = torch.ones(512, 8, dtype=torch.float16)
    weight = torch.zeros(50, 8, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(x, weight, None, torch.zeros(512, dtype=torch.int64)).backward()
    torch.testing.assert_close(weight.grad[0], torch.full((8,), 1 / 50 - 1, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "workspace"), [(1000, 1), (1000, 4), (1000, 256), (16384, 64), (16384, 256)])
def test_workspace_holds_the_logits(n_rows, workspace, dtype):
    vocab = 51200
    rule = chunks.LossRule(IGNORED, 0.0, 0.0, vocab, workspace << 20)
    rows, strip = chunks.chunk_rows(n_rows, dtype, True, rule)
    used = rows * vocab * dtype.itemsize + (0 if dtype == torch.float32 else strip * vocab * 4)
    assert 1 <= strip <= rows <= n_rows
    assert used <= workspace << 20
    n_chunks = math.ceil(n_rows / rows)
    if n_chunks > 1:  # one chunk fewer would not fit
        assert math.ceil(n_rows / (n_chunks - 1)) * vocab * dtype.itemsize + used - rows * vocab * dtype.itemsize \
            > workspace << 20


def test_workspace_changes_no_more_than_roundings():
    tensors = make((600, 8, 4000))
    check(tensors, workspace_mb=1)


def test_only_wanted_gradients_are_computed():
    x, weight, bias, targets = make((9, 8, 30)).values()
    weight.requires_grad_()
    outputs = torch.ops.phi1.linear_cross_entropy(x, weight, bias, targets, "mean", IGNORED, 0.0, 0.0, 30, 256,
                                                  False, True, False)
    assert [out.numel() for out in outputs[2:]] == [0, weight.numel(), 0]
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, weight, bias, targets, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, [weight])
        assert gradient.any()


def test_evaluation_computes_no_gradients(monkeypatch):
    x, weight, bias, targets = make((9, 8, 30)).values()
    monkeypatch.setattr(chunks._Gradients, "add_products", lambda *_: pytest.fail("products in evaluation"))
    x.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, bias, targets)
    assert not loss.requires_grad


def test_lse_carries_no_gradient():
    x, weight, bias, targets = make((9, 8, 30)).values()
    for context in (backend("reference"), check_values(True)):
        with context:
            _, lse = linear_cross_entropy(x.requires_grad_(), weight, bias, targets, return_lse=True)
        assert not lse.requires_grad


def test_rows_without_incoming_gradient_get_0():
    x, weight, bias, targets = make((3, 4, 5)).values()
    (linear_cross_entropy(x.requires_grad_(), weight, bias, targets, reduction="none") * 0).sum().backward()
    assert not x.grad.any()


def test_unchecked_targets_out_of_range_give_nan_rows():
    x, weight, bias, targets = make((9, 8, 30)).values()
    targets[3], targets[5] = 30, -7
    x.requires_grad_()
    with check_values(False):
        losses = linear_cross_entropy(x, weight, bias, targets, reduction="none")
    expected = torch.zeros(9, dtype=torch.bool)
    expected[[3, 5]] = True
    assert torch.equal(losses.isnan(), expected)
    losses[~expected].sum().backward()
    assert torch.equal(x.grad.isnan().all(1), expected)


def test_non_contiguous_inputs():
    tensors = make((17, 33, 65), torch.bfloat16)
    strided = {
        "x": torch.randn(33, 40).bfloat16().t()[5:22],
        "weight": torch.randn(65, 70).bfloat16()[:, ::2][:, :33],
        "bias": torch.randn(1).bfloat16().expand(65),
        "targets": tensors["targets"].repeat(2).view(2, 17).t()[:, 0],
    }
    check(strided)
    check(strided, reduction="none")


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_empty_input(reduction):
    tensors = make((3, 4, 5))
    tensors["x"], tensors["targets"] = tensors["x"][:0], tensors["targets"][:0]
    check(tensors, reduction=reduction)


def bad(**changes):
    return {**make((6, 8, 30)), **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(x=None), TypeError, "x must be a tensor"),
    (bad(x=torch.zeros(6, 8).long()), TypeError, "x must be float16, bfloat16 or float32"),
    (bad(weight=torch.zeros(30, 8).half()), TypeError, r"weight must have x's dtype \(float32\); got float16"),
    (bad(bias=torch.zeros(30, device="meta")), ValueError, "bias must be on x's device"),
    (bad(x=torch.zeros(2, 3, 8)), ValueError, r"x must be \[N, D\]"),
    (bad(weight=torch.zeros(30)), ValueError, r"weight must be \[V, D\]"),
    (bad(weight=torch.zeros(30, 9)), ValueError, r"weight.shape must be \(30, 8\), columns as many as x's \[6, 8\]"),
    (bad(bias=torch.zeros(29)), ValueError, r"bias.shape must be \(30,\)"),
    (bad(targets=torch.zeros(6).int()), TypeError, "targets must be int64; got int32"),
    (bad(targets=torch.zeros(6, device="meta").long()), ValueError, "targets must be on x's device"),
    (bad(targets=torch.zeros(5).long()), ValueError, r"targets.shape must be \(6,\), one per row of x \[6, 8\]"),
    (bad(targets=torch.full((6,), 30)), ValueError, "targets must be at least 0 and less than 30 or -100.*got 30"),
    (bad(targets=torch.full((6,), 29), valid_vocab=29), ValueError, "targets must be at least 0 and less than 29"),
    (bad(reduction="max"), ValueError, "reduction must be one of mean, sum, none; got 'max'"),
    (bad(targets=torch.full((6,), -1)), ValueError, "targets must be at least 0 and less than 30 or -100.*got -1"),
    (bad(targets=[1] * 6), TypeError, "targets must be a tensor; got list"),
    (bad(bias=torch.zeros(30).half()), TypeError, r"bias must have x's dtype \(float32\); got float16"),
    (bad(weight=torch.zeros(30, 8, device="meta")), ValueError, "weight must be on x's device"),
    (bad(label_smoothing=-0.1), ValueError, r"label_smoothing must be at least 0 and less than 1; got -0\.1"),
    (bad(label_smoothing=1.0), ValueError, r"label_smoothing must be at least 0 and less than 1; got 1\.0"),
    (bad(z_loss=-0.1), ValueError, "z_loss must be at least 0"),
    (bad(z_loss=float("inf")), ValueError, "z_loss must be finite; got inf"),
    (bad(ignore_index=None), TypeError, "ignore_index must be a whole number; got None"),
    (bad(ignore_index=2**70), ValueError, "ignore_index must fit in 64 bits; got a number of 71 bits"),
    (bad(valid_vocab=True), TypeError, "valid_vocab must be a whole number; got True"),
    (bad(return_lse="no"), TypeError, "return_lse must be True or False; got 'no'"),
    (bad(workspace_mb=0.5), TypeError, r"workspace_mb must be a whole number; got 0\.5"),
    (bad(workspace_mb=0), ValueError, "workspace_mb must be at least 1; got 0"),
    (bad(valid_vocab=31), ValueError, "valid_vocab must be between 1 and weight's 30 rows; got 31"),
    (bad(valid_vocab=0), ValueError, "valid_vocab must be between 1"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^linear_cross_entropy: .*{match}"):
        linear_cross_entropy(**arguments)


def test_reference_backend():
    tensors = make((6, 8, 30))
    with backend("reference"):
        assert torch.equal(linear_cross_entropy(**tensors), linear_cross_entropy_reference(**tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operator_is_sound(dtype):
    x, weight, bias, targets = make((6, 8, 30), dtype).values()
    for parameter in (x, weight, bias):
        parameter.requires_grad_()
    numbers = (IGNORED, 0.1, 0.01, 30, 256)
    needs = (True, True, True)
    for reduction in ("mean", "none"):
        arguments = (x, weight, bias, targets, reduction, *numbers, *(need and reduction == "mean" for need in needs))
        assert_operator_is_sound("linear_cross_entropy", arguments)
    detached = [t.detach() for t in (x, weight, bias)]
    _, _, *gradients = torch.ops.phi1.linear_cross_entropy(*detached, targets, "mean", *numbers, *needs)
    assert_operator_is_sound("linear_cross_entropy_backward",
                                     (torch.ones(()), *gradients, targets, "mean", IGNORED, x.detach()[:0, 0]))
    assert_operator_is_sound("linear_cross_entropy_rows_backward",
                                     (torch.ones(6), *detached, targets, *numbers, *needs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(reduction):
    assert_compiles_whole(linear_cross_entropy, make((6, 8, 30)), reduction=reduction)
