"""The parallel block on its Triton kernels: on a GPU, or in Triton's interpreter (run by test_interpreter.py).

The interpreter multiplies bfloat16 wrongly, so that bfloat16 is tested on a GPU alone.
"""

import pytest
import torch

from phi1 import testing
from phi1.kernels import Dropout, backend, parallel_block, parallel_block_prefill
from phi1.kernels.block import projections_triton as projections
from phi1.kernels.block.bias_grad_triton import launch_branch_gradients
from phi1.kernels.block.parallel_block import RECOMPUTE, parallel_block_reference
from phi1.kernels.gemm import linear_triton as linear_kernels
from phi1.kernels.pointwise.dropout import dropped

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

DTYPES = testing.DTYPES if DEVICE == "cuda" else testing.DTYPES[:2]
SHAPES = [  # B, T, D, H, F, R
    (1, 3, 16, 1, 5, 2),  # less than a tile in every direction
    (2, 17, 32, 2, 48, 8),
    (1, 70, 64, 1, 200, 32),  # phi-1's head; two tiles of rows, four of fc1
    (1, 9, 160, 2, 40, 32),  # phi-2's head, no power of two: rotated behind the product
]
PACKED = SHAPES[1]
RNG = torch.tensor([5, 7], device=DEVICE)


def tables(rotary_size, n_positions=150):
    return dict(zip(("cos", "sin"), testing.rotary_tables(rotary_size, n_positions, DEVICE), strict=True))


def make(shape, dtype=torch.float32):
    return testing.block_inputs(shape, dtype, DEVICE)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def drops(attention, dense, fc2, sample_ids=None):
    return tuple(Dropout(p, RNG, sample_ids, layer=3, kind=kind) if p else None
                 for kind, p in enumerate((attention, dense, fc2)))


def check(shape, dtype=torch.float32, **options):
    with backend("triton"):
        testing.assert_matches_reference(parallel_block, parallel_block_reference, make(shape, dtype), roundings=8,
                                         n_heads=shape[3], **tables(shape[-1]), **options)


def use_tile(monkeypatch, kernel, **tile):
    """Give one kernel of the block a tile, the other one its tile of the table."""
    table = projections.tile

    def chosen(op, name, device, **shape):
        return tile if name == kernel else table(op, name, device, **shape)

    monkeypatch.setattr(projections, "tile", chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parallel_block_matches_reference(shape, dtype):
    check(shape, dtype, batch=shape[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ["in_proj", "out_proj"])
def test_products_of_cublas_match_reference(monkeypatch, kernel, dtype):
    use_tile(monkeypatch, kernel, cublas=1)
    check(PACKED, dtype, batch=2)


@pytest.mark.parametrize("packing", [
    {"cu_seqlens": ints(0, 1, 1, 20, 34)},
    {"cu_seqlens": ints(0, 20, 34).long(), "dropouts": drops(0.1, 0.2, 0.3, torch.tensor([40, 3], device=DEVICE))},
    {"cu_seqlens": ints(0, 34), "dropouts": drops(0.1, 0.2, 0.3, torch.tensor([40], device=DEVICE))},
    {"batch": 2, "seq_starts": ints(0, 5)},
    {"batch": 2, "positions": torch.arange(34, device=DEVICE).flip(0)},
], ids=["packed", "packed-int64-dropout", "one-document-dropout", "left-padded", "positions"])
def test_packing_matches_reference(packing):
    check(PACKED, torch.float16, **packing)


@pytest.mark.parametrize("rates", [(0.2, 0, 0), (0, 0.2, 0), (0, 0, 0.2), (0.1, 0.2, 0.3)], ids=str)
def test_each_dropout_matches_reference(rates):
    check(PACKED, batch=2, dropouts=drops(*rates, torch.tensor([40, 3], device=DEVICE)))


def test_dropout_without_sample_ids_matches_reference():
    check(PACKED, batch=2, dropouts=drops(0.1, 0.2, 0.3))


@pytest.mark.parametrize(("rates", "sample_ids"), [
    ((0, 0.2, 0), [40, 3, 2**33 + 5, 8]), ((0.1, 0.2, 0.3), [40, 3, 2**33 + 5, 8]), ((0.1, 0.2, 0.3), None),
], ids=str)
def test_dropout_of_packed_documents_matches_reference(rates, sample_ids):
    ids = None if sample_ids is None else torch.tensor(sample_ids, device=DEVICE)
    check(PACKED, cu_seqlens=ints(0, 1, 1, 20, 34), dropouts=drops(*rates, ids))  # the second one is empty


def test_dropout_of_packed_documents_beside_products_of_cublas_matches_reference(monkeypatch):
    monkeypatch.setattr(linear_kernels, "tile", lambda *_, **__: {"cublas": 1})
    ids = torch.tensor([40, 3], device=DEVICE)
    check(PACKED, cu_seqlens=ints(0, 20, 34), dropouts=drops(0, 0.2, 0.3, ids))


@pytest.mark.parametrize(("bounds", "width"), [
    ((0, 37), 64), ((0, 0, 5, 5, 5, 36, 37), 300), (tuple(range(38)), 64),  # 300 columns are two tiles
], ids=["one", "some", "rows"])
def test_branch_gradients_are_the_references_bit_for_bit(bounds, width):
    dy = torch.randn(37, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = torch.arange(3, 2 + len(bounds), device=DEVICE)
    _, dense, fc2 = drops(0, 0.2, 0.5, ids)
    for branches, cu_seqlens in (((dense, fc2), ints(*bounds)), ((None, fc2), ints(*bounds)), ((dense, None), None)):
        if cu_seqlens is None and len(ids) != 37:
            continue  # rows that its samples do not divide
        with testing.empty_is_nan():
            gradients, sums = launch_branch_gradients(dy, *branches, cu_seqlens)
        for gradient, partial, branch in zip(gradients, sums, branches, strict=True):
            wanted = dropped(dy, branch, cu_seqlens)
            assert torch.equal(gradient, wanted)
            torch.testing.assert_close(partial.sum(0), wanted.sum(0))


@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.1, 0.1)], ids=str)
def test_backward_is_bitwise_repeatable(rates):
    tensors, options = make(PACKED, torch.float16), {**tables(8), "n_heads": 2, "batch": 2, "dropouts": drops(*rates)}
    with backend("triton"):
        first, second = (testing.outputs_and_gradients(parallel_block, tensors, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_no_look_ahead():
    tensors, options = make(PACKED), {**tables(8), "n_heads": 2, "batch": 2}
    with backend("triton"):
        before = parallel_block(**tensors, **options)
        tensors["x"][10:17] += 1  # the end of the first sequence
        after = parallel_block(**tensors, **options)
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[17:], after[17:])
    assert not torch.equal(before[10:17], after[10:17])


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.1, 0.1)], ids=str)
def test_what_is_kept_for_the_backward(rates, recompute):
    """x, positions and what the mode says, in storages of just that size; parameters, tables and rng apart."""
    batch, tokens, width, n_heads, inner, rotary_size = PACKED
    tensors = {name: x.requires_grad_() for name, x in make(PACKED, torch.float16).items()}
    rotary = tables(rotary_size)
    constants = [x for name, x in tensors.items() if name != "x"] + [*rotary.values(), RNG]
    with backend("triton"), testing.kept_bytes(constants) as kept:
        parallel_block(**tensors, **rotary, n_heads=n_heads, batch=batch, dropouts=drops(*rates), recompute=recompute)
    activations = {"none": 2 * (4 * width + inner) + 4 * n_heads, "mlp": 2 * 4 * width + 4 * n_heads, "block": 0}
    assert sum(kept.values()) == batch * tokens * (2 * width + 8 + activations[recompute])


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
    tensors, options = make(PACKED), {**tables(8), "n_heads": 2, "batch": 2}
    with backend("triton"):
        testing.outputs_and_gradients(parallel_block, tensors, **options)
        assert launched == [*forward, "launch_out_proj", *backward]
        launched.clear()
        testing.outputs_and_gradients(parallel_block, tensors, **options, dropouts=drops(0, 0, 0.1))
        assert launched == [*forward, *["launch_linear_forward"] * 2, "launch_branch_gradients", *backward]
        launched.clear()
        testing.outputs_and_gradients(parallel_block, tensors, **options, recompute="mlp")
        assert launched == [*forward, "launch_out_proj", "launch_in_proj", *backward]
        launched.clear()
        testing.outputs_and_gradients(parallel_block, tensors, **options, recompute="block")
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
    tensors, options = make(PACKED), {**tables(8), "n_heads": 2, "batch": 2}
    with backend("triton"):
        plain = parallel_block(**tensors, **options)
        assert written == [[True, False, True]]
        written.clear()
        tensors["x"].requires_grad_()
        with torch.no_grad():
            assert torch.equal(parallel_block(**tensors, **options), plain)
        for recompute, keeps_pre in (("none", True), ("mlp", False), ("block", False)):
            assert torch.equal(parallel_block(**tensors, **options, recompute=recompute), plain)
            assert written.pop() == [True, keeps_pre, True]
        assert written == [[True, False, True]]


@pytest.mark.parametrize("shape", [*SHAPES[1:2], SHAPES[3]], ids=str)
@pytest.mark.parametrize("kernel", ["in_proj", "cublas"])
def test_prefill_is_the_block_with_its_keys_and_values(monkeypatch, kernel, shape):
    if kernel == "cublas":
        use_tile(monkeypatch, "in_proj", cublas=1)
    tensors, options = make(shape, torch.float16), {**tables(shape[-1]), "n_heads": shape[3], "batch": shape[0],
                                                    "seq_starts": ints(*range(0, 3 * shape[0], 3))}
    with backend("triton"), testing.empty_is_nan():
        got = parallel_block_prefill(**tensors, **options)
        assert torch.equal(got[0], parallel_block(**tensors, **options))
    with backend("reference"):
        eager = parallel_block_prefill(**tensors, **options)
        exact = parallel_block_prefill(**{name: x.double() for name, x in tensors.items()}, **options)
    for i, name in enumerate(("out", "keys", "values")):
        testing.assert_within_bound(got[i], eager[i], exact[i], name, roundings=8)


@pytest.mark.parametrize(("kernel", "packing"), [
    ("in_proj", {"batch": 2}), ("cublas", {"cu_seqlens": ints(0, 20, 34)}),
], ids=["in_proj", "cublas, packed"])
def test_what_is_computed_again_has_the_same_bits(monkeypatch, kernel, packing):
    if kernel == "cublas":
        use_tile(monkeypatch, "in_proj", cublas=1)
    dropouts = drops(0.1, 0.2, 0.3, torch.tensor([40, 3], device=DEVICE))
    tensors, options = make(PACKED, torch.float16), {**tables(8), "n_heads": 2, "dropouts": dropouts, **packing}
    with backend("triton"), testing.empty_is_nan():
        none, mlp, block = (testing.outputs_and_gradients(parallel_block, tensors, **options, recompute=recompute)
                            for recompute in RECOMPUTE)
    for name, value in none.items():
        assert torch.equal(mlp[name], value), name
        assert torch.equal(block[name], value), name


def test_non_contiguous_and_empty_inputs():
    tensors = {name: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2]
               for name, x in make(PACKED).items()}
    with backend("triton"):
        cos, sin = tables(8).values()
        apart = torch.stack((cos, sin), dim=-1)
        testing.assert_matches_reference(parallel_block, parallel_block_reference, tensors, roundings=8, n_heads=2,
                                         batch=2, cos=apart[..., 0], sin=apart[..., 1])
        empty = {**make(PACKED), "x": make(PACKED)["x"][:0]}
        testing.assert_matches_reference(parallel_block, parallel_block_reference, empty, n_heads=2, **tables(8))
