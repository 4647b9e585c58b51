"""attention's PyTorch code: its tiles and its choice of PyTorch's kernels are not seen; what attention refuses."""

import math

import pytest
import torch
from kernel_checks import (
    DTYPES,
    assert_compiles_whole,
    assert_matches_reference,
    assert_operator_is_sound,
    attention_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode

from phi1.kernels import Dropout, attention, backend
from phi1.kernels.attention import eager as tiles
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.eager import torch_forward
from phi1.kernels.attention.spec import AttentionSpec

RNG = torch.tensor([5, 7])


def make(shape, dtype=torch.float32):
    return attention_inputs(shape, dtype, "cpu")


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


def check(tensors, **options):
    # The scale and log2(e) are folded into q: one more rounding of every score.
    assert_matches_reference(attention, attention_reference, tensors, roundings=4, **options)


@pytest.mark.parametrize("tile", [(1, 1), (5, 4000), (16, 1 << 20), (1000, 1 << 30)], ids=str)
def test_the_tile_is_not_seen(monkeypatch, tile):
    monkeypatch.setattr(tiles, "CPU_TILE_QUERIES", tile[0])
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile[1])
    for options in ({}, {"causal": False}, {"dropout": Dropout(0.3, RNG)}, {"seq_starts": starts(2, 9, 0)}):
        check(make((3, 21, 26, 3, 16)), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


def bad(shape=(2, 6, 6, 2, 16), **changes):
    return {**make(shape), **changes}


@pytest.mark.parametrize(("arguments", "error", "match"), [
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


def test_operator_is_sound():
    q, k, v = (x.requires_grad_() for x in make((2, 9, 9, 2, 16)).values())
    plain = (True, 0.25, 0.0, None, None, 0, 0)
    dropped = (False, 0.25, 0.5, RNG, torch.tensor([3, 4]), 1, 0)
    cases = (((None, None), plain), ((starts(0, 7, 18), None), plain), ((None, starts(0, 2)), dropped))
    for packing, constants in cases:
        assert_operator_is_sound("attention", (q, k, v, *packing, *constants))
        out, lse = torch.ops.phi1.attention(q, k, v, *packing, *constants)
        saved = (torch.randn_like(out), q, k, v, out, lse)
        assert_operator_is_sound("attention_backward", (*(x.detach() for x in saved), *packing, *constants))


def test_compiles_whole_with_left_padding():
    assert_compiles_whole(attention, make((2, 9, 9, 2, 16)), seq_starts=starts(0, 3))
