"""parallel_block against its reference, in its ways to form sequences and to drop, and what it keeps."""

import pytest
import torch
from block_cases import SHAPE, drops, ints, options, tables
from kernel_checks import (
    DTYPES_OF_PRODUCTS,
    assert_matches_reference,
    assert_within_bound,
    block_inputs,
    empty_is_nan,
    kept_bytes,
    only,
    outputs_and_gradients,
)

from phi1.kernels import (
    attention_qkv,
    backend,
    dropout_add,
    layer_norm,
    linear,
    parallel_block,
    parallel_block_prefill,
)
from phi1.kernels.block.parallel_block import RECOMPUTE, parallel_block_reference

SHAPES = [  # B, T, D, H, F, R
    SHAPE,
    *only("eager",
          (1, 3, 4, 1, 1, 2),  # the smallest
          (1, 140, 128, 2, 512, 32),  # phi-1's head size; two tiles of queries and two strips of gelu
          (2, 20, 160, 2, 640, 32)),  # phi-2's head size
    *only("triton",
          (1, 3, 16, 1, 5, 2),  # less than a tile in every direction
          (1, 70, 64, 1, 200, 32),  # phi-1's head size; two tiles of rows, four of fc1
          (1, 9, 160, 2, 40, 32)),  # phi-2's, no power of two: rotated behind the product
]
FLOAT16_OR_ANY = [torch.float16, *only("eager", torch.float32, torch.bfloat16)]  # float16 on kernels, any on CPUs


def check(device, shape=SHAPE, dtype=torch.float32, **more):
    assert_matches_reference(parallel_block, parallel_block_reference, block_inputs(shape, dtype, device), roundings=8,
                             n_heads=shape[3], **tables(device, shape[-1]), **more)


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parallel_block_matches_reference(device, shape, dtype):
    check(device, shape, dtype, batch=shape[0])


PACKINGS = {
    "packed": lambda device: {"cu_seqlens": ints(device, 0, 1, 1, 20, 34)},
    "left-padded": lambda device: {"batch": 2, "seq_starts": ints(device, 0, 5)},
    "positions": lambda device: {"batch": 2, "positions": torch.arange(34, device=device).flip(0)},
    "eps": lambda device: {"eps": 0.1},
    "packed, int64, dropout": lambda device: {"cu_seqlens": ints(device, 0, 20, 34).long(),
                                              "dropouts": drops(device, (0.1, 0.2, 0.3), (40, 3))},
    "one document, dropout": lambda device: {"cu_seqlens": ints(device, 0, 34),
                                             "dropouts": drops(device, (0.1, 0.2, 0.3), (40,))},
}


@pytest.mark.parametrize("dtype", FLOAT16_OR_ANY, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_matches_reference(device, packing, dtype):
    check(device, dtype=dtype, **PACKINGS[packing](device))


RATES = [*only("eager", (0.2, 0.2, 0), (0.2, 0, 0.2), (0, 0.2, 0.2)), (0.2, 0, 0), (0, 0.2, 0), (0, 0, 0.2),
         (0.1, 0.2, 0.3)]


@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("sample_ids", [(40, 3), None], ids=str)
def test_each_dropout_matches_reference(device, rates, sample_ids):
    check(device, batch=2, dropouts=drops(device, rates, sample_ids))


@pytest.mark.parametrize(("rates", "sample_ids"), [
    ((0, 0.2, 0), [40, 3, 2**33 + 5, 8]), ((0.1, 0.2, 0.3), [40, 3, 2**33 + 5, 8]), ((0.1, 0.2, 0.3), None),
], ids=str)
def test_dropout_of_packed_documents_matches_reference(device, rates, sample_ids):
    cuts = ints(device, 0, 1, 1, 20, 34)  # the second document is empty
    check(device, cu_seqlens=cuts, dropouts=drops(device, rates, sample_ids))


def composed(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, cos, sin, n_heads, batch, dropouts):
    width = x.shape[1]
    h = layer_norm(x, norm_weight, norm_bias)
    qkv = linear(h, in_weight[: 3 * width], in_bias[: 3 * width]).unflatten(1, (3, n_heads, -1))
    act = linear(h, in_weight[3 * width :], in_bias[3 * width :], activation="gelu_new")
    att = attention_qkv(qkv, rotary=(cos, sin), dropout=dropouts[0], batch=batch)
    y = dropout_add(linear(att, out_weight[:, :width], out_bias[0]), x, dropouts[1])
    return linear(act, out_weight[:, width:], out_bias[1], residual=y, dropout=dropouts[2])


@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.2, 0.3)], ids=str)
def test_it_is_the_other_operations_together(device, rates):
    tensors, own = block_inputs(SHAPE, device=device), options(device, dropouts=drops(device, rates, (40, 3)))
    together = outputs_and_gradients(parallel_block, tensors, **own)
    apart = outputs_and_gradients(composed, tensors, **own)
    for name, out in together.items():
        torch.testing.assert_close(out, apart[name], rtol=1e-4, atol=1e-5)


def test_no_look_ahead(device):
    tensors = block_inputs(SHAPE, device=device)
    before = parallel_block(**tensors, **options(device))
    tensors["x"][10:17] += 1  # the end of the first sequence
    after = parallel_block(**tensors, **options(device))
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[17:], after[17:])
    assert not torch.equal(before[10:17], after[10:17])


def test_left_padded_rows_equal_unpadded_ones(device):
    tensors = block_inputs(SHAPE, device=device)
    out = parallel_block(**tensors, **options(device, seq_starts=ints(device, 0, 5)))
    alone = parallel_block(**tensors | {"x": tensors["x"][22:]}, **options(device, batch=1))
    torch.testing.assert_close(out[22:], alone)


def test_packed_documents_equal_separate_calls(device):
    tensors, own = block_inputs(SHAPE, device=device), options(device, batch=None)
    out = parallel_block(**tensors, **own, cu_seqlens=ints(device, 0, 20, 34))
    for rows in (slice(0, 20), slice(20, 34)):
        torch.testing.assert_close(out[rows], parallel_block(**tensors | {"x": tensors["x"][rows]}, **own))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.1, 0.1)], ids=str)
@pytest.mark.parametrize("shape", [*only("eager", (1, 140, 128, 2, 512, 32)), *only("triton", SHAPE)], ids=str)
def test_what_is_kept_for_the_backward(device, shape, rates, recompute):
    """x, positions and what the mode says, in storages of that size; parameters, tables and rng apart."""
    batch, tokens, width, n_heads, inner, rotary_size = shape
    tensors = {name: x.requires_grad_() for name, x in block_inputs(shape, torch.float16, device).items()}
    rotary, dropouts = tables(device, rotary_size), drops(device, rates)
    constants = [x for name, x in tensors.items() if name != "x"] + [*rotary.values()]
    constants += [each.rng for each in dropouts if each]
    with kept_bytes(constants) as kept:
        parallel_block(**tensors, **rotary, n_heads=n_heads, batch=batch, dropouts=dropouts, recompute=recompute)
    activations = {"none": 2 * (4 * width + inner) + 4 * n_heads, "mlp": 2 * 4 * width + 4 * n_heads, "block": 0}
    wanted = batch * tokens * (2 * width + 8 + activations[recompute])
    # A CPU's kept memory comes in steps of an eighth.
    assert wanted <= sum(kept.values()) <= (9 / 8 * wanted if shape != SHAPE else wanted)


@pytest.mark.parametrize("dtype", FLOAT16_OR_ANY, ids=str)
@pytest.mark.parametrize("packing", [{"batch": 2}, *only("eager", {"cu_seqlens": (0, 1, 1, 20, 34)},
                                                            {"seq_starts": (0, 5)})], ids=str)
@pytest.mark.parametrize("rates", [*only("eager", (0, 0, 0)), (0.1, 0.2, 0.3)], ids=str)
def test_what_is_computed_again_has_the_same_bits(device, rates, packing, dtype):
    sample_ids = range(3, 7 if "cu_seqlens" in packing else 5)
    own = options(device, dropouts=drops(device, rates, sample_ids))
    if "cu_seqlens" in packing:
        own["batch"] = None
    own |= {name: x if name == "batch" else ints(device, *x) for name, x in packing.items()}
    with empty_is_nan():
        none, mlp, block = (outputs_and_gradients(parallel_block, block_inputs(SHAPE, dtype, device), **own,
                                                  recompute=recompute) for recompute in RECOMPUTE)
    for name, value in none.items():
        assert torch.equal(mlp[name], value), name
        assert torch.equal(block[name], value), name


PROMPTS = {
    "batch": lambda device: {},
    "left-padded": lambda device: {"seq_starts": ints(device, 0, 5)},
    "positions": lambda device: {"positions": torch.arange(34, device=device).flip(0)},
}


@pytest.mark.parametrize("dtype", FLOAT16_OR_ANY, ids=str)
@pytest.mark.parametrize("packing", ["left-padded", *only("eager", "batch", "positions")])
@pytest.mark.parametrize("shape", [SHAPE, (2, 17, 160, 2, 40, 32)], ids=str)
def test_prefill_is_the_block_with_its_keys_and_values(device, shape, packing, dtype):
    tensors = block_inputs(shape, dtype, device)
    own = {**tables(device, shape[-1]), "n_heads": shape[3], "batch": 2, **PROMPTS[packing](device)}
    with empty_is_nan():
        got = parallel_block_prefill(**tensors, **own)
        assert torch.equal(got[0], parallel_block(**tensors, **own))
    with backend("reference"):
        eager = parallel_block_prefill(**tensors, **own)
        exact = parallel_block_prefill(**{name: x.double() for name, x in tensors.items()}, **own)
    for i, name in enumerate(("out", "keys", "values")):
        assert_within_bound(got[i], eager[i], exact[i], name, roundings=8)


def test_output_is_contiguous_whatever_x_is(device):
    tensors = block_inputs(SHAPE, device=device)
    tensors["x"] = tensors["x"].t().contiguous().t()
    for rates in ((0, 0, 0), (0, 0.5, 0.5)):
        assert parallel_block(**tensors, **options(device, dropouts=drops(device, rates))).is_contiguous()


@pytest.mark.eager
def test_columns_first_in_bfloat16_match_reference(device):
    tensors = {name: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2]
               for name, x in block_inputs(SHAPE, torch.bfloat16, device).items()}
    assert_matches_reference(parallel_block, parallel_block_reference, tensors, roundings=8, **options(device))
