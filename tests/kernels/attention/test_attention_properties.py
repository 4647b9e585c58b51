"""Properties of the Triton kernels of attention over drawn documents and tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_matches_reference, kernel_device, qkv_inputs

from phi1.kernels import attention_qkv, backend
from phi1.kernels.attention import launch_triton
from phi1.kernels.attention.attention_qkv import attention_qkv_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5)
# The same draws each time: what fails once fails again.
DRAWN = settings(max_examples=6, deadline=None, derandomize=True)


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)


@DRAWN
@given(LENGTHS, st.booleans(), st.sampled_from([(16, 32), (32, 64), (64, 32)]))
def test_any_documents_match_reference(lengths, causal, tile):
    if sum(lengths) < 2:  # of one row alone, dq and dk are differences of equal numbers
        return
    small = {"block_m": tile[0], "block_n": tile[1], "rotate_on_load": 0, "num_warps": 4, "num_stages": 2, "tma": 0}
    with pytest.MonkeyPatch.context() as patch, backend("triton"):
        patch.setattr(launch_triton, "tile", lambda *_, **__: small)
        # 8 roundings, as in test_attention.py, which says why.
        assert_matches_reference(attention_qkv, attention_qkv_reference, qkv_inputs(sum(lengths), 1),
                                         roundings=8, cu_seqlens=packed(lengths), causal=causal)


@DRAWN
@given(LENGTHS, st.data())
def test_documents_do_not_see_one_another(lengths, data):
    """One document may hold anything, infinities too; the rows of the others keep their bits."""
    changed = data.draw(st.integers(0, len(lengths) - 1))
    cuts = packed(lengths)
    qkv = qkv_inputs(sum(lengths), 1)["qkv"].detach()
    other = qkv.clone()
    own = slice(int(cuts[changed]), int(cuts[changed + 1]))
    other[own] = torch.inf
    with backend("triton"):
        before, after = (attention_qkv(x, cu_seqlens=cuts) for x in (qkv, other))
    for x in (before, after):
        x[own] = 0
    assert torch.equal(before, after)
