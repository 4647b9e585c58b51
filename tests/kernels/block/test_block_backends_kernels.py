"""The parallel block's backward on another backend than its forward (run by test_interpreter.py without a GPU).

No backend forced, "default", is PyTorch's code without a GPU and the Triton kernels with one.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointError, checkpoint

from phi1 import testing
from phi1.config import preset
from phi1.kernels import Dropout, parallel_block
from phi1.kernels.block import projections_triton as projections
from phi1.kernels.block.parallel_block import RECOMPUTE, parallel_block_reference
from phi1.kernels.core import backend
from phi1.model import Phi1

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

DIRECTIONS = [("triton", "default"), ("default", "triton"), ("triton", "reference")]
SHAPE = (2, 17, 32, 2, 48, 8)  # B, T, D, H, F, R
WIDE_HEADS = (2, 9, 160, 2, 40, 32)  # phi-2's, no power of two: in_proj's kernel does not rotate them
RNG = torch.tensor([5, 7], device=DEVICE)


@contextmanager
def on(name):
    """One backend inside; unlike `backend`, also the default one inside of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_forced", None if name == "default" else name)
        yield


def options_of(shape, **more):
    cos, sin = testing.rotary_tables(shape[-1])
    return {"cos": cos, "sin": sin, "n_heads": shape[3], "batch": shape[0], **more}


def check(forward, backward, recompute, shape=SHAPE, dtype=torch.float32, **more):
    def operation(**arguments):
        with on(forward):
            return parallel_block(**arguments, recompute=recompute)

    with on(backward):
        testing.assert_matches_reference(operation, parallel_block_reference, testing.block_inputs(shape, dtype),
                                         roundings=8, **options_of(shape, **more))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("forward", "backward"), DIRECTIONS)
@pytest.mark.parametrize(("shape", "dtype"), [(SHAPE, torch.float16), (WIDE_HEADS, torch.float32)], ids=str)
def test_the_backward_takes_what_another_backend_saved(shape, dtype, forward, backward, recompute):
    check(forward, backward, recompute, shape, dtype)


@pytest.mark.parametrize(("forward", "backward"), DIRECTIONS)
def test_also_where_cublas_multiplies(monkeypatch, forward, backward):
    monkeypatch.setattr(projections, "tile", lambda *_, **__: {"cublas": 1})
    check(forward, backward, "none")


@pytest.mark.parametrize(("forward", "backward"), DIRECTIONS)
def test_also_of_packed_documents_with_dropout(forward, backward):
    ids = torch.tensor([40, 3], device=DEVICE)
    dropouts = tuple(Dropout(0.2, RNG, ids, layer=3, kind=kind) for kind in range(3))
    cuts = torch.tensor([0, 20, 34], dtype=torch.int32, device=DEVICE)
    check(forward, backward, "none", batch=None, cu_seqlens=cuts, dropouts=dropouts)


@pytest.mark.parametrize(("forward", "backward"), DIRECTIONS)
def test_also_in_a_model(forward, backward):
    config = preset("nano", vocab_size=130, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=2, rotary_dim=8, max_position_embeddings=32, attention_dropout=0.0,
                    residual_dropout=0.0)
    model = Phi1(config, device=DEVICE)
    model.init_weights(0)
    ids = torch.randint(130, (2, 14), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients(first, then):
        with on(first):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        with on(then):
            return torch.autograd.grad(loss, list(model.parameters()))

    for got, wanted in zip(gradients(forward, backward), gradients("reference", "reference"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="the default backend is Triton's there")
@pytest.mark.parametrize(("forward", "backward"), DIRECTIONS[:2])
def test_a_checkpoint_computed_again_on_another_backend_is_refused(forward, backward):
    """PyTorch puts what is saved the second time in place of the first one's; without rotation, that differs in shape.
    """
    tensors = {name: x.requires_grad_() for name, x in testing.block_inputs(SHAPE).items()}
    with on(forward):
        y = checkpoint(parallel_block, use_reentrant=False, **tensors, **options_of(SHAPE))
    with on(backward), pytest.raises(CheckpointError, match="different metadata"):
        y.sum().backward()


OPERATORS = {  # operator, its arguments behind x, the parameters and the rotation
    **{recompute: ("parallel_block", (None, None, None, None, 2, 2, (0.0,) * 3, (0,) * 3, (0,) * 3, 1e-5, recompute))
       for recompute in RECOMPUTE},
    "prefill": ("parallel_block_prefill", (None, 2, 2, 1e-5)),
}


@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("name", ["triton", "default"])
def test_the_fake_operator_has_the_shapes_of_either_backend(name, case):
    operator, others = OPERATORS[case]
    run = getattr(torch.ops.phi1, operator)
    x, *parameters = testing.block_inputs(SHAPE).values()
    rotary = (*testing.rotary_tables(SHAPE[-1]), torch.arange(34, device=DEVICE))
    with on(name):
        real = run(x, parameters, rotary, *others)
        with FakeTensorMode() as mode:
            fake = run(*tree_map(mode.from_tensor, (x, parameters, rotary)), *others)
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]
