"""attention against its reference, and what attention is. Packed q, k, v: test_attention_qkv.py; tiles and strides of
the kernels: test_attention_tiles.py; refusals and the CPU's tiles: test_attention_cpu.py."""

import math

import pytest
import torch
from kernel_checks import (
    DTYPES,
    DTYPES_OF_PRODUCTS,
    assert_matches_reference,
    assert_within_bound,
    attention_inputs,
    empty_is_nan,
    only,
    outputs_and_gradients,
)

from phi1.kernels import Dropout, attention, backend, check_values
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.core.backend import use_triton
from phi1.kernels.core.philox import attention_keep, packed_attention_keep

SEVERAL, DECODING, CACHED = (2, 17, 17, 2, 32), (2, 1, 33, 2, 64), (2, 5, 40, 2, 80)  # 5 tokens after a cache; phi-2
ON_BOTH = [
    (1, 3, 3, 1, 16),  # the smallest whose gradients are not differences of equal numbers
    SEVERAL, DECODING, CACHED,
]
ON_CPUS = [
    (1, 129, 129, 2, 64),  # one query past a tile, phi-1's head
    (1, 130, 259, 2, 16),  # two tiles after a cache
    (2, 130, 130, 2, 96),  # a scale that is no power of two, and two tiles
]
ON_KERNELS = [
    (1, 31, 31, 1, 64),  # one row less than a block
    (1, 33, 33, 2, 64),  # one more
    (1, 100, 100, 1, 16),  # several blocks of both sizes
    (1, 20, 21, 1, 96),
    (1, 34, 40, 1, 128),
    (2, 9, 9, 1, 24),  # no power of two
]
SHAPES = [*ON_BOTH, *only("eager", *ON_CPUS), *only("triton", *ON_KERNELS)]  # B, Tq, Tk, H, K
FULL = [*ON_BOTH[1:2], *only("eager", *ON_BOTH[:1], *ON_BOTH[2:], *ON_CPUS),
        *only("triton", *ON_KERNELS[:3], (1, 40, 20, 1, 16))]  # the last has more queries than keys


def rng(device):
    return torch.tensor([5, 7], device=device)


def ints(device, *values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def check(tensors, **options):
    """The tolerance rule. The scale and log2(e) are folded into the exponent: one more rounding of every score.

    In float32, dP - delta is a difference of two sums of K products in different orders, for a kernel that has parts of
    rows takes rowsum(dout out) for rowsum(P dP): where a query sees one key it should be 0 and is 3 roundings of dP. Of
    these tests two need more than 4 roundings for it; in 16 bits it is far below one.
    """
    q = tensors["q"]
    roundings = 8 if use_triton(q) and q.dtype == torch.float32 else 4
    assert_matches_reference(attention, attention_reference, tensors, roundings=roundings, **options)


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_attention_matches_reference(device, shape, dtype):
    check(attention_inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_attention_matches_reference(device, shape, dtype):
    check(attention_inputs(shape, dtype, device), causal=False, scale=0.3)


@pytest.mark.eager
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SEVERAL, (1, 129, 129, 2, 64), DECODING, CACHED], ids=str)
def test_attention_with_dropout_matches_reference(device, shape, dtype):
    check(attention_inputs(shape, dtype, device), dropout=Dropout(0.3, rng(device), layer=2))


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [SEVERAL, DECODING, *only("eager", CACHED),
                                   *only("triton", (2, 40, 70, 1, 16))], ids=str)
def test_left_padding_matches_reference(device, shape, causal, dtype):
    tensors = attention_inputs(shape, dtype, device)
    check(tensors, causal=causal, seq_starts=ints(device, 0, 12))
    # A row of padding alone.
    check(tensors, causal=causal, seq_starts=ints(device, 3, shape[2], dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cuts", [
    *only("triton", (0, 1, 1, 20, 53, 54, 75)),  # documents of 1 and of no rows
    *only("eager", (0, 3, 3, 20, 140, 150)),  # an empty document, one of two tiles
], ids=str)
def test_packed_documents_match_reference(device, cuts, causal, dtype):
    cu_seqlens, ids = ints(device, *cuts), torch.arange(9, 9 - len(cuts) + 1, -1, device=device)
    for tensors in (attention_inputs((1, cuts[-1], cuts[-1], 2, 16), dtype, device),
                    attention_inputs((3, cuts[-1] // 3, cuts[-1] // 3, 1, 16), dtype, device)):
        check(tensors, causal=causal, cu_seqlens=cu_seqlens)
        check(tensors, causal=causal, cu_seqlens=cu_seqlens.long(), dropout=Dropout(0.2, rng(device), ids))


def test_reference_is_pytorchs_attention():
    tensors = attention_inputs((2, 9, 9, 3, 16), torch.float64, "cpu")
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    for causal in (True, False):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        torch.testing.assert_close(attention_reference(**tensors, causal=causal), expected)


def test_scale(device):
    tensors = attention_inputs((1, 9, 9, 2, 16), device=device)
    check(tensors, scale=0.7)
    assert torch.equal(attention(**tensors), attention(**tensors, scale=0.25))
    assert not torch.allclose(attention(**tensors), attention(**tensors, scale=0.3))


def test_causal_means_no_look_ahead(device):
    tensors = attention_inputs((2, 80, 80, 2, 16), device=device)
    before = attention(**tensors)
    for name in ("k", "v"):
        tensors[name][:, 37:] += 1
    after = attention(**tensors)
    assert torch.equal(before[:, :37], after[:, :37])
    assert not torch.allclose(before[:, 37:], after[:, 37:])


def test_queries_are_the_last_of_the_tokens(device):
    tensors = attention_inputs((2, 40, 40, 2, 16), device=device)
    whole = attention(**tensors)
    for n in (1, 7):
        torch.testing.assert_close(attention(tensors["q"][:, -n:], tensors["k"], tensors["v"]), whole[:, -n:])


def test_equal_scores_give_the_mean_of_what_is_seen(device):
    k, v = torch.randn(2, 1, 12, 2, 16, device=device)
    out = attention(torch.zeros_like(v), k, v)
    torch.testing.assert_close(out, v.cumsum(1) / torch.arange(1, 13, device=device).view(1, 12, 1, 1))


def test_a_token_alone_attends_to_itself(device):
    tensors = attention_inputs((2, 1, 1, 2, 64), device=device)
    found = outputs_and_gradients(attention, tensors)
    assert torch.equal(found["out0"], tensors["v"])
    # P is 1 whatever q and k are; what is left of dP - delta is a rounding of sums of 64 products.
    assert all(found[name].abs().max() < 64 * torch.finfo(torch.float32).eps * 10 for name in ("dq", "dk"))
    assert found["dv"].abs().min() > 0


def test_left_padded_rows_equal_unpadded_ones(device):
    tensors = attention_inputs((3, 20, 20, 2, 16), device=device)
    out = attention(**tensors, seq_starts=ints(device, 0, 6, 20))
    for row, start in enumerate((0, 6)):
        alone = attention(*(x[row : row + 1, start:] for x in tensors.values()))
        torch.testing.assert_close(out[row : row + 1, start:], alone)
    assert not out[1, :6].any()
    assert not out[2].any()


def test_packed_documents_equal_separate_calls(device):
    tensors = attention_inputs((1, 50, 50, 2, 16), device=device)
    tensors["v"][0, 1:31] = torch.nan  # what another document holds is never read
    out = attention(**tensors, cu_seqlens=ints(device, 0, 1, 1, 31, 50))
    for first, last in ((0, 1), (31, 50)):
        assert torch.equal(out[:, first:last], attention(*(x[:, first:last] for x in tensors.values())))
    assert out[0, 1:31].isnan().all()


def test_nan_in_another_document_or_in_padding_stays_there(device):
    tensors = attention_inputs((1, 60, 60, 2, 16), device=device)
    for x in tensors.values():
        x[:, 21:40] = math.nan
    got = outputs_and_gradients(attention, tensors, cu_seqlens=ints(device, 0, 21, 40, 60))
    for name, x in got.items():
        assert x[:, :21].isfinite().all(), name
        assert x[:, 40:].isfinite().all(), name
        assert x[:, 21:40].isnan().all(), name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
def test_large_scores_stay_finite(device, dtype, causal):
    tensors = attention_inputs((1, 70, 70, 2, 64), dtype, device)
    tensors = {name: x * (300 if name != "v" else 1) for name, x in tensors.items()}
    got = outputs_and_gradients(attention, tensors, causal=causal)
    assert all(x.isfinite().all() for x in got.values())
    exact = attention_reference(**{name: x.double() for name, x in tensors.items()}, causal=causal)
    assert_within_bound(got["out0"], attention_reference(**tensors, causal=causal), exact, roundings=4)


@pytest.mark.parametrize("size", [300.0, 1e17])  # scores of -4e5 and -4e34
def test_large_negative_scores_are_not_taken_for_none(device, size):
    q, v = torch.full((1, 4, 1, 16), size, device=device), torch.ones(1, 4, 1, 16, device=device)
    torch.testing.assert_close(attention(q, -q, v), v)


def one_hot(n_samples, n_tokens, n_heads, device):
    """Attention on these shows its probabilities: v is the identity, and every score is 0."""
    v = torch.eye(n_tokens, device=device)[None, :, None].expand(n_samples, -1, n_heads, -1)
    return torch.zeros_like(v), torch.zeros_like(v), v


@pytest.mark.parametrize("tile", [None, *only("triton", (16, 32), (32, 32), (64, 32), (32, 128))], ids=str)
def test_dropout_is_the_mask_of_the_specification(device, use_tile, tile):
    if tile is not None:
        use_tile(*tile)
    dropout = Dropout(0.4, rng(device), ints(device, 4, 1 << 40 | 77, dtype=torch.int64), layer=3, kind=1)
    p = attention(*one_hot(2, 70, 3, device), causal=False, dropout=dropout).transpose(1, 2)  # [B, H, T, T]
    keep = attention_keep(dropout, samples=range(2), heads=range(3), queries=range(70), keys=range(70))
    assert torch.equal(p != 0, keep)
    torch.testing.assert_close(p[keep], torch.full_like(p[keep], 65536 / (65536 - round(0.4 * 65536)) / 70))


def test_dropout_of_documents_is_the_mask_of_the_specification(device):
    cu_seqlens, dropout = ints(device, 0, 30, 70), Dropout(0.4, rng(device), torch.tensor([77, 3], device=device), 3)
    p = attention(*one_hot(1, 70, 3, device), causal=False, dropout=dropout, cu_seqlens=cu_seqlens)[0].transpose(0, 1)
    document = torch.arange(70, device=device) >= 30
    inside = document[:, None] == document
    assert torch.equal(p != 0, packed_attention_keep(dropout, cu_seqlens, 3, 70) & inside)


def test_dropout_keeps_the_mean():
    out = attention(*one_hot(1, 256, 4, "cpu"), causal=False, dropout=Dropout(0.3, rng("cpu")))
    # Of 262,144 probabilities each is dropped independently: 5 standard deviations of the mean.
    assert abs(out.sum(-1).mean().item() - 1) < 5 * math.sqrt(0.3 / 0.7 / out.numel())


def test_dropout_counts_decoded_queries_and_negative_positions(device):
    tensors, dropout = attention_inputs((2, 40, 40, 2, 16), device=device), Dropout(0.3, rng(device))
    whole = attention(**tensors, dropout=dropout)
    last = attention(tensors["q"][:, -3:], tensors["k"], tensors["v"], dropout=dropout)
    torch.testing.assert_close(last, whole[:, -3:])
    # The first query is at -20.
    check(attention_inputs((1, 40, 20, 1, 16), device=device), causal=False, dropout=dropout)


def test_no_dropout_at_0(device):
    tensors = attention_inputs((2, 9, 9, 3, 16), device=device)
    assert torch.equal(attention(**tensors, dropout=Dropout(0.0, rng(device))), attention(**tensors))


def test_strided_inputs_match_reference(device):
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 64, 3, 16, generator=generator).to(device)
    q = torch.randn(2, 3, 4, 16, generator=generator).to(device).transpose(1, 2)
    check({"q": q, "k": cache[:, :20], "v": cache[:, 20:40].flip(3)})
    check({"q": cache[:, :9], "k": cache[:, 20:29], "v": cache[:, 40:49]}, cu_seqlens=ints(device, 0, 11, 18))
    packed = torch.randn(2, 15, 200, generator=generator)[..., 30:174].unflatten(2, (3, 3, 16)).to(device)
    check(dict(zip("qkv", packed.unbind(2), strict=True)), cu_seqlens=ints(device, 0, 11, 30))


@pytest.mark.parametrize("shape", [(0, 3, 3, 2, 16), (2, 0, 0, 2, 16), (2, 0, 5, 2, 16)], ids=str)
def test_empty_input_matches_reference(device, shape):
    check(attention_inputs(shape, device=device))
    if shape[1] == shape[2]:
        check(attention_inputs(shape, device=device), cu_seqlens=ints(device, 0))


@pytest.mark.parametrize("cuts", [(0, 36, 60), *only("triton", (5, 36, 60))], ids=str)
def test_rows_of_no_document_are_nan_where_values_are_not_checked(device, cuts):
    first, end, last = cuts
    tensors = attention_inputs((1, 80, 80, 2, 16), device=device)
    with check_values(False), empty_is_nan():
        got = outputs_and_gradients(attention, tensors, cu_seqlens=ints(device, *cuts))
    with backend("reference"):
        expected = attention(**{name: x[:, first:end] for name, x in tensors.items()})
    torch.testing.assert_close(got["out0"][:, first:end], expected)
    for name, x in got.items():
        assert x[:, first:last].isfinite().all(), name
        assert x[:, :first].isnan().all(), name
        assert x[:, last:].isnan().all(), name
