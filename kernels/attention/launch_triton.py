"""Launchers of attention's Triton kernels.

B batch, Tq queries, Tk keys, H heads, K head size, N = B * Tq rows, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from phi1.kernels.attention.backward_triton import (
    attention_backward_dkdv_kernel,
    attention_backward_dq_kernel,
)
from phi1.kernels.attention.device_triton import rotate_rows_kernel
from phi1.kernels.attention.forward_triton import attention_forward_kernel
from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.constants import FP_FUSION, LOG2E
from phi1.kernels.core.philox import threshold
from phi1.kernels.core.tiles import TILES, tile

MAX_HEAD_SIZE = 128
MAX_STRIDE = (2**31 - 1) // 256  # of tokens, in elements; a tile has at most 256 tokens
ROTATED_ROWS = 64  # of one program of rotate_rows_kernel


def _tiles(*tiles: tuple[int, ...], more: tuple[str, ...] = ()) -> list[dict[str, int]]:
    names = ("block_m", "block_n", "rotate_on_load", "num_warps", "num_stages", *more)
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


# What rotates on load reads half as much as what rotates into scratch first, and rotates each row for each tile.
# "tma" reads k and v by TMA (sm_90 and later), where `_Call.described` says so and nothing is rotated: with a rotated q
# ptxas serialises the wgmma instructions of a tile of 128 x 64.
TILES |= {
    ("attention", "forward"): _tiles(
        (128, 128, 0, 8, 3, 0), (128, 128, 1, 8, 3, 0), (128, 128, 0, 8, 2, 0), (256, 64, 0, 8, 3, 0),
        (128, 64, 0, 8, 3, 0), (128, 64, 1, 8, 3, 0), (128, 64, 0, 4, 3, 0), (128, 64, 1, 4, 3, 0),
        (128, 64, 0, 4, 2, 0), (128, 32, 0, 4, 3, 0), (64, 128, 0, 4, 3, 0), (64, 64, 0, 4, 3, 0),
        (128, 128, 0, 8, 3, 1), (128, 128, 0, 8, 2, 1), (128, 64, 0, 8, 3, 1), more=("tma",)),
    ("attention", "backward_dq"): _tiles(
        (128, 128, 0, 8, 2), (128, 128, 1, 8, 2), (128, 64, 0, 8, 2), (128, 64, 1, 8, 2), (128, 64, 0, 8, 3),
        (128, 32, 0, 4, 2), (64, 128, 0, 8, 2), (64, 64, 0, 4, 2), (64, 64, 0, 8, 2), (64, 32, 0, 4, 2)),
    ("attention", "backward_dkdv"): _tiles(
        (64, 128, 0, 8, 2), (64, 128, 1, 8, 2), (32, 128, 0, 8, 2), (32, 128, 1, 8, 2), (32, 128, 0, 8, 3),
        (64, 128, 0, 8, 1), (128, 64, 0, 8, 2), (64, 64, 0, 4, 2), (64, 64, 0, 8, 2), (32, 64, 0, 4, 2),
        (32, 64, 0, 8, 2), (16, 128, 0, 8, 2)),
}


def launch_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [B, Tq, H, K] contiguous, lse [H, N] float32) for q [B, Tq, H, K] and k, v [B, Tk, H, K].

    q, k and v may have any strides.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=torch.float32)
    call = _Call(q, k, v, spec, cu_seqlens)
    if not out.numel():
        return out, lse
    q, k, v = call.readable(q), call.readable(k), call.readable(v)
    described = call.described(q, k, v)
    t = call.tile("forward", described=described)
    on_load = call.rotates_on_load(t)
    if call.rotates and not on_load:
        k = call.rotated(k)
    tma = described and bool(t["tma"]) and not call.rotates
    read_k, read_v = (call.descriptor(x, t["block_n"]) if tma else x for x in (k, v))
    attention_forward_kernel[call.grid(call.n_queries, t["block_m"])](
        q, read_k, read_v, out, lse, scale_log2=spec.scale * LOG2E, ROTATE_Q=call.rotates, ROTATE_K=on_load, TMA=tma,
        **call.arguments(call.n_queries, t["block_m"], t), **call.strides(q=q, k=k, v=v),
    )
    return out, lse


def launch_attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    grads: Sequence[torch.Tensor], spec: AttentionSpec, cu_seqlens: torch.Tensor | None,
) -> None:
    """Write the gradients of q, k and v into `grads`, three tensors of their shapes and any strides."""
    call = _Call(q, k, v, spec, cu_seqlens)
    dq, dk, dv = grads
    assert dk.stride() == dv.stride(), f"dk and dv differ in strides: {dk.stride()}, {dv.stride()}"
    if not q.numel():
        for grad in grads:
            grad.zero_()
        return
    q, k, v = call.readable(q), call.readable(k), call.readable(v)
    dout, out, delta = dout.contiguous(), out.contiguous(), torch.empty_like(lse)
    t = call.tile("backward_dq")
    on_load = call.rotates_on_load(t)
    k_read = call.rotated(k) if call.rotates and not on_load else k
    attention_backward_dq_kernel[call.grid(call.n_queries, t["block_m"])](
        dout, q, k_read, v, out, lse, delta, dq, scale=spec.scale, ROTATE_Q=call.rotates, ROTATE_K=on_load,
        **call.arguments(call.n_queries, t["block_m"], t), **call.strides(q=q, k=k_read, v=v, dq=dq),
    )
    t = call.tile("backward_dkdv")
    on_load = call.rotates_on_load(t)
    q_read = call.rotated(q) if call.rotates and not on_load else q
    attention_backward_dkdv_kernel[call.grid(call.n_keys, t["block_n"])](
        dout, q_read, k, v, lse, delta, dk, dv, scale=spec.scale, ROTATE_Q=on_load, ROTATE_K=call.rotates,
        **call.arguments(call.n_keys, t["block_n"], t), **call.strides(q=q_read, k=k, v=v, dk=dk),
    )


class _Call:
    """The sizes, options and arguments that all launches of one call share."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
                 cu_seqlens: torch.Tensor | None) -> None:
        self.batch, self.n_queries, self.n_heads, self.head_size = q.shape
        self.n_keys, self.n_rows, self.spec = k.shape[1], q.shape[0] * q.shape[1], spec
        self.dtype, self.device = q.dtype, q.device
        self.rotary = (None, None, None) if spec.rotary is None else tuple(x.contiguous() for x in spec.rotary)
        self.rotates = spec.rotary is not None and not spec.rotary_applied
        self.half = 0 if spec.rotary is None else spec.rotary[0].shape[1]
        self.cuts, self.n_samples = None, self.batch
        if cu_seqlens is not None:
            self.cuts, self.n_samples = _cuts(cu_seqlens, self.n_rows), cu_seqlens.shape[0] - 1
        if self.head_size > MAX_HEAD_SIZE:
            raise NotImplementedError(f"attention: the Triton kernels take a head size of at most {MAX_HEAD_SIZE}; got "
                                      f"{self.head_size}; backend('reference') takes any size")

    def tile(self, kernel: str, **more: bool) -> dict[str, int]:
        return tile("attention", kernel, self.device, head_size=self.head_size, bits=8 * self.dtype.itemsize,
                    causal=self.spec.causal, dropout=self.spec.dropout is not None, rotates=self.rotates,
                    packed=self.cuts is not None, **more)

    def readable(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [B, T, H, K], copied unless the kernels can read it.

        The elements of a head must have stride 1, and offsets within a tile must fit in 32 bits. Rows of packed
        documents must have one stride across samples.
        """
        even = self.cuts is None or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
        return x if x.stride(3) == 1 and x.stride(1) <= MAX_STRIDE and even else x.contiguous()

    def described(self, *operands: torch.Tensor) -> bool:
        """True if TMA can read the operands [B, T, H, K].

        Their addresses and strides must be multiples of 16 bytes. TMA masks only past the end of a sample, so neither
        packed documents nor seq_starts are possible.
        """
        size = self.dtype.itemsize
        return self.cuts is None and self.spec.seq_starts is None and all(
            x.data_ptr() % 16 == 0 and all(stride > 0 and stride * size % 16 == 0 for stride in x.stride()[:3])
            for x in operands)

    def descriptor(self, x: torch.Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [1, rows, 1, self.block_d])

    def rotates_on_load(self, t: dict[str, int]) -> bool:
        """True if the kernel rotates each tile that it loads, and False if the operand is rotated before.

        `rotate_columns` is never used on load: it needs an exchange between threads, and on sm_90 247,808 bytes of
        shared memory.
        """
        return self.rotates and bool(t["rotate_on_load"]) and not self.half & (self.half - 1)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Return a rotated copy of x [B, T, H, K]."""
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        cos, sin, positions = self.rotary
        assert cos is not None
        rotate_rows_kernel[(triton.cdiv(x.shape[1], ROTATED_ROWS) * self.n_heads * self.batch,)](
            x, y, cos, sin, positions, n_tokens=x.shape[1], n_heads=self.n_heads, n_positions=cos.shape[0],
            stride_x_b=x.stride(0), stride_x_t=x.stride(1), stride_x_h=x.stride(2), HALF=self.half,
            HEAD_DIM=self.head_size, BLOCK_D=self.block_d, BLOCK_T=ROTATED_ROWS, num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
        return y

    @property
    def block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.head_size))

    def blocks(self, n_tokens: int, block: int) -> int:
        """Return the number of blocks of a sample, or of slots for all blocks of packed documents.

        The slots include those of rows that belong to no document.
        """
        return triton.cdiv(n_tokens, block) if self.cuts is None else self.n_rows // block + self.n_samples + 2

    def grid(self, n_tokens: int, block: int) -> tuple[int]:
        return (self.blocks(n_tokens, block) * self.n_heads * (self.batch if self.cuts is None else 1),)

    def arguments(self, n_tokens: int, block: int, t: dict[str, int]) -> dict[str, Any]:
        dropout, (cos, sin, positions) = self.spec.dropout, self.rotary
        stream = 0 if dropout is None else dropout.layer << 16 | dropout.kind << 12
        return {
            "cu_seqlens_ptr": self.cuts, "seq_starts_ptr": _dense(self.spec.seq_starts),
            "cos_ptr": cos, "sin_ptr": sin, "positions_ptr": positions,
            "rng_ptr": None if dropout is None else dropout.rng.contiguous(),
            "sample_ids_ptr": None if dropout is None else _dense(dropout.sample_ids),
            "n_queries": self.n_queries, "n_keys": self.n_keys, "n_rows": self.n_rows, "n_heads": self.n_heads,
            "n_blocks": self.blocks(n_tokens, block), "n_samples": self.n_samples,
            "n_positions": 0 if cos is None else cos.shape[0],
            "stream": stream - (1 << 32) if stream >> 31 else stream,
            "threshold": 0 if dropout is None else threshold(dropout.p),
            "IS_CAUSAL": self.spec.causal, "HALF": self.half, "HEAD_DIM": self.head_size, "BLOCK_D": self.block_d,
            "BLOCK_M": t["block_m"], "BLOCK_N": t["block_n"], "num_warps": t["num_warps"],
            "num_stages": t["num_stages"], "enable_fp_fusion": FP_FUSION,
        }

    def strides(self, **tensors: torch.Tensor) -> dict[str, int]:
        """Return the strides of sample, token and head of each tensor [B, T, H, K], by argument name.

        For packed documents the sample's stride is that of a row.
        """
        found = {}
        for name, x in tensors.items():
            found[f"stride_{name}_b"] = x.stride(0) if self.cuts is None else x.stride(1)
            found[f"stride_{name}_t"], found[f"stride_{name}_h"] = x.stride(1), x.stride(2)
        return found


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _cuts(cu_seqlens: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return [0, *cu_seqlens, N] as int32, clamped and made to ascend, without waiting for the device.

    Kernels therefore stay within the N rows for any values.
    """
    ends = torch.nn.functional.pad(cu_seqlens.clamp(0, n_rows), (1, 0))
    return torch.nn.functional.pad(ends, (0, 1), value=n_rows).cummax(0).values.to(torch.int32)
