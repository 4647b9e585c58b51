"""Attention's, rotary's and the block's kernels at offsets past 2^31, past the end of a weight, and on values that
nobody has checked.

In the interpreter every address of a load or a store is held against the tensors that the launch was given.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import kernel_device

from phi1.kernels import attention, backend, check_values, rotary, rotary_
from phi1.kernels.attention import launch_triton
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.block import projections_triton as projections
from phi1.kernels.pointwise.gelu import gelu_new

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

SMALL = {"block_m": 64, "block_n": 64, "rotate_on_load": 1, "num_warps": 4, "num_stages": 2, "tma": 0}
PRODUCT = {"block_m": 32, "block_n": 64, "block_k": 32, "group_m": 2, "parts": 1, "tma": 0, "num_warps": 4,
           "num_stages": 2}
WILD = [-(2**63), -(2**31), -9, 0, 3, 40, 2**31 - 1, 2**31 + 3, 2**63 - 1]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(launch_triton, "tile", lambda *_, **__: SMALL)


@contextmanager
def addresses_checked():
    """Raise in the interpreter at the first load or store outside of a launch's tensors. A GPU is left alone."""
    if DEVICE == "cuda":
        yield
        return
    from quick_interpreter import overflow_checked
    from triton.runtime import interpreter

    executor, memory, spans = interpreter.GridExecutor, interpreter._interpreter, []

    def take(self, args, kwargs, original=executor._init_args_hst):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.numel()]
        ends = [x.data_ptr() + x.element_size() * (1 + sum((n - 1) * stride for n, stride in
                                                           zip(x.shape, x.stride(), strict=True))) for x in tensors]
        spans[:] = [(x.data_ptr(), end) for x, end in zip(tensors, ends, strict=True)]
        return original(self, args, kwargs)

    class Memory:
        def __getattr__(self, name):
            return getattr(memory, name)

        def load(self, pointers, mask, other, dtype):
            inside(pointers, mask, dtype.itemsize)
            return memory.load(pointers, mask, other, dtype)

        def store(self, pointers, values, mask):
            inside(pointers, mask, values.dtype.itemsize)
            return memory.store(pointers, values, mask)

    def inside(pointers, mask, size):
        chosen = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.uint64)
        held = np.zeros(chosen.shape, dtype=bool)
        for first, end in spans:
            held |= (chosen >= first) & (chosen <= end - size)
        assert held.all(), f"{(~held).sum()} of {held.size} addresses are outside of the launch's tensors"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", take)
        patch.setattr(interpreter, "_interpreter", Memory())
        with overflow_checked():
            yield


@triton.jit
def overrun_kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < n)


@pytest.mark.skipif(DEVICE == "cuda", reason="it would overrun")
def test_an_address_outside_is_noticed():
    x = torch.zeros(16, device=DEVICE)
    with addresses_checked():
        overrun_kernel[(1,)](x[:8], 8, BLOCK=16)
        with pytest.raises(Exception, match="1 of 9 addresses are outside"):
            overrun_kernel[(1,)](x[:8], 9, BLOCK=16)
    assert x.sum() == 8


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def tables(n_positions, half=4):
    angle = torch.outer(torch.arange(n_positions).float(), 0.3 ** torch.arange(half))
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def test_wild_starts():
    starts = torch.tensor(WILD, device=DEVICE)
    with backend("triton"), check_values(False), addresses_checked():
        out = attention(*(draw(len(WILD), 20, 1, 16) for _ in range(3)), seq_starts=starts)
    assert out.isfinite().all()
    assert not out[WILD.index(40)].any()


@pytest.fixture
def shared_memory(monkeypatch):
    """Let the interpreter leave out its copy of all storage onto itself: that of a giant view would fill memory."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def giants(count, shape, strides):
    """Float16 views, 2^17 elements apart, of memory of which only what they reach is ever touched."""
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert last >= 2**31
    storage = torch.empty(last + count * 2**17, dtype=torch.float16, device=DEVICE)
    return [storage.as_strided(shape, strides, i * 2**17) for i in range(count)]


LAYOUTS = {  # [B, T, H, K] and strides, in elements
    "heads": ((1, 40, 3, 16), (2**20, 64, 2**30, 1)),
    "samples": ((2, 40, 2, 16), (2**31, 64, 16, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_past_2_to_31_elements(shared_memory, layout):
    from phi1.kernels.attention.launch_triton import launch_attention_backward, launch_attention_forward

    shape, strides = LAYOUTS[layout]
    q, k, v, dq, dk, dv = giants(6, shape, strides)
    small = [draw(*shape, dtype=torch.float16) for _ in range(4)]
    for view, values in zip((q, k, v), small, strict=False):
        view.copy_(values)
    spec = AttentionSpec(causal=True, scale=0.25)
    with backend("triton"), addresses_checked():
        out, lse = launch_attention_forward(q, k, v, spec, None)
        launch_attention_backward(small[3], q, k, v, out, lse, (dq, dk, dv), spec, None)
    leaves = [x.clone().requires_grad_() for x in small[:3]]
    expected = attention_reference(*leaves, causal=True, scale=0.25)
    wanted = torch.autograd.grad(expected, leaves, small[3])
    for got, want in zip((out, dq, dk, dv), (expected, *wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("shape", "strides"), [
    ((5, 2, 1, 16), (2**29, 64, 16, 1)), ((3, 2, 2, 16), (1024, 2**31, 64, 1)), ((3, 2, 3, 16), (1024, 64, 2**30, 1)),
], ids=["rows", "parts", "heads"])
def test_rotary_past_2_to_31_elements(shared_memory, shape, strides):
    (view,) = giants(1, shape, strides)
    values, cos_sin = draw(*shape, dtype=torch.float16), tables(9, 3)
    view.copy_(values)
    positions = torch.arange(shape[0], device=DEVICE)
    expected = rotary(values, *cos_sin, positions)
    with backend("triton"), addresses_checked():
        assert torch.equal(rotary(view, *cos_sin, positions), expected)
        rotary_(view, *cos_sin, positions)
    assert torch.equal(view, expected)


def test_rotary_refuses_elements_too_far_apart_for_32_bits():
    (view,) = giants(1, (3, 2, 1, 6), (64, 16, 16, 2**29))
    with backend("triton"), pytest.raises(NotImplementedError, match=r"at most 357913941 from the next; got 536870912"):
        rotary_(view, *tables(9, 3), torch.arange(3, device=DEVICE))


def test_rows_of_a_tile_too_far_apart_for_32_bits_are_copied(shared_memory):
    (q,) = giants(1, (1, 40, 1, 16), (2**26, 2**26, 16, 1))
    small = draw(1, 40, 1, 16, dtype=torch.float16)
    q.copy_(small)
    with backend("triton"), addresses_checked():
        out = attention(q, small, small)
        assert torch.equal(out, attention(small, small, small))


def rotary_of(n_rows, n_positions=9):
    return *tables(n_positions, 8), torch.arange(n_rows, device=DEVICE) % n_positions


def test_projections_read_nothing_past_their_weights(monkeypatch):
    """Every part of in_proj and y end within a tile; behind each weight lies memory that is no tensor of the launch."""
    n_rows, width, inner = 41, 48, 40
    h, weight, bias = draw(n_rows, width), draw(3 * width + inner + 64, width)[:-64], draw(3 * width + inner)
    monkeypatch.setattr(projections, "tile", lambda *_, **__: PRODUCT)
    with addresses_checked():
        _, pre, act = projections.launch_in_proj(h, weight, bias, rotary_of(n_rows), 3, PRODUCT)
        out_weight, out_bias = draw(width + 64, width + inner)[:-64], draw(2, width)
        y = projections.launch_out_proj(h, act, h, out_weight, out_bias)
    torch.testing.assert_close(pre, h @ weight[3 * width :].t() + bias[3 * width :], rtol=1e-4, atol=1e-4)
    expected = h + torch.cat((h, act), 1) @ out_weight.t() + out_bias.sum(0)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def last_tile_alone(monkeypatch):
    """Let a program of the projections work on the last tile: all tiles past 2^31 elements would take hours."""
    @triton.jit
    def last_tile(pid, n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP_M):
        return tl.cdiv(n_rows, BLOCK_M) - 1, tl.cdiv(n_cols, BLOCK_N) - 1

    monkeypatch.setattr(projections, "grouped_tile", last_tile)


@pytest.mark.skipif(DEVICE == "cuda", reason="launches one program by hand, and its memory is not filled")
def test_projections_past_2_to_31_elements(shared_memory, last_tile_alone):
    """The last rows of pre and act [2^17 + 8, 2^14], and of y [2^17 + 8, 2^14]."""
    width, inner, n_rows = 16, 2**14, 2**17 + 8
    options = {"BLOCK_M": 16, "BLOCK_N": 64, "GROUP_M": 2, "PARTS": 1, "TMA": False, "num_warps": 4, "num_stages": 2}
    before, after, att = giants(3, (n_rows, inner), (inner, 1))  # their last eight rows are apart
    h, weight = draw(n_rows, width, dtype=torch.float16), draw(3 * width + inner, width, dtype=torch.float16) / 4
    bias = draw(3 * width + inner, dtype=torch.float16)
    with addresses_checked():
        projections.in_proj_kernel[(1,)](
            h, weight, bias, *rotary_of(n_rows), None, before, after, n_rows=n_rows, n_positions=9, WIDTH=width,
            INNER=inner, HEAD_DIM=16, HALF=8, BLOCK_K=16, **options)
    pre, act = (x[-8:, -64:].float() for x in (before, after))
    exact = h[-8:].float() @ weight[-64:].float().t() + bias[-64:].float()
    torch.testing.assert_close(pre, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(act, gelu_new(pre), rtol=1e-3, atol=1e-3)

    narrow, y = draw(n_rows, width, dtype=torch.float16), before
    att[-8:] = draw(8, inner, dtype=torch.float16)
    out_weight = torch.empty(inner, inner + width, dtype=torch.float16)
    out_weight[-64:] = draw(64, inner + width, dtype=torch.float16) / 128
    out_bias = draw(2, inner, dtype=torch.float16)
    with addresses_checked():
        projections.out_proj_kernel[(1,)](
            att, narrow, att, out_weight, out_bias, y, n_rows=n_rows, WIDTH=inner, INNER=width, BLOCK_K=1024, **options)
    joined = torch.cat((att[-8:], narrow[-8:]), 1).float()
    exact = att[-8:, -64:].float() + joined @ out_weight[-64:].float().t() + out_bias[:, -64:].float().sum(0)
    torch.testing.assert_close(y[-8:, -64:].float(), exact, rtol=1e-3, atol=1e-3)
