"""The PyTorch path of causal and full attention, forward and backward. `dispatch.py` has the formulas.

P and dS are rounded to bfloat16 for their products if the inputs are bfloat16 and the device multiplies it. Scores
exist for one tile of samples, heads and queries at a time, and keys that no query of the tile sees are never
multiplied. A tile has whole rows, so the backward can use rowsum(P dP), which cancels the rounding of dP. The kernels
have only parts of rows and use rowsum(dout out) instead.

B batch, Tq queries, Tk keys, H heads, K head size, N = B * Tq rows; G samples times heads of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch

from phi1.kernels.attention.spec import AttentionSpec
from phi1.kernels.core.constants import LOG2E, LOWEST
from phi1.kernels.core.cpu_matmul import multiplies
from phi1.kernels.core.cpu_memory import empty
from phi1.kernels.core.philox import attention_keep, dropout_scale
from phi1.kernels.pointwise.rotary import rotate_

# Measured on a CPU with 1 MiB of L2 a core, T = 256 to 2048, K = 64. The scores of a tile and the products that read
# them stay in the caches (bytes per thread), and tiles of 128 queries skip most of the keys above the diagonal.
CPU_TILE_QUERIES, CPU_TILE_BYTES = 128, 4 << 20
DEVICE_TILE_QUERIES, DEVICE_TILE_BYTES = 1024, 256 << 20


def torch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `dispatch.attention_forward` in PyTorch."""
    batch, n_queries, n_heads, _ = q.shape
    lse = q.new_empty((n_heads, batch * n_queries), dtype=torch.float32)
    if cu_seqlens is None:
        out = empty(q.shape, dtype=q.dtype, device=q.device)
        if _decodes(q, k, v, spec):
            _decode(q, k, v, out, lse, spec)
        else:
            _forward(q, k, v, out, lse.unflatten(1, (batch, n_queries)).transpose(0, 1), spec)
        return out, lse
    out = q.new_full(q.shape, torch.nan)  # rows that belong to no document
    flat = [_as_one_sample(x) for x in (q, k, v, out)]
    for sample, rows in _documents(cu_seqlens):
        own_q, own_k, own_v, own_out = (x[:, rows] for x in flat)
        _forward(own_q, own_k, own_v, own_out, lse[None, :, rows], spec.of_document(sample, rows))
    return out, lse


def torch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
    spec: AttentionSpec,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Compute `dispatch.attention_backward` in PyTorch."""
    batch, n_queries = q.shape[:2]
    if cu_seqlens is None:
        _backward((dout, q, k, v), lse.unflatten(1, (batch, n_queries)).transpose(0, 1), grads, spec)
        return
    inputs, outputs = ([_as_one_sample(x) for x in some] for some in ((dout, q, k, v), grads))
    for grad in outputs:
        grad.fill_(torch.nan)
    for sample, rows in _documents(cu_seqlens):
        own_inputs, own_outputs = ([x[:, rows] for x in some] for some in (inputs, outputs))
        _backward(own_inputs, lse[None, :, rows], own_outputs, spec.of_document(sample, rows))


def _decodes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> bool:
    """True for one query on a CPU. There PyTorch's flash kernel takes 0.2 to 0.5 of the time, conversions included."""
    plain = spec.rotary is None and spec.dropout is None and all(x.stride(-1) == 1 for x in (q, k, v))
    return q.is_cpu and q.shape[1] == 1 and q.numel() > 0 and plain


def _decode(q, k, v, out, lse, spec: AttentionSpec) -> None:
    """Fill out [B, 1, H, K] and lse [H, B].

    Keys and values are converted to float32 tile by tile. Without conversion the kernel takes three (80 keys) to nine
    times (1,024 keys) as long. Converted all at once they leave the caches, which takes up to three times as long.
    """
    for samples, heads, _ in _tiles(q, k):
        bias = None
        if spec.seq_starts is not None:
            bias = _hidden(spec.seq_starts[samples], 0, k.shape[1])[:, None, None]
        tile = (x[samples, :, heads].float().transpose(1, 2) for x in (q, k, v))
        out_tile, lse_tile = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tile, 0.0, False, attn_mask=bias, scale=spec.scale
        )
        out[samples, :, heads].copy_(out_tile.transpose(1, 2))
        lse[heads, samples].copy_(lse_tile.squeeze(-1).t())


def _forward(q, k, v, out, lse, spec: AttentionSpec) -> None:
    """Fill out [B, Tq, H, K] and lse [B, H, Tq]."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    low = _product_dtype(q)
    for samples, heads, step in _tiles(q, k):
        tables = None if spec.rotary_applied else spec.tables(q.shape[0], samples, slice(None))
        q_tile = _wide(q[samples, :, heads], tables).mul_(spec.scale * LOG2E)  # [G, Tq, K]
        k_tile = _wide(k[samples, :, heads], tables)
        v_tile = _heads_first(v[samples, :, heads]).to(low)
        out_tile, lse_tile = out[samples, :, heads].transpose(1, 2), lse[samples, heads]
        for first in range(0, n_queries, step):
            last = min(first + step, n_queries)
            s, end = _scores(q_tile, k_tile, first, last, n_queries, spec, samples)
            # A query that sees no key has a maximum of -inf. The clamps make its probabilities 0.
            high = s.amax(-1, keepdim=True).clamp_(min=LOWEST)
            p = s.sub_(high).exp2_()
            total = p.sum(-1, keepdim=True).clamp_(min=1.0)
            rows = out_tile[:, :, first:last]
            lse_tile[:, :, first:last] = (total.log2() + high).div_(LOG2E).view(rows.shape[:3])
            p.mul_(total.reciprocal_())
            if spec.dropout is not None:
                p.mul_(_kept(spec, samples, heads, first, last, n_queries, n_keys, end))
            p_low = _copy(p, low)
            rows.copy_(_product(p_low, v_tile[:, :end]).to(out.dtype).view(rows.shape))


def _backward(
    inputs: Sequence[torch.Tensor], lse: torch.Tensor, grads: Sequence[torch.Tensor], spec: AttentionSpec
) -> None:
    """Fill grads = (dq [B, Tq, H, K], dk, dv [B, Tk, H, K]), given inputs = (dout, q, k, v) and lse [B, H, Tq]."""
    (dout, q, k, v), (dq, dk, dv) = inputs, grads
    batch, n_queries, n_keys = q.shape[0], q.shape[1], k.shape[1]
    low = _product_dtype(q)
    for samples, heads, step in _tiles(q, k):
        tables = spec.tables(batch, samples, slice(None))
        read = None if spec.rotary_applied else tables
        v_low = _heads_first(v[samples, :, heads]).to(low)
        q_wide, k_wide = _wide(q[samples, :, heads], read), _wide(k[samples, :, heads], read)
        k_low = k_wide if low == torch.float32 else _copy(k_wide, low)
        q_and_dout = empty((2, *q_wide.shape), dtype=low, device=q.device)  # [2, G, Tq, K]: dk and dv are one product
        q_low, dout_low = q_and_dout
        q_low.copy_(q_wide)
        dout_low.unflatten(0, (-1, heads.stop - heads.start)).copy_(dout[samples, :, heads].transpose(1, 2))
        q_scaled = q_wide.mul_(spec.scale * LOG2E)
        lse_tile = (lse[samples, heads] * LOG2E).flatten(0, 1)[..., None]  # [G, Tq, 1]
        sums = None
        for first in reversed(range(0, n_queries, step)):
            last = min(first + step, n_queries)
            s, end = _scores(q_scaled, k_wide, first, last, n_queries, spec, samples)
            p = s.sub_(lse_tile[:, first:last]).exp2_()
            ds_and_p = empty((2, *s.shape), dtype=low, device=s.device)
            ds, dropped = ds_and_p
            # The scale is applied to dP: all that follows is linear in dP, and here it costs no pass and no rounding.
            dp = _copy(_product(dout_low[:, first:last], v_low[:, :end].transpose(1, 2), spec.scale, out=ds),
                       torch.float32)
            if spec.dropout is None:
                dropped.copy_(p)
            else:
                kept = _kept(spec, samples, heads, first, last, n_queries, n_keys, end)
                dropped.copy_(p * kept)
                dp.mul_(kept)
            delta = dp.mul_(p).sum(-1, keepdim=True)
            if low == torch.float32:
                # The sums of P's rows differ from 1 by the rounding of lse, which P (dP - delta) multiplies by delta.
                delta.div_(p.sum(-1, keepdim=True).clamp_(min=0.5))  # 0 where a query sees no key
            ds.copy_(dp.addcmul_(p, delta, value=-1))
            _store(dq[samples, first:last, heads], _product(ds, k_low[:, :end]),
                   spec.tables(batch, samples, slice(first, last)))
            part = _product(ds_and_p.flatten(0, 1).transpose(1, 2), q_and_dout[:, :, first:last].flatten(0, 1))
            sums = _accumulate(sums, part, first > 0)
        dk_sum, dv_sum = (None, None) if sums is None else sums.chunk(2)
        _store(dk[samples, :, heads], dk_sum, tables)
        _store(dv[samples, :, heads], dv_sum, None)


def _scores(
    q_tile: torch.Tensor, k_tile: torch.Tensor, first: int, last: int, n_queries: int, spec: AttentionSpec,
    samples: slice,
) -> tuple[torch.Tensor, int]:
    """Return masked scores [G, last - first, end] in base 2, and end, the number of keys that the queries see."""
    n_keys = k_tile.shape[1]
    end = n_keys - n_queries + last if spec.causal else n_keys
    size = last - first
    s = empty((q_tile.shape[0], size, end), dtype=torch.float32, device=q_tile.device)
    torch.bmm(q_tile[:, first:last], k_tile[:, :end].transpose(1, 2), out=s)
    if spec.causal and size > 1:
        # The last keys belong to the tile's own queries. Adding is 8 times as fast as masked_fill_ on a CPU.
        s[:, :, end - size :] += _above_diagonal(size, s.device)
    if spec.seq_starts is not None:
        starts, by_sample = spec.seq_starts[samples], s.unflatten(0, (samples.stop - samples.start, -1))
        by_sample += _hidden(starts, 0, end)[:, None, None]
        if not spec.causal:
            # A causal query before the start already sees no key.
            offset = n_keys - n_queries
            by_sample += _hidden(starts, offset + first, offset + last)[:, None, :, None]
    return s, end


@lru_cache(maxsize=8)
def _above_diagonal(size: int, device: torch.device) -> torch.Tensor:
    """Return [size, size] with -inf above the diagonal and 0 elsewhere."""
    return torch.full((size, size), -torch.inf, dtype=torch.float32, device=device).triu_(1)


def _hidden(starts: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return [B, last - first] with -inf at positions before each sample's start and 0 elsewhere."""
    hidden = torch.arange(first, last, device=starts.device) < starts[:, None]
    return torch.zeros(hidden.shape, dtype=torch.float32, device=starts.device).masked_fill_(hidden, -torch.inf)


def _kept(spec: AttentionSpec, samples: slice, heads: slice, first: int, last: int, n_queries: int, n_keys: int,
          end: int) -> torch.Tensor:
    """Return the dropout factors of a tile [G, last - first, end]: 0, or the scale of kept probabilities."""
    assert spec.dropout is not None
    offset = n_keys - n_queries
    keep = attention_keep(
        spec.dropout, samples=range(spec.sample + samples.start, spec.sample + samples.stop),
        heads=range(heads.start, heads.stop), queries=range(offset + first, offset + last), keys=range(end),
    )
    return keep.flatten(0, 1).float().mul_(dropout_scale(spec.dropout.p))


def _tiles(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Yield (samples, heads, queries at a time): as many whole samples as fit a tile, or else heads of one sample."""
    batch, n_queries, n_heads, head_size = q.shape
    queries, tile_bytes = DEVICE_TILE_QUERIES, DEVICE_TILE_BYTES
    if q.is_cpu:
        queries, tile_bytes = CPU_TILE_QUERIES, CPU_TILE_BYTES * torch.get_num_threads()
    step = max(1, min(queries, n_queries))
    bytes_of_a_head = 4 * max(1, k.shape[1]) * (step + 2 * head_size)
    n = max(1, tile_bytes // bytes_of_a_head)
    samples_at_once, heads_at_once = max(1, n // n_heads), min(n, n_heads)
    for sample in range(0, batch, samples_at_once):
        for head in range(0, n_heads, heads_at_once):
            yield (slice(sample, min(sample + samples_at_once, batch)),
                   slice(head, min(head + heads_at_once, n_heads)), step)


def _product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return scale a b, scaled before it is rounded."""
    out = empty((*a.shape[:2], b.shape[2]), dtype=a.dtype, device=a.device) if out is None else out
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale, out=out)


def _accumulate(total: torch.Tensor | None, part: torch.Tensor, more_follow: bool) -> torch.Tensor:
    """Add part to total over the keys that part has. The sum is float32 unless the first part is the only one."""
    if total is None:
        return _copy(part, torch.float32) if more_follow and part.dtype != torch.float32 else part
    total[:, : part.shape[1]] += part
    return total


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Copy [B, T, H, K] to contiguous [G, T, K], because batched products are a fifth slower on strided operands."""
    return _copy(x.transpose(1, 2), x.dtype).flatten(0, 1)


def _copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous copy."""
    return empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _wide(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Copy [B, T, H, K] to [G, T, K] in float32, rotated if there are tables."""
    wide = _copy(x.transpose(1, 2), torch.float32).flatten(0, 1)
    if tables is not None:
        rotate_(wide.unflatten(0, (x.shape[0], x.shape[2])), *tables)
    return wide


def _store(
    target: torch.Tensor, grad: torch.Tensor | None, tables: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """Write grad [G, T, K] to target [B, T, H, K], rotated back if there are tables. A grad of None is 0."""
    heads = target.transpose(1, 2)
    if grad is None:
        heads.zero_()
        return
    if tables is not None:
        grad = grad if grad.dtype == torch.float32 else _copy(grad, torch.float32)
        rotate_(grad.view(heads.shape), *tables, inverse=True)
    heads.copy_(grad.view(heads.shape))


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of operands of products. On a CPU it is bfloat16 or float32: see `cpu_matmul`."""
    return torch.float32 if x.is_cpu and not (x.dtype == torch.bfloat16 and multiplies(x.dtype)) else x.dtype


def _as_one_sample(x: torch.Tensor) -> torch.Tensor:
    """Return [B, T, H, K] as [1, N, H, K]."""
    return x.flatten(0, 1)[None]


def _documents(cu_seqlens: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (number, rows) of each document that has rows."""
    ends = cu_seqlens.tolist()
    for number, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            yield number, slice(start, end)
