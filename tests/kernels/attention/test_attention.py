"""attention against its reference, and what attention is. Packed q, k, v: test_attention_qkv.py."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phi1 import testing
from phi1.kernels import Dropout, attention, backend, check_values
from phi1.kernels.attention import eager as tiles
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.eager import torch_forward
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.philox import attention_keep, packed_attention_keep

SHAPES = [  # B, Tq, Tk, H, K
    (1, 3, 3, 1, 16),  # the smallest whose gradients are not differences of equal numbers
    (2, 17, 17, 3, 32),
    (1, 129, 129, 2, 64),  # one query past a tile, phi-1's head
    (2, 1, 33, 4, 64),  # decoding
    (2, 5, 40, 2, 80),  # several tokens after a cache, phi-2's head
    (1, 130, 259, 2, 16),  # two tiles after a cache
    (2, 130, 130, 2, 96),  # a scale that is no power of two, and two tiles
]
RNG = torch.tensor([5, 7])


def make(shape, dtype=torch.float32, seed=0):
    batch, n_queries, n_keys, n_heads, head_size = shape
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, tokens, n_heads, head_size, generator=generator).to(dtype)
            for name, tokens in (("q", n_queries), ("k", n_keys), ("v", n_keys))}


def check(tensors, **options):
    # The scale and log2(e) are folded into q: one more rounding of every score.
    testing.assert_matches_reference(attention, attention_reference, tensors, roundings=4, **options)


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_matches_reference(shape, causal, dtype):
    check(make(shape, dtype), causal=causal)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_attention_with_dropout_matches_reference(shape, dtype):
    check(make(shape, dtype), dropout=Dropout(0.3, RNG, layer=2))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:2] + SHAPES[3:5], ids=str)
def test_left_padded_attention_matches_reference(shape, causal, dtype):
    check(make(shape, dtype), causal=causal, seq_starts=starts(0, 12))
    check(make(shape, dtype), causal=causal, seq_starts=starts(3, shape[2]))  # a row of padding alone


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_matches_reference(causal, dtype):
    cu_seqlens = starts(0, 3, 3, 20, 140, 150)  # an empty document, one of two tiles
    check(make((2, 75, 75, 2, 16), dtype), causal=causal, cu_seqlens=cu_seqlens)
    check(make((2, 75, 75, 2, 16), dtype), causal=causal, cu_seqlens=cu_seqlens,
          dropout=Dropout(0.2, RNG, torch.tensor([9, 8, 7, 6, 5])))


@pytest.mark.parametrize("tile", [(1, 1), (5, 4000), (16, 1 << 20), (1000, 1 << 30)], ids=str)
def test_the_tile_is_not_seen(monkeypatch, tile):
    monkeypatch.setattr(tiles, "CPU_TILE_QUERIES", tile[0])
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile[1])
    for options in ({}, {"causal": False}, {"dropout": Dropout(0.3, RNG)}, {"seq_starts": starts(2, 9, 0)}):
        check(make((3, 21, 26, 3, 16)), **options)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3, 9])
def test_the_tile_of_one_query_is_not_seen(monkeypatch, heads, dtype):
    """A head, a sample, or all at once; the gradients take lse from where it was put."""
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", -(-heads * 4 * 26 * (1 + 2 * 16) // torch.get_num_threads()))
    check(make((3, 1, 26, 3, 16), dtype))
    check(make((3, 1, 26, 3, 16), dtype), seq_starts=starts(2, 9, 0))


class FlashCalls(TorchDispatchMode):
    """The dtypes of the queries that PyTorch's flash kernel for CPUs is called with."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.dtypes.append(args[0].dtype)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_one_query_is_computed_in_float32_a_tile_at_a_time(monkeypatch, dtype):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", -(-3 * 4 * 26 * (1 + 2 * 16) // torch.get_num_threads()))
    q, k, v = make((3, 1, 26, 3, 16), dtype).values()
    with FlashCalls() as calls:
        torch_forward(q, k, v, AttentionSpec(True, 0.25), None)
    assert calls.dtypes == [torch.float32] * 3


@pytest.mark.parametrize("strided", ["q", "k", "v"])
def test_one_query_with_elements_apart(strided):
    """PyTorch's flash kernel would read neighbours."""
    tensors = make((2, 1, 9, 2, 16))
    tensors[strided] = tensors[strided].repeat_interleave(2, -1)[..., ::2]
    check(tensors)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_default_dtype_is_not_seen(dtype, default):
    tensors = make((2, 1, 9, 2, 16), dtype), make((2, 7, 9, 2, 16), dtype)
    expected = [attention(**each, seq_starts=starts(0, 3)) for each in tensors]
    tiles._above_diagonal.cache_clear()
    torch.set_default_dtype(default)
    try:
        got = [attention(**each, seq_starts=starts(0, 3)) for each in tensors]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, expected))


def test_reference_is_pytorchs_attention():
    tensors = make((2, 9, 9, 3, 16), torch.float64)
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    for causal in (True, False):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        torch.testing.assert_close(attention_reference(**tensors, causal=causal), expected)


def test_scale():
    tensors = make((1, 9, 9, 2, 16))
    check(tensors, scale=0.7)
    assert torch.equal(attention(**tensors), attention(**tensors, scale=0.25))
    assert not torch.allclose(attention(**tensors), attention(**tensors, scale=0.3))


def test_causal_means_no_look_ahead():
    tensors = make((2, 40, 40, 2, 16))
    before = attention(**tensors)
    for name in ("k", "v"):
        tensors[name][:, 25:] += 1
    after = attention(**tensors)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_queries_are_the_last_of_the_tokens():
    tensors = make((2, 40, 40, 2, 16))
    whole = attention(**tensors)
    for n in (1, 7):
        torch.testing.assert_close(attention(tensors["q"][:, -n:], tensors["k"], tensors["v"]), whole[:, -n:])


def test_equal_scores_give_the_mean_of_what_is_seen():
    v = torch.randn(1, 12, 2, 8)
    out = attention(torch.zeros_like(v), torch.randn(1, 12, 2, 8), v)
    torch.testing.assert_close(out, v.cumsum(1) / torch.arange(1, 13).view(1, 12, 1, 1))


def test_left_padded_rows_equal_unpadded_ones():
    tensors = make((3, 20, 20, 2, 16))
    out = attention(**tensors, seq_starts=starts(0, 6, 20))
    for row, start in enumerate((0, 6)):
        alone = attention(*(x[row : row + 1, start:] for x in tensors.values()))
        torch.testing.assert_close(out[row : row + 1, start:], alone)
    assert not out[1, :6].any()
    assert not out[2].any()


def test_packed_documents_equal_separate_calls():
    tensors = make((1, 50, 50, 2, 16))
    cuts = [0, 1, 1, 31, 50]
    tensors["v"][0, 1:31] = torch.nan  # what another document holds is never read
    out = attention(**tensors, cu_seqlens=starts(*cuts))
    for first, last in ((0, 1), (31, 50)):
        assert torch.equal(out[:, first:last], attention(*(x[:, first:last] for x in tensors.values())))
    assert out[0, 1:31].isnan().all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_large_scores_stay_finite(dtype):
    tensors = {name: x.clamp(-1, 1) * 300 for name, x in make((1, 40, 40, 2, 64), dtype).items()}
    got = testing.outputs_and_gradients(attention, tensors)
    assert all(x.isfinite().all() for x in got.values())


def test_large_negative_scores_are_not_taken_for_none():
    q = torch.full((1, 4, 1, 16), 300.0)
    v = torch.ones(1, 4, 1, 16)
    torch.testing.assert_close(attention(q, -q, v), v)


def one_hot(n_tokens, n_heads):
    """Attention on these shows its probabilities: v is the identity, and every score is 0."""
    v = torch.eye(n_tokens)[None, :, None].expand(1, -1, n_heads, -1)
    return torch.zeros_like(v), torch.zeros_like(v), v


def test_dropout_is_the_mask_of_the_specification():
    dropout = Dropout(0.4, RNG, torch.tensor([77]), layer=3)
    q, k, v = one_hot(70, 3)
    p = attention(q, k, v, causal=False, dropout=dropout)[0].transpose(0, 1)  # [H, T, T]
    keep = attention_keep(dropout, samples=range(1), heads=range(3), queries=range(70), keys=range(70))[0]
    assert torch.equal(p != 0, keep)
    cu_seqlens = starts(0, 30, 70)
    dropout = Dropout(0.4, RNG, torch.tensor([77, 3]), layer=3)
    p = attention(q, k, v, causal=False, dropout=dropout, cu_seqlens=cu_seqlens)[0].transpose(0, 1)
    document = torch.arange(70) >= 30
    inside = document[:, None] == document
    assert torch.equal(p != 0, packed_attention_keep(dropout, cu_seqlens, 3, 70) & inside)


def test_dropout_keeps_the_mean_and_counts_decoded_queries():
    q, k, v = one_hot(256, 4)
    dropout = Dropout(0.3, RNG)
    out = attention(q, k, v, causal=False, dropout=dropout)
    # Of 262,144 probabilities each is dropped independently: 5 standard deviations of the mean.
    assert abs(out.sum(-1).mean().item() - 1) < 5 * math.sqrt(0.3 / 0.7 / out.numel())
    assert torch.equal(attention(q[:, -3:], k, v, dropout=dropout)[:, -1:], out[:, -1:])


def test_no_dropout_at_0():
    tensors = make((2, 9, 9, 3, 16))
    assert torch.equal(attention(**tensors, dropout=Dropout(0.0, RNG)), attention(**tensors))


def test_non_contiguous_inputs():
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 64, 3, 16, generator=generator)
    q = torch.randn(2, 3, 4, 16, generator=generator).transpose(1, 2)
    check({"q": q, "k": cache[:, :20], "v": cache[:, 20:40].flip(3)})
    packed = torch.randn(2, 15, 200, generator=generator)[..., 30:174].unflatten(2, (3, 3, 16))
    check(dict(zip("qkv", packed.unbind(2), strict=True)), cu_seqlens=starts(0, 11, 30))


@pytest.mark.parametrize("shape", [(0, 3, 3, 2, 16), (2, 0, 0, 2, 16), (2, 0, 5, 2, 16)], ids=str)
def test_empty_input(shape):
    check(make(shape))
    if shape[1] == shape[2]:
        check(make(shape), cu_seqlens=starts(0))


def bad(shape=(2, 6, 6, 2, 16), **changes):
    return {**make(shape), **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(k=None), TypeError, "k must be a tensor; got NoneType"),
    (bad(q=torch.zeros(2, 6, 2, 16).int()), TypeError, "q must be float16, bfloat16 or float32"),
    (bad(v=torch.zeros(2, 6, 2, 16).half()), TypeError, r"v must have q's dtype \(float32\); got float16"),
    (bad(k=torch.zeros(2, 6, 2, 16, device="meta")), ValueError, "k must be on q's device"),
    (bad(q=torch.zeros(6, 2, 16)), ValueError, r"q must be \[B, Tq, H, K\]"),
    (bad(k=torch.zeros(6, 2, 16)), ValueError, r"k must be \[B, Tk, H, K\]"),
    (bad(k=torch.zeros(2, 6, 3, 16)), ValueError, r"k.shape must be \(2, 6, 2, 16\)"),
    (bad(v=torch.zeros(2, 7, 2, 16)), ValueError, r"v.shape must be \(2, 6, 2, 16\), k's"),
    (bad((2, 6, 5, 2, 16)), ValueError, "k must have at least q's 6 tokens if causal; got 5"),
    (bad((2, 6, 0, 2, 16), causal=False), ValueError, "k must have at least one token; got 0"),
    (bad(scale=0.0), ValueError, r"scale must be greater than 0; got 0\.0"),
    (bad(scale=math.nan), ValueError, "scale must be finite; got nan"),
    (bad(scale="1"), TypeError, "scale must be a number; got '1'"),
    (bad(scale=True), TypeError, "scale must be a number; got True"),
    (bad(scale=torch.tensor([0.5, 1])), TypeError, r"scale must be a number; got a tensor of shape \[2\]"),
    (bad(scale=10**400), ValueError, "scale must be finite; got a number of 1329 bits"),
    (bad(causal=None), TypeError, "causal must be True or False; got None"),
    (bad(causal="no"), TypeError, "causal must be True or False; got 'no'"),
    (bad((2, 6, 6, 0, 16)), ValueError, r"q must have a head of at least one element; got \[2, 6, 0, 16\]"),
    (bad(cu_seqlens=starts(0, 12), seq_starts=starts(0, 0)), ValueError, "at most one of cu_seqlens and seq_starts"),
    (bad((2, 6, 7, 2, 16), cu_seqlens=starts(0, 12)), ValueError, "k must have q's 6 tokens with cu_seqlens; got 7"),
    (bad((2, 6, 5, 2, 16), causal=False, seq_starts=starts(0, 0)), ValueError,
     "k must have at least q's 6 tokens with seq_starts; got 5"),
    (bad(cu_seqlens=[0, 12]), TypeError, "cu_seqlens must be a tensor; got list"),
    (bad(cu_seqlens=torch.zeros(2)), ValueError, "cu_seqlens must be int32 or int64; got float32"),
    (bad(cu_seqlens=torch.zeros(2, 2).int()), ValueError, r"cu_seqlens must be \[documents \+ 1\]"),
    (bad(cu_seqlens=starts()), ValueError, "cu_seqlens must have at least one entry"),
    (bad(cu_seqlens=starts(0, 12).to("meta")), ValueError, "cu_seqlens must be on x's device"),
    (bad(cu_seqlens=starts(0, 7, 5, 12)), ValueError, r"ascend from 0 to the number of rows, 12; got \[0, 7, 5, 12\]"),
    (bad(cu_seqlens=starts(1, 12)), ValueError, "cu_seqlens must ascend from 0"),
    (bad(cu_seqlens=starts(*range(11))), ValueError, r"got \[0, 1, 2, 3, \.\.\., 10\]"),
    (bad(seq_starts=starts(0)), ValueError, r"seq_starts.shape must be \(2,\), one per sample"),
    (bad(seq_starts=torch.zeros(2)), ValueError, "seq_starts must be int32 or int64"),
    (bad(seq_starts=starts(0, 7)), ValueError, r"seq_starts must be at least 0 and less than 7.*got 7 at \[1\]"),
    (bad(seq_starts=starts(-1, 0)), ValueError, "seq_starts must be at least 0"),
    (bad(dropout=0.1), TypeError, "dropout must be a phi1.kernels.Dropout or None; got float"),
    (bad(dropout=Dropout(0.1, RNG, torch.tensor([1]))), ValueError, r"dropout.sample_ids.shape must be \(2,\)"),
    (bad(dropout=Dropout(0.1, RNG, torch.tensor([1, 2])), cu_seqlens=starts(0, 1, 2, 12)), ValueError,
     r"dropout.sample_ids.shape must be \(3,\)"),
])
def test_errors(arguments, error, match):
    with pytest.raises(error, match=f"^attention: .*{match}"):
        attention(**arguments)
    with backend("reference"), pytest.raises(error, match=f"^attention: .*{match}"):
        attention(**arguments)


def test_rows_of_no_document_are_nan_where_values_are_not_checked():
    tensors = {name: x.requires_grad_() for name, x in make((1, 10, 10, 2, 16)).items()}
    with check_values(False):
        out = attention(**tensors, cu_seqlens=starts(0, 4, 7))
    assert out[:, :7].isfinite().all()
    assert out[:, 7:].isnan().all()
    out[:, :7].sum().backward()
    assert tensors["k"].grad[:, 7:].isnan().all()


def test_reference_backend():
    tensors = make((1, 9, 9, 2, 16))
    with backend("reference"):
        assert torch.equal(attention(**tensors), attention_reference(**tensors))


def test_operator_is_sound():
    q, k, v = (x.requires_grad_() for x in make((2, 9, 9, 2, 16)).values())
    plain = (True, 0.25, 0.0, None, None, 0, 0)
    dropped = (False, 0.25, 0.5, RNG, torch.tensor([3, 4]), 1, 0)
    cases = (((None, None), plain), ((starts(0, 7, 18), None), plain), ((None, starts(0, 2)), dropped))
    for packing, constants in cases:
        testing.assert_operator_is_sound("attention", (q, k, v, *packing, *constants))
        out, lse = torch.ops.phi1.attention(q, k, v, *packing, *constants)
        saved = (torch.randn_like(out), q, k, v, out, lse)
        testing.assert_operator_is_sound("attention_backward", (*(x.detach() for x in saved), *packing, *constants))


@pytest.mark.parametrize("options", [{}, {"dropout": Dropout(0.3, RNG)}, {"seq_starts": starts(0, 3)}], ids=str)
def test_compiles_whole(options):
    testing.assert_compiles_whole(attention, make((2, 9, 9, 2, 16)), **options)
