"""Attention's kernels broken on purpose, one text at a time: the comparison with the reference notices each break."""

import pytest
import torch
from kernel_checks import attention_inputs, kernel_device, qkv_inputs, rotary_tables
from mutations import Case, Mutant, mutation_tests

from phi1.kernels import Dropout, attention, attention_qkv
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.attention_qkv import attention_qkv_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

FILES = ("device", "forward", "backward", "attention/launch")  # in the order of their imports
TILE = {"block_m": 32, "block_n": 32, "rotate_on_load": 0, "num_warps": 4, "num_stages": 2, "tma": 1}
SMALL = {("attention/launch", "tile"): lambda *_, **__: TILE}
RNG = torch.tensor([5, 7], device=DEVICE)

MUTANTS = {  # file, text, its replacement, how often it occurs, the check that notices
    "causal mask": Mutant("device", "seen = key <= query", "seen = key <= query + 1", 1, "causal"),
    "causal mask is strict": Mutant("device", "seen = key <= query", "seen = key < query", 1, "causal"),
    "no end of the keys": Mutant("device", "seen = key < n_keys", "seen = key < n_keys + 1", 1, "full"),
    "padding is seen": Mutant("device", "seen = seen & (key >= start)", "seen = seen", 1, "padded"),
    "padding attends": Mutant("device", "seen = seen & (query >= start)", "seen = seen", 1, "padded"),
    "document begins early": Mutant("device", "origin = begin.to(tl.int64)",
                                    "origin = (begin - (begin > 0)).to(tl.int64)", 1, "packed"),
    "next document is seen": Mutant("device", "seen = key < n_keys", "seen = key < n_keys + 1", 1, "packed full"),
    "document found too early": Mutant("device", "+ middle <= slot", "+ middle < slot", 1, "packed"),
    "document's number": Mutant("device", "sample = document - 1", "sample = document", 1, "packed"),
    "rotation's sign": Mutant("device", "other=0.0) * SIGN", "other=0.0)", 2, "rotated"),
    "rotated the other way": Mutant("device", "a * c - b * s, b * c + a * s", "a * c + b * s, b * c - a * s", 1,
                                    "rotated"),
    "sign of columns that are exchanged": Mutant("device", "tl.where(offs_d < HALF, -s, s)", "s", 1, "rotated by 6"),
    "partner of columns that are exchanged": Mutant("device", "offs_d < 2 * HALF, offs_d - HALF, offs_d",
                                                    "offs_d < 2 * HALF, offs_d - HALF + 1, offs_d", 1, "rotated by 6"),
    "dq rotated twice": Mutant("backward", "first, n_queries, -1", "first, n_queries, 1", 1, "rotated"),
    "dk rotated twice": Mutant("backward", "first, n_keys, -1", "first, n_keys, 1", 1, "rotated"),
    "forward's scale": Mutant("forward", "exp2(s * scale_log2", "exp2(s", 1, "float16"),
    "forward's scale in float32": Mutant("forward", "(s - m_new[:, None]) * scale_log2", "(s - m_new[:, None])", 1,
                                         "causal"),
    "sum not rescaled": Mutant("forward", "l_i = l_i * alpha", "l_i = l_i", 1, "causal"),
    "output not rescaled": Mutant("forward", "acc * alpha[:, None]", "acc", 1, "causal"),
    "lse without the maximum": Mutant("forward", "(m_i * scale_log2 + tl.log2(l_i))", "tl.log2(l_i)", 1, "causal"),
    "lse's scale": Mutant("forward", "(m_i * scale_log2 + tl", "(m_i + tl", 1, "causal"),
    "lse in base 2": Mutant("forward", "tl.log2(l_i)) / LOG2E", "tl.log2(l_i))", 1, "causal"),
    "first tile of keys too late": Mutant("device", "begin = start // BLOCK_N * BLOCK_N",
                                          "begin = start // BLOCK_N * BLOCK_N + BLOCK_N", 1, "padded"),
    "tiles without a mask reach the diagonal": Mutant("forward", "begin, masked, rotation_of_k",
                                                      "begin, masked + BLOCK_N, rotation_of_k", 1, "causal"),
    "last tile of keys left out": Mutant("device", "masked + BLOCK_M)", "masked + 1)", 1, "cached"),
    "another head's keys by TMA": Mutant("forward", "ptr.load([at[0], first, at[1], 0])",
                                         "ptr.load([at[0], first, 0, 0])", 1, "dropped"),
    "forward's dropout column": Mutant("forward", "keep_mask(key, query, n,", "keep_mask(key, query, 0,", 1, "dropped"),
    "dropout's head": Mutant("device", "stream + head.to(tl.int32)", "stream", 1, "dropped"),
    "dropout's scale": Mutant("device", "65536.0 / (65536 - dropout[3])", "1.0 + dropout[3] * 0", 1, "dropped"),
    "dq's scale": Mutant("backward", "dq *= scale", "dq *= 1", 1, "causal"),
    "dk's scale": Mutant("backward", "dk *= scale", "dk *= 1", 1, "causal"),
    "delta left out of dq": Mutant("backward", "dp - delta[:, None]", "dp", 1, "causal"),
    "delta left out of dk": Mutant("backward", "dp - delta[None, :]", "dp", 1, "causal"),
    "P left out of dS": Mutant("backward", "ds = p * (dp - delta[None, :])", "ds = dp - delta[None, :]", 1, "causal"),
    "dv of undropped P": Mutant("backward", "dropped = tl.where(keep, p, 0.0)", "dropped = p", 1, "dropped"),
    "dP of dq not dropped": Mutant("backward",
        "dp = tl.where(keep, dp * kept_scale(dropout), 0.0)\n        ds = p * " "(dp - delta[:, None])",
                                   "ds = p * (dp - delta[:, None])", 1, "dropped"),
    "first queries left out of dk": Mutant("backward", "begin = tl.maximum(first - (n_keys - n_queries), 0)",
                                           "begin = tl.maximum(first + BLOCK_M - (n_keys - n_queries), 0)", 1,
                                           "causal"),
    "dk without the cache's offset": Mutant("backward", "query = m + offs_m + (n_keys - n_queries)",
                                            "query = m + offs_m", 1, "cached"),
}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def case(name):
    """The inputs of a check."""
    if name.startswith("rotated"):
        rotary = rotary_tables(6 if name == "rotated by 6" else 8)
        return Case(attention_qkv, attention_qkv_reference, qkv_inputs(40, 1), {"rotary": rotary})
    shape, options = {  # of samples, queries, keys, heads, head size
        "causal": ((1, 70, 70, 1, 16), {}),
        "float16": ((1, 33, 33, 1, 16), {}),
        "full": ((1, 33, 37, 1, 16), {"causal": False}),
        "cached": ((1, 34, 70, 1, 16), {}),
        "padded": ((2, 40, 40, 1, 16), {"causal": False, "seq_starts": ints(0, 9)}),
        "packed": ((1, 70, 70, 1, 16), {"cu_seqlens": ints(0, 1, 33, 70), "dropout": Dropout(0.2, RNG)}),
        "packed full": ((1, 70, 70, 1, 16), {"cu_seqlens": ints(0, 1, 33, 70), "causal": False}),
        "dropped": ((1, 40, 70, 2, 16), {"dropout": Dropout(0.3, RNG)}),
    }[name]
    dtype = torch.float16 if name == "float16" else torch.float32
    return Case(attention, attention_reference, attention_inputs(shape, dtype), options)


test_without_a_mutant_every_check_passes, test_a_mutant_is_noticed = mutation_tests(FILES, SMALL, MUTANTS, case)
