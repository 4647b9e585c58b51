"""parallel_block_decode on its Triton kernels: on a GPU, or in Triton's interpreter (run by test_interpreter.py).

The interpreter multiplies bfloat16 wrongly, so that bfloat16 is tested on a GPU alone.
"""

import pytest
import torch
from kernel_checks import DTYPES, assert_within_bound, block_inputs, empty_is_nan, kernel_device, rotary_tables

from phi1.kernels import backend, parallel_block_decode

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]
SHAPES = [  # B, T new tokens, D, H, F, S tokens with those before, R
    (1, 1, 16, 1, 5, 1, 2),
    (3, 1, 64, 1, 200, 40, 32),
    (2, 5, 32, 2, 48, 20, 8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_matches_the_reference(shape, padded, dtype):
    batch, tokens, width, n_heads, inner, length, rotary_size = shape
    cos, sin = rotary_tables(rotary_size)
    tensors = block_inputs((batch, tokens, width, n_heads, inner), dtype) | {"cos": cos, "sin": sin}
    cache = torch.randn(2, batch, length + 3, n_heads, width // n_heads,
                        generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    seq_starts = torch.tensor([0, 7, 3][:batch], dtype=torch.int32, device=DEVICE) if padded else None

    def run(exact=False):
        own = cache.double() if exact else cache.clone()
        wide = {name: x.double() if exact and name not in ("cos", "sin") else x for name, x in tensors.items()}
        return parallel_block_decode(**wide, kv=own[:, :, :length], seq_starts=seq_starts), own

    with backend("triton"), empty_is_nan():
        got = run()
    with backend("reference"):
        eager, exact = run(), run(exact=True)
    for i, name in enumerate(("out", "cache")):
        assert_within_bound(got[i], eager[i], exact[i], name, roundings=8)
    assert torch.equal(got[1][:, :, : length - tokens], cache[:, :, : length - tokens])
    assert torch.equal(got[1][:, :, length:], cache[:, :, length:])
