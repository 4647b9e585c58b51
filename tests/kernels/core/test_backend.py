"""Operations run on their arguments' GPU, and their kernels are compiled once for any number of documents."""

from contextlib import contextmanager

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode


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
