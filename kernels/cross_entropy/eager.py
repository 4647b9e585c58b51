"""The loss and its gradients in PyTorch, in one pass over the logits. `dispatch.py` has the formulas.

A chunk's logits are replaced by dl in float32, one strip of rows at a time.

N rows, D width, V vocabulary (valid_vocab of it in every product), C rows of a chunk, R rows of a strip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from phi1.kernels.core.constants import LOG2E
from phi1.kernels.core.cpu_matmul import mm
from phi1.kernels.core.cpu_memory import empty
from phi1.kernels.cross_entropy.spec import LossRule, Needs, gradient_dtype, scale_of

# Measured on a CPU: strips of up to 8 MiB stay in the caches through ten passes; with 16 MiB and more the passes take
# 1.5 times as long. Fewer strips mean fewer synchronisations of the threads.
CPU_STRIP_BYTES, DEVICE_STRIP_BYTES = 8 << 20, 64 << 20
VOCABULARY_SLICE = 4096  # rows of dW that are added up at a time, so that the partial product also stays in the caches


def chunk_rows(n_rows: int, dtype: torch.dtype, is_cpu: bool, rule: LossRule) -> tuple[int, int]:
    """Return (C, R): the rows of a chunk, as many as the workspace holds in chunks of equal size, and of a strip."""
    strip_bytes = min(CPU_STRIP_BYTES if is_cpu else DEVICE_STRIP_BYTES, rule.workspace_bytes // 2)
    strip = max(1, strip_bytes // (4 * rule.valid_vocab))
    rest = rule.workspace_bytes - (0 if dtype == torch.float32 else 4 * rule.valid_vocab * strip)
    most = max(1, rest // (dtype.itemsize * rule.valid_vocab))
    chunks = max(1, -(-n_rows // most))
    rows = max(1, -(-n_rows // chunks))
    return rows, min(strip, rows)


def losses_and_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rule: LossRule,
    needs: Needs,
    row_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `dispatch.losses_and_gradients` in PyTorch."""
    vocab, n_rows = rule.valid_vocab, x.shape[0]
    losses = x.new_empty((n_rows,), dtype=torch.float32)
    lse = torch.empty_like(losses)
    rows, strip_rows = chunk_rows(n_rows, x.dtype, x.is_cpu, rule)
    gradients = _Gradients(x, weight, needs, vocab, one_chunk=rows >= n_rows)
    logits = empty((rows, vocab), dtype=x.dtype, device=x.device)
    strip = None if x.dtype == torch.float32 else empty((strip_rows, vocab), dtype=torch.float32, device=x.device)
    wide_bias = None if bias is None else bias[:vocab].float() * LOG2E
    for first in range(0, n_rows, rows):
        chunk = slice(first, min(first + rows, n_rows))
        part = logits[: chunk.stop - first]
        mm(x[chunk], weight[:vocab].t(), out=part)
        for start in range(first, chunk.stop, strip_rows):
            some = slice(start, min(start + strip_rows, chunk.stop))
            own = part[start - first : some.stop - first]
            wide = own if strip is None else strip[: own.shape[0]].copy_(own)
            # In base 2, because PyTorch's exp2 is six times as fast as its exp on a CPU with AVX-512.
            if wide_bias is None:
                wide.mul_(LOG2E)
            else:
                torch.add(wide_bias, wide, alpha=LOG2E, out=wide)
            losses[some], lse[some] = _softmax_rows(wide, targets[some], rule, needs, x.dtype,
                                                    None if row_weights is None else row_weights[some])
            if needs:
                gradients.add_bias(wide)
                if strip is not None:
                    own.copy_(wide)
        if needs:
            gradients.add_products(part, chunk)
    return losses, lse, *gradients.finish()


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute `dispatch.scaled` in PyTorch."""
    if gradient.is_cpu and gradient.dtype == dtype:
        # The CPU kernel multiplies 16-bit elements by a scalar in float32.
        return torch.mul(gradient, factor.item(), out=empty(gradient.shape, dtype=dtype, device=gradient.device))
    return (gradient.float() * factor).to(dtype)


def _softmax_rows(
    logits: torch.Tensor, targets: torch.Tensor, rule: LossRule, needs: Needs, dtype: torch.dtype,
    row_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (losses [R], lse [R]) for float32 logits [R, V] in base 2. dl replaces the logits if it is needed."""
    vocab, e, z = rule.valid_vocab, rule.label_smoothing, rule.z_loss
    counted = targets != rule.ignore_index
    known = (targets >= 0) & (targets < vocab)
    index = targets.clamp(0, vocab - 1)[:, None]
    own = logits.gather(1, index)[:, 0] / LOG2E
    mean = logits.mean(1) / LOG2E if e else None
    high = logits.amax(1, keepdim=True)
    total = logits.sub_(high).exp2_().sum(1)
    lse = total.log() + high[:, 0] / LOG2E
    loss = lse - (1 - e) * own
    if mean is not None:
        loss -= e * mean
    if z:
        loss += z * lse.square()
    loss = torch.where(counted, torch.where(known, loss, torch.nan), 0.0)
    if needs:
        unit = torch.where(counted, torch.where(known, scale_of(dtype), torch.nan), 0.0)
        if row_weights is not None:
            unit = unit * row_weights
        logits.mul_((unit * (1 + 2 * z * lse) / total)[:, None])
        if e:
            logits.sub_((unit * (e / vocab))[:, None])
        logits.scatter_add_(1, index, (unit * (e - 1))[:, None])
    return loss, lse


class _Gradients:
    """Sums of dx, dW and db over chunks."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, needs: Needs, vocab: int, one_chunk: bool) -> None:
        self.x, self.weight, self.needs, self.vocab = x, weight[:vocab], needs, vocab
        kept, rows = gradient_dtype(x.dtype), weight.shape[0]
        self.dw_is_one_product = one_chunk and kept == x.dtype and x.shape[0] > 0
        self.dx = empty(x.shape if needs.x else (0,), dtype=kept, device=x.device)
        self.dw = x.new_empty(0, dtype=kept)
        if needs.weight:
            self.dw = empty(weight.shape, dtype=kept if one_chunk else torch.float32, device=x.device)
            self.dw[vocab if self.dw_is_one_product else 0 :] = 0
        self.db = torch.zeros(rows if needs.bias else 0, dtype=torch.float32, device=x.device)

    def add_bias(self, dlogits: torch.Tensor) -> None:
        """Add the sums over the rows of a strip, float32 [R, V]."""
        if self.needs.bias:
            self.db[: self.vocab] += dlogits.sum(0)

    def add_products(self, dlogits: torch.Tensor, chunk: slice) -> None:
        """Add a chunk's products with dlogits [C, V]."""
        if self.needs.x:
            self._add_dx(dlogits, self.dx[chunk])
        if self.needs.weight and self.dw_is_one_product:
            mm(dlogits.t(), self.x[chunk], out=self.dw[: self.vocab])
        elif self.needs.weight:
            for some in self._slices():
                self.dw[some] += _product(dlogits[:, some].t(), self.x[chunk], self.dw.dtype)

    def _add_dx(self, dlogits: torch.Tensor, dx: torch.Tensor) -> None:
        if not _widened(dlogits):
            if dlogits.dtype == dx.dtype:
                mm(dlogits, self.weight, out=dx)
            else:
                dx.copy_(_product(dlogits, self.weight, dx.dtype))
            return
        dx.zero_()
        for some in self._slices():
            dx += _product(dlogits[:, some], self.weight[some], dx.dtype)

    def _slices(self) -> Iterator[slice]:
        for first in range(0, self.vocab, VOCABULARY_SLICE):
            yield slice(first, min(first + VOCABULARY_SLICE, self.vocab))

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (dx, dW, db)."""
        return self.dx, self.dw.to(gradient_dtype(self.x.dtype)), self.db


def _product(a: torch.Tensor, b: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    """Return the product a b. It is never rounded to float16, whose range is too small for these sums."""
    if _widened(a):
        return torch.mm(a.float(), b.float())
    if a.is_cpu or a.dtype == wanted:
        return mm(a, b)
    return torch.mm(a, b, out_dtype=wanted)


def _widened(x: torch.Tensor) -> bool:
    """True if PyTorch has no product of x's dtype with a float32 result."""
    return x.is_cpu and x.dtype == torch.float16
