"""parallel_block against its reference, in its ways to form sequences and to drop, and what it keeps."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_map

from phi1 import testing
from phi1.kernels import (
    Dropout,
    attention_qkv,
    backend,
    dropout_add,
    layer_norm,
    linear,
    parallel_block,
    parallel_block_prefill,
)
from phi1.kernels.block.dispatch import branches_forward
from phi1.kernels.block.parallel_block import RECOMPUTE, parallel_block_reference

SHAPES = [  # B, T, D, H, F, R
    (1, 3, 4, 1, 1, 2),  # the smallest
    (2, 17, 32, 2, 48, 8),
    (1, 140, 128, 2, 512, 32),  # phi-1's head size and proportions, two tiles of queries and two strips of gelu
    (2, 20, 160, 2, 640, 32),  # phi-2's head size
]
RNG = torch.tensor([5, 7])


def tables(rotary_size, n_positions=150):
    return dict(zip(("cos", "sin"), testing.rotary_tables(rotary_size, n_positions, "cpu"), strict=True))


def make(shape, dtype=torch.float32):
    return testing.block_inputs(shape, dtype, "cpu")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def drops(attention, dense, fc2, sample_ids=None):
    return tuple(Dropout(p, RNG, sample_ids, layer=3, kind=kind) if p else None
                 for kind, p in enumerate((attention, dense, fc2)))


def check(shape, dtype=torch.float32, **options):
    testing.assert_matches_reference(parallel_block, parallel_block_reference, make(shape, dtype), roundings=8,
                                     n_heads=shape[3], **tables(shape[-1]), **options)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parallel_block_matches_reference(shape, dtype):
    check(shape, dtype, batch=shape[0])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("packing", [
    {"cu_seqlens": ints(0, 1, 1, 20, 34)},
    {"batch": 2, "seq_starts": ints(0, 5)},
    {"batch": 2, "positions": torch.arange(34).flip(0)},
    {"eps": 0.1},
], ids=["packed", "left-padded", "positions", "eps"])
def test_packing_matches_reference(packing, dtype):
    check(SHAPES[1], dtype, **packing)


@pytest.mark.parametrize("rates", [r for r in itertools.product((0, 0.2), repeat=3) if any(r)], ids=str)
def test_each_dropout_matches_reference(rates):
    check(SHAPES[1], batch=2, dropouts=drops(*rates))
    check(SHAPES[1], batch=2, dropouts=drops(*rates, sample_ids=torch.tensor([40, 3])))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dropout_of_packed_documents_matches_reference(dtype):
    check(SHAPES[1], dtype, cu_seqlens=ints(0, 20, 34), dropouts=drops(0.1, 0.2, 0.3, torch.tensor([40, 3])))


def composed(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, rotary, n_heads, dropouts, **packing):
    width = x.shape[1]
    h = layer_norm(x, norm_weight, norm_bias)
    qkv = linear(h, in_weight[: 3 * width], in_bias[: 3 * width]).unflatten(1, (3, n_heads, -1))
    act = linear(h, in_weight[3 * width :], in_bias[3 * width :], activation="gelu_new")
    att = attention_qkv(qkv, rotary=rotary, dropout=dropouts[0], **packing)
    y = dropout_add(linear(att, out_weight[:, :width], out_bias[0]), x, dropouts[1])
    return linear(act, out_weight[:, width:], out_bias[1], residual=y, dropout=dropouts[2])


@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.2, 0.3)], ids=str)
def test_it_is_the_other_operations_together(rates):
    tensors, rotary, dropouts = make(SHAPES[1]), tables(8), drops(*rates, torch.tensor([40, 3]))
    together = testing.outputs_and_gradients(parallel_block, tensors, n_heads=2, batch=2, **rotary, dropouts=dropouts)
    apart = testing.outputs_and_gradients(composed, tensors, rotary=tuple(rotary.values()), n_heads=2, batch=2,
                                          dropouts=dropouts)
    for name, out in together.items():
        torch.testing.assert_close(out, apart[name], rtol=1e-4, atol=1e-5)


def run(tensors, shape, **options):
    return parallel_block(**tensors, **tables(shape[-1]), n_heads=shape[3], **options)


def test_no_look_ahead():
    tensors = make(SHAPES[1])
    before = run(tensors, SHAPES[1], batch=2)
    tensors["x"][10:17] += 1  # the end of the first sequence
    after = run(tensors, SHAPES[1], batch=2)
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[17:], after[17:])
    assert not torch.equal(before[10:17], after[10:17])


def test_left_padded_rows_equal_unpadded_ones():
    tensors = make(SHAPES[1])
    out = run(tensors, SHAPES[1], batch=2, seq_starts=ints(0, 5))
    alone = run({**tensors, "x": tensors["x"][22:]}, SHAPES[1])
    torch.testing.assert_close(out[22:], alone)


def test_packed_documents_equal_separate_calls():
    tensors = make(SHAPES[1])
    out = run(tensors, SHAPES[1], cu_seqlens=ints(0, 20, 34))
    for rows in (slice(0, 20), slice(20, 34)):
        torch.testing.assert_close(out[rows], run({**tensors, "x": tensors["x"][rows]}, SHAPES[1]))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.1, 0.1)], ids=str)
def test_what_is_kept_for_the_backward(rates, recompute):
    """x, positions and what the mode says, in storages of that size; parameters and tables apart."""
    shape = SHAPES[2]
    tensors = {name: x.requires_grad_() for name, x in make(shape, torch.bfloat16).items()}
    rotary = tables(shape[-1])
    constants = [x for name, x in tensors.items() if name != "x"] + [*rotary.values(), RNG]
    with testing.kept_bytes(constants) as kept:
        parallel_block(**tensors, **rotary, n_heads=shape[3], dropouts=drops(*rates), recompute=recompute)
    n_rows, width, n_heads, inner = shape[1:5]
    activations = {"none": 2 * (4 * width + inner) + 4 * n_heads, "mlp": 2 * 4 * width + 4 * n_heads, "block": 0}
    wanted = n_rows * (2 * width + 8 + activations[recompute])
    assert wanted <= sum(kept.values()) <= 9 / 8 * wanted  # a CPU's kept memory comes in steps of an eighth


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("packing", [
    {"batch": 2}, {"cu_seqlens": ints(0, 1, 1, 20, 34)}, {"batch": 2, "seq_starts": ints(0, 5)},
], ids=["batch", "packed", "left-padded"])
@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.2, 0.3)], ids=str)
def test_what_is_computed_again_has_the_same_bits(rates, packing, dtype):
    sample_ids = torch.arange(3, 7 if "cu_seqlens" in packing else 5)
    options = {**tables(8), "n_heads": 2, "dropouts": drops(*rates, sample_ids), **packing}
    with testing.empty_is_nan():
        none, mlp, block = (testing.outputs_and_gradients(parallel_block, make(SHAPES[1], dtype), **options,
                                                          recompute=recompute) for recompute in RECOMPUTE)
    for name, value in none.items():
        assert torch.equal(mlp[name], value), name
        assert torch.equal(block[name], value), name


@pytest.mark.parametrize("without", ["gradients", "parameters"])
def test_a_forward_alone_returns_nothing_to_keep(monkeypatch, without):
    tensors = make(SHAPES[1])
    if without == "gradients":
        tensors["x"].requires_grad_()
    kept = []
    monkeypatch.setattr("phi1.kernels.block.parallel_block.branches_forward",
                        lambda *a, keeps_pre, **b: kept.append(keeps_pre) or branches_forward(*a, keeps_pre=keeps_pre))
    with torch.no_grad() if without == "gradients" else nullcontext():
        run(tensors, SHAPES[1], batch=2)
    run({**tensors, "x": tensors["x"].detach().requires_grad_()}, SHAPES[1], batch=2)
    assert kept == [False, True]


PROMPTS = [{"batch": 2}, {"batch": 2, "seq_starts": ints(0, 5)}, {"batch": 2, "positions": torch.arange(34).flip(0)}]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("packing", PROMPTS, ids=["batch", "left-padded", "positions"])
@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
def test_prefill_is_the_block_with_its_keys_and_values(shape, packing, dtype):
    tensors = make((2, 17, *shape[2:]), dtype)
    options = {**tables(shape[-1]), "n_heads": shape[3], **packing}
    out, keys, values = parallel_block_prefill(**tensors, **options)
    assert torch.equal(out, parallel_block(**tensors, **options))
    with backend("reference"):
        eager = parallel_block_prefill(**tensors, **options)
        exact = parallel_block_prefill(**{name: x.double() for name, x in tensors.items()}, **options)
    for i, got in enumerate((out, keys, values)):
        testing.assert_within_bound(got, eager[i], exact[i], ("out", "keys", "values")[i], roundings=8)


def test_prefill_has_no_backward():
    tensors = make(SHAPES[1])
    tensors["in_bias"].requires_grad_()
    with pytest.raises(ValueError, match=r"^parallel_block_prefill: no argument may want a gradient: .*got one that"):
        parallel_block_prefill(**tensors, **tables(8), n_heads=2)
    with pytest.raises(ValueError, match=r"^parallel_block_prefill: batch must divide the 34 rows of x; got 5"):
        parallel_block_prefill(**tensors, **tables(8), n_heads=2, batch=5)


def test_non_contiguous_inputs():
    tensors = {name: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2]
               for name, x in make(SHAPES[1], torch.bfloat16).items()}
    testing.assert_matches_reference(parallel_block, parallel_block_reference, tensors, roundings=8, n_heads=2, batch=2,
                                     **tables(8))


def test_output_is_contiguous_whatever_x_is():
    tensors = make(SHAPES[1])
    tensors["x"] = tensors["x"].t().contiguous().t()
    for rates in ((0.0, 0.0, 0.0), (0.0, 0.5, 0.5)):
        y = parallel_block(**tensors, **tables(8), n_heads=2, batch=2, dropouts=drops(*rates))
        assert y.is_contiguous()


def test_empty_input():
    tensors = make(SHAPES[1])
    tensors["x"] = tensors["x"][:0]
    testing.assert_matches_reference(parallel_block, parallel_block_reference, tensors, n_heads=2, **tables(8))


def bad(**changes):
    return {**make((2, 6, 32, 2, 48, 8)), **tables(8), "n_heads": 2, "batch": 2, **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(x=None), TypeError, "x must be a tensor"),
    (bad(in_bias=None), TypeError, "in_bias must be a tensor"),
    (bad(cos=None), TypeError, "cos must be a tensor"),
    (bad(positions=3), TypeError, "positions must be a tensor"),
    (bad(x=torch.zeros(12, 32).int()), TypeError, "x must be float16, bfloat16 or float32"),
    (bad(out_bias=torch.zeros(2, 32).half()), TypeError, "out_bias must have x's dtype"),
    (bad(norm_bias=torch.zeros(32, device="meta")), ValueError, "norm_bias must be on x's device"),
    (bad(x=torch.zeros(2, 6, 32)), ValueError, r"x must be \[N, D\]"),
    (bad(in_weight=torch.zeros(144)), ValueError, r"in_weight must be \[3D \+ F, D\]"),
    (bad(n_heads=5), ValueError, "n_heads must divide the 32 columns of x; got 5"),
    (bad(n_heads=0), ValueError, "n_heads must divide"),
    (bad(n_heads=True), TypeError, "n_heads must be a whole number; got True"),
    (bad(batch=True), TypeError, "batch must be a whole number; got True"),
    (bad(eps=0.0), ValueError, "eps must be greater than 0"),
    (bad(in_weight=torch.zeros(96, 32)), ValueError, "in_weight must have more rows than 3 x the 32 columns.*got 96"),
    (bad(in_weight=torch.zeros(144, 31)), ValueError, r"in_weight.shape must be \(144, 32\)"),
    (bad(in_bias=torch.zeros(143)), ValueError, r"in_bias.shape must be \(144,\)"),
    (bad(norm_weight=torch.zeros(31)), ValueError, r"norm_weight.shape must be \(32,\)"),
    (bad(norm_bias=torch.zeros(31)), ValueError, r"norm_bias.shape must be \(32,\)"),
    (bad(out_weight=torch.zeros(80, 32)), ValueError, r"out_weight.shape must be \(32, 80\)"),
    (bad(out_bias=torch.zeros(32)), ValueError, r"out_bias.shape must be \(2, 32\)"),
    (bad(batch=5), ValueError, "batch must divide the 12 rows of x; got 5"),
    (bad(cu_seqlens=ints(0, 12)), ValueError, "at most one of batch and cu_seqlens"),
    (bad(batch=None, cu_seqlens=ints(0, 13)), ValueError, "cu_seqlens must ascend from 0 to the number of rows, 12"),
    (bad(seq_starts=ints(0, 7)), ValueError, "seq_starts must be at least 0 and less than 7"),
    (bad(cos=torch.zeros(150, 9), sin=torch.zeros(150, 9)), ValueError, "cos must have between 1 and 8 columns"),
    (bad(**tables(8, 5)), ValueError, "positions must be at least 0 and less than 5"),
    (bad(positions=torch.arange(11)), ValueError, r"positions.shape must be \(12,\)"),
    (bad(recompute="all"), ValueError, "recompute must be one of none, mlp, block; got 'all'"),
    (bad(dropouts=(None, None)), ValueError, "dropouts must be three: attention, dense, fc2; got 2"),
    (bad(dropouts=None), ValueError, "dropouts must be three: attention, dense, fc2; got NoneType"),
    (bad(dropouts=Dropout(0.1, RNG)), ValueError, "dropouts must be three: attention, dense, fc2; got Dropout"),
    (bad(dropouts=(0.1, None, None)), TypeError, r"dropouts\[0\] must be a phi1.kernels.Dropout or None"),
    (bad(dropouts=drops(0, 0, 0.1, torch.arange(3))), ValueError, r"dropouts\[2\].sample_ids.shape must be \(2,\)"),
    (bad(dropouts=(Dropout(0.1, RNG), Dropout(0.1, RNG.clone(), kind=1), None)), ValueError,
     "dropouts must share one rng and one sample_ids"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^parallel_block: .*{match}"):
        parallel_block(**arguments)


def test_reference_backend():
    arguments = bad()
    with backend("reference"):
        assert torch.equal(parallel_block(**arguments), parallel_block_reference(**arguments))


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_operator_is_sound(recompute):
    x, *parameters = [x.requires_grad_() for x in make((2, 6, 32, 2, 48, 8)).values()]
    rotary = [*tables(8).values(), torch.arange(6).repeat(2)]
    cases = (
        ((None, ints(0, 3), None, None), (2, 2, (0.0,) * 3, (0,) * 3, (0,) * 3, 1e-5, recompute)),
        ((ints(0, 5, 12), None, RNG, torch.tensor([8, 9])),
         (2, 1, (0.1, 0.2, 0.3), (4,) * 3, (0, 1, 2), 1e-5, recompute)),
    )
    for packing, constants in cases:
        testing.assert_operator_is_sound("parallel_block", (x, parameters, rotary, *packing, *constants))
        y, *saved = torch.ops.phi1.parallel_block(x, parameters, rotary, *packing, *constants)
        arguments = tree_map(torch.Tensor.detach, (y, x, parameters, saved))
        testing.assert_operator_is_sound("parallel_block_backward", (*arguments, rotary, *packing, *constants))


def test_operator_is_sound_in_prefill():
    x, *parameters = make((2, 6, 32, 2, 48, 8)).values()
    rotary = [*tables(8).values(), torch.arange(6).repeat(2)]
    testing.assert_operator_is_sound("parallel_block_prefill", (x, parameters, rotary, ints(0, 3), 2, 2, 1e-5))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.2, 0.3)], ids=str)
def test_compiles_whole(rates, recompute):
    testing.assert_compiles_whole(parallel_block, make(SHAPES[1]), n_heads=2, batch=2, **tables(8),
                                  dropouts=drops(*rates), recompute=recompute)


def test_activation_checkpointing_changes_nothing():
    tensors, options = make(SHAPES[1]), {**tables(8), "n_heads": 2, "batch": 2, "dropouts": drops(0.1, 0.2, 0.3)}

    def recomputed(**arguments):
        return torch.utils.checkpoint.checkpoint(parallel_block, use_reentrant=False, **arguments)

    plain = testing.outputs_and_gradients(parallel_block, tensors, **options)
    again = testing.outputs_and_gradients(recomputed, tensors, **options)
    assert all(torch.equal(out, again[name]) for name, out in plain.items())
