"""parallel_block as an operator: what it refuses, sound schemas, torch.compile, and what a forward alone leaves out."""

from contextlib import nullcontext

import pytest
import torch
from block_cases import SHAPE, drops, ints, options, tables
from kernel_checks import assert_compiles_whole, assert_operator_is_sound, block_inputs
from torch.utils._pytree import tree_map

from phi1.kernels import Dropout, parallel_block, parallel_block_prefill
from phi1.kernels.block.dispatch import branches_forward
from phi1.kernels.block.parallel_block import RECOMPUTE

RNG = torch.tensor([5, 7])
SMALL = (2, 6, 32, 2, 48, 8)  # B, T, D, H, F, R


@pytest.mark.parametrize("without", ["gradients", "parameters"])
def test_a_forward_alone_returns_nothing_to_keep(monkeypatch, without):
    tensors = block_inputs(SHAPE, device="cpu")
    if without == "gradients":
        tensors["x"].requires_grad_()
    kept = []
    monkeypatch.setattr("phi1.kernels.block.parallel_block.branches_forward",
                        lambda *a, keeps_pre, **b: kept.append(keeps_pre) or branches_forward(*a, keeps_pre=keeps_pre))
    with torch.no_grad() if without == "gradients" else nullcontext():
        parallel_block(**tensors, **options("cpu"))
    parallel_block(**tensors | {"x": tensors["x"].detach().requires_grad_()}, **options("cpu"))
    assert kept == [False, True]


def test_prefill_has_no_backward():
    tensors, own = block_inputs(SHAPE, device="cpu"), options("cpu")
    tensors["in_bias"].requires_grad_()
    with pytest.raises(ValueError, match=r"^parallel_block_prefill: no argument may want a gradient: .*got one that"):
        parallel_block_prefill(**tensors, **own)
    with pytest.raises(ValueError, match=r"^parallel_block_prefill: batch must divide the 34 rows of x; got 5"):
        parallel_block_prefill(**tensors, **own | {"batch": 5})


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"positions": 3}, TypeError, "positions must be a tensor"),
    ({"x": torch.zeros(2, 6, 32)}, ValueError, r"x must be \[N, D\]"),
    ({"in_weight": torch.zeros(144)}, ValueError, r"in_weight must be \[3D \+ F, D\]"),
    ({"n_heads": 5}, ValueError, "n_heads must divide the 32 columns of x; got 5"),
    ({"n_heads": 0}, ValueError, "n_heads must divide"),
    ({"n_heads": True}, TypeError, "n_heads must be a whole number; got True"),
    ({"batch": True}, TypeError, "batch must be a whole number; got True"),
    ({"eps": 0.0}, ValueError, "eps must be greater than 0"),
    ({"in_weight": torch.zeros(96, 32)}, ValueError, "in_weight must have more rows than 3 x the 32 columns.*got 96"),
    ({"in_weight": torch.zeros(144, 31)}, ValueError, r"in_weight.shape must be \(144, 32\)"),
    ({"in_bias": torch.zeros(143)}, ValueError, r"in_bias.shape must be \(144,\)"),
    ({"norm_weight": torch.zeros(31)}, ValueError, r"norm_weight.shape must be \(32,\)"),
    ({"norm_bias": torch.zeros(31)}, ValueError, r"norm_bias.shape must be \(32,\)"),
    ({"out_weight": torch.zeros(80, 32)}, ValueError, r"out_weight.shape must be \(32, 80\)"),
    ({"out_bias": torch.zeros(32)}, ValueError, r"out_bias.shape must be \(2, 32\)"),
    ({"batch": 5}, ValueError, "batch must divide the 12 rows of x; got 5"),
    ({"cu_seqlens": ints("cpu", 0, 12)}, ValueError, "at most one of batch and cu_seqlens"),
    ({"batch": None, "cu_seqlens": ints("cpu", 0, 13)}, ValueError,
     "cu_seqlens must ascend from 0 to the number of rows, 12"),
    ({"seq_starts": ints("cpu", 0, 7)}, ValueError, "seq_starts must be at least 0 and less than 7"),
    ({"cos": torch.zeros(150, 9), "sin": torch.zeros(150, 9)}, ValueError, "cos must have between 1 and 8 columns"),
    (dict(**tables("cpu", n_positions=5)), ValueError, "positions must be at least 0 and less than 5"),
    ({"positions": torch.arange(11)}, ValueError, r"positions.shape must be \(12,\)"),
    ({"recompute": "all"}, ValueError, "recompute must be one of none, mlp, block; got 'all'"),
    ({"dropouts": (None, None)}, ValueError, "dropouts must be three: attention, dense, fc2; got 2"),
    ({"dropouts": None}, ValueError, "dropouts must be three: attention, dense, fc2; got NoneType"),
    ({"dropouts": Dropout(0.1, RNG)}, ValueError, "dropouts must be three: attention, dense, fc2; got Dropout"),
    ({"dropouts": (0.1, None, None)}, TypeError, r"dropouts\[0\] must be a phi1.kernels.Dropout or None"),
    ({"dropouts": drops("cpu", (0, 0, 0.1), range(3))}, ValueError, r"dropouts\[2\].sample_ids.shape must be \(2,\)"),
    ({"dropouts": (Dropout(0.1, RNG), Dropout(0.1, RNG.clone(), kind=1), None)}, ValueError,
     "dropouts must share one rng and one sample_ids"),
])
def test_errors(change, error, match):
    with pytest.raises(error, match=f"^parallel_block: .*{match}"):
        parallel_block(**block_inputs(SMALL, device="cpu") | options("cpu") | change)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_operator_is_sound(recompute):
    x, *parameters = [x.requires_grad_() for x in block_inputs(SMALL, device="cpu").values()]
    rotary = [*tables("cpu").values(), torch.arange(6).repeat(2)]
    cases = (
        ((None, ints("cpu", 0, 3), None, None), (2, 2, (0.0,) * 3, (0,) * 3, (0,) * 3, 1e-5, recompute)),
        ((ints("cpu", 0, 5, 12), None, RNG, torch.tensor([8, 9])),
         (2, 1, (0.1, 0.2, 0.3), (4,) * 3, (0, 1, 2), 1e-5, recompute)),
    )
    for packing, constants in cases:
        assert_operator_is_sound("parallel_block", (x, parameters, rotary, *packing, *constants))
        y, *saved = torch.ops.phi1.parallel_block(x, parameters, rotary, *packing, *constants)
        arguments = tree_map(torch.Tensor.detach, (y, x, parameters, saved))
        assert_operator_is_sound("parallel_block_backward", (*arguments, rotary, *packing, *constants))


def test_operator_is_sound_in_prefill():
    x, *parameters = block_inputs(SMALL, device="cpu").values()
    rotary = [*tables("cpu").values(), torch.arange(6).repeat(2)]
    assert_operator_is_sound("parallel_block_prefill", (x, parameters, rotary, ints("cpu", 0, 3), 2, 2, 1e-5))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("rates", [(0, 0, 0), (0.1, 0.2, 0.3)], ids=str)
def test_compiles_whole(rates, recompute):
    assert_compiles_whole(parallel_block, block_inputs(SHAPE, device="cpu"),
                          **options("cpu", dropouts=drops("cpu", rates), recompute=recompute))
