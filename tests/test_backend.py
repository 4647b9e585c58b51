"""What holds for every operation: an absent gradient is none, autocast changes nothing, no gradient has a gradient."""

import pytest
import torch

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
    assert operations == {op.split(",")[0] for op in OF_ONE_INPUT} | {"rotary_"}  # which has no backward


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
