"""attention_qkv against its reference, and against rotary and attention one after the other."""

import pytest
import torch
from kernel_checks import (
    DTYPES,
    DTYPES_OF_PRODUCTS,
    assert_matches_reference,
    assert_operator_is_sound,
    only,
    qkv_inputs,
    rotary_tables,
)

from phi1.kernels import Dropout, attention, attention_qkv, rotary
from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.philox import attention_keep

SHAPES = [  # B, T, H, K, R
    (1, 3, 1, 8, 4),  # the smallest whose gradients are not differences of equal numbers
    (3, 17, 2, 16, 16),  # the whole head rotated
    (1, 140, 2, 64, 32),  # phi-1's head, two tiles
    (2, 21, 3, 80, 32),  # phi-2's
]


def ints(device, *values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def check(tensors, **options):
    """The tolerance rule; test_attention.py says why float32 gets 8 roundings on kernels."""
    qkv = tensors["qkv"]
    roundings = 8 if use_triton(qkv) and qkv.dtype == torch.float32 else 4
    assert_matches_reference(attention_qkv, attention_qkv_reference, tensors, roundings=roundings, **options)


@pytest.mark.eager
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_qkv_matches_reference(device, shape, rotated, dtype):
    batch, tokens, n_heads, head_size, rotary_size = shape
    check(qkv_inputs(batch * tokens, n_heads, head_size, dtype, device), batch=batch,
          rotary=rotary_tables(rotary_size, device=device) if rotated else None)


def dropout(device, *samples):
    ids = ints(device, *samples, dtype=torch.int64) if samples else None
    return Dropout(0.3, torch.tensor([11, 3], device=device), ids, layer=0xFFFF, kind=9)


PACKINGS = {  # of 51 rows
    "batch": lambda device: {"batch": 3},
    "full": lambda device: {"batch": 3, "causal": False, "scale": 0.5},
    "packed": lambda device: {"cu_seqlens": ints(device, 0, 1, 1, 36, 51)},
    "left-padded": lambda device: {"batch": 3, "seq_starts": ints(device, 0, 5, 16)},
    "dropout": lambda device: {"batch": 3, "dropout": dropout(device, 8, 2, 3)},
    "packed, dropout": lambda device: {"cu_seqlens": ints(device, 0, 20, 51), "dropout": dropout(device, 8, 2)},
}


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("packing", [*list(PACKINGS)[:-1], *only("eager", "packed, dropout")])
@pytest.mark.parametrize("mode", ["none", "inside", "applied", *only("triton", "on load")])
def test_rotary_modes_match_reference(device, use_tile, mode, packing, dtype):
    if mode == "on load":
        use_tile(rotate_on_load=1)
    options = {} if mode == "none" else {"rotary": rotary_tables(8, device=device), "rotary_applied": mode == "applied"}
    check(qkv_inputs(51, 1, 16, dtype, device), **PACKINGS[packing](device), **options)


@pytest.mark.parametrize("packing", PACKINGS)
def test_given_positions_match_reference(device, packing):
    check(qkv_inputs(51, 2, 16, device=device), rotary=rotary_tables(8, device=device),
          positions=torch.arange(51, device=device) * 37 % 150, **PACKINGS[packing](device))


def composed(qkv, batch, positions, cos_sin, **options):
    q, k, v = rotary(qkv, *cos_sin, positions).unflatten(0, (batch, -1)).unbind(2)
    return attention(q, k, v, **options).reshape(qkv.shape[0], -1)


def test_it_is_rotary_and_attention(device):
    qkv, cos_sin = qkv_inputs(51, device=device)["qkv"], rotary_tables(8, device=device)
    index = torch.arange(17, device=device).repeat(3)
    torch.testing.assert_close(attention_qkv(qkv, batch=3, rotary=cos_sin), composed(qkv, 3, index, cos_sin))
    starts = ints(device, 0, 5, 16)
    padded = (torch.arange(17, device=device) - starts[:, None]).clamp(min=0).flatten()
    torch.testing.assert_close(attention_qkv(qkv, batch=3, rotary=cos_sin, seq_starts=starts),
                               composed(qkv, 3, padded, cos_sin, seq_starts=starts))
    cuts = ints(device, 0, 20, 51)
    restarted = torch.cat((torch.arange(20), torch.arange(31))).to(device)
    torch.testing.assert_close(attention_qkv(qkv, cu_seqlens=cuts, rotary=cos_sin),
                               composed(qkv, 1, restarted, cos_sin, cu_seqlens=cuts))


def test_rotary_applied_rotates_the_gradient_alone(device):
    cos_sin, qkv = rotary_tables(8, device=device), qkv_inputs(51, device=device)["qkv"].requires_grad_()
    positions = torch.arange(17, device=device).repeat(3)
    rotated = torch.cat((rotary(qkv[:, :2], *cos_sin, positions), qkv[:, 2:]), 1).detach()
    inside = attention_qkv(qkv, batch=3, rotary=cos_sin)
    gradient = torch.autograd.grad(inside.square().sum(), qkv)[0]
    applied = attention_qkv(rotated.requires_grad_(), batch=3, rotary=cos_sin, rotary_applied=True)
    torch.testing.assert_close(applied, inside)
    torch.testing.assert_close(torch.autograd.grad(applied.square().sum(), rotated)[0], gradient)
    assert torch.equal(applied, attention_qkv(rotated, batch=3))


def test_packed_documents_equal_separate_calls(device):
    qkv, cos_sin = qkv_inputs(51, device=device)["qkv"], rotary_tables(8, device=device)
    out = attention_qkv(qkv, cu_seqlens=ints(device, 0, 20, 51), rotary=cos_sin)
    for rows in (slice(0, 20), slice(20, 51)):
        assert torch.equal(out[rows], attention_qkv(qkv[rows], rotary=cos_sin))


def test_one_batch_is_the_default(device):
    qkv = qkv_inputs(20, device=device)["qkv"]
    assert torch.equal(attention_qkv(qkv), attention_qkv(qkv, batch=1))


def test_dropout_is_the_mask_of_the_specification(device):
    own = dropout(device, 4, 77)
    qkv = torch.zeros(2, 40, 3, 2, 40, device=device)  # equal scores, and v the identity: the output is probabilities
    qkv[:, :, 2] = torch.eye(40, device=device)[:, None]
    p = attention_qkv(qkv.flatten(0, 1), batch=2, causal=False, dropout=own).view(2, 40, 2, 40).transpose(1, 2)
    keep = attention_keep(own, samples=range(2), heads=range(2), queries=range(40), keys=range(40))
    assert torch.equal(p != 0, keep)


def test_rows_of_a_wider_projection_match_reference_and_are_not_written_to(device):
    merged = torch.randn(34, 200, device=device)
    before, qkv = merged.clone(), merged[:, 4:100].unflatten(1, (3, 2, 16))
    check({"qkv": qkv}, batch=2, rotary=rotary_tables(8, device=device))
    check({"qkv": qkv}, cu_seqlens=ints(device, 0, 11, 34))
    assert torch.equal(merged, before)


def test_tables_masks_and_starts_of_any_strides_match_reference(device):
    apart = torch.stack(rotary_tables(8, device=device), dim=-1)
    spread = torch.tensor([[5, 1], [7, 2]], device=device)
    check(qkv_inputs(34, device=device), batch=2, rotary=(apart[..., 0], apart[..., 1]),
          positions=torch.arange(68, device=device)[::2], seq_starts=ints(device, 0, 9, 5, 9)[::2],
          dropout=Dropout(0.3, spread[:, 0], spread[:, 1]))


def test_no_documents_at_all(device):
    check(qkv_inputs(0, device=device), cu_seqlens=ints(device, 0), rotary=rotary_tables(8, device=device))


COS_SIN = rotary_tables(8, device="cpu")


def bad(**changes):
    return {**qkv_inputs(12, device="cpu"), **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(qkv=torch.zeros(6, 3, 32)), ValueError, r"qkv must be \[N, 3, H, K\]"),
    (bad(qkv=torch.zeros(6, 2, 2, 16)), ValueError, r"qkv.shape\[1\] must be 3: q, k and v; got 2"),
    (bad(batch=5), ValueError, "batch must divide the 12 rows of qkv; got 5"),
    (bad(batch=0), ValueError, "batch must divide"),
    (bad(batch=2.0), TypeError, r"batch must be a whole number; got 2\.0"),
    (bad(batch=True), TypeError, "batch must be a whole number; got True"),
    (bad(causal=None), TypeError, "causal must be True or False; got None"),
    (bad(rotary=COS_SIN, rotary_applied=None), TypeError, "rotary_applied must be True or False; got None"),
    (bad(rotary=COS_SIN, rotary_applied="no"), TypeError, "rotary_applied must be True or False; got 'no'"),
    (bad(qkv=torch.zeros(6, 3, 2, 0)), ValueError, r"qkv must have a head of at least one element; got \[6, 3, 2, 0\]"),
    (bad(rotary=torch.zeros(2, 8)), ValueError, "rotary must be a pair, cos and sin; got Tensor"),
    (bad(batch=2, cu_seqlens=ints("cpu", 0, 12)), ValueError,
     "at most one of batch and cu_seqlens may be given; got both"),
    (bad(cu_seqlens=ints("cpu", 0, 11)), ValueError, "cu_seqlens must ascend from 0 to the number of rows, 12"),
    (bad(batch=2, seq_starts=ints("cpu", 0, 7)), ValueError, "seq_starts must be at least 0 and less than 7"),
    (bad(scale=-1.0), ValueError, "scale must be greater than 0"),
    (bad(positions=torch.arange(12)), ValueError, "positions may be given only with rotary"),
    (bad(rotary_applied=True), ValueError, "rotary_applied needs rotary, .*; got no rotary"),
    (bad(rotary=rotary_tables(18, device="cpu")), ValueError, "cos must have between 1 and 8 columns"),
    (bad(rotary=COS_SIN, positions=torch.arange(11)), ValueError, r"positions.shape must be \(12,\)"),
    (bad(rotary=rotary_tables(8, 12, "cpu"), positions=torch.arange(1, 13)), ValueError,
     "positions must be .* less than 12"),
    (bad(rotary=rotary_tables(8, 11, "cpu")), ValueError, "positions must be at least 0 and less than 11"),
    (bad(rotary=(None, None)), TypeError, "cos must be a tensor"),
    (bad(batch=2, dropout=dropout("cpu", 1)), ValueError, r"sample_ids.shape must be \(2,\)"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^attention_qkv: .*{match}"):
        attention_qkv(**arguments)


def test_operator_is_sound():
    qkv = qkv_inputs(12, device="cpu")["qkv"].requires_grad_()
    rng = torch.tensor([11, 3])
    positions = torch.arange(12)
    cases = (
        (*COS_SIN, positions, None, None, 2, True, 0.25, False, 0.0, None, None, 0, 0),
        (None, None, None, ints("cpu", 0, 5, 12), None, 1, False, 0.25, False, 0.0, None, None, 0, 0),
        (*COS_SIN, positions, None, ints("cpu", 0, 2), 2, True, 0.25, True, 0.5, rng, torch.tensor([3, 4]), 1, 0),
    )
    for constants in cases:
        assert_operator_is_sound("attention_qkv", (qkv, *constants))
        out, lse = torch.ops.phi1.attention_qkv(qkv, *constants)
        saved = (torch.randn_like(out), qkv.detach(), out.detach(), lse.detach())
        assert_operator_is_sound("attention_qkv_backward", (*saved, *constants))
