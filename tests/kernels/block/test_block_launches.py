"""The parallel block's launches on Triton kernels, with any of its products by cuBLAS, and the tensors they write."""

import pytest
import torch
from block_cases import SHAPE, drops, ints, options
from kernel_checks import (
    DTYPES_OF_PRODUCTS,
    assert_matches_reference,
    assert_within_bound,
    block_inputs,
    empty_is_nan,
    kernel_device,
    outputs_and_gradients,
)

from phi1.kernels import backend, parallel_block, parallel_block_prefill
from phi1.kernels.block import projections_triton as projections
from phi1.kernels.block.bias_grad_triton import launch_branch_gradients
from phi1.kernels.block.parallel_block import RECOMPUTE, parallel_block_reference
from phi1.kernels.gemm import linear_triton
from phi1.kernels.pointwise.dropout import dropped

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("device")]
DEVICE = kernel_device()
CUBLAS = {"cublas": 1}


def check(dtype=torch.float32, **more):
    assert_matches_reference(parallel_block, parallel_block_reference, block_inputs(SHAPE, dtype, DEVICE), roundings=8,
                             **options(DEVICE, **more))


@pytest.fixture
def cublas_for(monkeypatch):
    """Lets cuBLAS multiply in one projection; the other one has its tile of the table."""
    def choose(kernel):
        table = projections.tile
        monkeypatch.setattr(projections, "tile", lambda op, name, device, **shape: CUBLAS if name == kernel else
                            table(op, name, device, **shape))

    return choose


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("kernel", ["in_proj", "out_proj"])
def test_products_of_cublas_match_reference(cublas_for, kernel, dtype):
    cublas_for(kernel)
    check(dtype)


def test_dropout_of_packed_documents_beside_products_of_cublas_matches_reference(monkeypatch):
    monkeypatch.setattr(linear_triton, "tile", lambda *_, **__: CUBLAS)
    check(batch=None, cu_seqlens=ints(DEVICE, 0, 20, 34), dropouts=drops(DEVICE, (0, 0.2, 0.3), (40, 3)))


def test_prefill_beside_products_of_cublas_is_the_block(cublas_for):
    cublas_for("in_proj")
    tensors, own = block_inputs(SHAPE, torch.float16, DEVICE), options(DEVICE, seq_starts=ints(DEVICE, 0, 3))
    with empty_is_nan():
        got = parallel_block_prefill(**tensors, **own)
        assert torch.equal(got[0], parallel_block(**tensors, **own))
    with backend("reference"):
        eager = parallel_block_prefill(**tensors, **own)
        exact = parallel_block_prefill(**{name: x.double() for name, x in tensors.items()}, **own)
    for i, name in enumerate(("out", "keys", "values")):
        assert_within_bound(got[i], eager[i], exact[i], name, roundings=8)


def test_what_is_computed_again_beside_products_of_cublas_has_the_same_bits(cublas_for):
    cublas_for("in_proj")
    own = options(DEVICE, batch=None, cu_seqlens=ints(DEVICE, 0, 20, 34),
                  dropouts=drops(DEVICE, (0.1, 0.2, 0.3), (40, 3)))
    with empty_is_nan():
        none, mlp, block = (outputs_and_gradients(parallel_block, block_inputs(SHAPE, torch.float16, DEVICE), **own,
                                                  recompute=recompute) for recompute in RECOMPUTE)
    for name, value in none.items():
        assert torch.equal(mlp[name], value), name
        assert torch.equal(block[name], value), name


@pytest.mark.parametrize(("bounds", "width"), [
    ((0, 37), 64), ((0, 0, 5, 5, 5, 36, 37), 300), (tuple(range(38)), 64),  # 300 columns are two tiles
], ids=["one", "some", "rows"])
def test_branch_gradients_are_the_references_bit_for_bit(bounds, width):
    dy = torch.randn(37, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = range(3, 2 + len(bounds))
    _, dense, fc2 = drops(DEVICE, (0, 0.2, 0.5), ids)
    cuts = ints(DEVICE, *bounds)
    for branches, cu_seqlens in (((dense, fc2), cuts), ((None, fc2), cuts), ((dense, None), None)):
        if cu_seqlens is None and len(ids) != 37:
            continue  # rows that its samples do not divide
        with empty_is_nan():
            gradients, sums = launch_branch_gradients(dy, *branches, cu_seqlens)
        for gradient, partial, branch in zip(gradients, sums, branches, strict=True):
            wanted = dropped(dy, branch, cu_seqlens)
            assert torch.equal(gradient, wanted)
            torch.testing.assert_close(partial.sum(0), wanted.sum(0))


def test_the_kernels_ran_and_not_pytorch(monkeypatch):
    from phi1.kernels.block import launch_triton

    launched = []
    forward = ["launch_in_proj", "launch_attention_forward"]
    backward = ["launch_dgelu_partial", "launch_attention_backward", "launch_bias_partials", "launch_bias_sums"]
    names = (*forward, "launch_out_proj", "launch_linear_forward", "launch_branch_gradients", *backward)
    for name in names:
        launch = getattr(launch_triton, name)
        monkeypatch.setattr(launch_triton, name,
                            lambda *a, launch=launch, name=name, **b: launched.append(name) or launch(*a, **b))
    tensors, own = block_inputs(SHAPE, device=DEVICE), options(DEVICE)
    outputs_and_gradients(parallel_block, tensors, **own)
    assert launched == [*forward, "launch_out_proj", *backward]
    launched.clear()
    outputs_and_gradients(parallel_block, tensors, **own, dropouts=drops(DEVICE, (0, 0, 0.1)))
    assert launched == [*forward, *["launch_linear_forward"] * 2, "launch_branch_gradients", *backward]
    launched.clear()
    outputs_and_gradients(parallel_block, tensors, **own, recompute="mlp")
    assert launched == [*forward, "launch_out_proj", "launch_in_proj", *backward]
    launched.clear()
    outputs_and_gradients(parallel_block, tensors, **own, recompute="block")
    assert launched == [*forward, "launch_out_proj", *forward, *backward]


def test_a_forward_alone_writes_no_pre(monkeypatch):
    """Neither in evaluation nor where the backward computes it again."""
    written = []
    launch = projections.launch_in_proj

    def noted(*arguments, **wanted):
        outputs = launch(*arguments, **wanted)
        written.append([x.numel() > 0 for x in outputs])
        return outputs

    monkeypatch.setattr("phi1.kernels.block.launch_triton.launch_in_proj", noted)
    tensors, own = block_inputs(SHAPE, device=DEVICE), options(DEVICE)
    plain = parallel_block(**tensors, **own)
    assert written == [[True, False, True]]
    written.clear()
    tensors["x"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(parallel_block(**tensors, **own), plain)
    for recompute, keeps_pre in (("none", True), ("mlp", False), ("block", False)):
        assert torch.equal(parallel_block(**tensors, **own, recompute=recompute), plain)
        assert written.pop() == [True, keeps_pre, True]
    assert written == [[True, False, True]]
