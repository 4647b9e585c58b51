"""No operation waits for the device: none reads a value of a tensor on its way to the kernels.

The tensors are on PyTorch's meta device: they hold no values, and PyTorch raises where one is asked for. Copies from
the host are refused too, for they wait as well. The operators' own code runs up to the launches, which do nothing.
"""

import pytest
import torch
from operation_cases import CASES, case
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from phi1.config import preset
from phi1.kernels import backend, rotary_
from phi1.kernels.core import backend as _backend
from phi1.kernels.core import tiles
from phi1.model import Cache, Phi1

SHAPE = {"vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512,
         "num_attention_heads": 2}


class OwnCode(TorchDispatchMode):
    """Runs the code of our operators, not their fake implementations; refuses copies from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = OPDEFS.get(func._schema.name)
        if operator is not None and func.namespace == "phi1":
            with self:
                return operator._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[0] if func._overloadpacket is torch.ops.aten._to_copy else args[1]
            assert source.device == out.device or source.dim() == 0, f"a copy from {source.device} waits"
        return out


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request, monkeypatch):
    """Names of the kernels that were launched, on what passes for a GPU of this architecture."""
    jit = pytest.importorskip("triton.runtime.jit")
    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **options: launched.append(self.__name__))
    monkeypatch.setattr(tiles, "architecture", lambda device: request.param)
    monkeypatch.setattr(tiles, "gpu_name", lambda device: "")
    monkeypatch.setattr(_backend, "interpreting", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # PyTorch has none for this device
    with backend("triton"), OwnCode():
        yield launched


def ints(*shape):
    return torch.empty(shape, dtype=torch.int64, device="meta")


MADE = {name: case(name, "meta", torch.float16, rows=24) for name in CASES}  # here, for copies are refused in a test


@pytest.mark.parametrize("name", CASES)
def test_an_operation_and_its_backward_do_not_wait(gpu, name):
    of = MADE[name]
    leaves = {argument: x.detach().requires_grad_() for argument, x in of.tensors.items()}
    out = of.operation(**leaves, **of.options)
    out = out if isinstance(out, torch.Tensor) else out[1]
    forward = len(gpu)
    out.backward(torch.empty_like(out))
    assert 0 < forward < len(gpu) or name == "linear_cross_entropy"  # whose forward has computed the gradients


def test_rotating_in_place_does_not_wait(gpu):
    of = MADE["rotary"]
    rotary_(of.tensors["x"], **of.options)
    assert gpu


def test_decoding_does_not_wait(gpu):
    config = preset("nano", **SHAPE)
    model, cache = Phi1(config, device="meta", dtype=torch.float16).eval(), Cache(config, 2, 24, device="meta",
                                                                                  dtype=torch.float16)
    with torch.no_grad():
        model(ints(2, 20), cache=cache, logits_to_keep=1)
        prompt = len(gpu)
        model(ints(2, 1), cache=cache)
    assert 0 < prompt < len(gpu)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_a_training_step_does_not_wait(gpu, recompute, dropout):
    config = preset("nano", **SHAPE, attention_dropout=dropout, residual_dropout=dropout)
    model = Phi1(config, device="meta", dtype=torch.float16).train()
    model.recompute = recompute
    loss = model.loss(ints(2, 24), ints(2, 24), rng=ints(2), sample_ids=ints(2))
    loss.backward()
    assert len(gpu) > 20


@pytest.mark.parametrize("waits", [
    lambda x: x.sum().item(),
    lambda x: x.cpu(),
    lambda x: x[x > 0],
    lambda x: torch.zeros(3).to(x.device),
], ids=["item", "cpu", "mask", "to"])
def test_what_waits_is_noticed(gpu, waits):
    with pytest.raises((RuntimeError, AssertionError)):
        waits(torch.empty(3, device="meta"))
