"""Operations inside torch.utils.checkpoint: what is computed again has the same bits, masks included.

Attention's and the block's: test_attention_kernels.py, test_block.py.
"""

import pytest
import torch
from kernel_checks import outputs_and_gradients
from torch.utils.checkpoint import checkpoint

from phi1 import kernels
from phi1.kernels import Dropout

ROWS, WIDTH, INNER, VOCAB = 6, 16, 24, 40
MASK = Dropout(0.3, torch.tensor([5, 7]), layer=2, kind=1)
NORM = {"weight": (WIDTH,), "bias": (WIDTH,)}
OPERATIONS = {  # shapes, options
    "layer_norm": ({"x": (ROWS, WIDTH), **NORM}, {}),
    "add_layer_norm": ({"x": (ROWS, WIDTH), "residual": (ROWS, WIDTH), **NORM}, {}),
    "gelu": ({"x": (ROWS, WIDTH)}, {}),
    "linear": ({"x": (ROWS, WIDTH), "weight": (INNER, WIDTH), "bias": (INNER,), "residual": (ROWS, INNER)},
               {"activation": "gelu_new", "dropout": MASK}),
    "mlp": ({"x": (ROWS, WIDTH), "w1": (INNER, WIDTH), "b1": (INNER,), "w2": (WIDTH, INNER), "b2": (WIDTH,)}, {}),
    "linear_cross_entropy": ({"x": (ROWS, WIDTH), "weight": (VOCAB, WIDTH), "bias": (VOCAB,)},
                             {"targets": torch.arange(ROWS)}),
    "dropout_add": ({"x": (ROWS, WIDTH), "residual": (ROWS, WIDTH)}, {"dropout": MASK}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_checkpointed_operation_has_the_same_bits(name):
    operation, (shapes, options) = getattr(kernels, name), OPERATIONS[name]
    tensors = {argument: torch.randn(shape).bfloat16() for argument, shape in shapes.items()}
    calls = []

    def counted(**arguments):
        calls.append(name)
        return operation(**arguments)

    expected = outputs_and_gradients(operation, tensors, **options)
    found = outputs_and_gradients(lambda **arguments: checkpoint(counted, use_reentrant=False, **arguments),
                                          tensors, **options)
    assert len(calls) == 2
    for output, value in expected.items():
        assert torch.equal(found[output], value), output
