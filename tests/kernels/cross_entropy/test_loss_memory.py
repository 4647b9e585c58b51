"""linear_cross_entropy's workspace, what it keeps for the backward, what it leaves out, and what it refuses."""

import math

import pytest
import torch
from allocations import Allocations
from kernel_checks import DTYPES, assert_operator_is_sound, kept_bytes, outputs_and_gradients

from phi1.kernels import linear_cross_entropy
from phi1.kernels.cross_entropy import eager
from phi1.kernels.cross_entropy.spec import LossRule, Needs

IGNORED = -100


def make(shape, dtype=torch.float32, device="cpu"):
    n_rows, width, vocab = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(n_rows, width, generator=generator).to(dtype),
               "weight": (torch.randn(vocab, width, generator=generator) / math.sqrt(width)).to(dtype),
               "bias": torch.randn(vocab, generator=generator).to(dtype),
               "targets": torch.randint(vocab, (n_rows,), generator=generator)}
    return {name: x.to(device) for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "workspace"), [(1000, 1), (1000, 4), (1000, 256), (16384, 64), (16384, 256)])
def test_workspace_holds_the_logits(n_rows, workspace, dtype):
    vocab = 51200
    rule = LossRule(IGNORED, 0.0, 0.0, vocab, workspace << 20)
    rows, strip = eager.chunk_rows(n_rows, dtype, True, rule)
    strips = 0 if dtype == torch.float32 else strip * vocab * 4
    assert 1 <= strip <= rows <= n_rows
    assert rows * vocab * dtype.itemsize + strips <= workspace << 20
    n_chunks = math.ceil(n_rows / rows)
    if n_chunks > 1:  # one chunk fewer would not fit
        assert math.ceil(n_rows / (n_chunks - 1)) * vocab * dtype.itemsize + strips > workspace << 20


@pytest.mark.triton
@pytest.mark.parametrize(("n_rows", "workspace_mb", "rows"), [
    (16384, 256, 2048), (16384, 64, 640), (2500, 256, 2500), (100, 256, 100), (16384, 1024, 10240), (9, 1, 9),
    (16384, 1, 10), (0, 256, 0),
])
def test_chunks_of_the_kernels_fit_the_workspace(n_rows, workspace_mb, rows):
    from phi1.kernels.cross_entropy.loss_triton import chunk_rows

    row_bytes = 2 * 51200
    assert chunk_rows(n_rows, row_bytes, workspace_mb << 20) == rows
    assert rows * row_bytes <= workspace_mb << 20


@pytest.mark.triton
def test_a_row_is_computed_whatever_the_workspace():
    from phi1.kernels.cross_entropy.loss_triton import chunk_rows

    assert chunk_rows(5, 2 << 20, 1 << 20) == 1


def test_workspace_changes_no_more_than_roundings():
    tensors = make((600, 8, 4000))
    whole = outputs_and_gradients(linear_cross_entropy, tensors)
    for name, value in outputs_and_gradients(linear_cross_entropy, tensors, workspace_mb=1).items():
        torch.testing.assert_close(value, whole[name], rtol=0,
                                   atol=16 * torch.finfo(torch.float32).eps * whole[name].abs().max().item())


@pytest.mark.triton
def test_workspace_counts_all_but_inputs_and_gradients(device):
    from phi1.kernels.cross_entropy.loss_triton import launch_losses_and_gradients

    tensors = make((200, 8, 4000), device=device)
    rule = LossRule(IGNORED, 0.0, 0.0, 4000, 1 << 20)
    with Allocations(tensors.values()) as allocations:
        outputs = launch_losses_and_gradients(*tensors.values(), rule, Needs(True, True, True), None)
    returned = sum(x.nbytes for x in outputs)
    logits = 4 * 4096 * 64  # 64 rows fit; a stride is a multiple of 128 columns
    assert returned + logits <= allocations.most <= returned + (1 << 20)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_for_the_backward(device, dtype):
    """The gradients alone of a mean, float16's in float32; the inputs of losses."""
    n_rows, width, vocab = 17, 33, 129
    tensors = {name: x.requires_grad_() if x.is_floating_point() else x
               for name, x in make((n_rows, width, vocab), dtype, device).items()}
    with kept_bytes() as kept:
        loss = linear_cross_entropy(**tensors)
    size = 4 if dtype == torch.float16 else dtype.itemsize
    assert sum(kept.values()) == size * width * (n_rows + vocab) + 4 * vocab + 8 * n_rows
    with kept_bytes() as kept:
        losses = linear_cross_entropy(**tensors, reduction="none")
    assert sum(kept.values()) == sum(x.nbytes for x in tensors.values())
    assert loss.requires_grad
    assert losses.requires_grad


def test_only_wanted_gradients_are_computed(device):
    x, weight, bias, targets = make((9, 8, 30), device=device).values()
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
    monkeypatch.setattr(eager._Gradients, "add_products", lambda *_: pytest.fail("products in evaluation"))
    x.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, bias, targets)
    assert not loss.requires_grad


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"x": torch.zeros(2, 3, 8)}, ValueError, r"x must be \[N, D\]"),
    ({"weight": torch.zeros(30)}, ValueError, r"weight must be \[V, D\]"),
    ({"weight": torch.zeros(30, 9)}, ValueError, r"weight.shape must be \(30, 8\), columns as many as x's \[6, 8\]"),
    ({"bias": torch.zeros(29)}, ValueError, r"bias.shape must be \(30,\)"),
    ({"targets": torch.zeros(6).int()}, TypeError, "targets must be int64; got int32"),
    ({"targets": torch.zeros(5).long()}, ValueError, r"targets.shape must be \(6,\), one per row of x \[6, 8\]"),
    ({"targets": torch.full((6,), 30)}, ValueError, "targets must be at least 0 and less than 30 or -100.*got 30"),
    ({"targets": torch.full((6,), -1)}, ValueError, "targets must be at least 0 and less than 30 or -100.*got -1"),
    ({"targets": torch.full((6,), 29), "valid_vocab": 29}, ValueError, "targets must be at least 0 and less than 29"),
    ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none; got 'max'"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be at least 0 and less than 1; got -0\.1"),
    ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be at least 0 and less than 1; got 1\.0"),
    ({"z_loss": -0.1}, ValueError, "z_loss must be at least 0"),
    ({"z_loss": float("inf")}, ValueError, "z_loss must be finite; got inf"),
    ({"ignore_index": None}, TypeError, "ignore_index must be a whole number; got None"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index must fit in 64 bits; got a number of 71 bits"),
    ({"valid_vocab": True}, TypeError, "valid_vocab must be a whole number; got True"),
    ({"return_lse": "no"}, TypeError, "return_lse must be True or False; got 'no'"),
    ({"workspace_mb": 0.5}, TypeError, r"workspace_mb must be a whole number; got 0\.5"),
    ({"workspace_mb": 0}, ValueError, "workspace_mb must be at least 1; got 0"),
    ({"valid_vocab": 31}, ValueError, "valid_vocab must be between 1 and weight's 30 rows; got 31"),
    ({"valid_vocab": 0}, ValueError, "valid_vocab must be between 1"),
])
def test_errors(change, error, match):
    with pytest.raises(error, match=f"^linear_cross_entropy: .*{match}"):
        linear_cross_entropy(**make((6, 8, 30)) | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operator_is_sound(dtype):
    *parameters, targets = make((6, 8, 30), dtype).values()
    for parameter in parameters:
        parameter.requires_grad_()
    numbers, needs = (IGNORED, 0.1, 0.01, 30, 256), (True, True, True)
    for reduction in ("mean", "none"):
        arguments = (*parameters, targets, reduction, *numbers, *(need and reduction == "mean" for need in needs))
        assert_operator_is_sound("linear_cross_entropy", arguments)
    detached = [t.detach() for t in parameters]
    _, _, *gradients = torch.ops.phi1.linear_cross_entropy(*detached, targets, "mean", *numbers, *needs)
    assert_operator_is_sound("linear_cross_entropy_backward",
                             (torch.ones(()), *gradients, targets, "mean", IGNORED, detached[0][:0, 0]))
    assert_operator_is_sound("linear_cross_entropy_rows_backward",
                             (torch.ones(6), *detached, targets, *numbers, *needs))
