"""linear_cross_entropy against its reference and F.cross_entropy, in one chunk and in many."""

import math

import pytest
import torch
from kernel_checks import (
    DTYPES,
    assert_within_bound,
    empty_is_nan,
    launches,
    only,
    outputs_and_gradients,
    to_float64,
)
from torch.nn.functional import cross_entropy

from phi1.kernels import backend, check_values, linear_cross_entropy
from phi1.kernels.cross_entropy import eager
from phi1.kernels.cross_entropy.linear_cross_entropy import linear_cross_entropy_reference
from phi1.kernels.cross_entropy.spec import LossRule

SHAPES = [  # N, D, V
    *only("eager", (3, 4, 2)),  # the smallest with no gradient that should be 0
    *only("triton", (1, 1, 2)),  # the smallest with a gradient
    (17, 33, 129),  # an odd vocabulary, one over a multiple of the stride's
    (5, 16, 5000),  # two blocks of a row, two slices of the vocabulary
    *only("triton", (130, 8, 100)),  # more rows than a block of column_sums has
]
VARIANTS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.02},
    "everything": {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "ignore_index": 1,
                   "valid_vocab": 77, "return_lse": True},
}
IGNORED = -100


def make(shape, dtype=torch.float32, device="cpu", bias=True):
    n_rows, width, vocab = shape
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(min(vocab, 77), (n_rows,), generator=generator)
    targets[1:2] = IGNORED
    tensors = {
        "x": torch.randn(n_rows, width, generator=generator).to(dtype),
        "weight": (torch.randn(vocab, width, generator=generator) / math.sqrt(width)).to(dtype),
        "bias": torch.randn(vocab, generator=generator).to(dtype) if bias else None,
        "targets": targets,
    }
    return {name: None if x is None else x.to(device) for name, x in tensors.items()}


def check(tensors, **options):
    """The tolerance rule; logits of 16 bits are rounded on both sides, which the float32 loss inherits."""
    if "ignore_index" in options:
        targets = tensors["targets"]
        tensors = {**tensors, "targets": targets.where(targets != IGNORED, options["ignore_index"])}
    with empty_is_nan():
        got = outputs_and_gradients(linear_cross_entropy, tensors, **options)
    wanted = outputs_and_gradients(linear_cross_entropy_reference, tensors, **options)
    exact = outputs_and_gradients(
        linear_cross_entropy_reference, {name: to_float64(x) for name, x in tensors.items()}, **options)
    dtype = tensors["x"].dtype
    for name, out in got.items():
        # Sums over thousands of columns, in another order for each number of threads.
        roundings = 8 * torch.finfo(dtype).eps / torch.finfo(out.dtype).eps if name.startswith("out") else 8
        assert_within_bound(out, wanted[name], exact[name], name, roundings=roundings)
    return got


@pytest.fixture
def small_chunks(request, monkeypatch):
    """Chunks of 7 rows, on the CPU in strips of 3, and slices of the vocabulary of 50 columns."""
    monkeypatch.setattr(eager, "chunk_rows", lambda *_: (7, 3))
    monkeypatch.setattr(eager, "VOCABULARY_SLICE", 50)
    if request.node.get_closest_marker("triton"):
        monkeypatch.setattr("phi1.kernels.cross_entropy.loss_triton.chunk_rows", lambda *_: 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy_matches_reference(device, shape, dtype):
    check(make(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(17, 33, 129), *only("eager", (50, 16, 5000))], ids=str)
def test_every_option_matches_reference(device, shape, variant, dtype):
    check(make(shape, dtype, device), **VARIANTS[variant])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["mean", "everything", *only("eager", "sum", "none", "smoothed", "z-loss")])
def test_chunks_match_reference(small_chunks, device, variant, dtype):
    check(make((17, 33, 129), dtype, device), **VARIANTS[variant])


@pytest.mark.parametrize("reduction", ["mean", *only("eager", "none")])
@pytest.mark.parametrize("valid_vocab", [129, 128, 78])
@pytest.mark.parametrize("dtype", [torch.float16, *only("eager", torch.float32, torch.bfloat16)], ids=str)
def test_without_bias_and_with_a_smaller_vocabulary(device, reduction, valid_vocab, dtype):
    options = {"valid_vocab": valid_vocab, "reduction": reduction}
    got = check(make((17, 33, 129), dtype, device, bias=False), **options)
    assert not got["dx"][1].any()  # an ignored row
    assert got["dx"][0].any()
    assert not got["dweight"][valid_vocab:].any()
    got = check(make((17, 33, 129), dtype, device), **options, label_smoothing=0.1)
    assert not got["dbias"][valid_vocab:].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_reference_is_pytorchs_cross_entropy(reduction, smoothing):
    x, weight, bias, targets = make((17, 33, 65), torch.float64).values()
    targets.clamp_(max=64)
    expected = cross_entropy(x @ weight.t() + bias, targets, reduction=reduction, label_smoothing=smoothing)
    loss = linear_cross_entropy_reference(x, weight, bias, targets, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_z_loss_is_the_mean_square_of_lse(device):
    x, weight, bias, targets = make((17, 33, 129), device=device).values()
    plain, lse = linear_cross_entropy(x, weight, bias, targets, return_lse=True)
    torch.testing.assert_close(lse, (x @ weight.t() + bias).logsumexp(1))
    with_z = linear_cross_entropy(x, weight, bias, targets, z_loss=0.5)
    torch.testing.assert_close(with_z - plain, 0.5 * lse[targets != IGNORED].square().mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uniform_logits_lose_log_v(device, dtype):
    x, targets = torch.randn(9, 8).to(device, dtype), torch.randint(300, (9,)).to(device)
    weight, bias = torch.zeros(512, 8, dtype=dtype, device=device), torch.zeros(512, dtype=dtype, device=device)
    for vocab in (512, 300):
        loss = linear_cross_entropy(x, weight, bias, targets, valid_vocab=vocab)
        assert loss.item() == pytest.approx(math.log(vocab), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_stay_finite(device, dtype):
    tensors = make((17, 33, 129), dtype, device)
    tensors["x"] *= 500
    got = outputs_and_gradients(linear_cross_entropy, tensors)
    assert all(out.isfinite().all() for out in got.values())


@pytest.mark.parametrize("logit", [-1e4, -1e34])
def test_large_negative_logits_are_not_taken_for_none(device, logit):
    x, weight = torch.ones(2, 8, device=device), torch.full((300, 8), logit / 8, device=device)
    loss = linear_cross_entropy(x, weight, None, torch.tensor([0, 299], device=device))
    assert loss.isfinite()


def test_all_ignored(device):
    tensors = make((9, 8, 30), device=device)
    tensors["targets"].fill_(IGNORED)
    total = outputs_and_gradients(linear_cross_entropy, tensors, reduction="sum")
    mean = outputs_and_gradients(linear_cross_entropy, tensors)
    assert total["out0"].item() == 0
    assert mean["out0"].isnan()  # a mean over nothing, as PyTorch's
    assert not any(got[name].any() for got in (total, mean) for name in ("dx", "dweight", "dbias"))


@pytest.mark.parametrize("scale", [2.0**8, 2.0**13])
def test_float16_gradients_of_a_scaled_loss_do_not_flush_to_zero(scale):
    """At the initial loss, with the factor of a loss scaler."""
    n_rows, vocab = 256, 20000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 32, generator=generator).half().requires_grad_()
    weight = (0.02 * torch.randn(vocab, 32, generator=generator)).half().requires_grad_()
    targets = torch.randint(100, (n_rows,), generator=generator)
    (linear_cross_entropy(x, weight, None, targets) * scale).backward()
    x64, weight64 = (p.detach().double().requires_grad_() for p in (x, weight))
    (linear_cross_entropy_reference(x64, weight64, None, targets) * scale).backward()
    got, exact = weight.grad.double(), weight64.grad
    mass = got[100:].abs().sum() / exact[100:].abs().sum()  # of columns that are nobody's target
    assert 0.999 < mass < 1.001
    assert (got - exact).abs().max() < 2e-3 * exact.abs().max()


@pytest.mark.slow
def test_float16_keeps_the_mass_of_gradients_at_full_size():
    """phi-1's vocabulary and batch; inputs are positive, so that the mass of columns nobody targets does not cancel."""
    n_rows, vocab, width, scale = 16384, 51200, 8, 2.0**16
    generator = torch.Generator().manual_seed(0)
    x, repeats = torch.rand(64, width, generator=generator).half(), n_rows // 64
    weight = (0.02 * torch.randn(vocab, width, generator=generator)).half().requires_grad_()
    targets = torch.randint(100, (n_rows,), generator=generator)
    (linear_cross_entropy(x.repeat(repeats, 1), weight, None, targets) * scale).backward()
    exact = (x.double() @ weight.detach().double().t()).softmax(1).t() @ x.double()
    mass = weight.grad[100:].double().sum() / (exact[100:].sum() * repeats * scale / n_rows)
    assert 0.999 < mass < 1.001


@pytest.mark.triton
def test_the_kernel_keeps_the_mass_of_small_float16_gradients(device):
    """At phi-1's vocabulary and the initial loss, where p is 2e-5; rows are not normalised, so N plays no part."""
    from phi1.kernels.cross_entropy.loss_triton import launch_loss_rows

    n_rows, vocab = 4, 51200
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_rows, vocab, generator=generator).half().to(device)
    exact = logits.double().softmax(1)
    targets = torch.randint(vocab, (n_rows,), generator=generator).to(device)
    rule = LossRule(IGNORED, 0.0, 0.0, vocab, 256 << 20)
    losses, lse = torch.empty(2, n_rows, device=device)
    launch_loss_rows(logits, None, targets, None, losses, lse, rule, vocab, gradients=True)
    others = torch.ones_like(exact).scatter_(1, targets[:, None], 0)
    mass = (logits.double() / 1024 * others).sum() / (exact * others).sum()
    assert 0.999 < mass < 1.001
    assert (logits.double() == 0).sum() == 0
    torch.testing.assert_close(losses.double(), -exact.gather(1, targets[:, None])[:, 0].log())


def test_float16_gradients_of_frequent_targets_do_not_overflow(device):
    x = torch.ones(512, 8, dtype=torch.float16, device=device)
    weight = torch.zeros(50, 8, dtype=torch.float16, device=device, requires_grad=True)
    linear_cross_entropy(x, weight, None, torch.zeros(512, dtype=torch.int64, device=device)).backward()
    torch.testing.assert_close(weight.grad[0].cpu(), torch.full((8,), 1 / 50 - 1, dtype=torch.float16))


def test_lse_carries_no_gradient(device):
    x, weight, bias, targets = make((9, 8, 30), device=device).values()
    targets.clamp_(max=29)
    for context in (backend("reference"), check_values(True)):
        with context:
            _, lse = linear_cross_entropy(x.requires_grad_(), weight, bias, targets, return_lse=True)
        assert not lse.requires_grad


def test_rows_without_incoming_gradient_get_0(device):
    x, weight, bias, targets = make((3, 4, 80), device=device).values()
    (linear_cross_entropy(x.requires_grad_(), weight, bias, targets, reduction="none") * 0).sum().backward()
    assert not x.grad.any()


def test_unchecked_targets_out_of_range_give_nan_rows(device):
    x, weight, bias, targets = make((9, 8, 130), device=device).values()
    targets[3], targets[5] = 129, -7
    x.requires_grad_()
    with check_values(False):
        losses = linear_cross_entropy(x, weight, bias, targets, reduction="none", valid_vocab=128)
        losses[[0, 1, 2, 4, 6, 7, 8]].sum().backward()
    expected = torch.zeros(9, dtype=torch.bool, device=device)
    expected[[3, 5]] = True
    assert torch.equal(losses.isnan(), expected)
    assert torch.equal(x.grad.isnan().all(1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, *only("eager", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_inputs_match_reference(device, reduction, dtype):
    tensors = make((17, 33, 65), dtype, device)
    check({
        "x": tensors["x"].t().contiguous().t(),
        "weight": tensors["weight"].repeat_interleave(2, 1)[:, ::2],
        "bias": tensors["bias"][:1].expand(65),
        "targets": tensors["targets"].clamp(max=64).repeat(2).view(2, 17).t()[:, 0],
    }, reduction=reduction)


@pytest.mark.triton
def test_the_kernels_ran_and_only_what_is_wanted(monkeypatch, device):
    from phi1.kernels.cross_entropy import loss_triton

    x, weight, bias, targets = make((4, 8, 80), device=device).values()
    with launches() as launched, torch.no_grad():
        linear_cross_entropy(x, weight.requires_grad_(), bias, targets)
    assert launched == ["loss_rows_kernel"]
    products = []
    multiply = loss_triton._multiply
    monkeypatch.setattr(loss_triton, "_multiply", lambda *a, **k: products.append(1) or multiply(*a, **k))
    with launches() as launched:
        linear_cross_entropy(x, weight, bias, targets).backward()
    assert launched[0] == "loss_rows_kernel"
    assert launched[1:] == ["scale_kernel"] * (len(launched) - 1)
    assert len(products) == 1


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_chunks_are_bitwise_repeatable(small_chunks, device, dtype):
    tensors = make((17, 33, 129), dtype, device)
    first, second = (outputs_and_gradients(linear_cross_entropy, tensors) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
