"""Launches are noted as a GPU would make them."""

import os
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("counts launches of compiled kernels", allow_module_level=True)

from phi1 import Phi1, preset
from phi1.bench.harness.counting import counting
from phi1.kernels import layer_norm

BATCH, TOKENS = 2, 128


def meta(*shape, dtype=torch.float16, **options):
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def noted(function, arch="sm_90"):
    with counting(arch) as counter:
        function()
    return counter.launches


def names(function, arch="sm_90"):
    return [launch.name for launch in noted(function, arch)]


def accumulate(total, a, b):
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: meta(4, 8) @ meta(8, 16), ["mm"]),
        (lambda: meta(4, 8).add_(meta(4, 8)), ["add_"]),
        (lambda: meta(4, 8).copy_(meta(4, 8)), ["copy_"]),
        (lambda: meta(4, 8).zero_(), ["zero_"]),
        (lambda: meta(4, 8).t().reshape(8, 4)[:2].unsqueeze(0), []),
        (lambda: meta(4, 8) + meta(1, 8).expand(4, 8), ["add"]),
        (lambda: torch.mm(meta(4, 8), meta(8, 16), out=meta(4, 16)), ["mm"]),
        (lambda: accumulate(meta(4, 16, dtype=torch.float32), meta(4, 8), meta(8, 16)), ["addmm"]),
        (lambda: torch._foreach_add_([meta(4), meta(8)], 1.0), ["_foreach_add_"]),
    ],
    ids=["product", "in place", "copy", "fill", "views", "broadcast", "out", "wider out", "lists"],
)
def test_an_operator_that_is_no_view_is_a_launch(function, expected):
    assert names(function) == expected


def test_our_operators_are_opened_and_their_kernels_noted_in_both_directions():
    x, weight, bias = meta(64, 2048, requires_grad=True), meta(2048), meta(2048)
    launches = noted(lambda: layer_norm(x, weight, bias).backward(meta(64, 2048)))
    assert [launch.name for launch in launches if launch.kernel] == [
        "layer_norm_forward_kernel", "layer_norm_backward_kernel", "sum_partials_kernel"]
    assert launches[0].types["mean_ptr"] == "*fp32"


def test_nothing_stays_patched():
    noted(lambda: None)
    assert not meta(1).is_cuda


def layer(model, recompute="none", *, grad=True, dropout=False):
    """A layer's forward, and its backward if gradients are wanted; rows and positions are there before."""
    rows = BATCH * TOKENS
    x, dy = (meta(rows, model.config.hidden_size, requires_grad=True) for _ in range(2))
    cos, sin = model.rotary_tables.unbind(0)
    positions, ids, rng = (meta(size, dtype=torch.int64) for size in (rows, BATCH, 2))
    masks = {"rng": rng, "sample_ids": ids} if dropout else {}

    def run():
        model.zero_grad()
        with torch.set_grad_enabled(grad):
            y = model.blocks[0](x, cos, sin, batch=BATCH, positions=positions, recompute=recompute, **masks)
        if grad:
            y.backward(dy.detach())

    return run


@pytest.mark.parametrize(("dropout", "arch", "forward", "backward"), [
    *((False, arch, 4, 13) for arch in ("sm_90", "sm_100", "gfx942")),
    *((True, arch, 5, 14) for arch in ("sm_90", "sm_100", "gfx942")),
    # cuBLAS multiplies, and what our kernels fuse into the products are launches of their own
    (False, "sm_80", 10, 13), (True, "sm_80", 8, 14),
])
def test_a_layer_takes_as_many_launches_as_the_docs_say(dropout, arch, forward, backward):
    rate = 0.1 * dropout
    config = replace(preset("phi1"), num_hidden_layers=1, attention_dropout=rate, residual_dropout=rate)
    model = Phi1(config, device="meta", dtype=torch.float16)
    found = [len(noted(layer(model, grad=grad, dropout=dropout), arch)) for grad in (False, True)]
    assert found == [forward, forward + backward]


@pytest.mark.parametrize(("recompute", "more"), [
    ("mlp", {"in_proj_kernel": 1}), ("block", {"in_proj_kernel": 1, "attention_forward_kernel": 1})])
def test_computing_again_is_one_product_and_for_a_whole_block_attention(recompute, more):
    model = Phi1(preset("nano", num_hidden_layers=1), device="meta", dtype=torch.float16)
    none, again = (noted(layer(model, mode)) for mode in ("none", recompute))
    assert Counter(x.name for x in again) - Counter(x.name for x in none) == more
    assert len(again) == len(none) + sum(more.values())
    made = [x.constants for x in again if x.name == "in_proj_kernel"][-1]
    assert ("qkv_ptr" in made) == (recompute == "mlp"), "q, k and v are there and are not computed again"
    assert "act_ptr" in made
