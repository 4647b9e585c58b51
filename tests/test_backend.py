"""backend("triton"): an operation that has no Triton kernel says so, and takes no other path."""

import pytest
import torch

from phi1 import kernels
from phi1.kernels import _backend

X = torch.zeros(4, 8)
QKV = torch.zeros(4, 3, 2, 16)
TABLE = torch.zeros(4, 4)
WITHOUT_KERNEL = {
    "attention": lambda: kernels.attention(*QKV[None].unbind(2)),
    "attention_qkv": lambda: kernels.attention_qkv(QKV),
    "dropout_add": lambda: kernels.dropout_add(X, X, None),
    "gelu": lambda: kernels.gelu(X),
    "linear": lambda: kernels.linear(X, X),
    "linear_cross_entropy": lambda: kernels.linear_cross_entropy(X, X, None, torch.zeros(4).long()),
    "mlp": lambda: kernels.mlp(X, X, X[:, 0], X.t(), X[0]),
    "parallel_block": lambda: kernels.parallel_block(
        X, X[0], X[0], torch.zeros(26, 8), torch.zeros(26), torch.zeros(8, 10), torch.zeros(2, 8), TABLE, TABLE,
        n_heads=1),
    "rotary": lambda: kernels.rotary(QKV, TABLE, TABLE, torch.arange(4)),
}


@pytest.mark.parametrize("op", WITHOUT_KERNEL)
def test_an_operation_without_a_kernel_says_so(monkeypatch, op):
    WITHOUT_KERNEL[op]()
    monkeypatch.setattr(_backend, "_forced", "triton")  # backend("triton") itself wants a GPU or the interpreter
    with pytest.raises(NotImplementedError, match=f"^{op}: there is no Triton kernel for this operation yet"):
        WITHOUT_KERNEL[op]()


def test_every_operation_is_known_here():
    operations = {name for name in kernels.__all__ if hasattr(torch.ops.phi1, name)}
    assert operations - set(WITHOUT_KERNEL) == {"add_layer_norm", "layer_norm"}
