"""attention_qkv against its reference, and against rotary and attention one after the other."""

import pytest
import torch
from kernel_checks import DTYPES, assert_compiles_whole, assert_matches_reference, assert_operator_is_sound

from phi1.kernels import Dropout, attention, attention_qkv, backend, rotary
from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.core.philox import attention_keep

SHAPES = [  # B, T, H, K, R
    (1, 3, 1, 8, 4),  # the smallest whose gradients are not differences of equal numbers
    (3, 17, 2, 16, 16),  # the whole head rotated
    (1, 140, 2, 64, 32),  # phi-1's head, two tiles
    (2, 21, 3, 80, 32),  # phi-2's
]
RNG = torch.tensor([11, 3])


def tables(rotary_size, n_positions=150):
    angle = torch.outer(torch.arange(n_positions).double(), 10000 ** (-torch.arange(0, rotary_size, 2) / rotary_size))
    return angle.cos().float(), angle.sin().float()


def make(shape, dtype=torch.float32):
    batch, tokens, n_heads, head_size, _ = shape
    generator = torch.Generator().manual_seed(0)
    return {"qkv": torch.randn(batch * tokens, 3, n_heads, head_size, generator=generator).to(dtype)}


def check(tensors, **options):
    assert_matches_reference(attention_qkv, attention_qkv_reference, tensors, roundings=4, **options)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_qkv_matches_reference(shape, rotated, dtype):
    check(make(shape, dtype), batch=shape[0], rotary=tables(shape[-1]) if rotated else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", [
    {"cu_seqlens": ints(0, 1, 1, 20, 51)},
    {"batch": 3, "seq_starts": ints(0, 5, 16)},
    {"batch": 3, "causal": False, "scale": 0.5},
    {"batch": 3, "dropout": Dropout(0.3, RNG)},
    {"cu_seqlens": ints(0, 20, 51), "dropout": Dropout(0.3, RNG, torch.tensor([8, 2]), layer=1)},
], ids=["packed", "left-padded", "full", "dropout", "packed-dropout"])
def test_packing_matches_reference(packing, dtype):
    shape = (3, 17, 2, 16, 8)
    check(make(shape, dtype), rotary=tables(8), **packing)
    check(make(shape, dtype), rotary=tables(8), positions=torch.arange(51) * 37 % 150, **packing)


def composed(qkv, batch, positions, rotary_tables, **options):
    q, k, v = rotary(qkv, *rotary_tables, positions).unflatten(0, (batch, -1)).unbind(2)
    return attention(q, k, v, **options).reshape(qkv.shape[0], -1)


def test_it_is_rotary_and_attention():
    shape, cos_sin = (3, 17, 2, 16, 8), tables(8)
    qkv = make(shape)["qkv"]
    index = torch.arange(17).repeat(3)
    torch.testing.assert_close(attention_qkv(qkv, batch=3, rotary=cos_sin), composed(qkv, 3, index, cos_sin))
    starts = ints(0, 5, 16)
    padded = (torch.arange(17) - starts[:, None]).clamp(min=0).flatten()
    torch.testing.assert_close(attention_qkv(qkv, batch=3, rotary=cos_sin, seq_starts=starts),
                               composed(qkv, 3, padded, cos_sin, seq_starts=starts))
    cuts = ints(0, 20, 51)
    restarted = torch.cat((torch.arange(20), torch.arange(31)))
    torch.testing.assert_close(attention_qkv(qkv, cu_seqlens=cuts, rotary=cos_sin),
                               composed(qkv, 1, restarted, cos_sin, cu_seqlens=cuts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_applied_rotates_the_gradient_alone(dtype):
    shape, cos_sin = (3, 17, 2, 16, 8), tables(8)
    check(make(shape, dtype), batch=3, rotary=cos_sin, rotary_applied=True)
    qkv = make(shape)["qkv"].requires_grad_()
    rotated = torch.cat((rotary(qkv[:, :2], *cos_sin, torch.arange(17).repeat(3)), qkv[:, 2:]), 1).detach()
    inside = attention_qkv(qkv, batch=3, rotary=cos_sin)
    gradient = torch.autograd.grad(inside.square().sum(), qkv)[0]
    applied = attention_qkv(rotated.requires_grad_(), batch=3, rotary=cos_sin, rotary_applied=True)
    torch.testing.assert_close(applied, inside)
    torch.testing.assert_close(torch.autograd.grad(applied.square().sum(), rotated)[0], gradient)
    assert torch.equal(applied, attention_qkv(rotated, batch=3))


def test_packed_documents_equal_separate_calls():
    qkv, cos_sin = make((1, 51, 2, 16, 8))["qkv"], tables(8)
    out = attention_qkv(qkv, cu_seqlens=ints(0, 20, 51), rotary=cos_sin)
    for rows in (slice(0, 20), slice(20, 51)):
        assert torch.equal(out[rows], attention_qkv(qkv[rows], rotary=cos_sin))


def test_one_batch_is_the_default():
    qkv = make((1, 20, 2, 16, 8))["qkv"]
    assert torch.equal(attention_qkv(qkv), attention_qkv(qkv, batch=1))


def test_dropout_is_the_mask_of_the_specification():
    dropout = Dropout(0.4, RNG, torch.tensor([4, 77]), layer=3)
    qkv = torch.zeros(2, 40, 3, 2, 40)  # equal scores, and v the identity: the output is the probabilities
    qkv[:, :, 2] = torch.eye(40)[:, None]
    p = attention_qkv(qkv.flatten(0, 1), batch=2, causal=False, dropout=dropout).view(2, 40, 2, 40).transpose(1, 2)
    keep = attention_keep(dropout, samples=range(2), heads=range(2), queries=range(40), keys=range(40))
    assert torch.equal(p != 0, keep)


def test_rows_of_a_wider_projection():
    merged = torch.randn(34, 200)
    qkv = merged[:, 4:100].unflatten(1, (3, 2, 16))
    check({"qkv": qkv}, batch=2, rotary=tables(8))
    check({"qkv": qkv}, cu_seqlens=ints(0, 11, 34))
    before = merged.clone()
    attention_qkv(qkv, batch=2, rotary=tables(8))
    assert torch.equal(merged, before)


def test_empty_input():
    check(make((1, 0, 2, 16, 8)), rotary=tables(8))
    check(make((1, 0, 2, 16, 8)), cu_seqlens=ints(0), rotary=tables(8))


def bad(**changes):
    return {**make((2, 6, 2, 16, 8)), **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(qkv=None), TypeError, "qkv must be a tensor"),
    (bad(qkv=torch.zeros(6, 3, 2, 16).bool()), TypeError, "qkv must be float16, bfloat16 or float32"),
    (bad(qkv=torch.zeros(6, 3, 32)), ValueError, r"qkv must be \[N, 3, H, K\]"),
    (bad(qkv=torch.zeros(6, 2, 2, 16)), ValueError, r"qkv.shape\[1\] must be 3: q, k and v; got 2"),
    (bad(batch=5), ValueError, "batch must divide the 12 rows of qkv; got 5"),
    (bad(batch=0), ValueError, "batch must divide"),
    (bad(batch=2.0), TypeError, r"batch must be a whole number; got 2\.0"),
    (bad(batch=True), TypeError, "batch must be a whole number; got True"),
    (bad(causal=None), TypeError, "causal must be True or False; got None"),
    (bad(rotary=tables(8), rotary_applied=None), TypeError, "rotary_applied must be True or False; got None"),
    (bad(rotary=tables(8), rotary_applied="no"), TypeError, "rotary_applied must be True or False; got 'no'"),
    (bad(qkv=torch.zeros(6, 3, 2, 0)), ValueError, r"qkv must have a head of at least one element; got \[6, 3, 2, 0\]"),
    (bad(rotary=torch.zeros(2, 8)), ValueError, "rotary must be a pair, cos and sin; got Tensor"),
    (bad(batch=2, cu_seqlens=ints(0, 12)), ValueError, "at most one of batch and cu_seqlens may be given; got both"),
    (bad(cu_seqlens=ints(0, 11)), ValueError, "cu_seqlens must ascend from 0 to the number of rows, 12"),
    (bad(batch=2, seq_starts=ints(0, 7)), ValueError, "seq_starts must be at least 0 and less than 7"),
    (bad(scale=-1.0), ValueError, "scale must be greater than 0"),
    (bad(positions=torch.arange(12)), ValueError, "positions may be given only with rotary"),
    (bad(rotary_applied=True), ValueError, "rotary_applied needs rotary, .*; got no rotary"),
    (bad(rotary=tables(18)), ValueError, "cos must have between 1 and 8 columns"),
    (bad(rotary=tables(8), positions=torch.arange(11)), ValueError, r"positions.shape must be \(12,\)"),
    (bad(rotary=tables(8, 12), positions=torch.arange(1, 13)), ValueError, "positions must be .* less than 12"),
    (bad(rotary=tables(8, 11)), ValueError, "positions must be at least 0 and less than 11"),
    (bad(rotary=(None, None)), TypeError, "cos must be a tensor"),
    (bad(batch=2, dropout=Dropout(0.1, RNG, torch.tensor([1]))), ValueError, r"sample_ids.shape must be \(2,\)"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^attention_qkv: .*{match}"):
        attention_qkv(**arguments)


def test_reference_backend():
    qkv = make((2, 6, 2, 16, 8))["qkv"]
    with backend("reference"):
        out = attention_qkv(qkv, batch=2, rotary=tables(8))
    assert torch.equal(out, attention_qkv_reference(qkv, batch=2, rotary=tables(8)))


def test_operator_is_sound():
    qkv = make((2, 6, 2, 16, 8))["qkv"].requires_grad_()
    positions = torch.arange(12)
    cases = (
        (*tables(8), positions, None, None, 2, True, 0.25, False, 0.0, None, None, 0, 0),
        (None, None, None, ints(0, 5, 12), None, 1, False, 0.25, False, 0.0, None, None, 0, 0),
        (*tables(8), positions, None, ints(0, 2), 2, True, 0.25, True, 0.5, RNG, torch.tensor([3, 4]), 1, 0),
    )
    for constants in cases:
        assert_operator_is_sound("attention_qkv", (qkv, *constants))
        out, lse = torch.ops.phi1.attention_qkv(qkv, *constants)
        saved = (torch.randn_like(out), qkv.detach(), out.detach(), lse.detach())
        assert_operator_is_sound("attention_qkv_backward", (*saved, *constants))


def test_compiles_whole():
    assert_compiles_whole(attention_qkv, make((2, 6, 2, 16, 8)), batch=2, rotary=tables(8))
