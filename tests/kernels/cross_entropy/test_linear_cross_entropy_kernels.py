"""The Triton kernels of linear_cross_entropy: on a GPU, or in Triton's interpreter (run by test_interpreter.py).

bfloat16 is tested in the interpreter too: the products are PyTorch's, and the kernels cast up before any arithmetic.
"""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi1 import testing
from phi1.kernels import backend, check_values, linear_cross_entropy
from phi1.kernels.cross_entropy import loss_triton as kernels
from phi1.kernels.cross_entropy.linear_cross_entropy import linear_cross_entropy_reference
from phi1.kernels.cross_entropy.spec import LossRule, Needs

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

SHAPES = [  # N, D, V
    (1, 1, 2),  # the smallest with a gradient
    (17, 33, 129),  # an odd vocabulary, one over a multiple of the stride's
    (5, 16, 4100),  # two blocks of a row, the second almost empty
    (130, 8, 100),  # more rows than a block of column_sums has
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


def make(shape, dtype=torch.float32, bias=True):
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
    return {name: None if x is None else x.to(DEVICE) for name, x in tensors.items()}


def check(tensors, **options):
    """The tolerance rule; logits of 16 bits are rounded on both sides, which the float32 loss inherits."""
    if "ignore_index" in options:
        targets = tensors["targets"]
        tensors = {**tensors, "targets": targets.where(targets != IGNORED, options["ignore_index"])}
    with backend("triton"), testing.empty_is_nan():
        got = testing.outputs_and_gradients(linear_cross_entropy, tensors, **options)
    eager = testing.outputs_and_gradients(linear_cross_entropy_reference, tensors, **options)
    exact = testing.outputs_and_gradients(
        linear_cross_entropy_reference, {name: testing.to_float64(x) for name, x in tensors.items()}, **options)
    dtype = tensors["x"].dtype
    for name, out in got.items():
        roundings = 8 * torch.finfo(dtype).eps / torch.finfo(out.dtype).eps if name.startswith("out") else 8
        testing.assert_within_bound(out, eager[name], exact[name], name, roundings=roundings)
    return got


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "chunk_rows", lambda *_: 7)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_reference(shape, dtype):
    check(make(shape, dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_matches_reference(variant, dtype):
    check(make((17, 33, 129), dtype), **VARIANTS[variant])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["mean", "everything"])
def test_chunks_match_reference(small_chunks, variant, dtype):
    check(make((17, 33, 129), dtype), **VARIANTS[variant])


@pytest.mark.parametrize("valid_vocab", [129, 128, 78])
def test_without_bias_and_with_a_smaller_vocabulary(valid_vocab):
    got = check(make((17, 33, 129), torch.float16, bias=False), valid_vocab=valid_vocab)
    assert not got["dweight"][valid_vocab:].any()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_uniform_logits_lose_log_v(dtype):
    x, targets = torch.randn(4, 8, device=DEVICE).to(dtype), torch.randint(300, (4,), device=DEVICE)
    weight, bias = torch.zeros(512, 8, dtype=dtype, device=DEVICE), torch.zeros(512, dtype=dtype, device=DEVICE)
    with backend("triton"):
        for vocab in (512, 300):
            loss = linear_cross_entropy(x, weight, bias, targets, valid_vocab=vocab)
            assert loss.item() == pytest.approx(math.log(vocab), rel=1e-6)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_large_logits_stay_finite(dtype):
    tensors = make((17, 33, 129), dtype)
    tensors["x"] *= 500
    with backend("triton"):
        got = testing.outputs_and_gradients(linear_cross_entropy, tensors)
    assert all(out.isfinite().all() for out in got.values())


def test_all_ignored():
    tensors = make((9, 8, 30))
    tensors["targets"].fill_(IGNORED)
    with backend("triton"):
        total = testing.outputs_and_gradients(linear_cross_entropy, tensors, reduction="sum")
        mean = testing.outputs_and_gradients(linear_cross_entropy, tensors)
    assert total["out0"].item() == 0
    assert mean["out0"].isnan()  # a mean over nothing, as PyTorch's
    assert not any(got[name].any() for got in (total, mean) for name in ("dx", "dweight", "dbias"))


def test_unchecked_targets_out_of_range_give_nan_rows():
    x, weight, bias, targets = make((9, 8, 130)).values()
    targets[3], targets[5] = 129, -7
    x.requires_grad_()
    with backend("triton"), check_values(False):
        losses = linear_cross_entropy(x, weight, bias, targets, reduction="none", valid_vocab=128)
        losses[[0, 1, 2, 4, 6, 7, 8]].sum().backward()
    expected = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    expected[[3, 5]] = True
    assert torch.equal(losses.isnan(), expected)
    assert torch.equal(x.grad.isnan().all(1), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_non_contiguous_and_empty_inputs(reduction):
    tensors = make((17, 33, 65), torch.float16)
    strided = {
        "x": tensors["x"].t().contiguous().t(),
        "weight": tensors["weight"].repeat_interleave(2, 1)[:, ::2],
        "bias": tensors["bias"][:1].expand(65),
        "targets": tensors["targets"].repeat(2).view(2, 17).t()[:, 0],
    }
    check(strided, reduction=reduction)
    empty = {**tensors, "x": tensors["x"][:0], "targets": tensors["targets"][:0]}
    check(empty, reduction="sum" if reduction == "mean" else reduction)


def test_the_kernels_ran_and_only_what_is_wanted(monkeypatch):
    launched = []
    for name in ("launch_loss_rows", "launch_column_sums", "launch_scale", "_multiply"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name,
            lambda *a, launch=launch, name=name, **k: launched.append((name, a[-1])) or launch(*a, **k))
    x, weight, bias, targets = make((4, 8, 30)).values()
    with backend("triton"):
        with torch.no_grad():
            linear_cross_entropy(x, weight.requires_grad_(), bias, targets)
        assert launched == [("launch_loss_rows", False)]
        launched.clear()
        linear_cross_entropy(x, weight, bias, targets).backward()
    assert [name for name, _ in launched] == ["launch_loss_rows", "_multiply", *["launch_scale"] * 3]
    assert launched[0] == ("launch_loss_rows", True)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_gradients_are_bitwise_repeatable(small_chunks, dtype):
    tensors = make((17, 33, 129), dtype)
    with backend("triton"):
        first, second = (testing.outputs_and_gradients(linear_cross_entropy, tensors) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_float16_keeps_the_mass_of_small_gradients():
    """At phi-1's vocabulary and the initial loss, where p is 2e-5; rows are not normalised, so N plays no part."""
    n_rows, vocab = 4, 51200
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_rows, vocab, generator=generator).half().to(DEVICE)
    exact = logits.double().softmax(1)
    targets = torch.randint(vocab, (n_rows,), generator=generator).to(DEVICE)
    rule = LossRule(IGNORED, 0.0, 0.0, vocab, 256 << 20)
    losses, lse = torch.empty(2, n_rows, device=DEVICE)
    kernels.launch_loss_rows(logits, None, targets, None, losses, lse, rule, vocab, gradients=True)
    others = torch.ones_like(exact).scatter_(1, targets[:, None], 0)
    mass = (logits.double() / 1024 * others).sum() / (exact * others).sum()
    assert 0.999 < mass < 1.001
    assert (logits.double() == 0).sum() == 0
    torch.testing.assert_close(losses.double(), -exact.gather(1, targets[:, None])[:, 0].log())


@pytest.mark.parametrize(("n_rows", "workspace_mb", "rows"), [
    (16384, 256, 2048), (16384, 64, 640), (2500, 256, 2500), (100, 256, 100), (16384, 1024, 10240), (9, 1, 9),
    (16384, 1, 10), (0, 256, 0),
])
def test_chunks_fit_the_workspace(n_rows, workspace_mb, rows):
    row_bytes = 2 * 51200
    assert kernels.chunk_rows(n_rows, row_bytes, workspace_mb << 20) == rows
    assert rows * row_bytes <= workspace_mb << 20


def test_a_row_is_computed_whatever_the_workspace():
    assert kernels.chunk_rows(5, 2 << 20, 1 << 20) == 1


class Allocations(TorchDispatchMode):
    """The most bytes that tensors made inside held at once, those handed in left out."""

    def __init__(self, *given):
        super().__init__()
        self.seen = {x.untyped_storage().data_ptr() for x in given}
        self.held = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.seen:
                self._hold(x.untyped_storage())
        return out

    def _hold(self, storage):
        pointer, n_bytes = storage.data_ptr(), storage.nbytes()
        self.seen.add(pointer)
        self.held += n_bytes
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._release, pointer, n_bytes)

    def _release(self, pointer, n_bytes):
        self.seen.discard(pointer)
        self.held -= n_bytes


def test_workspace_counts_all_but_inputs_and_gradients():
    tensors = make((200, 8, 4000))
    rule = LossRule(IGNORED, 0.0, 0.0, 4000, 1 << 20)
    with backend("triton"), Allocations(*tensors.values()) as allocations:
        outputs = kernels.launch_losses_and_gradients(*tensors.values(), rule, Needs(True, True, True), None)
    returned = sum(x.nbytes for x in outputs)
    logits = 4 * 4096 * 64  # 64 rows fit; a stride is a multiple of 128 columns
    assert returned + logits <= allocations.most <= returned + (1 << 20)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_what_is_kept_for_the_backward(dtype):
    """Of a mean, the gradients alone, float16's in float32; of losses, the inputs."""
    n_rows, width, vocab = 17, 33, 129
    tensors = {name: x.requires_grad_() if x.is_floating_point() else x
               for name, x in make((n_rows, width, vocab), dtype).items()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = linear_cross_entropy(**tensors)
    size = 4 if dtype == torch.float16 else dtype.itemsize
    assert sum(kept.values()) == size * width * (n_rows + vocab) + 4 * vocab + 8 * n_rows
    kept.clear()
    with backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = linear_cross_entropy(**tensors, reduction="none")
    assert sum(kept.values()) == sum(x.nbytes for x in tensors.values())
    assert loss.requires_grad
    assert losses.requires_grad
