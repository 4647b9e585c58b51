"""Temporaries that stay between calls: nothing that an operation returns or saves may lie in them."""

import pytest
import torch

from phi1 import testing
from phi1.kernels import attention, gelu, linear_cross_entropy, parallel_block
from phi1.kernels._scratch import KEEP_BYTES, kept, scratch

TABLES = {"cos": torch.randn(24, 4), "sin": torch.randn(24, 4)}


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


CALLS = {
    "attention": (attention, {name: randn(1, 24, 2, 8) for name in "qkv"}, {}),
    "gelu": (gelu, {"x": randn(5, 16)}, {}),
    "linear_cross_entropy": (
        linear_cross_entropy, {"x": randn(6, 8), "weight": randn(11, 8), "bias": randn(11)},
        {"targets": torch.arange(6)},
    ),
    "parallel_block": (
        parallel_block,
        {"x": randn(24, 16), "norm_weight": randn(16), "norm_bias": randn(16), "in_weight": randn(80, 16),
         "in_bias": randn(80), "out_weight": randn(16, 48), "out_bias": randn(2, 16)},
        {"n_heads": 2, **TABLES},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_saved_tensors_and_gradients_are_not_in_scratch(name):
    op, tensors, options = CALLS[name]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = testing.outputs_and_gradients(op, tensors, **options)
    blocks = {block.untyped_storage().data_ptr() for block in kept().values()}
    assert blocks, "the operation kept nothing, so this test would say nothing"
    assert saved
    for what, value in [*found.items(), *((f"saved {i}", x) for i, x in enumerate(saved))]:
        assert value.untyped_storage().data_ptr() not in blocks, what


def test_a_block_is_taken_again_grows_and_is_dropped_where_it_is_large():
    first = scratch("test", (4, 8), torch.float32, torch.empty(0))
    again = scratch("test", (8, 4), torch.float16, torch.empty(0))
    larger = scratch("test", (64,), torch.float32, torch.empty(0))
    assert first.data_ptr() == again.data_ptr()
    assert larger.untyped_storage().nbytes() == 256
    assert scratch("test", (64,), torch.float32, torch.empty(0)).data_ptr() == larger.data_ptr()
    huge = scratch("test_huge", (KEEP_BYTES + 1,), torch.uint8, torch.empty(0))
    assert huge.numel() == KEEP_BYTES + 1
    assert "test_huge" not in kept()


def test_inference_mode_leaves_blocks_that_training_can_write_to():
    kept().pop("gelu", None)
    with torch.inference_mode():
        gelu(randn(5, 16))
    testing.outputs_and_gradients(gelu, {"x": randn(5, 16)})
