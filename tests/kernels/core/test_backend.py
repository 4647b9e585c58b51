"""What holds for every operation: an absent gradient is none, autocast changes nothing, no gradient has a gradient; it
runs on its arguments' GPU, and its kernels are compiled once for any number of documents."""

from contextlib import contextmanager

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode

from phi1 import kernels

ANY = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
TABLE = torch.zeros(4, 4)
OF_ONE_INPUT = {
    "add_layer_norm": lambda x: kernels.add_layer_norm(x, x, ANY[0], ANY[1])[1],
    "attention": lambda x: kernels.attention(*[x.view(1, 4, 2, 4)] * 3),
    "attention_qkv": lambda x: kernels.attention_qkv(x.view(4, 1, 2, 4).expand(4, 3, 2, 4)),
    "dropout_add": lambda x: kernels.dropout_add(x, x, None),
    "gelu": kernels.gelu,
    "layer_norm": lambda x: kernels.layer_norm(x, ANY[0], ANY[1]),
    "linear": lambda x: kernels.linear(x, ANY[:3], ANY[0, :3], activation="gelu_new"),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, ANY, None, torch.arange(4)),
    "linear_cross_entropy, none": lambda x: kernels.linear_cross_entropy(x, ANY, None, torch.arange(4),
                                                                         reduction="none"),
    "mlp": lambda x: kernels.mlp(x, ANY, ANY[0, :4], ANY.t(), ANY[1]),
    "parallel_block": lambda x: kernels.parallel_block(
        x, ANY[0], ANY[1], ANY.repeat(7, 1)[:26], ANY.flatten()[:26], ANY.repeat(2, 2)[:, :10], ANY[:2], TABLE + 1,
        TABLE, n_heads=1),
    "rotary": lambda x: kernels.rotary(x.view(4, 1, 1, 8), TABLE + 1, TABLE, torch.arange(4)),
}


class Absent(torch.autograd.Function):
    """Passes x on, and gives no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def test_every_operation_is_known_here():
    operations = {name for name in kernels.__all__ if hasattr(torch.ops.phi1, name)}
    without_backward = {"rotary_", "parallel_block_decode", "parallel_block_prefill"}
    assert operations == {op.split(",")[0] for op in OF_ONE_INPUT} | without_backward


@pytest.mark.parametrize("op", OF_ONE_INPUT)
def test_an_absent_gradient_is_none(op):
    x = ANY.clone().requires_grad_()
    Absent.apply(OF_ONE_INPUT[op](x)).sum().backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("op", OF_ONE_INPUT)
def test_the_arguments_decide_and_not_autocast(op):
    def outcome(enabled):
        x = ANY.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = OF_ONE_INPUT[op](x)
        y.square().sum().backward()
        return y.detach(), x.grad

    for got, want in zip(outcome(True), outcome(False), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", [op for op in OF_ONE_INPUT if op not in ("rotary", "dropout_add")])
def test_a_second_backward_raises(op):
    x = ANY.clone().requires_grad_()
    gradient, = torch.autograd.grad(OF_ONE_INPUT[op](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (gradient.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("op", ["gelu", "layer_norm_backward"])
def test_an_operation_runs_where_its_arguments_are(monkeypatch, op):
    entered = []

    @contextmanager
    def device(given):
        entered.append(given)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    with FakeTensorMode():
        for number in (0, 1):
            x = torch.empty(3, 4, device=f"cuda:{number}")
            with pytest.raises(Exception):  # noqa: B017  # there is no GPU to launch on
                OPDEFS[f"phi1::{op}"]._init_fn(x, *[x] * 5)
    assert entered == [torch.device("cuda:1")]


def test_no_kernel_is_specialised_for_a_number_of_documents():
    pytest.importorskip("triton")
    from phi1.kernels.attention import backward_triton, forward_triton
    from phi1.kernels.block import bias_grad_triton
    from phi1.kernels.gemm import linear_triton
    from phi1.kernels.pointwise import epilogue_triton

    files = (backward_triton, forward_triton, bias_grad_triton, epilogue_triton, linear_triton)
    takers = [kernel for file in files for name, kernel in vars(file).items()
              if name.endswith("_kernel") and "n_samples" in kernel.arg_names]
    assert len(takers) >= 7
    for kernel in takers:
        assert next(p for p in kernel.params if p.name == "n_samples").do_not_specialize, kernel
