"""Attention's kernels broken on purpose, one line at a time: the checks of the kernels must notice each break.

A mutant is a file of kernels with one text replaced; it and all that build on it are loaded in place of the real ones.
"""

import pytest
import torch
from kernel_checks import assert_matches_reference, kernel_device, load_kernels

from phi1.kernels import Dropout, attention, attention_qkv, backend
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.attention_qkv import attention_qkv_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

FILES = ("device", "forward", "backward", "attention/launch")  # in the order of their imports
TILE = {"block_m": 32, "block_n": 32, "rotate_on_load": 0, "num_warps": 4, "num_stages": 2, "tma": 1,
        "warp_specialize": 0}
SMALL = {("attention/launch", "tile"): lambda *_, **__: TILE}
RNG = torch.tensor([5, 7], device=DEVICE)

MUTATIONS = {  # name: (file, text, its replacement, how often it occurs, the check that notices)
    "causal mask": ("device", "seen & (key <= query)", "seen & (key <= query + 1)", 1, "causal"),
    "causal mask is strict": ("device", "seen & (key <= query)", "seen & (key < query)", 1, "causal"),
    "no end of the keys": ("device", "seen = key < n_keys", "seen = key < n_keys + 1", 1, "full"),
    "padding is seen": ("device", "seen & (key >= start) & (query >= start)", "seen & (query >= start)", 1, "padded"),
    "padding attends": ("device", "seen & (key >= start) & (query >= start)", "seen & (key >= start)", 1, "padded"),
    "document begins early": ("device", "origin = begin.to(tl.int64)", "origin = (begin - (begin > 0)).to(tl.int64)",
                              1, "packed"),
    "next document is seen": ("device", "seen = key < n_keys", "seen = key < n_keys + 1", 1, "packed full"),
    "document found too early": ("device", "+ middle <= slot", "+ middle < slot", 1, "packed"),
    "document's number": ("device", "sample = document - 1", "sample = document", 1, "packed"),
    "rotation's sign": ("device", "other=0.0) * SIGN", "other=0.0)", 2, "rotated"),
    "rotated the other way": ("device", "a * c - b * s, b * c + a * s", "a * c + b * s, b * c - a * s", 1, "rotated"),
    "sign of columns that are exchanged": ("device", "tl.where(offs_d < HALF, -s, s)", "s", 1, "rotated by 6"),
    "partner of columns that are exchanged": ("device", "offs_d < 2 * HALF, offs_d - HALF, offs_d",
                                              "offs_d < 2 * HALF, offs_d - HALF + 1, offs_d", 1, "rotated by 6"),
    "dq rotated twice": ("backward", "first, n_queries, -1", "first, n_queries, 1", 1, "rotated"),
    "dk rotated twice": ("backward", "first, n_keys, -1", "first, n_keys, 1", 1, "rotated"),
    "forward's scale": ("forward", "exp2(s * scale_log2", "exp2(s", 1, "causal"),
    "sum not faded": ("forward", "total = total * fade", "total = total", 1, "causal"),
    "output not faded": ("forward", "acc * fade[:, None]", "acc", 1, "causal"),
    "lse without the maximum": ("forward", "(m + tl.log2(total))", "tl.log2(total)", 1, "causal"),
    "lse in base 2": ("forward", "tl.log2(total)) / LOG2E", "tl.log2(total))", 1, "causal"),
    "first tile of keys too late": ("device", "begin, whole, end = start // BLOCK_N * BLOCK_N,",
                                    "begin, whole, end = start // BLOCK_N * BLOCK_N + BLOCK_N,", 1, "padded"),
    "whole tiles reach the diagonal": ("device", "first + offset + 1)", "first + offset + BLOCK_N)", 1, "causal"),
    "last tile of keys left out": ("device", "first + offset + BLOCK_M)", "first + offset)", 1, "causal"),
    "another head's keys by TMA": ("forward", "ptr.load([sample, first, head.to(tl.int32), 0])",
                                   "ptr.load([sample, first, 0, 0])", 1, "dropped"),
    "forward's dropout column": ("forward", "keep_mask(key, query, n,", "keep_mask(key, query, 0,", 1, "dropped"),
    "dropout's head": ("device", "stream + head.to(tl.int32)", "stream", 1, "dropped"),
    "dropout's scale": ("device", "65536.0 / (65536 - threshold)", "1.0 + threshold * 0", 1, "dropped"),
    "dq's scale": ("backward", "        True) * scale", "        True)", 1, "causal"),
    "dk's scale": ("backward", "dk *= scale", "dk *= 1", 1, "causal"),
    "delta left out of dq": ("backward", "dp - delta[:, None]", "dp", 1, "causal"),
    "delta left out of dk": ("backward", "dp - delta[None, :]", "dp", 1, "causal"),
    "P left out of dS": ("backward", "ds = p * (dp - delta[None, :])", "ds = dp - delta[None, :]", 1, "causal"),
    "dv of undropped P": ("backward", "dropped = tl.where(keep, p, 0.0)", "dropped = p", 1, "dropped"),
    "dP of dq not dropped": ("backward", "dp = tl.where(keep, dp * mask_scale(key, threshold), 0.0)\n        ds = p * "
                             "(dp - delta[:, None])", "ds = p * (dp - delta[:, None])", 1, "dropped"),
    "first queries left out of dk": ("backward", "begin = tl.maximum(first - (n_keys - n_queries), 0)",
                                     "begin = tl.maximum(first + BLOCK_M - (n_keys - n_queries), 0)", 1, "causal"),
    "dk without the cache's offset": ("backward", "query = m + offs_m + (n_keys - n_queries)", "query = m + offs_m", 1,
                                      "cached"),
}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def tables(half):
    angle = torch.outer(torch.arange(50.0), torch.tensor([1.0, 0.3, 0.1, 0.03])[:half])
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def inputs(n_queries, n_keys, batch=1, n_heads=1):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, tokens, n_heads, 16, generator=generator).to(DEVICE)
            for name, tokens in (("q", n_queries), ("k", n_keys), ("v", n_keys))}


def check(name):
    """One comparison with the reference, outputs and gradients."""
    cases = {
        "causal": (inputs(70, 70), {}),
        "full": (inputs(33, 37), {"causal": False}),
        "cached": (inputs(34, 70), {}),
        "padded": (inputs(40, 40, batch=2), {"causal": False, "seq_starts": ints(0, 9)}),
        "packed": (inputs(70, 70), {"cu_seqlens": ints(0, 1, 33, 70), "dropout": Dropout(0.2, RNG)}),
        "packed full": (inputs(70, 70), {"cu_seqlens": ints(0, 1, 33, 70), "causal": False}),
        "dropped": (inputs(40, 70, n_heads=2), {"dropout": Dropout(0.3, RNG)}),
    }
    operation, reference = attention, attention_reference
    if name.startswith("rotated"):
        generator = torch.Generator().manual_seed(0)
        tensors = {"qkv": torch.randn(40, 3, 1, 16, generator=generator).to(DEVICE)}
        options = {"rotary": tables(3 if name == "rotated by 6" else 4)}
        operation, reference = attention_qkv, attention_qkv_reference
    else:
        tensors, options = cases[name]
    with backend("triton"):
        assert_matches_reference(operation, reference, tensors, roundings=8, **options)


def test_without_a_mutation_every_check_passes(tmp_path, monkeypatch):
    load_kernels(FILES, SMALL, monkeypatch, tmp_path)
    for name in sorted({mutation[-1] for mutation in MUTATIONS.values()}):
        check(name)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_noticed(tmp_path, monkeypatch, mutation):
    *change, name = MUTATIONS[mutation]
    load_kernels(FILES, SMALL, monkeypatch, tmp_path, *change)
    with pytest.raises(AssertionError, match=r"max\|out - exact\|"):
        check(name)
